"""One-site losses: what each level costs in quality when all other sites stay as they are, measured or estimated.

A sweep measures them in passes, so that a search that is cut short has something for every site: first a middle level of each,
the costliest sites first, then coarser and finer ones. What is not measured yet is estimated from what is.
"""

from __future__ import annotations

import functools
import itertools
import math

import numpy as np

from autocompress.search.tables import CostTables, FloatArray, switch
from autocompress.types import LevelErrors, Plan, SearchSpace


class OneSite:
    """Losses of one-site plans above the dense model's, and the order of measuring them.

    ``errors``: output errors of levels, which say something before anything is measured. ``saved``: share of the cost that an
    option saves  # (n_options,); options that save nothing are not measured.
    """

    def __init__(self, space: SearchSpace, tables: CostTables, errors: LevelErrors | None = None) -> None:
        self.space, self.tables, self.errors = space, tables, errors or {}
        contexts = [space.dense]
        dense = np.maximum(tables.dense, 1)
        for column in range(len(tables.columns)):
            contexts.append(tables.cheapest(np.eye(len(tables.columns))[column] / dense))
        self.saved = tables.savings(list(dict.fromkeys(contexts)))
        self.measured: dict[tuple[int, int], float] = {}

    @functools.cached_property
    def by_saving(self) -> list[list[int]]:
        """Levels of each site from the costliest to the most saving; equal ones by index."""
        pairs = itertools.pairwise(self.tables.offsets)
        return [[int(v) for v in np.argsort(self.saved[a:b], kind="stable")] for a, b in pairs]

    def ladder(self, steps: int = 64) -> list[Plan]:
        """Distinct plans that go equally far at every site, from dense to the most saving level of each."""
        shares = [i / steps for i in range(steps + 1)]
        return list(dict.fromkeys(tuple(o[round(share * (len(o) - 1))] for o in self.by_saving) for share in shares))

    def passes(self) -> list[list[Plan]]:
        """Plans to measure: one list a pass, at most one plan a site in each."""
        orders = [self._order(site) for site in range(len(self.space.sites))]
        most = [self._saved(site).max() for site in range(len(orders))]
        by_cost = sorted(range(len(orders)), key=lambda site: (-most[site], site))
        rounds = max((len(order) for order in orders), default=0)
        return [
            [switch(self.space.dense, s, orders[s][i]) for s in by_cost if i < len(orders[s])] for i in range(rounds)
        ]

    def record(self, plan: Plan, loss: float) -> None:
        """Keep the loss (minus the dense one's) of a plan that differs from dense at one site."""
        site = next(i for i, level in enumerate(plan) if level)
        self.measured[site, plan[site]] = loss

    def losses(self) -> FloatArray:
        """A loss for every option; measured ones as they are, broken ones prohibitive.  # (n_options,)"""
        finite = {key: loss for key, loss in self.measured.items() if math.isfinite(loss)}
        shared = self._by_hash(finite)
        scales = {known: self._prior_scale(finite, known) for known in (False, True)}
        sites = range(len(self.space.sites))
        out = np.concatenate([self._site_losses(s, finite, shared, scales[s in self.errors]) for s in sites])
        broken = [key for key in self.measured if key not in finite]
        worst = 2.0 * float(np.abs(out).max(initial=0.0)) * max(len(self.space.sites), 1) + 1.0
        for site, level in broken:
            out[self.tables.offsets[site] + level] = worst
        return out

    def _saved(self, site: int) -> FloatArray:
        return self.saved[self.tables.offsets[site] : self.tables.offsets[site + 1]]

    def _order(self, site: int) -> list[int]:
        """Levels worth measuring, by saving: the middle, the end, then the middles of what is left.

        Layers offer formats rather than sizes: their order is rotated from layer to layer, so that each format is seen early.
        """
        saved = self._saved(site)
        levels = sorted(
            (level for level in range(1, len(saved)) if saved[level] > 0), key=lambda level: (saved[level], level)
        )
        if self.space.sites[site].kind == "layer" and levels:
            turn = site % len(levels)
            return levels[turn:] + levels[:turn]
        order: list[int] = []
        gaps = [(0, len(levels) - 1)]
        if len(levels) > 2:
            order, gaps = (
                [levels[len(levels) // 2], levels[-1]],
                [(0, len(levels) // 2 - 1), (len(levels) // 2 + 1, len(levels) - 2)],
            )
        while gaps:
            low, high = gaps.pop(0)
            if low <= high:
                middle = (low + high) // 2
                order.append(levels[middle])
                gaps += [(low, middle - 1), (middle + 1, high)]
        return order

    def _prior(self, site: int) -> FloatArray:
        """The site's output errors; else quadratic in its own share of saving, as SPDY's prior is in its level.  # (n_levels,)"""
        saved = self._saved(site)
        most = float(saved.max(initial=0.0))
        prior = (saved / most) ** 2 if most > 0 else np.zeros(len(saved))
        if site in self.errors:
            prior = np.array(self.errors[site], float)
        prior[1:] += 1e-3  # a compressed level is never free before it was measured
        prior[0] = 0.0
        return prior

    def _prior_scale(self, finite: dict[tuple[int, int], float], known: bool) -> float:
        """Losses against priors, of sites whose output errors are ``known`` or of the others."""
        measured = sorted(finite.items())
        alike = [item for item in measured if (item[0][0] in self.errors) == known] or measured
        ratios = [max(loss, 0.0) / self._prior(site)[level] for (site, level), loss in alike]
        return max(float(np.median(ratios)), 1e-9) if ratios else 1.0

    def _by_hash(self, finite: dict[tuple[int, int], float]) -> dict[str, float]:
        """Median loss of layer levels that other layers have measured (the same format elsewhere)."""
        found: dict[str, list[float]] = {}
        for (site, level), loss in sorted(finite.items()):
            if self.space.sites[site].kind == "layer":
                found.setdefault(self.space.levels[site][level].hash, []).append(loss)
        return {level_hash: float(np.median(losses)) for level_hash, losses in found.items()}

    def _site_losses(
        self, site: int, finite: dict[tuple[int, int], float], shared: dict[str, float], scale: float
    ) -> FloatArray:
        saved = self._saved(site)
        known = [level for level in range(1, len(saved)) if (site, level) in finite]
        out = scale * self._prior(site)
        if known:
            out = self._interpolate(saved, [(float(saved[v]), finite[site, v]) for v in known])
        if self.space.sites[site].kind == "layer":
            for level in range(1, len(saved)):
                out[level] = shared.get(self.space.levels[site][level].hash, out[level])
        out[0] = 0.0
        for level in known:
            out[level] = finite[site, level]
        return out

    @staticmethod
    def _interpolate(saved: FloatArray, points: list[tuple[float, float]]) -> FloatArray:
        """Square root of the loss, linear in the saving between measured levels, monotone, extended in proportion."""
        points = sorted(points)
        x = np.array([0.0, *(p[0] for p in points)])
        y = np.maximum.accumulate(np.sqrt(np.maximum([0.0, *(p[1] for p in points)], 0.0)))
        root = np.interp(saved, x, y)
        beyond = saved > x[-1]
        root[beyond] = y[-1] * saved[beyond] / max(x[-1], 1e-12)
        return root**2

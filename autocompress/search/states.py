"""What a policy sees of a site: AMC's state (He et al. 2018, section 3.1) from sites and cost tables, never from a model."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from autocompress.search.tables import FloatArray, switch
from autocompress.search.wall import Choices
from autocompress.types import Plan, Site

KINDS = ("channels", "block", "layer")
N_FEATURES = 11
"""Numbers that :func:`describe` gives of a site."""


def _sizes(site: Site) -> tuple[float, float, float]:
    """Outputs, inputs, kernel size; a group has its width and the number of its layers."""
    out, inputs, kernel = ([float(n) for n in site.shape] + [1.0, 1.0, 1.0])[:3]
    return (out, inputs, kernel) if site.shape else (float(site.width), float(len(site.members)), 1.0)


class States:
    """AMC's state of each site on the way: index, kind, outputs, inputs, kernel size, MACs, weights, what the site can save,
    then for each budgeted cost what was saved so far and what the sites after it can still save, and the last action.

    With one budget these are AMC's eleven, each scaled to [0, 1]. Stride and image size are not known to a search space; MACs
    and weights say as much.
    """

    def __init__(self, choices: Choices) -> None:
        self.choices = choices
        sites = [choices.space.sites[s] for s in choices.sites]
        fixed = [
            [
                float(i),
                float(KINDS.index(site.kind)),
                *_sizes(site),
                float(site.macs),
                float(site.params),
                choices.most[s],
            ]
            for i, (s, site) in enumerate(zip(choices.sites, sites, strict=True))
        ]
        table = np.array(fixed, float).reshape(len(sites), 8)
        low = table.min(axis=0, initial=np.inf)
        span = table.max(axis=0, initial=-np.inf) - low
        self._fixed: FloatArray = np.divide(table - low, span, out=np.zeros_like(table), where=span > 0)
        self.n = 8 + 2 * len(choices.dense_cost) + 1

    def along(self, plan: Plan, n: int | None = None) -> FloatArray:
        """States at the first ``n`` sites (all), when ``plan`` is decided from the first to the last.  # (n, self.n)"""
        sites = self.choices.sites if n is None else self.choices.sites[:n]
        return np.stack([self.at(i, plan) for i in range(len(sites))]) if sites else np.zeros((0, self.n))

    def at(self, step: int, plan: Plan) -> FloatArray:
        """The state before step ``step`` of an episode; only what ``plan`` decides before it matters.  # (n,)"""
        choices = self.choices
        site = choices.sites[step]
        before = choices.space.dense
        for s in choices.sites[:step]:
            before = switch(before, s, plan[s])
        rest = (*before[:site], *choices.cheap[0][site:])
        now, least = choices.tables.cost([before, rest])
        dense = np.maximum(choices.dense_cost, 1)
        last = choices.action(choices.sites[step - 1], plan[choices.sites[step - 1]]) if step else 1.0
        state: FloatArray = np.concatenate([self._fixed[step], (dense - now) / dense, (now - least) / dense, [last]])
        return state


def describe(choices: Choices) -> FloatArray:
    """Sites in numbers that mean the same in every space, for a policy that moves from one to another.  # (n_sites, 11)

    Kind (one-hot), place, log sizes, log shares of MACs, weights and of what can be saved, number of levels.
    """
    sites = [choices.space.sites[s] for s in choices.sites]
    total = [max(sum(values), 1e-12) for values in _sums(sites, [choices.most[s] for s in choices.sites])]
    rows: list[Sequence[float]] = []
    for i, (s, site) in enumerate(zip(choices.sites, sites, strict=True)):
        out, inputs, kernel = _sizes(site)
        share = [value * len(sites) / whole for value, whole in zip(_own(site, choices.most[s]), total, strict=True)]
        rows.append(
            [
                *(float(site.kind == kind) for kind in KINDS),
                i / max(len(sites) - 1, 1),
                math.log10(1 + out) / 4,
                math.log10(1 + inputs) / 4,
                kernel / 7,
                *(math.log10(0.01 + x) / 2 for x in share),
                len(choices.orders[s]) / 10,
            ]
        )
    return np.array(rows, float).reshape(len(sites), N_FEATURES)


def _own(site: Site, saved: float) -> tuple[float, float, float]:
    return float(site.macs), float(site.params), saved


def _sums(sites: Sequence[Site], saved: Sequence[float]) -> list[list[float]]:
    return [list(column) for column in zip(*map(_own, sites, saved), strict=True)] or [[], [], []]

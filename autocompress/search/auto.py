"""``auto``: tables first, then a model of how sites act together, racing up the ladder, the whole front at once.

It begins as ``exact`` does, but measures only what the next decision needs: a first level of every site, then the others beside
the search. A Gaussian process over plans (``interactions``) learns from everything that was judged on the slice; candidates are
mutations of the best plans, climbed uphill on the process, and the optimum of its linearisation within the limits. A few of them
are judged on the slice, and what leads there goes to ``full``, rarely enough that the ladder's upper rung costs no more than the
lower one. The search is over when for a dozen generations no gain above a thousandth of the loss was expected.
"""

from __future__ import annotations

import math

import numpy as np
from scipy.special import ndtr

from autocompress.search.base import CONTROLLERS, Asking, fitness
from autocompress.search.evolution import Evolution
from autocompress.search.interactions import Interactions
from autocompress.search.random_ import TINY
from autocompress.search.tables import FloatArray, all_plans
from autocompress.types import IntArray, Plan

NOISE = 1e-3
"""A gain of this share of a loss is nothing: other images would say otherwise."""


@CONTROLLERS.register("auto")
class Auto(Evolution):
    """Any budgets on any costs, quality budgets by the violation that comes back; not the default yet (``docs/log.md``)."""

    offspring = 4
    climbs = 4
    """Rounds of mutation of the candidates that the model likes best, before any of them is judged."""
    parents = 6
    worth = 10
    """Plans judged on the slice for one at ``full``: what the upper rung costs, so that half of the time goes to each."""
    idle_after = 12
    """Generations without an expected gain above ``NOISE`` after which the search is over."""

    def _search(self) -> Asking:
        self._prepare()
        self.pool = all_plans(self.space) if self.space.size <= TINY else None
        self.since, self.line = 0, 0
        yield from self._ask_targets(self.one_site.losses(), [0], quick=True)
        yield from self._judge([self.space.dense], "slice")
        yield from self._uniform()
        passes = self.one_site.passes()
        yield from self._measure(passes[0] if passes else [])
        yield from self._bisect(self.one_site.losses())
        rest = [plan for later in passes[1:] for plan in later]
        generation = idle = quiet = 0
        while idle < self.patience and quiet < self.idle_after:
            limit = self._pick()
            children, gain, best = self._propose(limit, generation)
            generation += 1
            idle = 0 if children or rest else idle + 1
            quiet = quiet + 1 if not rest and gain <= NOISE * best < math.inf else 0
            yield from self._judge(children, "slice")
            yield from self._measure(rest[:1])
            rest = rest[1:]
            self.since += len(children) + 1
            if self.since >= self.worth:
                yield from self._promote()
        yield from self._finals()

    # ------------------------------------------------------------ the ladder

    def _uniform(self) -> Asking:
        """The mildest plan within the goal's limits that goes equally far at every site: a parent beside the table's optimum."""
        ladder = self.one_site.ladder()
        fits = self.tables.fits(ladder, self.targets[0])
        if any(fits):
            for rung in ("slice", "full"):
                yield from self._judge([ladder[fits.index(True)]], rung)

    def _promote(self) -> Asking:
        """The leaders on the slice go to ``full``: the goal's, or, where it was judged, that of the next target in line."""
        self.since = 0
        for _ in self.targets:
            target = 0 if self.line % 2 == 0 else 1 + (self.line // 2) % (len(self.targets) - 1)
            self.line += 1
            inside = self._inside(self.targets[target])
            if inside and ("full", inside[0].plan) not in self.seen:
                yield from self._judge([inside[0].plan], "full")
                return

    # ------------------------------------------------------------ candidates

    def _propose(self, limit: IntArray, generation: int) -> tuple[list[Plan], float, float]:
        """Plans to judge on the slice, the gain they promise, and the loss above dense that it counts from."""
        leaders = self._inside(limit)
        model = self._model()
        best = fitness(leaders[0]) - self._zero() if leaders else math.inf
        starts = [e.plan for e in leaders[: self.parents]] or [self._parent(limit)]
        pool = self._candidates(starts, limit, model)
        if self.pool is None and generation % self.resolve_every == 0:
            solved = self._decide(lambda: self._linearised(model, starts[0], limit))
            if solved is not None and ("slice", solved) not in self.seen:
                pool = list(dict.fromkeys([solved, *pool]))
        if not pool:
            return [], 0.0, best
        mean, spread = model.predict(pool)
        gain = _expected_gain(best, mean, spread)
        order = sorted(range(len(pool)), key=lambda i: (-gain[i], mean[i], pool[i]))
        likely = sorted(range(len(pool)), key=lambda i: (mean[i], pool[i]))
        chosen = list(dict.fromkeys([*likely[:1], *order[: self.offspring - 2]]))
        rest = [i for i in likely[: max(self.offspring, len(likely) // 2)] if i not in chosen]
        chosen += self.rng.sample(rest, min(len(rest), self.offspring - len(chosen)))
        return [pool[i] for i in chosen], float(gain.max()) if math.isfinite(best) else math.inf, best

    def _model(self) -> Interactions:
        model = Interactions(self.tables, self.one_site.losses())
        known = [e for e in self._finite("slice") if sum(level > 0 for level in e.plan) > 1]
        if known:
            model.fit([e.plan for e in known], np.array([fitness(e) - self._zero() for e in known]))
        return model

    def _candidates(self, starts: list[Plan], limit: IntArray, model: Interactions) -> list[Plan]:
        """New plans within the limits that the model likes: mutations of the starts, then of the best of these."""
        if self.pool is not None:
            return self._fresh(self.pool, limit)
        found: dict[Plan, float] = {}
        for _ in range(self.climbs):
            each = self.candidates // self.climbs // len(starts)
            raw = dict.fromkeys(self.space.effective(self._mutate(s)) for s in starts for _ in range(max(each, 4)))
            fresh = [p for p in self._fresh(list(raw), limit) if p not in found]
            if fresh:
                mean, spread = model.predict(fresh)
                found.update(zip(fresh, (mean - 0.5 * spread).tolist(), strict=True))
            ranked = sorted(found, key=lambda p: (found[p], p))
            starts = [*ranked[: self.parents], starts[0]]
        return sorted(found, key=lambda p: (found[p], p))[:64]

    def _linearised(self, model: Interactions, at: Plan, limit: IntArray) -> Plan | None:
        """The optimum within the limits of the model's first order around a plan: what each single switch would change."""
        switched = [self.tables.switched(at, option) for option in range(self.tables.n_options)]
        mean, _ = model.predict(switched)
        return self._within(mean - mean[self.tables.current(at)][self.tables.site_of], limit, at)


def _expected_gain(best: float, mean: FloatArray, spread: FloatArray) -> FloatArray:
    """``E max(0, best - loss)`` of each candidate (Jones et al. 1998); minus the mean where nothing is known to beat."""
    if not math.isfinite(best):
        return -mean
    z = (best - mean) / np.maximum(spread, 1e-12)
    density = np.exp(-0.5 * z**2) / math.sqrt(2 * math.pi)
    gain: FloatArray = (best - mean) * ndtr(z) + spread * density
    return gain

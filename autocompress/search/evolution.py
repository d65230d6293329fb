"""``evolution``: solve the table model, then evolve its solutions by level switches (EvoPress, Sieberling et al. 2024).

Each generation picks a target on the way to the budgets (the budgets themselves most often), takes the best plan known within
it as the parent, and mutates it by a few switches that lower some sites and raise others. Costs are known beforehand, so a
child that misses its target is never asked. Children race on ``slice``; those that beat their parent there go to ``full``.
All targets share one archive. Unlike EvoPress, a child is never asked twice, every evaluation also corrects the table model
that picks among the many possible children, and what counts in the end is always measured at ``full``.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence

import numpy as np

from autocompress.search.base import CONTROLLERS, Asking, fitness
from autocompress.search.exact import TableSearch
from autocompress.search.random_ import TINY
from autocompress.search.surrogate import refine
from autocompress.search.tables import FloatArray, all_plans, switch
from autocompress.types import Evaluation, Fidelity, IntArray, Plan, Query


@CONTROLLERS.register("evolution")
class Evolution(TableSearch):
    """Any budgets on any costs, quality budgets by the violation that comes back."""

    offspring = 8
    promoted = 2
    candidates = 256
    memory = 300
    resolve_every = 6
    patience = 40
    goal_share = 0.6
    raced: Fidelity = "slice"

    def _search(self) -> Asking:
        self._prepare()
        yield from self._sweep()
        yield from self._bisect(self.one_site.losses())
        self.pool = all_plans(self.space) if self.space.size <= TINY else None
        prior = self.one_site.losses()
        incumbent, self.base = self._incumbent(), self.space.dense
        if incumbent is not None:
            self.base = incumbent.plan
            prior = yield from self._remeasure(incumbent.plan, prior)
            yield from self._ask_targets(prior, [0])
        generation, idle = 0, 0
        while idle < self.patience:
            limit = self._pick()
            parent = self._parent(limit)
            losses = self._refined(prior)
            children = self._children(parent, limit, losses, generation)
            generation += 1
            idle = 0 if children else idle + 1
            if children:
                yield from self._race(parent, children)
        yield from self._finals()

    def _pick(self) -> IntArray:
        """Limits of this generation: the goal most often; with quality budgets alone, just below the cheapest good plan."""
        if self.rng.random() >= self.goal_share:
            return self.targets[self.rng.randrange(len(self.targets))]
        if not self.free:
            return self.targets[0]
        good = [e.plan for (rung, _), e in self.seen.items() if rung == "full" and e.feasible]
        if not self.budgets or not good:
            return self.targets[self.rng.randrange(len(self.targets))]
        costs = self.tables.cost(good)
        unit = np.maximum(self.dense_cost, 1)
        least = costs[int(np.argmin((costs / unit).sum(axis=1)))]
        below: IntArray = np.maximum(least - np.maximum(least * self.rng.randrange(1, 6) // 100, 1), 1)
        return below

    def _parent(self, limit: IntArray) -> Plan:
        """The best plan at ``full`` within limits; while there is none, the one that misses them by least."""
        full = [e for (rung, _), e in self.seen.items() if rung == "full"]
        if not full:
            return self.space.dense
        costs = self.tables.cost([e.plan for e in full])
        over = np.maximum(costs / np.maximum(limit, 1) - 1, 0).sum(axis=1)
        return min(zip(over, full, strict=True), key=lambda pair: (pair[0], fitness(pair[1]), pair[1].plan))[1].plan

    def _race(self, parent: Plan, children: list[Plan]) -> Generator[list[Query], list[Evaluation], None]:
        """Children that beat their parent on the slice go to ``full``, the best ones first."""
        answers = yield from self._judge([parent, *children], "slice")
        bar = fitness(answers[0])
        better = sorted((e for e in answers[1:] if fitness(e) < bar), key=lambda e: (fitness(e), e.plan))
        for e in better[: self.promoted]:
            yield from self._judge([e.plan], "full")

    def _finals(self) -> Generator[list[Query], list[Evaluation], None]:
        """Nothing is left to try: judge the best of each target on the slice at ``full``, if it was not."""
        for target in self.targets:
            for e in self._inside(target)[: self.promoted]:
                yield from self._judge([e.plan], "full")

    def _inside(self, limit: IntArray) -> list[Evaluation]:
        """Evaluations at the raced rung within limits on costs, the best first."""
        found = self._finite(self.raced)
        fits = self.tables.fits([e.plan for e in found], limit)
        return sorted((e for e, ok in zip(found, fits, strict=True) if ok), key=lambda e: (fitness(e), e.plan))

    def _fresh(self, plans: Sequence[Plan], limit: IntArray) -> list[Plan]:
        """Those within limits on costs that the raced rung has not seen."""
        new = [p for p in plans if (self.raced, p) not in self.seen]
        return [p for p, fits in zip(new, self.tables.fits(new, limit), strict=True) if fits]

    def _refined(self, prior: FloatArray) -> FloatArray:
        """The table model, corrected by the last plans that were judged on the slice."""
        known = self.seen.get(("slice", self.base))
        if known is None or not np.isfinite(fitness(known)):
            return prior
        recent = self._finite("slice")[-self.memory :]
        gains = np.array([fitness(e) - fitness(known) for e in recent])
        return refine(self.tables, prior, self.base, [e.plan for e in recent], gains)

    def _children(self, parent: Plan, limit: IntArray, losses: FloatArray, generation: int) -> list[Plan]:
        """New plans within the limit: half the best by the table model, half by chance; now and then its optimum."""
        if self.pool is not None:
            raw = self.pool
        else:
            raw = list(dict.fromkeys(self.space.effective(self._mutate(parent)) for _ in range(self.candidates)))
        found = self._fresh([p for p in raw if p != parent], limit)
        predicted = {p: float(losses[self.tables.current(p)].sum()) for p in found}
        ranked = sorted(found, key=lambda p: (predicted[p], p))
        half = self.offspring // 2
        rest = ranked[half : max(half, len(ranked) // 2)] or ranked[half:]
        chosen = ranked[:half] + self.rng.sample(rest, min(len(rest), self.offspring - half))
        if self.pool is None and generation % self.resolve_every == 0:
            found_plan = self._decide(lambda: self._within(losses, limit, parent))
            if found_plan is not None and (self.raced, found_plan) not in self.seen and found_plan not in chosen:
                chosen = [found_plan, *chosen[: self.offspring - 1]]
        return chosen

    def _mutate(self, plan: Plan) -> Plan:
        """``k = min(U{1..3}, U{1..3})`` pairs of switches: one site saves more, then another less."""
        for _ in range(min(self.rng.randint(1, 3), self.rng.randint(1, 3))):
            plan = self._step(plan, up=False)
            plan = self._step(plan, up=True)
        return plan

    def _step(self, plan: Plan, up: bool) -> Plan:
        """One random site to the next level in the order of saving (one time in five to any level on that side)."""
        site = self.rng.randrange(len(plan))
        at = self.orders[site].index(plan[site])
        side = self.orders[site][:at][::-1] if up else self.orders[site][at + 1 :]
        if not side:
            return plan
        return switch(plan, site, side[0] if self.rng.random() < 0.8 else side[self.rng.randrange(len(side))])

"""``exact``: the optimum of the table model, measured one site at a time, solved as an integer program, measured again.

The table model adds up one-site losses. It is an approximation (after the large ones, the small print: what two sites do
together), so the solutions are judged at ``full``, and the losses are measured once more around the best of them
(measured on language models: one re-measurement gains as much as tens of generations of evolution).
"""

from __future__ import annotations

from collections.abc import Generator, Sequence

import numpy as np

from autocompress.search.base import CONTROLLERS, Asking, BaseController, Judged, fitness
from autocompress.search.feasible import floors
from autocompress.search.solver import Solver, repair
from autocompress.search.sweep import OneSite
from autocompress.search.tables import UNLIMITED, FloatArray, switch, target_ladder
from autocompress.types import Evaluation, IntArray, Plan, Query


class TableSearch(BaseController):
    """What controllers on the table model share: targets along the cost axis, the sweep, solving.

    ``targets[0]`` is the goal: the user's limits (without any, the middle of the axis); the others lie between the dense cost
    and the goal, and beyond the goal towards the cheapest plan. ``free``: dense holds every limit on a cost.
    """

    n_before, n_beyond = 5, 3
    rounds = 5

    def _prepare(self) -> None:
        self.solver = Solver(self.tables)
        self.dense_cost = self.tables.dense
        self.floor = floor = floors(self.tables)
        limit = self.limits.limit
        self.free = bool((self.dense_cost <= limit).all())
        if self.free:  # the whole axis is the user's
            middle = floor + (self.dense_cost - floor) // 2
            rest = target_ladder(self.dense_cost, middle, floor, self.n_before, self.n_beyond)
            goal = limit if self.limits.limited else middle
            self.targets: list[IntArray] = [goal, *([middle, *rest] if self.limits.limited else rest)]
        else:
            self.targets = [limit, *target_ladder(self.dense_cost, limit, floor, self.n_before, self.n_beyond)]
        self.one_site = OneSite(self.space, self.tables, self.errors)
        self.orders = self.one_site.by_saving
        self.plans: dict[int, Plan] = {}  # target -> its last solution

    def _solve(self, losses: FloatArray, target: int, quick: bool = False) -> Plan | None:
        """The best plan of a table model for a target; near misses for the goal rather than nothing."""
        limit = self.targets[target]
        starts = [self.plans[target]] if target in self.plans else list(self.plans.values())[-1:]

        def solve() -> Plan | None:
            found = self._best(losses, limit, starts, quick)
            if found is not None:
                return found
            return repair(self.tables, losses, self.space.dense, limit) if target == 0 else None

        plan = self._decide(solve)
        if plan is not None:
            self.plans[target] = plan
        return plan

    def _ask_targets(self, losses: FloatArray, targets: Sequence[int], quick: bool = False) -> Judged:
        """Judge the solutions for targets at ``full``."""
        found: list[Evaluation] = []
        for target in targets:
            plan = self._solve(losses, target, quick or target > 0)
            if plan is not None:
                found += yield from self._judge([plan], "full")
        return found

    def _sweep(self) -> Asking:
        """Measure one-site losses at ``slice``. The goal is judged on the way, ever more rarely, all targets after passes."""
        few = [
            0,
            (self.n_before + 1) // 2,
            self.n_before + (self.n_beyond + 1) // 2,
        ]  # a first front, within a few plans
        yield from self._ask_targets(self.one_site.losses(), few, quick=True)
        yield from self._judge([self.space.dense], "slice")
        chunk, done = 8, 0
        for number, plans in enumerate(self.one_site.passes()):
            while plans:
                head, plans = plans[: chunk - done], plans[chunk - done :]
                yield from self._measure(head)
                done += len(head)
                if done == chunk:
                    yield from self._ask_targets(self.one_site.losses(), [0], quick=True)
                    chunk, done = 2 * chunk, 0
            if number % 2 == 0:
                yield from self._ask_targets(self.one_site.losses(), range(len(self.targets)), quick=True)
        yield from self._ask_targets(self.one_site.losses(), range(len(self.targets)))

    def _measure(self, plans: Sequence[Plan]) -> Asking:
        """One-site losses on the slice."""
        for evaluation in (yield from self._judge(plans, "slice")):
            self.one_site.record(evaluation.plan, fitness(evaluation) - self._zero())

    def _zero(self) -> float:
        """The loss of the dense plan on the slice, from which one-site losses count; 0 where it is broken or not known."""
        dense = self.seen.get(("slice", self.space.dense))
        return fitness(dense) if dense is not None and np.isfinite(fitness(dense)) else 0.0

    def _remeasure(self, base: Plan, losses: FloatArray) -> Generator[list[Query], list[Evaluation], FloatArray]:
        """Losses around ``base``: the levels next to its own are measured, the table's differences extend them."""
        tables, saved = self.tables, self.one_site.saved
        here = fitness((yield from self._judge([base], "slice"))[0])
        near: list[tuple[int, int]] = []
        for site, n in enumerate(tables.n_levels):
            at = self.orders[site].index(base[site])
            near += [(site, self.orders[site][i]) for i in (at - 1, at + 1) if 0 <= i < n]
        near = [(s, v) for s, v in near if saved[tables.offsets[s] : tables.offsets[s + 1]].any()]
        near = [(s, v) for s, v in near if self.space.effective(switch(base, s, v)) != base]  # not in a dropped block
        answers = yield from self._judge([switch(base, s, v) for s, v in near], "slice")
        out = losses - losses[tables.current(base)][tables.site_of]
        shift: dict[tuple[int, int], float] = {}
        for (site, level), evaluation in zip(near, answers, strict=True):
            option = int(tables.offsets[site]) + level
            shift[site, option] = fitness(evaluation) - here - out[option]
        return self._shifted(out, base, shift)

    def _around(self, losses: FloatArray) -> Asking:
        """Measure and solve again around the best plan, at most ``rounds`` times, until that gains nothing."""
        before = self._incumbent()
        for _ in range(self.rounds):
            if before is None:
                return
            losses = yield from self._remeasure(before.plan, losses)
            yield from self._ask_targets(losses, range(len(self.targets)))
            yield from self._bisect(losses)
            after = self._incumbent()
            if after is None or after.plan == before.plan:
                return
            before = after

    def _shifted(self, out: FloatArray, base: Plan, shift: dict[tuple[int, int], float]) -> FloatArray:
        """Apply measured corrections, also to the levels beyond the measured neighbour on the same side."""
        saved, result = self.one_site.saved, out.copy()
        worst = 2.0 * float(np.abs(out).max(initial=0.0)) * max(len(base), 1) + 1.0
        for (site, option), change in sorted(shift.items()):
            offset = int(self.tables.offsets[site])
            own = (saved[offset + base[site]], base[site])
            upward = (saved[option], option - offset) > own
            for level in range(self.tables.n_levels[site]):
                side = (saved[offset + level], level)
                if level != base[site] and (side > own) == upward:
                    result[offset + level] += change if np.isfinite(change) else worst
        return result

    def _bisect(self, losses: FloatArray, steps: int = 6) -> Asking:
        """With quality budgets alone: halve the gap between the cheapest good plan and the next cheaper bad one."""
        if not self.free or not self.budgets:
            return
        low = float((self.floor / np.maximum(self.dense_cost, 1)).mean())
        for _ in range(steps):
            shares = [(self.tables.share(p), e) for (rung, p), e in self.seen.items() if rung == "full"]
            good = min((share for share, e in shares if e.feasible), default=1.0)
            bad = max((share for share, e in shares if not e.feasible and share < good), default=low)
            limit = (self.dense_cost * (good + bad) / 2).astype(np.int64)
            plan = self._decide(lambda limit=limit: self._within(losses, limit))  # type: ignore[misc]
            if plan is None or ("full", plan) in self.seen or good - bad < 0.01:
                return
            yield from self._judge([plan], "full")

    def _within(self, losses: FloatArray, limit: IntArray, *starts: Plan) -> Plan | None:
        found = self._best(losses, limit, starts or list(self.plans.values())[-1:], quick=True)
        return None if found is None else self.space.effective(found)

    def _best(self, losses: FloatArray, limit: IntArray, starts: Sequence[Plan], quick: bool) -> Plan | None:
        """The objective of the table model: the least sum of one-site losses within a limit."""
        found = self.solver.solve(losses, limit, starts, quick)
        return None if found is None else found.plan

    def _incumbent(self) -> Evaluation | None:
        """The best at ``full`` within the goal's limits: quality budgets first, then the loss.

        With quality budgets alone, the cheapest plan that holds them.
        """
        goal = self.targets[0]
        full = self._finite("full")
        if not full:
            return None
        good = [e for e in full if e.feasible]
        if self.free and self.budgets and good:
            return min(good, key=lambda e: (self.tables.share(e.plan), fitness(e), e.plan))
        costs = self.tables.cost([e.plan for e in full])
        unit = np.where(goal < UNLIMITED, np.maximum(goal, 1), np.inf)
        over = np.maximum((costs - goal) / unit, 0).sum(axis=1)
        return min(
            zip(over, full, strict=True), key=lambda pair: (pair[0], pair[1].violation, fitness(pair[1]), pair[1].plan)
        )[1]


@CONTROLLERS.register("exact")
class Exact(TableSearch):
    """Sweep, solve for every target, then measure and solve again around the best plan until that gains nothing."""

    def _search(self) -> Asking:
        self._prepare()
        yield from self._sweep()
        yield from self._bisect(self.one_site.losses())
        yield from self._around(self.one_site.losses())

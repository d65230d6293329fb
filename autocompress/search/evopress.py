"""``evopress``: EvoPress as published (Sieberling et al. 2024), its "sum of levels" generalised to any cost tables.

A (1+lambda) evolution: one parent, children by level switches that preserve the budget, staged selection on growing data,
the parent joining the last stage only. No table model, no crossover, no memory of what was tried beyond "a plan is not paid
twice". Its rules are those of the released ``evo_prune_search``, ``evo_quant_search`` and ``evo_drop_search``; what has to differ
here is listed in ``docs/search.md``.
"""

from __future__ import annotations

from collections.abc import Generator

import numpy as np

from autocompress.search.base import CONTROLLERS, Asking, BaseController, fitness
from autocompress.search.sweep import OneSite
from autocompress.search.tables import switch
from autocompress.types import Evaluation, IntArray, Plan, Query


@CONTROLLERS.register("evopress")
class EvoPress(BaseController):
    """Published: 64 children, 8 @ 2,048 tokens -> 2 @ 16,384 -> 1 @ 65,536 (sparsity); 32, 2 @ 2,048 -> 1 @ 32,768 (blocks).

    The two rungs of a search are the first and the last stage; stages between them fold into the first.
    """

    offspring, block_offspring = 64, 32
    survivors = 2
    initially_generated = 64
    max_switches = 10
    refill = 0.8
    patience = 20
    """Generations without a new plan after which the search is over."""

    def _search(self) -> Asking:
        one_site = OneSite(self.space, self.tables)
        self.orders, self.ladder = one_site.by_saving, one_site.ladder()
        self.blocks_only = all(len(order) <= 2 for order in self.orders)
        self.limit: IntArray = self.limits.limit
        parent = yield from self._start()
        self.limit = np.maximum(
            self.limit, self.tables.cost([parent])[0]
        )  # budgets nothing holds: no worse than the start
        idle = 0
        while idle < self.patience:
            asked = len(self.seen)
            children = self._children(parent)
            if children:
                parent = yield from self._select(parent, children)
            idle = 0 if len(self.seen) > asked else idle + 1

    def _select(self, parent: Plan, children: list[Plan]) -> Generator[list[Query], list[Evaluation], Plan]:
        """The fittest on the slice, with the parent at ``full``: the fittest there. A child as good as its parent replaces it."""
        answers = yield from self._judge(children, "slice")
        first = sorted(answers, key=lambda e: (fitness(e), e.plan))[: self.survivors]
        last = yield from self._judge([*(e.plan for e in first), parent], "full")
        return min(last, key=fitness).plan

    # ------------------------------------------------------------ the initial plan

    def _start(self) -> Generator[list[Query], list[Evaluation], Plan]:
        """Uniform under the limits; where sites are only on or off, the best of 64 random plans on the slice."""
        ladder = self.ladder
        if not self.limits.limited:
            self.limit = self.tables.cost([(yield from self._affordable(ladder))])[0]
        within = self.tables.fits(ladder, self.limit)
        uniform = ladder[within.index(True)] if any(within) else self._cheapest()
        yield from self._judge([uniform], "full")
        if all(len(order) != 2 for order in self.orders):
            return uniform
        above = ladder[max(0, within.index(True) - 1)] if any(within) else self.space.dense
        drawn = self.initially_generated - 1
        found = self._lowered([above] * drawn, [self.tables.n_options] * drawn)
        plans = list(dict.fromkeys([uniform, *(p for p in found if p is not None)]))
        answers = yield from self._judge(plans, "slice")
        best = min(answers, key=lambda e: (fitness(e), e.plan)).plan
        yield from self._judge([best], "full")
        return best

    def _affordable(self, ladder: list[Plan]) -> Generator[list[Query], list[Evaluation], Plan]:
        """Without a limit on a cost: the cheapest uniform plan that holds the quality budgets; the middle one without any."""
        low, high = 0, len(ladder) - 1
        if not self.budgets:
            return ladder[high // 2]
        while low < high:
            middle = (low + high + 1) // 2
            [answer] = yield from self._judge([ladder[middle]], "full")
            low, high = (middle, high) if answer.feasible else (low, middle - 1)
        return ladder[low]

    def _cheapest(self) -> Plan:
        return self.tables.cheapest(1 / np.maximum(self.limit, 1))

    # ------------------------------------------------------------ children

    def _children(self, parent: Plan) -> list[Plan]:
        """Distinct children within the limits. Where levels are too coarse to fill a generation, the refill rule is waived."""
        wanted = self.block_offspring if self.blocks_only else self.offspring
        children: dict[Plan, None] = {}
        for attempt in range(8):
            counts = [min(self.rng.randint(1, 3), self.rng.randint(1, 3)) for _ in range(2 * wanted)]
            raised = [self._raised(parent, k) for k in counts]
            if self.blocks_only:
                lowered = [
                    p if ok else None for p, ok in zip(raised, self.tables.fits(raised, self.limit), strict=True)
                ]
            else:
                lowered = self._lowered(raised, [self.max_switches - k for k in counts])
            ended = [None if b is None else self.space.effective(b) for b in lowered]
            pairs = [(a, b) for a, b in zip(raised, ended, strict=True) if b is not None and b != parent]
            if pairs and attempt < 4:
                pairs = self._refilled(parent, pairs)
            children.update(dict.fromkeys(b for _, b in pairs))
            if len(children) >= wanted:
                break
        return list(children)[:wanted]

    def _raised(self, parent: Plan, k: int) -> Plan:
        """``k`` random sites one level up in cost; where sites are only on or off, as many kept ones are dropped."""
        plan = parent
        for _ in range(k):
            able = [s for s, order in enumerate(self.orders) if order.index(plan[s]) > 0]
            kept = [s for s, order in enumerate(self.orders) if order.index(plan[s]) + 1 < len(order)]
            if able:
                plan = self._switched(plan, self.rng.choice(able), -1)
            if able and kept and self.blocks_only:
                plan = self._switched(plan, self.rng.choice(kept), 1)
        return plan

    def _lowered(self, plans: list[Plan], switches: list[int]) -> list[Plan | None]:
        """Random sites one level down until every limit holds; ``None`` where that takes more than so many switches."""
        out: list[Plan | None] = list(plans)
        for step in range(max(switches) + 1):
            held = [(i, plan) for i, plan in enumerate(out) if plan is not None]
            fits = self.tables.fits([plan for _, plan in held], self.limit)
            over = [pair for pair, ok in zip(held, fits, strict=True) if not ok]
            if not over:
                break
            for i, plan in over:
                able = [s for s, order in enumerate(self.orders) if order.index(plan[s]) + 1 < len(order)]
                out[i] = self._switched(plan, self.rng.choice(able), 1) if able and step < switches[i] else None
        return out

    def _refilled(self, parent: Plan, pairs: list[tuple[Plan, Plan]]) -> list[tuple[Plan, Plan]]:
        """Children whose raised sites cost at least 0.8 of what their lowered ones save, over all limits together."""
        unit = np.maximum(self.limit, 1).astype(float)
        start = self.tables.cost([parent])[0]
        raised, lowered = (self.tables.cost([pair[i] for pair in pairs]) for i in (0, 1))
        added, removed = ((raised - start) / unit).sum(axis=1), ((raised - lowered) / unit).sum(axis=1)
        return [pair for pair, ok in zip(pairs, added >= self.refill * removed, strict=True) if ok]

    def _switched(self, plan: Plan, site: int, steps: int) -> Plan:
        order = self.orders[site]
        return switch(plan, site, order[order.index(plan[site]) + steps])


@CONTROLLERS.register("evopress-fast")
class EvoPressFast(EvoPress):
    """The paper's "super-fast" variant: 16 children on the slice, one survivor; more generations in the same time."""

    offspring = block_offspring = 16
    survivors = 1

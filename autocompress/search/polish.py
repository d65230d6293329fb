"""``polish``: evolution at a higher rung, from what a search has already learnt.

A plan's loss after refit is not its loss before: layers make good for each other. So the best plans are mutated and judged once
more where they will be handed out. One evaluation costs a refit, so only the children that the corrected table model likes best
are asked, and each answer corrects it.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence

import numpy as np

from autocompress.search.base import Asking, fitness
from autocompress.search.evolution import Evolution
from autocompress.search.surrogate import refine
from autocompress.search.tables import FloatArray
from autocompress.types import Budget, Costs, Evaluation, Fidelity, LevelErrors, Plan, Query, SearchSpace


class Polish(Evolution):
    """Hill climbing at ``rung`` under the budgets' limits on costs.

    ``known``: all evaluations of the search before it; ``errors``: the output errors of levels that it was told.

    Not a controller of its own: it needs plans that were judged at ``rung`` to start from, and is over when there are none
    within the limits.
    """

    asked_at_once = 2

    def __init__(
        self,
        space: SearchSpace,
        costs: Costs,
        budgets: Sequence[Budget],
        seed: int,
        known: Sequence[Evaluation],
        errors: LevelErrors | None = None,
        rung: Fidelity = "refitted",
    ) -> None:
        self.raced = rung
        super().__init__(space, costs, budgets, seed)
        self.learn(known, errors)

    def _search(self) -> Asking:
        self._prepare()
        for evaluation in self.known:
            self.seen[evaluation.fidelity, evaluation.plan] = evaluation
        self.pool, goal = None, self.targets[0]
        prior = self._prior()
        generation, idle = 0, 0
        while idle < self.patience:
            inside = self._inside(goal)
            if not inside:
                return
            parent = inside[0]
            gains = np.array([fitness(e) - fitness(parent) for e in inside])
            losses = refine(self.tables, prior, parent.plan, [e.plan for e in inside], gains)
            children = self._children(parent.plan, goal, losses, generation)
            generation += 1
            idle = 0 if children else idle + 1
            if children:
                yield from self._climb(children)

    def _prior(self) -> FloatArray:
        """One-site losses that the search measured or was told, scaled to what plans lose after refit."""
        slices = [e for e in self.known if e.fidelity == "slice"]
        dense = {e.part: fitness(e) for e in slices if not any(e.plan) and np.isfinite(fitness(e))}  # on each slice
        for e in slices:
            if sum(level > 0 for level in e.plan) == 1:
                self.one_site.record(e.plan, fitness(e) - dense.get(e.part, self._zero()))
        losses = self.one_site.losses()
        sums = [(fitness(e), float(losses[self.tables.current(e.plan)].sum())) for e in self._finite(self.raced)]
        ratios = [max(loss, 0.0) / total for loss, total in sums if total > 0]
        scaled: FloatArray = losses * (float(np.median(ratios)) if ratios else 1.0)
        return scaled

    def _climb(self, children: list[Plan]) -> Generator[list[Query], list[Evaluation], None]:
        """The child the model likes best, and one of the others by chance."""
        chosen = [children[0], *self.rng.sample(children[1:], min(len(children) - 1, self.asked_at_once - 1))]
        yield from self._judge(chosen, self.raced)

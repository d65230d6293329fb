"""``polish``: a climb at a higher rung, from what a search has already learnt.

A plan's loss after refit is not its loss before: layers make good for each other, but what is gone from a residual stream stays
gone. So a second process over plans learns what plans lose where they will be handed out, from few of them: its mean is a line in
output errors and in what the process of the search says. One evaluation costs a refit, so only two candidates at a time are
asked, the likeliest and the most promising; the first one is the optimum of the output errors.
"""

from __future__ import annotations

from collections.abc import Sequence

from autocompress.search.auto import NOISE, Auto
from autocompress.search.base import Asking, fitness
from autocompress.search.process import Process
from autocompress.types import Budget, Costs, Evaluation, Fidelity, LevelErrors, SearchSpace


class Polish(Auto):
    """Climbing at ``rung`` under the budgets' limits on costs.

    ``known``: all evaluations of the search before it; ``errors``: the output errors of levels that it was told.

    Not a controller of its own: it starts from plans that a search has judged.
    """

    offspring = 2

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
        self.pool, goal = None, self.targets[0]
        for evaluation in self.known:
            self.seen[evaluation.fidelity, evaluation.plan] = evaluation
        self.below = super()._model()
        guess = self._solve(self.one_site.losses(), 0, quick=True) if self.errors else None
        if guess is not None:
            yield from self._judge([guess], self.raced)
        idle = quiet = 0
        while idle < self.patience and quiet < self.idle_after:
            children, gain = self._propose(self._model(), goal)
            idle = 0 if children else idle + 1
            quiet = quiet + 1 if gain <= NOISE else 0
            yield from self._judge(children, self.raced)

    def _model(self) -> Process:
        """The process of the raced rung, on top of that of the search."""
        model = Process(self.space, self.orders, self.errors, self.below)
        model.fit([{e.plan: fitness(e) for e in self._finite(self.raced)}])
        return model

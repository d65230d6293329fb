"""``polish``: a climb at a higher rung, from what a search has already learnt.

A plan's loss after refit is not its loss before: layers make good for each other, but what is gone from a residual stream stays
gone. So a second process over plans learns what plans lose where they will be handed out, from few of them: its mean is a line in
output errors and in what the process of the search says. One evaluation costs a refit, so only two candidates at a time are
asked, the likeliest and the most promising; the first one is the optimum of the output errors.
"""

from __future__ import annotations

from autocompress.search.auto import Auto
from autocompress.search.base import Asking, fitness
from autocompress.search.process import Process
from autocompress.types import Fidelity


class Polish(Auto):
    """Climbing at the rung ``refitted`` under the budgets' limits on costs.

    Not a controller of its own: it starts from the plans of a search, whose evaluations it is told by :meth:`learn`.
    """

    offspring = 2
    raced: Fidelity = "refitted"

    def _search(self) -> Asking:
        self._prepare()
        self.pool = None
        for evaluation in self.known:
            self.seen[evaluation.fidelity, evaluation.plan] = evaluation
        self.below = super()._model()
        guess = self._solve(self.one_site.losses(), 0, quick=True) if self.errors else None
        if guess is not None:
            yield from self._judge([guess], self.raced)
        while self._goes_on():
            yield from self._generation(self.targets[0])

    def _model(self) -> Process:
        """The process of the raced rung, on top of that of the search."""
        model = Process(self.space, self.orders, self.errors, self.below)
        model.fit([{e.plan: fitness(e) for e in self._finite(self.raced)}])
        return model

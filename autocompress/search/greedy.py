"""``greedy``: sites in the order of their sensitivity, the most saving for the least harm first.

As in AIMET (Siddegowda et al. 2022): each option is judged alone, all other sites dense; then switches are taken by saving per
harm until the limits hold. Harm is the loss at ``slice``, saving what a switch takes off the excess over the limits, so several
budgets are served at once. The plans are judged again at ``full``. It sees neither what two sites do together nor a switch
that has to be taken back: the yardstick for controllers that do.
"""

from __future__ import annotations

import numpy as np

from autocompress.search.base import CONTROLLERS, Asking
from autocompress.search.exact import TableSearch
from autocompress.search.solver import holds, polish, repair
from autocompress.search.tables import UNLIMITED, FloatArray
from autocompress.types import IntArray, Plan


@CONTROLLERS.register("greedy")
class Greedy(TableSearch):
    """Sweep, then a greedy walk from dense to every target; with quality budgets alone, to the cheapest plan that holds them."""

    def _search(self) -> Asking:
        self._prepare()
        yield from self._sweep()
        yield from self._bisect(self.one_site.losses())

    def _solve(self, losses: FloatArray, target: int, quick: bool = False) -> Plan | None:
        return self._decide(lambda: self._walk(losses, self.targets[target], near=target == 0))

    def _within(self, losses: FloatArray, limit: IntArray, *starts: Plan) -> Plan | None:
        return self._walk(losses, limit)

    def _walk(self, losses: FloatArray, limit: IntArray, near: bool = False) -> Plan | None:
        """From dense to the limit; where single switches cannot get there, back from the cheapest plan.

        ``near``: the plan that misses the limit by least rather than none.
        """
        tables = self.tables
        plan = repair(tables, losses, self.space.dense, limit)
        if holds(tables.cost([plan])[0], limit):
            return plan
        # formats that only pay in company: no single switch from dense saves anything
        cheapest = tables.cheapest(np.where(limit < UNLIMITED, 1 / np.maximum(limit, 1), 0.0))
        if holds(tables.cost([cheapest])[0], limit):
            return polish(tables, losses, cheapest, limit)
        return plan if near else None

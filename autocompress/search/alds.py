"""``alds``: the largest one-site loss made as small as the budgets allow (Liebenwein et al. 2021), measured again around it.

ALDS bisects one common error level and takes each layer's cheapest setting that meets it; here the errors are measured one-site
losses, the settings any levels, the limits any budgets. The sum of losses only breaks ties.
"""

from __future__ import annotations

from collections.abc import Sequence

from autocompress.search.base import CONTROLLERS
from autocompress.search.exact import Exact
from autocompress.search.tables import FloatArray
from autocompress.types import IntArray, Plan


@CONTROLLERS.register("alds")
class Alds(Exact):
    """``exact`` with another objective: even errors rather than the least sum; the best measured plan is kept all the same."""

    def _best(self, losses: FloatArray, limit: IntArray, starts: Sequence[Plan], quick: bool) -> Plan | None:
        found = self.solver.minimax(losses, limit, starts)
        return None if found is None else found.plan

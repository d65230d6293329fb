"""``uniform``: every site at the same relative level, the comparison that any search must beat."""

from __future__ import annotations

import itertools

import numpy as np

from autocompress.search.base import CONTROLLERS, Asking, BaseController
from autocompress.search.sweep import OneSite
from autocompress.types import Plan


@CONTROLLERS.register("uniform")
class Uniform(BaseController):
    """Levels of a site ordered by what they save; first the mildest uniform plan within the limits, then the others."""

    steps = 64

    def _search(self) -> Asking:
        ladder = self._ladder()
        within = self.tables.fits(ladder, self.limits.limit)
        first = within.index(True) if any(within) else len(ladder) - 1
        yield from self._judge([ladder[first], *ladder], "full")

    def _ladder(self) -> list[Plan]:
        """Distinct plans from dense to the most saving level of every site."""
        saved, offsets = OneSite(self.space, self.tables).saved, self.tables.offsets
        orders = [
            [0, *(1 + np.argsort(saved[a + 1 : b], kind="stable")).tolist()] for a, b in itertools.pairwise(offsets)
        ]
        shares = [i / self.steps for i in range(self.steps + 1)]
        return list(dict.fromkeys(tuple(o[round(share * (len(o) - 1))] for o in orders) for share in shares))

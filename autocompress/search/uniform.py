"""``uniform``: every site at the same relative level, the comparison that any search must beat."""

from __future__ import annotations

from autocompress.search.base import CONTROLLERS, Asking, BaseController
from autocompress.search.sweep import OneSite


@CONTROLLERS.register("uniform")
class Uniform(BaseController):
    """Levels of a site ordered by what they save; first the mildest uniform plan within the limits, then the others."""

    def _search(self) -> Asking:
        ladder = OneSite(self.space, self.tables).ladder()
        within = self.tables.fits(ladder, self.limits.limit)
        first = within.index(True) if any(within) else len(ladder) - 1
        yield from self._judge([ladder[first], *ladder], "full")

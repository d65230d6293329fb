"""The table model, corrected by what whole plans lost: Bayesian linear regression with the table as its prior."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from autocompress.search.tables import CostTables, FloatArray
from autocompress.types import Plan


def refine(
    tables: CostTables, losses: FloatArray, base: Plan, plans: Sequence[Plan], observed: FloatArray
) -> FloatArray:
    """Losses of options that explain ``observed`` with the least change to ``losses``.

    ``observed``: losses of ``plans`` minus that of ``base``, so a constant in ``losses`` does not matter.  # (n_plans,)
    Prior: the difference between an option and the one of ``base`` is off by half of itself; noise: an observation by a tenth.
    The posterior mean is ``m + S A' (A S A' + N)^-1 (y - A m)`` (Rasmussen & Williams 2006, section 2.1).  # (n_options,)
    """
    if not len(plans):
        return losses
    current = tables.current(base)
    chosen = np.zeros((len(plans), tables.n_options))
    for row, plan in enumerate(plans):
        chosen[row, tables.current(plan)] = 1.0
    chosen[:, current] -= 1.0
    floor = 1e-3 * max(float(np.median(np.abs(observed))), 1e-9)
    variance = (0.5 * np.abs(losses - losses[current][tables.site_of]) + floor) ** 2
    noise = (0.1 * np.abs(observed) + floor) ** 2
    spread = chosen * variance
    weights = np.linalg.solve(spread @ chosen.T + np.diag(noise), observed - chosen @ losses)
    refined: FloatArray = losses + spread.T @ weights
    return refined

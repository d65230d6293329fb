"""Lagrangian bounds: budgets move into the objective at a price a unit, and what is left is easy to minimise.

For prices ``m >= 0`` the smallest ``loss + m (cost - limit)`` over all plans is a lower bound on the loss of every plan within
the limits (Everett 1963). The best prices are found by Kelley's cutting planes: each minimiser gives a cut, a small linear
program the next prices. Knows neither how plans look nor how they are minimised.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
from scipy.optimize import linprog

from autocompress.search.tables import FloatArray

P = TypeVar("P", bound=Hashable)
Oracle = Callable[[FloatArray], tuple[float, FloatArray, P]]
"""Prices (n_budgets,) -> loss and excess ``cost - limit`` of a minimiser of ``loss + prices @ excess``, and that plan."""


@dataclass(frozen=True, eq=False)
class Dual(Generic[P]):
    """``bound`` on the loss of any plan within the limits, the ``prices`` that prove it, the minimisers seen on the way."""

    bound: float
    prices: FloatArray  # (n_budgets,)
    seen: tuple[P, ...]


def dual(
    oracle: Oracle[P],
    n_budgets: int,
    cap: float,
    tolerance: float = 1e-6,
    rounds: int = 200,
    start: FloatArray | None = None,
    enough: float = np.inf,
) -> Dual[P]:
    """The best bound, up to ``tolerance`` relative, from the prices ``start`` on; a bound of ``enough`` ends it.

    ``cap`` limits a price, so that impossible budgets end too.
    """
    prices = np.zeros(n_budgets) if start is None else start
    best, at = -np.inf, prices
    slopes: list[FloatArray] = []
    losses: list[float] = []
    seen: list[P] = []
    goal = np.append(np.zeros(n_budgets), -1.0)
    for _ in range(rounds):
        loss, excess, plan = oracle(prices)
        value = loss + float(prices @ excess)
        if value > best:
            best, at = value, prices
        if best >= enough or plan in seen:  # seen: the cuts are exact here, no other can come
            break
        seen.append(plan)
        slopes.append(np.append(-excess, 1.0))
        losses.append(loss)
        bounds = [(0.0, cap)] * n_budgets + [(None, None)]
        result = linprog(goal, A_ub=np.array(slopes), b_ub=np.array(losses), bounds=bounds, method="highs")
        if result.x is None or result.x[-1] - best <= tolerance * abs(best):
            break
        prices = np.maximum(result.x[:-1], 0.0)
    return Dual(best, at, tuple(seen))

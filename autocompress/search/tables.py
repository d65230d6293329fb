"""Costs as controllers use them: integer limits, one-switch differences, targets along the way to the budgets.

Knows nothing of losses or of evaluations.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from autocompress.errors import UnknownName
from autocompress.types import METRICS, Budget, CostFactor, Costs, IntArray, Plan, SearchSpace

FloatArray = npt.NDArray[np.float64]

UNLIMITED = 2**62
"""The limit of a cost that is not budgeted."""


def scale_of(key: str) -> float:
    """What one integer base unit of a cost is worth in the metric's unit (ns -> ms: 1e-6)."""
    metric = METRICS.get(key.partition("@")[0])
    return metric.scale if metric else 1.0


def base_limit(budget: Budget) -> int:
    """The largest integer cost that holds an absolute budget, exactly as ``Budget.violation`` judges it."""
    scale = METRICS[budget.metric].scale
    limit = math.floor(budget.limit / scale) + 1
    while limit > 0 and budget.violation(limit * scale) > 0:
        limit -= 1
    return limit


@dataclass(frozen=True, eq=False)
class Limits:
    """Hard limits on costs, in integer base units.

    ``columns`` index ``costs.keys``; ``limit`` is ``UNLIMITED`` for an axis without a budget; ``budgets`` holds the index of
    the budget behind each column, or -1.
    """

    keys: tuple[str, ...]
    columns: tuple[int, ...]
    limit: IntArray  # (n_columns,)
    budgets: tuple[int, ...]

    @property
    def limited(self) -> bool:
        """Whether any cost is budgeted."""
        return any(i >= 0 for i in self.budgets)


def cost_limits(space: SearchSpace, costs: Costs, budgets: Sequence[Budget]) -> Limits:
    """Limits of the budgets on costs; quality budgets are left to evaluations.

    Of several budgets on one key the tightest counts. Without any budget on a cost, the first cost is the axis, unlimited.
    Raises :class:`UnknownName` for a cost that ``costs`` does not have.
    """
    dense = dict(zip(costs.keys, costs.cost([space.dense])[0].tolist(), strict=True))
    found: dict[str, tuple[int, int]] = {}
    for i, budget in enumerate(budgets):
        if METRICS[budget.metric].quality:
            continue
        if budget.key not in dense:
            raise UnknownName("cost in a budget", budget.key, costs.keys)
        limit = base_limit(budget.absolute({budget.key: dense[budget.key] * scale_of(budget.key)}))
        if budget.key not in found or limit < found[budget.key][0]:
            found[budget.key] = (limit, i)
    if not found:
        found[costs.keys[0]] = (UNLIMITED, -1)
    keys = tuple(found)
    return Limits(
        keys,
        tuple(costs.keys.index(key) for key in keys),
        np.array([found[key][0] for key in keys], np.int64),
        tuple(found[key][1] for key in keys),
    )


class CostTables:
    """The chosen columns of a cost model, compiled for switching one site at a time.

    An *option* is a (site, level) pair; options are numbered site by site. ``site_of``, ``level_of``  # (n_options,)
    """

    def __init__(self, space: SearchSpace, costs: Costs, columns: Sequence[int]) -> None:
        self.n_levels = space.n_levels
        self.columns = list(columns)
        self.offsets = np.concatenate([[0], np.cumsum(self.n_levels)]).astype(np.int64)
        self.n_options = int(self.offsets[-1])
        self.site_of = np.repeat(np.arange(len(self.n_levels)), self.n_levels)
        self.level_of = (
            np.concatenate([np.arange(n) for n in self.n_levels]) if self.n_levels else np.zeros(0, np.int64)
        )
        self._costs = costs
        self.factors = [self._compile(factor) for factor in costs.factors()]

    def _compile(self, factor: CostFactor) -> CostFactor:
        if factor.table is not None:
            return CostFactor(factor.name, factor.sites, np.ascontiguousarray(factor.table[..., self.columns]))
        cost, columns = factor.cost, self.columns
        if cost is None:
            raise ValueError(f"Cost factor {factor.name!r} has neither a table nor a function.")
        shape = tuple(self.n_levels[s] for s in factor.sites)
        if math.prod(shape) <= 20_000:
            grid = np.indices(shape, np.int64).reshape(len(shape), -1).T
            return CostFactor(factor.name, factor.sites, cost(grid)[:, columns].reshape(*shape, len(columns)))
        return CostFactor(factor.name, factor.sites, None, lambda levels: cost(levels)[:, columns])

    def cost(self, plans: Sequence[Plan]) -> IntArray:
        """Costs of plans.  # (n_plans, n_columns)"""
        return self._costs.cost(plans)[:, self.columns]

    def fits(self, plans: Sequence[Plan], limit: IntArray) -> list[bool]:
        """Which plans hold ``limit``  # (n_columns,)"""
        return [bool((row <= limit).all()) for row in self.cost(plans)] if plans else []

    def current(self, plan: Plan) -> IntArray:
        """The option that ``plan`` takes at each site.  # (n_sites,)"""
        return self.offsets[:-1] + np.asarray(plan, np.int64)

    def deltas(self, plan: Plan) -> IntArray:
        """Change of cost when one site of ``plan`` switches to one level.  # (n_options, n_columns)"""
        return self._costs.deltas(plan)[:, self.columns]

    def cheapest(self, weights: FloatArray) -> Plan:
        """A plan of low weighted cost: one-switch descent from uniform plans, the best end kept."""
        best: tuple[float, Plan] | None = None
        for share in (0.0, 0.25, 0.5, 0.75, 1.0):
            plan = tuple(round(share * (n - 1)) for n in self.n_levels)
            for _ in range(20 * len(plan) + 20):
                gain = self.deltas(plan) @ weights
                option = int(np.argmin(gain)) if len(gain) else 0
                if not len(gain) or gain[option] >= 0:
                    break
                plan = switch(plan, int(self.site_of[option]), int(self.level_of[option]))
            found = (float(self.cost([plan])[0] @ weights), plan)
            best = found if best is None or found < best else best
        assert best is not None  # the loop ran
        return best[1]

    def savings(self, contexts: Sequence[Plan]) -> FloatArray:
        """The share of the dense cost that an option saves against dense at its site, the most over ``contexts``.

        Averaged over columns. Formats that only pay in company (quantize nodes between neighbours) show in a cheap context.
        # (n_options,)
        """
        dense = np.maximum(self.cost([(0,) * len(self.n_levels)])[0], 1)
        saved = np.zeros(self.n_options)
        for context in contexts:
            delta = self.deltas(context)
            from_dense = (delta[self.offsets[:-1]][self.site_of] - delta) / dense
            saved = np.maximum(saved, np.maximum(from_dense, 0).mean(axis=1))
        return saved


def switch(plan: Plan, site: int, level: int) -> Plan:
    """``plan`` with another level at one site."""
    return (*plan[:site], level, *plan[site + 1 :])


def target_ladder(dense: IntArray, limit: IntArray, floor: IntArray, n_before: int, n_beyond: int) -> list[IntArray]:
    """Limits on the way from the dense cost to the limit (``n_before``) and from there towards the floor (``n_beyond``).

    Neither end is among them. Where the dense cost holds a limit already, that limit stays.  # each (n_columns,)
    """
    limit = np.minimum(limit, dense)
    before = [dense + (limit - dense) * i // (n_before + 1) for i in range(1, n_before + 1)]
    beyond = [limit + (floor - limit) * i // (n_beyond + 1) for i in range(1, n_beyond + 1)]
    return [np.maximum(target, 1) for target in before + beyond]


def all_plans(space: SearchSpace) -> list[Plan]:
    """Every plan of a small space, in lexicographic order."""
    return list(itertools.product(*(range(n) for n in space.n_levels)))

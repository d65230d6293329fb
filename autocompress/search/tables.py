"""Costs as controllers use them: integer limits, one-switch differences, targets along the way to the budgets.

Knows nothing of losses or of evaluations.
"""

from __future__ import annotations

import functools
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
TABULATED = 20_000
"""Entries of a cost factor up to which a function becomes a table."""


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
        metrics = [METRICS.get(costs.keys[c].partition("@")[0]) for c in self.columns]
        self.maxima = [i for i, metric in enumerate(metrics) if metric and not metric.additive]

    @functools.cached_property
    def factors(self) -> list[CostFactor]:
        """The costs as a sum of tables over classes of levels that cost the same; sites without a say are left out."""
        return [self._compile(factor) for factor in self._costs.factors()]

    def _compile(self, factor: CostFactor) -> CostFactor:
        classes = factor.classes or tuple(np.arange(self.n_levels[s]) for s in factor.sites)
        known = CostFactor(factor.name, factor.sites, factor.table, factor.cost, classes)
        if known.table is None and math.prod(int(of.max()) + 1 for of in classes) > TABULATED:
            columns = self.columns
            return CostFactor(known.name, known.sites, None, lambda levels: known.rows(levels)[:, columns], classes)
        return merged(CostFactor(known.name, known.sites, tabulate(known)[..., self.columns], None, classes))

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
        delta = self._costs.deltas(plan)[:, self.columns]
        if self.maxima:  # a maximum has no differences of its own: whole plans tell
            switched = np.tile(np.asarray(plan, np.int64), (self.n_options, 1))
            switched[np.arange(self.n_options), self.site_of] = self.level_of
            cost = self.cost(list(map(tuple, switched.tolist())))
            delta[:, self.maxima] = (cost - self.cost([plan]))[:, self.maxima]
        return delta

    @functools.cached_property
    def dense(self) -> IntArray:
        """What the dense plan costs.  # (n_columns,)"""
        cost: IntArray = self.cost([(0,) * len(self.n_levels)])[0]
        return cost

    def share(self, plan: Plan) -> float:
        """Cost of a plan as a share of the dense one's, averaged over the columns."""
        return float((self.cost([plan])[0] / np.maximum(self.dense, 1)).mean())

    def switched(self, plan: Plan, option: int) -> Plan:
        """``plan`` with one option taken."""
        return switch(plan, int(self.site_of[option]), int(self.level_of[option]))

    def uniform_plans(self) -> list[Plan]:
        """Every site equally far up its levels, from dense to the last."""
        return [tuple(round(share * (n - 1)) for n in self.n_levels) for share in (0.0, 0.25, 0.5, 0.75, 1.0)]

    def cheapest(self, weights: FloatArray) -> Plan:
        """A plan of low weighted cost: one-switch descent from uniform plans, the best end kept."""
        best: tuple[float, Plan] | None = None
        for plan in self.uniform_plans():
            for _ in range(20 * len(plan) + 20):
                gain = self.deltas(plan) @ weights
                option = int(np.argmin(gain)) if len(gain) else 0
                if not len(gain) or gain[option] >= 0:
                    break
                plan = self.switched(plan, option)
            found = (float(self.cost([plan])[0] @ weights), plan)
            best = found if best is None or found < best else best
        assert best is not None  # the loop ran
        return best[1]

    def savings(self, contexts: Sequence[Plan]) -> FloatArray:
        """The share of the dense cost that an option saves against dense at its site, the most over ``contexts``.

        Averaged over columns. Formats that only pay in company (quantize nodes between neighbours) show in a cheap context.
        # (n_options,)
        """
        dense = np.maximum(self.dense, 1)
        saved = np.zeros(self.n_options)
        for context in contexts:
            delta = self.deltas(context)
            from_dense = (delta[self.offsets[:-1]][self.site_of] - delta) / dense
            saved = np.maximum(saved, np.maximum(from_dense, 0).mean(axis=1))
        return saved


def tabulate(factor: CostFactor) -> IntArray:
    """The whole table of a factor with classes, also of one that is given as a function.  # (classes..., n_keys)"""
    if factor.table is not None:
        return factor.table
    firsts = [np.unique(of, return_index=True)[1] for of in factor.classes]
    grid = np.stack([own.reshape(-1) for own in np.meshgrid(*firsts, indexing="ij")], axis=1).astype(np.int64)
    parts = [factor.rows(grid[i : i + 8192]) for i in range(0, len(grid), 8192)]
    return np.concatenate(parts).reshape(*(len(first) for first in firsts), -1)


def merged(factor: CostFactor) -> CostFactor:
    """Classes whose entries of the table are equal become one; sites with a single class drop out."""
    assert factor.table is not None  # its caller tabulates
    table, sites, classes = factor.table, list[int](), list[IntArray]()
    for site, of in zip(factor.sites, factor.classes, strict=True):
        rows = np.moveaxis(table, len(sites), 0)
        _, first, again = np.unique(rows.reshape(len(rows), -1), axis=0, return_index=True, return_inverse=True)
        if len(first) == 1:
            table = rows[0]
            continue
        table = np.moveaxis(rows[first], 0, len(sites))
        sites.append(site)
        classes.append(np.asarray(again, np.int64).reshape(-1)[of])
    return CostFactor(factor.name, tuple(sites), np.ascontiguousarray(table), None, tuple(classes))


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
    """Every plan of a small space, in lexicographic order; of plans that make the same network only the first."""
    plans = itertools.product(*(range(n) for n in space.n_levels))
    return list(dict.fromkeys(space.effective(plan) for plan in plans))

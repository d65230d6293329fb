"""Whether budgets can be met at all, answered from the cost tables before anything is evaluated."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from autocompress.errors import InfeasibleBudget
from autocompress.search.solver import Program, minimise, program
from autocompress.search.tables import UNLIMITED, CostTables, Limits, cost_limits, scale_of
from autocompress.types import METRICS, Budget, Costs, IntArray, Plan, SearchSpace


def floors(tables: CostTables) -> IntArray:
    """A low cost that a plan reaches, each column for itself, in base units.  # (n_columns,)"""
    return np.array([_cheapest(tables, k)[1] for k in range(len(tables.columns))], np.int64)


def _cheapest(tables: CostTables, column: int) -> tuple[Plan, int]:
    plan = tables.cheapest(np.eye(len(tables.columns))[column])
    return plan, int(tables.cost([plan])[0, column])


def _bound(tables: CostTables, relaxed: Program, column: int) -> tuple[int, Plan]:
    """A proved lower bound of one cost in base units, and the cheapest plan known."""
    plan, reached = _cheapest(tables, column)
    least = sum(int(f.table[..., column].min()) for f in tables.factors if f.table is not None)
    if least >= reached:
        return reached, plan
    free = np.full(len(tables.columns), UNLIMITED, np.int64)
    answer = minimise(relaxed, tables, np.zeros(tables.n_options), free, gap=1e-6, column=column)
    if answer.plan is not None:
        found = int(tables.cost([answer.plan])[0, column])
        if found < reached:
            plan, reached = answer.plan, found
    if answer.optimal and relaxed.exact:
        return reached, plan
    proved = answer.bound - 1e-6 * abs(answer.bound)
    return min(reached, max(least, int(np.ceil(proved)) if np.isfinite(proved) else 0)), plan


def lower_bounds(costs: Costs, space: SearchSpace, budgets: Sequence[Budget]) -> list[tuple[float, bool] | None]:
    """The smallest value any plan can reach of each budget's cost, in the metric's unit.

    One entry a budget: ``(bound, exact)``, where ``exact`` says that a plan reaches it; ``None`` for a quality budget.
    """
    out: list[tuple[float, bool] | None] = []
    for budget in budgets:
        if METRICS[budget.metric].quality:
            out.append(None)
            continue
        tables, relaxed = _compile(space, costs, cost_limits(space, costs, [budget]))
        bound, plan = _bound(tables, relaxed, 0)
        out.append((bound * scale_of(budget.key), bound == int(tables.cost([plan])[0, 0])))
    return out


def check_feasible(space: SearchSpace, costs: Costs, budgets: Sequence[Budget]) -> None:
    """Raise :class:`InfeasibleBudget` when it is proved that no plan can meet the budgets, alone or together.

    Silence is no promise: quality budgets are not looked at, and large cost tables are only bounded.
    """
    hard = [b for b in budgets if not METRICS[b.metric].quality]
    if not hard:
        return
    limits = cost_limits(space, costs, hard)
    tables, relaxed = _compile(space, costs, limits)
    for column, owner in enumerate(limits.budgets):
        bound, plan = _bound(tables, relaxed, column)
        if bound > limits.limit[column]:
            raise InfeasibleBudget(_sentence(hard[owner], tables, limits, column, bound, plan))
    for pair in itertools.combinations(range(len(limits.keys)), 2):
        limit = np.full(len(limits.keys), UNLIMITED, np.int64)
        limit[list(pair)] = limits.limit[list(pair)]
        if minimise(relaxed, tables, np.zeros(tables.n_options), limit).infeasible:
            first, second = (hard[limits.budgets[column]] for column in pair)
            raise InfeasibleBudget(
                f"Budgets {str(first)!r} and {str(second)!r} can each be met, but not by one plan; "
                "raise one of the limits or allow more methods."
            )
    if len(limits.keys) > 2 and minimise(relaxed, tables, np.zeros(tables.n_options), limits.limit).infeasible:
        names = ", ".join(repr(str(hard[i])) for i in limits.budgets)
        raise InfeasibleBudget(
            f"Budgets {names} cannot be met by one plan; raise one of the limits or allow more methods."
        )


def _compile(space: SearchSpace, costs: Costs, limits: Limits) -> tuple[CostTables, Program]:
    tables = CostTables(space, costs, limits.columns)
    relaxed = program(tables) or program(tables, relax=True)
    assert relaxed is not None  # a relaxed program always exists
    return tables, relaxed


def _sentence(budget: Budget, tables: CostTables, limits: Limits, column: int, bound: int, plan: Plan) -> str:
    metric, scale = METRICS[budget.metric], scale_of(limits.keys[column])
    unit = f" {metric.unit}" if metric.unit else ""
    reached = int(tables.cost([plan])[0, column])
    word = "is" if bound == reached else "is at least"
    parts = []
    for factor in tables.factors:
        value = int(factor.rows(np.array([[plan[s] for s in factor.sites]], np.int64))[0, column])
        parts.append((-value, factor.name))
    held = ", ".join(f"{name} ({-value * scale:.4g}{unit})" for value, name in sorted(parts)[:3] if value)
    limit = int(limits.limit[column]) * scale
    return (
        f"Budget {str(budget)!r} cannot be met: the limit is {limit:.4g}{unit}, and the smallest {budget.key} that any plan "
        f"reaches {word} {bound * scale:.4g}{unit}, held by {held or 'a constant cost'}; raise the limit or allow more methods."
    )

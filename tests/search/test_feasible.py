"""Infeasible budgets are found before the search, with the reason; feasible ones pass."""

from __future__ import annotations

import numpy as np
import pytest
from toys import ToyCosts, chain, separable, space_of

from autocompress.errors import InfeasibleBudget, UnknownName
from autocompress.search import check_feasible, lower_bounds
from autocompress.search import solver as solving
from autocompress.search.tables import all_plans, base_limit
from autocompress.types import Budget, CostFactor

LEVELS = [3, 4, 3, 2]
SPACE = space_of(*LEVELS)


@pytest.mark.parametrize("costs", [separable(LEVELS), chain(LEVELS), chain(LEVELS, lazy=True)])
def test_bound_is_the_minimum_over_all_plans(costs: ToyCosts) -> None:
    least = int(costs.cost(all_plans(SPACE)).min())
    assert lower_bounds(costs, SPACE, [Budget("macs", 1)]) == [(least, True)]
    check_feasible(SPACE, costs, [Budget("macs", least)])
    with pytest.raises(InfeasibleBudget, match=f"is {least:.4g}"):
        check_feasible(SPACE, costs, [Budget("macs", least - 1)])


def test_bound_of_projected_tables_stays_below_the_minimum(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(solving, "MAX_JOINT", 10)
    costs = chain(LEVELS)
    least = int(costs.cost(all_plans(SPACE)).min())
    [bound] = lower_bounds(costs, SPACE, [Budget("macs", 1)])
    assert bound is not None
    assert 0 < bound[0] <= least
    check_feasible(SPACE, costs, [Budget("macs", least)])


def test_the_message_names_budget_limit_bound_and_what_holds_it() -> None:
    fixed = CostFactor("stem", (), np.array([5_000_000]))
    small = CostFactor("head", (0,), np.array([[3_000_000], [1_000_000], [2_000_000]]))
    costs = ToyCosts(("latency_ms@local",), [small, fixed], LEVELS)
    with pytest.raises(InfeasibleBudget) as caught:
        check_feasible(SPACE, costs, [Budget.parse("latency_ms<=50%@local")])
    assert str(caught.value) == (
        "Budget 'latency_ms<=50%@local' cannot be met: the limit is 4 ms, and the smallest latency_ms@local that any plan "
        "reaches is 6 ms, held by stem (5 ms), head (1 ms); raise the limit or allow more methods."
    )


def test_contradictory_budgets_are_both_named() -> None:
    costs = ToyCosts(("macs", "params"), [CostFactor("conv", (0,), np.array([[9, 9], [1, 9], [9, 1]]))], LEVELS)
    check_feasible(SPACE, costs, [Budget("macs", 5)])
    check_feasible(SPACE, costs, [Budget("params", 5)])
    with pytest.raises(InfeasibleBudget, match=r"'macs<=5' and 'params<=5' can each be met, but not by one plan"):
        check_feasible(SPACE, costs, [Budget("macs", 5), Budget("params", 5)])


def test_three_budgets_that_only_clash_together() -> None:
    rows = np.array([[9, 9, 9], [1, 1, 9], [1, 9, 1], [9, 1, 1]])
    costs = ToyCosts(("macs", "params", "size_mb"), [CostFactor("conv", (1,), rows)], LEVELS)
    budgets = [Budget("macs", 5), Budget("params", 5), Budget("size_mb", 5e-6)]
    check_feasible(SPACE, costs, budgets[:2])
    with pytest.raises(InfeasibleBudget, match="cannot be met by one plan"):
        check_feasible(SPACE, costs, budgets)


def test_quality_budgets_cannot_be_known_before() -> None:
    check_feasible(SPACE, chain(LEVELS), [Budget("accuracy_drop", 0.0)])
    assert lower_bounds(chain(LEVELS), SPACE, [Budget("accuracy_drop", 1.0)]) == [None]


def test_a_budget_on_a_cost_that_is_not_there() -> None:
    with pytest.raises(UnknownName, match="'params'; known: macs"):
        check_feasible(SPACE, chain(LEVELS), [Budget("params", 5)])


@pytest.mark.parametrize("limit", [5.0, 0.1, 2.3, 1 / 3, 1e-6, 123.456789])
def test_integer_limits_agree_with_the_budget(limit: float) -> None:
    budget = Budget("latency_ms", limit, device="local")
    top = base_limit(budget)
    assert budget.violation(top * 1e-6) == 0
    assert budget.violation((top + 1) * 1e-6) > 0

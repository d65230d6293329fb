"""EvoPress as published: its contract, its switches, its stages, its start."""

from __future__ import annotations

import numpy as np
from controller_contract import LARGE, ControllerContract, problem, searched
from toys import ToyCosts, ToyLoss, chain, separable, space_of

from autocompress.search import EvoPress
from autocompress.types import Budget, CostFactor, Query, SearchSpace


class TestEvoPress(ControllerContract):
    name = "evopress"


class TestEvoPressFast(ControllerContract):
    name = "evopress-fast"


def built(space: SearchSpace = LARGE, share: float = 0.5, **toy: object) -> tuple[EvoPress, ToyLoss]:
    costs, budgets, evaluator = problem(space, share, **toy)
    return EvoPress(space, costs, budgets, 0), evaluator


def generations(controller: EvoPress, evaluator: ToyLoss, n: int) -> list[list[Query]]:
    """The groups of queries that a search asks, a group at a time."""
    groups = []
    for _ in range(n):
        queries = controller.ask(1000)
        groups.append(queries)
        controller.tell(evaluator(queries))
    return groups


def test_stages_many_on_the_slice_the_best_two_at_full_the_parent_not_paid_again() -> None:
    controller, evaluator = built(space_of(*[6] * 20), pairs=0.3)
    start, children, finals, *_ = generations(controller, evaluator, 3)
    assert [q.fidelity for q in start] == ["full"]
    assert {q.fidelity for q in children} == {"slice"}
    assert len(children) == 64
    ranked = sorted(children, key=lambda q: (evaluator.loss(q.plan), q.plan))
    assert [q.plan for q in finals] == [q.plan for q in ranked[:2]]
    assert {q.fidelity for q in finals} == {"full"}


def test_children_raise_some_sites_lower_others_hold_every_limit_and_refill_the_budget() -> None:
    controller, evaluator = built(space_of(*[8] * 30))
    [start] = generations(controller, evaluator, 1)
    parent, limit, costs = start[0].plan, controller.limits.limit, controller.tables.cost
    children = [q.plan for q in controller.ask(1000)]
    assert all(controller.tables.fits(children, limit))
    before = costs([parent])[0]
    for child in children:
        changes = np.array(child) - np.array(parent)
        assert (changes < 0).any()
        assert np.abs(changes).sum() <= controller.max_switches
    assert np.mean([(costs([c])[0] / before).mean() for c in children]) > 0.99  # the budget is used, not given away


def test_limits_hold_for_each_of_several_budgets() -> None:
    """One budget pulls at the first half of the sites, the other at the second."""
    levels = [5] * 12
    factors = []
    for site in range(12):
        table = np.zeros((5, 2), np.int64)
        table[:, int(site >= 6)] = np.arange(100, 0, -20)
        factors.append(CostFactor(f"layer{site}", (site,), table))
    costs, space = ToyCosts(("macs", "params"), factors, levels), space_of(*levels)
    budgets = [Budget("macs", 420.0), Budget("params", 300.0)]
    evaluator = ToyLoss(space, costs, budgets)
    best = searched(EvoPress(space, costs, budgets, 0), evaluator, 400).best(fidelity="full")
    assert best is not None
    assert best.costs["macs"] <= 420 and best.costs["params"] <= 300
    assert evaluator.n == 400


def test_blocks_are_swapped_kept_for_removed() -> None:
    space = space_of(*[2] * 24, kind="block")
    costs = separable(space.n_levels, 1)
    limit = float(costs.cost([space.dense])[0, 0]) * 0.7
    budgets = [Budget("macs", limit)]
    evaluator = ToyLoss(space, costs, budgets, pairs=0.5)
    controller = EvoPress(space, costs, budgets, 0)
    uniform, random_plans, best, children, finals = generations(controller, evaluator, 5)
    assert uniform[0].plan == (1,) * 24  # all blocks dropped: the only uniform plan within the limit
    assert len(random_plans) > 50
    assert {q.fidelity for q in random_plans} == {"slice"}
    parent = best[0].plan
    assert parent == min(random_plans, key=lambda q: evaluator.loss(q.plan)).plan
    assert len(children) <= 32
    assert len(finals) <= 2
    for query in children:
        assert sum(query.plan) == sum(parent)
        assert 2 <= sum(a != b for a, b in zip(query.plan, parent, strict=True)) <= 6
        assert costs.cost([query.plan])[0, 0] <= limit


def test_the_parent_never_gets_worse_and_the_winner_was_measured_at_full() -> None:
    controller, evaluator = built(space_of(*[6] * 20), pairs=0.4, slice_noise=0.5)
    best = [np.inf]
    for _ in range(30):
        queries = controller.ask(1000)
        controller.tell(evaluator(queries))
        full = [e.values["loss"] for (rung, _), e in controller.seen.items() if rung == "full" and e.feasible]
        best.append(min(full))
    assert best == sorted(best, reverse=True)
    assert best[-1] < 0.8 * best[1]


def test_beats_its_own_start_by_far() -> None:
    costs = chain(LARGE.n_levels)
    budgets = [Budget("macs", costs.cost([LARGE.dense])[0, 0] * 0.5)]
    evaluator = ToyLoss(LARGE, costs, budgets, pairs=0.2)
    controller = EvoPress(LARGE, costs, budgets, 0)
    front = searched(controller, evaluator, 1)
    start = front.best(fidelity="full")
    end = searched(controller, evaluator, 700).best(fidelity="full")
    assert start is not None and end is not None
    assert end.values["loss"] < 0.7 * start.values["loss"]

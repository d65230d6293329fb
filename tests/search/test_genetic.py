"""Compressor's genetic algorithm: capacity stands in for quality, so it finds a plan before anything is judged."""

from __future__ import annotations

import random

import pytest
from controller_contract import LARGE, ControllerContract, searched
from toys import ToyCosts, ToyLoss, chain, separable, space_of

from autocompress.search import Genetic
from autocompress.types import Budget, SearchSpace

SPACE = space_of(*[6] * 40)


class TestGenetic(ControllerContract):
    name = "genetic"
    finds_optimum = False  # it does not look at losses


def target(share: float, space: SearchSpace = SPACE) -> tuple[ToyCosts, Budget]:
    costs = chain(space.n_levels, 3, ("size_mb", "latency_ms@local", "macs"))
    return costs, Budget("size_mb", costs.cost([space.dense])[0, 0] * 1e-6 * share)


@pytest.mark.slow
def test_within_two_percent_of_the_size_before_anything_is_judged() -> None:
    for share in (0.6, 0.3, 0.1):
        costs, budget = target(share)
        [query] = Genetic(SPACE, costs, [budget], 0).ask(1)
        assert query.budget == 0
        size = costs.cost([query.plan])[0, 0] * 1e-6
        assert 0.98 * budget.limit <= size <= budget.limit


def test_more_capacity_than_random_plans_of_the_size() -> None:
    costs, budget = target(0.3)
    [query] = Genetic(SPACE, costs, [budget], 0).ask(1)
    rng = random.Random(0)
    plans = [tuple(rng.randrange(6) if rng.random() < share else 0 for _ in range(40)) for share in (0.8, 0.9) * 1000]
    rows = costs.cost(plans)
    rivals = rows[rows[:, 0] * 1e-6 <= budget.limit]
    assert len(rivals) > 100
    assert costs.cost([query.plan])[0, 2] > 1.1 * rivals[:, 2].max()


def test_capacity_is_a_cost_without_a_budget() -> None:
    costs, size = target(0.5, LARGE)
    macs, latency = Budget("macs", 1e4), Budget("latency_ms", 1e-2, device="local")
    for budgets, keys in (
        ([size], ["macs"]),
        ([], ["macs"]),
        ([macs], ["size_mb"]),
        ([macs, size], ["latency_ms@local"]),
        ([macs, size, latency], ["macs", "size_mb", "latency_ms@local"]),
    ):
        assert [costs.keys[i] for i in Genetic(LARGE, costs, budgets, 0).capacity()] == keys


def test_quality_alone_bisects_the_size() -> None:
    costs, budgets = separable(LARGE.n_levels, 1), [Budget("accuracy_drop", 2.0)]
    front = searched(Genetic(LARGE, costs, budgets, 0), ToyLoss(LARGE, costs, budgets), 15)
    best = front.best(budgets, fidelity="full")
    assert best is not None
    assert best.costs["macs"] < 0.9 * costs.cost([LARGE.dense])[0, 0]

"""The greedy order of sensitivities: what it takes first, and what it is worth."""

from __future__ import annotations

import numpy as np
import pytest
from controller_contract import LARGE, ControllerContract, problem, searched
from toys import ToyCosts, ToyLoss, separable, space_of

from autocompress.search import CONTROLLERS
from autocompress.types import Budget, CostFactor


class TestGreedy(ControllerContract):
    name = "greedy"
    finds_optimum = False  # a switch is never taken back


def switches(saved: list[int], harm: list[float], limit: float) -> tuple[int, ...]:
    """What greedy ends with where every site has one switch, of a dense cost of 100 a site."""
    space = space_of(*[2] * len(saved))
    factors = [CostFactor(f"f{i}", (i,), np.array([[100], [100 - s]])) for i, s in enumerate(saved)]
    costs, budgets = ToyCosts(("macs",), factors, space.n_levels), [Budget("macs", limit)]
    evaluator = ToyLoss(space, costs, budgets)
    evaluator.sensitivity = harm
    best = searched(CONTROLLERS["greedy"](space, costs, budgets, 0), evaluator, 60).best(fidelity="full")
    assert best is not None
    return best.plan


def test_the_most_saving_for_the_least_harm_goes_first() -> None:
    # saving by harm: 90, 600, 300; the second and third together hold the limit
    assert switches([90, 60, 60], [1.0, 0.1, 0.2], limit=200) == (0, 1, 1)
    # a saving beyond the limit is worth nothing, so the small switch wins although the large one saves more by harm
    assert switches([90, 20, 20], [0.3, 0.01, 1.0], limit=285) == (0, 1, 0)


@pytest.mark.slow
def test_between_uniform_and_exact() -> None:
    losses = {}
    for name in ("uniform", "greedy", "exact"):
        space = space_of(*[6] * 14)
        costs, budgets, evaluator = problem(space)
        best = searched(CONTROLLERS[name](space, costs, budgets, 0), evaluator, 150).best(fidelity="full")
        assert best is not None
        losses[name] = best.values["loss"]
    assert losses["exact"] <= losses["greedy"] < 0.8 * losses["uniform"]


@pytest.mark.parametrize("drop", [0.5, 2.0])
def test_quality_alone_ends_near_its_limit(drop: float) -> None:
    costs, budgets = separable(LARGE.n_levels, 1), [Budget("accuracy_drop", drop)]
    front = searched(CONTROLLERS["greedy"](LARGE, costs, budgets, 0), ToyLoss(LARGE, costs, budgets), 90)
    best = front.best(budgets, fidelity="full")
    assert best is not None
    assert best.costs["macs"] < 0.9 * costs.cost([LARGE.dense])[0, 0]
    assert 0.7 * drop < best.values["accuracy_drop"] <= drop


def test_switches_that_only_pay_in_company_are_found_from_the_other_end() -> None:
    together = CostFactor("pair", (0, 1), np.array([[[100], [100]], [[100], [20]]]))
    space = space_of(2, 2)
    costs, budgets = ToyCosts(("macs",), [together], space.n_levels), [Budget("macs", 50)]
    best = searched(CONTROLLERS["greedy"](space, costs, budgets, 0), ToyLoss(space, costs, budgets), 20)
    assert [e.plan for e in best.at("full")] == [(1, 1)]

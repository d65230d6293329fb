"""Each controller inherits the contract; what they promise beyond it stands here."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from controller_contract import ControllerContract, problem, searched
from toys import PeakCosts, ToyLoss, chain, space_of

from autocompress.errors import UnknownName
from autocompress.search import CONTROLLERS
from autocompress.types import Budget


class TestRandom(ControllerContract):
    name = "random"
    finds_optimum = False  # it does in tiny spaces, where it draws without replacement


class TestUniform(ControllerContract):
    name = "uniform"
    finds_optimum = False


class TestExact(ControllerContract):
    name = "exact"
    interaction_tolerance = 0.2  # its model has no interactions, only a second look around its solution


@pytest.mark.slow
class TestSpdy(ControllerContract):
    name = "spdy"
    interaction_tolerance = 0.2  # as exact


@pytest.mark.slow
class TestAlds(ControllerContract):
    name = "alds"
    finds_optimum = False  # its objective is the largest one-site loss, not the sum


class TestEvolution(ControllerContract):
    name = "evolution"


class TestAuto(ControllerContract):
    name = "auto"


class TestGradient(ControllerContract):
    name = "gradient"
    interaction_tolerance = 0.2  # as exact, with which it ends


def test_names() -> None:
    assert list(CONTROLLERS) == [
        "alds",
        "amc",
        "auto",
        "bayes",
        "bayes-cmaes",
        "bayes-gp",
        "bayes-nsga2",
        "bayes-nsga3",
        "conditional",
        "evolution",
        "evopress",
        "evopress-fast",
        "exact",
        "genetic",
        "gradient",
        "greedy",
        "random",
        "reinforce",
        "spdy",
        "uniform",
    ]
    page = Path(__file__).parents[2] / "docs" / "search.md"
    table = [line for line in page.read_text().splitlines() if line.startswith("| `")]
    assert {name for line in table for name in re.findall(r"`([a-z0-9-]+)`", line)} >= set(CONTROLLERS)
    with pytest.raises(UnknownName, match="Did you mean 'evolution'"):
        CONTROLLERS["evolutoin"]


@pytest.mark.slow
def test_search_pays() -> None:
    """At equal evaluations: evolution and exact beat random and uniform, with pairs of sites and a noisy slice."""
    space = space_of(*[6] * 14)
    losses = {}
    for name in ("evolution", "exact", "random", "uniform"):
        costs, budgets, evaluator = problem(space, pairs=0.3, slice_noise=0.05)
        best = searched(CONTROLLERS[name](space, costs, budgets, 0), evaluator, 150).best(fidelity="full")
        assert best is not None
        losses[name] = best.values["loss"]
    assert max(losses["evolution"], losses["exact"]) < 0.9 * min(losses["random"], losses["uniform"])


@pytest.mark.slow
def test_evolution_goes_beyond_the_table_model() -> None:
    space = space_of(*[8] * 8)
    costs, budgets, evaluator = problem(space, pairs=0.5)
    exact = searched(CONTROLLERS["exact"](space, costs, budgets, 0), evaluator, 400).best(fidelity="full")
    evolved = searched(CONTROLLERS["evolution"](space, costs, budgets, 0), evaluator, 400).best(fidelity="full")
    assert exact is not None
    assert evolved is not None
    assert evolved.values["loss"] <= exact.values["loss"] * 1.001


@pytest.mark.parametrize("name", ["exact", "evolution"])
def test_a_front_appears_on_both_sides_of_the_budget(name: str) -> None:
    space = space_of(*[6] * 8)
    costs, budgets, evaluator = problem(space)
    front = searched(CONTROLLERS[name](space, costs, budgets, 0), evaluator, 120)
    assert len(front.at("full")) >= 3
    assert len(front.at("full", feasible=False)) >= len(front.at("full")) + 3


def test_tightest_of_two_budgets_on_one_cost_counts() -> None:
    space = space_of(*[4] * 6)
    costs = chain(space.n_levels)
    dense = costs.cost([space.dense])[0, 0]
    budgets = [Budget("macs", dense * 0.8), Budget("macs", dense * 0.4)]
    controller = CONTROLLERS["exact"](space, costs, budgets, 0)
    best = searched(controller, ToyLoss(space, costs, budgets), 60).best(fidelity="full")
    assert best is not None
    assert best.costs["macs"] <= 0.4 * dense


@pytest.mark.parametrize("name", ["evolution", "exact", "evopress", "bayes", "greedy", "random"])
def test_a_peak_is_a_budget_like_any_other(name: str) -> None:
    space = space_of(*[5] * 8)
    costs = PeakCosts(space.n_levels)
    budgets = [Budget("peak_mb", costs.cost([space.dense])[0, 1] * 1e-6 * 0.5)]
    front = searched(CONTROLLERS[name](space, costs, budgets, 0), ToyLoss(space, costs, budgets), 30)
    assert front.best(fidelity="full") is not None

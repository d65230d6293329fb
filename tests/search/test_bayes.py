"""Optuna's samplers as controllers, and the study that stays behind."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import pytest
from controller_contract import LARGE, ControllerContract, problem, searched
from toys import Shrink, ToyLoss, chain, separable, space_of

from autocompress.errors import UsageError
from autocompress.search import CONTROLLERS, Bayes, ParetoFront, run
from autocompress.search.study import Parameters, ordered
from autocompress.types import Budget, Level, MethodConfig, Objective, SearchSpace

VARIANTS = [name for name in CONTROLLERS if name.startswith("bayes")]


@pytest.mark.slow
class TestTPE(ControllerContract):
    name = "bayes"
    scale = 0.5  # a proposal takes hundredths of a second


@pytest.mark.slow
class TestGP(ControllerContract):
    name = "bayes-gp"
    scale = 0.25  # a proposal takes tenths of a second


@pytest.mark.slow
class TestNSGA2(ControllerContract):
    name = "bayes-nsga2"


@pytest.mark.slow
class TestNSGA3(ControllerContract):
    name = "bayes-nsga3"


class TestCMAES(ControllerContract):
    name = "bayes-cmaes"


@dataclass(frozen=True)
class Round(MethodConfig):
    """Another toy method."""

    bits: int = 8


def mixed(n_sites: int = 4) -> SearchSpace:
    """Sites that offer two methods, beside sites of one."""
    both = (Level(), Level((Shrink(8),)), Level((Round(),)))
    space = space_of(*[3] * n_sites)
    return SearchSpace(space.sites, tuple(both if i % 2 else levels for i, levels in enumerate(space.levels)))


# ---------------------------------------------------------------- parameters


def test_levels_of_one_method_are_integers_by_saving_and_others_categories() -> None:
    space = mixed(2)
    parameters = Parameters(space, [[0, 2, 1], [0, 1, 2]])
    kinds = {name: type(d).__name__ for name, d in parameters.distributions.items()}
    assert kinds == {"s0": "IntDistribution", "s1": "CategoricalDistribution"}
    assert parameters.of((1, 2))["s0"] == 2  # level 1 saves the most
    for plan in [(0, 0), (1, 2), (2, 1)]:
        assert parameters.plan(parameters.of(plan)) == plan


def test_what_has_an_order() -> None:
    assert ordered([Level(), Level((Round(4),))])
    assert ordered([Level(), Level((Shrink(4), Round(4))), Level((Shrink(2), Round(4)))])
    assert not ordered([Level(), Level((Shrink(4),)), Level((Shrink(4), Round(4)))])


def test_a_site_without_a_choice_is_no_parameter() -> None:
    parameters = Parameters(space_of(1, 3), [[0], [0, 1, 2]])
    assert list(parameters.distributions) == ["s1"]
    assert parameters.plan(parameters.of((0, 2))) == (0, 2)


def test_cmaes_refuses_categories_and_names_those_that_take_them() -> None:
    space = mixed()
    costs = chain(space.n_levels)
    with pytest.raises(UsageError, match="2 sites offer different methods, such as 's1'; use bayes, bayes-gp"):
        CONTROLLERS["bayes-cmaes"](space, costs, [], 0)
    for name in set(VARIANTS) - {"bayes-cmaes"}:
        budgets = [Budget("macs", costs.cost([space.dense])[0, 0] * 0.6)]
        best = searched(CONTROLLERS[name](space, costs, budgets, 0), ToyLoss(space, costs, budgets), 15).best()
        assert best is not None


def test_gp_refuses_what_would_take_seconds_a_plan() -> None:
    space = space_of(*[2] * 65, 1)
    with pytest.raises(UsageError, match="at most 64 sites that offer a choice, this space has 65"):
        CONTROLLERS["bayes-gp"](space, chain(space.n_levels), [], 0)


# ---------------------------------------------------------------- proposals


@pytest.mark.parametrize("name", sorted(set(VARIANTS) - {"bayes-gp"}))
def test_no_evaluation_is_spent_over_a_limit(name: str) -> None:
    costs, budgets, evaluator = problem(share=0.2)
    controller = CONTROLLERS[name](LARGE, costs, budgets, 0)
    front = searched(controller, evaluator, 60)
    spread = (
        5 if "nsga" in name else 0
    )  # solutions between dense and the budget, so that there is a front on both sides
    assert sum(e.violation > 0 for e in front.evaluations("full")) <= spread


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bayes", "bayes-cmaes"])
def test_better_than_random_and_uniform(name: str) -> None:
    """At equal evaluations, with pairs of sites."""
    losses = {}
    for who in (name, "random", "uniform"):
        space = space_of(*[6] * 14)
        costs, budgets, evaluator = problem(space, pairs=0.3)
        best = searched(CONTROLLERS[who](space, costs, budgets, 0), evaluator, 100).best(fidelity="full")
        assert best is not None
        losses[who] = best.values["loss"]
    assert losses[name] < 0.9 * min(losses["random"], losses["uniform"])


@pytest.mark.parametrize("name", ["bayes-nsga2", "bayes-nsga3"])
def test_several_objectives_give_a_front(name: str) -> None:
    costs, budgets, evaluator = problem()
    front = searched(CONTROLLERS[name](LARGE, costs, budgets, 0), evaluator, 100)
    assert len(front.at("full")) >= 8


@pytest.mark.parametrize("name", VARIANTS)
def test_one_site_is_searched_to_its_end(name: str) -> None:
    space = space_of(4)
    costs = separable(space.n_levels)
    controller = CONTROLLERS[name](space, costs, [], 0)
    front = ParetoFront([Objective("loss")])
    assert run(controller, ToyLoss(space, costs), front, evaluations=50).finished


# ---------------------------------------------------------------- the study


READ = """
import json, sys
import optuna
from optuna.storages.journal import JournalFileBackend
optuna.logging.set_verbosity(optuna.logging.ERROR)
storage = optuna.storages.JournalStorage(JournalFileBackend(sys.argv[1]))
[name] = optuna.get_all_study_names(storage)
study = optuna.load_study(study_name=name, storage=storage)
print(json.dumps([[t.state.name, t.values, t.params, t.constraints, t.user_attrs] for t in study.trials]))
"""


def read(path: Path) -> list[Any]:
    """The trials of a storage, read by another process that knows nothing of this project."""
    done = subprocess.run([sys.executable, "-c", READ, str(path)], capture_output=True, text=True, check=True)
    trials: list[Any] = json.loads(done.stdout)
    return trials


def test_another_process_reads_params_values_and_constraints(tmp_path: Path) -> None:
    costs, budgets, evaluator = problem(broken=lambda plan: plan[0] == 1)
    budgets.append(Budget("accuracy_drop", 6.0))
    evaluator.budgets = budgets
    path = tmp_path / "new" / "optuna.log"
    controller = Bayes(LARGE, costs, budgets, 0, storage=path)
    front = searched(controller, evaluator, 40)
    trials, told = read(path), {e.plan: e for e in front.evaluations("full")}
    assert len(trials) == len(told) == 40
    parameters = Parameters(LARGE, controller.orders)
    states = set()
    for state, values, params, constraints, notes in trials:
        evaluation = told[parameters.plan(params)]
        states.add((state, evaluation.feasible))
        assert notes["plan"] == LARGE.describe(evaluation.plan)
        assert notes["macs"] == evaluation.costs["macs"]
        if state == "PRUNED":
            assert math.isnan(evaluation.values["loss"])
            continue
        assert values == [evaluation.values["loss"]]
        assert list(constraints) == [str(b) for b in budgets]
        assert sum(max(v, 0) for v in constraints.values()) == pytest.approx(evaluation.violation)
        assert all(v < 0 for v in constraints.values()) or not evaluation.feasible
    assert states == {("COMPLETE", True), ("COMPLETE", False), ("PRUNED", False)}


@pytest.mark.slow
def test_a_search_that_is_begun_anew_does_not_double_its_study(tmp_path: Path) -> None:
    path = tmp_path / "optuna.log"
    plans = []
    for n in (20, 30):
        costs, budgets, evaluator = problem()
        searched(Bayes(LARGE, costs, budgets, 0, storage=path), evaluator, n)
        plans.append([trial[4]["plan"] for trial in read(path)])
    assert [len(p) for p in plans] == [20, 30]
    assert plans[1][:20] == plans[0]  # and is the same search


def test_the_storage_does_not_change_the_search(tmp_path: Path) -> None:
    asked = []
    for storage in (None, tmp_path / "optuna.log"):
        costs, budgets, evaluator = problem()
        controller = Bayes(LARGE, costs, budgets, 0)
        controller.storage = storage  # may be set until the first ask
        asked.append([e.plan for e in searched(controller, evaluator, 30).evaluations("full")])
    assert asked[0] == asked[1]


def test_a_file_that_is_no_storage_is_named(tmp_path: Path) -> None:
    costs, budgets, _ = problem()
    (tmp_path / "notes.txt").write_text("not a journal\n")
    for path in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(UsageError, match="The Optuna storage is a journal file that can be written"):
            Bayes(LARGE, costs, budgets, 0, storage=path).ask(1)


@pytest.mark.slow
def test_the_search_room_does_not_import_optuna() -> None:
    code = "import sys, autocompress.search, autocompress.cli; print('optuna' in sys.modules, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_optuna_keeps_its_own_voice() -> None:
    before = optuna.logging.get_verbosity()
    costs, budgets, evaluator = problem()
    searched(CONTROLLERS["bayes-nsga3"](LARGE, costs, budgets, 0), evaluator, 12)
    assert optuna.logging.get_verbosity() == before

"""What every controller promises. Inherit :class:`ControllerContract` and name yours."""

from __future__ import annotations

import functools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from toys import ToyCosts, ToyLoss, chain, nested, separable, space_of

from autocompress.errors import UsageError
from autocompress.search import CONTROLLERS, BaseController, ParetoFront, run
from autocompress.search.run import answered
from autocompress.types import Budget, Controller, Objective, Query, SearchSpace, SoftQuery

LARGE = space_of(*[5, 4, 6, 5, 4, 6, 2, 5, 4, 3])
KEYS = ("macs", "params")


def problem(space: SearchSpace = LARGE, share: float = 0.5, **toy: object) -> tuple[ToyCosts, list[Budget], ToyLoss]:
    """Coupled costs, two budgets at once."""
    costs = chain(space.n_levels, 3, KEYS)
    dense = costs.cost([space.dense])[0]
    budgets = [Budget("macs", dense[0] * share), Budget("params", dense[1] * (share + 0.1))]
    return costs, budgets, ToyLoss(space, costs, budgets, **toy)  # type: ignore[arg-type]


def asked(name: str, n: int = 60, seed: int = 5) -> list[Query]:
    """The queries of a search of ``n`` evaluations."""
    costs, budgets, evaluator = problem(pairs=0.3)
    controller = CONTROLLERS[name](LARGE, costs, budgets, seed)
    out: list[Query] = []
    while len(out) < n and (queries := controller.ask(7)):
        out += queries
        controller.tell(answered(evaluator, queries))
    return out


def searched(controller: Controller, evaluator: ToyLoss, n: int) -> ParetoFront:
    front = ParetoFront([Objective("loss"), Objective("macs")])
    run(controller, evaluator, front, evaluations=n)
    return front


@functools.cache
def elsewhere(searches: tuple[tuple[str, int], ...]) -> dict[str, list[list[object]]]:
    """The queries of several controllers, each with its number of evaluations, in one other process."""
    code = (
        "import json; from controller_contract import asked;"
        f"found = {{name: asked(name, n) for name, n in {searches!r}}};"
        "print(json.dumps({k: [[q.plan, q.fidelity, q.budget] for q in qs] for k, qs in found.items()}))"
    )
    paths = [str(Path(__file__).parent), *filter(None, sys.path)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONHASHSEED": "7"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)
    queries: dict[str, list[list[object]]] = json.loads(done.stdout)
    return queries


class ControllerContract:
    name: str
    finds_optimum = True
    interaction_tolerance = 1e-3
    """How far from the optimum it may end where pairs of sites interact."""
    scale = 1.0
    """Share of the usual evaluations, for a controller that takes long to choose a plan."""

    def n(self, evaluations: int) -> int:
        return round(self.scale * evaluations)

    def make(self, space: SearchSpace = LARGE, seed: int = 0, **toy: object) -> tuple[Controller, ToyLoss]:
        costs, budgets, evaluator = problem(space, **toy)  # type: ignore[arg-type]
        return CONTROLLERS[self.name](space, costs, budgets, seed), evaluator

    @pytest.mark.slow
    def test_same_seed_same_queries_also_in_another_process(self, request: pytest.FixtureRequest) -> None:
        n = self.n(50)
        here = asked(self.name, n)
        assert here == asked(self.name, n)
        beside = [i for i in request.session.items if i.path == request.node.path and isinstance(i, pytest.Function)]
        same = {i.cls for i in beside if i.originalname == request.node.originalname and i.cls}
        there = elsewhere(tuple(sorted((cls.name, round(cls.scale * 50)) for cls in same)))
        assert there[self.name] == [[list(q.plan), q.fidelity, q.budget] for q in here]

    @pytest.mark.parametrize(("told", "between"), [(0, True), (3, False), (40, True)])
    def test_state_goes_on_where_it_was_taken(self, told: int, between: bool) -> None:
        one, evaluator = self.make(pairs=0.3)
        for _ in range(self.n(told)):
            if queries := one.ask(1):
                one.tell(answered(evaluator, queries))
        waiting = one.ask(4) if between else []
        state = json.loads(json.dumps(one.state_dict(), allow_nan=False))
        other, _ = self.make(pairs=0.3)
        other.load_state_dict(state)
        if between:
            assert other.ask(4) == waiting
            answers = answered(evaluator, waiting)
            one.tell(answers)
            other.tell(answers)
        for _ in range(6):
            queries = one.ask(5)
            assert queries == other.ask(5)
            answers = answered(evaluator, queries)
            one.tell(answers)
            other.tell(answers)

    def test_what_is_known_is_told_before_the_first_ask_and_stays_in_the_state(self) -> None:
        one, evaluator = self.make(pairs=0.3)
        known = evaluator([Query(LARGE.dense, "slice"), Query((1,) * len(LARGE.sites), "full")])
        errors = {0: tuple(0.1 * i for i in range(LARGE.n_levels[0]))}
        one.learn(known, errors)
        if queries := one.ask(3):
            one.tell(evaluator(queries))
        with pytest.raises(UsageError, match="before the first ask"):
            one.learn(known)
        state = json.loads(json.dumps(one.state_dict(), allow_nan=False))
        other, _ = self.make(pairs=0.3)
        other.load_state_dict(state)
        assert isinstance(other, BaseController) and (other.known, other.errors) == (tuple(known), errors)
        assert one.ask(5) == other.ask(5)

    def test_a_state_of_something_else_is_refused(self) -> None:
        one, _ = self.make()
        two, _ = self.make(seed=1)
        with pytest.raises(UsageError, match="has seed 1, the controller 0"):
            one.load_state_dict(two.state_dict())

    def test_plans_are_valid_never_repeated_and_hold_the_budgets_they_name(self) -> None:
        controller, evaluator = self.make()
        seen: set[object] = set()
        named = 0
        for _ in range(15):
            queries = controller.ask(8)
            for query, answer in zip(queries, answered(evaluator, queries), strict=True):
                assert len(query.plan) == len(LARGE.sites)
                assert all(0 <= level < n for level, n in zip(query.plan, LARGE.n_levels, strict=True))
                key = query if isinstance(query, SoftQuery) else (query.plan, query.fidelity)
                assert key not in seen
                seen.add(key)
                if query.budget is not None:
                    named += 1
                    assert query.fidelity == "full"
                    assert answer.violation == 0
            controller.tell(answered(evaluator, queries))
        assert named > 0

    def test_a_network_is_asked_once_whatever_is_chosen_inside_dropped_blocks(self) -> None:
        space, costs = nested()
        budgets = [Budget("macs", float(costs.cost([space.dense])[0, 0]) * 0.5)]
        controller, evaluator = CONTROLLERS[self.name](space, costs, budgets, 0), ToyLoss(space, costs, budgets)
        asked = []
        for _ in range(self.n(10)):
            queries = controller.ask(8)
            asked += [(q.plan, q.fidelity) for q in queries if not isinstance(q, SoftQuery)]
            controller.tell(answered(evaluator, queries))
        assert asked
        assert len(set(asked)) == len(asked)
        assert all(space.effective(plan) == plan for plan, _ in asked)

    def test_something_that_holds_the_budgets_within_twenty(self) -> None:
        controller, evaluator = self.make(space_of(*[6] * 15))
        assert searched(controller, evaluator, self.n(20)).best(fidelity="full") is not None

    def test_an_exhausted_space_ends_the_search(self) -> None:
        for space in (space_of(2, 2), space_of(1, 1), space_of(3, 2, 2)):
            controller, evaluator = self.make(space, share=0.7)
            outcome = run(controller, evaluator, ParetoFront([Objective("loss")]), evaluations=500)
            assert outcome.finished
            assert controller.ask(3) == []

    def test_broken_plans_count_as_infeasible_and_the_search_goes_on(self) -> None:
        controller, evaluator = self.make(broken=lambda plan: plan[2] > 2 or plan[6] == 1)
        front = searched(controller, evaluator, self.n(80))
        best = front.best(fidelity="full")
        broken = [e for e in front.evaluations("full") if math.isnan(e.values["loss"])]
        assert all(e not in front.at("full", feasible=False) for e in broken)
        if self.finds_optimum:
            assert best is not None

    def test_all_broken_is_survived(self) -> None:
        controller, evaluator = self.make(broken=lambda plan: True)
        assert searched(controller, evaluator, self.n(60)).best(fidelity="full") is None

    @pytest.mark.parametrize("pairs", [0.0, 0.3])
    def test_finds_the_optimum_of_a_small_space(self, pairs: float) -> None:
        if not self.finds_optimum:
            pytest.skip("a yardstick, not an optimiser")
        space = space_of(4, 3, 4, 3)
        controller, evaluator = self.make(space, pairs=pairs)
        best = searched(controller, evaluator, self.n(300)).best(fidelity="full")
        assert best is not None
        assert best.values["loss"] == pytest.approx(
            evaluator.optimum()[0], rel=self.interaction_tolerance if pairs else 1e-3
        )

    def test_quality_budget_alone_finds_a_cheaper_plan_than_dense(self) -> None:
        costs = separable(LARGE.n_levels, 1)
        budgets = [Budget("accuracy_drop", 2.0)]
        controller = CONTROLLERS[self.name](LARGE, costs, budgets, 0)
        front = searched(controller, ToyLoss(LARGE, costs, budgets), self.n(80))
        best = front.best(budgets, fidelity="full")
        assert best is not None
        assert best.values["accuracy_drop"] <= 2.0
        if self.finds_optimum:
            assert best.costs["macs"] < 0.9 * costs.cost([LARGE.dense])[0, 0]

    def test_budgets_that_cannot_be_held_do_not_break_the_search(self) -> None:
        costs = chain(LARGE.n_levels, 3, KEYS)
        budgets = [Budget("macs", 1.0)]
        controller = CONTROLLERS[self.name](LARGE, costs, budgets, 0)
        front = searched(controller, ToyLoss(LARGE, costs, budgets), self.n(30))
        assert front.best(fidelity="full") is None
        assert front.nearest(fidelity="full") is not None

    def test_misuse_is_said(self) -> None:
        controller, evaluator = self.make()
        with pytest.raises(UsageError, match="positive number of plans, got 0"):
            controller.ask(0)
        queries = controller.ask(2)
        with pytest.raises(UsageError, match="asked and not told"):
            controller.ask(2)
        with pytest.raises(UsageError, match="in its order"):
            controller.tell([])
        controller.tell(answered(evaluator, queries))

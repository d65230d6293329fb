"""Controllers that learn a policy: the contract, the action wall, and what each promises beyond."""

from __future__ import annotations

import dataclasses
import json
import math
import random
from collections.abc import Sequence

import numpy as np
import pytest
from controller_contract import ControllerContract, problem, searched
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import PeakCosts, Shrink, ToyCosts, ToyLoss, chain, separable, space_of

from autocompress.errors import UsageError
from autocompress.search import CONTROLLERS, Amc, BaseController, Conditional, Random, Reinforce
from autocompress.search.states import States, describe
from autocompress.search.tables import UNLIMITED, CostTables, all_plans
from autocompress.search.wall import Choices, Walk, Wall, nearest
from autocompress.types import Budget, Evaluation, IntArray, Level, MethodConfig, Plan, SearchSpace, Site


@pytest.mark.slow
class TestAmc(ControllerContract):
    name = "amc"
    scale = 0.5


@pytest.mark.slow
class TestConditional(ControllerContract):
    name = "conditional"


@pytest.mark.slow
class TestReinforce(ControllerContract):
    name = "reinforce"


# ---------------------------------------------------------------- the action wall


def walked(wall: Wall, actions: Sequence[float]) -> Plan:
    """The plan that a sequence of actions in [0, 1] leads to."""
    walk, choices = Walk(wall), wall.choices
    while not walk.done:
        site = choices.sites[walk.step]
        order = choices.orders[site]
        allowed = walk.allowed()
        assert allowed
        walk.take(nearest(order, choices.at(actions[site], site), allowed))
    return walk.plan()


def choices_of(space: SearchSpace, costs: ToyCosts) -> Choices:
    return Choices(space, CostTables(space, costs, range(len(costs.keys))))


@settings(max_examples=60, deadline=None)
@given(
    n_levels=st.lists(st.integers(1, 4), min_size=2, max_size=5),
    share=st.tuples(st.floats(0.05, 1.1), st.floats(0.05, 1.1)),
    seed=st.integers(0, 50),
    fill=st.booleans(),
    data=st.data(),
)
def test_every_executed_plan_holds_every_limit_when_one_can(
    n_levels: list[int], share: tuple[float, float], seed: int, fill: bool, data: st.DataObject
) -> None:
    space = space_of(*n_levels)
    both = chain(space.n_levels, seed, ("macs", "params")), separable(space.n_levels, seed + 1, ("macs", "params"))
    costs = ToyCosts(("macs", "params"), [f for part in both for f in part.factors()], n_levels)
    choices = choices_of(space, costs)
    limit: IntArray = (choices.dense_cost * np.array(share)).astype(np.int64)
    wall = Wall(choices, limit, fill)
    possible = bool((costs.cost(all_plans(space)) <= limit).all(axis=1).any())
    assert wall.reachable == possible
    actions = data.draw(st.lists(st.floats(0, 1), min_size=len(n_levels), max_size=len(n_levels)))
    cost = costs.cost([walked(wall, actions)])[0]
    assert (cost <= wall.limit).all()
    if possible:
        assert (cost <= limit).all()


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 30), share=st.floats(0.3, 0.9), actions=st.lists(st.floats(0, 1), min_size=6, max_size=6))
def test_no_milder_level_fits_after_a_walk(seed: int, share: float, actions: list[float]) -> None:
    space = space_of(*[5] * 6)
    choices = choices_of(space, chain(space.n_levels, seed))
    wall = Wall(choices, (choices.dense_cost * share).astype(np.int64))
    plan = walked(wall, actions)
    milder = [(*plan[:s], level, *plan[s + 1 :]) for s in range(6) for level in range(plan[s])]
    assert not any(choices.tables.fits(milder, wall.limit))


def test_the_least_loss_within_the_limits_can_be_reached() -> None:
    space = space_of(4, 3, 4, 3)
    costs, budgets, evaluator = problem(space, pairs=0.3)
    choices = choices_of(space, costs)
    controller = Amc(space, costs, budgets)
    wall, best = Wall(choices, controller.limits.limit), evaluator.optimum()[1]
    assert walked(wall, [choices.action(s, level) for s, level in enumerate(best)]) == best


def test_without_limits_every_plan_can_be_reached() -> None:
    space = space_of(3, 2, 3)
    choices = choices_of(space, chain(space.n_levels))
    wall = Wall(choices, np.array([UNLIMITED]), fill=False)
    for plan in all_plans(space):
        assert walked(wall, [choices.action(s, level) for s, level in enumerate(plan)]) == plan


@dataclasses.dataclass(frozen=True)
class Rounded(MethodConfig):
    """Another toy method: ``bits`` a weight."""

    bits: int = 8


def test_filling_up_never_trades_one_method_for_another() -> None:
    """A format that saves less than rounding need not lose less: only levels of the same methods count as milder."""
    levels = (Level(), Level((Shrink(8),)), Level((Rounded(),)), Level((Shrink(8), Rounded())))
    space = SearchSpace((Site("a", "layer", ("a",)),), (levels,))
    costs = separable([4])
    choices = choices_of(space, costs)
    assert choices.milder == [{0: [], 1: [0], 2: [0], 3: [0, 1, 2]}]


def test_a_peak_is_held_on_the_way() -> None:
    space = space_of(*[5] * 6)
    choices = choices_of(space, PeakCosts(space.n_levels))
    wall = Wall(choices, (choices.dense_cost * np.array([0.7, 0.5])).astype(np.int64))
    rng = random.Random(0)
    plans = [walked(wall, [rng.random() for _ in range(6)]) for _ in range(20)]
    assert wall.reachable
    assert all(choices.tables.fits(plans, wall.limit))


def test_limits_out_of_reach_become_the_nearest_plan() -> None:
    space = space_of(3, 3, 3)
    choices = choices_of(space, chain(space.n_levels))
    wall = Wall(choices, np.array([1]))
    assert not wall.reachable
    assert wall.limit[0] == choices.tables.cost(all_plans(space)).min()


# ---------------------------------------------------------------- what a policy sees


def test_states_are_scaled_and_account_for_every_cost() -> None:
    space = space_of(4, 5, 3, 1)
    choices = choices_of(space, chain(space.n_levels, 2, ("macs", "params")))
    states = States(choices)
    rows = states.along((1, 4, 0, 0))
    assert rows.shape == (3, states.n) == (3, 13)
    assert rows.min() >= 0
    assert rows.max() <= 1
    reduced, rest, last = rows[:, 8:10], rows[:, 10:12], rows[:, 12]
    assert (reduced[0] == 0).all()
    assert (np.diff(reduced, axis=0) >= 0).all()
    floor = choices.floor / choices.dense_cost
    assert reduced[0] + rest[0] == pytest.approx(1 - floor)
    assert last.tolist() == pytest.approx([1.0, 2 / 3, 0.0])


def test_descriptions_do_not_depend_on_the_size_of_the_space() -> None:
    one, two = (describe(choices_of(s, separable(s.n_levels))) for s in (space_of(3, 3), space_of(*[3] * 40)))
    assert one.shape == (2, 11)
    assert two.shape == (40, 11)
    assert np.abs(two).max() < 3


# ---------------------------------------------------------------- what each promises


def best_within(controller: BaseController, limits: Sequence[IntArray]) -> float:
    """The least loss found within each of some limits, averaged."""
    found = [e for (rung, _), e in controller.seen.items() if rung == "full"]
    within = [controller.tables.fits([e.plan for e in found], limit) for limit in limits]
    return float(np.mean([min(e.values["loss"] for e, ok in zip(found, row, strict=True) if ok) for row in within]))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["amc", "conditional"])
def test_learning_beats_drawing_at_random(name: str) -> None:
    """Under the budgets at equal evaluations; ``conditional`` averaged over its targets."""
    space, learned, drawn = space_of(*[6] * 8), [], []
    for seed in range(2):
        costs, budgets, evaluator = problem(space, pairs=0.3, seed=seed)
        policy, chance = CONTROLLERS[name](space, costs, budgets, seed), Random(space, costs, budgets, seed)
        for controller in (policy, chance):
            searched(controller, evaluator, 120)
        limits = [w.limit for w in policy.walls] if isinstance(policy, Conditional) else [chance.limits.limit]
        learned.append(best_within(policy, limits))
        drawn.append(best_within(chance, limits))
    assert np.mean(learned) < np.mean(drawn)


def test_rewards_follow_the_budgets() -> None:
    space = space_of(5, 5, 5)
    costs = chain(space.n_levels)
    half = Budget("macs", float(costs.cost([space.dense])[0, 0]) / 2)
    roomy, drop = Budget("macs", 1e9), Budget("accuracy_drop", 1.0)
    for budgets, kind in (
        ([half], "hard budget"),
        ([half, drop], "hard budget"),
        ([], "trade"),
        ([roomy], "trade"),
        ([drop], "guaranteed"),
        ([roomy, drop], "guaranteed"),
    ):
        controller = Amc(space, costs, budgets)
        controller.ask(1)
        assert controller.kind == kind
        controller.scales = [0.1]

        def reward(plan: Plan, loss: float, controller: Amc = controller, budgets: Sequence[Budget] = budgets) -> float:
            values = {"loss": loss, "accuracy_drop": 10 * loss}
            miss = sum(b.violation(values["accuracy_drop"]) for b in budgets if b is drop)
            return controller._reward(0, Evaluation(plan, "full", values, {}, miss))

        mild, hard = (1, 1, 1), (3, 3, 3)
        assert -2 <= reward(mild, math.nan) < reward(mild, 0.5) <= 1  # a broken plan is the worst
        if kind == "guaranteed":  # what is saved counts once the quality holds, the distance to it before
            assert reward(hard, 0.09) > reward(mild, 0.01) > 0 > reward(mild, 0.11) > reward(hard, 0.2)
        else:
            assert reward(mild, 0.01) > reward(mild, 0.02)
            assert (reward(hard, 0.02) > reward(mild, 0.02)) == (kind == "trade")
        if budgets == [half, drop]:
            assert reward(mild, 0.09) - reward(mild, 0.11) > 0.1 * (reward(mild, 0.07) - reward(mild, 0.09))


def test_the_replay_holds_the_executed_action() -> None:
    space = space_of(*[5] * 6)
    costs, budgets, evaluator = problem(space, share=0.3)
    controller = Amc(space, costs, budgets, 0)
    searched(controller, evaluator, 30)
    plans = [plan for _, plan in controller.seen]
    n = controller.states.n
    replayed = np.array(controller.agent._replay)[:, 2 * n].reshape(-1, len(space.sites))
    executed = np.array([[1 - level / 4 for level in plan] for plan in plans])
    rows = {tuple(row) for row in executed.tolist()}
    assert (
        rows - {tuple(executed[-1])} <= {tuple(row) for row in replayed.tolist()} <= rows
    )  # the last waits for the next ask


@pytest.mark.slow
def test_conditional_has_a_plan_for_every_target() -> None:
    space = space_of(*[6] * 6)
    costs, budgets, evaluator = problem(space)
    controller = Conditional(space, costs, budgets, 0)
    front = searched(controller, evaluator, 100)
    assert len(controller.walls) == 6
    found = front.evaluations("full")
    for wall in controller.walls:
        inside = [e for e in found if controller.tables.fits([e.plan], wall.limit)[0]]
        used = max(controller.tables.cost([e.plan])[0][0] / wall.limit[0] for e in inside)
        assert used > 0.9


def blocks_and_channels(n_blocks: int, n_channels: int, harmless: int = 0) -> tuple[SearchSpace, ToyCosts, ToyLoss]:
    """Residual blocks to drop beside widths to shrink; dropping block ``harmless`` costs nothing."""
    sites = [Site(f"b{i}", "block", (f"b{i}",)) for i in range(n_blocks)]
    sites += [Site(f"c{i}", "channels", (f"c{i}",), 16) for i in range(n_channels)]
    kept = (Level(), *(Level((Shrink(16 - 3 * j),)) for j in range(1, 5)))
    space = SearchSpace(tuple(sites), ((Level(), Level((Rounded(),))),) * n_blocks + (kept,) * n_channels)
    costs = separable(space.n_levels, 3)
    dense = costs.cost([space.dense])[0, 0]
    loss = ToyLoss(space, costs, [Budget("macs", dense * 0.5)])
    loss.sensitivity[harmless] = 0.0
    for i in range(n_blocks):
        loss.sensitivity[i] = 0.0 if i == harmless else 5.0
    return space, costs, loss


@pytest.mark.slow
def test_blocks_are_removed_first_then_the_rest_is_shrunk() -> None:
    space, costs, loss = blocks_and_channels(4, 6, harmless=2)
    controller = Reinforce(space, costs, loss.budgets, 0)
    searched(controller, loss, 80)
    plans = [plan for _, plan in controller.seen]
    assert len({plan[:4] for plan in plans[:10]}) >= 5
    assert {plan[:4] for plan in plans[21:]} == {(0, 0, 1, 0)}
    assert len({plan[4:] for plan in plans[21:]}) > 30


class Featured(ToyLoss):
    """Sites with many MACs bear compression, the others do not: what a policy can learn from one space for another."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.sensitivity = [0.05 if site.macs > 500 else 3.0 for site in self.space.sites]


def featured(n: int, seed: int) -> tuple[SearchSpace, ToyCosts, Featured]:
    rng = random.Random(seed)
    plain = space_of(*[6] * n)
    sites = tuple(dataclasses.replace(s, macs=rng.choice([10, 1000]), width=16) for s in plain.sites)
    space = SearchSpace(sites, plain.levels)
    costs = separable(space.n_levels, seed)
    dense = costs.cost([space.dense])[0, 0]
    return space, costs, Featured(space, costs, [Budget("macs", dense * 0.6)])


@pytest.mark.slow
def test_a_policy_learnt_on_a_small_space_starts_the_search_of_a_large_one() -> None:
    space, costs, loss = featured(10, 1)
    teacher = Reinforce(space, costs, loss.budgets, 0)
    searched(teacher, loss, 300)
    learnt = json.loads(json.dumps(teacher.policy_state()))
    means = []
    for given_policy in (None, learnt):
        space, costs, loss = featured(20, 20)
        controller = Reinforce(space, costs, loss.budgets, 3)
        if given_policy is not None:
            controller.load_policy(given_policy)
        found = searched(controller, loss, 21).evaluations("full")
        means.append(np.mean([e.values["loss"] for e in found if e.plan != space.dense]))
    assert means[1] < 0.8 * means[0]


def test_a_transferred_search_is_resumed_with_its_policy() -> None:
    space, costs, loss = featured(5, 1)
    teacher = Reinforce(space, costs, loss.budgets, 0)
    searched(teacher, loss, 30)
    one, other = (Reinforce(space, costs, loss.budgets, 7) for _ in range(2))
    one.load_policy(teacher.policy_state())
    searched(one, loss, 20)
    other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    assert one.ask(5) == other.ask(5)


def test_misuse_of_policies_is_said() -> None:
    space, costs, loss = featured(5, 1)
    controller = Reinforce(space, costs, loss.budgets, 0)
    with pytest.raises(UsageError, match="ask and tell first"):
        controller.policy_state()
    with pytest.raises(UsageError, match="what policy_state"):
        controller.load_policy({})
    searched(controller, loss, 10)
    state = controller.policy_state()
    with pytest.raises(UsageError, match="before the first ask"):
        controller.load_policy(state)
    state["removal"]["head.bias"] = [0.0]
    with pytest.raises(UsageError, match=r"head.bias' has shape \(1,\), this version's \(2,\)"):
        Reinforce(space, costs, loss.budgets, 0).load_policy(state)


def test_the_global_seed_is_left_alone() -> None:
    import torch

    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    for kind in (Amc, Reinforce):
        costs, budgets, evaluator = problem()
        searched(kind(evaluator.space, costs, budgets, 0), evaluator, 30)
    assert torch.equal(torch.rand(4), expected)


@pytest.mark.slow
def test_threads_of_the_caller_do_not_change_the_path() -> None:
    import torch

    before, paths = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            costs, budgets, evaluator = problem(space_of(*[5] * 5))
            paths.append(
                [e.plan for e in searched(Amc(evaluator.space, costs, budgets, 0), evaluator, 60).evaluations("full")]
            )
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert paths[0] == paths[1]

"""Costs of many plans at once are those of each plan alone, operator by operator, to the last bit."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autocompress import plan_tables
from autocompress.costs import MANY, CostModel
from autocompress.graph import trace
from autocompress.hwprofiles import HardwareProfile, load_profile
from autocompress.space import make_space
from autocompress.tasks.resnet import PadBlock, ResNet
from autocompress.types import IntArray, Plan
from tests import networks

NAMES = ("resnet-a", "mobilenet", "densenet", "chunk", "squeeze-excite", "tokens", "repeats")
PROFILES = ("pixel3", "h200-fp16")


@pytest.fixture(scope="module")
def profiles() -> dict[str, HardwareProfile]:
    return {name: load_profile(name) for name in PROFILES}


@pytest.fixture(scope="module")
def models(profiles: dict[str, HardwareProfile]) -> dict[str, CostModel]:
    found = {}
    for name in NAMES:
        if name == "repeats":  # three blocks a stage
            graph = trace(ResNet(PadBlock, 3, widths=(8, 16, 32)).eval(), torch.ones(1, 3, 16, 16))
        else:
            task = networks.task(name, n=4)
            graph = trace(task.model, task.example_inputs)
        found[name] = CostModel(graph, make_space(graph), profiles)
    return found


def alone(costs: CostModel, plan: Plan) -> list[int]:
    """The slow way: each operator of one plan computed anew, nothing shared, kept or looked up."""
    rows = np.array([costs._rows([(i, seen)])[0] for i, seen in enumerate(costs.seen(plan))])  # (n_ops, n_keys)
    additive = rows[:, :-1].sum(axis=0) + costs._overhead()
    last = costs._last_readers()
    peak = max(sum(int(rows[i, -1]) for i in range(step + 1) if last[i] >= step) for step in range(len(rows)))
    return [*additive.tolist(), peak]


def plans_of(costs: CostModel, n: int, seed: int) -> list[Plan]:
    rng = random.Random(seed)
    kept = rng.random()  # from nearly dense to all different
    return [
        tuple(rng.randrange(count) if rng.random() < kept else 0 for count in costs.space.n_levels) for _ in range(n)
    ]


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=3, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_many_plans_cost_what_each_costs_alone(name: str, seed: int, models: dict[str, CostModel]) -> None:
    costs = models[name]
    plans = plans_of(costs, MANY + 20, seed)
    together: IntArray = costs.cost(plans)
    assert np.array_equal(together, np.concatenate([costs.cost([plan]) for plan in plans]))
    assert [row.tolist() for row in together[:6]] == [alone(costs, plan) for plan in plans[:6]]


def test_operators_with_too_many_rows_for_a_table(
    models: dict[str, CostModel], profiles: dict[str, HardwareProfile], monkeypatch: pytest.MonkeyPatch
) -> None:
    known = models["resnet-a"]
    monkeypatch.setattr(plan_tables, "LARGEST", 50)
    costs = CostModel(known.graph, known.space, profiles)
    sizes = {len(operator.row_at) > 0 for operator in costs._tables._operators}
    assert sizes == {True, False}
    plans = plans_of(costs, MANY, 1)
    assert np.array_equal(costs.cost(plans), known.cost(plans))


def test_blocks_that_repeat_share_their_rows(models: dict[str, CostModel]) -> None:
    alike = models["repeats"]._alike()
    assert len(set(alike)) < 0.7 * len(alike)
    assert all(kind <= i for i, kind in enumerate(alike))


def test_an_array_is_as_good_as_tuples_and_nothing_costs_nothing(models: dict[str, CostModel]) -> None:
    costs = models["chunk"]
    plans = plans_of(costs, MANY, 2)
    assert np.array_equal(costs.cost(np.array(plans)), costs.cost(plans))
    assert costs.cost([]).shape == (0, len(costs.keys))

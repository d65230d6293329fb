"""Mixtures of levels: at probabilities of 0 and 1 they are plans, in between their gradient is that of finite differences."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from autocompress.costs import CostModel
from autocompress.database import LevelDatabase
from autocompress.errors import UsageError
from autocompress.evaluate import SOFT, Measurer, ModelEvaluator, NoLedger
from autocompress.methods import StaticInt8
from autocompress.relaxed import FloatArray, Relaxed
from autocompress.search import CONTROLLERS, ParetoFront, run
from autocompress.types import Budget, Objective, Plan, Query, SoftEvaluator
from tests import networks
from tests.test_database import make, uniform


@pytest.fixture(scope="module")
def databases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, LevelDatabase]:
    return {name: make(name, tmp_path_factory.mktemp(name)) for name in networks.BUILDERS}


def one_hot(database: LevelDatabase, plan: Plan) -> FloatArray:
    return np.concatenate([np.eye(n)[v] for n, v in zip(database.space.n_levels, plan, strict=True)])


def mixture(database: LevelDatabase, seed: int = 0) -> FloatArray:
    """Dense about half, the rest by chance."""
    rng = np.random.default_rng(seed)
    parts = [rng.dirichlet([2.0 * n, *[1.0] * (n - 1)]) for n in database.space.n_levels]
    return np.concatenate(parts)


def is_int8(database: LevelDatabase) -> list[bool]:
    levels = [level for levels in database.space.levels for level in levels]
    return [any(isinstance(step, StaticInt8) for step in level.steps) for level in levels]


def without_int8(database: LevelDatabase, plan: Plan) -> Plan:
    offsets = np.concatenate([[0], np.cumsum(database.space.n_levels)])
    rounds = is_int8(database)
    return tuple(0 if rounds[offsets[i] + v] else v for i, v in enumerate(plan))


@pytest.mark.slow
@pytest.mark.parametrize("name", networks.BUILDERS)
def test_at_a_corner_the_mixture_is_the_plan(databases: dict[str, LevelDatabase], name: str) -> None:
    database, rng = databases[name], random.Random(3)
    measurer = Measurer(database)
    for _ in range(6):
        plan = database.space.effective(without_int8(database, database.space.sample(rng)))
        want = measurer(plan, "slice")["loss"]
        assert measurer.slope(one_hot(database, plan))["loss"] == pytest.approx(want, rel=2e-4, abs=1e-7)


@pytest.mark.parametrize("name", ["resnet-a", "mobilenet", "tokens"])
def test_at_a_corner_of_int8_it_is_nearly_the_plan(databases: dict[str, LevelDatabase], name: str) -> None:
    """Ranges are the dense model's and not the plan's: all layers in int8 keep the dense ranges nearly."""
    database = databases[name]
    plan = uniform(database.space, "int8")
    measurer = Measurer(database)
    assert measurer.slope(one_hot(database, plan))["loss"] == pytest.approx(measurer(plan, "slice")["loss"], rel=0.3)


@pytest.mark.parametrize("name", networks.BUILDERS)
def test_the_gradient_is_that_of_finite_differences(databases: dict[str, LevelDatabase], name: str) -> None:
    """Along random directions that keep the sums of the probabilities; rounded activations have a straight-through gradient."""
    database = databases[name]
    measurer, rng, p = Measurer(database), np.random.default_rng(1), mixture(database)
    p[np.array(is_int8(database))] = 0.0
    sites = np.repeat(np.arange(len(database.space.sites)), database.space.n_levels)
    p /= np.bincount(sites, p)[sites]
    slope = np.array(measurer.slope(p)["gradient"])
    assert slope.shape == p.shape and np.abs(slope).max() > 0
    for _ in range(3):
        step = rng.normal(size=p.shape) * p
        step -= p * np.bincount(sites, step)[sites]
        step *= 3e-3 / np.abs(step).max()
        ahead, behind = (measurer.slope(p + sign * step)["loss"] for sign in (1, -1))
        assert slope @ step == pytest.approx((ahead - behind) / 2, rel=0.03, abs=3e-6)


def test_every_option_has_its_own_difference(databases: dict[str, LevelDatabase]) -> None:
    """One probability at a time, at a corner: towards each other level of each site.

    No block is dropped there: zeros that two rectifiers pass in a row have another slope on their other side.
    """
    database = databases["resnet-a"]
    measurer, space = Measurer(database), database.space
    plan = without_int8(database, space.sample(random.Random(5)))
    plan = tuple(0 if site.kind == "block" else v for site, v in zip(space.sites, plan, strict=True))
    corner = one_hot(database, plan)
    slope = np.array(measurer.slope(corner)["gradient"])
    here = measurer.slope(corner)["loss"]
    at, rounds = 0, is_int8(database)
    for n, own in zip(space.n_levels, plan, strict=True):
        for level in range(n):
            if level != own and not rounds[at + level]:
                moved = corner.copy()
                moved[at + own], moved[at + level] = 0.999, 0.001
                change = (measurer.slope(moved)["loss"] - here) / 0.001
                assert slope[at + level] - slope[at + own] == pytest.approx(change, rel=0.05, abs=5e-3)
        at += n


def test_the_evaluator_counts_and_keeps_mixtures(databases: dict[str, LevelDatabase]) -> None:
    database, ledger = databases["resnet-b"], NoLedger()
    costs, p = CostModel(database.graph, database.space, {}), mixture(database)
    first = ModelEvaluator(database, costs, [], ledger)
    assert isinstance(first, SoftEvaluator)
    loss, gradient = first.loss_and_grad(p)
    first([Query(database.space.dense, "slice")])
    assert first.counts == {SOFT: 1, "slice": 1} and first.seconds[SOFT] > 0
    again = ModelEvaluator(database, costs, [], ledger)
    kept = again.loss_and_grad(p)
    assert kept[0] == loss and (kept[1] == gradient).all() and again.counts == {}
    fresh = Measurer(database).slope(p)
    assert fresh["loss"] == loss and fresh["gradient"] == gradient.tolist(), "the same numbers in the same order"
    with pytest.raises(UsageError, match="finite probability for each of the"):
        first.loss_and_grad(p[1:])


@pytest.mark.slow
def test_a_search_is_repeated_from_its_ledger_and_without(databases: dict[str, LevelDatabase]) -> None:
    """The real evaluator under the real controller: nothing runs again, and a fresh search finds the same."""
    database = databases["resnet-b"]
    costs = CostModel(database.graph, database.space, {})
    limits = [Budget.parse("macs<=50%").absolute(costs.in_units(database.space.dense))]
    kept, found, counts = NoLedger(), [], []
    for ledger in (kept, kept, NoLedger()):
        evaluator = ModelEvaluator(database, costs, limits, ledger)
        front = ParetoFront([Objective("loss"), Objective("macs")])
        run(CONTROLLERS["gradient"](database.space, costs, limits, 0), evaluator, front, evaluations=16)
        found.append([(e.plan, e.values["loss"]) for e in front.evaluations("full")])
        counts.append(evaluator.counts)
    assert found[0] == found[1] == found[2] and found[0]
    assert counts[1] == {} and counts[2] == counts[0] and sum(counts[0].values()) == 16


def test_a_loss_that_is_no_number_has_no_slope(
    databases: dict[str, LevelDatabase], monkeypatch: pytest.MonkeyPatch
) -> None:
    database = databases["resnet-b"]
    monkeypatch.setattr(Relaxed, "loss_and_grad", lambda self, p, batches: (float("inf"), np.full(len(p), np.nan)))
    found = Measurer(database).slope(mixture(database))
    assert found["loss"] is None and not any(found["gradient"])


def test_weights_are_made_again_when_there_is_no_room(
    databases: dict[str, LevelDatabase], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = databases["resnet-a"]
    want = Measurer(database).slope(mixture(database))
    monkeypatch.setattr("autocompress.relaxed.CACHE_BYTES", 1000)
    assert Measurer(database).slope(mixture(database))["gradient"] == want["gradient"]

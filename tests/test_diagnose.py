"""Diagnoses: exemplars, classes, layers, sites and methods say what is so, and a job keeps them."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from autocompress import pipeline
from autocompress.costs import CostModel
from autocompress.database import LevelDatabase
from autocompress.diagnose import (
    Answers,
    answers,
    class_changes,
    contributions,
    exemplars,
    layer_errors,
    sensitivity_map,
    without_each,
)
from autocompress.evaluate import ModelEvaluator
from autocompress.fitness import forward
from autocompress.graph import trace
from autocompress.methods.pq import pq_index
from autocompress.models import Models
from autocompress.prepare import Prepared
from autocompress.results import JobResult, Request
from autocompress.space import make_space
from autocompress.tasks import Split, Task
from autocompress.types import Evaluation, Plan, Query
from tests import networks
from tests.test_database import pruned, uniform

TASK = networks.task("resnet-b", n=64)


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> LevelDatabase:
    graph = trace(TASK.model, TASK.example_inputs)
    space = make_space(graph, ("channels", "blocks", "int8", "w4", "sparse"))
    database = LevelDatabase(graph, space, TASK, tmp_path_factory.mktemp("diagnose"))
    database.build()
    return database


@pytest.fixture
def made(database: LevelDatabase) -> Prepared:
    """What a diagnosis reads of a prepared run."""
    costs = CostModel(database.graph, database.space, {})
    parts = {"task": TASK, "graph": database.graph, "space": database.space, "database": database, "costs": costs}
    return cast(Prepared, SimpleNamespace(**parts))


@pytest.fixture
def evaluator(database: LevelDatabase, made: Prepared, tmp_path: Path) -> ModelEvaluator:
    made_by = ModelEvaluator(database, made.costs, ())
    made_by.measurer.build = models(database, tmp_path).deployed
    return made_by


def models(database: LevelDatabase, folder: Path) -> Models:
    return Models(database, folder, None, lambda: forward(database.graph.module, TASK, TASK.search))


def mixed(database: LevelDatabase) -> Plan:
    """Pruned, every layer in 4 bits where it has that level, the first one sparse and rounded."""
    pairs = zip(pruned(database.space), uniform(database.space, "4-bit weights in groups of 32 by GPTQ"), strict=True)
    plan = [max(a, b) for a, b in pairs]
    site = next(i for i, s in enumerate(database.space.sites) if s.name == "layer:layer2.0.conv1")
    labels = [level.label for level in database.space.levels[site]]
    plan[site] = labels.index("50% sparse + 4-bit weights in groups of 32 by GPTQ")
    return tuple(plan)


# ---------------------------------------------------------------- examples


@given(st.integers(1, 4), st.integers(0, 10**6))
@settings(deadline=None, max_examples=40)
def test_exemplars_are_where_most_models_leave_the_original(count: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    n = 30

    def said() -> Answers:
        labels = torch.randint(0, 3, (n,), generator=generator)
        return Answers((labels == targets).double(), labels)

    targets = torch.randint(0, 3, (n,), generator=generator)
    original, compressed = said(), [said() for _ in range(count)]
    changed, right, listed = exemplars(Split(torch.zeros(n, 1), targets), original, compressed)
    assert original.labels is not None and changed is not None
    found = {row.index for row in listed}
    assert len(found) == changed
    for i in range(n):
        votes = [int(a.labels[i]) for a in compressed if a.labels is not None]
        own = votes.count(int(original.labels[i]))
        most = max(votes.count(label) for label in range(3))
        assert i not in found or own <= most
        assert i in found or own == most  # nobody is said more often than what the original says
    for row in listed:
        assert row.agreement * count == pytest.approx(round(row.agreement * count)) and row.compressed != row.original
    if right is not None:
        rows = [(row.target == row.original, row.target == row.compressed) for row in listed]
        assert right == pytest.approx(tuple(sum(column) / len(rows) for column in zip(*rows, strict=True)))


def test_a_model_like_the_original_has_no_exemplars_and_no_change(database: LevelDatabase) -> None:
    one = answers(TASK, database.graph.module, TASK.report)
    assert one.labels is not None and torch.equal(one.scores, (one.labels == TASK.report.targets).double())
    assert exemplars(TASK.report, one, [one, one]) == (0, None, [])
    assert all(row.change == row.relative == 0 and not row.unlike for row in class_changes(TASK, TASK.report, one, one))


def test_a_class_that_is_forgotten_stands_out() -> None:
    targets = torch.arange(400) % 4
    labels = targets.clone()
    original = Answers(torch.ones(400, dtype=torch.float64), targets)
    labels[(targets == 2) & (torch.arange(400) < 240)] = 0
    compressed = Answers((labels == targets).double(), labels)
    split = Split(torch.zeros(400, 1), targets)
    rows = list(class_changes(TASK, split, original, compressed))
    assert rows[0].label == 2 and rows[0].unlike
    assert rows[0].change == pytest.approx(-60.0) and rows[0].relative == pytest.approx(-45.0)
    assert rows[0].half_width == pytest.approx(100 * 1.96 * (0.6 * 0.4 * 100 / 99) ** 0.5 / 10, rel=1e-3)
    assert sum(row.examples for row in rows) == 400
    changed, right, _ = exemplars(split, original, [compressed])
    assert changed == 60 and right == (1.0, 0.0)


def test_one_example_more_or_less_is_no_proof() -> None:
    """A class without any change beside one with a single one: neither is unlike the mean."""
    targets = torch.arange(100) % 2
    labels = targets.clone()
    labels[0] = 1
    scores = torch.ones(100, dtype=torch.float64)
    rows = class_changes(
        TASK,
        Split(torch.zeros(100, 1), targets),
        Answers(scores, targets),
        Answers((labels == targets).double(), labels),
    )
    assert not any(row.unlike for row in rows)


def test_answers_that_are_no_classes_are_compared_by_their_scores() -> None:
    def score(outputs: Tensor, targets: Tensor) -> Tensor:
        return -(outputs - targets).square().mean(1)

    task = replace(TASK, fitness="mse", score=score, report=Split(TASK.report.inputs, torch.zeros(64, 10)))
    one = answers(task, TASK.model, task.report)
    assert one.labels is None
    worse = Answers(one.scores - torch.arange(64) % 8, None)
    changed, right, listed = exemplars(task.report, one, [one, worse])
    assert changed is None and right is None and len(listed) == 56
    assert listed[0].index == 7 and listed[0].drop == pytest.approx(3.5) and listed[0].target is None
    assert not list(class_changes(task, task.report, one, worse))


# ---------------------------------------------------------------- layers, sites, methods


def judged(plan: Plan, fidelity: str = "full") -> Evaluation:
    return Evaluation(plan, cast(Any, fidelity), {"loss": 0.0}, {}, 0.0)


def test_layers_of_the_dense_plan_have_no_error(database: LevelDatabase, made: Prepared, tmp_path: Path) -> None:
    rows = layer_errors(made, models(database, tmp_path), judged(database.space.dense))
    assert [row.name for row in rows] == list(database.graph.layers)
    assert all(row.error < 1e-9 and row.bits is None and row.level == "dense" for row in rows)
    assert [row.pq for row in rows] == [pq_index(database.folded(row.name)[0]) for row in rows]


def test_errors_of_layers_by_hand(database: LevelDatabase, made: Prepared, tmp_path: Path) -> None:
    """One layer rounded: nothing before it errs; its own outputs behind norm and ReLU, by hooks on both models."""
    site = next(i for i, s in enumerate(database.space.sites) if s.name == "layer:layer2.0.conv1")
    labels = [level.label for level in database.space.levels[site]]
    plan = list(database.space.dense)
    plan[site] = labels.index("4-bit weights in groups of 32 by GPTQ")
    rows = {row.name: row for row in layer_errors(made, models(database, tmp_path), judged(tuple(plan)))}
    assert (
        rows["conv1"].error < 1e-9 < rows["layer2.0.conv1"].error < rows["layer2.0.conv1"].error + rows["linear"].error
    )
    assert rows["layer2.0.conv1"].bits == 4.0 and rows["layer2.0.conv1"].level == labels[plan[site]]
    seen: list[Tensor] = []
    x = TASK.inputs(TASK.search)
    for model in (database.graph.module, database.stitch(tuple(plan))):
        handle = model.get_submodule("layer2.0.bn1").register_forward_hook(lambda m, i, out: seen.append(out.relu()))
        with torch.no_grad():
            model(x)
        handle.remove()
    want = float((seen[0] - seen[1]).square().sum() / seen[0].square().sum())
    assert rows["layer2.0.conv1"].error == pytest.approx(want, rel=1e-3)


def test_layers_of_a_pruned_plan_are_compared_where_channels_live(
    database: LevelDatabase, made: Prepared, tmp_path: Path
) -> None:
    plan = pruned(database.space, drop=True)
    rows = layer_errors(made, models(database, tmp_path), judged(plan, "refitted"))
    gone = {name for block in database.graph.blocks if block.name in database.dropped(plan) for name in block.body}
    assert {row.name for row in rows} == {n for n, layer in database.graph.layers.items() if layer.node not in gone}
    assert any(row.width.split("/")[0] != row.width.split("/")[1] for row in rows)
    assert all(math.isfinite(row.error) for row in rows) and rows[-1].error > 0


def test_the_map_is_of_one_site_losses_and_asks_for_no_more_than_its_limit(
    database: LevelDatabase, made: Prepared, evaluator: ModelEvaluator
) -> None:
    space, limit = database.space, 30
    known = evaluator([Query((*space.dense[:i], 1, *space.dense[i + 1 :]), "slice") for i in range(4)])
    before = evaluator.counts["slice"]
    rows = sensitivity_map(made, evaluator, known, limit)
    assert evaluator.counts["slice"] - before <= limit + 1
    assert len(rows) == min(limit + 4, sum(space.n_levels) - len(space.sites))
    assert len({row.site for row in rows}) == min(len(space.sites), limit + 4)
    names = [site.name for site in space.sites]
    dense = evaluator([Query(space.dense, "slice")])[0].values["loss"]
    for row in rows[:: len(rows) // 5]:
        site = names.index(row.site)
        level = [one.label for one in space.levels[site]].index(row.level)
        plan = (*space.dense[:site], level, *space.dense[site + 1 :])
        assert row.loss == pytest.approx(evaluator([Query(plan, "slice")])[0].values["loss"] - dense)


def test_without_each_method_the_others_stay(database: LevelDatabase, made: Prepared) -> None:
    plan, space = mixed(database), database.space
    found = without_each(made, plan)
    assert set(found) == {"channels", "weight_quant", "sparse"}
    kinds = {
        name: {s.kind for s, a, b in zip(space.sites, plan, one, strict=True) if a != b} for name, one in found.items()
    }
    assert kinds["channels"] == {"channels"} and kinds["weight_quant"] == kinds["sparse"] == {"layer"}
    labels = space.describe(found["weight_quant"])
    assert labels["layer:layer2.0.conv1"] == "50% sparse"
    assert space.describe(found["sparse"])["layer:layer2.0.conv1"] == "4-bit weights in groups of 32 by GPTQ"
    assert not without_each(made, space.dense)


@pytest.mark.slow
def test_what_a_method_contributed_is_loss_and_cost(
    database: LevelDatabase, made: Prepared, evaluator: ModelEvaluator
) -> None:
    rows = {row.without: row for row in contributions(made, evaluator, mixed(database))}
    whole = rows.pop("nothing")
    assert whole.sites == 0 and whole.loss is not None
    assert rows["channels"].costs["macs"] > whole.costs["macs"]
    assert rows["weight_quant"].costs["weight_bits"] > whole.costs["weight_bits"]
    assert rows["weight_quant"].costs["macs"] == whole.costs["macs"]
    assert rows["channels"].loss is not None and rows["channels"].loss < whole.loss


# ---------------------------------------------------------------- in a job


@pytest.mark.slow
def test_a_job_keeps_the_diagnosis_of_what_it_hands_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "REFITTED", 2)
    monkeypatch.setattr(pipeline, "RECOVERED", 1)
    task: Task = networks.task("resnet-b", n=64)
    request = Request(
        task="resnet-b", budgets=("macs<=80%",), evaluations=8, recover_steps=2, methods=("channels", "int8")
    )
    stages: list[str] = []
    result = pipeline.compress(request, tmp_path, task=task, progress=lambda tick: stages.append(tick.stage))
    assert JobResult.model_validate_json((tmp_path / "result.json").read_bytes()) == result
    diagnosis = result.diagnosis
    assert diagnosis is not None and diagnosis.plan == result.best and diagnosis.models[0] == result.best
    assert diagnosis.rung == "recovered" and diagnosis.examples == 64
    assert {row.site for row in diagnosis.sensitivity} <= {site.name for site in result.sites}
    assert diagnosis.contributions[0].without == "nothing" and len(diagnosis.contributions) > 1
    assert stages[-1] == "diagnose" and result.seconds["diagnose"] > 0

"""Recovery: never worse by its own measure, the same every time, with every format on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import fx, nn

from autocompress.database import LevelDatabase
from autocompress.deploy import deploy
from autocompress.errors import Cancelled, StoreError, TaskError, UsageError
from autocompress.evaluate import fitness, forward
from autocompress.graph import trace
from autocompress.methods.quantization import PackedWeight
from autocompress.models import Models
from autocompress.recover import Recovery, recover
from autocompress.space import make_space
from autocompress.tasks.base import Task
from autocompress.types import Plan
from tests import networks
from tests.test_database import make, pruned, uniform

SHORT = Recovery(steps=12, batch_size=32, checks=2)


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> LevelDatabase:
    return make("resnet-b", tmp_path_factory.mktemp("resnet-b"))


def judged(database: LevelDatabase, live: fx.GraphModule) -> float:
    task = database.task
    reference = forward(database.graph.module, task, task.search)
    return fitness(task, forward(deploy(live), task, task.search), reference, task.search.targets)


def recovered(database: LevelDatabase, plan: Plan, settings: Recovery = SHORT) -> tuple[fx.GraphModule, fx.GraphModule]:
    live = database.stitch(plan)
    reference = forward(database.graph.module, database.task, database.task.search)
    return live, recover(live, database.graph.module, database.task, settings, reference)


def both(database: LevelDatabase, label: str) -> Plan:
    """Pruned, without its residual branches, and every layer in one format."""
    pairs = zip(pruned(database.space), uniform(database.space, label), database.space.sites, strict=True)
    return tuple(max(a, b, int(site.kind == "block")) for a, b, site in pairs)


@pytest.mark.parametrize("label", ["dense", "int8", "4-bit weights in groups of 32 by GPTQ", "channel rank 50% + int8"])
def test_it_helps_with_every_format_and_keeps_it(database: LevelDatabase, label: str) -> None:
    plan = both(database, label)
    before, after = recovered(database, plan, replace(SHORT, steps=40, learning_rate=0.01))
    assert judged(database, after) < judged(database, before)
    kinds = [
        [
            (p.packed.bits, p.packed.activations)
            for p in deploy(m).modules()
            if isinstance(getattr(p, "packed", None), PackedWeight)
        ]
        for m in (before, after)
    ]
    assert kinds[0] == kinds[1]


@pytest.mark.parametrize("rate", [0.02, 1e3, float("nan")], ids=["sane", "far too high", "nan"])
def test_it_is_never_worse_than_the_start(database: LevelDatabase, rate: float) -> None:
    """Also where training blows up."""
    before, after = recovered(database, pruned(database.space), replace(SHORT, learning_rate=rate))
    assert judged(database, after) <= judged(database, before)


@pytest.mark.slow
def test_it_repeats_and_the_seed_matters(database: LevelDatabase) -> None:
    plan = both(database, "dense")
    first, second, other = (recovered(database, plan, replace(SHORT, seed=seed))[1].state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert any(not torch.equal(first[k], other[k]) for k in first)


def test_the_start_and_the_original_are_left_alone(database: LevelDatabase) -> None:
    live = database.stitch(pruned(database.space))
    start = {k: v.clone() for k, v in live.state_dict().items()}
    dense = {k: v.clone() for k, v in database.graph.module.state_dict().items()}
    reference = forward(database.graph.module, database.task, database.task.search)
    recover(live, database.graph.module, database.task, SHORT, reference)
    assert all(torch.equal(v, start[k]) for k, v in live.state_dict().items())
    assert all(torch.equal(v, dense[k]) for k, v in database.graph.module.state_dict().items())


@pytest.mark.parametrize("kind", ["mse", "loss"])
def test_other_fitnesses_train_too(database: LevelDatabase, kind: str) -> None:
    task = replace(database.task, fitness=kind)  # type: ignore[arg-type]
    live = database.stitch(both(database, "dense"))
    reference = forward(database.graph.module, task, task.search)
    after = recover(live, database.graph.module, task, replace(SHORT, steps=40, learning_rate=0.005), reference)
    values = [
        fitness(task, forward(deploy(m), task, task.search), reference, task.search.targets) for m in (live, after)
    ]
    assert values[1] < values[0]


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_few_steps_are_possible(database: LevelDatabase, steps: int) -> None:
    seen: list[tuple[int, int]] = []
    live = database.stitch(pruned(database.space))
    reference = forward(database.graph.module, database.task, database.task.search)
    settings = replace(SHORT, steps=steps)
    recover(live, database.graph.module, database.task, settings, reference, lambda a, b: seen.append((a, b)))
    assert seen[-1] == (steps, steps)


def test_images_lie_by_rows_while_it_trains(database: LevelDatabase) -> None:
    """Channels-last, the gradient of a strided 1 x 1 convolution corrupts memory in torch 2.13."""
    seen: list[torch.Tensor] = []
    task = replace(database.task, augment=lambda x, _: x.contiguous(memory_format=torch.channels_last))
    live = database.stitch(database.space.dense)
    for part in live.modules():
        if isinstance(part, nn.Conv2d):
            part.register_forward_pre_hook(lambda _, x: seen.append(x[0]) if torch.is_grad_enabled() else None)
    reference = forward(database.graph.module, task, task.search)
    recover(live, database.graph.module, task, replace(SHORT, steps=1), reference)
    assert seen and all(x.stride() == torch.empty(x.shape).stride() for x in seen)


def test_without_training_data_and_when_stopped(database: LevelDatabase) -> None:
    live = database.stitch(database.space.dense)
    reference = forward(database.graph.module, database.task, database.task.search)
    with pytest.raises(TaskError, match="has no training data.*give it a train split"):
        recover(live, database.graph.module, replace(database.task, train=None), SHORT, reference)
    with pytest.raises(Cancelled, match="everything evaluated so far is kept"):
        recover(live, database.graph.module, database.task, SHORT, reference, cancelled=lambda: True)


# ---------------------------------------------------------------- kept models


def models(database: LevelDatabase, folder: Path, recovery: Recovery | None = SHORT) -> Models:
    return Models(
        database, folder, recovery, lambda: forward(database.graph.module, database.task, database.task.search)
    )


@pytest.mark.slow
@pytest.mark.parametrize("label", ["dense", "int8", "channel rank 50% + int8", "4-bit weights in groups of 32 by GPTQ"])
def test_kept_models_come_back_to_the_bit(database: LevelDatabase, tmp_path: Path, label: str) -> None:
    plan, x = both(database, label), database.task.inputs(database.task.search)
    for rung in ("refitted", "recovered"):
        with torch.no_grad():
            made = models(database, tmp_path).deployed(plan, rung)(x)  # type: ignore[arg-type]
            again = models(database, tmp_path).deployed(plan, rung)(x)  # type: ignore[arg-type]
        assert torch.equal(made, again)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_kept_model_has_the_biases_that_refit_added(tmp_path: Path) -> None:
    database = make("densenet", tmp_path / "densenet")  # its convolutions have no bias and no norm behind them
    plan, x = pruned(database.space), database.task.inputs(database.task.search)
    with torch.no_grad():
        made, again = (models(database, tmp_path / "kept").deployed(plan, "refitted")(x) for _ in range(2))
    assert torch.equal(made, again)


def test_a_kept_model_lacks_the_biases_that_refit_gave_to_norms(tmp_path: Path) -> None:
    """Convolutions with biases and norms behind them; only the first is pruned, the last reads a change."""

    def block(n: int) -> list[nn.Module]:
        return [nn.Conv2d(n, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()]

    torch.manual_seed(0)
    like = networks.task("resnet-a", n=64)
    net = nn.Sequential(*block(3), *block(8), *block(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
    task = Task("biased", net, like.calibration, like.search, like.report)
    graph = trace(task.model, task.example_inputs)
    database = LevelDatabase(graph, make_space(graph), task, tmp_path / "database")
    database.build()
    plan = tuple(int(site.name == "channels:0") for site in database.space.sites)
    assert any(plan)
    x = task.inputs(task.search)
    with torch.no_grad():
        made, again = (models(database, tmp_path / "kept").deployed(plan, "refitted")(x) for _ in range(2))
    assert torch.equal(made, again)


def test_a_damaged_model_is_a_sentence_and_no_recovery_is_another(database: LevelDatabase, tmp_path: Path) -> None:
    plan = pruned(database.space)
    models(database, tmp_path).live(plan, "refitted")
    (path,) = tmp_path.iterdir()
    path.write_bytes(b"not a model")
    with pytest.raises(StoreError, match="delete it and run the same command again"):
        models(database, tmp_path).live(plan, "refitted")
    with pytest.raises(UsageError, match="has no recovery"):
        models(database, tmp_path / "other", None).live(plan, "recovered")

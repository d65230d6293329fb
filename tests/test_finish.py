"""The second rung of refit: closer to the original than the first, for every kind of plan."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from autocompress.database import LevelDatabase
from autocompress.deploy import deploy
from autocompress.errors import Cancelled
from autocompress.finish import finish
from autocompress.graph import trace
from autocompress.space import make_space
from autocompress.tasks.base import Task
from autocompress.types import Plan
from tests import networks
from tests.test_database import make, pruned, uniform

NAMES = ("resnet-a", "resnet-b", "mobilenet", "densenet", "squeezenet", "preactivation", "tokens", "nested")


@pytest.fixture(scope="module")
def databases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, LevelDatabase]:
    return {name: make(name, tmp_path_factory.mktemp(name)) for name in networks.BUILDERS}


def errors(database: LevelDatabase, plan: Plan) -> tuple[float, float]:
    """Mean squared error of the logits on the calibration split: stitched, finished (both deployed)."""
    x = database.task.inputs(database.task.calibration)
    with torch.no_grad():
        want = database.graph.module(x)
        return (
            float((deploy(database.stitch(plan))(x) - want).pow(2).mean()),
            float((deploy(finish(database, plan))(x) - want).pow(2).mean()),
        )


@pytest.mark.parametrize("name", NAMES)
def test_a_pruned_net_comes_closer_to_the_original(databases: dict[str, LevelDatabase], name: str) -> None:
    stitched, finished = errors(databases[name], pruned(databases[name].space))
    assert finished < stitched


@pytest.mark.parametrize("name", ["resnet-a", "resnet-b", "mobilenet", "preactivation", "nested"])
def test_dropped_blocks_are_made_good(databases: dict[str, LevelDatabase], name: str) -> None:
    database = databases[name]
    space = database.space
    plan = tuple(int(site.kind == "block") for site in space.sites)
    stitched, finished = errors(database, plan)
    assert finished < stitched


@pytest.mark.parametrize(
    "label", ["int8", "channel rank 50%", "channel rank 25%", "4-bit weights in groups of 32 by GPTQ"]
)
def test_formats_are_kept_and_made_good(databases: dict[str, LevelDatabase], label: str) -> None:
    """All layers in one format, pruned as well: the finished model has the same formats and is closer."""
    database = databases["resnet-b"]
    plan = tuple(max(a, b) for a, b in zip(pruned(database.space), uniform(database.space, label), strict=True))
    before, after = deploy(database.stitch(plan)), deploy(finish(database, plan))
    shapes = [
        (type(a), a.weight.shape, getattr(a, "packed", None) is None) for a in before.modules() if hasattr(a, "weight")
    ]
    assert shapes == [
        (type(a), a.weight.shape, getattr(a, "packed", None) is None) for a in after.modules() if hasattr(a, "weight")
    ]
    stitched, finished = errors(database, plan)
    assert finished < stitched


@pytest.mark.slow
@pytest.mark.parametrize("name", networks.BUILDERS)
def test_anything_mixed_runs_and_is_finite(databases: dict[str, LevelDatabase], name: str) -> None:
    """Random plans over all sites; on the whole they come closer, and none goes astray."""
    database, rng = databases[name], random.Random(2)
    pairs = [errors(database, database.space.sample(rng)) for _ in range(8)]
    assert all(finished < float("inf") for _, finished in pairs)
    assert sum(finished for _, finished in pairs) < 1.1 * sum(stitched for stitched, _ in pairs)


def test_the_dense_plan_is_untouched(databases: dict[str, LevelDatabase]) -> None:
    database = databases["densenet"]
    made = finish(database, database.space.dense)
    for name, tensor in database.stitch(database.space.dense).state_dict().items():
        assert torch.equal(tensor, made.state_dict()[name])


def test_layers_before_the_first_change_keep_their_weights(databases: dict[str, LevelDatabase]) -> None:
    database = databases["resnet-a"]
    space = database.space
    plan = tuple(1 if site.name == "channels:layer3.0.conv1" else 0 for site in space.sites)
    assert any(plan)
    made = finish(database, plan).state_dict()
    old = database.graph.module.state_dict()
    assert torch.equal(made["layer2.0.conv2.weight"], old["layer2.0.conv2.weight"])
    assert made["layer3.0.conv2.weight"].shape != old["layer3.0.conv2.weight"].shape


def test_it_repeats_to_the_bit(tmp_path: Path) -> None:
    first, second = (make("resnet-b", tmp_path / str(i)) for i in range(2))
    plan = first.space.sample(random.Random(7))
    a, b = finish(first, plan).state_dict(), finish(second, plan).state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_it_can_be_stopped(databases: dict[str, LevelDatabase]) -> None:
    database = databases["resnet-b"]
    with pytest.raises(Cancelled, match="everything evaluated so far is kept"):
        finish(database, pruned(database.space), lambda: True)


class _Branches(nn.Module):
    """Two branches run side by side and are added to a changed stream later than the other starts."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(3, 8, 3, 1, 1), nn.Conv2d(8, 8, 3, 1, 1), nn.Conv2d(8, 8, 3, 1, 1)
        self.quant_like = nn.Conv2d(8, 8, 1)  # a user's name that looks like one of ours
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        first = self.a(x)
        second = torch.relu(self.b(x))
        total = first + x
        return self.head(torch.relu(self.quant_like(total + second)).mean((2, 3)))


def test_branches_side_by_side_and_names_like_ours(tmp_path: Path) -> None:
    torch.manual_seed(0)
    like = networks.task("resnet-a", n=64)
    task = Task("branches", _Branches(), like.calibration, like.search, like.report)
    graph = trace(task.model, task.example_inputs)
    database = LevelDatabase(graph, make_space(graph), task, tmp_path)
    database.build()
    stitched, finished = errors(database, pruned(database.space))
    assert finished < stitched
    rng = random.Random(0)
    for _ in range(4):
        assert all(value < float("inf") for value in errors(database, database.space.sample(rng)))

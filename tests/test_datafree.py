"""Pruning without data: moments against sampling, better than leaving out channels, nothing measured."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from autocompress.database import LevelDatabase
from autocompress.deploy import deploy
from autocompress.errors import UsageError
from autocompress.export import export_onnx
from autocompress.finish import finish
from autocompress.graph import Group, trace
from autocompress.methods import UDFC, ChannelPruning
from autocompress.methods.datafree import combination, compensated, moments_of, rectified
from autocompress.space import make_space
from autocompress.tasks import load_task
from autocompress.types import Plan, SearchSpace
from tests import networks


class Sliced(LevelDatabase):
    """Plain data-free pruning: what is removed is lost."""

    def _second_moments(self, group: Group) -> Tensor | None:
        return None


def widths(space: SearchSpace, share: float) -> Plan:
    """The level of each group nearest to a share of its width."""
    return tuple(
        min(range(len(levels)), key=lambda i: abs((levels[i].steps[0].keep if i else site.width) - share * site.width))  # type: ignore[attr-defined]
        if site.kind == "channels"
        else 0
        for site, levels in zip(space.sites, space.levels, strict=True)
    )


@pytest.mark.parametrize("ceiling", [math.inf, 1.0])
def test_rectified_moments_are_those_of_samples(ceiling: float) -> None:
    generator = torch.Generator().manual_seed(0)
    mean, deviation = torch.tensor([0.3, -0.5, 1.0, 0.0]).double(), torch.tensor([1.0, 0.7, 0.5, 0.0]).double()
    root = torch.randn(4, 4, generator=generator).double()
    root = root / root.norm(dim=1, keepdim=True)
    z = mean + deviation * (torch.randn(400_000, 4, generator=generator).double() @ root.T)
    values = z.clamp(0, ceiling)
    found = rectified(mean, deviation, root @ root.T, ceiling)
    torch.testing.assert_close(found, values.T @ values / len(values), rtol=0.1, atol=0.01)


def test_a_channel_that_is_a_mixture_of_others_is_not_missed() -> None:
    """Filters with one that is the sum of two: removed, the reading layer computes the same; without a ReLU exactly."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), nn.Conv2d(6, 4, 3), nn.Flatten())
    with torch.no_grad():
        model[0].weight[5] = 0.7 * model[0].weight[1] - 1.2 * model[0].weight[2]
    graph = trace(model.eval(), networks.images(1))
    (group,) = graph.groups
    layer = graph.layers["1"]
    columns = np.arange(5)

    def moments(group: Group) -> Tensor | None:
        return moments_of(graph, group, lambda n: (graph.module.get_submodule(n).weight, torch.zeros(6)))  # type: ignore[return-value]

    weight = compensated(graph, layer, model[1].weight.detach(), columns, moments)
    x = networks.images(16)
    with torch.no_grad():
        hidden = model[0](x)
        want, got = model[1](hidden), nn.functional.conv2d(hidden[:, :5], weight, model[1].bias)
        sliced = nn.functional.conv2d(hidden[:, :5], model[1].weight[:, :5], model[1].bias)
    assert float((got - want).norm()) < 0.05 * float((sliced - want).norm())
    second = moments(group)
    assert second is not None
    assert torch.equal(combination(second, range(5))[:5], torch.eye(5).double())


@pytest.mark.parametrize(("share", "streams"), [(0.8, False), (0.6, False), (0.8, True)])
def test_better_than_leaving_channels_out(tmp_path: Path, share: float, streams: bool) -> None:
    """On a trained network, channels inside blocks and perhaps those of the streams: divergence from the original's answers."""
    task = load_task("digits")
    graph = trace(task.model, task.example_inputs)
    space = make_space(graph, ("udfc",))
    inside = [f"channels:{group.name}" for group in graph.groups if len(group.producers) == 1]
    plan = tuple(
        level if streams or site.name in inside else 0
        for site, level in zip(space.sites, widths(space, share), strict=True)
    )
    x = task.inputs(task.report.take(400))
    with torch.no_grad():
        want = graph.module(x).log_softmax(1)
        losses = []
        for kind in (LevelDatabase, Sliced):
            database = kind(graph, space, task, tmp_path)
            database.build()
            got = database.stitch(plan)(x).log_softmax(1)
            losses.append(float(nn.functional.kl_div(got, want, log_target=True, reduction="batchmean")))
    assert losses[0] < 0.8 * losses[1], losses


@pytest.mark.parametrize("name", sorted(networks.BUILDERS))
def test_nothing_is_measured_and_every_network_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError("it ran the model on calibration inputs")

    monkeypatch.setattr(LevelDatabase, "_batches", refuse)
    task = networks.task(name, n=16)
    graph = trace(task.model, task.example_inputs)
    space = make_space(graph, ("udfc",))
    database = LevelDatabase(graph, space, task, tmp_path)
    database.build()
    steps = [step for levels in space.levels for level in levels for step in level.steps]
    assert steps and all(isinstance(step, UDFC) and "without data" in step.describe() for step in steps)
    plan = widths(space, 0.5)
    live, x = database.stitch(plan), networks.images(4)
    with torch.no_grad():
        assert torch.isfinite(live(x)).all()
        torch.testing.assert_close(deploy(live)(x), live(x), rtol=1e-3, atol=1e-4 * float(live(x).abs().max()))


def test_with_formats_in_one_plan_and_in_the_file(tmp_path: Path) -> None:
    task = networks.task("resnet-b", n=32)
    graph = trace(task.model, task.example_inputs)
    space = make_space(graph, ("udfc", "w4-nearest", "lowrank"), minimum=100)
    database = LevelDatabase(graph, space, task, tmp_path / "db")
    database.build()
    plan = tuple(
        narrow if site.kind == "channels" else (i % len(levels))
        for i, (site, levels, narrow) in enumerate(zip(space.sites, space.levels, widths(space, 0.75), strict=True))
    )
    model, x = deploy(finish(database, plan)), networks.images(8)
    artifact = export_onnx(model, x, tmp_path / "model.onnx", exporters=["legacy"])
    assert artifact.coverage["w4"]["found"] == artifact.coverage["w4"]["expected"] > 0


def test_it_is_data_or_none_and_the_configs_differ() -> None:
    graph = trace(networks.network("resnet-b"), networks.images(1))
    with pytest.raises(UsageError, match="'channels'.*'udfc'"):
        make_space(graph, ("channels", "udfc"))
    assert UDFC(4, 8).to_json() != ChannelPruning(4, 8).to_json() and UDFC(4, 8) != ChannelPruning(4, 8)

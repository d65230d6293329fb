"""Rounding without data: what norms tell of values, channels restored, and better than plain rounding, pruned or not."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from autocompress.database import LevelDatabase
from autocompress.deploy import deploy, fold_norm
from autocompress.export import export_onnx
from autocompress.graph import trace
from autocompress.methods import LayerContext, UDFCQuant, handler_of
from autocompress.methods.datafree_quant import restored
from autocompress.methods.expected import clipped, expected_values
from autocompress.methods.quantization import pack_weight
from autocompress.space import make_space
from autocompress.tasks import Task, load_task
from tests import networks
from tests.test_database import uniform
from tests.test_datafree import widths
from tests.test_methods import MethodContract

GROUPED = ("4-bit weights in groups of 32", "3-bit weights in groups of 64")
FAMILIES = ("udfc", "w4-udfc", "w3-udfc", "w4-nearest", "w3-nearest")


class TestUDFCQuant(MethodContract):
    configs = (UDFCQuant(4), UDFCQuant(3), UDFCQuant(4, 4), UDFCQuant(3, 32))

    def test_the_integers_are_the_nearest_and_what_is_deployed_is_restored(self) -> None:
        torch.manual_seed(0)
        layer, x = nn.Linear(40, 12), 1.5 + torch.randn(4000, 40) * torch.linspace(0.1, 2, 40)
        with torch.no_grad():
            want = layer(x)
            before, weight = pack_weight(layer.weight, 3), layer.weight.clone()
            context = LayerContext(expected=(x.double().mean(0), x.double().var(0)))
            made = handler_of(UDFCQuant(3)).apply(UDFCQuant(3), layer, context)  # type: ignore[union-attr]
            got = made(x)
            packed = restored(weight, 3, 0, x.double().var(0))
            assert torch.equal(packed.integers, before.integers)
            torch.testing.assert_close(made.weight, packed.dequantize())
            torch.testing.assert_close(got.mean(0), want.mean(0), rtol=1e-3, atol=1e-3)
            a, b = got - got.mean(0), want - want.mean(0)
            torch.testing.assert_close((a * b).sum(0) / b.square().sum(0), torch.ones(12), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("ceiling", [math.inf, 1.0])
def test_clipped_values_are_those_of_samples(ceiling: float) -> None:
    generator = torch.Generator().manual_seed(0)
    mean, deviation = torch.tensor([0.3, -0.5, 1.0, 0.2]).double(), torch.tensor([1.0, 0.7, 0.5, 0.0]).double()
    values = (mean + deviation * torch.randn(200_000, 4, generator=generator).double()).clamp(0, ceiling)
    found = clipped(mean, deviation.square(), ceiling)
    torch.testing.assert_close(found[0], values.mean(0), rtol=0.02, atol=0.005)
    torch.testing.assert_close(found[1], values.var(0), rtol=0.03, atol=0.005)


@pytest.mark.parametrize("name", sorted(networks.BUILDERS))
def test_what_is_known_of_every_network_has_its_channels(name: str) -> None:
    graph = trace(networks.network(name), networks.images(2))

    def folded(layer: str) -> tuple[Tensor, Tensor]:
        part, norm = graph.module.get_submodule(layer), graph.layers[layer].norm
        return fold_norm(part.weight, part.bias, graph.module.get_submodule(norm) if norm else None)  # type: ignore[arg-type]

    found = {key: one for key, one in expected_values(graph, folded).items() if one is not None}
    for key, (mean, variance) in found.items():
        assert len(mean) == len(variance) == len(graph.values[key].ids)
        assert bool(torch.isfinite(mean).all()) and bool((variance >= 0).all())
    assert found or not any(isinstance(part, nn.BatchNorm2d) for part in graph.module.modules())


def losses(task: Task, folder: Path, share: float, n: int) -> dict[str, float]:
    """Divergence from the original's answers, every layer rounded, channels inside blocks pruned without data."""
    graph = trace(task.model, task.example_inputs)
    space = make_space(graph, FAMILIES, minimum=0)
    database = LevelDatabase(graph, space, task, folder)
    database.build()
    inside = {f"channels:{group.name}" for group in graph.groups if len(group.producers) == 1}
    narrow = [
        level if site.name in inside and share < 1 else 0
        for site, level in zip(space.sites, widths(space, share), strict=True)
    ]
    x, found = task.inputs(task.report.take(n)), {}
    with torch.no_grad():
        want = graph.module(x).log_softmax(1)
        for label in (*GROUPED, *(f"{label} without data" for label in GROUPED)):
            plan = tuple(map(max, narrow, uniform(space, label)))
            got = deploy(database.stitch(plan))(x).log_softmax(1)
            found[label] = float(nn.functional.kl_div(got, want, log_target=True, reduction="batchmean"))
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("share", "bound"), [(1.0, 0.5), (0.75, 0.9)], ids=["whole", "pruned without data"])
def test_better_than_rounding_to_nearest_on_digits(tmp_path: Path, share: float, bound: float) -> None:
    found = losses(load_task("digits"), tmp_path, share, 400)
    for label in GROUPED:
        assert found[f"{label} without data"] < bound * found[label], found


@pytest.mark.assets
@pytest.mark.slow
@pytest.mark.parametrize("share", [1.0, 0.75])
def test_better_than_rounding_to_nearest_on_resnet20(tmp_path: Path, share: float) -> None:
    task = load_task("cifar10:resnet20", os.environ["AUTOCOMPRESS_DATA"].split(":"))
    found = losses(task, tmp_path, share, 200)
    for label in GROUPED:
        assert found[f"{label} without data"] < 0.95 * found[label], found


def test_nothing_is_measured_and_the_file_has_the_integers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError("it ran the model on calibration inputs")

    monkeypatch.setattr(LevelDatabase, "_batches", refuse)
    task = networks.task("resnet-b", n=16)
    graph = trace(task.model, task.example_inputs)
    for families in (("w4-udfc",), ("udfc", "w4-udfc")):
        space = make_space(graph, families)
        database = LevelDatabase(graph, space, task, tmp_path / str(len(families)))
        database.build()
        plan = tuple(map(max, widths(space, 0.75), uniform(space, f"{GROUPED[0]} without data")))
        live, x = database.stitch(plan), networks.images(4)
        model = deploy(live)
        with torch.no_grad():
            torch.testing.assert_close(model(x), live(x), rtol=1e-3, atol=1e-4)
    artifact = export_onnx(model, x, tmp_path / "model.onnx", exporters=["legacy"])
    assert artifact.coverage["w4"]["found"] == artifact.coverage["w4"]["expected"] > 0

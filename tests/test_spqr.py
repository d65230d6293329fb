"""Outliers isolated and statistics quantized: storage, what the paper claims in direction, bad input, plans and files."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from autocompress.costs import CostModel
from autocompress.database import LevelDatabase
from autocompress.deploy import deploy
from autocompress.export import export_onnx
from autocompress.finish import finish
from autocompress.graph import trace
from autocompress.methods import LayerContext, SpQR, WeightQuant, handler_of
from autocompress.methods.base import forms_of
from autocompress.methods.gptq import gptq
from autocompress.methods.hessian import Hessian
from autocompress.methods.spqr import SECOND, WeightGroups, isolate
from autocompress.space import make_space
from autocompress.types import Kernel, MethodConfig, Storage
from tests import networks
from tests.test_methods import MethodContract, correlated, gram_of, layers


def case(layer: nn.Module) -> tuple[Tensor, Hessian]:
    weight: Tensor = layer.weight.detach()  # type: ignore[assignment,union-attr]
    return weight.flatten(1).double(), Hessian(gram_of(layer, correlated(layer)), layer.bias is not None)


def trained() -> tuple[nn.Linear, Tensor, Hessian]:
    """A layer as trained nets have them: heavy tails, correlated inputs of different size."""
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(256, 96)
    normal = torch.randn(96, 256, generator=generator)
    layer.weight.data = 0.05 * normal * normal.abs().sqrt()
    x = torch.randn(2000, 256, generator=generator) @ torch.randn(256, 256, generator=generator)
    x *= torch.rand(256, generator=generator) + 0.1
    return layer, layer.weight.detach().double(), Hessian(gram_of(layer, x), True)


def bits(config: MethodConfig, rows: int, n: int) -> float:
    kernel = Kernel("linear", (n,), (rows,))
    return config.store(kernel, Storage(kernel.weights)).total_bits / kernel.weights


class TestSpQR(MethodContract):
    configs = (SpQR(4), SpQR(3), SpQR(2), SpQR(3, 5, 0.0), SpQR(2, 16, 0.1))

    @torch.no_grad()
    def test_the_module_is_what_was_fitted(self, layer: nn.Module) -> None:
        x, config = correlated(layer), SpQR(3, 16, 0.02)
        weight, hessian = case(layer)
        want, form = isolate(weight, config, hessian)
        made = handler_of(config).apply(config, copy.deepcopy(layer), LayerContext(gram_of(layer, x)))  # type: ignore[union-attr]
        torch.testing.assert_close(made.weight.flatten(1), want.float(), rtol=1e-6, atol=1e-7)  # type: ignore[operator,union-attr]
        assert int(form.outliers.sum()) == round(0.02 * weight.numel())
        (kept,) = forms_of(made)
        scaled = made.weight * torch.linspace(-1, 2, len(weight)).reshape(-1, *[1] * (made.weight.ndim - 1))  # type: ignore[operator,union-attr,arg-type]
        assert kept.holds(made.weight) and kept.holds(scaled) and not kept.holds(layer.weight.detach())  # type: ignore[arg-type,operator,union-attr]
        change = (made(x) - layer(x)).transpose(0, 1).flatten(1).double().pow(2).mean(1)
        torch.testing.assert_close(change, hessian.error(weight - want), rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("width", [2, 3])
def test_tiny_groups_err_less_than_rows(width: int) -> None:
    """In the geometric mean over layers: single ones of a dozen rows are a matter of luck."""
    logs = []
    for layer in layers().values():
        weight, hessian = case(layer)
        new, _ = isolate(weight, SpQR(width, 8, 0.0), hessian)  # type: ignore[arg-type]
        rounded = gptq(layer.weight.detach(), width, 0, hessian, grid="full").dequantize().flatten(1).double()  # type: ignore[operator,union-attr]
        errors = [float(hessian.error(weight - w).sum()) for w in (new, rounded)]
        logs.append(math.log(errors[0] / errors[1]))
    assert sum(logs) / len(logs) < math.log(0.85)


def test_at_equal_bits_it_errs_less_than_gptq_and_one_percent_of_outliers_is_felt() -> None:
    layer, weight, hessian = trained()
    config, rounding = SpQR(3, 32), WeightQuant(3, 32, "gptq", "full")
    assert bits(config, *weight.shape) < bits(rounding, *weight.shape) + 0.01
    rounded = gptq(layer.weight.detach(), 3, 32, hessian, grid="full").dequantize().double()
    errors = [float(hessian.error(weight - isolate(weight, c, hessian)[0]).sum()) for c in (config, SpQR(3, 32, 0.0))]
    assert errors[0] < 0.85 * errors[1] and errors[0] < 0.8 * float(hessian.error(weight - rounded).sum())


def test_statistics_are_three_bits_and_codes_are_few() -> None:
    """What ``store`` counts is enough: eight scales and eight zeros for each SECOND groups, 2^bits steps a group."""
    _, weight, hessian = trained()
    new, form = isolate(weight, SpQR(2), hessian)
    for values in (form.scale, form.zero):
        assert all(len(part.unique()) <= 8 for row in values for part in row.split(SECOND))
    codes = new.float() / form.scale.repeat_interleave(16, 1) + form.zero.repeat_interleave(16, 1)
    whole = codes[~form.outliers]
    assert float((whole - whole.round()).abs().max()) < 1e-3
    assert whole.round().min() >= 0 and whole.round().max() <= 3
    # 2 bits, 6 a group of 16, four halves for 16 groups, 1 % of 32 bits, two numbers a row
    assert bits(SpQR(2), 96, 256) == pytest.approx(2 + 6 / 16 + 64 / 256 + 0.32 + 64 / 256, abs=1e-3)


def test_an_outlier_is_what_spoils_its_group() -> None:
    weight = torch.randn(20, 32, generator=torch.Generator().manual_seed(0)).double()
    weight[3, 7], weight[11, 20] = 9.0, -7.0
    _, form = isolate(weight, SpQR(2, 16, 2 / 640), None)
    assert torch.nonzero(form.outliers).tolist() == [[3, 7], [11, 20]]


@pytest.mark.parametrize("kind", ["none", "zero", "nan", "one row", "zero weights", "all outliers", "one input"])
def test_bad_input(kind: str) -> None:
    layer = nn.Linear(1, 4) if kind == "one input" else layers()["linear"]
    if kind == "zero weights":
        nn.init.zeros_(layer.weight)  # type: ignore[arg-type]
    x = correlated(layer, 1 if kind == "one row" else 40)
    gram = gram_of(layer, x) * {"zero": 0.0, "nan": float("nan")}.get(kind, 1.0)
    for config in (SpQR(2), SpQR(4, 7, 1.0 if kind == "all outliers" else 0.1)):
        context = LayerContext(None if kind == "none" else gram)
        made = handler_of(config).apply(config, copy.deepcopy(layer), context)  # type: ignore[union-attr]
        assert torch.isfinite(made(x)).all() and forms_of(made)[0].holds(made.weight.detach())  # type: ignore[operator,union-attr]
        if kind == "all outliers" and config.group == 7:
            torch.testing.assert_close(made.weight, layer.weight, rtol=1e-3, atol=1e-4)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_strides(dtype: torch.dtype) -> None:
    layer = layers()["linear"].to(dtype)
    layer.weight = nn.Parameter(layer.weight.detach().T.contiguous().T)
    gram = gram_of(layer, correlated(layers()["linear"]))
    made = handler_of(SpQR(3)).apply(SpQR(3), layer, LayerContext(gram))  # type: ignore[union-attr]
    assert made.weight.dtype == dtype and torch.isfinite(made.weight).all()  # type: ignore[arg-type,union-attr]


def test_straight_through_and_the_form_after_a_step() -> None:
    layer = handler_of(SpQR(2)).apply(SpQR(2), nn.Linear(24, 6), LayerContext(None))  # type: ignore[union-attr]
    raw = layer.parametrizations["weight"].original  # type: ignore[index,union-attr]
    raw.requires_grad_(True)
    layer(torch.ones(2, 24)).sum().backward()
    assert torch.equal(raw.grad, torch.full((6, 24), 2.0))
    with torch.no_grad():
        raw += 0.1 * torch.randn(6, 24, generator=torch.Generator().manual_seed(0))
    (form,) = forms_of(layer)
    assert isinstance(form, WeightGroups) and form.holds(layer.weight.detach()) and not form.holds(raw.detach())  # type: ignore[operator,union-attr]


@pytest.mark.slow
def test_plans_and_files(tmp_path: Path) -> None:
    """After channels are gone, at both rungs, deployed and in the file."""
    task = networks.task("resnet-a", n=64)
    graph = trace(task.model, task.example_inputs)
    space = make_space(graph, ("channels", "spqr", "billm"))
    database = LevelDatabase(graph, space, task, tmp_path)
    database.build()
    x, counts = networks.images(8), {"spqr": 0, "billm": 0}
    plan = []
    for i, (site, levels) in enumerate(zip(space.sites, space.levels, strict=True)):
        if site.kind == "channels":
            plan.append(1)
            continue
        assert [level.label for level in levels] == ["dense", "SpQR 4 bits", "SpQR 3 bits", "SpQR 2 bits", "two signs"]
        plan.append(4 if i % 3 == 0 else 1)
        counts["billm" if i % 3 == 0 else "spqr"] += 1
    for live in (database.stitch(tuple(plan)), finish(database, tuple(plan))):
        model = deploy(live)
        with torch.no_grad():
            torch.testing.assert_close(model(x), live(x), rtol=1e-3, atol=1e-4 * float(live(x).abs().max()))
    artifact = export_onnx(model, x, tmp_path / "simulated.onnx", exporters=["legacy"])
    assert {family: artifact.coverage[family] for family in counts} == {
        family: {"expected": n, "found": n} for family, n in counts.items()
    }
    row = CostModel(graph, space, {}).in_units(tuple(plan))
    assert row["nonzeros"] == row["params"] and 3 < row["weight_bits"] < 14

"""Tables: k-means against brute force, what the paper claims in direction, bad input, plans and files."""

from __future__ import annotations

import copy
import itertools
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
from autocompress.methods import LayerContext, Lookup, handler_of
from autocompress.methods.base import forms_of
from autocompress.methods.gptq import gptq
from autocompress.methods.hessian import Hessian
from autocompress.methods.lookup import find_outliers, kmeans, nearest, tabulate
from autocompress.methods.quantization import pack_weight
from autocompress.space import make_space
from tests import networks
from tests.test_methods import MethodContract, correlated, gram_of, layers


def case(layer: nn.Module) -> tuple[Tensor, Hessian]:
    weight: Tensor = layer.weight.detach()  # type: ignore[assignment,union-attr]
    return weight.flatten(1).double(), Hessian(gram_of(layer, correlated(layer)), layer.bias is not None)


def felt(hessian: Hessian, change: Tensor) -> float:
    """Error weighted as the tables weigh it."""
    return float((change.square() * hessian.matrix.diagonal()).sum())


class TestLookup(MethodContract):
    configs = (Lookup(4), Lookup(3), Lookup(2), Lookup(3, 0.0, "kmeans"), Lookup(3, 0.05))

    def test_the_papers_order(self, layer: nn.Module) -> None:
        """Weighted tables under plain ones under the uniform grid, outliers lower them, and GPTQ's steps the outputs' error."""
        weight, hessian = case(layer)
        for bits in (3, 2):
            uniform = pack_weight(layer.weight, bits).dequantize().flatten(1).double()  # type: ignore[arg-type,union-attr]
            plain = nearest(kmeans(weight, torch.ones_like(weight), 2**bits), weight)
            made = [tabulate(weight, Lookup(bits, share, "kmeans"), hessian)[0] for share in (0.0, 0.05)]  # type: ignore[arg-type]
            errors = [felt(hessian, weight - w) for w in (*made[::-1], plain, uniform)]
            assert errors == sorted(errors) and errors[0] < 0.9 * errors[1] and errors[1] < 0.6 * errors[3]
            good = [tabulate(weight, Lookup(bits, share), hessian)[0] for share in (0.0, 0.05)]  # type: ignore[arg-type]
            outputs = [float(hessian.error(weight - w).sum()) for w in (good[1], good[0], made[0])]
            assert max(outputs[:2]) < 0.7 * outputs[2]
            rounded = gptq(layer.weight.detach(), bits, 0, hessian).dequantize().flatten(1)  # type: ignore[operator,union-attr]
            # so small a layer may be lucky on an even grid
            assert outputs[0] < 1.4 * float(hessian.error(weight - rounded.double()).sum())

    @torch.no_grad()
    def test_the_module_is_what_was_fitted(self, layer: nn.Module) -> None:
        x, config = correlated(layer), Lookup(3, 0.02)
        weight, hessian = case(layer)
        want, table, outliers = tabulate(weight, config, hessian)
        made = handler_of(config).apply(config, copy.deepcopy(layer), LayerContext(gram_of(layer, x)))  # type: ignore[union-attr]
        torch.testing.assert_close(made.weight.flatten(1), want.float(), rtol=1e-6, atol=0)  # type: ignore[operator,union-attr]
        assert int(outliers.sum()) == round(0.02 * weight.numel()) and table.shape == (len(weight), 8)
        (form,) = forms_of(made)
        scaled = made.weight * torch.linspace(-1, 2, len(weight)).reshape(-1, *[1] * (made.weight.ndim - 1))  # type: ignore[operator,union-attr,arg-type]
        assert form.holds(made.weight) and form.holds(scaled) and not form.holds(layer.weight)  # type: ignore[arg-type]
        change = (made(x) - layer(x)).transpose(0, 1).flatten(1).double().pow(2).mean(1)
        torch.testing.assert_close(change, hessian.error(weight - want), rtol=2e-3, atol=1e-6)


def test_kmeans_is_as_good_as_the_best_split_of_a_row() -> None:
    """Seven weights into three clusters: contiguous in one dimension, so all splits can be tried."""
    generator = torch.Generator().manual_seed(1)
    total = least = 0.0
    for _ in range(20):
        w = torch.randn(1, 7, generator=generator, dtype=torch.float64).sort(dim=1).values
        h = torch.rand(1, 7, generator=generator, dtype=torch.float64) + 0.1

        def cost(parts: list[Tensor], w: Tensor = w, h: Tensor = h) -> float:
            return sum(
                float((h[0, p] * (w[0, p] - (h[0, p] * w[0, p]).sum() / h[0, p].sum()) ** 2).sum()) for p in parts
            )

        splits = [torch.tensor_split(torch.arange(7), cut) for cut in itertools.combinations(range(1, 7), 2)]
        best = min(cost(list(parts)) for parts in splits)
        table = kmeans(w, h, 3)
        found = float((h * (w - nearest(table, w)) ** 2).sum())
        assert best - 1e-12 <= found
        total, least = total + found, least + best
    assert total < 1.3 * least  # Lloyd's rounds end in a local optimum


def test_outliers_are_the_largest_and_those_that_are_felt() -> None:
    weight = torch.tensor([[9.0, 1.0, -8.0, 0.5, 0.6, 7.0, 0.1, 6.0, -5.0, 4.0]] * 9)
    importance = torch.tensor([1.0, 1, 1, 1e6, 1, 1, 1, 1, 1, 1])
    found = find_outliers(weight, importance, 0.1)
    assert int(found.sum()) == 9 and int(found[:, 3].sum()) == 1 and int(found[:, 0].sum()) == 8
    assert not find_outliers(weight, importance, 0.0).any()


@pytest.mark.parametrize("kind", ["none", "zero", "nan", "one row", "zero weights", "few"])
def test_bad_input(kind: str) -> None:
    layer = nn.Linear(3, 4) if kind == "few" else layers()["linear"]
    if kind == "zero weights":
        nn.init.zeros_(layer.weight)  # type: ignore[arg-type]
    x = correlated(layer, 1 if kind == "one row" else 40)
    gram = gram_of(layer, x) * {"zero": 0.0, "nan": float("nan")}.get(kind, 1.0)
    for config in (Lookup(2), Lookup(4, 0.1)):
        context = LayerContext(None if kind == "none" else gram)
        made = handler_of(config).apply(config, copy.deepcopy(layer), context)  # type: ignore[union-attr]
        assert torch.isfinite(made(x)).all()
        if kind == "few" and config.bits == 4:  # three weights in a table of sixteen
            torch.testing.assert_close(made.weight, layer.weight, rtol=1e-3, atol=1e-3)  # type: ignore[arg-type]


def test_straight_through() -> None:
    layer = handler_of(Lookup(2)).apply(Lookup(2), nn.Linear(8, 6), LayerContext(None))  # type: ignore[union-attr]
    raw = layer.parametrizations["weight"].original  # type: ignore[index,union-attr]
    raw.requires_grad_(True)
    layer(torch.ones(2, 8)).sum().backward()
    assert torch.equal(raw.grad, torch.full((6, 8), 2.0))


@pytest.mark.slow
def test_plans_and_files(tmp_path: Path) -> None:
    task = networks.task("resnet-a", n=64)
    graph = trace(task.model, task.example_inputs)
    space = make_space(graph, ("channels", "lut"))
    database = LevelDatabase(graph, space, task, tmp_path)
    database.build()
    labels = [
        level.label for level in next(v for s, v in zip(space.sites, space.levels, strict=True) if s.kind == "layer")
    ]
    assert labels == ["dense", "4-bit tables", "3-bit tables", "2-bit tables"]
    plan = tuple(1 if site.kind == "channels" else 2 for site in space.sites)
    x = networks.images(8)
    for live in (database.stitch(plan), finish(database, plan)):
        model = deploy(live)
        with torch.no_grad():
            torch.testing.assert_close(model(x), live(x), rtol=1e-3, atol=1e-4 * float(live(x).abs().max()))
    artifact = export_onnx(model, x, tmp_path / "lut.onnx", exporters=["legacy"])
    assert artifact.coverage["lookup"] == {"expected": len(graph.layers), "found": len(graph.layers)}
    costs = CostModel(graph, space, {})
    row = costs.in_units(plan)
    assert row["nonzeros"] == row["params"] and 2 < row["weight_bits"] < 10

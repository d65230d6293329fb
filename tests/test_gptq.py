"""Rounding that makes good its errors: to the bit what is exported, better than the nearest step, right behind norms."""

from __future__ import annotations

import copy
import itertools
import math
from pathlib import Path

import onnx
import pytest
import torch
from onnx import TensorProto
from torch import Tensor, nn

from autocompress.costs import CostModel
from autocompress.database import LevelDatabase
from autocompress.deploy import deploy, fold_norm
from autocompress.export import export_onnx
from autocompress.finish import finish
from autocompress.graph import trace
from autocompress.methods import LayerContext, LowRank, Sparse, WeightQuant, handler_of
from autocompress.methods.gptq import gptq
from autocompress.methods.grids import Grid, codes, refitted_scale, searched_scale, weight_scale
from autocompress.methods.hessian import Hessian
from autocompress.methods.quantization import PackedWeight, WeightFakeQuant, pack_weight, quantizer_of
from autocompress.pipeline import compress
from autocompress.results import Request
from autocompress.space import make_space
from tests import networks
from tests.test_methods import MethodContract, correlated, gram_of, layers

BITS = (2, 3, 4, 8)
GRIDS: tuple[Grid, ...] = ("narrow", "full")


def case(layer: nn.Module) -> tuple[Tensor, Hessian]:
    weight: Tensor = layer.weight.detach()  # type: ignore[assignment,union-attr]
    return weight, Hessian(gram_of(layer, correlated(layer)), layer.bias is not None)


def error(hessian: Hessian, weight: Tensor, packed: PackedWeight) -> float:
    return float(hessian.error((weight.double() - packed.dequantize().double()).flatten(1)).sum())


class TestGptq(MethodContract):
    configs = tuple(
        WeightQuant(bits, group, "gptq", grid)  # type: ignore[arg-type]
        for bits, group, grid in itertools.product(BITS, (0, 4), GRIDS)
        if bits < 8 or grid == "narrow"
    )

    @pytest.mark.parametrize("grid", GRIDS)
    @pytest.mark.parametrize("group", [0, 3, 8])
    def test_the_papers_order(self, layer: nn.Module, group: int, grid: Grid) -> None:
        """Output error of GPTQ under that of the nearest step, on the same grid and on the widest."""
        weight, hessian = case(layer)
        for bits in (2, 3, 4):
            found = gptq(weight, bits, group, hessian, grid=grid)
            same = error(hessian, weight, pack_weight(weight, bits, group, scale=found.scale, grid=grid))
            own = error(hessian, weight, pack_weight(weight, bits, group, grid=grid))
            assert error(hessian, weight, found) < 0.9 * min(same, own)
            low, top = codes(bits, grid)
            assert low <= int(found.integers.min()) and int(found.integers.max()) <= top

    @pytest.mark.parametrize("group", [0, 8])
    def test_scales_are_the_best_for_their_integers(self, layer: nn.Module, group: int) -> None:
        """At the optimum of the damped output error no other scale of a row gains anything, unless the row had to stay."""
        weight, hessian = case(layer)
        start = pack_weight(weight, 4, group, grid="full")
        best = refitted_scale(start.integers, start.scale, weight, hessian.matrix, group)

        def damped(scale: Tensor) -> float:
            change = (PackedWeight(start.integers, scale, 4, group).dequantize() - weight).flatten(1).double()
            return float(((change @ hessian.matrix) * change).sum())

        assert damped(best) < damped(start.scale)
        for factor, place in itertools.product((0.99, 1.01), range(best[0].numel())):
            other = best.clone().reshape(len(weight), -1)
            moved = (best != start.scale).reshape(len(weight), -1).any(1)
            assert int(moved.sum()) > len(weight) // 2
            other[moved, place] *= factor
            assert damped(best) <= damped(other.reshape(best.shape)) * (1 + 1e-6)

    @pytest.mark.parametrize("group", [0, 4])
    def test_the_module_keeps_its_integers(self, layer: nn.Module, group: int) -> None:
        """Deployed integers are GPTQ's, to the bit, and the module's weight is what they give."""
        for bits in BITS:
            config = WeightQuant(bits, group, "gptq", "narrow" if bits == 8 else "full")  # type: ignore[arg-type]
            weight, hessian = case(layer)
            want = gptq(weight, bits, group, hessian, grid=config.grid)
            made = handler_of(config).apply(  # type: ignore[union-attr]
                config, copy.deepcopy(layer), LayerContext(gram_of(layer, correlated(layer)))
            )
            quantizer = quantizer_of(made)
            assert quantizer is not None
            packed = quantizer.pack(made.parametrizations["weight"].original, torch.ones(len(weight)))  # type: ignore[index,union-attr]
            assert torch.equal(packed.integers, want.integers) and torch.equal(packed.scale, want.scale)
            assert torch.equal(made.weight.detach(), want.dequantize())  # type: ignore[operator,union-attr]

    @torch.no_grad()
    def test_the_bias_moves_along(self, layer: nn.Module) -> None:
        x, config = correlated(layer), WeightQuant(3, 0, "gptq")
        weight, hessian = case(layer)
        made = handler_of(config).apply(config, copy.deepcopy(layer), LayerContext(gram_of(layer, x)))  # type: ignore[union-attr]
        change = (made(x) - layer(x)).transpose(0, 1).flatten(1).double()
        want = error(hessian, weight, gptq(weight, 3, 0, hessian))
        assert float(change.pow(2).mean(1).sum()) == pytest.approx(want, rel=1e-3)
        assert layer.bias is None or float(change.mean(1).abs().max()) < 1e-3

    def test_masked_weights_stay_zero(self, layer: nn.Module) -> None:
        context = LayerContext(gram_of(layer, correlated(layer)))
        made = copy.deepcopy(layer)
        for step in (Sparse(0.5), WeightQuant(3, 0, "gptq")):
            made = handler_of(step).apply(step, made, context)  # type: ignore[union-attr]
        assert int((made.weight != 0).sum()) <= layer.weight.numel() // 2  # type: ignore[arg-type,operator,union-attr]


@pytest.mark.parametrize("group", [0, 3, 8])
@pytest.mark.parametrize(("bits", "share"), [(2, 0.9), (3, 0.9), (4, 0.95)])
def test_all_codes_are_better_than_all_but_one(bits: int, share: float, group: int) -> None:
    """In the geometric mean over layers: single ones of a dozen rows are a matter of luck."""
    logs = []
    for layer in layers().values():
        weight, hessian = case(layer)
        narrow, full = (error(hessian, weight, gptq(weight, bits, group, hessian, grid=grid)) for grid in GRIDS)
        logs.append(math.log(full / narrow))
    assert sum(logs) / len(logs) < math.log(share)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("bits", BITS)
def test_folding_a_norm_commutes(bits: int, grid: Grid) -> None:
    """GPTQ of the folded weight gives the same weights, and those of the live one come out of deployment, with negative and
    zero factors, too: a sign goes into narrow integers or into full scales."""
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(10, 8, 3, bias=False), nn.BatchNorm2d(8).eval()
    nn.init.normal_(norm.weight)
    nn.init.uniform_(norm.running_var, 0.1, 3.0)
    with torch.no_grad():
        norm.weight[2] = 0.0
    hessian = Hessian(gram_of(conv, correlated(conv)), True)
    live = gptq(conv.weight.detach(), bits, 0, hessian, grid=grid)
    folded, _ = fold_norm(conv.weight, None, norm)
    factor = fold_norm(torch.ones(8), None, norm)[0]
    packed = WeightFakeQuant(bits, scale=live.scale, grid=grid).pack(
        fold_norm(live.dequantize(), None, norm)[0], factor
    )
    sign = factor.sign().reshape(-1, 1, 1, 1)
    assert torch.equal(packed.integers, (live.integers * (sign if grid == "narrow" else sign.abs())).to(torch.int8))
    again = gptq(folded, bits, 0, hessian, grid=grid)
    torch.testing.assert_close(again.dequantize(), packed.dequantize(), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(packed.dequantize(), fold_norm(live.dequantize(), None, norm)[0])


def test_without_statistics_it_is_the_nearest_step_of_a_better_grid() -> None:
    weight = torch.randn(6, 40, generator=torch.Generator().manual_seed(0))
    for bits, group in itertools.product((2, 3, 4), (0, 16)):
        packed = gptq(weight, bits, group)
        assert float((packed.dequantize() - weight).square().sum()) <= float(
            (pack_weight(weight, bits, group).dequantize() - weight).square().sum()
        )
        widest = weight_scale(weight, bits, group)
        scale = searched_scale(weight, bits, group, "narrow")
        assert bool((scale <= widest).all()) and bool((scale >= 0.19 * widest).all())


@pytest.mark.parametrize("kind", ["zero", "nan", "one row", "dead"])
def test_hessians_that_say_little_and_zero_weights(kind: str) -> None:
    layer = layers()["linear"]
    x = correlated(layer, 1 if kind == "one row" else 40)
    if kind == "dead":
        x[:, 3:9] = 0
        layer.weight.data[2] = 0  # type: ignore[union-attr,operator]
    gram = gram_of(layer, x).float() * (0 if kind == "zero" else float("nan") if kind == "nan" else 1)
    for config in (WeightQuant(3, 0, "gptq"), WeightQuant(2, 3, "gptq")):
        made = handler_of(config).apply(config, copy.deepcopy(layer), LayerContext(gram))  # type: ignore[union-attr]
        assert torch.isfinite(made(x)).all() and (kind != "dead" or not bool(made.weight[2].any()))  # type: ignore[index,union-attr]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_strides(dtype: torch.dtype) -> None:
    layer = layers()["linear"].to(dtype)
    layer.weight = nn.Parameter(layer.weight.detach().T.contiguous().T)
    gram = gram_of(layer, correlated(layers()["linear"]))
    config = WeightQuant(4, 8, "gptq")
    made = handler_of(config).apply(config, layer, LayerContext(gram))  # type: ignore[union-attr]
    assert torch.isfinite(made.weight).all()  # type: ignore[arg-type]


def test_both_factors_are_fitted() -> None:
    layer = layers()["conv"]
    x = correlated(layer)
    context = LayerContext(gram_of(layer, x))
    made = handler_of(LowRank(0.5)).apply(LowRank(0.5), layer, context)  # type: ignore[union-attr]
    with torch.no_grad():
        want, errors = made(x), []
        for by in ("gptq", "nearest"):
            step = WeightQuant(3, 0, by)  # type: ignore[arg-type]
            part = handler_of(step).apply(step, copy.deepcopy(made), context)  # type: ignore[union-attr]
            errors.append(float((part(x) - want).pow(2).sum()))
    assert errors[0] < 0.5 * errors[1]


# ---------------------------------------------------------------- in plans


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> LevelDatabase:
    task = networks.task("resnet-a", n=64)
    graph = trace(task.model, task.example_inputs)
    space = make_space(graph, ("channels", "sparse", "w4", "w3", "w2", "w3-nearest"))
    made = LevelDatabase(graph, space, task, tmp_path_factory.mktemp("gptq"))
    made.build()
    return made


def plan_of(database: LevelDatabase, label: str, widths: int = 0) -> tuple[int, ...]:
    return tuple(
        min(widths, len(levels) - 1)
        if site.kind == "channels"
        else next(i for i, level in enumerate(levels) if level.label == label)
        for site, levels in zip(database.space.sites, database.space.levels, strict=True)
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("label", "widths", "bits"),
    [
        ("3-bit weights by GPTQ", 0, 3),
        ("2-bit weights in groups of 64 by GPTQ", 2, 2),
        ("50% sparse + 3-bit weights by GPTQ", 0, 3),
        ("4-bit weights in groups of 32 by GPTQ", 1, 4),
    ],
)
def test_what_is_searched_is_what_is_exported(
    database: LevelDatabase, label: str, widths: int, bits: int, tmp_path: Path
) -> None:
    plan, x = plan_of(database, label, widths), networks.images(8)
    costs = CostModel(database.graph, database.space, {})
    for live in (database.stitch(plan), finish(database, plan)):
        model = deploy(live)
        with torch.no_grad():
            torch.testing.assert_close(model(x), live(x), rtol=1e-3, atol=1e-4 * float(live(x).abs().max()))
        packed = {n: m.packed for n, m in model.named_modules() if isinstance(getattr(m, "packed", None), PackedWeight)}
        assert len(packed) == len(database.graph.layers)
        for name, each in packed.items():
            assert torch.equal(each.dequantize(), model.get_submodule(name).weight)
    path = tmp_path / "model.onnx"
    artifact = export_onnx(model, x, path, exporters=["legacy"], expected={f"w{bits}": len(packed)})
    n = len(packed)
    assert artifact.coverage[f"w{bits}"] == {"expected": n, "found": n}
    assert "sparse" not in label or artifact.coverage["sparse"] == {"expected": n, "found": n}
    stored = {t.name: t for t in onnx.load(path).graph.initializer}
    for name, each in packed.items():
        tensor = stored[f"{name}.weight_int4"]
        assert tensor.data_type == TensorProto.INT4 and len(tensor.raw_data) == -(-each.integers.numel() // 2)
    pure = bits + 32 / 9  # 27 weights in the narrowest row, and a scale
    assert bits * (0.3 if widths else 0.45) < costs.in_units(plan)["weight_bits"] < pure + 1


@pytest.mark.slow
def test_a_search_for_bits_ends_in_a_file(tmp_path: Path) -> None:
    request = Request(
        task="given",
        budgets=("weight_bits<=4.6",),
        methods=("w2", "w3", "w4", "w8"),
        evaluations=12,
        recover_steps=4,
        threads=1,
    )
    result = compress(request, tmp_path, task=networks.task("resnet-b", n=32))
    best = next(p for p in result.points if p.id == result.best)
    assert best.costs["weight_bits"] <= 4.6 and result.original.costs["weight_bits"] == pytest.approx(32)
    assert any(note.startswith("weight_bits<=4.6 was predicted") for note in result.notes)

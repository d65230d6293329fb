"""Sparse weights: counts, exactness against brute force, what papers claim in direction, and bad input."""

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
from autocompress.errors import UnknownName, UnsupportedModel
from autocompress.evaluate import Measurer
from autocompress.export import export_onnx
from autocompress.finish import finish
from autocompress.graph import trace
from autocompress.methods import LayerContext, LowRank, Sparse, handler_of
from autocompress.methods.base import WeightForm, forms_of
from autocompress.methods.hessian import Hessian, by_position, parts_of, sweep
from autocompress.methods.sparsity import By, prune
from autocompress.onnx_cost import file_costs
from autocompress.pipeline import compress
from autocompress.results import Request
from autocompress.space import SPARSE_BY, make_space
from autocompress.types import Budget
from tests import networks
from tests.test_methods import MethodContract, correlated, gram_of, layers

BYS: tuple[By, ...] = ("magnitude", "sparsegpt", "obc", "chita")


def case(layer: nn.Module) -> tuple[Tensor, Hessian, int]:
    """Unfolded weight, the curvature of its output error, and kernel positions."""
    weight = layer.weight.detach()  # type: ignore[union-attr]
    hessian = Hessian(gram_of(layer, correlated(layer)), layer.bias is not None)
    return weight.flatten(1).double(), hessian, weight[0, 0].numel()


class TestSparse(MethodContract):
    configs = (Sparse(0.5), Sparse(0.9, by="obc"), Sparse(0.5, 2, 4), Sparse(0.5, 4, 8, "magnitude"))

    @pytest.mark.parametrize("by", BYS)
    def test_as_many_live_as_the_cost_tables_say(self, layer: nn.Module, by: By) -> None:
        weight, hessian, area = case(layer)
        channels = weight.shape[1] // area
        for config in (Sparse(0.5, by=by), Sparse(0.73, by=by), Sparse(0.9, by=by), Sparse(0.5, 2, 4, by)):
            new, mask = prune(weight, config, hessian, area)
            assert int(mask.sum()) == config.kept(len(weight), channels, area)
            assert not bool(new[~mask].any()) and torch.isfinite(new).all()
            if config.of:  # of four neighbours along the input channels, and of the shorter rest, at most two
                at = mask.reshape(len(mask), channels, area)
                assert all(int(at[:, i : i + 4].sum(1).max()) <= 2 for i in range(0, channels, 4))

    def test_the_papers_order(self, layer: nn.Module) -> None:
        """Output error: OBC under SparseGPT under magnitude at every sparsity, and far under it at 60 % and more."""
        weight, hessian, area = case(layer)
        for sparsity in (0.5, 0.6, 0.7, 0.8):
            errors = [
                float(hessian.error(weight - prune(weight, Sparse(sparsity, by=by), hessian, area)[0]).sum())
                for by in BYS
            ]
            assert errors[2] < errors[1] < errors[0]
            assert sparsity < 0.6 or (errors[1] < 0.8 * errors[0] and errors[2] < 0.35 * errors[0])

    @torch.no_grad()
    def test_the_module_errs_as_the_hessian_says(self, layer: nn.Module) -> None:
        """``H`` and the moved bias against the outputs themselves."""
        x, config = correlated(layer), Sparse(0.6)
        weight, hessian, area = case(layer)
        made = handler_of(config).apply(config, copy.deepcopy(layer), LayerContext(gram_of(layer, x)))  # type: ignore[union-attr]
        difference = (made(x) - layer(x)).transpose(0, 1).flatten(1)
        want = hessian.error(weight - prune(weight, config, hessian, area)[0])
        torch.testing.assert_close(difference.double().pow(2).mean(1), want, rtol=1e-3, atol=1e-6)

    def test_training_leaves_zeros_at_zero(self) -> None:
        layer = handler_of(Sparse(0.5)).apply(Sparse(0.5), nn.Linear(8, 6), LayerContext(None))  # type: ignore[union-attr]
        (form,) = forms_of(layer)
        raw = layer.parametrizations["weight"].original  # type: ignore[index,union-attr]
        raw.requires_grad_(True)
        layer(torch.randn(5, 8)).pow(2).sum().backward()
        with torch.no_grad():
            raw -= 0.1 * raw.grad + 0.3
        assert form.holds(layer.weight.detach()) and not form.holds(raw.detach())  # type: ignore[arg-type]


def test_obc_removes_what_brute_force_removes() -> None:
    """Six weights in a row, each step against all removals with a refit of the others."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(50, 6, generator=generator, dtype=torch.float64) @ torch.randn(
        6, 6, generator=generator, dtype=torch.float64
    )
    gram = nn.functional.pad(x.T @ x / 50, (0, 1, 0, 1))
    hessian = Hessian(gram, False)
    h, w = hessian.matrix, torch.randn(1, 6, generator=generator, dtype=torch.float64)

    def error(live: list[int]) -> float:
        fit = torch.zeros(6, dtype=torch.float64)
        if live:
            fit[live] = torch.linalg.solve(h[live][:, live], (h @ w[0])[live])
        return float((w[0] - fit) @ h @ (w[0] - fit))

    live = list(range(6))
    for left in range(5, 0, -1):
        live = min(([i for i in live if i != p] for p in live), key=error)
        new, mask = prune(w, Sparse(1 - left / 6, by="obc"), hessian)
        assert torch.nonzero(mask[0]).flatten().tolist() == live
        change = w - new
        assert float(((change @ h) * change).sum()) == pytest.approx(error(live), rel=1e-8)


def test_a_sweep_without_rounding_changes_nothing_and_the_last_column_is_free() -> None:
    weight, hessian, _ = case(layers()["linear"])
    root = hessian.inverse_root(torch.arange(weight.shape[1]))
    torch.testing.assert_close(root.T @ root, torch.linalg.inv(hessian.matrix))
    assert torch.equal(sweep(weight, root, lambda column, ahead: ahead[:, 0]), weight)
    one = sweep(weight, root, lambda column, ahead: ahead[:, 0] * (column > 0))  # the first column is removed
    h = hessian.matrix
    best = weight[:, 1:] + torch.linalg.solve(h[1:, 1:], h[1:, :1]).T * weight[:, :1]
    torch.testing.assert_close(one[:, 1:], best)


def test_neighbours_are_channels_at_one_position() -> None:
    assert by_position(3, 2).tolist() == [0, 2, 4, 1, 3, 5]


@torch.no_grad()
def test_a_second_factors_inputs_are_known() -> None:
    layer = layers()["conv"]
    x = correlated(layer)
    made = handler_of(LowRank(0.5)).apply(LowRank(0.5), layer, LayerContext(gram_of(layer, x)))  # type: ignore[union-attr]
    (_, first), (second, known) = parts_of(made, gram_of(layer, x))
    assert first is not None and known is not None
    torch.testing.assert_close(known, gram_of(second, made[0](x)).double(), rtol=1e-3, atol=1e-4)  # type: ignore[index]
    errors = []
    for gram in (gram_of(layer, x), None):
        part = copy.deepcopy(made)
        sparse = handler_of(Sparse(0.5)).apply(Sparse(0.5), part, LayerContext(gram))  # type: ignore[union-attr]
        assert all(len(forms_of(p)) == 1 for p in sparse)  # type: ignore[union-attr]
        errors.append(float((sparse(x) - made(x)).pow(2).sum()))
    assert errors[0] < 0.7 * errors[1]


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize("by", BYS)
@pytest.mark.parametrize("kind", ["zero", "nan", "one row", "dead", "constant"])
def test_hessians_that_say_little_are_no_obstacle(by: By, kind: str) -> None:
    layer = layers()["linear"]
    x = correlated(layer, 1 if kind == "one row" else 40)
    if kind == "dead":
        x[:, 3:9] = 0
    if kind == "constant":
        x[:] = x[:1]
    gram = gram_of(layer, x).float()
    gram = gram * 0 if kind == "zero" else gram * float("nan") if kind == "nan" else gram
    for config in (Sparse(0.6, by=by), Sparse(0.5, 2, 4, by)):
        made = handler_of(config).apply(config, copy.deepcopy(layer), LayerContext(gram))  # type: ignore[union-attr]
        assert torch.isfinite(made(x)).all() and torch.isfinite(made.weight).all()  # type: ignore[arg-type]
        assert int((made.weight != 0).sum()) == config.kept(14, 20)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_strides(dtype: torch.dtype) -> None:
    layer = layers()["linear"].to(dtype)
    layer.weight = nn.Parameter(layer.weight.detach().T.contiguous().T)  # not contiguous
    gram = gram_of(layer, correlated(layers()["linear"]))
    made = handler_of(Sparse(0.5)).apply(Sparse(0.5), layer, LayerContext(gram))  # type: ignore[union-attr]
    assert made.weight.dtype == dtype and int((made.weight == 0).sum()) >= 140  # type: ignore[union-attr]


def test_zero_weights_and_all_gone() -> None:
    layer = nn.Linear(8, 6)
    nn.init.zeros_(layer.weight)
    gram = gram_of(layer, correlated(layer))
    for config in (Sparse(0.5), Sparse(1.0), Sparse(1.0, by="obc"), Sparse(0.0, by="obc")):
        made = handler_of(config).apply(config, copy.deepcopy(layer), LayerContext(gram))  # type: ignore[union-attr]
        assert not bool(made.weight.any())  # type: ignore[operator,union-attr]


def test_depthwise_goes_by_magnitude_and_others_are_refused() -> None:
    layer = nn.Conv2d(8, 8, 3, groups=8)
    want = layer.weight.detach().abs().flatten().topk(36).values.min()
    made = handler_of(Sparse(0.5)).apply(Sparse(0.5), copy.deepcopy(layer), LayerContext(None))  # type: ignore[union-attr]
    assert torch.equal(made.weight, layer.weight * (layer.weight.abs() >= want))  # type: ignore[arg-type]
    with pytest.raises(UnsupportedModel, match="got Sequential"):
        handler_of(Sparse(0.5)).apply(Sparse(0.5), nn.Sequential(nn.ReLU()), LayerContext(None))  # type: ignore[union-attr]


# ---------------------------------------------------------------- in plans


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> LevelDatabase:
    task = networks.task("resnet-a", n=64)
    graph = trace(task.model, task.example_inputs)
    space = make_space(graph, ("channels", "blocks", "lowrank", "sparse"))
    made = LevelDatabase(graph, space, task, tmp_path_factory.mktemp("sparse"))
    made.build()
    return made


def plan_of(database: LevelDatabase, label: str, widths: int = 0) -> tuple[int, ...]:
    space = database.space
    return tuple(
        min(widths, len(levels) - 1)
        if site.kind == "channels"
        else next((i for i, level in enumerate(levels) if level.label == label), 0)
        for site, levels in zip(space.sites, space.levels, strict=True)
    )


@pytest.mark.parametrize(("label", "widths"), [("70% sparse", 0), ("70% sparse", 2), ("2:4 sparse", 1)])
def test_tables_models_and_files_count_the_same(
    database: LevelDatabase, label: str, widths: int, tmp_path: Path
) -> None:
    plan = plan_of(database, label, widths)
    costs = CostModel(database.graph, database.space, {})
    live = database.stitch(plan)
    model, x = deploy(live), networks.images(8)
    with torch.no_grad():
        torch.testing.assert_close(model(x), live(x), rtol=1e-3, atol=1e-4 * float(live(x).abs().max()))
    assert not any(isinstance(part, WeightForm) for part in model.modules())
    predicted = costs.in_units(plan)
    alive = sum(int((p != 0).sum()) for p in model.parameters())
    assert predicted["nonzeros"] == pytest.approx(alive, rel=0.01) and alive <= predicted["nonzeros"]
    assert predicted["nonzeros"] < 0.55 * predicted["params"] if "70" in label else 0.7 * predicted["params"]
    assert predicted["weight_bits"] < 32 * 0.6
    artifact = export_onnx(model, x, tmp_path / "sparse.onnx", exporters=["legacy"])
    n = len(database.graph.layers)
    assert artifact.coverage["sparse"] == {"expected": n, "found": n}
    assert file_costs(artifact.path, ("nonzeros",)) == {"nonzeros": alive}


def test_all_rungs_and_judges_agree(database: LevelDatabase) -> None:
    """Stitched without a model to the bit, finished with zeros in place and nearer to the original."""
    plan = plan_of(database, "80% sparse", 1)
    fast, plain = Measurer(database), Measurer(database, plain=True)
    assert {**fast(plan, "full"), "seconds": 0} == {**plain(plan, "full"), "seconds": 0}
    model = deploy(finish(database, plan))
    found = [form.holds(part.weight.detach()) for part in model.modules() for form in getattr(part, "forms", ())]  # type: ignore[union-attr,operator]
    assert len(found) == len(database.graph.layers) and all(found)
    assert float(fast(plan, "refitted")["loss"] or 0) < float(fast(plan, "full")["loss"] or 0)


def test_levels_of_a_layer_share_what_is_factorized(database: LevelDatabase, monkeypatch: pytest.MonkeyPatch) -> None:
    import autocompress.methods.hessian as module

    database._contexts._kept.clear()
    calls: list[int] = []
    real = module.cholesky
    monkeypatch.setattr(module, "cholesky", lambda h: (calls.append(len(h)), real(h))[1])
    for label in ("50% sparse", "60% sparse", "90% sparse"):
        database.stitch(plan_of(database, label))
    known = sum(database.gram(name) is not None for name in database.graph.layers)
    assert len(calls) == 2 * known


@pytest.mark.slow
def test_a_search_for_nonzeros_ends_in_a_file(tmp_path: Path) -> None:
    request = Request(
        task="given",
        budgets=("nonzeros<=40%",),
        methods=("channels", "sparse"),
        evaluations=12,
        recover_steps=4,
        threads=1,
    )
    result = compress(request, tmp_path, task=networks.task("resnet-b", n=32))
    best = next(p for p in result.points if p.id == result.best)
    assert best.costs["nonzeros"] <= 0.4 * result.original.costs["nonzeros"]
    assert any("sparse" in note and "no smaller and no faster" in note for note in result.notes)
    assert any(note.startswith("nonzeros<=40% holds") for note in result.notes)


def test_budgets_and_families_by_name() -> None:
    assert Budget.parse("nonzeros<=30%").relative and Budget.parse("weight_bits<=2.5").limit == 2.5
    task = networks.task("resnet-b", n=8)
    graph = trace(task.model, task.example_inputs)
    with pytest.raises(UnknownName, match="sparse-obc"):
        make_space(graph, ("sparse-obd",))
    kinds = [make_space(graph, (f,)).levels for f in SPARSE_BY]
    assert all(
        len(a) == len(b) == 8 and a != b for x, y in itertools.pairwise(kinds) for a, b in zip(x, y, strict=True)
    )

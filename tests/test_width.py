"""A decoder's hidden width: one group with its norms and embeddings, exact when cut, really narrower in the file."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from autocompress.costs import CostModel
from autocompress.database import LevelDatabase
from autocompress.deploy import deploy
from autocompress.errors import UsageError
from autocompress.evaluate import Measurer, fitness
from autocompress.export import export_onnx
from autocompress.finish import finish
from autocompress.graph import Graph, prove, rebuild, trace
from autocompress.onnx_cost import file_costs
from autocompress.onnx_file import parity
from autocompress.pipeline import compress
from autocompress.reorder import reordered, slices
from autocompress.results import METHOD_FAMILIES, Importance, Request
from autocompress.slicing import slice_channelwise
from autocompress.space import make_space
from autocompress.tasks import Task, load_task
from autocompress.tasks.decoder import load_decoder
from autocompress.types import Plan
from autocompress.verify import check_model
from tests.language import LENGTH, SMALL, write_folder
from tests.quick import shorten
from tests.test_recover import judged
from tests.test_relaxed import mixture, one_hot
from tests.test_shrink import SHORT, recovered, shapes

FAMILIES = ("width", "channels", "blocks", "lowrank", "w8", "w4")
SITE = "channels:hidden_width"
IDS = torch.arange(3 * LENGTH).reshape(3, LENGTH) % SMALL["vocab_size"]


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    return load_task(f"lm:{write_folder(tmp_path_factory.mktemp('models') / 'tiny', windows=100, steps=150)}")


@pytest.fixture(scope="module")
def graph(task: Task) -> Graph:
    return trace(task.model, task.example_inputs)


@pytest.fixture(scope="module")
def database(task: Task, graph: Graph, tmp_path_factory: pytest.TempPathFactory) -> LevelDatabase:
    found = LevelDatabase(graph, make_space(graph, FAMILIES), task, tmp_path_factory.mktemp("db"))
    found.build()
    return found


def narrowed(database: LevelDatabase, level: int, plan: Plan | None = None) -> Plan:
    sites = [site.name for site in database.space.sites]
    plan = plan or database.space.dense
    return tuple(level if name == SITE else v for name, v in zip(sites, plan, strict=True))


# ---------------------------------------------------------------- the group


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 24), st.integers(0, 2**16), st.sampled_from([1e-6, 1e-2, None]), st.booleans())
def test_a_narrow_rms_norm_is_the_wide_one_with_zeros(n: int, seed: int, eps: float | None, affine: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    norm = nn.RMSNorm(n, eps, affine)
    if affine:
        norm.weight.data = torch.randn(n, generator=generator)
    kept = np.flatnonzero(np.random.default_rng(seed).random(n) < 0.6)
    kept = kept if len(kept) else np.array([0])
    x = torch.randn(5, n, generator=generator) * 10.0 ** torch.randint(-4, 3, (5, 1), generator=generator)
    masked = torch.zeros_like(x)
    masked[:, kept] = x[:, kept]
    with torch.no_grad():
        torch.testing.assert_close(slice_channelwise(norm, kept)(x[:, kept]), norm(masked)[:, kept], rtol=2e-5, atol=0)


@pytest.mark.parametrize("kv_heads", [1, 4])
@pytest.mark.parametrize("tied", [True, False])
def test_a_decoders_stream_is_one_exact_group(tmp_path: Path, kv_heads: int, tied: bool) -> None:
    folder = write_folder(tmp_path, num_key_value_heads=kv_heads, tie_word_embeddings=tied, model_type="qwen2")
    found = trace(load_decoder(folder, LENGTH), IDS, proofs=False)
    group = next(group for group in found.groups if group.carried)
    assert group.name == "hidden_width" and len(group.classes) == SMALL["hidden_size"]
    assert {name.rpartition(".")[2] for name in group.producers} == {"o_proj", "down_proj"}
    readers = {name.rpartition(".")[2] for name in group.consumers}
    assert readers == {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"} | ({"lm_head"} if not tied else set())
    assert len(group.carried) == 6 and "model.embed_tokens" in group.carried
    for seed in range(3):
        assert prove(found, group, IDS, seed) < 1e-5
    assert [g for g in found.groups if g.carried] == [group]


def test_the_proof_sees_a_norm_whose_size_is_left(graph: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weight sliced as it is, without the root of N / n."""
    group = next(group for group in graph.groups if group.carried)
    plain = slice_channelwise

    def wrong(old: nn.Module, index: np.ndarray) -> nn.Module:
        made = plain(old, index)
        if isinstance(made, nn.RMSNorm):
            made.weight = nn.Parameter(old.weight.detach()[torch.from_numpy(index)], requires_grad=False)
        return made

    monkeypatch.setattr("autocompress.graph.slice_channelwise", wrong)
    assert prove(graph, group, IDS) > 1e-2


class _LlamaRMSNorm(nn.Module):
    """As Hugging Face writes it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.rand(width) + 0.5), 1e-5

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.float32)
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)).to(
            x.dtype
        )


class _OwnDecoder(nn.Module):
    """Learned positions, any norm, and a head module that shares the embedding's weight."""

    def __init__(self, norm: type[nn.Module] = _LlamaRMSNorm, width: int = 16) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(20, width), nn.Embedding(LENGTH, width)
        self.register_buffer("order", torch.arange(LENGTH))
        self.norms = nn.ModuleList(norm(width) for _ in range(3))
        self.up = nn.ModuleList(nn.Linear(width, 24) for _ in range(2))
        self.down = nn.ModuleList(nn.Linear(24, width) for _ in range(2))
        self.head = nn.Linear(width, 20, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.places(self.order)
        for norm, up, down in zip(self.norms, self.up, self.down, strict=False):
            x = x + down(F.silu(up(norm(x))))
        return self.head(self.norms[2](x))


def test_positions_norms_of_other_libraries_and_shared_weights_are_followed() -> None:
    torch.manual_seed(0)
    model = _OwnDecoder().eval()
    found = trace(model, IDS % 20)
    group = next(group for group in found.groups if group.carried)
    assert set(group.carried) == {"tokens", "places", "norms.0", "norms.1", "norms.2"}
    assert "head" in group.consumers and len(group.classes) == 16
    keep = found.keep_all()
    keep[group.classes[::2]] = False
    small = rebuild(found, keep)
    assert small.get_submodule("places").weight.shape == (LENGTH, 8) and small.get_submodule(
        "norms.1"
    ).normalized_shape == (8,)
    assert small(IDS % 20).shape == (3, LENGTH, 20)
    assert isinstance(model.norms[0], _LlamaRMSNorm), "the user's model stays as it is"


class _Centred(_LlamaRMSNorm):
    """Called an RMSNorm, and is none."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - x.mean(-1, keepdim=True))


class _CentredRMSNorm(_Centred):
    pass


@pytest.mark.parametrize(
    ("norm", "reason"),
    [(nn.LayerNorm, "normalizes across them, with their mean"), (_CentredRMSNorm, "no rule tells how")],
)
def test_a_norm_that_takes_the_mean_keeps_the_width_with_its_reason(norm: type[nn.Module], reason: str) -> None:
    torch.manual_seed(0)
    found = trace(_OwnDecoder(norm).eval(), IDS % 20)
    assert [group.name for group in found.groups] == ["up.0", "up.1"]
    assert reason in found.refused["down.0"] and "tokens" in found.refused
    with pytest.raises(UsageError, match="find nothing to choose"):
        make_space(found, ("width",))


class _ReadsItsNorm(nn.Module):
    """A constant that belongs to a module with something a channel, and is no embedding's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.head = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 4)
        self.bn.bias.data = torch.arange(8.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.bn(self.conv(x)).mean((2, 3)) + self.bn.bias)


def test_other_constants_stay_what_they_are() -> None:
    torch.manual_seed(0)
    model, x = _ReadsItsNorm().eval(), torch.randn(2, 3, 6, 6)
    found = trace(model, x)
    assert found.groups == () and found.refused["conv"] == "bn.bias is a constant of the model"
    torch.testing.assert_close(rebuild(found, found.keep_all())(x), model(x))


# ---------------------------------------------------------------- the site


def test_the_width_is_a_site_of_its_own_and_only_where_it_is_named(graph: Graph) -> None:
    assert SITE not in {site.name for site in make_space(graph, METHOD_FAMILIES).sites}
    space = make_space(graph, ("width",))
    assert [site.name for site in space.sites] == [SITE] and len(space.sites[0].members) == 20
    assert [level.label for level in space.levels[0]][:3] == ["dense", "keep 28/32", "keep 24/32"]
    with pytest.raises(UsageError, match="'udfc' takes none"):
        make_space(graph, ("width", "udfc"))


def test_the_dense_level_changes_nothing(database: LevelDatabase, task: Task) -> None:
    with torch.no_grad():
        want = task.model(IDS)
        assert torch.equal(deploy(database.stitch(database.space.dense))(IDS), want)
        assert torch.equal(deploy(finish(database, database.space.dense))(IDS), want)


@pytest.mark.parametrize("level", [2, 5])
def test_refits_make_good_what_the_width_loses(database: LevelDatabase, task: Task, level: int) -> None:
    """Cut as it is, stitched, and after the sequential refit with the size that suits the tied head."""
    plan = narrowed(database, level)
    inputs, targets = task.inputs(task.search), task.search.targets
    with torch.no_grad():
        reference = task.model(inputs)
        models = rebuild(database.graph, database.keep(plan)), database.stitch(plan), finish(database, plan)
        cut, stitched, refitted = (fitness(task, model(inputs), reference, targets) for model in models)
    assert cut > stitched > refitted > 0
    embedding = models[2].get_submodule("model.embed_tokens")
    assert embedding.weight.shape == (48, 32 - 4 * level) and models[2].model.embed_tokens.weight is embedding.weight


def test_plans_with_a_width_are_judged_without_models_of_their_own(database: LevelDatabase) -> None:
    """To the bit what whole models answer."""
    fast, plain, rng = Measurer(database), Measurer(database, plain=True), random.Random(0)
    for i in range(4):
        plan = narrowed(database, 1 + i, database.space.sample(rng))
        want, found = ({**m(plan, "slice"), "seconds": 0} for m in (plain, fast))
        assert found == want and want["loss"] is not None


def test_mixtures_of_widths_are_plans_at_corners_and_have_a_gradient(database: LevelDatabase) -> None:
    measurer, rng = Measurer(database), random.Random(1)
    for level in (0, 3):
        plan = database.space.effective(narrowed(database, level, database.space.sample(rng)))
        want = measurer(plan, "slice")["loss"]
        assert measurer.slope(one_hot(database, plan))["loss"] == pytest.approx(want, rel=2e-4, abs=1e-7)
    p, space = mixture(database), database.space
    at = sum(space.n_levels[: [site.name for site in space.sites].index(SITE)])
    slope = np.array(measurer.slope(p)["gradient"])
    for option in (1, 4):
        step = np.zeros_like(p)
        step[at], step[at + option] = -1e-3, 1e-3
        ahead, behind = (measurer.slope(p + sign * step)["loss"] for sign in (1, -1))
        assert slope @ step == pytest.approx((ahead - behind) / 2, rel=0.03, abs=3e-6)


def test_a_width_is_reached_in_stages_and_trained_with_its_head_tied(database: LevelDatabase) -> None:
    plan = narrowed(database, 4)
    start = database.stitch(plan)
    after = recovered(database, start, plan, replace(SHORT, batch_size=16, learning_rate=0.01))
    assert judged(database, after) < judged(database, start)
    assert shapes(after) == shapes(start) and shapes(after)["model.embed_tokens.weight"] == (48, 16)


def test_a_width_is_trained_as_mixtures_of_the_originals_channels(database: LevelDatabase) -> None:
    plan = narrowed(database, 4)
    start, recipe = finish(database, plan), replace(SHORT.recipe, shrink=0, wid=True)
    after = recovered(database, start, plan, replace(SHORT, batch_size=16, learning_rate=0.01, recipe=recipe))
    assert judged(database, after) < judged(database, start) and shapes(after) == shapes(start)


@pytest.mark.parametrize("importance", get_args(Importance))
def test_every_importance_orders_a_width(task: Task, graph: Graph, tmp_path: Path, importance: Importance) -> None:
    database = LevelDatabase(graph, make_space(graph, ("width",), importance), task, tmp_path / "db")
    database.build()
    assert sorted(database._orders["hidden_width"].tolist()) == list(range(32))
    assert database.stitch((4,)).get_submodule("model.norm").normalized_shape == (16,)


# ---------------------------------------------------------------- costs and files


def test_the_file_is_narrower_and_counted_right(
    task: Task, graph: Graph, database: LevelDatabase, tmp_path: Path
) -> None:
    """Every product of the graph that ONNX Runtime runs has the new width; MACs, parameters and bytes are the tables'."""
    plan, examples = narrowed(database, 2), task.inputs(task.calibration.take(3))
    costs, paths = CostModel(graph, database.space, {}), {w: tmp_path / f"{w}.onnx" for w in (32, 24)}
    for each, width in ((database.space.dense, 32), (plan, 24)):
        model = deploy(finish(database, each))
        export_onnx(model, examples, paths[width])
        predicted, found = costs.in_units(each), file_costs(paths[width])
        assert predicted["macs"] == found["macs"]
        assert predicted["params"] == pytest.approx(found["params"], abs=4)
        close = parity(model, paths[width], examples)
        assert max(close.on.relative, close.off.relative) <= close.tolerance
        _check_shapes(paths[width], width)
        run = [(k.kind, k.in_shape, k.out_shape) for k in costs.executed(each) if k.kind in ("norm", "embedding")]
        assert run == [("embedding", (48, LENGTH), (width, LENGTH)), *[("norm", (width, LENGTH), (width, LENGTH))] * 5]
    dense, small = file_costs(paths[32]), file_costs(paths[24])
    # What has the width on one side shrinks with it; attention's own products stay.
    attention = 2 * 2 * LENGTH * LENGTH * 32
    assert small["macs"] - attention == pytest.approx((dense["macs"] - attention) * 24 / 32, rel=1e-6)
    assert small["size_mb"] < 0.9 * dense["size_mb"] and paths[24].stat().st_size < 0.9 * paths[32].stat().st_size


def _check_shapes(path: Path, width: int) -> None:
    """Norms read, and each product with a weight reads or makes, so many channels."""
    graph = onnx.shape_inference.infer_shapes(onnx.load(path)).graph
    shapes_of = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in graph.value_info}
    assert [shapes_of[n.input[0]][-1] for n in graph.node if n.op_type == "Pow"] == [width] * 5
    weights = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    products = [weights[n.input[1]] for n in graph.node if n.op_type in ("MatMul", "Gemm") and n.input[1] in weights]
    assert len(products) == 14 and all(width in dims for dims in products)
    assert [weights[n.input[0]] for n in graph.node if n.op_type == "Gather"] == [[48, width]]


@pytest.mark.slow
def test_a_run_over_widths_ends_in_a_verified_file(task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shorten(monkeypatch, exporter="dynamo")
    request = Request(
        task=task.name,
        budgets=("macs<=60%",),
        methods=("width", "channels", "w8"),
        evaluations=24,
        recover_minutes=0.0,
        threads=1,
    )
    result = compress(request, tmp_path / "out")
    assert result.best is not None
    certificate = json.loads((tmp_path / "out" / "certificate.json").read_text())
    assert certificate["holds"] and check_model(tmp_path / "out" / "model.onnx", [], task=task.name) == []


# ---------------------------------------------------------------- with layers that choose their inputs


def test_another_order_of_the_stream_changes_nothing(task: Task, graph: Graph, tmp_path: Path) -> None:
    """Embeddings, the head tied to them and the norms across the stream move with it."""
    database = LevelDatabase(graph, make_space(graph, ("width", "inputs")), task, tmp_path)
    database.build()
    plan = narrowed(database, 1, tuple(n - 1 for n in database.space.n_levels))
    before = deploy(database.stitch(plan))
    after = reordered(database, plan, before)
    assert slices(after) > slices(before)
    with torch.no_grad():
        torch.testing.assert_close(after(IDS), before(IDS), rtol=1e-4, atol=1e-5)

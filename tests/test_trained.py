"""Trained formats: the same function when they are put in, exact grids and tables when they are taken out, better in between."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from autocompress.database import LevelDatabase
from autocompress.deploy import deploy
from autocompress.fitness import forward
from autocompress.graph import trace
from autocompress.methods import WeightQuant
from autocompress.methods.lookup import WeightLookup
from autocompress.methods.quantization import PackedWeight, WeightFakeQuant, quantizer_of
from autocompress.models import Models
from autocompress.pairing import pair
from autocompress.recipe import Recipe
from autocompress.recover import Recovery, recover
from autocompress.space import make_space
from autocompress.tasks.resnet import ProjectionBlock, ResNet
from autocompress.trained import (
    LearnedBits,
    LearnedGrid,
    SoftTable,
    bits_in,
    learn,
    learned,
    mean_bits,
    settle,
    used_bits,
)
from autocompress.types import Level
from tests import networks
from tests.test_database import uniform
from tests.test_recover import judged

SHORT = Recovery(steps=40, batch_size=32, checks=2, learning_rate=0.01)
NEAREST = "2-bit weights in groups of 64"
FOLLOWING = "2-bit weights in groups of 64 on a narrow grid"
GPTQ = "2-bit weights by GPTQ"


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> LevelDatabase:
    task = networks.taught("resnet", networks.lively(lambda: ResNet(ProjectionBlock, 1, widths=(12, 16, 24))))
    graph = trace(task.model, task.example_inputs)
    families = ("int8", "w8", "w4", "w2", "w2-nearest", "lut", "sparse")
    space = make_space(graph, families)
    follows = Level((WeightQuant(2, 64),))
    levels = tuple(
        (*each, follows) if s.kind == "layer" else each for s, each in zip(space.sites, space.levels, strict=True)
    )
    database = LevelDatabase(graph, replace(space, levels=levels), task, tmp_path_factory.mktemp("trained"))
    database.build()
    return database


def trained(database: LevelDatabase, label: str, words: str) -> tuple[fx.GraphModule, fx.GraphModule]:
    plan, task = uniform(database.space, label), database.task
    assert any(plan)
    live = database.stitch(plan)
    reference = forward(database.graph.module, task, task.search)
    settings = replace(SHORT, recipe=Recipe.parse(words))
    return live, recover(live, database.graph.module, task, settings, reference, pairing=pair(database, plan))


def packed(model: nn.Module) -> list[PackedWeight]:
    return [part.packed for part in model.modules() if isinstance(getattr(part, "packed", None), PackedWeight)]


def conv(bits: int = 4, group: int = 0, scale: bool = True) -> nn.Conv2d:
    torch.manual_seed(0)
    part = nn.Conv2d(6, 8, 3)
    fixed = WeightFakeQuant(bits, group)
    if scale:
        from autocompress.methods.grids import weight_scale

        fixed.scale = weight_scale(part.weight, bits, group)
    parametrize.register_parametrization(part, "weight", fixed)
    return part


# ---------------------------------------------------------------- in and out


@pytest.mark.parametrize("words", ["scales", "bits"])
@pytest.mark.parametrize("group", [0, 4])
@pytest.mark.parametrize("scale", [True, False], ids=["fixed grid", "grid that follows"])
def test_a_trained_grid_begins_as_the_fixed_one(words: str, group: int, scale: bool) -> None:
    part = conv(4, group, scale)
    before = part.weight.detach().clone()
    learn(part, Recipe.parse(words))
    torch.testing.assert_close(part.weight, before, rtol=1e-5, atol=1e-6)
    assert part.weight.requires_grad
    settle(part)
    torch.testing.assert_close(part.weight, before, rtol=1e-5, atol=1e-6)
    step = quantizer_of(part)
    assert type(step) is WeightFakeQuant and step.scale is not None


def test_gradients_of_a_step_are_those_of_lsq() -> None:
    """``round(w / s) - w / s`` inside the grid, ``+-top`` outside, times one over the root of weights times levels."""
    part = nn.Linear(3, 1, bias=False)
    weight = torch.tensor([[0.26, -0.9, 5.0]])
    part.weight = nn.Parameter(weight)
    parametrize.register_parametrization(part, "weight", WeightFakeQuant(3, scale=torch.tensor([0.5])))
    learn(part, Recipe(scales=True))
    step = quantizer_of(part)
    assert isinstance(step, LearnedGrid)
    part.weight.sum().backward()  # type: ignore[no-untyped-call]
    each = (1 - 0.52) + (-2 + 1.8) + 3
    assert float(step.scale.grad) == pytest.approx(each / (3 * 3) ** 0.5, rel=1e-5)  # type: ignore[arg-type]
    raw = part.parametrizations["weight"].original  # type: ignore[index,union-attr]
    assert raw.grad.tolist() == [[1.0, 1.0, 0.0]]  # type: ignore[union-attr]


def test_bits_of_zero_take_a_channel_away_and_are_priced() -> None:
    part = conv(4)
    learn(part, Recipe(bits=0.1))
    ((step, _),) = learned(part)
    assert float(mean_bits(part).detach()) == pytest.approx(4.0)
    step.width.data[:4] = 0.3
    step.width.data[4:] = 2.0
    assert float(mean_bits(part).detach()) == pytest.approx((0.3 + 2.0) / 2)
    mean_bits(part).backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(step.width.grad, torch.full((8,), 1 / 8))
    weight = part.weight.detach().clone()
    assert not weight[:4].any()
    assert all(len(row.unique()) <= 3 for row in weight[4:])
    settle(part)
    assert torch.equal(part.weight, weight)  # the level's grid holds what fewer bits made
    quantizer = quantizer_of(part)
    assert quantizer is not None
    stored = quantizer.pack(part.weight, torch.ones(8))
    assert torch.equal(stored.dequantize(), weight) and used_bits(stored) == pytest.approx(1.0)


def test_what_is_judged_while_bits_are_learned_is_what_is_left(database: LevelDatabase) -> None:
    """Deployed with a trained grid, and deployed after it was taken out: the same integers and scales, folded norms included."""
    live = copy.deepcopy(database.stitch(uniform(database.space, "4-bit weights in groups of 32 by GPTQ")))
    learn(live, Recipe(bits=0.1))
    for step, _ in learned(live):
        step.width.data.uniform_(0.0, 4.0)
        step.reach.data.add_(0.2)
    during = packed(deploy(live))
    settle(live)
    after = packed(deploy(live))
    assert during and len(during) == len(after)
    for a, b in zip(during, after, strict=True):
        assert torch.equal(a.integers, b.integers)
        torch.testing.assert_close(a.scale, b.scale)


# ---------------------------------------------------------------- clusters


def soft(rows: int = 5, n: int = 40, softness: float = 0.1) -> tuple[SoftTable, Tensor]:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(rows, n, generator=generator)
    table = torch.tensor([-1.2, -0.3, 0.4, 1.1]).expand(rows, 4).clone()
    outliers = weight.abs() > 2.2
    return SoftTable(WeightLookup(table, outliers), softness), weight


def test_clusters_are_dkms_fixed_point_step() -> None:
    """``A = softmax(-|w - c| / tau)``, ``c <- A^T w / A^T 1``, ``w' = A c``, outliers aside."""
    step, weight = soft()
    start = step.table.clone()
    made = step(weight.requires_grad_())
    tau = 0.1 * (start[:, -1:] - start[:, :1]) / 3
    inside = (~step.outliers)[:, :, None]
    share = torch.softmax(-(weight[:, :, None] - start[:, None]).abs() / tau[:, :, None], 2) * inside
    table = (share * weight[:, :, None]).sum(1) / share.sum(1)
    torch.testing.assert_close(step.table, table.detach())
    share = torch.softmax(-(weight[:, :, None] - table[:, None]).abs() / tau[:, :, None], 2)
    want = torch.where(step.outliers, weight, (share * table[:, None]).sum(2))
    torch.testing.assert_close(made, want)
    loss = torch.linspace(-1, 1, made.numel()).reshape(made.shape)
    (got,) = torch.autograd.grad((made * loss).sum(), weight)
    (expected,) = torch.autograd.grad((want * loss).sum(), weight)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_shares_are_not_kept_for_the_backward_pass() -> None:
    """What autograd keeps of a soft table is smaller by the number of entries than without recomputation."""

    def kept(recompute: bool) -> int:
        step, weight = soft(16, 400)
        total = 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal total
            total += tensor.nbytes
            return tensor

        weight.requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            made = step(weight) if recompute else step._soft(weight, step.table)[0]
        assert made.requires_grad
        return total

    assert kept(True) < kept(False) / 10


def test_hard_tables_come_out_of_soft_ones() -> None:
    step, weight = soft(softness=0.01)
    part = nn.Linear(40, 5, bias=False)
    part.weight = nn.Parameter(weight)
    parametrize.register_parametrization(part, "weight", step)
    almost = part.weight.detach().clone()
    settle(part)
    (form,) = part.parametrizations["weight"]  # type: ignore[index,misc]
    assert type(form) is WeightLookup and form.holds(part.weight)
    assert float((part.weight.detach() - almost).abs().mean()) < 0.02
    unit = form.table.abs().amax(1, keepdim=True)
    halves = (form.table / unit).half().float() * unit
    torch.testing.assert_close(form.table, halves, rtol=1e-6, atol=0)


# ---------------------------------------------------------------- better for it


@pytest.mark.slow
@pytest.mark.parametrize(
    ("label", "words"),
    [
        ("int8", "scales"),
        ("8-bit weights", "scales"),
        (NEAREST, "scales"),
        (GPTQ, "scales"),
        (GPTQ, "scales,features"),
        ("2-bit tables", "scales"),
        ("2-bit tables", "clusters"),
        ("4-bit weights in groups of 32 by GPTQ", "bits=0.3"),
        ("50% sparse + 2-bit weights by GPTQ", "scales"),
    ],
)
def test_trained_formats_help_and_stay_what_they_are(database: LevelDatabase, label: str, words: str) -> None:
    before, after = trained(database, label, words)
    if words.startswith("bits"):
        assert bits_in(deploy(after)) < bits_in(deploy(before))
        assert judged(database, after) < judged(database, before) + 0.5
    else:
        assert judged(database, after) < judged(database, before)
    assert not any(isinstance(part, LearnedGrid | LearnedBits | SoftTable) for part in after.modules())
    mine, theirs = deploy(before), deploy(after)
    assert [(p.bits, p.group, p.activations) for p in packed(mine)] == [
        (p.bits, p.group, p.activations) for p in packed(theirs)
    ]
    x = database.task.inputs(database.task.report)
    with torch.no_grad():
        torch.testing.assert_close(deploy(after)(x), after(x), rtol=0.05, atol=0.2 if label == "int8" else 1e-3)
    for part in theirs.modules():
        assert all(form.holds(part.weight) for form in getattr(part, "forms", ()))


@pytest.mark.slow
def test_a_teacher_and_training_beat_both_alone(database: LevelDatabase) -> None:
    """2 bits: quantized distillation below training on labels, and that below rounding alone (Polino et al. 2018)."""
    before, taught = trained(database, NEAREST, "logits")
    _, alone = trained(database, NEAREST, "labels,logits=0")
    assert judged(database, taught) < judged(database, alone) <= judged(database, before)


@pytest.mark.slow
def test_trained_steps_beat_steps_that_follow(database: LevelDatabase) -> None:
    """At 2 bits a channel the widest grid has a third of the weights at its ends."""
    _, fixed = trained(database, FOLLOWING, "logits")
    _, steps = trained(database, FOLLOWING, "scales")
    assert judged(database, steps) < judged(database, fixed)


@pytest.mark.slow
def test_a_price_makes_bits_fall(database: LevelDatabase) -> None:
    label, found = "4-bit weights in groups of 32 by GPTQ", {}
    for price in (0.0001, 2.0):
        _, after = trained(database, label, f"bits={price}")
        found[price] = bits_in(deploy(after))
    assert found[2.0] < found[0.0001] <= 4.0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("label", "words"), [(FOLLOWING, "scales"), ("8-bit weights", "bits"), ("2-bit tables", "clusters")]
)
def test_kept_models_have_what_was_trained(database: LevelDatabase, tmp_path: Path, label: str, words: str) -> None:
    """Also where the level's own grid has no steps of its own."""
    plan, task = uniform(database.space, label), database.task
    settings = replace(SHORT, steps=4, recipe=Recipe.parse(words))

    def deployed() -> nn.Module:
        reference = forward(database.graph.module, task, task.search)
        return Models(database, tmp_path, settings, lambda: reference).deployed(plan, "recovered")

    x = task.inputs(task.report)
    with torch.no_grad():
        assert torch.equal(deployed()(x), deployed()(x))
    assert any("recovered" in path.name for path in tmp_path.iterdir())

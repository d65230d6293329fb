"""Weights inherited through compactors: the start is the refit, the end is plain weights, and between them is the original."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn

from autocompress.database import LevelDatabase
from autocompress.deploy import deploy
from autocompress.errors import UsageError
from autocompress.finish import finish
from autocompress.fitness import forward
from autocompress.graph import trace
from autocompress.inherit import Inheritance, uninherited
from autocompress.models import Models
from autocompress.pairing import Pairing, pair
from autocompress.recipe import Recipe
from autocompress.recover import Recovery, recover
from autocompress.space import make_space
from autocompress.tasks import load_task
from autocompress.tasks.resnet import ProjectionBlock, ResNet
from autocompress.types import Plan
from tests import language, networks
from tests.test_database import pruned, uniform
from tests.test_recover import judged
from tests.test_shrink import joined, shapes

SHORT = Recovery(steps=12, batch_size=16, checks=2, recipe=Recipe(wid=True))


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> LevelDatabase:
    task = networks.taught("resnet", networks.lively(lambda: ResNet(ProjectionBlock, 2, widths=(12, 12, 16))), n=64)
    graph = trace(task.model, task.example_inputs)
    database = LevelDatabase(graph, make_space(graph, minimum=256), task, tmp_path_factory.mktemp("inherit"))
    database.build()
    return database


def recovered(database: LevelDatabase, start: fx.GraphModule, plan: Plan, settings: Recovery = SHORT) -> fx.GraphModule:
    reference = forward(database.graph.module, database.task, database.task.search)
    return recover(start, database.graph.module, database.task, settings, reference, pairing=pair(database, plan))


def inherited(database: LevelDatabase, model: nn.Module, plan: Plan) -> Inheritance:
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return Inheritance(model, list(model.parameters()), database, plan)


PLANS: dict[str, Callable[[LevelDatabase], Plan]] = {
    "widths": lambda d: pruned(d.space),
    "widths and blocks": lambda d: pruned(d.space, drop=True),
    "factors in int8": lambda d: joined(pruned(d.space, drop=True), uniform(d.space, "channel rank 50% + int8")),
    "4 bits": lambda d: joined(pruned(d.space), uniform(d.space, "4-bit weights in groups of 32 by GPTQ")),
}


# ---------------------------------------------------------------- the product


@pytest.mark.parametrize("flat", [False, True])
def test_the_merged_student_is_the_compactor_model(tmp_path: Path, flat: bool) -> None:
    """``W2 C relu(R W1 x)`` with compactors as layers of their own, the reading layer behind a map or its flattening."""
    torch.manual_seed(0)
    first, area = nn.Conv2d(3, 8, 3, stride=4, padding=1, bias=False), 4
    second = nn.Linear(8 * area, 5, bias=False) if flat else nn.Conv2d(8, 5, 1, bias=False)
    parts = [first, nn.ReLU(), *([nn.Flatten(), second] if flat else [second, nn.Flatten()])]
    task = networks.taught("small", nn.Sequential(*parts).eval(), n=16)
    graph = trace(task.model, task.example_inputs)
    database = LevelDatabase(graph, make_space(graph, ("channels",)), task, tmp_path)
    database.build()
    plan = pruned(database.space)
    model = database.stitch(plan)
    found, x = inherited(database, model, plan), networks.images(6)
    rows, columns = found.compactors
    assert rows.shape == columns.shape == (int(database.keep(plan)[graph.groups[0].classes].sum()), 8)
    with torch.no_grad():
        for part in (*found.compactors, *found.rests):
            part.copy_(torch.zeros_like(part) if part in set(found.rests) else torch.randn(part.shape))
        found.merge()
        made = torch.einsum("kn,bnhw->bkhw", rows, first(x)).relu()
        want = second(torch.einsum("kn,bkhw->bnhw", columns, made).flatten(*([1] if flat else [1, 1]))).flatten(1)
        biases = [p.bias for p in model.modules() if getattr(p, "bias", None) is not None]
        for bias in biases:
            bias.zero_()
        torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", sorted(networks.BUILDERS))
def test_it_starts_where_the_plan_is_and_ends_in_plain_weights(name: str, tmp_path: Path) -> None:
    """Concatenations, slices, gates, heads and depthwise layers, too."""
    task = networks.task(name, n=16)
    graph = trace(task.model, task.example_inputs)
    database = LevelDatabase(graph, make_space(graph, ("channels", "blocks", "w8"), minimum=64), task, tmp_path)
    database.build()
    plan, x = pruned(database.space), networks.images(4)
    model = database.stitch(plan)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found = inherited(database, model, plan)
    found.merge()
    assert found.layers and found.compactors
    assert [key for key, value in model.state_dict().items() if value.shape != before[key].shape] == []
    with torch.no_grad():
        torch.testing.assert_close(model(x), database.stitch(plan)(x), rtol=1e-4, atol=1e-4)
    keep = database.keep(plan)
    narrow = [layer.name for layer in graph.layers.values() if layer.depthwise and not keep[layer.outputs].all()]
    told = uninherited(database, plan)
    assert bool(told) == bool(narrow) and all(layer in told[0] for layer in narrow)


def test_streams_share_their_compactors(database: LevelDatabase) -> None:
    """All writers of a residual stream have one row compactor, all its readers one column compactor."""
    plan = pruned(database.space)
    found = inherited(database, database.stitch(plan), plan)
    groups = {g.name: g for g in database.graph.groups}
    widest = max(groups.values(), key=lambda g: len(g.producers) + len(g.consumers))
    assert len(widest.producers) > 1 and len(widest.consumers) > 1
    assert len(found.compactors) == 2 * len(groups)
    outer = [{id(side.stream.rows) for side in layer.outer} for layer in found.layers]
    assert sum(len(one) for one in outer) == sum(len(g.producers) for g in groups.values())


def test_column_compactors_leave_a_smaller_rest_than_selection(database: LevelDatabase) -> None:
    plan = pruned(database.space)
    model = finish(database, plan)
    found = inherited(database, model, plan)
    sizes = [float(sum(rest.detach().square().sum() for rest in found.rests))]
    with torch.no_grad():
        for layer in found.layers:
            for side in layer.inner:
                side.stream.columns.copy_(side.stream.rows)
        rests = [layer.raw - layer.product() for layer in found.layers]
    assert sizes[0] < 0.95 * float(sum(rest.square().sum() for rest in rests))


def test_gradients_pass_through_the_product(database: LevelDatabase) -> None:
    """By hand: the model called with the products in its weights' place."""
    plan, x = PLANS["4 bits"](database), database.task.inputs(database.task.search)
    model = finish(database, plan)
    found = inherited(database, model, plan)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    weights = {
        names[id(layer.raw)]: layer.product() + rest for layer, rest in zip(found.layers, found.rests, strict=True)
    }
    want = torch.autograd.grad(torch.func.functional_call(model, weights, x).square().sum(), found.parameters)
    given = list(torch.autograd.grad(model(x).square().sum(), found.weights))
    for mine, hand in zip(found.passed_on(given), want, strict=True):
        assert mine is not None
        torch.testing.assert_close(mine, hand, rtol=1e-3, atol=1e-3 * float(hand.abs().max()))


# ---------------------------------------------------------------- recovered


@pytest.mark.slow
@pytest.mark.parametrize(("name", "rate"), [*((name, 0.01) for name in PLANS), ("widths", 1e3)])
def test_it_is_never_worse_than_the_start_and_has_the_plans_shape(
    database: LevelDatabase, name: str, rate: float
) -> None:
    plan = PLANS[name](database)
    start = database.stitch(plan)
    after = recovered(database, start, plan, replace(SHORT, learning_rate=rate))
    assert judged(database, after) <= judged(database, start)
    assert shapes(after) == shapes(start) and after.state_dict().keys() == start.state_dict().keys()


@pytest.mark.slow
def test_it_helps_repeats_and_leaves_start_and_original_alone(database: LevelDatabase) -> None:
    plan = pruned(database.space)
    start, original = finish(database, plan), database.graph.module
    kept = [{k: v.clone() for k, v in m.state_dict().items()} for m in (start, original)]
    one, two = (recovered(database, start, plan, replace(SHORT, steps=20)) for _ in range(2))
    assert judged(database, one) < judged(database, start)
    state = two.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in one.state_dict().items())
    for model, before in zip((start, original), kept, strict=True):
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.slow
def test_a_plan_that_removes_no_channels_has_nothing_to_inherit(database: LevelDatabase) -> None:
    plan = uniform(database.space, "int8")
    start = database.stitch(plan)
    plain, same = (
        recovered(database, start, plan, replace(SHORT, recipe=Recipe.parse(words))).state_dict()
        for words in ("logits", "wid")
    )
    assert all(torch.equal(plain[k], same[k]) for k in plain) and uninherited(database, plan) == ()


@pytest.mark.slow
@pytest.mark.parametrize("words", ["features,labels,dot", "theseus,scales", "shrink=2", "cram", "bits=0.02"])
def test_it_goes_with_other_words(database: LevelDatabase, words: str) -> None:
    plan = PLANS["4 bits"](database)
    start = database.stitch(plan)
    after = recovered(database, start, plan, replace(SHORT, learning_rate=0.01, recipe=Recipe.parse(f"wid,{words}")))
    if "bits" not in words and "cram" not in words:  # there something else counts, too
        assert judged(database, after) <= judged(database, start)
    assert shapes(after) == shapes(start)


def test_it_needs_to_know_the_plan(database: LevelDatabase) -> None:
    plan, task = pruned(database.space), database.task
    reference = forward(database.graph.module, task, task.search)
    with pytest.raises(UsageError, match="'wid' needs a pairing"):
        recover(database.stitch(plan), database.graph.module, task, SHORT, reference, pairing=Pairing())


def test_factors_are_named(database: LevelDatabase) -> None:
    (told,) = uninherited(database, PLANS["factors in int8"](database))
    assert "layer1.0.conv1" in told and "in factors" in told


@pytest.mark.slow
def test_kept_models_come_back_to_the_bit(database: LevelDatabase, tmp_path: Path) -> None:
    plan, x = PLANS["4 bits"](database), database.task.inputs(database.task.search)
    reference = forward(database.graph.module, database.task, database.task.search)
    made: list[Tensor] = []
    with torch.no_grad():
        for _ in range(2):
            made.append(Models(database, tmp_path, SHORT, lambda: reference).deployed(plan, "recovered")(x))
    assert torch.equal(*made)


@pytest.mark.slow
def test_a_decoder_inherits_heads_and_neurons(tmp_path: Path) -> None:
    task = load_task(f"lm:{language.write_folder(tmp_path / 'lm', windows=100, steps=30)}", (), 0)
    graph = trace(task.model, task.example_inputs)
    database = LevelDatabase(graph, make_space(graph, ("channels", "blocks")), task, tmp_path / "database")
    database.build()
    plan = pruned(database.space, drop=True)
    start = database.stitch(plan)
    after = recovered(database, start, plan, replace(SHORT, learning_rate=0.01))
    assert judged(database, after) < judged(database, start)
    assert shapes(after) == shapes(start)
    assert deploy(after)(task.inputs(task.search.take(1))).isfinite().all()

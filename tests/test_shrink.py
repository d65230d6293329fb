"""Plans reached in stages: every stage is a network of its own, the last one is the plan, and what was trained is not lost."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx

from autocompress.database import LevelDatabase
from autocompress.deploy import deploy
from autocompress.errors import UsageError
from autocompress.finish import finish
from autocompress.fitness import forward
from autocompress.graph import rebuild, trace
from autocompress.methods import LowRank, StaticInt8
from autocompress.models import Models
from autocompress.pairing import Pairing, pair
from autocompress.recipe import Recipe
from autocompress.recover import Recovery, recover
from autocompress.shrink import Descent, narrowed, steps_at
from autocompress.space import make_space
from autocompress.tasks import load_task
from autocompress.tasks.resnet import ProjectionBlock, ResNet
from autocompress.types import Plan
from tests import language, networks
from tests.test_database import pruned, uniform
from tests.test_recover import judged

SHORT = Recovery(steps=8, batch_size=16, checks=2, recipe=Recipe(shrink=2))


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> LevelDatabase:
    task = networks.taught("resnet", networks.lively(lambda: ResNet(ProjectionBlock, 2, widths=(12, 12, 16))), n=64)
    graph = trace(task.model, task.example_inputs)
    database = LevelDatabase(graph, make_space(graph, minimum=256), task, tmp_path_factory.mktemp("shrink"))
    database.build()
    return database


def joined(*plans: Plan) -> Plan:
    return tuple(map(max, *plans))


def recovered(database: LevelDatabase, start: fx.GraphModule, plan: Plan, settings: Recovery = SHORT) -> fx.GraphModule:
    reference = forward(database.graph.module, database.task, database.task.search)
    paired = pair(database, plan)
    return recover(start, database.graph.module, database.task, settings, reference, pairing=paired)


def shapes(model: fx.GraphModule) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in deploy(model).state_dict().items()}


def first(model: fx.GraphModule) -> float:
    """A loss that takes plans in their order."""
    return 0.0


PLANS: dict[str, Callable[[LevelDatabase], Plan]] = {
    "widths": lambda d: pruned(d.space),
    "widths and blocks": lambda d: pruned(d.space, drop=True),
    "ranks": lambda d: uniform(d.space, "channel rank 25%"),
    "all, in int8": lambda d: joined(pruned(d.space, drop=True), uniform(d.space, "channel rank 50% + int8")),
    "4 bits": lambda d: joined(pruned(d.space), uniform(d.space, "4-bit weights in groups of 32 by GPTQ")),
}


# ---------------------------------------------------------------- narrower models


def test_a_narrowed_original_is_the_original_without_these_channels(database: LevelDatabase) -> None:
    """Cut at once or in two parts: what stays is the dense network's."""
    plan, x = pruned(database.space, drop=True), database.task.inputs(database.task.search)
    dense, half = database.space.dense, tuple(level // 2 for level in plan)
    start = database.stitch(dense)
    between = narrowed(database, start, dense, half, {})
    with torch.no_grad():
        want = rebuild(database.graph, database.keep(plan), database.dropped(plan))(x)
        torch.testing.assert_close(narrowed(database, start, dense, plan, {})(x), want, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(narrowed(database, between, half, plan, {})(x), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["mobilenet", "densenet", "preactivation", "chunk", "squeeze-excite", "tokens"])
def test_every_network_can_be_narrowed_in_parts(name: str, tmp_path: Path) -> None:
    """Depthwise layers, norms of their own, gates, concatenations, slices, tokens."""
    task = networks.task(name, n=16)
    graph = trace(task.model, task.example_inputs)
    database = LevelDatabase(graph, make_space(graph, ("channels", "blocks")), task, tmp_path)
    database.build()
    plan, x = pruned(database.space), networks.images(4)
    half = tuple(level // 2 for level in plan)
    model = narrowed(database, database.stitch(database.space.dense), database.space.dense, half, {})
    with torch.no_grad():
        want = rebuild(graph, database.keep(plan))(x)
        torch.testing.assert_close(narrowed(database, model, half, plan, {})(x), want, rtol=1e-4, atol=1e-4)


def test_ranks_fall_and_formats_come_last() -> None:
    steps = (LowRank(0.25), StaticInt8())
    assert steps_at(steps, 0.5) == (LowRank(0.625),)
    assert steps_at(steps, 1.0) == steps
    assert steps_at((StaticInt8(),), 0.9) == ()


# ---------------------------------------------------------------- stages


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANS)
def test_stages_narrow_and_the_last_is_the_plan(database: LevelDatabase, name: str) -> None:
    plan = PLANS[name](database)
    descent, sizes = Descent(database, plan, 4, first), []
    for _ in range(4):
        assert descent.step()
        sizes.append(sum(shape.numel() for shape in shapes(descent.model).values()))
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) > 2
    assert descent.plan == plan
    assert shapes(descent.model) == shapes(database.stitch(plan))


def test_a_stage_is_refitted_towards_the_one_before(database: LevelDatabase) -> None:
    plan, x = pruned(database.space), database.task.inputs(database.task.report)
    descent = Descent(database, plan, 1, first)
    descent.step()
    with torch.no_grad():
        want = database.graph.module(x)
        cut = narrowed(database, database.stitch(database.space.dense), database.space.dense, plan, {})(x)
        torch.testing.assert_close(descent.model(x), finish(database, plan)(x), rtol=1e-3, atol=1e-3)
        assert (descent.model(x) - want).norm() < 0.5 * (cut - want).norm()


def test_blocks_go_one_after_the_other_the_least_needed_first(database: LevelDatabase) -> None:
    """A block that is known by what it costs stays longest, whatever its place."""
    sites = database.space.sites
    plan = tuple(int(site.kind == "block") for site in sites)
    blocks = [i for i, site in enumerate(sites) if site.kind == "block"]
    dear = sites[blocks[0]].name.removeprefix("block:")

    def loss(model: fx.GraphModule) -> float:
        return float(not any(name.startswith(f"{dear}.") for name, _ in model.named_modules()))

    descent, gone = Descent(database, plan, len(blocks), loss), []
    for _ in blocks:
        descent.step()
        gone.append({i for i in blocks if descent.plan[i]})
    assert [len(g) for g in gone] == list(range(1, len(blocks) + 1))
    assert all(a < b for a, b in itertools.pairwise(gone))
    assert blocks[0] not in gone[-2]


# ---------------------------------------------------------------- recovered


@pytest.mark.slow
@pytest.mark.parametrize(("name", "rate"), [("widths", 0.01), ("widths", 1e3), ("ranks", 0.01), ("all, in int8", 0.01)])
def test_it_is_never_worse_than_the_start_and_has_the_plans_shape(
    database: LevelDatabase, name: str, rate: float
) -> None:
    plan = PLANS[name](database)
    start = database.stitch(plan)
    after = recovered(database, start, plan, replace(SHORT, learning_rate=rate))
    assert judged(database, after) <= judged(database, start)
    assert shapes(after) == shapes(start)


@pytest.mark.slow
def test_falling_ranks_end_better_than_a_quarter_at_once(database: LevelDatabase) -> None:
    """Equally many steps from the same refit, plain and in stages."""
    plan = uniform(database.space, "channel rank 25%")
    start, settings = finish(database, plan), replace(SHORT, steps=60, batch_size=32)
    plain, staged = (
        judged(database, recovered(database, start, plan, replace(settings, recipe=Recipe.parse(words))))
        for words in ("logits", "shrink=3")
    )
    assert staged < plain < judged(database, start)


@pytest.mark.slow
def test_it_repeats_counts_its_steps_and_leaves_the_original_alone(database: LevelDatabase) -> None:
    plan, task = pruned(database.space, drop=True), database.task
    start, dense = database.stitch(plan), {k: v.clone() for k, v in database.graph.module.state_dict().items()}
    reference, seen = forward(database.graph.module, task, task.search), list[tuple[int, int]]()
    settings = replace(SHORT, steps=17)

    def once() -> dict[str, Tensor]:
        paired = pair(database, plan)
        told = lambda done, total: seen.append((done, total))  # noqa: E731
        return recover(start, database.graph.module, task, settings, reference, told, pairing=paired).state_dict()

    one, two = once(), once()
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert seen[-1] == (17, 17) and all(a <= b for a, b in seen)
    assert all(torch.equal(v, dense[k]) for k, v in database.graph.module.state_dict().items())


@pytest.mark.slow
def test_a_plan_of_formats_has_no_stages(database: LevelDatabase) -> None:
    plan = uniform(database.space, "int8")
    start = database.stitch(plan)
    plain, staged = (
        recovered(database, start, plan, replace(SHORT, recipe=Recipe.parse(words))).state_dict()
        for words in ("logits", "shrink")
    )
    assert all(torch.equal(plain[k], staged[k]) for k in plain)


@pytest.mark.slow
@pytest.mark.parametrize("words", ["shrink=2,features,labels,dot", "shrink=3,theseus,scales"])
def test_it_goes_with_other_words(database: LevelDatabase, words: str) -> None:
    plan = PLANS["4 bits"](database)
    start = database.stitch(plan)
    after = recovered(database, start, plan, replace(SHORT, learning_rate=0.01, recipe=Recipe.parse(words)))
    assert judged(database, after) <= judged(database, start)


def test_it_needs_to_know_the_plan(database: LevelDatabase) -> None:
    plan, task = pruned(database.space), database.task
    reference = forward(database.graph.module, task, task.search)
    with pytest.raises(UsageError, match="needs a pairing"):
        recover(database.stitch(plan), database.graph.module, task, SHORT, reference, pairing=Pairing())


@pytest.mark.slow
def test_kept_models_come_back_to_the_bit(database: LevelDatabase, tmp_path: Path) -> None:
    plan, x = PLANS["all, in int8"](database), database.task.inputs(database.task.search)
    reference = forward(database.graph.module, database.task, database.task.search)
    with torch.no_grad():
        made, again = (
            Models(database, tmp_path, SHORT, lambda: reference).deployed(plan, "recovered")(x) for _ in range(2)
        )
    assert torch.equal(made, again)


@pytest.mark.slow
def test_a_decoder_loses_heads_neurons_and_blocks_in_stages(tmp_path: Path) -> None:
    """Its embedding stays tied to its head."""
    task = load_task(f"lm:{language.write_folder(tmp_path / 'lm', windows=100, steps=30)}", (), 0)
    graph = trace(task.model, task.example_inputs)
    database = LevelDatabase(graph, make_space(graph, ("channels", "blocks")), task, tmp_path / "database")
    database.build()
    plan = pruned(database.space, drop=True)
    start = database.stitch(plan)
    after = recovered(database, start, plan, replace(SHORT, batch_size=16, learning_rate=0.01))
    assert judged(database, after) < judged(database, start)
    assert shapes(after) == shapes(start)

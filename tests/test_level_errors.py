"""Output errors of levels: against the networks themselves, kept on disk, and worth something to a search."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from autocompress.costs import CostModel
from autocompress.database import LevelDatabase
from autocompress.evaluate import Measurer, ModelEvaluator
from autocompress.graph import trace
from autocompress.level_errors import _lost, level_errors
from autocompress.pairing import tapped
from autocompress.search import CONTROLLERS
from autocompress.space import make_space
from autocompress.tasks import Task
from autocompress.tasks.resnet import PadBlock, ResNet
from autocompress.types import Budget, Query
from tests import networks


def opened(name: str, folder: Path, families: tuple[str, ...] = ("channels", "blocks", "w8")) -> LevelDatabase:
    return built(networks.task(name, n=64), folder, families)


def built(task: Task, folder: Path, families: tuple[str, ...]) -> LevelDatabase:
    graph = trace(task.model, task.example_inputs)
    database = LevelDatabase(graph, make_space(graph, families), task, folder)
    database.build()
    return database


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> LevelDatabase:
    """Two blocks a stage, wide enough to be pruned inside."""
    model = networks.lively(lambda: ResNet(PadBlock, 2, widths=(16, 24, 32)), 0)
    task = networks.taught("two blocks a stage", model, 64)
    return built(task, tmp_path_factory.mktemp("errors"), ("channels", "blocks", "w8"))


def site_of(database: LevelDatabase, name: str) -> int:
    return [site.name for site in database.space.sites].index(name)


def test_errors_are_those_of_the_network(database: LevelDatabase) -> None:
    """A layer behind pruned channels, in the stitched model and the original, times its branch's share of the sum."""
    site, block = site_of(database, "channels:layer1.0.conv1"), database.graph.blocks[0]
    graph, space, task = database.graph, database.space, database.task
    layer = graph.layers["layer1.0.conv2"]
    assert layer.node in block.body
    x = task.inputs(task.calibration)
    with torch.no_grad():
        _, values, _ = tapped(graph.module, [layer.result, block.add])(x)
        want, total = values[layer.result], values[block.add]
        for level, error in enumerate(level_errors(database)[site]):
            plan = (*space.dense[:site], level, *space.dense[site + 1 :])
            got = tapped(database.stitch(plan), [layer.result])(x)[1][layer.result]
            variance = (want - want.mean((0, 2, 3), keepdim=True)).square().sum()
            share = want.square().sum() / total.square().sum()
            assert error == pytest.approx(float((got - want).square().sum() / variance * share), rel=0.15, abs=1e-6)


def test_what_the_stream_loses_counts_whole(database: LevelDatabase) -> None:
    """Also for readers inside a branch: channels of the stream are gone for all that comes after."""
    site, graph, space = site_of(database, "channels:conv1"), database.graph, database.space
    plan = (*space.dense[:site], 1, *space.dense[site + 1 :])
    readers = [graph.layers[n] for n in space.sites[site].members if database.gram(n) is not None]
    errors = [_lost(database, plan, reader) for reader in readers]
    assert sum(e > 0 for e in errors) > 1, "several layers read the stream"
    assert level_errors(database)[site][1] == pytest.approx(sum(errors))


def test_levels_only_add_and_single_layers_have_none(database: LevelDatabase) -> None:
    errors, sites = level_errors(database), database.space.sites
    assert {sites[site].kind for site in errors} == {"channels", "block"}
    for site, row in errors.items():
        assert len(row) == database.space.n_levels[site] and row[0] == 0.0
        assert all(a <= b + 1e-9 for a, b in itertools.pairwise(row)), "widths come from the widest on"
    assert all(row[1] > 0 for site, row in errors.items() if sites[site].kind == "block")


def test_they_are_made_once(database: LevelDatabase, monkeypatch: pytest.MonkeyPatch) -> None:
    first = level_errors(database)
    monkeypatch.setattr("autocompress.level_errors._measured", lambda _: pytest.fail("made again"))
    assert level_errors(database) == first


@pytest.mark.parametrize("name", ["mobilenet", "densenet", "preactivation", "nested"])
def test_networks_of_all_kinds_have_some(name: str, tmp_path: Path) -> None:
    errors = level_errors(opened(name, tmp_path))
    assert errors and all(torch.isfinite(torch.tensor(row)).all() and min(row) >= 0 for row in errors.values())


def test_without_data_only_blocks_are_known(tmp_path: Path) -> None:
    database = opened("resnet-b", tmp_path, ("udfc", "blocks"))
    assert {database.space.sites[site].kind for site in level_errors(database)} == {"block"}


@pytest.mark.parametrize("name", ["auto", "exact", "evolution"])
def test_a_search_begins_better_with_them(database: LevelDatabase, name: str) -> None:
    """The best of the first plans that hold the budget, with errors and without."""
    space, costs = database.space, CostModel(database.graph, database.space, {})
    budgets = [Budget.parse("macs<=60%").absolute(costs.in_units(space.dense))]
    losses = {}
    for errors in (level_errors(database), {}):
        controller = CONTROLLERS[name](space, costs, budgets, 0)
        controller.learn((), errors)
        evaluator = ModelEvaluator(database, costs, budgets, measurer=Measurer(database))
        found = []
        for _ in range(4):
            queries = [q for q in controller.ask(1) if isinstance(q, Query)]
            answers = evaluator(queries)
            controller.tell(answers)
            found += [e for e in answers if e.feasible]
        losses[bool(errors)] = min(e.values["loss"] for e in found)
    assert losses[True] <= losses[False]

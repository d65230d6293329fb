"""The level database: what it stitches, and that a build can be interrupted, damaged and repeated."""

from __future__ import annotations

import itertools
import random
import resource
from pathlib import Path
from typing import get_args

import pytest
import torch
from safetensors.torch import load_file

import autocompress.database as module
from autocompress.costs import CostModel
from autocompress.database import LevelDatabase
from autocompress.deploy import deploy
from autocompress.errors import Cancelled, StoreError
from autocompress.graph import trace
from autocompress.methods.quantization import ActivationQuant, PackedWeight
from autocompress.results import Importance
from autocompress.space import make_space
from autocompress.types import Plan, SearchSpace
from tests import networks


def make(name: str, folder: Path, importance: Importance = "obs", seed: int = 0, build: bool = True) -> LevelDatabase:
    task = networks.task(name, n=64, seed=seed)
    graph = trace(task.model, task.example_inputs)
    database = LevelDatabase(graph, make_space(graph, importance=importance), task, folder)
    if build:
        database.build()
    return database


def uniform(space: SearchSpace, label: str) -> Plan:
    """The level of that label at every layer that offers it."""
    return tuple(
        next((i for i, level in enumerate(levels) if site.kind == "layer" and level.label == label), 0)
        for site, levels in zip(space.sites, space.levels, strict=True)
    )


def pruned(space: SearchSpace, drop: bool = False) -> Plan:
    """The narrowest width of every group, and every second block dropped if asked."""
    return tuple(
        n - 1 if site.kind == "channels" else int(drop and site.kind == "block" and i % 2 == 0)
        for i, (site, n) in enumerate(zip(space.sites, space.n_levels, strict=True))
    )


@pytest.fixture(scope="module")
def databases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, LevelDatabase]:
    return {name: make(name, tmp_path_factory.mktemp(name)) for name in networks.BUILDERS}


@pytest.mark.parametrize("name", networks.BUILDERS)
def test_the_dense_plan_is_the_original(databases: dict[str, LevelDatabase], name: str) -> None:
    database, x = databases[name], networks.images(5)
    with torch.no_grad():
        want = networks.network(name)(x)
        live = database.stitch(database.space.dense)
        torch.testing.assert_close(live(x), want, rtol=0, atol=1e-5)
        torch.testing.assert_close(deploy(live)(x), want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", networks.BUILDERS)
def test_live_and_deployed_compute_the_same(databases: dict[str, LevelDatabase], name: str) -> None:
    """For random plans over all methods; where activations are rounded, a step of rounding may differ."""
    database, rng = databases[name], random.Random(1)
    space, x = database.space, networks.images(16)
    for _ in range(6):
        plan = space.sample(rng)
        live = database.stitch(plan)
        with torch.no_grad():
            want, got = live(x), deploy(live)(x)
        assert torch.isfinite(got).all()
        coarse = any(isinstance(part, ActivationQuant) for part in live.modules())
        scale = float(want.abs().max())
        if coarse:
            assert float((got - want).abs().mean()) < 0.02 * scale, space.describe(plan)
        else:
            torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4 * scale)


@pytest.mark.parametrize("name", networks.BUILDERS)
def test_sites_inside_dropped_blocks_make_no_difference(databases: dict[str, LevelDatabase], name: str) -> None:
    """``effective`` names the same network and is its own effect."""
    database, rng, x = databases[name], random.Random(3), networks.images(5)
    space, costs = database.space, CostModel(database.graph, database.space, {})
    idle = 0
    for _ in range(8):
        plan = space.sample(rng)
        same = space.effective(plan)
        assert space.effective(same) == same
        if same == plan:
            continue
        idle += 1
        assert (costs.cost([plan]) == costs.cost([same]))[:, :2].all()  # MACs, parameters
        with torch.no_grad():
            assert torch.equal(deploy(database.stitch(plan))(x), deploy(database.stitch(same))(x))
    assert bool(idle) == any(site.kind == "block" for site in space.sites)


def test_no_norm_is_left_where_one_belongs_to_a_layer(databases: dict[str, LevelDatabase]) -> None:
    for name in ("resnet-a", "mobilenet"):
        model = deploy(databases[name].stitch(databases[name].space.dense))
        assert not any(isinstance(part, torch.nn.BatchNorm2d) for part in model.modules())


def test_formats_are_on_the_layers_that_asked_for_them(databases: dict[str, LevelDatabase]) -> None:
    database = databases["resnet-b"]
    for label, bits, activations in (
        ("int8", 8, True),
        ("8-bit weights", 8, False),
        ("4-bit weights in groups of 32 by GPTQ", 4, False),
    ):
        model = deploy(database.stitch(uniform(database.space, label)))
        found = [part.packed for part in model.modules() if isinstance(getattr(part, "packed", None), PackedWeight)]
        assert len(found) == len(database.graph.layers)
        assert {(p.bits, p.activations) for p in found} == {(bits, activations)}
        assert any(isinstance(part, ActivationQuant) for part in model.modules()) == activations


def test_biases_of_int8_layers_lie_on_the_integer_grid(databases: dict[str, LevelDatabase]) -> None:
    """bias = int32 * (input scale * weight scale): what an integer kernel can add, so nothing is rounded at export."""
    database = databases["resnet-b"]
    model = deploy(database.stitch(uniform(database.space, "int8")))
    checked = 0
    for node in model.graph.nodes:
        part = model.get_submodule(node.target) if node.op == "call_module" else None
        packed = getattr(part, "packed", None)
        if isinstance(packed, PackedWeight) and part is not None and part.bias is not None:
            grid = model.get_submodule(node.all_input_nodes[0].target)
            assert isinstance(grid, ActivationQuant)
            steps = part.bias.double() / (torch.tensor(grid.scale) * packed.scale).double()  # type: ignore[operator]
            torch.testing.assert_close(steps, steps.round(), rtol=1e-6, atol=1e-3)
            checked += 1
    assert checked == len(database.graph.layers)


def test_kept_channels_are_nested_and_as_many_as_asked(databases: dict[str, LevelDatabase]) -> None:
    database = databases["mobilenet"]
    space = database.space
    for i, site in enumerate(space.sites):
        if site.kind != "channels":
            continue
        sets = []
        for level in range(space.n_levels[i]):
            keep = database.keep(tuple(level if j == i else 0 for j in range(len(space.sites))))
            group = next(g for g in database.graph.groups if f"channels:{g.name}" == site.name)
            sets.append(set(group.classes[keep[group.classes]].tolist()))
            expected = next((s.keep for s in space.levels[i][level].steps), site.width)  # type: ignore[attr-defined]
            assert len(sets[-1]) == expected
            assert keep.sum() == database.graph.n_classes - site.width + expected
        assert all(small <= large for large, small in itertools.pairwise(sets))


def test_stitching_leaves_the_graph_alone_and_repeats(databases: dict[str, LevelDatabase]) -> None:
    database, x = databases["densenet"], networks.images(3)
    before = {k: v.clone() for k, v in database.graph.module.state_dict().items()}
    plans = [database.space.sample(random.Random(i)) for i in range(4)]
    with torch.no_grad():
        first = [database.stitch(plan)(x) for plan in plans]
        again = [database.stitch(plan)(x) for plan in reversed(plans)][::-1]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert all(torch.equal(v, before[k]) for k, v in database.graph.module.state_dict().items())


@pytest.mark.parametrize("importance", get_args(Importance))
def test_orders_are_permutations_and_refit_beats_slicing(importance: Importance, tmp_path: Path) -> None:
    database = make("resnet-b", tmp_path, importance)
    for group in database.graph.groups:
        assert sorted(database._orders[group.name]) == list(range(len(group.classes)))
    plan = pruned(database.space)
    inputs = database.task.inputs(database.task.calibration)
    with torch.no_grad():
        want = database.graph.module(inputs)
        refitted = float((database.stitch(plan)(inputs) - want).pow(2).mean())
        database._grams.clear()  # without Gram matrices only weights tell what is lost
        database._cache.clear()
        guessed = float((database.stitch(plan)(inputs) - want).pow(2).mean())
    assert refitted < guessed


# ---------------------------------------------------------------- on disk


@pytest.mark.slow
def test_an_interrupted_build_goes_on_with_the_next_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_LAYERS", 3)
    database = make("mobilenet", tmp_path, build=False)
    ticks: list[tuple[int, int]] = []
    with pytest.raises(Cancelled, match="the same command continues"):
        database.build(lambda done, total: ticks.append((done, total)), lambda: len(ticks) > 2)
    kept = {path.name: path.stat().st_mtime_ns for path in database.folder.iterdir()}
    assert sorted(kept) == ["gram_000.safetensors", "gram_001.safetensors"]
    measured: list[int] = []
    again = make("mobilenet", tmp_path, build=False)
    original = again._measure_grams
    monkeypatch.setattr(again, "_measure_grams", lambda names: (measured.append(len(names)), original(names))[1])
    again.build()
    total = sum(again._size(name) > 0 for name in again.graph.layers)
    assert sum(measured) == total - 6
    assert all((again.folder / name).stat().st_mtime_ns == stamp for name, stamp in kept.items())
    (again.folder / "gram_001.safetensors").unlink()
    third = make("mobilenet", tmp_path, build=False)
    measured.clear()
    original = third._measure_grams
    monkeypatch.setattr(third, "_measure_grams", lambda names: (measured.append(len(names)), original(names))[1])
    third.build()
    assert measured == [3], "only the missing chunk"
    for name, gram in again._grams.items():
        assert torch.equal(gram, third._grams[name])
    assert not [path for path in third.folder.iterdir() if path.name.startswith(".")]


@pytest.mark.slow
def test_the_folder_is_named_by_model_data_and_settings(tmp_path: Path) -> None:
    base = make("resnet-a", tmp_path, build=False)
    assert make("resnet-a", tmp_path, build=False).folder == base.folder
    assert make("resnet-a", tmp_path, seed=1, build=False).folder != base.folder, "other weights"
    assert make("resnet-b", tmp_path, build=False).folder != base.folder
    task = networks.task("resnet-a", n=65)
    other = LevelDatabase(base.graph, base.space, task, tmp_path)
    assert other.folder != base.folder and other.key != base.key, "other data"
    taylor = make("resnet-a", tmp_path, "taylor", build=False)
    assert taylor.folder == base.folder and taylor.key != base.key, "Gram matrices are shared, orders are not"


def test_a_damaged_file_is_a_sentence(tmp_path: Path) -> None:
    database = make("squeezenet", tmp_path)
    path = database.folder / "gram_000.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(
        StoreError, match=r"gram_000.safetensors cannot be read .*; delete it and run the same command again"
    ):
        make("squeezenet", tmp_path)


def test_a_full_disk_is_a_sentence_and_leaves_nothing_half(tmp_path: Path) -> None:
    database = make("squeezenet", tmp_path, build=False)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))  # no file may grow beyond
    try:
        with pytest.raises(StoreError, match=r"Cannot write .*; free some space"):
            database.build()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(database.folder.iterdir())
    database.build()


def test_grams_are_those_of_the_inputs(tmp_path: Path) -> None:
    database = make("squeezenet", tmp_path)
    gram = load_file(database.folder / "gram_000.safetensors")["features.0"]
    x = database.task.inputs(database.task.calibration)
    assert gram.shape == (28, 28) and float(gram[-1, -1]) == 1.0
    mean = x.mean((0, 2, 3))
    torch.testing.assert_close(gram[[4, 13, 22], -1], mean, rtol=0.2, atol=0.05)  # the kernels' centres


def test_the_cache_keeps_within_its_limit(databases: dict[str, LevelDatabase], monkeypatch: pytest.MonkeyPatch) -> None:
    database = databases["resnet-b"]
    monkeypatch.setattr(module, "CACHE_BYTES", 20_000)
    database._cache.clear()
    database._cache_bytes = 0
    rng = random.Random(5)
    for _ in range(12):
        database.stitch(database.space.sample(rng))
        held = sum(t.nbytes for weights in database._cache.values() for t in weights)
        assert held == database._cache_bytes <= 20_000
    assert database._cache
    monkeypatch.setattr(module, "CACHE_BYTES", 1)
    database._cache.clear()
    database._cache_bytes = 0
    database.stitch(pruned(database.space))
    assert not database._cache and database._cache_bytes == 0

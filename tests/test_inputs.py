"""Layers with input channels of their own: who has a choice, what it costs; and another order of channels changes nothing."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from autocompress.costs import CostModel
from autocompress.database import LevelDatabase
from autocompress.deploy import deploy
from autocompress.errors import UsageError
from autocompress.evaluate import Measurer
from autocompress.export import export_onnx
from autocompress.finish import finish
from autocompress.graph import trace
from autocompress.inherit import uninherited
from autocompress.methods import METHODS, InputChannels
from autocompress.methods.inputs import Select, chosen, readers
from autocompress.models import Models
from autocompress.onnx_file import parity
from autocompress.reorder import Reader, arranged, reordered, slices
from autocompress.shrink import Descent
from autocompress.space import make_space
from autocompress.tasks.resnet import PadBlock, ProjectionBlock, ResNet
from autocompress.types import Kernel, Plan, SearchSpace
from tests import networks

NETWORKS = ("resnet-a", "resnet-b", "densenet", "mobilenet", "preactivation", "squeezenet")
EVERYTHING = ("inputs", "channels", "blocks", "lowrank", "int8", "w4")


def opened(name: str, folder: Path, families: Sequence[str] = ("inputs",), seed: int = 0) -> LevelDatabase:
    task = networks.task(name, n=64, seed=seed)
    graph = trace(task.model, task.example_inputs)
    made = LevelDatabase(graph, make_space(graph, families, minimum=100), task, folder)
    made.build()
    return made


@pytest.fixture(scope="module")
def databases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, LevelDatabase]:
    return {name: opened(name, tmp_path_factory.mktemp(name), EVERYTHING) for name in NETWORKS}


def of_inputs(space: SearchSpace, layers: str = "dense") -> Plan:
    """Every reader at its narrowest, all else dense; ``layers``: the label of their levels."""
    return tuple(
        n - 1
        if site.name.startswith("inputs:")
        else next((i for i, v in enumerate(levels) if site.kind == "layer" and v.label == layers), 0)
        for site, levels, n in zip(space.sites, space.levels, space.n_levels, strict=True)
    )


def wide_resnet(
    folder: Path, block: type[nn.Module], widths: tuple[int, ...], families: Sequence[str]
) -> LevelDatabase:
    task = networks.taught("wide", networks.lively(lambda: ResNet(block, 2, widths=widths)), n=64)  # type: ignore[arg-type]
    graph = trace(task.model, task.example_inputs)
    made = LevelDatabase(graph, make_space(graph, families, minimum=256), task, folder)
    made.build()
    return made


# ---------------------------------------------------------------- who has a choice, and which


def test_only_readers_of_shared_channels_have_a_choice(databases: dict[str, LevelDatabase]) -> None:
    found = set(readers(databases["resnet-b"].graph))
    assert "layer1.0.conv1" in found and "layer3.0.shortcut.0" in found
    assert not [name for name in found if name.endswith("conv2")], "the channels inside a block have one reader"
    graph = databases["mobilenet"].graph
    assert not [name for name in readers(graph) if graph.layers[name].depthwise]


def test_levels_are_widths_that_pay(databases: dict[str, LevelDatabase]) -> None:
    for database in databases.values():
        sites = [
            (s, v) for s, v in zip(database.space.sites, database.space.levels, strict=True) if s.name[:7] == "inputs:"
        ]
        for site, levels in sites:
            steps = [step for level in levels for step in level.steps]
            assert all(
                isinstance(s, InputChannels) and s.keep % 4 == 0 and 0 < s.keep < s.width == site.width for s in steps
            )
            assert site.params > 100
    assert METHODS["inputs"] is InputChannels and InputChannels(4, 16).describe() == "reads 4/16"


def test_it_does_not_go_without_data(databases: dict[str, LevelDatabase]) -> None:
    with pytest.raises(UsageError, match="name one of 'inputs' and 'udfc'"):
        make_space(databases["resnet-b"].graph, ("inputs", "udfc"))


@given(st.data())
def test_the_most_important_that_live_are_read(data: st.DataObject) -> None:
    n, copies = data.draw(st.integers(1, 20)), data.draw(st.integers(1, 3))
    ids = np.repeat(np.arange(n), copies)
    live = np.flatnonzero(np.isin(ids, data.draw(st.lists(st.integers(0, n - 1), min_size=1, unique=True))))
    ranked = np.array(data.draw(st.permutations(range(n))))
    before: set[int] = set()
    for keep in range(1, n + 1):
        found = chosen(ids, live, ranked, keep)
        assert len(found) == copies * min(keep, len(live) // copies) and set(found) <= set(live)
        assert before <= set(found) and list(found) == sorted(found)
        before = set(found)


# ---------------------------------------------------------------- plans


@pytest.mark.parametrize("name", NETWORKS)
def test_plans_are_judged_as_they_are_built_and_cost_what_they_have(
    databases: dict[str, LevelDatabase], name: str
) -> None:
    """With groups, blocks, factors and formats beside: the program's outputs, and weights and multiplications."""
    database, rng = databases[name], random.Random(1)
    costs, plain, fast = (
        CostModel(database.graph, database.space, {}),
        Measurer(database, plain=True),
        Measurer(database),
    )
    dense = costs.in_units(database.space.dense)
    for _ in range(4):
        plan = database.space.effective(database.space.sample(rng))
        want, got = ({**m(plan, "slice"), "seconds": 0} for m in (plain, fast))
        assert got == want
        model, norms = deploy(database.stitch(plan)), 0
        for part in model.modules():
            norms += (
                2 * part.num_features if isinstance(part, nn.BatchNorm2d) else 0
            )  # a file has mean and variance, too
        cost = costs.in_units(plan)
        assert cost["params"] == sum(p.numel() for p in model.parameters()) + norms
        assert cost["macs"] == _macs(model, database.task.example_inputs) <= dense["macs"]
        places = [k for k in costs.executed(plan) if k.kind == "slice" and k.in_shape[1:] == k.out_shape[1:]]
        assert len(places) >= len(database.selections(plan))


def _macs(model: nn.Module, x: torch.Tensor) -> int:
    total = 0

    def count(part: nn.Module, _: object, output: torch.Tensor) -> None:
        nonlocal total
        total += output[0].numel() * part.weight[0].numel()  # type: ignore[union-attr,operator,index]

    handles = [p.register_forward_hook(count) for p in model.modules() if isinstance(p, nn.Conv2d | nn.Linear)]
    model(x[:1])
    for handle in handles:
        handle.remove()
    return total


def test_tables_of_many_plans_say_what_one_by_one_says(databases: dict[str, LevelDatabase]) -> None:
    for name in ("resnet-a", "densenet"):
        database, rng = databases[name], random.Random(2)
        costs = CostModel(database.graph, database.space, {})
        plans = [database.space.sample(rng) for _ in range(150)]
        want = np.concatenate([costs.cost([plan]) for plan in plans])
        np.testing.assert_array_equal(costs.cost(plans), want)
        levels = np.array(plans)
        total = np.sum([f.rows(levels[:, list(f.sites)]) for f in costs.factors()], axis=0)
        np.testing.assert_array_equal(total[:, :-1], want[:, :-1])


def test_a_selection_is_a_kernel_of_its_own(databases: dict[str, LevelDatabase]) -> None:
    database = databases["resnet-b"]
    costs, plan = CostModel(database.graph, database.space, {}), of_inputs(database.space)
    kernels = dict(costs.kernels(plan))["layer3.0.conv1"]
    assert kernels[0] == Kernel("slice", (10, 4, 4), (4, 4, 4)) and kernels[1].in_shape == (4, 4, 4)


def test_at_a_corner_the_mixture_is_the_plan(databases: dict[str, LevelDatabase]) -> None:
    for name in ("resnet-a", "densenet"):
        database = databases[name]
        plan, measurer = of_inputs(database.space, "spatial rank 50%"), Measurer(database)
        corner = np.concatenate([np.eye(n)[v] for n, v in zip(database.space.n_levels, plan, strict=True)])
        assert measurer.slope(corner)["loss"] == pytest.approx(measurer(plan, "slice")["loss"], rel=2e-4, abs=1e-7)


def test_the_refit_on_its_own_inputs_helps_and_comes_back(databases: dict[str, LevelDatabase], tmp_path: Path) -> None:
    database = databases["densenet"]
    plan, x = of_inputs(database.space), database.task.report.inputs
    with torch.no_grad():
        y = database.graph.module(x)
        lost = [float((deploy(m)(x) - y).square().sum()) for m in (database.stitch(plan), finish(database, plan))]
        assert lost[1] < lost[0]
        made, again = (Models(database, tmp_path, None, lambda: y).deployed(plan, "refitted")(x) for _ in range(2))
        assert torch.equal(made, again)
        assert float((made - y).square().sum()) == pytest.approx(lost[1], rel=1e-3)


def test_inputs_narrow_in_stages(databases: dict[str, LevelDatabase]) -> None:
    for name in ("resnet-a", "densenet"):
        database = databases[name]
        plan = tuple(
            n - 1 if s.kind == "channels" else 0
            for s, n in zip(database.space.sites, database.space.n_levels, strict=True)
        )
        descent = Descent(database, plan, 2, lambda model: 0.0)
        assert descent.step() and descent.step() and descent.plan == plan
        want = deploy(database.stitch(plan))
        assert {n: t.shape for n, t in deploy(descent.model).state_dict().items()} == {
            n: t.shape for n, t in want.state_dict().items()
        }
        assert torch.isfinite(descent.model(database.task.example_inputs)).all()


def test_compactors_leave_such_layers_alone(databases: dict[str, LevelDatabase]) -> None:
    database = databases["resnet-b"]
    plan = tuple(
        n - 1 if s.kind == "channels" else 0 for s, n in zip(database.space.sites, database.space.n_levels, strict=True)
    )
    assert any("choose their inputs alone" in sentence for sentence in uninherited(database, plan))


@pytest.mark.parametrize("seed", range(3))
def test_without_training_it_beats_groups_at_equal_parameters_on_a_densenet(seed: int, tmp_path: Path) -> None:
    errors, params = {}, {}
    for family, share in (("channels", 0.5), ("inputs", 0.5)):
        database = opened("densenet", tmp_path / family, (family,), seed)
        plan = tuple(
            min(
                range(len(levels)),
                key=lambda i: abs((levels[i].steps[0].keep if i else site.width) - share * site.width),
            )  # type: ignore[attr-defined]
            for site, levels in zip(database.space.sites, database.space.levels, strict=True)
        )
        x = database.task.search.inputs
        with torch.no_grad():
            y = database.graph.module(x)
            errors[family] = float((deploy(finish(database, plan))(x) - y).square().sum() / y.square().sum())
        params[family] = CostModel(database.graph, database.space, {}).in_units(plan)["params"]
    assert params["inputs"] <= params["channels"] and errors["inputs"] < errors["channels"]


# ---------------------------------------------------------------- another order


@pytest.mark.parametrize("name", NETWORKS)
def test_another_order_changes_nothing(databases: dict[str, LevelDatabase], name: str) -> None:
    database, rng = databases[name], random.Random(0)
    x, gained = database.task.calibration.inputs[:16], 0
    for plan in (of_inputs(database.space), *(database.space.sample(rng) for _ in range(5))):
        before = deploy(database.stitch(plan))
        with torch.no_grad():
            want, had = before(x), slices(before)
            after = reordered(database, plan, before)
            assert float((after(x) - want).abs().max()) <= 1e-5 * float(want.abs().max())
        assert slices(after) >= had
        gained += slices(after) - had
    assert gained or name == "squeezenet"


@settings(max_examples=50)
@given(st.data())
def test_two_readers_of_a_tensor_always_read_neighbours(data: st.DataObject) -> None:
    n = data.draw(st.integers(2, 24))
    sets = data.draw(st.lists(st.sets(st.integers(0, n - 1), min_size=1), min_size=1, max_size=4))
    found = [Reader(str(i), np.arange(n), np.array(sorted(s))) for i, s in enumerate(sets)]
    order = arranged(found, np.zeros(n, np.int64))
    assert sorted(order.tolist()) == list(range(n))
    runs = [np.flatnonzero(np.isin(order, reader.wanted)) for reader in found]
    assert sum(run[-1] - run[0] + 1 == len(run) for run in runs) >= min(2, len(found))


@given(st.integers(1, 8), st.integers(1, 8))
def test_channels_stay_in_their_cells(a: int, b: int) -> None:
    cells = np.array([0] * a + [a] * b)
    order = arranged([Reader("", np.arange(a + b), np.array([0, a + b - 1]))], cells)
    assert set(order[:a]) == set(range(a))


def test_weights_that_depend_on_places_keep_them(tmp_path: Path) -> None:
    """Scales of groups of inputs: all layers in 4 bits leave nothing to exchange."""
    database = wide_resnet(tmp_path, ProjectionBlock, (12, 12, 16), ("inputs", "w4"))
    for label, moves in (("dense", True), ("4-bit weights in groups of 32 by GPTQ", False)):
        plan = of_inputs(database.space, label)
        before = deploy(database.stitch(plan))
        had = slices(before)
        assert (slices(reordered(database, plan, before)) > had) == moves


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("exporter", [pytest.param("dynamo", marks=pytest.mark.slow), "legacy"])
def test_files_have_slices_in_the_place_of_gathers(exporter: str, tmp_path: Path) -> None:
    database = wide_resnet(tmp_path, ProjectionBlock, (16, 16, 24), ("inputs", "int8"))
    x = database.task.inputs(database.task.calibration.take(4))
    original = export_onnx(
        deploy(database.stitch(database.space.dense)), x, tmp_path / "original.onnx", exporters=(exporter,)
    )  # type: ignore[arg-type]
    for label in ("dense", "int8"):
        plan = of_inputs(database.space, label)
        naive = deploy(database.stitch(plan))
        nodes, sizes = [], []
        had, count = slices(naive), sum(isinstance(part, Select) for part in naive.modules())
        for model in (naive, reordered(database, plan, deploy(database.stitch(plan)))):
            path = tmp_path / "model.onnx"
            artifact = export_onnx(model, x, path, exporters=(exporter,))  # type: ignore[arg-type]
            parity(model, path, database.task.inputs(database.task.report))
            nodes.append(Counter(node.op_type for node in onnx.load(str(path)).graph.node))
            sizes.append(path.stat().st_size)
        assert slices(model) > had
        assert (nodes[0]["Slice"], nodes[0]["Gather"]) == (had, count - had)
        assert (nodes[1]["Slice"], nodes[1]["Gather"]) == (slices(model), count - slices(model))
        assert max(sizes) < Path(original.path).stat().st_size
        if label == "int8":
            assert artifact.coverage["int8"]["found"] == artifact.coverage["int8"]["expected"], "gathers too"
        else:
            costs = CostModel(database.graph, database.space, {}, Path(original.path).stat().st_size)
            assert costs.in_units(plan)["size_mb"] * 1e6 == pytest.approx(sizes[1], rel=0.03)


def test_padded_shortcuts_are_followed(tmp_path: Path) -> None:
    """Option A: a stage's channels stand in the middle of the next stage's."""
    database = wide_resnet(tmp_path, PadBlock, (12, 16, 24), ("inputs",))
    plan, x = of_inputs(database.space), database.task.calibration.inputs
    before = deploy(database.stitch(plan))
    with torch.no_grad():
        want, had = before(x), slices(before)
        after = reordered(database, plan, before)
        assert slices(after) > had
        torch.testing.assert_close(after(x), want, rtol=1e-4, atol=1e-5)

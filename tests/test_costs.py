"""Cost tables against what can be counted on stitched models and on files."""

from __future__ import annotations

import itertools
import random
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from autocompress.costs import CostModel
from autocompress.database import LevelDatabase
from autocompress.deploy import deploy
from autocompress.export import export_onnx
from autocompress.graph import trace
from autocompress.methods import StaticInt8
from autocompress.methods.coding import pack
from autocompress.methods.quantization import ActivationQuant
from autocompress.onnx_cost import count_macs, count_params
from autocompress.onnx_file import load_model, open_session
from autocompress.onnx_quant import INTEGER_KERNELS
from autocompress.packed import packed_levels
from autocompress.space import make_space
from autocompress.types import IntArray, Kernel, Plan, SearchSpace
from tests import networks

NAMES = ("resnet-a", "resnet-b", "mobilenet", "densenet", "squeezenet", "chunk", "view", "squeeze-excite", "tokens")


class Device:
    """A made-up device: a fixed cost a kernel and its size; every kernel kind and format differs."""

    name = "made-up"
    overhead_ns = 1234

    def predict_ns(self, kernels: list[Kernel]) -> IntArray:
        fast = {"float": 4, "int8": 1, "w8": 5, "w4": 6}
        return np.array(
            [100 + len(k.kind) + fast[k.format] * (k.macs + int(np.prod(k.out_shape))) for k in kernels], dtype=np.int64
        )


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[LevelDatabase, CostModel]]:
    found = {}
    for name in NAMES:
        task = networks.task(name, n=64)
        graph = trace(task.model, task.example_inputs)
        space = make_space(graph)
        database = LevelDatabase(graph, space, task, tmp_path_factory.mktemp(name))
        database.build()
        found[name] = (database, CostModel(graph, space, {"made-up": Device()}))
    return found


def plans_of(
    space: SearchSpace, n: int, seed: int = 0, kinds: tuple[str, ...] = ("channels", "block", "layer")
) -> list[Plan]:
    """Random plans that are dense at about half of the sites."""
    rng = random.Random(seed)
    return [
        tuple(
            rng.randrange(count) if site.kind in kinds and rng.random() < 0.5 else 0
            for site, count in zip(space.sites, space.n_levels, strict=True)
        )
        for _ in range(n)
    ]


def counted_macs(model: nn.Module, x: Tensor) -> int:
    """Multiply-accumulates of one example, by hooks on the layers that really run."""
    total = 0

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        assert isinstance(module, nn.Conv2d | nn.Linear)
        total += output.numel() // len(output) * module.weight[0].numel()

    handles = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return total


@pytest.mark.parametrize("name", NAMES)
def test_macs_and_params_are_those_of_the_stitched_model(
    made: dict[str, tuple[LevelDatabase, CostModel]], name: str
) -> None:
    database, costs = made[name]
    space = database.space
    x = networks.images(2)
    for plan in [space.dense, *plans_of(space, 12)]:
        model = deploy(database.stitch(plan))
        row = costs.in_units(plan)
        assert row["macs"] == counted_macs(model, x)
        norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
        state = sum(p.numel() for p in model.parameters()) + sum(2 * norm.num_features for norm in norms)
        assert row["params"] == state, space.describe(plan)


def test_macs_of_a_layer_that_runs_twice_and_of_a_grouped_one() -> None:
    for name in ("shared", "grouped"):
        task = networks.task(name, n=8)
        graph = trace(task.model, task.example_inputs)
        costs = CostModel(graph, make_space(graph), {})
        assert costs.in_units(costs.space.dense)["macs"] == counted_macs(task.model, networks.images(1))


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_the_factors_sum_to_the_cost(seed: int, made: dict[str, tuple[LevelDatabase, CostModel]]) -> None:
    database, costs = made[NAMES[seed % len(NAMES)]]
    plans = [database.space.dense, *plans_of(database.space, 6, seed), database.space.sample(random.Random(seed))]
    want = costs.cost(plans)
    for plan, wanted in zip(plans, want, strict=True):
        total = np.zeros(len(costs.keys), dtype=np.int64)
        for factor in costs.factors():
            levels = tuple(plan[site] for site in factor.sites)
            row = factor.rows(np.array([levels], dtype=np.int64))[0]
            if factor.cost is not None:
                assert (row == factor.cost(np.array([levels], dtype=np.int64))[0]).all(), factor.name
            total += row
        assert costs.keys[-1] == "peak_mb"
        assert (total[:-1] == wanted[:-1]).all()


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_deltas_are_differences_of_costs(seed: int, made: dict[str, tuple[LevelDatabase, CostModel]]) -> None:
    database, costs = made[NAMES[seed % len(NAMES)]]
    space = database.space
    for plan in [*plans_of(space, 2, seed), space.sample(random.Random(seed))]:
        switched = [
            (*plan[:site], level, *plan[site + 1 :]) for site, n in enumerate(space.n_levels) for level in range(n)
        ]
        want = costs.cost(switched) - costs.cost([plan])
        assert (costs.deltas(plan)[:, :-1] == want[:, :-1]).all()


def test_costs_do_not_depend_on_the_company(made: dict[str, tuple[LevelDatabase, CostModel]]) -> None:
    """One plan alone, in a batch and asked of a fresh model costs the same."""
    database, costs = made["mobilenet"]
    plans = plans_of(database.space, 8, 3)
    batch = costs.cost(plans)
    fresh = CostModel(database.graph, database.space, {"made-up": Device()})
    for plan, row in zip(plans[::-1], batch[::-1], strict=True):
        assert (fresh.cost([plan])[0] == row).all()


@pytest.mark.parametrize("name", NAMES)
def test_quantized_tensors_are_those_of_the_stitched_model(
    made: dict[str, tuple[LevelDatabase, CostModel]], name: str
) -> None:
    """What the database quantizes is what the tables charge for.

    Not so behind dropped blocks: there a tensor's readers may stand any number of blocks later, and a table that knew them
    all would be as large as the space; what is charged then is what the undropped net would need.
    """
    database, costs = made[name]
    for plan in plans_of(database.space, 8, 1, ("channels", "layer")):
        model = database.stitch(plan)
        placed = {
            costs._made_by[node.all_input_nodes[0].name]
            for node in model.graph.nodes
            if node.op == "call_module" and isinstance(model.get_submodule(node.target), ActivationQuant)
        }
        charged = set()
        for template, features in zip(costs._templates, costs.seen(plan), strict=True):
            flags = features[3 + len(template.op.inputs) :]
            names = [costs._made_by[n] for n in (*template.op.inputs, template.op.result)]
            charged |= {n for n, flag in zip(names, flags, strict=True) if flag}
        assert charged == placed, database.space.describe(plan)


@pytest.mark.parametrize("name", NAMES)
def test_peak_is_the_most_that_is_alive_at_once(made: dict[str, tuple[LevelDatabase, CostModel]], name: str) -> None:
    """Brute force on the dense net: operators' outputs, alive from where they are made to where they are last read."""
    database, costs = made[name]
    graph = database.graph
    with torch.no_grad():
        runner = torch.fx.Interpreter(graph.module, garbage_collect_values=False)
        runner.run(networks.images(1))
    values = {node.name: value for node, value in runner.env.items() if isinstance(value, Tensor)}
    nodes = {node.name: node for node in graph.module.graph.nodes}
    order = [op.result for op in graph.ops]

    def written(name: str) -> str | None:
        """The operator's result that holds a tensor's memory, through views."""
        while name not in order:
            if not nodes[name].all_input_nodes:
                return None
            name = nodes[name].all_input_nodes[0].name
        return name

    reads = [{written(n) for n in op.inputs} for op in graph.ops]
    peak = 0
    for i in range(len(order)):
        alive = [r for j, r in enumerate(order[: i + 1]) if j == i or any(r in later for later in reads[i:])]
        peak = max(peak, sum(4 * values[r].numel() for r in alive))
    assert costs.in_units(database.space.dense)["peak_mb"] * 1e6 == pytest.approx(peak)


def test_dropping_and_pruning_never_cost_more(made: dict[str, tuple[LevelDatabase, CostModel]]) -> None:
    database, costs = made["mobilenet"]
    dense = costs.cost([database.space.dense])[0]
    for i, site in enumerate(database.space.sites):
        if site.kind == "layer":
            continue
        for level in range(1, database.space.n_levels[i]):
            plan = tuple(level if j == i else 0 for j in range(len(database.space.sites)))
            row = costs.cost([plan])[0]
            assert row[0] < dense[0] and row[1] < dense[1] and (row <= dense).all()


LABELS = (
    "int8",
    "8-bit weights",
    "4-bit weights in groups of 32 by GPTQ",
    "channel rank 50%",
    "channel rank 50% + int8",
)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> tuple[LevelDatabase, int]:
    """The digits database and the bytes of the original's file."""
    from autocompress.tasks import load_task

    task = load_task("digits")
    graph = trace(task.model, task.example_inputs)
    space = make_space(graph)
    database = LevelDatabase(graph, space, task, tmp_path_factory.mktemp("digits"))
    database.build()
    return database, exported(database, space.dense, tmp_path_factory.mktemp("original") / "original.onnx")


def exported(database: LevelDatabase, plan: Plan, path: Path) -> int:
    task = database.task
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the legacy exporter announces its end
        artifact = export_onnx(
            deploy(database.stitch(plan)), task.inputs(task.calibration.take(4)), path, exporters=("legacy",)
        )
    return artifact.bytes


@pytest.mark.slow
@pytest.mark.parametrize("label", [*LABELS, "mixed", "pruned"])
def test_predicted_size_is_that_of_the_file(digits: tuple[LevelDatabase, int], label: str, tmp_path: Path) -> None:
    """Within 3 %; names, which differ by exporter, are the remainder (4 % where each layer is two int8 factors)."""
    database, dense_bytes = digits
    space = database.space
    if label in LABELS:
        plan = tuple(
            next((i for i, level in enumerate(levels) if level.label == label and site.kind == "layer"), 0)
            for site, levels in zip(space.sites, space.levels, strict=True)
        )
    else:
        kinds = ("channels", "block", "layer") if label == "mixed" else ("channels", "block")
        (plan,) = plans_of(space, 1, 5, kinds)
    size = exported(database, plan, tmp_path / "model.onnx")
    row = CostModel(database.graph, space, {}, dense_bytes).in_units(plan)
    assert row["size_mb"] * 1e6 == pytest.approx(size, rel=0.04 if label.endswith("+ int8") else 0.03)
    model = load_model(tmp_path / "model.onnx")
    assert row["params"] == count_params(model)
    assert row["macs"] == count_macs(model)


@pytest.mark.slow
def test_predicted_packed_size_is_that_of_the_packed_file(digits: tuple[LevelDatabase, int], tmp_path: Path) -> None:
    """Each level everywhere within 4 %, half of all channels within 2 %, the original exactly; sums stay sums."""
    database, dense_bytes = digits
    space, original = database.space, tmp_path / "original.onnx"
    exported(database, space.dense, original)
    costs = CostModel(database.graph, space, {}, dense_bytes, packed_levels(database, original))
    assert costs.in_units(space.dense)["packed_mb"] == pytest.approx(len(pack(original.read_bytes(), ".onnx")) / 1e6)
    halved = tuple(len(v) // 2 if s.kind == "channels" else 0 for s, v in zip(space.sites, space.levels, strict=True))
    plans = {"half": halved}
    for label in LABELS:
        plans[label] = tuple(next((i for i, v in enumerate(own) if v.label == label), 0) for own in space.levels)
    for label, plan in plans.items():
        exported(database, plan, tmp_path / "model.onnx")
        size = len(pack((tmp_path / "model.onnx").read_bytes(), ".onnx"))
        predicted = costs.in_units(plan)["packed_mb"] * 1e6
        assert predicted == pytest.approx(size, rel=0.02 if label == "half" else 0.04), label
    total = sum(f.rows(np.array([[halved[s] for s in f.sites]], np.int64))[0] for f in costs.factors())
    assert (total[:-1] == costs.cost([halved])[0, :-1]).all()


def test_a_width_table_sums_over_groups(made: dict[str, tuple[LevelDatabase, CostModel]]) -> None:
    """Widths of every operator's tensors equal those of the stitched model, for every width of every group."""
    database, costs = made["densenet"]
    space = database.space
    sites = [i for i, site in enumerate(space.sites) if site.kind == "channels"]
    for site, level in itertools.islice(((s, v) for s in sites for v in range(1, space.n_levels[s])), 20):
        plan = tuple(level if i == site else 0 for i in range(len(space.sites)))
        model = database.stitch(plan)
        with torch.no_grad():
            runner = torch.fx.Interpreter(model, garbage_collect_values=False)
            runner.run(networks.images(1))
        shapes = {node.name: value.shape for node, value in runner.env.items() if isinstance(value, Tensor)}
        for template, features in zip(costs._templates, costs.seen(plan), strict=True):
            assert features[2 + len(template.op.inputs)] == shapes[template.op.result][1]


def test_a_layer_with_integer_weights_between_integers_is_charged_as_what_runs(
    digits: tuple[LevelDatabase, int], tmp_path: Path
) -> None:
    """ONNX Runtime fuses w8 between int8 tensors into QLinearConv: the tables must say so, and it must be so."""
    database, _ = digits
    space = database.space
    target = "layer2.0.conv1"
    plan = tuple(
        next(
            i
            for i, level in enumerate(levels)
            if level.label == ("8-bit weights" if site.name == f"layer:{target}" else "int8")
        )
        if site.kind == "layer"
        else 0
        for site, levels in zip(space.sites, space.levels, strict=True)
    )
    (kernels,) = [kernels for name, kernels in CostModel(database.graph, space, {}).kernels(plan) if name == target]
    assert [kernel.format for kernel in kernels] == ["int8"]
    exported(database, plan, tmp_path / "model.onnx")
    open_session(tmp_path / "model.onnx", save=tmp_path / "optimized.onnx")
    run = load_model(tmp_path / "optimized.onnx")
    assert any(node.op_type in INTEGER_KERNELS and f"{target}.weight_int8" in node.input for node in run.graph.node)


def test_an_addition_that_meets_another_layout_runs_apart(made: dict[str, tuple[LevelDatabase, CostModel]]) -> None:
    """Behind a padded shortcut and on from there, whatever the plan; elsewhere where an input was quantized."""
    database, costs = made["resnet-a"]
    space = database.space

    def fused(plan: Plan) -> dict[str, str]:
        return {name: k.fused for name, kernels in costs.kernels(plan) for k in kernels if k.kind == "add"}

    dense = fused(space.dense)
    pads = [name for name, kernels in costs.kernels(space.dense) if any(k.kind == "pad" for k in kernels)]
    assert pads and {"apart relu", "relu"} == set(dense.values())
    first = next(name for name, how in dense.items() if how == "relu")
    names = [name for name, _ in costs.kernels(space.dense)]
    assert all(names.index(name) > names.index(pads[0]) for name, how in dense.items() if how == "apart relu")
    branch = next(layer for layer in database.graph.layers.values() if layer.result == added(database, first))
    site = next(i for i, s in enumerate(space.sites) if s.name == f"layer:{branch.name}")
    level = next(i for i, lv in enumerate(space.levels[site]) if any(isinstance(s, StaticInt8) for s in lv.steps))
    plan = (*space.dense[:site], level, *space.dense[site + 1 :])
    assert fused(plan)[first] == "apart relu"


def added(database: LevelDatabase, name: str) -> str:
    """A layer's result that an addition reads."""
    op = next(op for op in database.graph.ops if op.node == name)
    results = {layer.result for layer in database.graph.layers.values()}
    return next(x for x in op.inputs if x in results)

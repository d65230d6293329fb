"""Groups, blocks and ops of real networks: what is pruned physically must equal what is masked."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from autocompress.errors import UnsupportedModel
from autocompress.graph import Graph, Keep, prove, rebuild, slice_layer, trace
from tests import networks

_GRAPHS: dict[str, Graph] = {}


def graph_of(name: str) -> Graph:
    """Traced once a session; nobody changes it."""
    if name not in _GRAPHS:
        _GRAPHS[name] = trace(networks.network(name), networks.images(1))
    return _GRAPHS[name]


def random_keep(graph: Graph, seed: int) -> Keep:
    """Random channels of every group removed at once, at least one kept in each."""
    rng = np.random.default_rng(seed)
    keep = graph.keep_all()
    for group in graph.groups:
        n = len(group.classes)
        keep[rng.permutation(group.classes)[: rng.integers(0, n)]] = False
    return keep


def masked_output(graph: Graph, keep: Keep, x: Tensor) -> Tensor:
    """The dense model whose layers read zeros instead of removed channels, by hooks: an independent way to say it."""
    handles = []
    for layer in graph.layers.values():
        if layer.depthwise:
            continue
        shape = (1, -1, 1, 1) if isinstance(graph.module.get_submodule(layer.name), nn.Conv2d) else (-1,)
        mask = torch.from_numpy(keep[layer.inputs]).float().reshape(shape)

        def zero(_: nn.Module, inputs: tuple[Tensor, ...], mask: Tensor = mask) -> tuple[Tensor, ...]:
            return (inputs[0] * mask,)

        handles.append(graph.module.get_submodule(layer.name).register_forward_pre_hook(zero))
    with torch.no_grad():
        output = graph.module(x)
    for handle in handles:
        handle.remove()
    return output


@pytest.mark.parametrize("name", networks.BUILDERS)
def test_every_group_is_proved_on_several_random_sets(name: str) -> None:
    graph = graph_of(name)
    x = networks.images(3, 5)
    assert graph.groups, "nothing to prune"
    for group in graph.groups:
        for seed in range(3):
            assert prove(graph, group, x, seed) <= 1e-4, group.name


@pytest.mark.parametrize("name", networks.BUILDERS)
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 10**6))
def test_all_groups_pruned_at_once_equal_the_masked_model(name: str, seed: int) -> None:
    graph = graph_of(name)
    keep, x = random_keep(graph, seed), networks.images(3, seed)
    want = masked_output(graph, keep, x)
    with torch.no_grad():
        got = rebuild(graph, keep)(x)
    assert float((got - want).abs().max() / want.abs().max()) <= 1e-4


@pytest.mark.parametrize("name", networks.BUILDERS)
def test_nothing_removed_is_the_model_itself(name: str) -> None:
    graph, model, x = graph_of(name), networks.network(name), networks.images(3)
    with torch.no_grad():
        torch.testing.assert_close(rebuild(graph, graph.keep_all())(x), model(x), rtol=0, atol=1e-6)


def test_the_rows_that_survive_are_those_asked_for() -> None:
    graph = graph_of("mobilenet")
    group = graph.groups[0]
    keep = graph.keep_all()
    keep[group.classes[[1, 4, 5]]] = False
    model = rebuild(graph, keep)
    layer = graph.layers[group.producers[0]]
    old = graph.module.get_submodule(layer.name).weight
    new = model.get_submodule(layer.name).weight
    torch.testing.assert_close(new, old[[i for i in range(len(old)) if keep[layer.outputs[i]]]])


def test_option_a_stages_are_aligned() -> None:
    """Channel c of stage 1 is channel c + pad of stage 2; the padded channels of stage 2 are its own."""
    graph = graph_of("resnet-a")
    first = graph.layers["layer1.0.conv2"].outputs
    second = graph.layers["layer2.0.conv2"].outputs
    third = graph.layers["layer3.0.conv2"].outputs
    assert (second[3:9] == first).all() and (third[2:14] == second).all()
    assert not set(second[:3]) & set(first) and not set(second[9:]) & set(first)


EXPECTED_BLOCKS = {
    "resnet-a": {"layer1.0"},
    "resnet-b": {"layer1.0"},
    "mobilenet": {"blocks.0", "blocks.2"},
    "densenet": set(),
    "squeezenet": set(),
    "preactivation": {"norms", "norms#2"},
    "tokens": {"up"},
    "nested": {"b", "a"},
}


@pytest.mark.parametrize("name", EXPECTED_BLOCKS)
def test_blocks_are_the_residual_branches(name: str) -> None:
    graph = graph_of(name)
    assert len(graph.blocks) == len(EXPECTED_BLOCKS[name])
    inside = {layer.name for layer in graph.layers.values() for block in graph.blocks if layer.node in block.body}
    if name == "mobilenet":
        assert inside == {f"blocks.{i}.{part}.0" for i in (0, 2) for part in ("expand", "depthwise", "project")}


@pytest.mark.parametrize("name", [name for name, blocks in EXPECTED_BLOCKS.items() if blocks])
def test_dropping_blocks_equals_adding_zero(name: str) -> None:
    """Every subset of blocks (innermost first): the branch's last value is replaced by zeros in the dense graph."""
    graph, x = graph_of(name), networks.images(3)
    subsets = [[block] for block in graph.blocks] + ([list(graph.blocks)] if len(graph.blocks) > 1 else [])
    for blocks in subsets:
        with torch.no_grad():
            got = rebuild(graph, graph.keep_all(), [block.name for block in blocks])(x)
            want = _with_zero_branches(graph, {block.add: block.skip for block in blocks}, x)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def _with_zero_branches(graph: Graph, adds: dict[str, str], x: Tensor) -> Tensor:
    class Run(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> Tensor:
            if n.name in adds:
                (skip,) = [source for source in n.all_input_nodes if source.name == adds[n.name]]
                return self.env[skip] + torch.zeros_like(self.env[skip])
            return super().run_node(n)

    return Run(graph.module).run(x)


@pytest.mark.parametrize("name", networks.BUILDERS)
def test_ops_cover_every_convolution_and_linear_layer(name: str) -> None:
    graph = graph_of(name)
    called = [
        node.name
        for node in graph.module.graph.nodes
        if node.op == "call_module" and isinstance(graph.module.get_submodule(node.target), nn.Conv2d | nn.Linear)
    ]
    heavy = [op for op in graph.ops if op.kind in ("conv", "linear")]
    assert sorted(op.node for op in heavy) == sorted(called)
    for op in heavy:
        node = next(n for n in graph.module.graph.nodes if n.name == op.node)
        module = graph.module.get_submodule(node.target)
        if isinstance(module, nn.Conv2d):
            assert (op.kernel, op.stride) == (module.kernel_size, module.stride)
    results = {op.result for op in graph.ops}
    assert len(results) == len(graph.ops), "an op twice"
    assert not any(op.kind == "relu" for op in graph.ops if name in ("resnet-a", "resnet-b", "mobilenet")), (
        "all are fused"
    )


@pytest.mark.parametrize(
    ("name", "layer", "reason"),
    [
        ("grouped", "grouped", "grouped is a grouped convolution (2 groups)"),
        ("grouped", "first", "grouped is a grouped convolution (2 groups)"),
        ("grouped", "head", "it is the model's output"),
        ("shared", "first", "twice is used in more than one place"),
        ("shared", "twice", "it is used in more than one place"),
        ("resnet-a", "linear", "it is the model's output"),
    ],
)
def test_what_is_refused_is_named_with_its_reason(name: str, layer: str, reason: str) -> None:
    graph = graph_of(name)
    assert graph.refused[layer] == reason
    assert layer not in {producer for group in graph.groups for producer in group.producers}


def test_layers_that_must_be_handled_are_not_refused() -> None:
    for name in ("resnet-a", "resnet-b", "mobilenet", "densenet", "squeezenet", "preactivation", "view", "chunk"):
        graph = graph_of(name)
        assert set(graph.refused) <= {"linear", "head", "classifier.1"}, (name, graph.refused)
    assert "twice" not in graph_of("shared").layers and "last" not in graph_of("shared").refused
    assert set(graph_of("squeeze-excite").refused) == {"head"}
    assert set(graph_of("tokens").refused) == {"head"}


class _Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) if x.sum() > 0 else x


class _Unknown(nn.Module):
    """Sorting channels has no rule."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.sort(self.conv(x), dim=1)[0])


class _Broken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(5, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class _NormOverTokens(nn.Module):
    """Batch norm over tokens, not channels: it must not be folded into the linear layer before it."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.linear, self.norm, self.head = nn.Linear(8, tokens), nn.BatchNorm1d(tokens), nn.Linear(tokens, 4)
        nn.init.uniform_(self.norm.weight, 0.5, 2.0)
        nn.init.uniform_(self.norm.running_var, 0.5, 2.0)

    def forward(self, x: Tensor) -> Tensor:  # (n, tokens, 8)
        return self.head(self.norm(self.linear(x)))


class _SharedNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.norm = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.b(torch.relu(self.norm(self.a(x))))).mean((2, 3))


def test_weights_lie_by_rows_whatever_the_model_has() -> None:
    task = networks.task("resnet-b", n=8)
    task.model.to(memory_format=torch.channels_last)
    module = trace(task.model, task.example_inputs).module
    assert all(p.stride() == torch.empty(p.shape).stride() for p in module.parameters())


def test_bad_models_are_refused_in_a_sentence() -> None:
    with pytest.raises(UnsupportedModel, match="cannot be traced.*move such branches"):
        trace(_Branches(), networks.images(1))
    with pytest.raises(UnsupportedModel, match="does not run on its example input"):
        trace(_Broken(), networks.images(1))


class _HiddenInPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.relu, self.head = nn.Conv2d(3, 6, 1), nn.ReLU(inplace=True), nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        self.relu(x)
        return self.head(x)


def test_a_change_in_place_that_tracing_would_lose_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match=r"in place.*write x = f\(x\)"):
        trace(_HiddenInPlace(), networks.images(1))


class _Unhandled(nn.Module):
    """Weights in modules and functions that have no sites."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.up, self.head = nn.Conv2d(3, 6, 1), nn.ConvTranspose2d(6, 6, 2, 2), nn.Linear(6, 4)
        self.free = nn.Parameter(torch.randn(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(self.conv(x)).mean((2, 3))
        return self.head(nn.functional.linear(x, self.free))


def test_nothing_with_weights_is_skipped_without_a_word() -> None:
    refused = trace(_Unhandled(), networks.images(1)).refused
    assert refused["up"] == "a ConvTranspose2d stays as it is"
    assert refused["linear"] == "it is a function call, and only modules are compressed"
    assert refused["conv"] == "no rule tells how up moves channels"


def test_an_operation_without_a_rule_pins_its_channels() -> None:
    graph = trace(_Unknown(), networks.images(1))
    assert graph.groups == () and graph.refused["conv"] == "no rule tells how sort moves channels"


def test_only_a_norm_over_the_layers_own_channels_belongs_to_it() -> None:
    graph = trace(_NormOverTokens(6), torch.randn(2, 6, 8))
    assert graph.layers["linear"].norm is None
    shared = trace(_SharedNorm(), networks.images(2))
    assert shared.layers["a"].norm is None and shared.layers["b"].norm is None


class _LinearOverWidth(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.mix, self.out = nn.Conv2d(3, 6, 1), nn.Linear(8, 5), nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.mix(self.conv(x))).mean((2, 3))


def test_a_linear_layer_over_another_axis_pins_it() -> None:
    model = _LinearOverWidth()
    graph, x = trace(model, networks.images(1)), networks.images(2)
    assert graph.groups == () and "another axis" in graph.refused["conv"] and "another axis" in graph.refused["mix"]
    torch.testing.assert_close(rebuild(graph, graph.keep_all())(x), model(x))


def test_groups_can_be_pruned_to_one_channel() -> None:
    graph, x = graph_of("resnet-a"), networks.images(2)
    keep = graph.keep_all()
    for group in graph.groups:
        keep[group.classes[1:]] = False
    with torch.no_grad():
        got = rebuild(graph, keep)(x)
    torch.testing.assert_close(got, masked_output(graph, keep, x), rtol=1e-4, atol=1e-4)


def test_the_dense_weights_are_never_changed() -> None:
    graph = graph_of("mobilenet")
    before = {name: tensor.clone() for name, tensor in graph.module.state_dict().items()}
    model = rebuild(graph, random_keep(graph, 3))
    for parameter in model.parameters():
        parameter.data.fill_(7.0)
    for buffer in model.buffers():
        buffer.fill_(3)
    for name, tensor in graph.module.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_slicing_refuses_other_modules() -> None:
    graph = graph_of("resnet-a")
    layer = graph.layers["conv1"]
    other = type(layer)(**{**vars(layer), "name": "bn1"})
    with pytest.raises(UnsupportedModel, match="BatchNorm2d"):
        slice_layer(graph, other, np.arange(1), np.arange(1))

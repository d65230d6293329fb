"""torch-pruning as an independent witness: it couples the same layers, and is wrong where ours had to be written."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from autocompress.graph import Graph, rebuild, trace
from autocompress.methods.importance import bn_importance, fpgm_importance, l1_importance, l2_importance
from tests import networks
from tests.test_graph import masked_output

tp = pytest.importorskip("torch_pruning")
"""Not a dependency: installed where this comparison is wanted (``pip install torch-pruning``)."""


def theirs(model: nn.Module, name: str, channel: int) -> dict[tuple[str, str], set[int]]:
    """(layer, side) -> channels that torch-pruning removes with one output channel of a layer."""
    dependencies = tp.DependencyGraph().build_dependency(model, example_inputs=networks.images(1))
    layer = model.get_submodule(name)
    group = dependencies.get_pruning_group(layer, tp.prune_conv_out_channels, idxs=[channel])
    names = {id(part): part_name for part_name, part in model.named_modules()}
    found: dict[tuple[str, str], set[int]] = {}
    for dependency, indices in group:
        part = dependency.target.module
        if not isinstance(part, nn.Conv2d | nn.Linear):
            continue
        out = dependency.handler in (
            tp.prune_conv_out_channels,
            tp.prune_linear_out_channels,
            tp.prune_depthwise_conv_out_channels,
        )
        found.setdefault((names[id(part)], "out" if out else "in"), set()).update(int(i) for i in indices)
    return found


def ours(graph: Graph, name: str, channel: int) -> dict[tuple[str, str], set[int]]:
    """The same from our classes."""
    root = graph.layers[name].outputs[channel]
    found: dict[tuple[str, str], set[int]] = {}
    for layer in graph.layers.values():
        for side, ids in (("out", layer.outputs), ("in", layer.inputs)):
            hit = {int(i) for i in np.flatnonzero(ids == root)}
            if hit and not (layer.depthwise and side == "in"):
                found[(layer.name, side)] = hit
    return found


@pytest.mark.parametrize("name", ["resnet-b", "mobilenet", "densenet", "squeezenet"])
def test_both_couple_the_same_channels_of_the_same_layers(name: str) -> None:
    graph = trace(networks.network(name), networks.images(1))
    assert graph.groups
    for group in graph.groups:
        producer = next(p for p in group.producers if not graph.layers[p].depthwise)
        channel = int(np.flatnonzero(np.isin(graph.layers[producer].outputs, group.classes))[-1])
        mine, other = ours(graph, producer, channel), theirs(networks.network(name), producer, channel)
        assert mine == other, group.name


def test_option_a_shortcuts_are_pruned_askew_by_theirs_and_straight_by_ours() -> None:
    """Removing stream channels of stage 1: the pruned model must equal the one whose layers read zeros there."""
    x = networks.images(4)
    graph = trace(networks.network("resnet-a"), networks.images(1))
    removed = [1, 4]
    keep = graph.keep_all()
    keep[graph.layers["conv1"].outputs[removed]] = False
    want = masked_output(graph, keep, x)
    with torch.no_grad():
        mine = rebuild(graph, keep)(x)
    scale = float(want.abs().max())
    assert float((mine - want).abs().max()) < 1e-4 * scale

    channel = removed[0]
    aligned, askew = ours(graph, "conv1", channel), theirs(networks.network("resnet-a"), "conv1", channel)
    assert aligned[("layer2.0.conv2", "out")] == {channel + 3}, "three zero channels stand before it"
    assert aligned[("linear", "in")] == {channel + 3 + 2}
    wrong = {side for side in aligned if askew.get(side) != aligned[side]}
    assert {("layer2.0.conv2", "out"), ("linear", "in")} <= wrong

    model = networks.network("resnet-a")
    dependencies = tp.DependencyGraph().build_dependency(model, example_inputs=networks.images(1))
    dependencies.get_pruning_group(model.get_submodule("conv1"), tp.prune_conv_out_channels, idxs=removed).prune()
    try:
        with torch.no_grad():
            difference = float((model(x) - want).abs().max()) / scale
    except RuntimeError:  # some versions remove so much of the classifier that the model does not even run
        difference = float("inf")
    assert difference > 1e-2


def test_importances_are_theirs_on_each_layer() -> None:
    """L1, L2 and FPGM of a group, layer by layer as torch-pruning scores them, each scaled to mean 1 and added; BN scale."""
    model = networks.network("resnet-b")
    name = "layer1.0.conv1"
    layer = model.get_submodule(name)
    assert isinstance(layer, nn.Conv2d)
    layer.weight.data.abs_()  # their FPGM compares magnitudes
    graph = trace(model, networks.images(1))
    mine = next(group for group in graph.groups if name in group.producers)
    width = list(range(layer.out_channels))
    dependencies = tp.DependencyGraph().build_dependency(model, example_inputs=networks.images(1))
    items = list(dependencies.get_pruning_group(layer, tp.prune_conv_out_channels, idxs=width))

    def scored(importance: object, *kinds: type[nn.Module], outputs: bool = False) -> np.ndarray:  # type: ignore[type-arg]
        total = np.zeros(len(width))
        for item in items:
            made_here = item.dep.handler == tp.prune_conv_out_channels
            if isinstance(item.dep.target.module, kinds) and (made_here or not outputs):
                part = importance([item]).double().numpy()  # type: ignore[operator]
                total += part / part.mean()
        return total

    for p, ours_of in ((1, l1_importance), (2, l2_importance)):
        theirs_of = tp.importance.MagnitudeImportance(p=p, normalizer=None)
        np.testing.assert_allclose(ours_of(graph, mine), scored(theirs_of, nn.Conv2d), rtol=1e-4)
    fpgm = tp.importance.FPGMImportance(p=1, normalizer=None)
    np.testing.assert_allclose(fpgm_importance(graph, mine), scored(fpgm, nn.Conv2d, outputs=True), rtol=1e-4)
    scale = tp.importance.BNScaleImportance(normalizer=None)
    np.testing.assert_allclose(bn_importance(graph, mine), scored(scale, nn.BatchNorm2d), rtol=1e-4)

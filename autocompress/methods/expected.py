"""What values are expected to be, from weights alone: a mean and a variance a channel (Nagel et al. 2019, DFQ, section 4.2.1).

Behind a batch norm a channel is Gaussian with the norm's shift and factor; a ReLU clips it; sums add means and variances;
pools of means, slices and reshapes keep both; a layer without a norm takes white inputs. What is behind anything else is not
known: ``None``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from autocompress.graph import Graph
from autocompress.op_kinds import call_target, op_kind, relu_ceiling

Expected = tuple[Tensor, Tensor]
"""Mean and variance of each channel, in double precision.  # (n,), (n,)"""

GRID = torch.linspace(-8, 8, 641, dtype=torch.float64)
SAME = ("free", "slice", "pad", "global_pool")
"""Kinds of operations that leave a channel's values what they are."""


def expected_values(graph: Graph, folded: Callable[[str], tuple[Tensor, Tensor]]) -> dict[str, Expected | None]:
    """Node -> its channels in the original, as far as weights tell. ``folded``: a layer's weight and bias behind its norm."""
    found: dict[str, Expected | None] = {}
    for node in graph.module.graph.nodes:
        found[node.name] = _of(graph, node, folded, found) if node.name in graph.values else None
    return found


def clipped(mean: Tensor, variance: Tensor, ceiling: float) -> Expected:
    """Of ``clip(z, 0, ceiling)`` with Gaussian ``z``, on an even grid of quantiles.  # (n,), (n,)"""
    density = torch.exp(-GRID.square() / 2)
    density = density / density.sum()
    values = (mean[:, None] + variance.sqrt()[:, None] * GRID).clamp(0, ceiling)  # (n, grid)
    first = values @ density
    return first, (values.square() @ density - first.square()).clamp_min(0)


def _of(
    graph: Graph, node: fx.Node, folded: Callable[[str], tuple[Tensor, Tensor]], found: dict[str, Expected | None]
) -> Expected | None:
    target = call_target(graph.module, node)
    part: Any = target if isinstance(target, nn.Module) else None
    kind = op_kind(target, part)
    if kind == "batch_norm":
        return None if part.weight is None else (part.bias.detach().double(), part.weight.detach().double().square())
    known = [found.get(source.name) for source in node.all_input_nodes]
    if not known or any(one is None for one in known):
        return None
    (mean, variance), *others = [one for one in known if one is not None]
    if kind == "relu":
        return clipped(mean, variance, relu_ceiling(graph.module, node))
    if kind == "add" and others and all(len(one[0]) == len(mean) for one in others):
        return mean + sum(o[0] for o in others), variance + sum(o[1] for o in others)
    if str(node.target) in graph.layers:
        return _through(graph, str(node.target), folded, (mean, variance))
    if kind in SAME and not others:
        return _same_channels(graph, node, (mean, variance), kind == "pad")
    return None


def _through(
    graph: Graph, name: str, folded: Callable[[str], tuple[Tensor, Tensor]], values: Expected
) -> Expected | None:
    """Behind a layer that has no norm; with one, its norm says more."""
    layer, (weight, bias) = graph.layers[name], (t.double() for t in folded(name))
    if layer.norm or layer.depthwise or weight.shape[1] != len(values[0]):
        return None
    summed, squares = weight.flatten(2).sum(2) if weight.ndim > 2 else weight, weight.square()
    squares = squares.flatten(2).sum(2) if weight.ndim > 2 else squares
    return summed @ values[0] + bias, squares @ values[1]


def _same_channels(graph: Graph, node: fx.Node, values: Expected, padded: bool) -> Expected | None:
    """By the channels' classes, which slices, reshapes and paddings keep; what padding adds is zero."""
    before, after = graph.values[node.all_input_nodes[0].name].ids, graph.values[node.name].ids
    if len(before) != len(values[0]):
        return None
    place = {int(c): i for i, c in reversed(list(enumerate(before)))}
    index = np.array([place.get(int(c), -1) for c in after])
    if not padded and bool((index < 0).any()):
        return None
    there = torch.from_numpy(index >= 0)
    mean, variance = (torch.where(there, v[torch.from_numpy(index)], 0.0) for v in values)
    return mean, variance

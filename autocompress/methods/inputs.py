"""Unconstrained channel pruning: a layer that reads a shared tensor keeps input channels of its own (UPSCALE, Wan et al. 2023).

A group's channels live and die with all layers that write and read them. Here a tensor stays whole (the union of what its
readers keep), and one reader alone reads fewer of its channels, chosen by the same importance with this reader as the only one,
and refitted behind them. In the model a :class:`Select` stands before it: a slice where its channels are neighbours, else a
gather. ``reorder.py`` permutes channels so that as many as possible are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, fx, nn

from autocompress.graph import Graph, Group
from autocompress.results import Importance
from autocompress.types import Level, MethodConfig

Index = npt.NDArray[np.intp]

SELECT_BYTES, INDEX_BYTES = 230, 8
"""Bytes in an ONNX file of a gather with its names, and of each channel that it takes; a slice has four numbers instead."""


@dataclass(frozen=True)
class InputChannels(MethodConfig):
    """One layer reads the ``keep`` most important of its ``width`` inputs: of those that groups leave, all if they are fewer."""

    keep: int
    width: int
    importance: Importance = "obs"

    def describe(self) -> str:
        return f"reads {self.keep}/{self.width}"


class Select(nn.Module):
    """Some channels of a tensor along ``dim``, in their order: a slice where they are neighbours, else a gather.

    ``index``: their places.  # (n,)
    """

    index: Tensor

    def __init__(self, index: Index, dim: int) -> None:
        super().__init__()
        self.dim, self.start, self.length = dim, int(index[0]), len(index)
        self.neighbours = int(index[-1]) - self.start + 1 == len(index)
        self.register_buffer("index", torch.from_numpy(np.asarray(index, np.int64)), persistent=False)

    def forward(self, x: Tensor) -> Tensor:  # (n, in, h, w) -> (n, kept, h, w), or (..., in) -> (..., kept)
        if self.neighbours:
            return x.narrow(self.dim, self.start, self.length)
        return x.index_select(self.dim, self.index)

    def extra_repr(self) -> str:
        return f"{self.length} channels, {'neighbours' if self.neighbours else 'scattered'}"


def readers(graph: Graph) -> dict[str, Group]:
    """Layers with a choice of their own, and their input channels as a group that they alone read.

    These are dense layers that share a channel with another layer, or read some that no group may take away; each channel as
    often as the others.
    """
    dense = [layer for layer in graph.layers.values() if not layer.depthwise]
    times = Counter(c for layer in dense for c in np.unique(layer.inputs).tolist())
    grouped = {c for group in graph.groups for c in group.classes.tolist()}
    return {
        layer.name: Group(layer.name, np.unique(layer.inputs), (), (layer.name,))
        for layer in dense
        if any(times[c] > 1 or c not in grouped for c in layer.inputs.tolist())
        and len(set(Counter(layer.inputs.tolist()).values())) == 1
    }


def input_levels(group: Group, weights: int, levels: tuple[Level, ...]) -> tuple[Level, ...]:
    """Of the widths a group could have those that are worth a selection in a layer of so many ``weights``, as this method."""
    found = [Level()]
    for level in levels[1:]:
        (step,) = level.steps
        keep, importance = step.keep, step.importance  # type: ignore[attr-defined]
        saved = 4 * weights * (len(group.classes) - keep) // len(group.classes)
        if saved > SELECT_BYTES + INDEX_BYTES * keep:
            found.append(Level((InputChannels(keep, len(group.classes), importance),)))
    return tuple(found)


def chosen(ids: npt.NDArray[np.int64], live: Index, ranked: npt.NDArray[np.int64], keep: int) -> Index:
    """Of the ``live`` places in ``ids`` those whose class is one of the ``keep`` first that live in ``ranked``."""
    first = ranked[np.isin(ranked, ids[live])][:keep]
    return live[np.isin(ids[live], first)]


def place(model: fx.GraphModule, selections: Mapping[str, Select]) -> None:
    """Put selections before the layers at these nodes."""
    for node in list(model.graph.nodes):
        if node.name in selections:
            source, name = node.all_input_nodes[0], f"select_{node.name}"
            model.add_submodule(name, selections[node.name])
            with model.graph.inserting_before(node):
                new = model.graph.call_module(name, (source,))
            node.replace_input_with(source, new)
    model.recompile()


def behind(model: nn.Module, node: fx.Node) -> fx.Node:
    """The node whose value a layer's input is some channels of: the input itself where nothing is selected."""
    if node.op == "call_module" and isinstance(model.get_submodule(str(node.target)), Select):
        return node.all_input_nodes[0]
    return node

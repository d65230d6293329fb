"""Channels in an order in which layers that choose their inputs read neighbours: slices in the place of gathers (UPSCALE).

A tensor's channels may change places as long as all that write and read them agree: channels that stand at the same values of
the graph are exchangeable, and a permutation of them goes into the rows of the layers that make them, the columns of those that
read them and the norms between, once, when a model is exported. Outputs stay what they were, up to the order of sums.

The order is found as UPSCALE finds it, by chains: one reader after the other, always the one that shares most channels with the
one before, gets neighbouring places as long as those that have theirs keep them. What must stay in one *cell* of places is kept
as labels, a label for channels and one for places: a reader fits into a window of places that has as many of each label as its
channels have, and then both are split.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, fx, nn

from autocompress.database import LevelDatabase
from autocompress.graph import Graph, Keep, Layer
from autocompress.methods.inputs import Select
from autocompress.methods.quantization import ActivationQuant, PackedWeight
from autocompress.slicing import make_layer, slice_channelwise
from autocompress.types import Plan

STARTS = 16
"""Readers with which a chain may begin; the best chain is taken."""

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Reader:
    """A layer that reads some of a tensor's channels. ``places``: the tensor's classes in order; ``wanted``: those it reads."""

    name: str
    places: Ids
    wanted: Ids


def reordered(database: LevelDatabase, plan: Plan, deployed: fx.GraphModule) -> fx.GraphModule:
    """The deployed model of a plan with its channels in an order in which selections are slices where they can be.

    In place where nothing is selected, or nothing would become a slice. Layers whose weights depend on the places of
    their inputs (scales of groups, masks of neighbours) keep these places.
    """
    graph, keep = database.graph, database.keep(plan)
    found = _readers(database, plan, deployed)
    if any(not deployed.get_submodule(reader.name).neighbours for reader in found):
        order = arranged(found, exchangeable(graph, keep, _fixed(graph, deployed)))
        made = _permuted(graph, keep, deployed, order)
        deployed = made if slices(made) > slices(deployed) else deployed
    return _with_grids(deployed)


def slices(model: nn.Module) -> int:
    """How many selections of a model take neighbours."""
    return sum(part.neighbours for part in model.modules() if isinstance(part, Select))


def _with_grids(model: fx.GraphModule) -> fx.GraphModule:
    """What is gathered from a quantized tensor on its grid once more: the same numbers, and runtimes gather the integers."""
    parts = dict(model.named_modules(remove_duplicate=False))
    for node in list(model.graph.nodes):
        selection = parts.get(str(node.target)) if node.op == "call_module" else None
        if isinstance(selection, Select) and not selection.neighbours:
            grid = parts.get(str(node.all_input_nodes[0].target))
            if isinstance(grid, ActivationQuant):
                model.add_submodule(f"quant_{node.name}", copy.deepcopy(grid))
                with model.graph.inserting_after(node):
                    new = model.graph.call_module(f"quant_{node.name}", (node,))
                node.replace_all_uses_with(new, delete_user_cb=lambda user, new=new: user is not new)
    model.recompile()
    return model


def _readers(database: LevelDatabase, plan: Plan, model: fx.GraphModule) -> list[Reader]:
    keep, there = database.keep(plan), dict(model.named_modules())
    found = []
    for layer in database.graph.layers.values():
        selection = there.get(f"select_{layer.node}")
        if isinstance(selection, Select):
            places = layer.inputs[layer.kept_inputs(keep)]
            if len(np.unique(places)) == len(places):  # a flattened map has a channel at many places
                found.append(Reader(f"select_{layer.node}", places, places[selection.index.numpy()]))
    return found


# ---------------------------------------------------------------- which channels may change places


def exchangeable(graph: Graph, keep: Keep, fixed: Iterable[int]) -> Ids:
    """A label for each class: those with the same one may change places; what is pinned or ``fixed`` is alone.  # (n_classes,)"""
    seen: dict[int, list[tuple[str, int]]] = {}
    for node in graph.module.graph.nodes:
        if node.name in graph.values:
            ids, counts = np.unique(graph.values[node.name].ids, return_counts=True)
            for c, n in zip(ids.tolist(), counts.tolist(), strict=True):
                seen.setdefault(c, []).append((node.name, n))
    grouped = {c for group in graph.groups for c in group.classes.tolist() if keep[c]} - set(fixed)
    first: dict[tuple[tuple[str, int], ...], int] = {}
    labels = np.arange(graph.n_classes, dtype=np.int64)
    for c in sorted(grouped):
        labels[c] = first.setdefault(tuple(seen[c]), c)
    return labels


def _fixed(graph: Graph, model: nn.Module) -> set[int]:
    """Classes that are read by layers whose weights depend on where they stand."""
    found: set[int] = set()
    there = dict(model.named_modules())
    for layer in graph.layers.values():
        if layer.name in there and not _is_movable(there[layer.name], layer):
            found.update(layer.inputs.tolist(), layer.outputs.tolist())
    return found


def _is_movable(module: nn.Module, layer: Layer) -> bool:
    parts = list(module) if isinstance(module, nn.Sequential) else [module]
    ends = (parts[0], parts[-1])
    if not all(isinstance(end, nn.Conv2d | nn.Linear) for end in ends):
        return False
    grouped = getattr(parts[0], "groups", 1) > 1 and not layer.depthwise
    placed = any(getattr(end, "forms", ()) or getattr(getattr(end, "packed", None), "group", 0) for end in ends)
    return not (grouped or placed)


# ---------------------------------------------------------------- the order


def arranged(readers: list[Reader], cells: Ids) -> Ids:
    """Place of a class -> the class that stands there, such that many readers find theirs side by side.  # (n_classes,)"""
    best: tuple[int, Ids] = (-1, np.arange(len(cells)))
    for start in range(min(STARTS, len(readers))):
        channels, places, count = cells.copy(), cells.copy(), 0
        for reader in _chain(readers, start):
            if (window := _window(reader, channels, places)) is not None:
                count += 1
                _split(channels, reader.wanted)
                _split(places, window)
        if count > best[0]:
            best = count, _matched(channels, places)
    return best[1]


def _chain(readers: list[Reader], start: int) -> Iterable[Reader]:
    """Readers from one on, always the one that shares most channels with the one before."""
    left, now = [r for i, r in enumerate(readers) if i != start], readers[start]
    yield now
    while left:
        shared = [len(np.intersect1d(r.wanted, now.wanted)) for r in left]
        now = left.pop(int(np.argmax(shared)))
        yield now


def _window(reader: Reader, channels: Ids, places: Ids) -> Ids | None:
    """Neighbouring places of the reader's tensor that have as many of each label as the channels that it wants."""
    labels, where = np.unique(places[reader.places], return_inverse=True)
    n = len(reader.wanted)
    wanted = (channels[reader.wanted][:, None] == labels).sum(0)  # (n_labels,)
    sums = np.zeros((len(reader.places) + 1, len(labels)), np.int64)
    np.cumsum(np.eye(len(labels), dtype=np.int64)[where], axis=0, out=sums[1:])
    fits = np.flatnonzero((sums[n:] - sums[:-n] == wanted).all(1))
    return reader.places[fits[0] : fits[0] + n] if len(fits) else None


def _split(labels: Ids, members: Ids) -> None:
    """New labels for the members of each cell; the same for channels as for places, as both have the same cells."""
    labels[members] += labels.size * (1 + labels.max() // labels.size)


def _matched(channels: Ids, places: Ids) -> Ids:
    """Within each cell the first channel to the first place."""
    order = np.empty(len(places), np.int64)
    order[np.argsort(places, kind="stable")] = np.argsort(channels, kind="stable")
    return order


# ---------------------------------------------------------------- the same model in another order


def _permuted(graph: Graph, keep: Keep, model: fx.GraphModule, order: Ids) -> fx.GraphModule:
    made = fx.GraphModule(model, copy.deepcopy(model.graph))  # parts are shared until they are replaced
    there = dict(model.named_modules(remove_duplicate=False))
    for layer in graph.layers.values():
        if layer.name not in there:
            continue
        rows, columns = (_moved(ids[keep[ids]], order) for ids in (layer.outputs, layer.inputs))
        selection = there.get(f"select_{layer.node}")
        if isinstance(selection, Select):
            new = np.flatnonzero(np.isin(columns, selection.index.numpy()))
            made.set_submodule(f"select_{layer.node}", Select(new, selection.dim))
            before = {old: i for i, old in enumerate(selection.index.tolist())}
            columns = np.array([before[old] for old in columns[new].tolist()], np.intp)
        if not (_in_order(rows) and _in_order(columns)):
            new_layer = _layer(there[layer.name], layer, torch.from_numpy(rows), torch.from_numpy(columns))
            made.set_submodule(layer.name, new_layer)
    for name, ids in graph.channelwise.items():
        if name in there:
            made.set_submodule(name, slice_channelwise(there[name], _moved(ids[keep[ids]], order)))
    return made.eval()


def _in_order(places: npt.NDArray[np.intp]) -> bool:
    return np.array_equal(places, np.arange(len(places)))


def _moved(ids: Ids, order: Ids) -> npt.NDArray[np.intp]:
    """For each place of a tensor the place where what stands there now stood; copies of a class keep their order."""
    standing: dict[int, list[int]] = {}
    for i, c in enumerate(ids.tolist()):
        standing.setdefault(c, []).append(i)
    taken: dict[int, int] = {}
    found = []
    for c in ids.tolist():
        found.append(standing[int(order[c])][taken.get(c, 0)])
        taken[c] = taken.get(c, 0) + 1
    return np.array(found, dtype=np.intp)


def _layer(module: nn.Module, layer: Layer, rows: Tensor, columns: Tensor) -> nn.Module:
    """A deployed layer, or its factors, with its outputs and inputs in another order."""
    if not isinstance(module, nn.Sequential):
        return _part(module, rows, None if layer.depthwise else columns)
    parts = [p for p in module if isinstance(p, nn.Conv2d | nn.Linear)]
    new = {id(parts[0]): _part(parts[0], None, columns)}
    new[id(parts[-1])] = _part(parts[-1], rows, None)
    return nn.Sequential(*(new.get(id(p), p) for p in module))


def _part(part: Any, rows: Tensor | None, columns: Tensor | None) -> nn.Module:
    def taken(tensor: Tensor) -> Tensor:
        tensor = tensor if rows is None else tensor[rows]
        return tensor if columns is None else tensor[:, columns]

    bias = part.bias if rows is None or part.bias is None else part.bias.detach()[rows]
    new = make_layer(part, taken(part.weight.detach()), bias)
    packed = getattr(part, "packed", None)
    if isinstance(packed, PackedWeight):
        scale = packed.scale if rows is None else packed.scale[rows]
        new.packed = replace(packed, integers=taken(packed.integers), scale=scale)  # type: ignore[assignment]
    return new

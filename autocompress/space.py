"""Sites x methods -> the search space of a model.

Group sites say *which* channels and blocks live, layer sites say *how* a surviving weight is stored and run, so methods
compose without a product space a layer.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import cast

import numpy as np
from torch import Tensor, nn

from autocompress.errors import UnknownName, UsageError
from autocompress.graph import Graph, Group, Layer
from autocompress.methods import (
    CUR,
    UDFC,
    BiLLM,
    BlockDrop,
    CalibratedInt8,
    ChannelPruning,
    Factored,
    GroupedSVD,
    Lookup,
    LowRank,
    OutputFeatures,
    RateDistortion,
    Sparse,
    SpQR,
    StaticInt8,
    TensorTrain,
    Tucker2,
    UDFCQuant,
    WeightQuant,
    handler_of,
)
from autocompress.methods.grouped import best_split
from autocompress.methods.inputs import input_levels, readers
from autocompress.methods.pq import sap_sparsities
from autocompress.methods.pruning import width_levels
from autocompress.methods.sparsity import By
from autocompress.results import ALL_FAMILIES, METHOD_FAMILIES, Importance
from autocompress.types import Kernel, Level, SearchSpace, Site

MIN_FACTORED = 1024
"""Layers with fewer weights get no low-rank levels: two tiny operators cost more than one."""
FACTORED = (0.5, 0.25)
"""Shares of the weights that every form of factorization is offered at."""
GROUP_4BIT = 32
GROUP_WIDE = 64
"""Inputs with one scale at 2 and 3 bits: half a bit a weight for it."""
ROUNDED: dict[str, tuple[WeightQuant, ...]] = {
    "w8": (WeightQuant(8),),
    "w4": (WeightQuant(4, GROUP_4BIT, "gptq", "full"),),
    "w3": (WeightQuant(3, GROUP_WIDE, "gptq", "full"), WeightQuant(3, 0, "gptq", "full")),
    "w2": (WeightQuant(2, GROUP_WIDE, "gptq", "full"), WeightQuant(2, 0, "gptq", "full")),
    "w4-nearest": (WeightQuant(4, GROUP_4BIT, grid="full"),),
    "w3-nearest": (WeightQuant(3, GROUP_WIDE, grid="full"), WeightQuant(3, grid="full")),
    "w2-nearest": (WeightQuant(2, GROUP_WIDE, grid="full"), WeightQuant(2, grid="full")),
    "w4-udfc": (UDFCQuant(4, GROUP_4BIT, grid="full"), UDFCQuant(4, grid="full")),
    "w3-udfc": (UDFCQuant(3, GROUP_WIDE, grid="full"), UDFCQuant(3, grid="full")),
}
INT8: dict[str, StaticInt8] = {
    "int8": StaticInt8(),
    "int8-percentile": CalibratedInt8("percentile"),
    "int8-mse": CalibratedInt8("mse"),
    "int8-entropy": CalibratedInt8("entropy"),
}
"""One of them in a search: a tensor between two layers has one range."""
SPARSITIES = (0.5, 0.6, 0.7, 0.8, 0.9)
PATTERNS = ((2, 4), (4, 8))
"""So many weights live of so many neighbours."""
SPARSE_BY: dict[str, By] = {
    "sparse": "sparsegpt",
    "sparse-obc": "obc",
    "sparse-magnitude": "magnitude",
    "sparse-chita": "chita",
    "sparse-fisher": "fisher",
}
SAP_ROUNDS = (8, 16, 32, 64, 128)
"""After which a layer's sparsity by its PQ index becomes a level: of normal weights 44, 57, 70, 81 and 90 %."""
RATE_STEPS = (15, 7, 3)
"""Integers either way that weights have before they are packed: about 4.3, 3.2 and 2 bits each."""


def make_space(
    graph: Graph,
    families: Collection[str] = METHOD_FAMILIES,
    importance: Importance = "obs",
    minimum: int = MIN_FACTORED,
) -> SearchSpace:
    """The space of the chosen families; raises if nothing is left. ``minimum``: weights of the smallest factorized layer."""
    for family in families:
        if family not in ALL_FAMILIES:
            raise UnknownName("method family", family, ALL_FAMILIES)
    if len(named := [family for family in INT8 if family in families]) > 1:
        raise UsageError(f"A tensor has one range: name one of {', '.join(named)}.")
    found: list[tuple[Site, tuple[Level, ...]]] = []
    if "udfc" in families and "channels" in families:
        raise UsageError("Channels are pruned with data ('channels') or without ('udfc'); name one of the two.")
    if "udfc" in families and "width" in families:
        raise UsageError("The hidden width ('width') is pruned with data, and 'udfc' takes none; name one of the two.")
    kind: type[ChannelPruning] = UDFC if "udfc" in families else ChannelPruning
    for group in graph.groups:
        if not ({"width"} if group.carried else {"channels", "udfc"}) & set(families):
            continue
        levels = width_levels(len(group.classes), importance, _copies(graph, group), kind)
        members = tuple(dict.fromkeys((*group.producers, *group.consumers, *group.carried)))
        macs, params = _totals(graph, group.producers)
        site = Site(f"channels:{group.name}", "channels", members, len(group.classes), (), macs, params)
        found.append((site, levels))
    if "inputs" in families:
        if "udfc" in families:
            raise UsageError("Inputs are chosen with data, and 'udfc' does without; name one of 'inputs' and 'udfc'.")
        for name, group in readers(graph).items():
            width, weights = len(group.classes), _weight(graph, graph.layers[name]).numel()
            macs, params = _totals(graph, (name,))
            site = Site(f"inputs:{name}", "channels", (name,), width, (), macs, params)
            found.append((site, input_levels(group, weights, width_levels(width, importance))))
    if "blocks" in families:
        for block in graph.blocks:
            members = tuple(layer.name for layer in graph.layers.values() if layer.node in block.body)
            macs, params = _totals(graph, members)
            site = Site(f"block:{block.name}", "block", members, 1, (), macs, params)
            found.append((site, (Level(), Level((BlockDrop(),)))))
    for layer in graph.layers.values():
        macs, params = _totals(graph, (layer.name,))
        shape = tuple(_weight(graph, layer).shape)
        site = Site(f"layer:{layer.name}", "layer", (layer.name,), 1, shape, macs, params)
        found.append((site, layer_levels(graph, layer, families, minimum)))
    found = [(site, levels) for site, levels in found if len(levels) > 1]
    if not found:
        raise UsageError(
            f"The methods {', '.join(families)} find nothing to choose in this model "
            f"({len(graph.layers)} convolution and linear layers); allow more of {', '.join(ALL_FAMILIES)}."
        )
    return SearchSpace(tuple(site for site, _ in found), tuple(levels for _, levels in found))


def _copies(graph: Graph, group: Group) -> int:
    """Output channels of its narrowest producer that each channel of a group stands for."""
    counts = [int(np.isin(graph.layers[name].outputs, group.classes).sum()) for name in group.producers]
    return max(1, min(counts) // len(group.classes))


def layer_levels(
    graph: Graph, layer: Layer, families: Collection[str], minimum: int = MIN_FACTORED
) -> tuple[Level, ...]:
    """(rank, format) choices of one layer, dense first."""
    module = graph.module.get_submodule(layer.name)
    levels = [Level()]
    factored: list[LowRank] = []
    if "lowrank" in families and not layer.depthwise and _weight(graph, layer).numel() >= minimum:
        factored = [LowRank(ratio) for ratio in FACTORED]
        if isinstance(module, nn.Conv2d) and min(module.kernel_size) > 1 and not isinstance(module.padding, str):
            factored.append(LowRank(0.5, "spatial"))
        levels += [Level((method,)) for method in factored]
    levels += [Level((method,)) for method in _factorizations(graph, layer, families, minimum)]
    for family, int8 in INT8.items():
        if family in families:
            levels.append(Level((int8,)))
            levels += [Level((method, int8)) for method in factored[:1]]
    rounded = [step for family, steps in ROUNDED.items() if family in families for step in steps]
    levels += [Level((step,)) for step in rounded]
    if "lut" in families:
        levels += [Level((Lookup(4),)), Level((Lookup(3),)), Level((Lookup(2),))]
    if "spqr" in families:
        levels += [Level((SpQR(4),)), Level((SpQR(3),)), Level((SpQR(2),))]
    if "billm" in families:
        levels.append(Level((BiLLM(),)))
    for family, by in SPARSE_BY.items():
        if family in families:
            levels += [Level((Sparse(sparsity, by=by),)) for sparsity in SPARSITIES]
            levels += [Level((Sparse(keep / of, keep, of, by),)) for keep, of in PATTERNS]
            levels += [Level((Sparse(SPARSITIES[0], by=by), step)) for step in rounded if step.fitted]
    if "sparse-pq" in families:
        shares = dict.fromkeys(round(share, 2) for share in sap_sparsities(_weight(graph, layer), SAP_ROUNDS))
        levels += [level for share in shares if 0 < share < 1 and (level := Level((Sparse(share),))) not in levels]
    if "rate" in families:
        levels += [Level((RateDistortion(steps), WeightQuant(8))) for steps in RATE_STEPS]
    return tuple(levels)


def _factorizations(graph: Graph, layer: Layer, families: Collection[str], minimum: int) -> list[Factored]:
    """Forms other than ``lowrank`` that one layer can have and that save weights or multiplications."""
    module, weight = graph.module.get_submodule(layer.name), _weight(graph, layer)
    if layer.depthwise or weight.numel() < minimum:
        return []
    found: list[Factored] = []
    for ratio in FACTORED:
        if "lord" in families:
            found.append(OutputFeatures(ratio))
        if "cur" in families:
            found.append(CUR(ratio, columns=False))
        if isinstance(module, nn.Conv2d):
            if "tucker" in families and max(module.kernel_size) > 1:
                found.append(Tucker2(ratio))
            if "grouped" in families and (groups := best_split(weight, ratio)) > 1:
                found.append(GroupedSVD(ratio, groups))
        elif "mpo" in families and layer.norm is None:  # a norm's factors go into rows, and cores have none
            found.append(TensorTrain(ratio))
    if isinstance(module, nn.Conv2d) and isinstance(module.padding, str):
        return []
    kernel = _kernel(graph, layer)
    return [method for method in found if saves(method, kernel)]


def saves(method: Factored, kernel: Kernel) -> bool:
    """Whether a factorization has fewer weights, hence bytes, or fewer multiplications; the cost tables know the rest."""
    handler = handler_of(method)
    assert handler is not None
    parts = handler.lower(method, kernel)
    return sum(p.weights for p in parts) < kernel.weights or sum(p.macs for p in parts) < kernel.macs


def _kernel(graph: Graph, layer: Layer) -> Kernel:
    """The dense layer as hardware sees it, for one example."""
    module, weight = graph.module.get_submodule(layer.name), _weight(graph, layer)
    before, after = graph.values[layer.source].shape, graph.values[layer.node].shape
    n_out, n_in = weight.shape[:2]
    if isinstance(module, nn.Conv2d):
        size, stride = cast("tuple[int, int]", module.kernel_size), cast("tuple[int, int]", module.stride)
        return Kernel("conv", (n_in, *before[2:]), (n_out, *after[2:]), size, stride)
    rows = math.prod(after[1:-1])
    return Kernel("linear", (n_in, rows), (n_out, rows))


def _weight(graph: Graph, layer: Layer) -> Tensor:
    return cast(Tensor, graph.module.get_submodule(layer.name).weight)


def _totals(graph: Graph, names: Collection[str]) -> tuple[int, int]:
    """MACs and parameters of the dense layers, for one example."""
    macs = params = 0
    for name in names:
        weight, shape = _weight(graph, graph.layers[name]), graph.values[graph.layers[name].node].shape
        positions = math.prod(shape[2:] if weight.ndim == 4 else shape[1:-1])
        macs += weight.numel() * positions
        params += weight.numel()
    return macs, params

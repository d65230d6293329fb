"""What the levels of channels and blocks do to the outputs behind them: a first guess of what plans lose, before any is judged.

Layers that read removed channels lose ``|W x - W' x'|^2 / Var(W x)``, where ``W'`` is the refit on the channels that are left:
all of it is in the Gram matrices, so that no example is run. Where channels are made and read within one residual branch, the
error counts by the share that the branch has of the sum, ``|branch|^2 / |skip + branch|^2``, and a dropped block costs that
share. Channels of the stream itself are lost to all that comes after, so that every reader's error counts whole. Methods of
single layers have no such guess here: it would take making every level.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, fx

from autocompress.blocks import Block
from autocompress.database import LevelDatabase
from autocompress.gram import columns_of
from autocompress.graph import Layer
from autocompress.search.tables import switch
from autocompress.types import LevelErrors, Plan

EXAMPLES = 8
"""On which the shares of residual branches are measured; every position of an image or text counts."""


def level_errors(database: LevelDatabase) -> LevelErrors:
    """Site -> the relative error of each of its levels, dense first; sites of which nothing is known are left out.

    Made once a space and kept beside the Gram matrices.
    """

    def measure() -> dict[str, Tensor]:
        return {str(site): torch.tensor(errors, dtype=torch.float64) for site, errors in _measured(database)}

    found = database.kept(f"output_errors_{database.space.hash}", measure)
    return {int(site): tuple(row.tolist()) for site, row in found.items()}


def _measured(database: LevelDatabase) -> Iterator[tuple[int, list[float]]]:
    space, graph = database.space, database.graph
    shares = _shares(database)
    for site, (where, levels) in enumerate(zip(space.sites, space.levels, strict=True)):
        if where.kind == "block":
            yield site, [0.0, *(shares[where.name.removeprefix("block:")] for _ in levels[1:])]
        elif where.kind == "channels":
            layers = [graph.layers[name] for name in where.members if name in graph.layers]
            readers = [layer for layer in layers if not layer.depthwise and database.gram(layer.name) is not None]
            nodes = {layer.node for layer in layers}
            share = next((shares[block.name] for block in graph.blocks if nodes <= block.body), 1.0)
            plans = [switch(space.dense, site, level) for level in range(1, len(levels))]
            lost = [share * sum(_lost(database, plan, reader) for reader in readers) for plan in plans]
            if any(lost):
                yield site, [0.0, *lost]


def _shares(database: LevelDatabase) -> dict[str, float]:
    """Block -> how much of its sum's squares are the branch's, in the original."""
    blocks, task = database.graph.blocks, database.task
    if not blocks:
        return {}
    module = database.graph.module
    run = fx.Interpreter(module, garbage_collect_values=False)
    with torch.inference_mode():
        run.run(task.inputs(task.calibration.take(EXAMPLES)))
    squares = {node.name: _squares(value) for node, value in run.env.items() if isinstance(value, Tensor)}
    inputs = {node.name: [source.name for source in node.all_input_nodes] for node in module.graph.nodes}
    return {b.name: squares[_branch(inputs, b)] / squares[b.add] for b in blocks}


def _branch(inputs: Mapping[str, Sequence[str]], block: Block) -> str:
    return next(name for name in inputs[block.add] if name != block.skip)


def _squares(value: Tensor) -> float:
    return max(float(value.double().square().sum()), 1e-12)


def _lost(database: LevelDatabase, plan: Plan, layer: Layer) -> float:
    """``|W x - W' x'|^2 / Var(W x)`` of a layer behind the channels that a plan leaves, refitted."""
    columns = database.inputs(plan, layer, database.keep(plan))
    if len(columns) == len(layer.inputs):
        return 0.0
    (weight, bias), (left, left_bias) = database.folded(layer.name), database.refitted(layer, columns)
    gram = database.gram(layer.name)
    assert gram is not None
    second = gram.double()
    whole = torch.cat([weight.flatten(1), bias[:, None]], 1).double()
    change = whole.clone()
    change[:, columns_of(columns, weight[0, 0].numel())] -= left.flatten(1).double()
    change[:, -1] -= left_bias.double()
    variance = ((whole @ second) * whole).sum() - (whole @ second[:, -1]).square().sum()
    return float(((change @ second) * change).sum() / variance.clamp_min(1e-12))

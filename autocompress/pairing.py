"""What in a plan's live model stands for what in the original: for teaching more than outputs.

A live model has the original's nodes under the same names, fewer channels and perhaps fewer blocks.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from autocompress.blocks import Block
from autocompress.database import LevelDatabase
from autocompress.graph import Graph, aliases
from autocompress.methods import Sparse
from autocompress.op_kinds import is_relu
from autocompress.types import Plan


@dataclass(frozen=True, eq=False)
class Hint:
    """A value of the original (``theirs``) and the live model's node that stands for it (``mine``).

    ``kept``: which of the original's channels along ``dim`` the live model has.  # (channels left,)
    """

    theirs: str
    mine: str
    dim: int
    kept: Tensor


@dataclass(frozen=True, eq=False)
class Unit:
    """Blocks of the original, from the value ``start`` to the value ``end``, and the live model's nodes that stand for these."""

    start: str
    end: str
    mine_start: str
    mine_end: str


@dataclass(frozen=True, eq=False)
class Pairing:
    """``hints``: values behind residual blocks, or of every layer where there are none; ``maps``: attention's nodes, their
    ``kept`` being heads; ``units``: what Theseus exchanges; ``sparse``: a layer's name -> its level, and what it
    and its norm would be without it; ``of``: what was paired, for recipes that begin from the original."""

    hints: tuple[Hint, ...] = ()
    maps: tuple[Hint, ...] = ()
    units: tuple[Unit, ...] = ()
    sparse: Mapping[str, tuple[Sparse, Mapping[str, nn.Module]]] = field(default_factory=dict)
    of: tuple[LevelDatabase, Plan] | None = None


def pair(database: LevelDatabase, plan: Plan) -> Pairing:
    """The pairing of a plan's live model with the original."""
    graph, keep, dropped = database.graph, database.keep(plan), database.dropped(plan)
    stands_for = aliases(graph, dropped)
    gone = {name for block in graph.blocks if block.name in dropped for name in block.body} | set(stands_for)

    def hint(name: str, ids_of: str) -> Hint:
        value = graph.values[ids_of]
        return Hint(name, name, value.dim, torch.from_numpy(keep[value.ids]).nonzero().flatten())

    ends = [_end(graph, block) for block in graph.blocks]
    behind = ends or [layer.result for layer in graph.layers.values()]
    nodes = {node.name: node for node in graph.module.graph.nodes}
    final = {node.name for node in nodes.values() if any(user.op == "output" for user in node.users)}
    hints = [hint(name, name) for name in dict.fromkeys(behind) if name not in gone | final]
    maps = [
        hint(node.name, node.args[0].name)
        for node in nodes.values()
        if node.target is F.scaled_dot_product_attention and node.name not in gone
    ]
    units, sparse = _units(graph, keep, dropped, stands_for), _sparse(database, plan)
    return Pairing(tuple(hints), tuple(maps), units, sparse, (database, plan))


def _end(graph: Graph, block: Block) -> str:
    """Where a block's sum, with the ReLU behind it, is."""
    node = next(node for node in graph.module.graph.nodes if node.name == block.add)
    users = list(node.users)
    return users[0].name if len(users) == 1 and is_relu(graph.module, users[0]) else block.add


def _units(graph: Graph, keep: Any, dropped: Iterable[str], stands_for: Mapping[str, str]) -> tuple[Unit, ...]:
    """A block that lives together with the dropped ones behind it, where all channels live before and after."""
    names, found = set(dropped), list[tuple[str, str]]()
    for block in graph.blocks:
        if block.name not in names:
            found.append((block.skip, _end(graph, block)))
        elif found and found[-1][1] == block.skip:
            found[-1] = (found[-1][0], _end(graph, block))

    def whole(name: str) -> bool:
        return bool(keep[graph.values[name].ids].all())

    return tuple(
        Unit(start, end, stands_for.get(start, start), stands_for.get(end, end))
        for start, end in found
        if whole(start) and whole(end)
    )


def _sparse(database: LevelDatabase, plan: Plan) -> dict[str, tuple[Sparse, Mapping[str, nn.Module]]]:
    """Layers whose level is sparse, and the dense ones in the same form."""
    found: dict[str, tuple[Sparse, Mapping[str, nn.Module]]] = {}
    keep = database.keep(plan)
    for layer in database.graph.layers.values():
        step = next((s for s in database.layer_steps(plan, layer.name) if isinstance(s, Sparse)), None)
        if step is None:
            continue
        columns = database.inputs(plan, layer, keep)
        rows = torch.from_numpy(layer.kept_outputs(keep))
        pruned = len(columns) < len(layer.inputs) and not layer.depthwise
        weight, bias = database.refitted(layer, columns) if pruned else database.folded(layer.name)
        context = database.context(layer, columns, weight)
        found[layer.name] = step, database.neutral(layer, weight[rows], bias[rows], context, ())
    return found


# ---------------------------------------------------------------- models that answer more, or with others' parts


def tapped(model: fx.GraphModule, values: Sequence[str] = (), maps: Sequence[str] = ()) -> fx.GraphModule:
    """``model`` that returns ``(outputs, {node: value}, {attention's node: log probabilities (n, heads, t, t)})``.

    It shares its parts with ``model``; names that ``model`` does not have are left out.
    """
    graph = copy.deepcopy(model.graph)
    nodes = {node.name: node for node in graph.nodes}
    seen = {name: nodes[name] for name in values if name in nodes}
    logs = {}
    for name in maps:
        if name in nodes:
            with graph.inserting_after(nodes[name]):
                logs[name] = graph.call_function(attention_log, nodes[name].args, dict(nodes[name].kwargs))
    output = next(node for node in graph.nodes if node.op == "output")
    output.args = ((output.args[0], seen, logs),)
    return fx.GraphModule(model, graph).eval()


def attention_log(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Log probabilities that ``scaled_dot_product_attention`` weighs values with.  # (n, heads, t, d) -> (n, heads, t, t)"""
    if enable_gqa:
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = (q.float() @ k.float().transpose(-2, -1)) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
    elif attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    return F.log_softmax(scores, -1)


def with_originals(live: fx.GraphModule, original: fx.GraphModule, units: Sequence[Unit]) -> fx.GraphModule:
    """``live`` with the original's own blocks in some units, in the graph's order; all parts are shared."""
    graph = copy.deepcopy(live.graph)
    mine, theirs = ({node.name: node for node in g.nodes} for g in (graph, original.graph))
    parts: dict[str, Any] = {}
    for node in graph.nodes:
        if node.op in ("call_module", "get_attr"):
            parts[str(node.target)] = _attribute(live, str(node.target))
    for unit in units:
        end = mine[unit.mine_end]
        known = {theirs[unit.start]: mine[unit.mine_start]}
        users = list(end.users)
        with graph.inserting_before(end.next):
            new = _copied(theirs[unit.end], known, graph, original, parts)
        for user in users:
            user.replace_input_with(end, new)
        mine[unit.mine_end] = new  # the next unit may start here
    for node in reversed(graph.nodes):
        if not node.users and node.op not in ("placeholder", "output"):
            graph.erase_node(node)
    return fx.GraphModule(parts, graph).eval()


def _copied(
    node: fx.Node, known: dict[fx.Node, fx.Node], graph: fx.Graph, original: nn.Module, parts: dict[str, Any]
) -> fx.Node:
    """A node of the original and all that it reads, up to what is known."""
    if node in known:
        return known[node]
    for source in node.all_input_nodes:
        _copied(source, known, graph, original, parts)
    new = graph.node_copy(node, lambda n: known[n])
    if node.op in ("call_module", "get_attr"):
        new.target = f"original.{node.target}"
        parts[new.target] = _attribute(original, str(node.target))
    known[node] = new
    return new


def _attribute(root: nn.Module, target: str) -> Any:
    found: Any = root
    for part in target.split("."):
        found = getattr(found, part)
    return found

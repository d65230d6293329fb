"""Residual blocks: branches of a traced graph that can be dropped, because an addition has their input on its other side."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import fx, nn

from autocompress.channel_rules import Value
from autocompress.op_kinds import call_target


@dataclass(frozen=True)
class Block:
    """A residual branch: ``add`` reads ``skip`` and the branch's last node; ``body`` are the nodes in between."""

    name: str
    add: str
    skip: str
    body: frozenset[str]


def find_blocks(module: fx.GraphModule, values: Mapping[str, Value]) -> tuple[Block, ...]:
    """Additions one of whose sides is the other's own input, with a branch that nobody else reads."""
    blocks = []
    for node in module.graph.nodes:
        if call_target(module, node) not in (operator.add, torch.add, "add") or len(node.all_input_nodes) != 2:
            continue
        if node.kwargs:  # torch.add(x, y, alpha=...) is more than a sum
            continue
        for skip, last in (node.all_input_nodes, node.all_input_nodes[::-1]):
            body = _branch(skip, last)
            if body is None or values[skip.name].shape != values[node.name].shape:
                continue
            if all(user is node or user.name in body for part in body.values() for user in part.users):
                modules = [p for p in body.values() if p.op == "call_module"]
                layers = [p for p in modules if isinstance(call_target(module, p), nn.Conv2d | nn.Linear)]
                first = next(iter(layers or modules), node)
                prefix = str(first.target).rpartition(".")[0] or node.name
                blocks.append(Block(prefix, node.name, skip.name, frozenset(body)))
                break
    counts: dict[str, int] = {}
    named = []
    for block in blocks:
        seen = counts[block.name] = counts.get(block.name, 0) + 1
        named.append(block if seen == 1 else Block(f"{block.name}#{seen}", block.add, block.skip, block.body))
    return tuple(named)


def _branch(skip: fx.Node, last: fx.Node) -> dict[str, fx.Node] | None:
    """Nodes between ``skip`` and ``last`` if every path back from ``last`` ends in ``skip`` (constants aside)."""
    body: dict[str, fx.Node] = {}
    stack = [last]
    while stack:
        node = stack.pop()
        if node is skip or node.name in body:
            continue
        if node.op == "placeholder":
            return None
        body[node.name] = node
        stack.extend(node.all_input_nodes)
    return dict(sorted(body.items())) if any(node.op == "call_module" for node in body.values()) else None

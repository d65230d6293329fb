"""Structured pruning: channels of coupled groups by importance, and whole residual branches.

``importance="obs"`` (default) orders channels by what removing one adds to the output error of the layers that read it, *after*
the remaining weights make good what they can: structured Optimal Brain Surgeon, one channel after the other (Hassibi & Stork
1993; Kurtic et al. 2023, ZipLM). From Gram matrices alone. All other orders are scores: ``importance.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from autocompress.graph import Graph, Group
from autocompress.methods.importance import Scores, l2_importance, positions_of
from autocompress.results import Importance
from autocompress.types import Level, MethodConfig


@dataclass(frozen=True)
class ChannelPruning(MethodConfig):
    """Keep the ``keep`` most important channels of a group of ``width``; the sets are nested."""

    keep: int
    width: int
    importance: Importance = "obs"

    def describe(self) -> str:
        return f"keep {self.keep}/{self.width}"


@dataclass(frozen=True)
class BlockDrop(MethodConfig):
    """Replace a residual block ``x + f(x)`` by ``x``."""

    def describe(self) -> str:
        return "drop"


def width_levels(
    width: int, importance: Importance, copies: int = 1, kind: type[ChannelPruning] = ChannelPruning
) -> tuple[Level, ...]:
    """Widths in steps of ``max(4, width / 8)`` channels, down to a multiple of 4 (others can be slower than wider ones), dense
    first; device-neutral, so a plan means the same everywhere.

    ``copies``: channels that one of them stands for (an attention head's are many); then single ones may go.
    """
    least = max(1, 4 // copies)
    step = max(least, width // 8)
    even = (k // least * least for k in range(width - step, 0, -step))
    keeps = dict.fromkeys(k for k in even if k >= least)
    return (Level(), *(Level((kind(k, width, importance),)) for k in keeps))


def obs_order(
    graph: Graph,
    group: Group,
    folded: Callable[[str], tuple[Tensor, Tensor]],
    gram: Callable[[str], Tensor | None],
    ridge: float = 1e-4,
) -> npt.NDArray[np.int64]:
    """Positions in the group, most important first: the last one removed stands first.  # (len(group.classes),)

    With ``G = (H + ridge I)^-1`` and ``P`` all unfolded inputs of one channel, removing it costs
    ``tr(W_P (G_PP)^-1 W_P^T)``; then ``W -= W_P (G_PP)^-1 G_P``, ``G -= G_:P (G_PP)^-1 G_P:``. Costs are relative to the layer's
    output energy and summed over the layers that read the group; layers without a Gram matrix take no part.
    """
    position = positions_of(graph, group)
    readers = [_Surgeon(*folded(name), h, position[graph.layers[name].inputs], ridge)
               for name in group.consumers if not graph.layers[name].depthwise and (h := gram(name)) is not None]  # fmt: skip
    if not readers:
        return np.argsort(-l2_importance(graph, group), kind="stable").astype(np.int64)
    alive, removed = list(range(len(group.classes))), []
    while len(alive) > 1:
        costs = np.sum([reader.costs(len(group.classes)) for reader in readers], axis=0)
        worst = min(alive, key=lambda channel: (costs[channel], channel))
        alive.remove(worst)
        removed.append(worst)
        for reader in readers:
            reader.remove(worst)
    return np.array(alive + removed[::-1], dtype=np.int64)


class _Surgeon:
    """One reading layer's weights and inverse Gram matrix while channels are removed.

    ``inputs``: unfolded inputs of each channel of the group, all its copies together (a head's are many).  # (n, p)
    """

    def __init__(
        self, weight: Tensor, bias: Tensor, gram: Tensor, position: npt.NDArray[np.int64], ridge: float
    ) -> None:
        area, n = weight[0, 0].numel(), int(position.max()) + 1
        h = gram.double()
        self.weight = torch.cat([weight.flatten(1), bias[:, None]], dim=1).double()
        self.energy = float(((self.weight @ h) * self.weight).sum().clamp_min(1e-12))
        if len(self.weight) > len(h):  # costs depend on W^T W alone, and so a smaller root of it serves
            self.weight = torch.linalg.qr(self.weight, mode="r").R
        damp = ridge * h.diagonal()[:-1].mean().clamp_min(1e-12)
        self.inverse = torch.linalg.inv(h + damp * torch.eye(len(h), dtype=h.dtype))
        found = np.flatnonzero(position >= 0)
        places = torch.from_numpy(found[np.argsort(position[found], kind="stable")].reshape(n, -1))  # as often each
        self.inputs = (places[:, :, None] * area + torch.arange(area)).flatten(1)
        self.alive = np.ones(n, dtype=bool)

    def costs(self, n: int) -> Scores:
        """Cost of removing each channel of the group now.  # (n,)"""
        where = np.flatnonzero(self.alive)
        total = np.zeros(n)
        index = self.inputs[torch.from_numpy(where)]  # (m, p)
        blocks = self.inverse[index[:, :, None], index[:, None, :]]  # (m, p, p)
        weights = self.weight[:, index].permute(1, 2, 0)  # (m, p, out)
        cost = (torch.linalg.solve(blocks, weights) * weights).sum((1, 2)) / self.energy
        total[where] = cost.numpy()
        return total

    def remove(self, channel: int) -> None:
        p = self.inputs[channel]
        solved = torch.linalg.solve(self.inverse[p[:, None], p], self.inverse[p])  # (p, d)
        self.weight = self.weight - self.weight[:, p] @ solved
        self.inverse = self.inverse - self.inverse[:, p] @ solved
        self.inverse[p[:, None], p] = torch.eye(len(p), dtype=self.inverse.dtype)
        self.alive[channel] = False

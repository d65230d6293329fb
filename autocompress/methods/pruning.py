"""Structured pruning: channels of coupled groups by importance, and whole residual branches.

Importance scores a channel over *all* layers that read or write it, so that coupled layers agree on one order:

* ``l2``: sum over members of the squared L2 norm of the channel's weights, each member scaled to mean 1 (Li et al. 2017,
  group form of Fang et al. 2023);
* ``obs`` (default): what removing the channel adds to the output error of the layers that read it, *after* the remaining
  weights make good what they can: structured Optimal Brain Surgeon, one channel after the other (Hassibi & Stork 1993;
  Kurtic et al. 2023, ZipLM). From Gram matrices alone;
* ``taylor``: mean over examples of ``(sum_w g * w)^2`` at the layers that read it, with ``g`` the gradient of the task's
  loss (Molchanov et al. 2019, eq. 8): the squared first-order change of the loss when the channel is zeroed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from autocompress.graph import Graph, Group
from autocompress.results import Importance
from autocompress.tasks.augment import images_first
from autocompress.types import Level, MethodConfig

Scores = npt.NDArray[np.float64]


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


def width_levels(width: int, importance: Importance, copies: int = 1) -> tuple[Level, ...]:
    """Widths in steps of ``max(4, width / 8)`` channels, dense first; device-neutral, so a plan means the same everywhere.

    ``copies``: channels that one of them stands for (an attention head's are many); then single ones may go.
    """
    least = max(1, 4 // copies)
    step = max(least, width // 8)
    keeps = [k for k in range(width - step, 0, -step) if k >= min(least, width)]
    return (Level(), *(Level((ChannelPruning(k, width, importance),)) for k in keeps))


def l2_importance(graph: Graph, group: Group) -> Scores:
    """Sum over members of squared channel norms, each member scaled to mean 1.  # (len(group.classes),)"""
    total = np.zeros(len(group.classes))
    position = _positions(graph, group)
    for name in dict.fromkeys((*group.producers, *group.consumers)):
        layer = graph.layers[name]
        weight = _weight(graph.module.get_submodule(name)).detach().double()
        squared = weight.pow(2).flatten(2).sum(2) if weight.ndim > 2 else weight.pow(2)  # (out, in)
        for ids, norms in ((layer.outputs, squared.sum(1)), (layer.inputs, squared.sum(0))):
            if layer.depthwise and ids is layer.inputs:
                continue
            part = _scatter(ids, norms.numpy(), position, len(total))
            if part.any():
                total += part / part.mean()
    return total


def taylor_importance(
    graph: Graph, groups: Iterable[Group], batches: Iterable[tuple[Tensor, Tensor]], loss: nn.Module | object
) -> dict[str, Scores]:
    """First-order Taylor scores of all groups in one pass over labelled batches.

    A gate of ones multiplies the input channels of every reading layer; ``(dL/dgate)^2`` is accumulated for each example:
    with the loss summed over the batch, ``dL/dgate[n, c] = sum_hw x * dL/dx``.
    """
    model = graph.module
    groups = list(groups)
    readers = {name for group in groups for name in group.consumers if not graph.layers[name].depthwise}
    totals = {name: np.zeros(len(graph.layers[name].inputs)) for name in readers}
    saved: dict[str, Tensor] = {}

    def keep_input(name: str):  # type: ignore[no-untyped-def]
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            x = inputs[0].detach().requires_grad_(True) if not inputs[0].requires_grad else inputs[0]
            x = x * 1.0
            x.retain_grad()
            saved[name] = x
            return (x, *inputs[1:])

        return hook

    handles = [model.get_submodule(name).register_forward_pre_hook(keep_input(name)) for name in readers]
    try:
        with torch.enable_grad():
            for inputs, targets in batches:
                saved.clear()
                inputs = (
                    images_first(inputs).clone().requires_grad_(inputs.is_floating_point())
                )  # token ids have no gradient
                value = loss(model(inputs), targets)  # type: ignore[operator]
                (value * len(inputs)).backward()
                for name, x in saved.items():
                    assert x.grad is not None
                    gate = (x * x.grad).detach()  # (n, c, h, w) or (n, ..., c)
                    dims = (2, 3) if gate.ndim == 4 else tuple(range(1, gate.ndim - 1))
                    per_example = gate.sum(dims) if dims else gate
                    totals[name] += per_example.double().pow(2).sum(0).numpy()
    finally:
        for handle in handles:
            handle.remove()
    scores = {}
    for group in groups:
        position = _positions(graph, group)
        scores[group.name] = np.sum(
            [
                _scatter(graph.layers[name].inputs, totals[name], position, len(group.classes))
                for name in group.consumers
                if name in totals
            ],
            axis=0,
        )
    return scores


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
    position = _positions(graph, group)
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


def _weight(layer: nn.Module) -> Tensor:
    return layer.weight  # type: ignore[return-value]


def _positions(graph: Graph, group: Group) -> npt.NDArray[np.int64]:
    """Class -> position in the group, -1 elsewhere."""
    position = np.full(graph.n_classes, -1, dtype=np.int64)
    position[group.classes] = np.arange(len(group.classes))
    return position


def _scatter(ids: npt.NDArray[np.int64], values: Scores, position: npt.NDArray[np.int64], n: int) -> Scores:
    where = position[ids]
    return np.asarray(np.bincount(where[where >= 0], weights=values[where >= 0], minlength=n), dtype=np.float64)

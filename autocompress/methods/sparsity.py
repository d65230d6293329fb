"""Unstructured and N:M sparsity: single weights are zero, the others may move to make that good. Simulated: the exact masked
layer runs as a dense one.

* ``magnitude``: the smallest weights go, the others stay as they are (Han et al. 2015);
* ``sparsegpt`` (default): column blocks; in each, the weights with the least ``w^2 / U_jj^2`` go, and the columns on the right
  make good what is lost, ``H^-1 = U^T U`` (Frantar & Alistarh 2023);
* ``obc``: exact Optimal Brain Surgeon, row by row: the weight with the least ``w_p^2 / [H^-1]_pp`` goes, the row's others take
  ``-(w_p / [H^-1]_pp) H^-1_{:,p}``, and ``H^-1`` loses p; how many go from each row is decided over the whole layer by these
  losses (Frantar et al. 2022). It costs ``rows * n^3``: larger layers than :data:`OBC_WORK` get ``sparsegpt``;
* ``chita``: which weights live is searched for the layer as a whole by hard thresholding, and those that do are solved for
  exactly (Benbaki et al. 2023, ``chita.py``); larger layers than :data:`CHITA_WORK` get ``sparsegpt``;
* ``fisher``: by what the task's loss feels, from gradients of examples (oBERT, Kurtic et al. 2022, ``fisher.py``); without
  gradients (factors of a layer) ``sparsegpt``.

Losses of different output channels compare behind the folded norm: handlers get folded weights. A layer without a Gram matrix
(depthwise, very wide) is pruned by magnitude. N:M counts among M consecutive input channels at one kernel position.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from math import ceil, comb, log2
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from autocompress.methods.base import LayerContext, WeightForm, handles, set_weight
from autocompress.methods.chita import chita
from autocompress.methods.fisher import BlockFisher
from autocompress.methods.hessian import BLOCK, Hessian, back_solve, by_position, parts_of, sweep
from autocompress.types import Kernel, MethodConfig, Storage

OBC_WORK = 4e9
"""Multiplications of one layer's exact removal: some seconds."""
CHITA_WORK = 1e10
"""``rows`` times the cube of the weights a row that live: some seconds."""
MASKED_TOGETHER = 8
"""A mask is chosen for an eighth of the columns at a time, at most 128: later ones have moved by then (small layers lose
half as much at 90 % as with one mask for all)."""
ROW_BYTES = 32 * 2**20
"""Inverses of so many bytes are updated together."""

By = Literal["sparsegpt", "obc", "chita", "fisher", "magnitude"]


@dataclass(frozen=True)
class Sparse(MethodConfig):
    """``sparsity`` of the layer's weights are zero; or, with ``keep`` and ``of``, all but ``keep`` of ``of`` neighbours are."""

    exports: ClassVar[Literal["onnx", "simulated"]] = "simulated"

    sparsity: float = 0.5
    keep: int = 0
    of: int = 0
    by: By = "sparsegpt"

    def describe(self) -> str:
        share = f"{self.keep}:{self.of}" if self.of else f"{self.sparsity:.0%}"
        return f"{share} sparse" + ("" if self.by == "sparsegpt" else f" by {self.by}")

    @property
    def fitted(self) -> bool:
        return True

    def kept(self, rows: int, columns: int, area: int = 1) -> int:
        """Weights that stay of ``rows`` with ``columns`` input channels at ``area`` kernel positions."""
        if not self.of:
            return round((1 - self.sparsity) * rows * columns * area)
        whole, rest = divmod(columns, self.of)
        return rows * area * (whole * self.keep + min(rest, self.keep))

    def store(self, kernel: Kernel, before: Storage) -> Storage:
        """Values that stay, and where they are: a bit a weight, or the number of the pattern a block."""
        rows, area = kernel.out_shape[0], kernel.kernel[0] * kernel.kernel[1]
        columns = kernel.in_shape[0] // kernel.groups
        where = kernel.weights
        if self.of:
            where = rows * area * ceil(columns / self.of) * ceil(log2(comb(self.of, self.keep)))
        return Storage(min(before.values, self.kept(rows, columns, area)), before.bits, before.extra + where)


class WeightMask(WeightForm):
    """Parametrization ``w -> w * mask``: what is zero stays zero in training."""

    family = "sparse"
    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.mask

    def holds(self, weight: Tensor) -> bool:
        return not bool(weight[~self.mask].any())


@handles(Sparse, "sparse")
class _SparseHandler:
    def lower(self, config: MethodConfig, kernel: Kernel) -> tuple[Kernel, ...]:
        return (kernel,)

    def apply(self, config: MethodConfig, layer: nn.Module, context: LayerContext) -> nn.Module:
        assert isinstance(config, Sparse)
        for part, gram in list(parts_of(layer, context.gram)):
            hessian = context.hessian(part, gram)
            dense = part.weight.detach().flatten(1).double()  # (rows, n)
            fisher = context.fisher if part is layer else None
            weight, mask = prune(dense, config, hessian, part.weight[0, 0].numel(), fisher)
            set_weight(part, weight, hessian)
            parametrize.register_parametrization(part, "weight", WeightMask(mask.reshape(part.weight.shape)))
        return layer


def prune(
    weight: Tensor, config: Sparse, hessian: Hessian | None, area: int = 1, fisher: BlockFisher | None = None
) -> tuple[Tensor, Tensor]:
    """New weights and which of them live.  # weight (rows, channels * area) -> the same shape twice

    ``hessian`` of the weight's columns; without it, and without a ``fisher`` that is asked for, the smallest weights go.
    """
    rows, n = weight.shape

    def project(magnitudes: Tensor) -> Tensor:
        return _largest(magnitudes, config, n // area)

    order = by_position(n // area, area) if config.of else torch.arange(n)
    by = config.by
    if by == "fisher" and fisher is not None:
        found = BlockFisher(fisher.blocks, fisher.columns[order]).prune(weight[:, order], project)
        return _back(order, *found)
    if by == "fisher":
        by = "sparsegpt"
    if by == "obc" and rows * float(n) ** 3 > OBC_WORK:
        by = "sparsegpt"
    if by == "chita" and rows * (config.kept(rows, n // area, area) / rows) ** 3 > CHITA_WORK:
        by = "sparsegpt"
    if hessian is None or by == "magnitude":
        mask = project(weight[:, order].abs())
        new = weight[:, order] * mask
    elif by == "sparsegpt":
        new, mask = _sparsegpt(weight[:, order], config, hessian.inverse_root(order), n // area)
    elif by == "chita":
        new, mask = chita(weight[:, order], hessian.matrix[order][:, order], project)
    else:
        new, mask = _obc(weight[:, order], config, hessian, order, n // area)
    return _back(order, new, mask)


def _back(order: Tensor, new: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    back = torch.argsort(order)
    return new[:, back], mask[:, back]


def _groups(n: int, channels: int, of: int) -> list[int]:
    """Where each block of ``of`` channels begins, a shorter one at the end of every kernel position, and the end."""
    return [a + b for a in range(0, n, channels) for b in range(0, channels, of)] + [n]


def _largest(scores: Tensor, config: Sparse, channels: int) -> Tensor:
    """The best scores: of the whole matrix, or of every block of neighbours.  # (rows, n) bool"""
    if not config.of:
        return _best(scores, config.kept(*scores.shape))
    mask = torch.zeros_like(scores, dtype=torch.bool)
    for start, stop in pairwise(_groups(scores.shape[1], channels, config.of)):
        best = torch.argsort(scores[:, start:stop], dim=1, descending=True, stable=True)[:, : config.keep]
        mask[:, start:stop].scatter_(1, best, True)
    return mask


def _best(scores: Tensor, count: int) -> Tensor:
    mask = torch.zeros(scores.numel(), dtype=torch.bool)
    mask[torch.argsort(scores.flatten(), descending=True, stable=True)[:count]] = True
    return mask.reshape(scores.shape)


def _sparsegpt(weight: Tensor, config: Sparse, root: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    rows, n = weight.shape
    mask = torch.ones_like(weight, dtype=torch.bool)
    width = max(1, min(BLOCK, n // MASKED_TOGETHER))
    starts = _groups(n, channels, config.of) if config.of else [*range(0, n, width), n]
    ends = dict(pairwise(starts))
    edges = [0]
    for stop in starts[1:]:  # whole blocks of neighbours, about BLOCK columns at once
        if stop == n or stop - edges[-1] >= BLOCK:
            edges.append(stop)

    def settle(column: int, ahead: Tensor) -> Tensor:
        stop = ends.get(column)
        if stop is not None:  # a new block: which of its weights live is decided now
            scores = (ahead[:, : stop - column] / root.diagonal()[column:stop]).abs()
            if config.of:
                mask[:, column:stop] = _largest(scores, config, stop - column)
            else:  # the same share of every block, rounded so that the sum is right
                mask[:, column:stop] = _best(scores, config.kept(rows, stop) - config.kept(rows, column))
        return ahead[:, 0] * mask[:, column]

    return sweep(weight, root, settle, edges), mask


def _obc(weight: Tensor, config: Sparse, hessian: Hessian, order: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    rows, n = weight.shape
    h = hessian.matrix[order][:, order]
    starts = _groups(n, channels, config.of) if config.of else []
    key = ("obc", config.keep, config.of, weight.numpy().tobytes())
    steps, losses = hessian.memo(key, lambda: _removals(weight, h, starts, config.keep))
    removed = torch.zeros_like(weight, dtype=torch.bool)
    if config.of:
        removed.scatter_(1, steps, True)
    else:
        # An earlier step of a row never costs more than a later one, so the cheapest steps are prefixes of the rows' orders.
        cheapest = torch.argsort(losses.cummax(dim=1).values.flatten(), stable=True)
        gone = torch.zeros(losses.numel(), dtype=torch.bool)
        gone[cheapest[: weight.numel() - config.kept(rows, n)]] = True
        removed.scatter_(1, steps, gone.reshape(losses.shape))
    return back_solve(weight, ~removed, h), ~removed  # what is left of removing one after the other


def _removals(weight: Tensor, h: Tensor, starts: list[int], keep: int) -> tuple[Tensor, Tensor]:
    """Columns in the order they go from each row, and what each costs.  # (rows, n), (rows, n); N:M: as many as must go"""
    rows, n = weight.shape
    inverse = torch.linalg.inv(h)
    chunk = max(1, ROW_BYTES // (8 * n * n))
    block, room = torch.zeros(n, dtype=torch.long), torch.tensor([n])
    if starts:
        sizes = torch.tensor([b - a for a, b in pairwise(starts)])
        block, room = torch.repeat_interleave(torch.arange(len(sizes)), sizes), (sizes - keep).clamp_min(0)
    count = int(room.sum())
    steps, losses = torch.empty(rows, count, dtype=torch.long), torch.empty(rows, count, dtype=weight.dtype)
    for start in range(0, rows, chunk):
        w = weight[start : start + chunk].clone()  # (c, n)
        inv = inverse.expand(len(w), n, n).clone()  # (c, n, n)
        gone, left = torch.zeros_like(w, dtype=torch.bool), room.expand(len(w), -1).clone()
        each = torch.arange(len(w))
        for step in range(count):
            diagonal = inv.diagonal(dim1=1, dim2=2).clamp_min(1e-300)
            scores = torch.where(gone | (left[:, block] <= 0), torch.inf, w**2 / diagonal)
            cost, p = scores.min(dim=1)
            column, pivot = inv[each, :, p], diagonal[each, p]
            w -= (w[each, p] / pivot)[:, None] * column
            inv -= (column / pivot[:, None])[:, :, None] * column[:, None, :]
            gone[each, p] = True
            left[each, block[p]] -= 1
            w[gone] = 0.0
            steps[start : start + chunk, step], losses[start : start + chunk, step] = p, cost
    return steps, losses

"""Sparse weights by what the loss feels: its empirical Fisher matrix in diagonal blocks (oBERT, Kurtic et al. 2022).

``F = lambda I + 1/m sum_i g_i g_i^T`` over the gradients of ``m`` labelled calibration examples, in blocks of neighbouring
weights of a row. The weights with the least ``w_i^2 / (2 [F^-1]_ii)`` go, over the whole layer at once, and what lives in the
same block takes ``-F^-1_{:,Q} ([F^-1]_QQ)^-1 w_Q``; that is ``w_L + F_LL^-1 F_LQ w_Q``, the optimum of the quadratic form
with ``w_Q = 0``. The blocks are small enough to be inverted as they are, where M-FAC (Frantar et al. 2021) goes by rank-one
updates because it never forms ``F``.

Unlike a Gram matrix this tells one output from another, and depthwise layers have it, too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autocompress.methods.importance import Batches, Loss, example_gradients

FISHER_BLOCK = 50
"""Weights of a row whose curvature is known together, at most (the paper's)."""
FISHER_BYTES = 512 * 2**20
"""What the blocks of a model may take: larger models get smaller blocks, at last the diagonal."""
DAMPING = 0.01
"""Of the mean of the diagonal."""
ROUNDING = 1e-5
"""Of the mean of a block's own diagonal: what sums in single precision may be off."""
NOTHING = 1e-20
TOGETHER = 32
"""Gradients that are multiplied at once."""


@dataclass(frozen=True, eq=False)
class BlockFisher:
    """Damped blocks along the rows of a weight.

    ``blocks``: of all columns the layer ever had, padded to whole blocks.  # (rows, count, b, b)
    ``columns``: where the weight's columns are among those.  # (n,)
    """

    blocks: Tensor
    columns: Tensor

    def select(self, rows: Tensor, columns: Tensor, factor: Tensor) -> BlockFisher:
        """Of these rows and columns, the weight of each row times a ``factor``: its gradient is divided by it.  # (rows,)"""
        divisor = torch.where(factor == 0, torch.ones_like(factor), factor)[rows].square()
        return BlockFisher(self.blocks[rows] / divisor[:, None, None, None], self.columns[columns])

    def prune(self, weight: Tensor, project: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """New weights and which of them live; ``project``: saliencies -> the mask of the largest.  # (rows, n) twice"""
        rows, count, size, _ = self.blocks.shape
        known = torch.zeros(count * size, dtype=torch.bool)
        known[self.columns] = True
        blocks = _only(self.blocks.double(), known.reshape(1, count, size).expand(rows, -1, -1))
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(blocks))
        diagonal = inverse.diagonal(dim1=2, dim2=3).reshape(rows, -1)[:, self.columns]
        mask = project(weight.square() / (2 * diagonal))
        wide = weight.new_zeros(rows, count * size)
        live = torch.zeros(rows, count * size, dtype=torch.bool)
        wide[:, self.columns], live[:, self.columns] = weight, mask
        live = live.reshape(rows, count, size)
        target = (blocks @ wide.reshape(rows, count, size, 1)) * live[..., None]
        new = torch.cholesky_solve(target, torch.linalg.cholesky(_only(blocks, live)))
        return new.reshape(rows, -1)[:, self.columns] * mask, mask


def _only(blocks: Tensor, live: Tensor) -> Tensor:
    """Blocks in which those that do not live stand alone.  # (rows, count, b, b), (rows, count, b) bool"""
    return torch.where(live[..., None] & live[..., None, :], blocks, torch.eye(blocks.shape[-1], dtype=blocks.dtype))


def damped(second: Tensor, weight: Tensor) -> BlockFisher:
    """From second moments of gradients that :func:`block_moments` found.  # (rows, count, b, b), (rows, ...)"""
    n = weight[0].numel()
    finite = torch.where(torch.isfinite(second), second, torch.zeros_like(second))
    diagonal = finite.diagonal(dim1=2, dim2=3).double()  # (rows, count, b)
    damping = max(DAMPING * float(diagonal.sum()) / max(1, weight.numel()), NOTHING)
    ridge = (damping + ROUNDING * diagonal.mean(2))[..., None, None]
    return BlockFisher(finite.double() + ridge * torch.eye(second.shape[-1], dtype=torch.float64), torch.arange(n))


def block_moments(model: nn.Module, weights: Mapping[str, Tensor], batches: Batches, loss: Loss) -> dict[str, Tensor]:
    """``1/m sum g g^T`` of a model's weights in blocks along their rows, one backward pass an example.  # (rows, count, b, b)"""
    largest = FISHER_BYTES // (4 * max(1, sum(weight.numel() for weight in weights.values())))
    found, waiting = dict[str, Tensor](), dict[str, list[Tensor]]()
    shape = {}
    for name, weight in weights.items():
        n = weight[0].numel()
        count = -(-n // max(1, min(FISHER_BLOCK, largest)))
        shape[name] = count, -(-n // count)
        found[name] = torch.zeros(len(weight), *shape[name], shape[name][1])
        waiting[name] = []

    def add(name: str) -> None:
        if waiting[name]:
            g = torch.stack(waiting[name], -1).reshape(-1, shape[name][1], len(waiting[name]))
            found[name].flatten(0, 1).baddbmm_(g, g.transpose(1, 2))
            waiting[name].clear()

    examples = 0
    for gradients in example_gradients(model, weights, batches, loss):
        examples += 1
        for name, gradient in gradients.items():
            count, size = shape[name]
            flat = gradient.flatten(1).float()
            waiting[name].append(F.pad(flat, (0, count * size - flat.shape[1])))
            if len(waiting[name]) == TOGETHER:
                add(name)
    for name in found:
        add(name)
        found[name] /= max(1, examples)
    return found

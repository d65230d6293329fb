"""Signs and a few magnitudes: BiLLM (Huang et al. 2024). Simulated.

Every weight is binarized twice, ``a sign(w) + b sign(w - a sign(w))``, in two ways with magnitudes of their own for each row and
block of columns:

* *salient* columns, those with the largest ``sum_i w_ij^2 / U_jj^2`` (``H^-1 = U^T U``), by the residual: ``a`` is the mean
  magnitude, ``b`` the mean magnitude of what is left; how many columns are salient is searched, block by block;
* the others by splitting: the magnitude at which the bell is cut into an inner and an outer part, each with its mean as its
  magnitude, is searched for the least error; ``a -+ b`` are the two means.

Columns go as in GPTQ, later ones make good what earlier ones lose, and each weight takes the nearest of its four values. Means
and errors are weighted with ``1 / U_jj^2``; without a Gram matrix all weights count the same.

The published 1.08 bits leave out which part a weight is in. That is a bit, too: two bits a weight, and the magnitudes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from autocompress.methods.base import FormHandler, WeightForm, handles
from autocompress.methods.hessian import Hessian, halves, row_unit, sweep
from autocompress.types import Kernel, MethodConfig, Storage

BREAKS = torch.linspace(0.1, 0.9, 17).tolist()
"""Of a row's largest magnitude in a block: where the inner part may end."""
SALIENT = (0.0, 0.02, 0.05, 0.1, 0.2)
"""Shares of a block's columns that may be salient."""


@dataclass(frozen=True)
class BiLLM(MethodConfig):
    """Two signs a weight, four magnitudes for each row and at most ``block`` unfolded inputs."""

    exports: ClassVar[Literal["onnx", "simulated"]] = "simulated"

    block: int = 128

    def describe(self) -> str:
        return "two signs" if self.block == 128 else f"two signs in blocks of {self.block}"

    @property
    def fitted(self) -> bool:
        return True

    def store(self, kernel: Kernel, before: Storage) -> Storage:
        """Two bits a weight, four halves a row and block and the row's factor, and which columns are salient."""
        rows, n = kernel.out_shape[0], kernel.weights // kernel.out_shape[0]
        return Storage(before.values, 2, before.extra + rows * (4 * 16 * len(blocks(n, self.block)) + 32) + n)


def blocks(n: int, block: int) -> list[Tensor]:
    """So many columns as even as they can be."""
    return list(torch.arange(n).tensor_split(-(-n // block)))


class WeightSigns(WeightForm):
    """Parametrization ``w -> sign(w) (a + b sign(|w| - a))``, straight-through.

    ``a``, ``b`` of each weight, equal where they are shared  # (rows, kinds), with the ``kind`` of each column  # (n,)
    """

    family = "billm"
    a: Tensor
    b: Tensor
    kind: Tensor

    def __init__(self, a: Tensor, b: Tensor, kind: Tensor) -> None:
        super().__init__()
        self.register_buffer("a", a)
        self.register_buffer("b", b)
        self.register_buffer("kind", kind)

    def forward(self, weight: Tensor) -> Tensor:
        a, b = self.a[:, self.kind], self.b[:, self.kind]
        signs = two_signs(weight.detach().flatten(1).float(), a, b).reshape(weight.shape).to(weight.dtype)
        return weight + (signs - weight).detach()

    def holds(self, weight: Tensor) -> bool:
        magnitudes, kinds = weight.flatten(1).abs(), set(self.kind.tolist())
        return all(len(torch.unique(row)) <= 2 for kind in kinds for row in magnitudes[:, self.kind == kind])


@handles(BiLLM, "billm")
class _BiLLMHandler(FormHandler):
    def fit(self, config: MethodConfig, weight: Tensor, hessian: Hessian | None) -> tuple[Tensor, WeightForm]:
        assert isinstance(config, BiLLM)
        return binarize(weight, config, hessian)


def two_signs(values: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """``sign(w) (a + b sign(|w| - a))``, with no sign that is zero."""
    magnitude = torch.where(values.abs() >= a, a + b, a - b)
    return torch.where(values < 0, -magnitude, magnitude)


def binarize(weight: Tensor, config: BiLLM, hessian: Hessian | None) -> tuple[Tensor, WeightSigns]:
    """New weights, and the magnitudes that make them.  # weight (rows, n) -> (rows, n)"""
    rows, n = weight.shape
    root = None if hessian is None else hessian.inverse_root(torch.arange(n))
    cost = torch.ones(n, dtype=weight.dtype) if root is None else root.diagonal() ** -2
    where = blocks(n, config.block)
    form = WeightSigns(torch.zeros(rows, 2 * len(where)), torch.zeros(rows, 2 * len(where)), torch.zeros(n).long())
    starts = {int(columns[0]): (index, columns) for index, columns in enumerate(where)}
    unit = row_unit(weight)

    def begin(column: int, now: Tensor) -> None:
        """Which columns of a block are salient, and the block's magnitudes, from what its weights are by now."""
        index, columns = starts[column]
        salient, magnitudes = _block(now, cost[columns])
        form.kind[columns] = 2 * index + salient.long()
        for kind, pair in enumerate(magnitudes, 2 * index):
            form.a[:, kind], form.b[:, kind] = (halves(v, unit[:, 0]) for v in pair)

    def settled(values: Tensor, columns: Tensor) -> Tensor:
        kinds = form.kind[columns]
        return two_signs(values.float(), form.a[:, kinds], form.b[:, kinds]).to(values.dtype)

    if root is None:
        for column, (_, columns) in starts.items():
            begin(column, weight[:, columns])
        return settled(weight, torch.arange(n)), form

    def settle(column: int, ahead: Tensor) -> Tensor:
        if column in starts:
            begin(column, ahead)
        return settled(ahead[:, :1], torch.tensor([column]))[:, 0]

    return sweep(weight, root, settle, [*starts, n]), form


Pair = tuple[Tensor, Tensor]


def _block(weight: Tensor, cost: Tensor) -> tuple[Tensor, tuple[Pair, Pair]]:
    """Which columns are salient; ``a, b`` of the others and of these.  # (rows, n) -> (n,) bool, each (rows,)"""
    n, found, least = len(cost), None, torch.inf
    order = torch.argsort((weight.square() * cost).sum(0), descending=True, stable=True)
    for count in sorted({round(share * n) for share in SALIENT}):
        salient = torch.zeros(n, dtype=torch.bool)
        salient[order[:count]] = True
        parts = [(weight[:, ~salient], cost[~salient], split), (weight[:, salient], cost[salient], residual)]
        pairs = [fit(w, c) for w, c, fit in parts]
        error = sum(
            float(((two_signs(w, a[:, None], b[:, None]) - w).square() * c).sum())
            for (w, c, _), (a, b) in zip(parts, pairs, strict=True)
        )
        if error < least:
            found, least = (salient, (pairs[0], pairs[1])), error
    assert found is not None
    return found


def residual(weight: Tensor, cost: Tensor) -> Pair:
    """Mean magnitudes of the weights, and of what their signs leave.  # (rows, n) -> (rows,), (rows,)"""
    share = cost / cost.sum()
    a = weight.abs() @ share
    b = (weight.abs() - a[:, None]).abs() @ share
    return a, torch.minimum(a, b)


def split(weight: Tensor, cost: Tensor) -> Pair:
    """From the means of the inner and the outer part of each row, cut where they fit best.  # (rows, n) -> (rows,), (rows,)"""
    size = weight.abs()
    largest = size.amax(1, keepdim=True)
    a = b = largest[:, 0] / 2
    least = torch.full_like(a, torch.inf)
    for share in BREAKS:
        inner = size <= share * largest
        low, high = (((size * cost * p).sum(1) / (cost * p).sum(1).clamp_min(1e-300)) for p in (inner, ~inner))
        high = torch.maximum(low, high)
        error = ((torch.where(inner, low[:, None], high[:, None]) - size).square() * cost).sum(1)
        a, b = (torch.where(error < least, new, old) for new, old in (((low + high) / 2, a), ((high - low) / 2, b)))
        least = torch.minimum(error, least)
    return a, b

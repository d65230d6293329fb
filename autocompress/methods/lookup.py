"""Weights as codes of a small table an output channel, and a few kept as they are: SqueezeLLM (Kim et al. 2024). Simulated.

The table of a row minimizes ``sum_j H_jj (w_j - table[code_j])^2`` by weighted k-means in one dimension (Lloyd 1982), from
quantiles and from even steps, the better of the two; ``H_jj`` is the mean square of the input that the weight meets, and stands
for the Fisher information. Before that a share of outliers is taken out into a sparse matrix, ``W = D + S``: eight of nine by
magnitude, the others by ``H_jj w_j^2``.

``by="kmeans"`` takes the nearest entries, as published; ``by="gptq"`` (default) goes through the columns as GPTQ does, so that
later ones make good what earlier ones lose. Entries and outliers are 16-bit floats times a factor a row. Without a Gram matrix
all weights count the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from autocompress.methods.base import FormHandler, WeightForm, handles
from autocompress.methods.hessian import Hessian, halves, row_unit, sweep
from autocompress.types import Kernel, MethodConfig, Storage

ROUNDS = 30
BY_SIZE = 8 / 9


@dataclass(frozen=True)
class Lookup(MethodConfig):
    """Tables of ``2^bits`` entries; ``outliers``: the share of weights that are kept."""

    exports: ClassVar[Literal["onnx", "simulated"]] = "simulated"

    bits: Literal[2, 3, 4] = 3
    outliers: float = 0.0045
    by: Literal["gptq", "kmeans"] = "gptq"

    def describe(self) -> str:
        return f"{self.bits}-bit tables" + ("" if self.by == "gptq" else f" by {self.by}")

    @property
    def fitted(self) -> bool:
        return True

    def store(self, kernel: Kernel, before: Storage) -> Storage:
        """Codes; a row's table of halves, its factor, and where its outliers begin; an outlier's half and its column."""
        tables = kernel.out_shape[0] * (16 * 2**self.bits + 32 + 32)
        return Storage(before.values, self.bits, before.extra + tables + 32 * round(self.outliers * kernel.weights))


class WeightLookup(WeightForm):
    """Parametrization ``w -> the nearest entry of its row's table``, straight-through; outliers stay.

    ``table`` ascending  # (rows, 2^bits); ``outliers``  # (rows, n) bool
    """

    family = "lookup"
    table: Tensor
    outliers: Tensor

    def __init__(self, table: Tensor, outliers: Tensor) -> None:
        super().__init__()
        self.register_buffer("table", table)
        self.register_buffer("outliers", outliers)

    def forward(self, weight: Tensor) -> Tensor:
        entry = nearest(self.table, weight.detach().flatten(1).float()).reshape(weight.shape).to(weight.dtype)
        return torch.where(self.outliers.reshape(weight.shape), weight, weight + (entry - weight).detach())

    def holds(self, weight: Tensor) -> bool:
        rows = zip(weight.flatten(1), self.outliers, strict=True)
        return all(len(row[~out].unique()) <= self.table.shape[1] for row, out in rows)


@handles(Lookup, "lookup")
class _LookupHandler(FormHandler):
    def fit(self, config: MethodConfig, weight: Tensor, hessian: Hessian | None) -> tuple[Tensor, WeightForm]:
        assert isinstance(config, Lookup)
        new, table, outliers = tabulate(weight, config, hessian)
        return new, WeightLookup(table, outliers)


def tabulate(weight: Tensor, config: Lookup, hessian: Hessian | None) -> tuple[Tensor, Tensor, Tensor]:
    """New weights, the rows' tables, and which weights are outliers.  # (rows, n) -> (rows, n), (rows, 2^bits), (rows, n)"""
    n = weight.shape[1]
    importance = torch.ones(n, dtype=weight.dtype) if hessian is None else hessian.matrix.diagonal()
    outliers = find_outliers(weight, importance, config.outliers)
    unit = row_unit(weight)
    table = halves(kmeans(weight, importance * ~outliers, 2**config.bits), unit)
    kept = halves(weight, unit).to(weight.dtype)
    if hessian is None or config.by == "kmeans":
        return torch.where(outliers, kept, nearest(table, weight.float()).to(weight.dtype)), table, outliers
    order = hessian.falling()
    places = order.tolist()

    def settle(column: int, ahead: Tensor) -> Tensor:
        now, out = ahead[:, :1], outliers[:, places[column]]
        entry = nearest(table, now.float()).to(now.dtype)[:, 0]
        return torch.where(out, halves(now, unit).to(now.dtype)[:, 0], entry)

    settled = sweep(weight[:, order], hessian.inverse_root(order), settle)
    return settled[:, torch.argsort(order)], table, outliers


def find_outliers(weight: Tensor, importance: Tensor, share: float) -> Tensor:
    """The largest weights of a layer, and of the others those that its outputs feel most.  # (rows, n) bool"""
    count = round(share * weight.numel())
    large = round(BY_SIZE * count)
    found = torch.zeros(weight.numel(), dtype=torch.bool)
    found[weight.abs().flatten().topk(large).indices] = True
    felt = (weight.square() * importance).flatten().masked_fill(found, -1.0)
    found[felt.topk(count - large).indices] = True
    return found.reshape(weight.shape)


def kmeans(weight: Tensor, importance: Tensor, k: int) -> Tensor:
    """Each row's ``k`` ascending centres with the least weighted squared distance, by Lloyd's rounds.

    ``importance``  # (rows, n); entries of 0 take no part. (rows, n) -> (rows, k)
    """
    ordered, places = weight.sort(dim=1)
    mass, shares = importance.gather(1, places).cumsum(1), (torch.arange(k, dtype=weight.dtype) + 0.5) / k
    marks = torch.searchsorted(mass, (mass[:, -1:] * shares).contiguous()).clamp_max(weight.shape[1] - 1)
    taken = torch.where(importance > 0, weight, weight.median(dim=1, keepdim=True).values)
    low, high = taken.amin(1, keepdim=True), taken.amax(1, keepdim=True)
    tables = [_lloyd(t, weight, importance) for t in (ordered.gather(1, marks), low + (high - low) * shares)]
    errors = [(importance * (weight - nearest(t, weight)).square()).sum(1, keepdim=True) for t in tables]
    return torch.where(errors[0] <= errors[1], tables[0], tables[1])


def _lloyd(table: Tensor, weight: Tensor, importance: Tensor) -> Tensor:
    for _ in range(ROUNDS):
        codes = _codes(table, weight)
        share = torch.zeros_like(table).scatter_add_(1, codes, importance)
        total = torch.zeros_like(table).scatter_add_(1, codes, importance * weight)
        table = torch.where(share > 0, total / share, table).sort(dim=1).values
    return table


def _codes(table: Tensor, weight: Tensor) -> Tensor:
    between = (table[:, 1:] + table[:, :-1]) / 2
    return torch.searchsorted(between.contiguous(), weight.contiguous())


def nearest(table: Tensor, weight: Tensor) -> Tensor:
    """The entry of its row's table that is nearest to each weight.  # (rows, k), (rows, n) -> (rows, n)"""
    return table.gather(1, _codes(table, weight))

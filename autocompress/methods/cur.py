"""CUR: a layer from some of its own rows and columns (Park and Moon 2025, CURing).

The importance ``S = |W| ||x_column||`` (Sun et al. 2023, Wanda) is decomposed, ``S = A D B^T``; the discrete empirical
interpolation method (Chaturantabut and Sorensen 2010) on ``A`` picks rows of ``W`` and on ``B`` columns; ``W' = C U R`` with
``U = argmin ||(W - C U R) X||``, ``C^+ W R^+`` without a Gram matrix. ``R`` are filters of the layer itself, so the first factor
is the layer with fewer outputs; ``C U`` is stored as one matrix.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from autocompress.methods.base import LayerContext, handles
from autocompress.methods.factored import (
    LowersToTwo,
    TwoFactors,
    check_rank,
    dense_weight,
    refit_second,
    split_layer,
)
from autocompress.types import MethodConfig

CUTOFF = 1e-7
"""Of pseudo-inverses, over the largest singular value."""


@dataclass(frozen=True)
class CUR(TwoFactors):
    """Two factors with about ``ratio`` times the layer's weights: own filters, then a mixture of them."""

    def describe(self) -> str:
        return f"CUR {self.ratio:.0%}"


@handles(CUR, "cur")
class _CURHandler(LowersToTwo):
    def apply(self, config: MethodConfig, layer: nn.Module, context: LayerContext) -> nn.Module:
        assert isinstance(config, CUR)
        matrix = dense_weight(layer, "CUR").flatten(1).double()
        rows, columns, u = cur(matrix, config.rank(*matrix.shape), context.gram)
        return split_layer(layer, matrix[rows], matrix[:, columns] @ u, cast("Tensor | None", layer.bias))


def cur(matrix: Tensor, rank: int, gram: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Chosen rows and columns, and ``U`` between them.  # (out, n) -> (rank,), (rank,), (rank, rank)"""
    check_rank(rank, *matrix.shape)
    n = matrix.shape[1]
    norms = torch.ones(n).double() if gram is None else gram.diagonal()[:n].double().clamp_min(0).sqrt()
    left, _, right = torch.linalg.svd(matrix.abs() * norms, full_matrices=False)
    rows, columns = deim(left[:, :rank]), deim(right[:rank].T)
    c, r = matrix[:, columns], matrix[rows]
    inverse = torch.linalg.pinv(c, rtol=CUTOFF)
    mixed = matrix @ torch.linalg.pinv(r, rtol=CUTOFF) if gram is None else refit_second(matrix, r, gram)
    return rows, columns, inverse @ mixed


def deim(basis: Tensor) -> Tensor:
    """Rows at which a basis is interpolated: each time where the next vector differs most.  # (n, rank) -> (rank,)"""
    chosen = [int(basis[:, 0].abs().argmax())]
    for j in range(1, basis.shape[1]):
        known = basis[chosen, :j]
        weights = torch.linalg.lstsq(known, basis[chosen, j : j + 1], driver="gelsd").solution
        residual = (basis[:, j : j + 1] - basis[:, :j] @ weights)[:, 0].abs()
        residual[chosen] = -1.0  # a row counts once, whatever rounding says
        chosen.append(int(residual.argmax()))
    return torch.tensor(chosen)

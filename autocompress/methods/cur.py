"""CUR: a layer from some of its own rows and columns (Park and Moon 2025, CURing).

The importance ``S = |W| ||x_column||`` (Sun et al. 2023, Wanda) is decomposed, ``S = A D B^T``; the discrete empirical
interpolation method (Chaturantabut and Sorensen 2010) on ``A`` picks rows of ``W`` and on ``B`` columns; ``W' = C U R`` with
``U = argmin ||(W - C U R) X||``, ``C^+ W R^+`` without a Gram matrix. ``R`` are filters of the layer itself, so the first factor
is the layer with fewer outputs; ``C U`` is stored as one matrix. As it is one, it need not be made of columns: ``columns=False``
fits it freely, ``W H R^T (R H R^T)^-1``, at the same size and a lower error.
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
    """Two factors with about ``ratio`` times the layer's weights: own filters, then a mixture of them.

    ``columns``: whether the mixture is made of the layer's own columns, as in CURing.
    """

    columns: bool = True

    def describe(self) -> str:
        return f"{'CUR' if self.columns else 'own filters'} {self.ratio:.0%}"


@handles(CUR, "cur")
class _CURHandler(LowersToTwo):
    def apply(self, config: MethodConfig, layer: nn.Module, context: LayerContext) -> nn.Module:
        assert isinstance(config, CUR)
        matrix = dense_weight(layer, "CUR").flatten(1).double()
        rows, columns, u = cur(matrix, config.rank(*matrix.shape), context.gram)
        mixture = matrix[:, columns] @ u if config.columns else fitted(matrix, rows, context.gram)
        return split_layer(layer, matrix[rows], mixture, cast("Tensor | None", layer.bias))


def cur(matrix: Tensor, rank: int, gram: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Chosen rows and columns, and ``U`` between them.  # (out, n) -> (rank,), (rank,), (rank, rank)"""
    check_rank(rank, *matrix.shape)
    n = matrix.shape[1]
    norms = torch.ones(n).double() if gram is None else gram.diagonal()[:n].double().clamp_min(0).sqrt()
    left, _, right = torch.linalg.svd(matrix.abs() * norms, full_matrices=False)
    rows, columns = deim(left[:, :rank]), deim(right[:rank].T)
    return rows, columns, torch.linalg.pinv(matrix[:, columns], rtol=CUTOFF) @ fitted(matrix, rows, gram)


def fitted(matrix: Tensor, rows: Tensor, gram: Tensor | None) -> Tensor:
    """The best mixture of some rows, on the data where it is known.  # (out, n), (rank,) -> (out, rank)"""
    if gram is not None:
        return refit_second(matrix, matrix[rows], gram)
    inverse: Tensor = torch.linalg.pinv(matrix[rows], rtol=CUTOFF)
    return matrix @ inverse


def deim(basis: Tensor) -> Tensor:
    """Rows at which a basis is interpolated: each time where the next vector differs most from what the rows so far give.

    What is left of a vector then is its column in Gaussian elimination, so these are the pivots of an LU decomposition (Sorensen
    and Embree 2016).  # (n, rank) -> (rank,)
    """
    _, pivots, _ = torch.linalg.lu_factor_ex(basis)
    order = list(range(len(basis)))
    for i, pivot in enumerate(pivots.tolist()):
        order[i], order[pivot - 1] = order[pivot - 1], order[i]
    return torch.tensor(order[: basis.shape[1]])

"""Low rank by the principal components of a layer's outputs, with their mean made good in the bias.

``Cov(y) = U S U^T``, ``W' = U_k (U_k^T W)``, ``b' = b + (I - U_k U_k^T) mean(W x)`` (Kaushal et al. 2023, LORD: low rank
decomposition of code LLMs; the atomic feature mimicking of Yu and Wu 2023; Yu et al. 2024 for CTR models). Without the mean this
is the optimum of ``||(W - W') X||``, which the whitened SVD of ``lowrank.py`` finds in another way. Without a Gram matrix ``U_k``
are the weight's left singular vectors.
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
    principal,
    split_layer,
)
from autocompress.types import MethodConfig


@dataclass(frozen=True)
class OutputFeatures(TwoFactors):
    """Two factors with about ``ratio`` times the layer's weights, and a bias."""

    def describe(self) -> str:
        return f"output features {self.ratio:.0%}"


@handles(OutputFeatures, "lord")
class _OutputFeaturesHandler(LowersToTwo):
    def apply(self, config: MethodConfig, layer: nn.Module, context: LayerContext) -> nn.Module:
        assert isinstance(config, OutputFeatures)
        matrix = dense_weight(layer, "low-rank").flatten(1).double()
        basis, shift = output_features(matrix, config.rank(*matrix.shape), context.gram)
        bias = cast("Tensor | None", layer.bias)
        if shift is not None:
            bias = shift if bias is None else bias.detach().double() + shift
        return split_layer(layer, basis.T @ matrix, basis, bias)


def output_features(matrix: Tensor, rank: int, gram: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """``U_k`` and what the bias gains, ``None`` without a Gram matrix.  # (out, n) -> (out, rank), (out,)"""
    check_rank(rank, *matrix.shape)
    if gram is None:
        return torch.linalg.svd(matrix, full_matrices=False).U[:, :rank], None
    n = matrix.shape[1]
    h, mean = gram[:n, :n].double(), gram[:n, -1].double()
    output_mean = matrix @ mean  # (out,)
    basis = principal(matrix @ h @ matrix.T - torch.outer(output_mean, output_mean), rank)
    return basis, output_mean - basis @ (basis.T @ output_mean)

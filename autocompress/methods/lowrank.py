"""Low-rank factorization by SVD: one layer becomes two thinner ones.

With the Gram matrix ``H = X X^T`` of the layer's inputs, the factors minimize the *output* error ``||(W - U V) X||``: the SVD
is taken of ``W L`` with ``H = L L^T`` (Eckart-Young in the metric of the data; Wang et al. 2024, SVD-LLM), and for every split
the second factor is the least-squares fit behind the first, ``U = W H A^T (A H A^T)^-1`` with ``A`` the first factor as a
map of input patches. Without a Gram matrix it is the plain truncated SVD (Denton et al. 2014).

Splits of a convolution: ``channel`` is k x k to ``rank`` channels, then 1 x 1 (Zhang et al. 2016); ``spatial`` is k x 1, then
1 x k (Jaderberg et al. 2014).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, cast

import torch
from torch import Tensor, nn

from autocompress.methods.base import LayerContext, handles
from autocompress.methods.factored import (
    Factored,
    chain,
    check_rank,
    damped,
    dense_weight,
    narrowed,
    rank_within,
    refit_second,
    split_layer,
)
from autocompress.methods.hessian import cholesky
from autocompress.types import Kernel, MethodConfig


@dataclass(frozen=True)
class LowRank(Factored):
    """Two factors with about ``ratio`` times the layer's weights; the rank follows from the layer's surviving shape."""

    split: Literal["channel", "spatial"] = "channel"

    def describe(self) -> str:
        return f"{self.split} rank {self.ratio:.0%}"

    def rank(self, n_out: int, n_in: int, kernel: tuple[int, int]) -> int:
        """Largest rank whose factors hold at most ``ratio`` of the weights, at least 1."""
        kh, kw = kernel
        rows, columns = (n_in * kh, n_out * kw) if self.split == "spatial" else (n_in * kh * kw, n_out)
        return rank_within(self.ratio, n_out * n_in * kh * kw, rows + columns, min(rows, columns))


@handles(LowRank, "lowrank")
class _LowRankHandler:
    def lower(self, config: MethodConfig, kernel: Kernel) -> tuple[Kernel, ...]:
        assert isinstance(config, LowRank)
        rank = config.rank(kernel.out_shape[0], kernel.in_shape[0], kernel.kernel)
        if config.split == "channel" or kernel.kind == "linear":
            return narrowed(kernel, rank)
        (kh, kw), (down, right) = kernel.kernel, kernel.stride
        middle = (rank, kernel.out_shape[1], kernel.in_shape[2])
        first = replace(kernel, out_shape=middle, fused="", kernel=(kh, 1), stride=(down, 1))
        return first, replace(kernel, in_shape=middle, kernel=(1, kw), stride=(1, right))

    def apply(self, config: MethodConfig, layer: nn.Module, context: LayerContext) -> nn.Module:
        assert isinstance(config, LowRank)
        weight = dense_weight(layer, "low-rank")
        size = cast("tuple[int, int]", layer.kernel_size) if isinstance(layer, nn.Conv2d) else (1, 1)
        rank = config.rank(len(weight), weight.shape[1], size)
        bias = cast("Tensor | None", layer.bias)
        if config.split == "spatial" and isinstance(layer, nn.Conv2d):
            return _spatial(layer, weight, rank, context.gram, bias)
        u, v = factors(weight.flatten(1), rank, context.gram)
        return split_layer(layer, v, u, bias)


def _spatial(layer: nn.Conv2d, weight: Tensor, rank: int, gram: Tensor | None, bias: Tensor | None) -> nn.Sequential:
    n_out, n_in, kh, kw = weight.shape
    (sh, sw), (dh, dw) = layer.stride, layer.dilation
    ph, pw = cast("tuple[int, int]", layer.padding)
    matrix = weight.permute(1, 2, 0, 3).reshape(n_in * kh, n_out * kw)  # rows (in, kh), columns (out, kw)
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    v = (left[:, :rank] * values[:rank].sqrt()).T.reshape(rank, n_in, kh)
    u = (values[:rank].sqrt()[:, None] * right[:rank]).reshape(rank, n_out, kw).permute(1, 0, 2)  # (out, rank, kw)
    if gram is not None:
        a = torch.einsum("rci,jk->rjcik", v, torch.eye(kw, dtype=v.dtype)).reshape(rank * kw, n_in * kh * kw)
        u = refit_second(weight.flatten(1).double(), a, gram).reshape(n_out, rank, kw)
    mode = layer.padding_mode
    first = nn.Conv2d(n_in, rank, (kh, 1), (sh, 1), (ph, 0), (dh, 1), bias=False, padding_mode=mode)
    second = nn.Conv2d(rank, n_out, (1, kw), (1, sw), (0, pw), (1, dw), bias=bias is not None, padding_mode=mode)
    return chain(layer, [(first, v[:, :, :, None]), (second, u[:, :, None, :])], bias)


def factors(weight: Tensor, rank: int, gram: Tensor | None) -> tuple[Tensor, Tensor]:
    """``U (out, rank), V (rank, in)`` that minimize the output error, or the weight error without a Gram matrix."""
    matrix = weight.double()
    check_rank(rank, *matrix.shape)
    if gram is None:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        scale = values[:rank].sqrt()
        return left[:, :rank] * scale, scale[:, None] * right[:rank]
    n = matrix.shape[1]
    lower = cholesky(damped(gram[:n, :n].double()))
    _, _, right = torch.linalg.svd(matrix @ lower, full_matrices=False)
    v = torch.linalg.solve_triangular(lower, right[:rank], upper=False, left=False)
    return refit_second(matrix, v, gram), v

"""Low-rank factorization by SVD: one layer becomes two thinner ones.

With the Gram matrix ``H = X X^T`` of the layer's inputs, the factors minimize the *output* error ``||(W - U V) X||``: the SVD
is taken of ``W L`` with ``H = L L^T`` (Eckart-Young in the metric of the data; Wang et al. 2024, SVD-LLM), and for every split
the second factor is the least-squares fit behind the first, ``U = W H A^T (A H A^T)^-1`` with ``A`` the first factor as a
map of input patches. Without a Gram matrix it is the plain truncated SVD (Denton et al. 2014).

Splits of a convolution: ``channel`` is k x k to ``rank`` channels, then 1 x 1 (Zhang et al. 2016); ``spatial`` is k x 1, then
1 x k (Jaderberg et al. 2014).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, cast

import torch
from torch import Tensor, nn

from autocompress.errors import UnsupportedModel
from autocompress.methods.base import LayerContext, handles
from autocompress.types import Kernel, MethodConfig


@dataclass(frozen=True)
class LowRank(MethodConfig):
    """Two factors with about ``ratio`` times the layer's weights; the rank follows from the layer's surviving shape."""

    ratio: float
    split: Literal["channel", "spatial"] = "channel"

    def describe(self) -> str:
        return f"{self.split} rank {self.ratio:.0%}"

    @property
    def fitted(self) -> bool:
        return True

    def rank(self, n_out: int, n_in: int, kernel: tuple[int, int]) -> int:
        """Largest rank whose factors hold at most ``ratio`` of the weights, at least 1."""
        kh, kw = kernel
        if self.split == "spatial":
            per_rank, full = n_in * kh + n_out * kw, min(n_in * kh, n_out * kw)
        else:
            per_rank, full = n_in * kh * kw + n_out, min(n_in * kh * kw, n_out)
        return max(1, min(full, math.floor(self.ratio * n_out * n_in * kh * kw / per_rank)))


@handles(LowRank, "lowrank")
class _LowRankHandler:
    def lower(self, config: MethodConfig, kernel: Kernel) -> tuple[Kernel, ...]:
        assert isinstance(config, LowRank)
        n_in, n_out, (kh, kw) = kernel.in_shape[0], kernel.out_shape[0], kernel.kernel
        rank = config.rank(n_out, n_in, kernel.kernel)
        if kernel.kind == "linear":
            middle: tuple[int, ...] = (rank, *kernel.out_shape[1:])
        elif config.split == "spatial":
            middle = (rank, kernel.out_shape[1], kernel.in_shape[2])
        else:
            middle = (rank, *kernel.out_shape[1:])
        first, second = replace(kernel, out_shape=middle, fused=""), replace(kernel, in_shape=middle)
        if config.split == "spatial":
            first = replace(first, kernel=(kh, 1), stride=(kernel.stride[0], 1))
            second = replace(second, kernel=(1, kw), stride=(1, kernel.stride[1]))
        else:
            second = replace(second, kernel=(1, 1), stride=(1, 1))
        return first, second

    def apply(self, config: MethodConfig, layer: nn.Module, context: LayerContext) -> nn.Module:
        assert isinstance(config, LowRank)
        if isinstance(layer, nn.Conv2d) and layer.groups == 1:
            return _factor_conv(config, layer, context.gram)
        if isinstance(layer, nn.Linear):
            return _factor_linear(config, layer, context.gram)
        raise UnsupportedModel(f"Only dense convolutions and linear layers have a low-rank form, got {layer}.")


def _factor_linear(config: LowRank, layer: nn.Linear, gram: Tensor | None) -> nn.Sequential:
    weight = layer.weight.detach()
    u, v = _factors(weight, config.rank(weight.shape[0], weight.shape[1], (1, 1)), gram)
    first = nn.Linear(weight.shape[1], len(v), bias=False)
    second = nn.Linear(len(v), weight.shape[0], bias=layer.bias is not None)
    return _filled(first, second, v, u, layer.bias)


def _factor_conv(config: LowRank, layer: nn.Conv2d, gram: Tensor | None) -> nn.Sequential:
    weight = layer.weight.detach()
    n_out, n_in, kh, kw = weight.shape
    rank = config.rank(n_out, n_in, (kh, kw))
    (sh, sw), (dh, dw) = layer.stride, layer.dilation
    if isinstance(layer.padding, str):
        raise UnsupportedModel(f"Padding {layer.padding!r} as a word has no low-rank form; give it in pixels.")
    ph, pw = layer.padding
    bias = layer.bias is not None
    mode = layer.padding_mode
    if config.split == "channel":
        u, v = _factors(weight.flatten(1), rank, gram)
        first = nn.Conv2d(n_in, rank, (kh, kw), (sh, sw), (ph, pw), (dh, dw), bias=False, padding_mode=mode)
        second = nn.Conv2d(rank, n_out, 1, bias=bias)
        return _filled(first, second, v.reshape(rank, n_in, kh, kw), u.reshape(n_out, rank, 1, 1), layer.bias)
    matrix = weight.permute(1, 2, 0, 3).reshape(n_in * kh, n_out * kw)  # rows (in, kh), columns (out, kw)
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    v = (left[:, :rank] * values[:rank].sqrt()).T.reshape(rank, n_in, kh)
    u = (values[:rank].sqrt()[:, None] * right[:rank]).reshape(rank, n_out, kw).permute(1, 0, 2)  # (out, rank, kw)
    if gram is not None:
        a = torch.einsum("rci,jk->rjcik", v, torch.eye(kw, dtype=v.dtype)).reshape(rank * kw, n_in * kh * kw)
        u = _refit(weight.flatten(1).double(), a, gram).reshape(n_out, rank, kw)
    first = nn.Conv2d(n_in, rank, (kh, 1), (sh, 1), (ph, 0), (dh, 1), bias=False, padding_mode=mode)
    second = nn.Conv2d(rank, n_out, (1, kw), (1, sw), (0, pw), (1, dw), bias=bias, padding_mode=mode)
    return _filled(first, second, v.reshape(rank, n_in, kh, 1), u.reshape(n_out, rank, 1, kw), layer.bias)


def _factors(weight: Tensor, rank: int, gram: Tensor | None) -> tuple[Tensor, Tensor]:
    """``U (out, rank), V (rank, in)`` that minimize the output error, or the weight error without a Gram matrix."""
    matrix = weight.double()
    if gram is None:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        root = values[:rank].sqrt()
        return left[:, :rank] * root, root[:, None] * right[:rank]
    n = matrix.shape[1]
    lower = _root(gram[:n, :n].double())
    _, _, right = torch.linalg.svd(matrix @ lower, full_matrices=False)
    v = torch.linalg.solve_triangular(lower, right[:rank], upper=False, left=False)
    return _refit(matrix, v, gram), v


def _refit(matrix: Tensor, a: Tensor, gram: Tensor) -> Tensor:
    """``argmin_U ||(W - U A) X|| = W H A^T (A H A^T)^-1``."""
    n = matrix.shape[1]
    h = _damped(gram[:n, :n].double())
    cross = matrix @ h @ a.T
    solved: Tensor = torch.linalg.solve(_damped(a @ h @ a.T), cross.T)
    return solved.T


def _root(h: Tensor) -> Tensor:
    """``L`` with ``L L^T = H``, damped as much as a singular matrix needs."""
    eye, ridge = torch.eye(len(h), dtype=h.dtype), 1e-6 * float(h.diagonal().mean().clamp_min(1e-12))
    factor, info = torch.linalg.cholesky_ex(h + ridge * eye)
    while int(info) != 0:
        ridge *= 10
        factor, info = torch.linalg.cholesky_ex(h + ridge * eye)
    return cast(Tensor, factor)


def _damped(h: Tensor) -> Tensor:
    ridge = 1e-6 * h.diagonal().mean().clamp_min(1e-12)
    return h + ridge * torch.eye(len(h), dtype=h.dtype)


def _filled(first: nn.Module, second: nn.Module, v: Tensor, u: Tensor, bias: Tensor | None) -> nn.Sequential:
    first.weight = nn.Parameter(v.float().contiguous(), requires_grad=False)
    second.weight = nn.Parameter(u.float().contiguous(), requires_grad=False)
    if bias is not None:
        second.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return nn.Sequential(first, second)

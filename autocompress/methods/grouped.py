"""Grouped SVD: input channels in ``k`` slices, each factorized on its own at one rank (Liebenwein et al. 2021, ALDS).

A convolution becomes one in ``k`` groups and a 1 x 1 behind it. At equal weights more groups have a higher rank in all,
``j (in * kh * kw + k * out) = ratio * out * in * kh * kw``, but share nothing between slices. Which is better, Eckart-Young says
before anything is built: ``||W - W'|| <= sqrt(k) max_g s_{j+1}(W_g)``, where only the maximum is compared.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from autocompress.errors import UnsupportedModel
from autocompress.methods.base import LayerContext, handles
from autocompress.methods.factored import (
    Factored,
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

SPLITS = (1, 2, 4, 8)


@dataclass(frozen=True)
class GroupedSVD(Factored):
    """A convolution in ``groups`` groups and one of 1 x 1, with about ``ratio`` times the weights.

    Where pruning leaves channels that ``groups`` does not divide, there are as many groups as divide both.
    """

    groups: int = 2

    def describe(self) -> str:
        return f"{self.groups} groups, rank {self.ratio:.0%}"

    def shape(self, n_out: int, n_in: int, area: int) -> tuple[int, int]:
        """Groups and the rank of each."""
        groups = math.gcd(self.groups, n_in)
        return groups, group_rank(self.ratio, n_out, n_in, area, groups)


def group_rank(ratio: float, n_out: int, n_in: int, area: int, groups: int) -> int:
    """Largest rank of every slice whose factors hold at most ``ratio`` of the weights."""
    per_rank = n_in * area + groups * n_out
    return rank_within(ratio, n_out * n_in * area, per_rank, min(n_out, n_in // groups * area))


@handles(GroupedSVD, "grouped")
class _GroupedSVDHandler:
    def lower(self, config: MethodConfig, kernel: Kernel) -> tuple[Kernel, ...]:
        assert isinstance(config, GroupedSVD)
        area = kernel.kernel[0] * kernel.kernel[1]
        groups, rank = config.shape(kernel.out_shape[0], kernel.in_shape[0], area)
        return narrowed(kernel, groups * rank, groups)

    def apply(self, config: MethodConfig, layer: nn.Module, context: LayerContext) -> nn.Module:
        assert isinstance(config, GroupedSVD)
        if not isinstance(layer, nn.Conv2d):
            raise UnsupportedModel(f"Only dense convolutions have a grouped form, got {layer}.")
        weight = dense_weight(layer, "grouped").double()
        n_out, n_in, kh, kw = weight.shape
        groups, rank = config.shape(n_out, n_in, kh * kw)
        u, v = grouped_factors(weight.flatten(1), rank, groups, context.gram)
        return split_layer(layer, v, u, layer.bias, groups)


def grouped_factors(matrix: Tensor, rank: int, groups: int, gram: Tensor | None) -> tuple[Tensor, Tensor]:
    """``U (out, groups * rank)`` and the slices' own ``V (groups * rank, n / groups)``, one below the other."""
    width = matrix.shape[1] // groups
    check_rank(rank, len(matrix), width)
    left: list[Tensor] = []
    right: list[Tensor] = []
    for start in range(0, matrix.shape[1], width):
        own = slice(start, start + width)
        lower = torch.eye(width).double() if gram is None else cholesky(damped(gram[own, own].double()))
        u, s, v = torch.linalg.svd(matrix[:, own] @ lower, full_matrices=False)
        left.append(u[:, :rank] * s[:rank])
        right.append(torch.linalg.solve_triangular(lower, v[:rank], upper=False, left=False))
    if gram is None:
        return torch.cat(left, dim=1), torch.cat(right)
    wide = torch.block_diag(*right)  # type: ignore[no-untyped-call]
    return refit_second(matrix, wide, gram), torch.cat(right)


def first_left_out(weight: Tensor, ratio: float, groups: int) -> float:
    """The largest singular value that no slice keeps.  # of (out, in, kh, kw)"""
    n_out, n_in = weight.shape[:2]
    rank = group_rank(ratio, n_out, n_in, weight[0, 0].numel(), groups)
    slices = weight.detach().double().flatten(1).chunk(groups, dim=1)
    return max(float(values[rank]) if rank < len(values) else 0.0 for values in map(torch.linalg.svdvals, slices))


def error_bound(weight: Tensor, ratio: float, groups: int) -> float:
    """Largest relative error in the spectral norm, by Eckart-Young on every slice.  # of (out, in, kh, kw)"""
    largest = float(torch.linalg.svdvals(weight.detach().double().flatten(1))[0])
    return math.sqrt(groups) * first_left_out(weight, ratio, groups) / max(largest, 1e-30)


def best_split(weight: Tensor, ratio: float) -> int:
    """The number of groups that leaves out the least singular value at this share of the weights; the fewest of equals.

    As in the published code, without the bound's ``sqrt(k)``: slices hardly ever err all in one direction, and with it nearly
    every layer stays whole.
    """
    fitting = [k for k in SPLITS if weight.shape[1] % k == 0]
    return min(fitting, key=lambda k: (first_left_out(weight, ratio, k), k))

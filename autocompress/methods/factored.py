"""What factorizations share: a chain of thinner layers in place of one, and least squares behind its first ones.

With a Gram matrix ``H = X X^T / rows`` of the layer's inputs, errors are those of outputs: ``tr((W - W') H (W - W')^T)``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn

from autocompress.errors import UnsupportedModel, UsageError
from autocompress.types import Kernel, MethodConfig


@dataclass(frozen=True)
class Factored(MethodConfig):
    """A layer as a product with about ``ratio`` times its weights; ranks follow from the layer's surviving shape."""

    ratio: float

    @property
    def fitted(self) -> bool:
        return True

    def __post_init__(self) -> None:
        if not (math.isfinite(self.ratio) and self.ratio > 0):
            raise UsageError(f"A factorization keeps a share of the weights above 0, got {self.ratio}.")


def rank_within(ratio: float, n_weights: int, per_rank: int, full: int) -> int:
    """Largest rank up to ``full`` whose factors hold at most ``ratio`` of ``n_weights``, at least 1."""
    return max(1, min(full, math.floor(ratio * n_weights / per_rank)))


def check_rank(rank: int, rows: int, columns: int) -> None:
    """Raises ``UsageError`` for a rank that a matrix cannot have."""
    if not 1 <= rank <= min(rows, columns):
        raise UsageError(f"A matrix of {rows} x {columns} has a rank of 1 to {min(rows, columns)}, got {rank}.")


def narrowed(kernel: Kernel, rank: int, groups: int = 1) -> tuple[Kernel, Kernel]:
    """The kernels of a layer split behind its input: ``kernel`` to ``rank`` channels, then 1 x 1."""
    middle = (rank, *kernel.out_shape[1:])
    first = replace(kernel, out_shape=middle, groups=groups, fused="")
    return first, replace(kernel, in_shape=middle, kernel=(1, 1), stride=(1, 1))


class TwoFactors(Factored):
    """A layer split behind its input: as it is to ``rank`` channels, then 1 x 1."""

    def rank(self, n_out: int, n_unfolded: int) -> int:
        """Largest rank whose factors hold at most ``ratio`` of the weights, at least 1."""
        return rank_within(self.ratio, n_out * n_unfolded, n_out + n_unfolded, min(n_out, n_unfolded))


class LowersToTwo:
    """What handlers of :class:`TwoFactors` share."""

    def lower(self, config: MethodConfig, kernel: Kernel) -> tuple[Kernel, ...]:
        assert isinstance(config, TwoFactors)
        n_unfolded = kernel.in_shape[0] * kernel.kernel[0] * kernel.kernel[1]
        return narrowed(kernel, config.rank(kernel.out_shape[0], n_unfolded))


# ---------------------------------------------------------------- modules


def dense_weight(layer: nn.Module, what: str) -> Tensor:
    """The weight of a layer that has a form ``what``.  # (out, in, kh, kw) or (out, in); raises ``UnsupportedModel``"""
    if not (isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups == 1)):
        raise UnsupportedModel(f"Only dense convolutions and linear layers have a {what} form, got {layer}.")
    if isinstance(layer.padding if isinstance(layer, nn.Conv2d) else (), str):
        raise UnsupportedModel(f"Padding {layer.padding!r} as a word has no {what} form; give it in pixels.")
    return layer.weight.detach()


def split_layer(layer: nn.Module, first: Tensor, second: Tensor, bias: Tensor | None, groups: int = 1) -> nn.Sequential:
    """Two layers for one: ``first (rank, in / groups * kh * kw)`` where the layer reads, ``second (out, rank)`` behind it."""
    if isinstance(layer, nn.Conv2d):
        area = layer.kernel_size[0] * layer.kernel_size[1]
        return chain(
            layer,
            [
                (
                    like_conv(layer, len(first), groups),
                    first.reshape(len(first), first.shape[1] // area, *layer.kernel_size),
                ),
                (nn.Conv2d(len(first), len(second), 1, bias=bias is not None), second[:, :, None, None]),
            ],
            bias,
        )
    parts = [
        (nn.Linear(first.shape[1], len(first), bias=False), first),
        (nn.Linear(len(first), len(second), bias=bias is not None), second),
    ]
    return chain(layer, parts, bias)


def like_conv(layer: nn.Conv2d, n_out: int, groups: int = 1, n_in: int | None = None) -> nn.Conv2d:
    """A convolution that reads as ``layer`` does, without a bias."""
    return nn.Conv2d(
        n_in or layer.in_channels,
        n_out,
        cast("tuple[int, int]", layer.kernel_size),
        cast("tuple[int, int]", layer.stride),
        cast("tuple[int, int]", layer.padding),
        cast("tuple[int, int]", layer.dilation),
        groups,
        bias=False,
        padding_mode=layer.padding_mode,
    )


def chain(layer: nn.Module, parts: Sequence[tuple[nn.Module, Tensor]], bias: Tensor | None) -> nn.Sequential:
    """Modules with their weights, in the layer's type; the last has the bias."""
    dtype = cast(Tensor, layer.weight).dtype
    for module, weight in parts:
        module.weight = nn.Parameter(weight.to(dtype).contiguous(), requires_grad=False)
    if bias is not None:
        parts[-1][0].bias = nn.Parameter(bias.detach().to(dtype).clone(), requires_grad=False)
    return nn.Sequential(*(module for module, _ in parts))


def composed(module: nn.Module) -> Tensor:
    """The weight of a layer, or of a chain as one layer: of two in a row, one is 1 wide along each axis.  # as the layer's"""
    if isinstance(module, nn.Sequential):
        parts = [_ungrouped(part) for part in module if isinstance(part, nn.Conv2d | nn.Linear)]
        weight = parts[0]
        for part in parts[1:]:
            weight = _behind(part, weight)
        return weight
    own = getattr(module, "dense_weight", None)
    return cast(Tensor, own() if own is not None else module.weight)


def _ungrouped(module: nn.Conv2d | nn.Linear) -> Tensor:
    """The weight of a factor on all its inputs, zero outside its groups."""
    if isinstance(module, nn.Linear) or module.groups == 1:
        return module.weight
    blocks = enumerate(module.weight.chunk(module.groups))  # (out / groups, in / groups, kh, kw) each
    return torch.cat(
        [torch.nn.functional.pad(b, (0, 0, 0, 0, _before(module, g), _after(module, g))) for g, b in blocks]
    )


def _before(module: nn.Conv2d, group: int) -> int:
    return group * (module.in_channels // module.groups)


def _after(module: nn.Conv2d, group: int) -> int:
    return module.in_channels - _before(module, group + 1)


def _behind(second: Tensor, first: Tensor) -> Tensor:
    if first.ndim == 2:
        return second @ first
    return torch.einsum("orab,ricd->oicadb", second, first).flatten(4).flatten(2, 3)


# ---------------------------------------------------------------- algebra


def refit_second(matrix: Tensor, a: Tensor, gram: Tensor) -> Tensor:
    """``argmin_U ||(W - U A) X|| = W H A^T (A H A^T)^-1``.  # (out, n), (rank, n), (n + 1, n + 1) -> (out, rank)"""
    n = matrix.shape[1]
    h = damped(gram[:n, :n].double())
    cross = matrix @ h @ a.T
    solved: Tensor = torch.linalg.solve(damped(a @ h @ a.T), cross.T)
    return solved.T


def damped(h: Tensor) -> Tensor:
    ridge = 1e-6 * h.diagonal().mean().clamp_min(1e-12)
    return h + ridge * torch.eye(len(h), dtype=h.dtype)


def principal(covariance: Tensor, rank: int) -> Tensor:
    """Eigenvectors of the largest eigenvalues, the largest first.  # (n, n) -> (n, rank)"""
    _, vectors = torch.linalg.eigh(covariance)
    return cast(Tensor, vectors[:, -rank:].flip(1))

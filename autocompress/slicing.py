"""Modules with fewer channels: layers of given weights, norms, and the columns of embeddings.

Knows nothing of graphs.
"""

from __future__ import annotations

import copy

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn


def is_channelwise(conv: nn.Conv2d) -> bool:
    """Whether each filter reads one channel."""
    return conv.groups == conv.in_channels


class _Conv2d(nn.Conv2d):
    """Without the random weights that a new one draws, for nothing here."""

    def reset_parameters(self) -> None: ...


class _Linear(nn.Linear):
    """As :class:`_Conv2d`."""

    def reset_parameters(self) -> None: ...


def make_layer(like: nn.Module, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """A Conv2d or Linear with these weights and the geometry of ``like``."""
    new: nn.Conv2d | nn.Linear
    if isinstance(like, nn.Conv2d):
        groups = 1
        if like.groups > 1:
            groups = weight.shape[0] * like.in_channels // like.out_channels if is_channelwise(like) else like.groups
        new = _Conv2d(
            weight.shape[1] * groups,
            weight.shape[0],
            (int(weight.shape[2]), int(weight.shape[3])),
            like.stride,  # type: ignore[arg-type]
            like.padding,  # type: ignore[arg-type]
            like.dilation,  # type: ignore[arg-type]
            groups,
            bias is not None,
            like.padding_mode,
            device="meta",
        )
        new.__class__ = nn.Conv2d  # type: ignore[assignment]
    else:
        new = _Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
        new.__class__ = nn.Linear  # type: ignore[assignment]
    new.weight = nn.Parameter(weight.clone(memory_format=torch.contiguous_format), requires_grad=False)
    if bias is not None:
        new.bias = nn.Parameter(bias.clone(), requires_grad=False)
    return new


def slice_channelwise(old: nn.Module, index: npt.NDArray[np.intp]) -> nn.Module:
    """Batch norm, PReLU, RMSNorm or the columns of an embedding with the kept channels only."""
    new = copy.deepcopy(old)
    kept = torch.from_numpy(index)
    if isinstance(new, nn.RMSNorm):
        return _sliced_rms(new, kept)
    if isinstance(new, nn.Embedding):
        new.weight, new.embedding_dim = sliced_columns(new.weight, index), len(index)
        return new
    for name, tensor in [*old.named_parameters(recurse=False), *old.named_buffers(recurse=False)]:
        if (tensor.ndim == 1 and tensor.shape[0] > 1) or (tensor.ndim == 1 and len(index) == 1):
            sliced = tensor.detach()[kept].clone()
            if isinstance(tensor, nn.Parameter):
                setattr(new, name, nn.Parameter(sliced, requires_grad=False))
            else:
                setattr(new, name, sliced)
    if isinstance(new, nn.BatchNorm1d | nn.BatchNorm2d):
        new.num_features = len(index)
    return new


def _sliced_rms(norm: nn.RMSNorm, kept: Tensor) -> nn.RMSNorm:
    """``norm``, which is changed, over ``n`` of ``N`` channels: what it is over all of them where the others are zero.

    ``x w / sqrt(sum x^2 / N + eps)`` is ``x (w sqrt(N / n)) / sqrt(sum x^2 / n + eps N / n)``.
    """
    before, after = norm.normalized_shape[0], len(kept)
    if after == before:  # perhaps in another order
        if norm.weight is not None:
            norm.weight = nn.Parameter(norm.weight.detach()[kept].clone(), requires_grad=norm.weight.requires_grad)
        return norm
    eps = torch.finfo(torch.float32).eps if norm.eps is None else norm.eps
    weight = torch.ones(before) if norm.weight is None else norm.weight.detach()
    new = nn.RMSNorm(after, eps * before / after, device="meta")
    new.weight = nn.Parameter(weight[kept] * (before / after) ** 0.5, requires_grad=False)
    return new.train(norm.training)


def sliced_columns(weight: Tensor, index: npt.NDArray[np.intp]) -> nn.Parameter:
    """The kept columns of an embedding's weight, as a parameter of its own.  # (rows, len(index))"""
    return nn.Parameter(weight.detach()[:, torch.from_numpy(index)].clone(), requires_grad=False)

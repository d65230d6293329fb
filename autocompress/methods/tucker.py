"""Tucker-2: a convolution as 1 x 1, k x k on fewer channels, 1 x 1 (Kim et al. 2016, "Compression of deep CNNs").

``W[o, i] = sum U[o, p] G[p, q] V[i, q]``. With a Gram matrix ``U`` starts from the principal components of the outputs and, once
the first two are known, is fitted to the outputs; without, both are those of higher-order orthogonal iteration (De Lathauwer et
al. 2000).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn

from autocompress.errors import UnsupportedModel
from autocompress.methods.base import LayerContext, handles
from autocompress.methods.factored import Factored, chain, check_rank, dense_weight, like_conv, principal, refit_second
from autocompress.types import Kernel, MethodConfig

ITERATIONS = 4


@dataclass(frozen=True)
class Tucker2(Factored):
    """Three factors with about ``ratio`` times the weights; both ranks are the same share of their channels."""

    def describe(self) -> str:
        return f"Tucker {self.ratio:.0%}"

    def ranks(self, n_out: int, n_in: int, kernel: tuple[int, int]) -> tuple[int, int]:
        """Ranks of outputs and inputs: the largest pair along the diagonal that holds at most ``ratio`` of the weights."""
        area = kernel[0] * kernel[1]
        best = 1, 1
        for step in range(1, max(n_out, n_in) + 1):
            out, into = max(1, n_out * step // max(n_out, n_in)), max(1, n_in * step // max(n_out, n_in))
            if n_in * into + into * out * area + out * n_out > self.ratio * n_out * n_in * area:
                break
            best = out, into
        return best


@handles(Tucker2, "tucker")
class _Tucker2Handler:
    def lower(self, config: MethodConfig, kernel: Kernel) -> tuple[Kernel, ...]:
        assert isinstance(config, Tucker2)
        out, into = config.ranks(kernel.out_shape[0], kernel.in_shape[0], kernel.kernel)
        small_in, small_out = (into, *kernel.in_shape[1:]), (out, *kernel.out_shape[1:])
        first = replace(kernel, out_shape=small_in, kernel=(1, 1), stride=(1, 1), fused="")
        middle = replace(kernel, in_shape=small_in, out_shape=small_out, fused="")
        return first, middle, replace(kernel, in_shape=small_out, kernel=(1, 1), stride=(1, 1))

    def apply(self, config: MethodConfig, layer: nn.Module, context: LayerContext) -> nn.Module:
        assert isinstance(config, Tucker2)
        if not isinstance(layer, nn.Conv2d) or layer.groups != 1 or max(layer.kernel_size) == 1:
            raise UnsupportedModel(f"Only dense convolutions wider than 1 x 1 have a Tucker form, got {layer}.")
        weight = dense_weight(layer, "Tucker").double()
        n_out, n_in = weight.shape[:2]
        u, core, v = tucker2(
            weight, config.ranks(n_out, n_in, cast("tuple[int, int]", layer.kernel_size)), context.gram
        )
        bias = layer.bias
        parts: list[tuple[nn.Module, Tensor]] = [
            (nn.Conv2d(n_in, v.shape[1], 1, bias=False), v.T[:, :, None, None]),
            (like_conv(layer, len(core), n_in=v.shape[1]), core),
            (nn.Conv2d(len(core), n_out, 1, bias=bias is not None), u[:, :, None, None]),
        ]
        return chain(layer, parts, bias)


def tucker2(weight: Tensor, ranks: tuple[int, int], gram: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """``U (out, p), G (p, q, kh, kw), V (in, q)`` of a weight ``(out, in, kh, kw)``."""
    (out, into), matrix = ranks, weight.flatten(1)
    check_rank(out, weight.shape[0], weight.shape[0])
    check_rank(into, weight.shape[1], weight.shape[1])
    n = matrix.shape[1]
    metric = matrix.T if gram is None else gram[:n, :n].double() @ matrix.T
    u = principal(matrix @ metric, out)
    for _ in range(ITERATIONS if gram is None else 1):
        by_input = torch.einsum("op,oihw->pihw", u, weight).transpose(0, 1).flatten(1)  # (in, p * kh * kw)
        v = principal(by_input @ by_input.T, into)
        if gram is None:
            by_output = torch.einsum("iq,oihw->oqhw", v, weight).flatten(1)  # (out, q * kh * kw)
            u = principal(by_output @ by_output.T, out)
    core = torch.einsum("op,oihw,iq->pqhw", u, weight, v)
    if gram is not None:
        first = torch.einsum("pqhw,iq->pihw", core, v).flatten(1)  # (p, in * kh * kw)
        u = refit_second(matrix, first, gram)
    return u, core, v

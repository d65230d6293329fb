"""Weights rounded without data, their channels' errors made good in closed form (UDFC; Bai et al. 2023: its quantized half).

The integers are those of rounding to nearest, ``w -> q``. Then each output channel gets a factor and a shift that restore its
pre-activation ``y = w x``: ``a`` with ``cov(a q x, w x) = var(w x)``, ``b`` with ``E(a q x + b) = E(w x)``. For inputs with mean
``m`` and variance ``v`` that do not depend on each other, ``a = sum w^2 v / sum w q v`` and ``b = (w - a q) m``. The factor goes
into the scales, the shift into the bias or the norm behind. ``m`` and ``v`` come from batch norms (``expected.py``); without
them every input counts alike and no shift is made.

The least squares ``a = sum w q v / sum q^2 v`` would also shrink a channel by what noise rounding adds, layer by layer: worse
than no factor on the digits network.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from autocompress.methods.base import LayerContext, handles
from autocompress.methods.grids import Grid
from autocompress.methods.hessian import parts_of
from autocompress.methods.quantization import PackedWeight, WeightFakeQuant, WeightQuant, pack_weight
from autocompress.types import Kernel, MethodConfig

LIMIT = 2.0
"""Factors beyond it either way are left out: a channel of which hardly anything is left, or whose inputs never vary."""


@dataclass(frozen=True)
class UDFCQuant(WeightQuant):
    """Weights rounded to nearest on ``bits``, each output channel restored from batch norms: no data is seen."""

    def describe(self) -> str:
        return f"{self.bits}-bit weights{f' in groups of {self.group}' if self.group else ''} without data"

    @property
    def fitted(self) -> bool:
        return True


@handles(UDFCQuant, "udfc_quant")
class _UDFCQuantHandler:
    def lower(self, config: MethodConfig, kernel: Kernel) -> tuple[Kernel, ...]:
        assert isinstance(config, UDFCQuant)
        return (replace(kernel, format="w8" if config.bits == 8 else "w4"),)

    def apply(self, config: MethodConfig, layer: nn.Module, context: LayerContext) -> nn.Module:
        assert isinstance(config, UDFCQuant)
        for i, (part, _) in enumerate(list(parts_of(layer, None))):
            mean, variance = context.expected if context.expected is not None and i == 0 else (None, None)
            weight = part.weight.detach()
            packed = restored(weight, config.bits, config.group, variance, config.grid)
            rounded = packed.dequantize()
            if mean is not None and part.bias is not None:
                shift = (weight - rounded).flatten(1).double() @ mean
                part.bias = nn.Parameter((part.bias.detach().double() + shift).float(), requires_grad=False)
            _set(part, rounded)
            quantizer = WeightFakeQuant(config.bits, config.group, scale=packed.scale, grid=config.grid)
            parametrize.register_parametrization(part, "weight", quantizer)
        return layer


def restored(weight: Tensor, bits: int, group: int, variance: Tensor | None, grid: Grid = "narrow") -> PackedWeight:
    """Integers, and scales with each channel's restoring factor.  # (out, ...), variance (n,)"""
    n = weight[0].numel()
    v = torch.ones(n, dtype=torch.float64) if variance is None else variance
    packed = pack_weight(weight, bits, group, grid=grid)
    w, q = weight.flatten(1).double(), packed.dequantize().flatten(1).double()
    factor = (w.square() * v).sum(1) / (w * q * v).sum(1).clamp_min(torch.finfo(torch.float64).tiny)
    factor = torch.where((factor > 1 / LIMIT) & (factor < LIMIT), factor, 1.0)
    scale = packed.scale * factor.reshape(-1, *[1] * (packed.scale.ndim - 1)).float()
    return replace(packed, scale=scale)


def _set(part: nn.Conv2d | nn.Linear, weight: Tensor) -> None:
    new = nn.Parameter(weight.to(part.weight.dtype).contiguous(), requires_grad=False)
    if parametrize.is_parametrized(part, "weight"):
        part.parametrizations["weight"].original = new  # type: ignore[index,union-attr]
    else:
        part.weight = new

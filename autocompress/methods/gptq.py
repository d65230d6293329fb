"""Weights rounded so that a layer's outputs change least: GPTQ (Frantar et al. 2023), and the handler of :class:`WeightQuant`.

Columns are rounded in the order of falling ``H_jj``, and those that come later make good what is lost: the step of Optimal Brain
Quantization (Frantar et al. 2022) in one order for all rows. Scales are chosen before, a channel or block each, out of shares of
its largest magnitude, by the rounding error weighted with ``H_jj``; so blocks do not depend on the order.

What comes out lies on its grid, and the fake quantizer keeps the scales: rounding it again changes nothing, also behind a
folded norm, whose factor goes into the scale. Without a Gram matrix (depthwise, very wide) weights go to the nearest step of
the chosen grid.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from autocompress.methods.base import LayerContext, forms_of, handles, set_weight
from autocompress.methods.hessian import Hessian, parts_of, sweep
from autocompress.methods.quantization import (
    PackedWeight,
    WeightFakeQuant,
    WeightQuant,
    fake_quantized,
    pack_weight,
    per_scale,
    spread,
    weight_scale,
)
from autocompress.types import Kernel, MethodConfig

SHARES = torch.linspace(1.0, 0.2, 17).tolist()
"""Of the largest magnitude: where a grid may end."""


@handles(WeightQuant, "weight_quant")
class _WeightQuantHandler:
    def lower(self, config: MethodConfig, kernel: Kernel) -> tuple[Kernel, ...]:
        assert isinstance(config, WeightQuant)
        return (replace(kernel, format="w8" if config.bits == 8 else "w4"),)

    def apply(self, config: MethodConfig, layer: nn.Module, context: LayerContext) -> nn.Module:
        assert isinstance(config, WeightQuant)
        if config.by == "nearest":
            return fake_quantized(layer, config.bits, config.group)
        for part, gram in list(parts_of(layer, context.gram)):
            hessian = context.hessian(part, gram)
            packed = gptq(part.weight.detach(), config.bits, config.group, hessian, _mask(part))
            if hessian is not None:
                set_weight(part, packed.dequantize(), hessian)
            quantizer = WeightFakeQuant(config.bits, config.group, scale=packed.scale)
            parametrize.register_parametrization(part, "weight", quantizer)
        return layer


def _mask(part: nn.Module) -> Tensor | None:
    """Which weights live, where a mask lies on the layer.  # (rows, n) bool"""
    for form in forms_of(part):
        mask = getattr(form, "mask", None)
        if isinstance(mask, Tensor):
            return mask.flatten(1)
    return None


def gptq(
    weight: Tensor, bits: int, group: int = 0, hessian: Hessian | None = None, mask: Tensor | None = None
) -> PackedWeight:
    """The weight's integers and scales, see the module's docstring. ``mask``: what is false stays zero."""
    shape, n = weight.shape, weight[0].numel()
    diagonal = torch.ones(n, dtype=torch.float64) if hessian is None else hessian.matrix.diagonal()
    scale = searched_scale(weight, bits, group, diagonal)
    if hessian is None:
        return pack_weight(weight, bits, group, scale=scale)
    top = 2 ** (bits - 1) - 1
    steps = spread(scale, shape, group).expand(shape).flatten(1).double()
    order = hessian.falling()
    places = order.tolist()
    integers = torch.zeros(shape[0], n, dtype=torch.int8)

    def settle(column: int, ahead: Tensor) -> Tensor:
        place = places[column]
        step = steps[:, place]
        rounded = (ahead[:, 0] / step).round().clamp(-top, top)
        if mask is not None:
            rounded = rounded * mask[:, place]
        integers[:, place] = rounded.to(torch.int8)
        return rounded * step

    sweep(weight.flatten(1)[:, order], hessian.inverse_root(order), settle)
    return PackedWeight(integers.reshape(shape), scale, bits, group)


def searched_scale(weight: Tensor, bits: int, group: int, importance: Tensor) -> Tensor:
    """Scales with the least rounding error, weighted by the importance of each column.  # importance (n,)"""
    top = 2 ** (bits - 1) - 1
    w, widest = weight.detach().float(), weight_scale(weight, bits, group)
    weights = importance.float().reshape(1, *weight.shape[1:])
    best, least = widest, torch.full(widest.shape, torch.inf)
    for share in SHARES:
        scale = widest * share
        steps = spread(scale, w.shape, group)
        error = per_scale(((w / steps).round().clamp(-top, top) * steps - w).square() * weights, group).sum(-1)
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    return best

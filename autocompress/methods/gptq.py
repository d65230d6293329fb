"""Weights rounded so that a layer's outputs change least: GPTQ (Frantar et al. 2023), and the handler of :class:`WeightQuant`.

Columns are rounded in the order of falling ``H_jj``, and those that come later make good what is lost: the step of Optimal Brain
Quantization (Frantar et al. 2022) in one order for all rows. Scales are searched before, a channel or block each, by the rounding
error to the power of 2.4 as the published code does; so blocks do not depend on the order. Afterwards the integers stay and each
row's scales go to the least output error, all together, in closed form. Going column by column is greedy: a row for which the
nearest steps are better (seen with few, entangled inputs) takes those.

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
from autocompress.methods.grids import NORM, Grid, codes, refitted_scale, searched_scale, spread
from autocompress.methods.hessian import Hessian, parts_of, sweep
from autocompress.methods.quantization import (
    PackedWeight,
    WeightFakeQuant,
    WeightQuant,
    fake_quantized,
    pack_weight,
)
from autocompress.types import Kernel, MethodConfig


@handles(WeightQuant, "weight_quant")
class _WeightQuantHandler:
    def lower(self, config: MethodConfig, kernel: Kernel) -> tuple[Kernel, ...]:
        assert isinstance(config, WeightQuant)
        return (replace(kernel, format="w8" if config.bits == 8 else "w4"),)

    def apply(self, config: MethodConfig, layer: nn.Module, context: LayerContext) -> nn.Module:
        assert isinstance(config, WeightQuant)
        if config.by == "nearest":
            return fake_quantized(layer, config.bits, config.group, grid=config.grid)
        for part, gram in list(parts_of(layer, context.gram)):
            hessian = context.hessian(part, gram)
            weight, mask = part.weight.detach(), _mask(part)
            packed = gptq(weight, config.bits, config.group, hessian, mask, config.grid)
            if hessian is not None:
                set_weight(part, packed.dequantize(), hessian)
            quantizer = WeightFakeQuant(config.bits, config.group, scale=packed.scale, grid=config.grid)
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
    weight: Tensor,
    bits: int,
    group: int = 0,
    hessian: Hessian | None = None,
    mask: Tensor | None = None,
    grid: Grid = "narrow",
) -> PackedWeight:
    """The weight's integers and scales, see the module's docstring.

    # weight (out, in, *kernel); ``mask`` (out, n) bool: what is false stays zero
    """
    shape, n = weight.shape, weight[0].numel()
    if hessian is None:
        return pack_weight(weight, bits, group, scale=searched_scale(weight, bits, group, grid), grid=grid)
    low, top = codes(bits, grid)
    scale = searched_scale(weight, bits, group, grid, NORM)
    steps = spread(scale, shape, group).expand(shape).flatten(1).double()
    order = hessian.falling()
    places = order.tolist()
    integers = torch.zeros(shape[0], n, dtype=torch.int8)

    def settle(column: int, ahead: Tensor) -> Tensor:
        place = places[column]
        step = steps[:, place]
        rounded = (ahead[:, 0] / step).round().clamp(low, top)
        if mask is not None:
            rounded = rounded * mask[:, place]
        integers[:, place] = rounded.to(torch.int8)
        return rounded * step

    sweep(weight.flatten(1)[:, order], hessian.inverse_root(order), settle)
    scale = refitted_scale(integers.reshape(shape), scale, weight, hessian.matrix, group)
    made = PackedWeight(integers.reshape(shape), scale, bits, group)
    return _better(made, pack_weight(weight, bits, group, grid=grid), weight, hessian)


def _better(made: PackedWeight, nearest: PackedWeight, weight: Tensor, hessian: Hessian) -> PackedWeight:
    """Of each row the one with the smaller output error."""
    errors = [hessian.error((each.dequantize() - weight.float()).flatten(1)) for each in (made, nearest)]
    rows = errors[0] <= errors[1]  # (out,)

    def of(first: Tensor, second: Tensor) -> Tensor:
        return torch.where(rows.reshape(-1, *[1] * (first.ndim - 1)), first, second)

    chosen = of(made.integers, nearest.integers), of(made.scale, nearest.scale)
    return PackedWeight(*chosen, made.bits, made.group)

"""Weight quantization (8, 4, 3 and 2 bits) and static int8 with calibrated activations.

All grids are those of ONNX ``QuantizeLinear`` / ``DequantizeLinear``, so that what is searched is what is exported:

* weights: no zero point, one scale an output channel (``group = 0``) or one a block of ``group`` input channels and kernel
  position; ``q = clip(round(w / s), low, 2^(b-1) - 1)``, with the codes and scales of ``grids.py``;
* activations: asymmetric over 256 levels, one scale a tensor, zero exactly representable (Jacob et al. 2018, eq. 1).

Grids without a zero point commute with folding batch norm (a positive or negative factor a channel): on a narrow grid the
factor's sign goes into the integers, on a full one, whose codes have no mirror, into the scale. So fake quantization of the live,
unfolded weight equals quantization of the folded one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from autocompress.errors import UnsupportedModel, UsageError
from autocompress.methods.base import LayerContext, handles
from autocompress.methods.grids import Grid, codes, searched_scale, spread, weight_scale
from autocompress.types import Kernel, MethodConfig, Storage


@dataclass(frozen=True)
class WeightQuant(MethodConfig):
    """Weights rounded to ``bits``; activations stay float. Smaller, not faster, where the runtime dequantizes.

    ``by``: to the nearest step, or as ``gptq.py`` does. ``grid``: see ``grids.py``; a full one has searched scales. 3- and 2-bit
    weights are stored in 4 bits. Raises :class:`UsageError` for 8 bits on a full grid.
    """

    bits: Literal[2, 3, 4, 8] = 8
    group: int = 0
    by: Literal["nearest", "gptq"] = "nearest"
    grid: Grid = "narrow"

    def __post_init__(self) -> None:
        if self.bits == 8 and self.grid == "full":
            raise UsageError(
                "8-bit weights are within -127..127, where integer kernels are exact on every processor, got grid='full'; "
                "take grid='narrow', or fewer bits."
            )

    def describe(self) -> str:
        name = f"{self.bits}-bit weights" + (f" in groups of {self.group}" if self.group else "")
        name += " on a narrow grid" if self.bits < 8 and self.grid == "narrow" else ""
        return name + (" by GPTQ" if self.by == "gptq" else "")

    @property
    def fitted(self) -> bool:
        return self.by == "gptq"

    def store(self, kernel: Kernel, before: Storage) -> Storage:
        return _stored(kernel, before, self.bits, self.group)


@dataclass(frozen=True)
class StaticInt8(MethodConfig):
    """8-bit weights and activations with calibrated ranges: runs in integer arithmetic."""

    def describe(self) -> str:
        return "int8"

    def store(self, kernel: Kernel, before: Storage) -> Storage:
        return _stored(kernel, before, 8, 0)


Ranges = Literal["minmax", "percentile", "mse", "entropy"]


@dataclass(frozen=True)
class CalibratedInt8(StaticInt8):
    """:class:`StaticInt8` whose activations' ranges are chosen otherwise than by their extremes; see ``ranges.py``."""

    ranges: Ranges = "mse"

    def describe(self) -> str:
        return f"int8 by {self.ranges}"


def _stored(kernel: Kernel, before: Storage, bits: int, group: int) -> Storage:
    """Integers, and a float scale an output channel or block."""
    columns = kernel.in_shape[0] // kernel.groups
    blocks = -(-columns // group) * kernel.kernel[0] * kernel.kernel[1] if group else 1
    return Storage(before.values, bits, before.extra + 32 * kernel.out_shape[0] * blocks)


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """Integers and scales of one weight. ``layer.weight`` equals :meth:`dequantize` to the bit.

    ``integers``: int8, the weight's shape, within the signed ``bits`` range. ``scale``: float32, ``(out,)`` when
    ``group == 0``, else ``(out, ceil(in / group), *kernel)``; negative ones are allowed (``grids.py``). ``activations``: the
    layer runs in int8 altogether.
    """

    integers: Tensor
    scale: Tensor
    bits: int
    group: int = 0
    activations: bool = False

    def dequantize(self) -> Tensor:
        return self.integers.to(torch.float32) * spread(self.scale, self.integers.shape, self.group)


def pack_weight(
    weight: Tensor,
    bits: int,
    group: int = 0,
    activations: bool = False,
    scale: Tensor | None = None,
    grid: Grid = "narrow",
) -> PackedWeight:
    """Round to nearest on the grid with these scales, or on the weight's own: the widest narrow one, the best full one."""
    if scale is None:
        scale = weight_scale(weight, bits, group) if grid == "narrow" else searched_scale(weight, bits, group, grid)
    ratio = weight.detach().to(torch.float32) / spread(scale, weight.shape, group)
    return PackedWeight(ratio.round().clamp(*codes(bits, grid)).to(torch.int8), scale, bits, group, activations)


class WeightFakeQuant(nn.Module):
    """Parametrization ``w -> dequantize(quantize(w))`` with a straight-through gradient (Bengio et al. 2013).

    ``scale``: of a grid that stays; without it the grid follows the weight.
    """

    scale: Tensor | None

    def __init__(
        self,
        bits: int,
        group: int = 0,
        activations: bool = False,
        scale: Tensor | None = None,
        grid: Grid = "narrow",
    ) -> None:
        super().__init__()
        self.bits, self.group, self.activations, self.grid = bits, group, activations, grid
        self.register_buffer("scale", scale)

    def forward(self, weight: Tensor) -> Tensor:
        packed = pack_weight(weight, self.bits, self.group, scale=self.scale, grid=self.grid)
        rounded = packed.dequantize().to(weight.dtype)
        return weight + (rounded - weight).detach()

    def pack(self, weight: Tensor, factor: Tensor) -> PackedWeight:
        """Integers and scales of a folded weight; ``factor``: what folding multiplied each output channel by.  # (out,)"""
        scale = None if self.scale is None else folded_scale(self.scale, factor, self.grid)
        return pack_weight(weight, self.bits, self.group, self.activations, scale, self.grid)


def folded_scale(scale: Tensor, factor: Tensor, grid: Grid) -> Tensor:
    """Scales behind a factor an output channel, 1 where it is zero.  # factor (out,)"""
    folded = scale * (factor.abs() if grid == "narrow" else factor).reshape(-1, *[1] * (scale.ndim - 1))
    return torch.where(folded != 0, folded, torch.ones_like(folded))


class ActivationQuant(nn.Module):
    """Fake quantization of one tensor to 256 levels; stands where QuantizeLinear/DequantizeLinear will be exported.

    ``scale`` and ``zero_point`` are on the uint8 grid ``0..255``; the int8 grid of the same tensor has ``zero_point - 128``.
    """

    def __init__(self, low: float, high: float) -> None:
        super().__init__()
        low, high = min(low, 0.0), max(high, 0.0)
        self.scale = float(torch.tensor(max(high - low, 1e-8) / 255, dtype=torch.float32))
        self.zero_point = int(min(255, max(0, round(-low / self.scale))))

    def forward(self, x: Tensor) -> Tensor:
        return torch.fake_quantize_per_tensor_affine(x, self.scale, self.zero_point, 0, 255)

    def extra_repr(self) -> str:
        return f"scale={self.scale:.4g}, zero_point={self.zero_point}"


def quantizer_of(layer: nn.Module) -> WeightFakeQuant | None:
    """The fake quantizer on a layer's weight, if it has one."""
    if not parametrize.is_parametrized(layer, "weight"):
        return None
    for step in layer.parametrizations["weight"]:  # type: ignore[index]
        if isinstance(step, WeightFakeQuant):
            return step
    return None


def fake_quantized(
    layer: nn.Module, bits: int, group: int = 0, activations: bool = False, grid: Grid = "narrow"
) -> nn.Module:
    """The layer, or each of its factors, with a fake quantizer on its weight; the searched scales of a full grid stay."""
    if not isinstance(layer, nn.Conv2d | nn.Linear | nn.Sequential):
        raise UnsupportedModel(f"Only convolutions and linear layers can be quantized, got {type(layer).__name__}.")
    for part in layer if isinstance(layer, nn.Sequential) else (layer,):
        scale = searched_scale(part.weight, bits, group, grid) if grid == "full" else None  # type: ignore[arg-type]
        quantizer = WeightFakeQuant(bits, group, activations, scale, grid)
        parametrize.register_parametrization(part, "weight", quantizer)
    return layer


@handles(CalibratedInt8, "int8_ranges")
@handles(StaticInt8, "int8")
class _StaticInt8Handler:
    def lower(self, config: MethodConfig, kernel: Kernel) -> tuple[Kernel, ...]:
        return (replace(kernel, format="int8"),)

    def apply(self, config: MethodConfig, layer: nn.Module, context: LayerContext) -> nn.Module:
        return fake_quantized(layer, 8, activations=True)

"""Weight quantization (8 and 4 bits) and static int8 with calibrated activations.

All grids are those of ONNX ``QuantizeLinear`` / ``DequantizeLinear``, so that what is searched is what is exported:

* weights: symmetric, one scale an output channel (``group = 0``) or one a block of ``group`` input channels and kernel
  position; ``q = clip(round(w / s), -(2^(b-1) - 1), 2^(b-1) - 1)``, ``s = max |w| / (2^(b-1) - 1)``;
* activations: asymmetric over 256 levels, one scale a tensor, zero exactly representable (Jacob et al. 2018, eq. 1).

Per-output-channel symmetric grids commute with folding batch norm (a positive or negative factor a channel), so fake
quantization of the live, unfolded weight equals quantization of the folded one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from autocompress.errors import UnsupportedModel
from autocompress.methods.base import LayerContext, handles
from autocompress.types import Kernel, MethodConfig, Storage


@dataclass(frozen=True)
class WeightQuant(MethodConfig):
    """Weights rounded to ``bits``; activations stay float. Smaller, not faster, where the runtime dequantizes."""

    bits: Literal[4, 8] = 8
    group: int = 0

    def describe(self) -> str:
        return f"{self.bits}-bit weights" + (f" in groups of {self.group}" if self.group else "")

    def store(self, kernel: Kernel, before: Storage) -> Storage:
        return _stored(kernel, before, self.bits, self.group)


@dataclass(frozen=True)
class StaticInt8(MethodConfig):
    """8-bit weights and activations with calibrated ranges: runs in integer arithmetic."""

    def describe(self) -> str:
        return "int8"

    def store(self, kernel: Kernel, before: Storage) -> Storage:
        return _stored(kernel, before, 8, 0)


def _stored(kernel: Kernel, before: Storage, bits: int, group: int) -> Storage:
    """Integers, and a float scale an output channel or block."""
    columns = kernel.in_shape[0] // kernel.groups
    blocks = -(-columns // group) * kernel.kernel[0] * kernel.kernel[1] if group else 1
    return Storage(before.values, bits, before.extra + 32 * kernel.out_shape[0] * blocks)


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """Integers and scales of one weight. ``layer.weight`` equals :meth:`dequantize` to the bit.

    ``integers``: int8, the weight's shape, within the signed ``bits`` range. ``scale``: float32, ``(out,)`` when
    ``group == 0``, else ``(out, ceil(in / group), *kernel)``. ``activations``: the layer runs in int8 altogether.
    """

    integers: Tensor
    scale: Tensor
    bits: int
    group: int = 0
    activations: bool = False

    def dequantize(self) -> Tensor:
        return self.integers.to(torch.float32) * _spread(self.scale, self.integers.shape, self.group)


def _spread(scale: Tensor, shape: torch.Size, group: int) -> Tensor:
    """Scales broadcast to the weight's shape."""
    if group == 0:
        return scale.reshape(-1, *[1] * (len(shape) - 1))
    return scale.repeat_interleave(group, dim=1)[:, : shape[1]]


def weight_scale(weight: Tensor, bits: int, group: int = 0) -> Tensor:
    """Scales by the largest magnitude; a channel or block of zeros gets scale 1.  # see :class:`PackedWeight`"""
    top = 2 ** (bits - 1) - 1
    magnitude = weight.detach().abs()
    if group == 0:
        largest = magnitude.flatten(1).amax(dim=1)
    else:
        pad = -weight.shape[1] % group
        padded = torch.cat([magnitude, magnitude.new_zeros(weight.shape[0], pad, *weight.shape[2:])], dim=1)
        largest = torch.unflatten(padded, 1, (-1, group)).amax(dim=2)
    return torch.where(largest > 0, largest / top, torch.ones_like(largest)).to(torch.float32)


def pack_weight(weight: Tensor, bits: int, group: int = 0, activations: bool = False) -> PackedWeight:
    """Round to nearest on the weight's own grid."""
    scale = weight_scale(weight, bits, group)
    top = 2 ** (bits - 1) - 1
    ratio = weight.detach().to(torch.float32) / _spread(scale, weight.shape, group)
    return PackedWeight(ratio.round().clamp(-top, top).to(torch.int8), scale, bits, group, activations)


class WeightFakeQuant(nn.Module):
    """Parametrization ``w -> dequantize(quantize(w))`` with a straight-through gradient (Bengio et al. 2013)."""

    def __init__(self, bits: int, group: int = 0, activations: bool = False) -> None:
        super().__init__()
        self.bits, self.group, self.activations = bits, group, activations

    def forward(self, weight: Tensor) -> Tensor:
        rounded = pack_weight(weight, self.bits, self.group).dequantize()
        return weight + (rounded - weight).detach()


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


class _Quantizes:
    """Shared by both configs: kernels change format, weights get a fake quantizer."""

    def settings(self, config: MethodConfig) -> tuple[int, int, bool]:
        raise NotImplementedError

    def lower(self, config: MethodConfig, kernel: Kernel) -> tuple[Kernel, ...]:
        bits, _, activations = self.settings(config)
        return (replace(kernel, format="int8" if activations else "w4" if bits == 4 else "w8"),)

    def apply(self, config: MethodConfig, layer: nn.Module, context: LayerContext) -> nn.Module:
        if not isinstance(layer, nn.Conv2d | nn.Linear | nn.Sequential):
            raise UnsupportedModel(f"Only convolutions and linear layers can be quantized, got {type(layer).__name__}.")
        for part in layer if isinstance(layer, nn.Sequential) else (layer,):
            parametrize.register_parametrization(part, "weight", WeightFakeQuant(*self.settings(config)))
        return layer


@handles(WeightQuant, "weight_quant")
class _WeightQuantHandler(_Quantizes):
    def settings(self, config: MethodConfig) -> tuple[int, int, bool]:
        assert isinstance(config, WeightQuant)
        return config.bits, config.group, False


@handles(StaticInt8, "int8")
class _StaticInt8Handler(_Quantizes):
    def settings(self, config: MethodConfig) -> tuple[int, int, bool]:
        return 8, 0, True

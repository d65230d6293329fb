"""Rate-distortion quantization: integers that cost few bits when packed, for little error (Wiedemann et al. 2020, DeepCABAC).

``q = argmin_k F (w / s - k)^2 + slope * bits(k)`` over the nearest integer, the next one towards zero, and zero, where ``F`` is
the mean square of the weight's input (1 without a Gram matrix, mean 1) and ``bits`` what the coder of ``coding/entropy.py`` would
now take for ``k`` between these neighbours: counts by context, counted again after every round.

The largest weight of each output channel stays, so ``s = max |w| / steps`` stays too. It stands before ``WeightQuant`` or
``StaticInt8``: their 8-bit file holds ``2 steps + 1`` different integers, and what they cost is decided by how often each occurs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from autocompress.errors import UnsupportedModel
from autocompress.methods.base import LayerContext, handles
from autocompress.types import Kernel, MethodConfig

ROUNDS = 3
CONTEXTS = 4
PRIOR = 0.5


@dataclass(frozen=True)
class RateDistortion(MethodConfig):
    """Integers up to ``steps`` either way; ``slope``: how much squared error, in steps, a bit is worth."""

    steps: int = 15
    slope: float = 0.1

    def describe(self) -> str:
        return f"{2 * self.steps + 1} values at {self.slope:g} a bit"


def cheap_integers(weight: Tensor, steps: int, slope: float, importance: Tensor | None = None) -> Tensor:
    """Integers within ``steps`` of a weight ``(out, ...)`` on one scale an output channel; a channel of zeros stays so.

    ``importance``: ``F`` of each unfolded input, of any scale.  # (in * kh * kw,) -> (out, in * kh * kw)
    """
    flat = weight.detach().double().flatten(1)
    largest = flat.abs().amax(1, keepdim=True)
    ratio = flat / torch.where(largest > 0, largest / steps, 1.0)  # (out, n)
    nearest = ratio.round()
    fixed = ratio.abs() >= steps - 1e-6
    factor = torch.ones(flat.shape[1]).double() if importance is None else importance.double().clamp_min(0)
    factor = factor / factor.mean().clamp_min(1e-30)
    options = torch.stack([nearest, nearest - nearest.sign(), torch.zeros_like(nearest)])  # (3, out, n)
    error = factor * (ratio - options) ** 2
    found = nearest
    for _ in range(ROUNDS):
        context = _context(found)
        bits = _bits(context, found, steps)  # (CONTEXTS, 2 * steps + 1)
        cost = error + slope * bits[context.expand_as(options), (options + steps).long()]
        cheapest = options.gather(0, cost.argmin(0, keepdim=True))[0]
        found = torch.where(fixed, nearest, cheapest)
    return found.to(torch.int8)


def _context(integers: Tensor) -> Tensor:
    """Which of the neighbours above and to the left are not zero: 0..3.  # (out, n)"""
    flags = torch.nn.functional.pad((integers != 0).long(), (1, 0, 1, 0))
    return flags[:-1, 1:] + 2 * flags[1:, :-1]


def _bits(context: Tensor, integers: Tensor, steps: int) -> Tensor:
    """``-log2`` of how often each integer follows each context.  # (CONTEXTS, 2 * steps + 1)"""
    symbols = 2 * steps + 1
    place = context * symbols + (integers + steps).long()
    counts = torch.bincount(place.reshape(-1), minlength=CONTEXTS * symbols).double().reshape(CONTEXTS, symbols) + PRIOR
    return -(counts / counts.sum(1, keepdim=True)).log2()


class RateFakeQuant(nn.Module):
    """Parametrization ``w -> cheap integers * s`` with a straight-through gradient, so that recovery keeps the weights cheap."""

    importance: Tensor | None

    def __init__(self, steps: int, slope: float, importance: Tensor | None = None) -> None:
        super().__init__()
        self.steps, self.slope = steps, slope
        self.register_buffer("importance", importance, persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        integers = cheap_integers(weight, self.steps, self.slope, self.importance).reshape(weight.shape)
        scale = weight.detach().flatten(1).abs().amax(1) / self.steps
        rounded = integers * scale.reshape(-1, *[1] * (weight.ndim - 1))
        return weight + (rounded - weight).detach()


@handles(RateDistortion, "rate")
class _RateDistortionHandler:
    def lower(self, config: MethodConfig, kernel: Kernel) -> tuple[Kernel, ...]:
        return (kernel,)

    def apply(self, config: MethodConfig, layer: nn.Module, context: LayerContext) -> nn.Module:
        assert isinstance(config, RateDistortion)
        if not isinstance(layer, nn.Conv2d | nn.Linear | nn.Sequential):
            raise UnsupportedModel(
                f"Only convolutions and linear layers get cheaper integers, got {type(layer).__name__}."
            )
        gram = context.gram
        for part in layer if isinstance(layer, nn.Sequential) else (layer,):
            assert isinstance(part.weight, Tensor)
            fits = gram is not None and len(gram) == part.weight[0].numel() + 1
            importance = gram.diagonal()[:-1].clone() if fits and gram is not None else None
            parametrize.register_parametrization(part, "weight", RateFakeQuant(config.steps, config.slope, importance))
        return layer

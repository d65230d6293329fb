"""Small deployed models built by hand: batch norm folded, weights packed, activation ranges taken from data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, fx, nn

from autocompress.methods.quantization import ActivationQuant, pack_weight

Kind = Literal["float", "int8", "w8", "w4", "w4 by channel"]

LAYERS = ("stem", "a", "b", "depthwise", "factors.0", "factors.1", "head")
_SETTINGS = {"int8": (8, 0), "w8": (8, 0), "w4": (4, 4), "w4 by channel": (4, 0)}
_TENSORS = {
    "q_in": ("stem",),
    "q_stem": ("stem", "a"),
    "q_a": ("a", "b"),
    "q_b": ("b",),
    "q_add": ("b", "depthwise"),
    "q_depthwise": ("depthwise", "factors.0"),
    "q_mid": ("factors.0", "factors.1"),
    "q_factors": ("factors.1",),
    "q_pool": ("head",),
}
"""Tensor -> the int8 layers that read or write it; it is quantized when one of them runs in int8."""


class ResidualNet(nn.Module):
    """Stem, residual block, depthwise and factorized convolution, global average pooling, linear head."""

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        c = channels
        self.stem = nn.Conv2d(3, c, 3, padding=1)
        self.a = nn.Conv2d(c, c, 3, padding=1)
        self.b = nn.Conv2d(c, c, 3, padding=1, bias=False)
        self.depthwise = nn.Conv2d(c, c, 3, stride=2, padding=1, groups=c)
        self.factors = nn.Sequential(nn.Conv2d(c, 5, 1, bias=False), nn.Conv2d(5, 2 * c, 3, padding=1))
        self.head = nn.Linear(2 * c, 10)
        for name in LAYERS:  # lively outputs: errors of early layers must show
            nn.init.kaiming_normal_(self.get_submodule(name).weight)
        for name in _TENSORS:
            self.add_module(name, nn.Identity())

    def forward(self, x: Tensor) -> Tensor:  # (N, 3, 12, 12) -> (N, 10)
        x = self.q_stem(torch.relu(self.stem(self.q_in(x))))
        y = self.q_b(self.b(self.q_a(torch.relu(self.a(x)))))
        x = self.q_add(torch.relu(x + y))
        x = self.q_depthwise(torch.relu(self.depthwise(x)))
        x = self.q_factors(torch.relu(self.factors[1](self.q_mid(self.factors[0](x)))))
        return self.head(self.q_pool(x.mean((2, 3))))


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return isinstance(module, ActivationQuant) or super().is_leaf_module(module, name)


def trace(model: nn.Module) -> fx.GraphModule:
    """Trace with ``ActivationQuant`` as a leaf."""
    return fx.GraphModule(model, _Tracer().trace(model)).eval()


def examples(n: int = 8, seed: int = 1) -> Tensor:
    """Correlated images, so that the outputs are not noise.  # (n, 3, 12, 12)"""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(n, 3, 4, 4, generator=generator)
    return nn.functional.interpolate(coarse, (12, 12), mode="bilinear")


def deployed(formats: Mapping[str, Kind] | Kind = "float", seed: int = 0) -> fx.GraphModule:
    """A deployed model whose layers have the given formats (one for all, or by layer; the rest is float)."""
    torch.manual_seed(seed)
    chosen = dict.fromkeys(LAYERS, formats) if isinstance(formats, str) else dict(formats)
    model = ResidualNet().eval()
    for name, kind in chosen.items():
        if kind != "float":
            layer = model.get_submodule(name)
            bits, group = _SETTINGS[kind]
            packed = pack_weight(layer.weight, bits, group, activations=kind == "int8")
            layer.packed = packed  # type: ignore[assignment]
            layer.weight.data = packed.dequantize()
    _calibrate(model, {name for name, kind in chosen.items() if kind == "int8"})
    return trace(model)


def _calibrate(model: nn.Module, int8: set[str]) -> None:
    """Give the tensors around int8 layers their ranges on data, or leave them float."""
    seen: dict[str, Tensor] = {}
    wanted = [name for name, layers in _TENSORS.items() if int8 & set(layers)]
    for name in wanted:
        model.get_submodule(name).register_forward_hook(lambda m, i, o, name=name: seen.__setitem__(name, o))
    with torch.no_grad():
        model(examples(64, seed=7))
    for name in wanted:
        model.set_submodule(name, ActivationQuant(float(seen[name].min()), float(seen[name].max())))

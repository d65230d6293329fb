"""What each level of each layer takes when packed, measured on its own weights: so ``packed_mb`` is a sum in cost tables.

A layer's bytes at fewer channels are taken in proportion. What the file of a plan really takes is measured at the end.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from autocompress.costs import Packing
from autocompress.database import LevelDatabase
from autocompress.deploy import deploy_layer
from autocompress.errors import UnsupportedModel
from autocompress.graph import Layer
from autocompress.methods.coding import Form, coded_bytes, pack
from autocompress.methods.coding.planes import Number
from autocompress.methods.quantization import PackedWeight
from autocompress.onnx_quant import integer_tensor, stored_bits
from autocompress.types import MethodConfig

ENTRY_BYTES = 60
"""Of a tensor in the packed file's index: its hash, its name, its place."""


def packed_levels(database: LevelDatabase, original: Path) -> Packing:
    """Packed bytes of every level of every layer; ``original``: the uncompressed model's ONNX file."""
    site = {s.name: i for i, s in enumerate(database.space.sites)}
    found: dict[str, list[int]] = {}
    with torch.no_grad():
        for layer in database.graph.layers.values():
            own = site.get(f"layer:{layer.name}")
            levels = database.space.levels[own] if own is not None else ()
            found[layer.name] = [_level_bytes(database, layer, level.steps) for level in levels] or [
                _level_bytes(database, layer, ())
            ]
    return Packing(found, len(pack(original.read_bytes(), ".onnx")))


def _level_bytes(database: LevelDatabase, layer: Layer, steps: tuple[MethodConfig, ...]) -> int:
    columns, rows = np.arange(len(layer.inputs)), np.arange(len(layer.outputs))
    live = database.layer_modules(layer, columns, rows, steps)
    module = deploy_layer(live[layer.name], live[layer.norm] if layer.norm else None, None)
    parts = [part for part in module.modules() if isinstance(part, nn.Conv2d | nn.Linear)]
    if not parts:
        raise UnsupportedModel(f"Level {steps} of layer {layer.name!r} has no weights to pack.")
    return sum(_part_bytes(part) for part in parts)


def _part_bytes(part: nn.Conv2d | nn.Linear) -> int:
    """Weight in its stored form, with scales if it has them, and bias."""
    packed = getattr(part, "packed", None)
    tensors = [] if part.bias is None else [part.bias.detach()]
    if not isinstance(packed, PackedWeight):
        return _bytes([part.weight.detach(), *tensors])
    bits = stored_bits(packed)
    raw = integer_tensor("", packed.integers.numpy(), bits).raw_data
    form = Form("nibbles" if bits == 4 else "integer", 1, tuple(packed.integers.shape))
    return _bytes([packed.scale, *tensors]) + coded_bytes(raw, form) + ENTRY_BYTES


def _bytes(tensors: list[Tensor]) -> int:
    total = 0
    for tensor in tensors:
        number: Number = "float" if tensor.is_floating_point() else "integer"
        form = Form(number, tensor.element_size(), tuple(tensor.shape))
        total += coded_bytes(tensor.contiguous().numpy().tobytes(), form) + ENTRY_BYTES
    return total

"""Single blocks that TF-NAS (Hu et al., ECCV 2020; MIT) timed on a Xeon Gold 6130 with PyTorch 1.1, one thread and batch 1.

Inverted bottlenecks with and without squeeze-and-excite, at every eighth middle width. Up to the width of its input a block
has no expansion (the script that timed them leaves it out), and the table goes on in exactly straight lines, below
zero in places: those rows were not measured. Knows the file's format; nothing of fitting.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
from published import Block, Measured, conv, measured, networks_of, numbered, unary

from autocompress.errors import UsageError
from autocompress.types import Kernel

RANGES = 3
"""Widths of a block are held out in so many ranges."""
NEIGHBOURS = 4
_KEY = re.compile(r"MBInvertedResBlock_(\d+)_(\d+)_(\d+)_(\d+)_k(\d)_s(\d)_(relu|swish)")
Key = tuple[int, int, int, int, int, int, bool]
"""Pixels, width of the input, of squeeze-and-excite (0: none), of the output, window, stride, whether it has swish."""


def blocks(folder: Path, column: str = "") -> Measured:
    """All blocks wider than their input. Blocks of one shape are held out together; ``also``: ranges of widths."""
    tables = json.loads((folder / "tfnas_latency_cpu.json").read_text())
    rows = [
        (key, int(width), ms, place)
        for key, table in ((_parsed(name), table) for name, table in tables.items() if name != "base")
        for place, (width, ms) in enumerate(sorted(table.items(), key=lambda item: int(item[0])))
    ]
    wider = [row for row in rows if row[1] > row[0][1]]
    dropped = {"on a straight line up to the width of the input": len(rows) - len(wider)}
    nets = [Counter(_block(key, width)) for key, width, _, _ in wider]
    shapes = numbered([(key[0], key[1], key[3], key[5]) for key, *_ in wider])
    # A free number for every few neighbouring widths of a block: how evenly its times rise.
    table = numbered([(key, place // NEIGHBOURS) for key, _, _, place in wider])[:, None]
    networks = networks_of("TF-NAS blocks", nets, shapes, table)
    found = measured(networks, np.array([ms for _, _, ms, _ in wider]), (7, 112), dropped)
    last = {key: place for key, _, _, place in wider}
    first = {key: place for key, _, _, place in reversed(wider)}
    ranges = np.array([RANGES * (p - first[key]) // (last[key] - first[key] + 1) for key, _, _, p in wider], np.int64)
    return replace(found, whole=False, also={"ranges of widths held out": ranges})


def _parsed(name: str) -> Key:
    match = _KEY.fullmatch(name)
    if match is None:
        raise UsageError(f"A block of TF-NAS reads MBInvertedResBlock_56_24_0_40_k3_s2_swish, got {name!r}.")
    size, width, squeezed, out, window, stride = map(int, match.groups()[:6])
    return size, width, squeezed, out, window, stride, match[7] == "swish"


def _block(key: Key, middle: int) -> Block:
    size, width, squeezed, out, window, stride, swish = key
    shape = width, size, size
    expanded = conv(shape, middle)
    deep = conv(expanded.out_shape, middle, window, stride, groups=middle)
    block = [expanded, *_activations(expanded.out_shape, swish), deep, *_activations(deep.out_shape, swish)]
    if squeezed:
        pooled = middle, 1, 1
        block += [Kernel("global_pool", deep.out_shape, pooled), conv(pooled, squeezed)]
        block += [*_activations((squeezed, 1, 1), swish), conv((squeezed, 1, 1), middle), unary("activation", pooled)]
        block.append(unary("mul", deep.out_shape, n_inputs=2))
    block.append(conv(deep.out_shape, out))
    if stride == 1 and width == out:
        block.append(unary("add", block[-1].out_shape, n_inputs=2))
    return block


def _activations(shape: tuple[int, ...], swish: bool) -> Block:
    """Swish is an operator of its own; ReLU belongs to the convolution."""
    return [unary("activation", shape)] if swish else []

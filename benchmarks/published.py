"""Latency measurements that others have published, each network rebuilt as the kernels that ran.

Knows the files' formats and the networks of NAS-Bench-201 (Dong and Yang, ICLR 2020), the FBNet space for CIFAR-100
(Wu et al., CVPR 2019, as in HW-NAS-Bench, Li et al., ICLR 2021) and Once-for-all's MobileNetV3 (Cai et al., ICLR
2020); nothing of fitting. The measurements: HELP (Lee et al., NeurIPS 2021) and Once-for-all's table of a Note10.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from autocompress.errors import UsageError
from autocompress.types import Kernel

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
Block = list[Kernel]

FBNET_WIDTHS = (16, 24, 32, 64, 112, 184, 352)
FBNET_DEPTHS = (1, 4, 4, 4, 4, 4, 1)
FBNET_STRIDES = (1, 1, 2, 2, 1, 2, 1)
FBNET_HEAD = 1504
OFA_WIDTHS = (24, 40, 80, 112, 160)
OFA_STRIDES = (2, 2, 2, 1, 2)
OFA_SQUEEZED = (False, True, False, True, True)
NB201_STAGES = ((16, 32), (32, 16), (64, 8))
NB201_EDGES = ((0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3))
COMPILED = ("pixel3", "raspi4")
"""Devices whose networks went through a converter (TensorFlow Lite), which removes what does not reach the output."""
MODELLED = ("fpga", "eyeriss")
"""Not silicon: simulators."""


@dataclass(frozen=True, eq=False)
class Networks:
    """Networks of one search space as the kernels they run.

    ``counts``: how often each of ``kernels`` runs  # (n_networks, n_kernels). ``group``: networks of one group are held out
    together  # (n_networks,). ``table``: for each network, the index of a free number of each position and choice, what an
    additive table without any law could fit  # (n_networks, n_positions).
    """

    space: str
    kernels: tuple[Kernel, ...]
    counts: FloatArray
    group: IntArray
    table: IntArray

    def only(self, rows: npt.NDArray[Any]) -> Networks:
        """Some of the networks."""
        return replace(self, counts=self.counts[rows], group=self.group[rows], table=self.table[rows])

    @property
    def macs(self) -> FloatArray:
        return np.asarray(self.counts @ np.array([kernel.macs for kernel in self.kernels], np.float64))


@dataclass(frozen=True, eq=False)
class Measured:
    """Networks and their latency on one device, ``ns``  # (n_networks,); ``dropped``: why rows were left out, and how many.
    ``whole``: they are networks, not single blocks; ``sizes``: sides of the images in ``unit``, or ``tokens`` of sentences;
    ``also``: other groups to hold out, by what they are  # (n_networks,)."""

    networks: Networks
    ns: FloatArray
    dropped: dict[str, int]
    sizes: tuple[int, ...]
    whole: bool = True
    unit: str = "pixels"
    also: Mapping[str, IntArray] = field(default_factory=dict)

    @property
    def space(self) -> str:
        return self.networks.space


def find(folders: Sequence[str]) -> Path:
    """The folder ``latency`` of the published measurements."""
    for folder in folders:
        if (Path(folder) / "latency" / "nasbench201_latency_ms.npz").exists():
            return Path(folder) / "latency"
    raise UsageError(
        f"Fitting needs the published measurements, a folder 'latency'; none lies in {folders}; name one with --data."
    )


# ---------------------------------------------------------------- blocks


def conv(shape: tuple[int, int, int], width: int, size: int = 1, stride: int = 1, groups: int = 1) -> Kernel:
    """A convolution with its batch norm and ReLU; padding keeps ``ceil(pixels / stride)``."""
    out = (width, -(-shape[1] // stride), -(-shape[2] // stride))
    return Kernel("conv", shape, out, (size, size), (stride, stride), groups, fused="relu")


def unary(kind: str, shape: tuple[int, ...], **fields: Any) -> Kernel:
    """An operator that keeps the shape."""
    return Kernel(kind, shape, shape, **fields)


def bottleneck(shape: tuple[int, int, int], middle: int, width: int, size: int, stride: int, **given: Any) -> Block:
    """An inverted bottleneck (Sandler et al., CVPR 2018). ``groups``: of its 1x1 convolutions; ``squeeze``: with
    squeeze-and-excite to a quarter; ``residual``: with its addition."""
    groups, squeeze = given.get("groups", 1), given.get("squeeze", False)
    block = [conv(shape, middle, groups=groups)] if middle != shape[0] or given.get("expand", True) else []
    if groups > 1:
        block.append(unary("transpose", block[-1].out_shape))  # the channels are shuffled
    block.append(conv((middle, *shape[1:]), middle, size, stride, groups=middle))
    inner = block[-1].out_shape
    if squeeze:
        hidden = _divisible(middle / 4)
        pooled = (middle, 1, 1)
        block += [
            Kernel("global_pool", inner, pooled),
            conv(pooled, hidden),
            conv((hidden, 1, 1), middle),
            Kernel("mul", inner, inner, n_inputs=2),
        ]
    block.append(conv((middle, inner[1], inner[2]), width, groups=groups))
    if given.get("residual", False):
        block.append(unary("add", block[-1].out_shape, n_inputs=2))
    return block


def _divisible(value: float, by: int = 8) -> int:
    """MobileNet's rounding of widths."""
    rounded = max(by, int(value + by / 2) // by * by)
    return rounded + by if rounded < 0.9 * value else rounded


def head(shape: tuple[int, int, int], classes: int) -> Block:
    """Global pooling and the classifier."""
    return [Kernel("global_pool", shape, (shape[0], 1, 1)), Kernel("linear", (shape[0],), (classes,))]


# ---------------------------------------------------------------- NAS-Bench-201


@cache
def _nasbench201(folder: Path) -> tuple[Networks, npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """All cells; which have a path from input to output, and which compute what does not reach the output."""
    texts = np.load(folder / "nasbench201_latency_ms.npz")["arch"]
    cells = [tuple(word.split("~")[0] for word in text.replace("+", "").split("|") if word) for text in texts]
    names = sorted({name for cell in cells for name in cell})
    table = np.array([[names.index(name) + len(names) * edge for edge, name in enumerate(cell)] for cell in cells])
    # Cells of the same operators in another order are nearly the same network: held out together.
    groups = numbered([tuple(sorted(cell)) for cell in cells])
    networks = networks_of("NAS-Bench-201", [_nb201_network(cell) for cell in cells], groups, table)
    return networks, np.array([_reaches(cell) for cell in cells]), np.array([_has_dead(cell) for cell in cells])


def nasbench201(folder: Path, column: str) -> Measured:
    """Every cell of NAS-Bench-201. A cell without a path from input to output does not read the image: dropped. Of the
    devices in ``COMPILED`` it is not recorded whether dead operators were removed: cells that have some are dropped."""
    ms = np.load(folder / "nasbench201_latency_ms.npz")[column]
    networks, alive, dead = _nasbench201(folder)
    dead = alive & dead if column in COMPILED else np.zeros_like(alive)
    dropped = {"no path from input to output": int((~alive).sum()), "dead operators": int(dead.sum())}
    rows = alive & ~dead
    return measured(networks.only(rows), ms[rows], (32,), dropped)


def _reaches(cell: Sequence[str]) -> bool:
    seen = {0}
    for (start, end), name in zip(NB201_EDGES, cell, strict=True):
        if name != "none" and start in seen:
            seen.add(end)
    return 3 in seen


def _has_dead(cell: Sequence[str]) -> bool:
    """Whether the cell computes something that does not reach its output."""
    used = {3}
    edges = sorted(zip(NB201_EDGES, cell, strict=True), key=lambda edge: -edge[0][1])
    for (start, end), name in edges:
        if name != "none" and end in used:
            used.add(start)
    return any(end not in used and name not in ("none", "skip_connect") for (_, end), name in edges)


def _nb201_network(cell: Sequence[str]) -> Counter[Kernel]:
    kernels = Counter([conv((3, 32, 32), 16, 3)])
    for stage, (width, size) in enumerate(NB201_STAGES):
        shape = width, size, size
        if stage:
            wide = width // 2, size * 2, size * 2
            kernels.update([conv(wide, width, 3, 2), conv(shape, width, 3), unary("add", shape, n_inputs=2)])
            kernels.update(
                [Kernel("pool", wide, (width // 2, size, size), (2, 2), (2, 2)), conv((width // 2, size, size), width)]
            )
        offered = {
            "none": unary("mul", shape),
            "nor_conv_1x1": conv(shape, width),
            "nor_conv_3x3": conv(shape, width, 3),
            "avg_pool_3x3": unary("pool", shape, kernel=(3, 3)),
        }
        for name, times in Counter(cell).items():
            if name in offered:
                kernels[offered[name]] += 5 * times
        kernels[unary("add", shape, n_inputs=2)] += 5 * 3  # six edges end in three nodes
    kernels.update(head((64, 8, 8), 10))
    return kernels


# ---------------------------------------------------------------- FBNet


@cache
def _fbnet(folder: Path) -> Networks:
    data = np.load(folder / "fbnet_latency_ms.npz")
    words = [tuple(text.split("|")) for text in data["arch"]]
    # By two blocks of the widest stage: what is held out has pairs of them that were never fitted.
    groups = numbered([(ops[17], ops[18]) for ops in words])
    return networks_of("FBNet", [_fbnet_network(ops) for ops in words], groups, data["op_idx"] + 9 * np.arange(22))


def fbnet(folder: Path, column: str) -> Measured:
    """5,000 networks of the FBNet space at 32 pixels."""
    return measured(_fbnet(folder), np.load(folder / "fbnet_latency_ms.npz")[column], (32,))


def _fbnet_network(ops: Sequence[str]) -> Counter[Kernel]:
    kernels, shape = Counter([conv((3, 32, 32), 16, 3)]), (16, 32, 32)
    strides = [s if i == 0 else 1 for s, n in zip(FBNET_STRIDES, FBNET_DEPTHS, strict=True) for i in range(n)]
    widths = [w for w, n in zip(FBNET_WIDTHS, FBNET_DEPTHS, strict=True) for _ in range(n)]
    for name, width, stride in zip(ops, widths, strides, strict=True):
        for kernel in _fbnet_block(name, shape, width, stride):
            kernels[kernel] += 1
        shape = width, -(-shape[1] // stride), -(-shape[2] // stride)
    kernels.update([conv(shape, FBNET_HEAD), *head((FBNET_HEAD, *shape[1:]), 100)])
    return kernels


def _fbnet_block(name: str, shape: tuple[int, int, int], width: int, stride: int) -> Block:
    same = stride == 1 and width == shape[0]
    if name == "skip":
        return [] if same else [conv(shape, width, 1, stride)]
    match = re.fullmatch(r"k(\d)_e(\d)(_g2)?", name)
    if match is None:
        raise UsageError(f"An FBNet block reads k3_e6, k5_e1_g2 or skip, got {name!r}.")
    groups = 2 if match[3] else 1
    return bottleneck(shape, shape[0] * int(match[2]), width, int(match[1]), stride, groups=groups, residual=same)


# ---------------------------------------------------------------- Once-for-all


@cache
def _ofa(folder: Path) -> tuple[Networks, tuple[int, ...]]:
    archs = json.loads((folder / "ofa_archs.json").read_text())
    choices = [
        [pair if i % 4 < a["d"][i // 4] else None for i, pair in enumerate(zip(a["ks"], a["e"], strict=True))]
        for a in archs
    ]
    names = sorted({pair for row in choices for pair in row if pair})
    sizes = sorted({a["r"] for a in archs})
    table = [
        [*(10 * i + (names.index(pair) + 1 if pair else 0) for i, pair in enumerate(row)), 200 + sizes.index(a["r"])]
        for row, a in zip(choices, archs, strict=True)
    ]
    groups = numbered([tuple(a["d"]) for a in archs])
    return networks_of("Once-for-all", [_ofa_network(a) for a in archs], groups, np.array(table)), tuple(sizes)


def ofa(folder: Path, column: str) -> Measured:
    """5,000 sub-networks of Once-for-all's MobileNetV3 at 128 to 224 pixels. Held out by depths."""
    networks, sizes = _ofa(folder)
    return measured(networks, np.load(folder / "ofa_latency_ms.npz")[column], (sizes[0], sizes[-1]))


def _ofa_network(arch: dict[str, Any]) -> Counter[Kernel]:
    first = conv((3, arch["r"], arch["r"]), 16, 3, 2)
    shape: Any = first.out_shape
    kernels = Counter([first, *bottleneck(shape, 16, 16, 3, 1, expand=False, residual=True)])
    for stage, (width, stride, squeezed) in enumerate(zip(OFA_WIDTHS, OFA_STRIDES, OFA_SQUEEZED, strict=True)):
        for i in range(arch["d"][stage]):
            size, expand = arch["ks"][4 * stage + i], arch["e"][4 * stage + i]
            step = stride if i == 0 else 1
            middle = _divisible(shape[0] * expand)
            block = bottleneck(shape, middle, width, size, step, squeeze=squeezed, residual=i > 0)
            kernels.update(block)
            shape = width, -(-shape[1] // step), -(-shape[2] // step)
    wide = conv(shape, 960)
    kernels.update([wide, Kernel("global_pool", wide.out_shape, (960, 1, 1)), conv((960, 1, 1), 1280)])
    kernels[Kernel("linear", (1280,), (1000,))] += 1
    return kernels


def note10(folder: Path, column: str = "") -> Measured:
    """Single blocks of Once-for-all's MobileNetV3 (width 1.2) at 17 resolutions. Held out by resolution."""
    import yaml

    tables = {path.name: yaml.safe_load(path.read_text()) for path in sorted((folder / "ofa_note10").glob("*.yaml"))}
    rows = [(name, key, value["mean"]) for name, table in tables.items() for key, value in table.items()]
    nets = [Counter(_note10_block(key)) for _, key, _ in rows]
    names = sorted({re.sub(r"\d+x\d+x", "", key) for _, key, _ in rows})
    table = np.array([[names.index(re.sub(r"\d+x\d+x", "", key))] for _, key, _ in rows])
    networks = networks_of("Once-for-all blocks", nets, numbered([name for name, _, _ in rows]), table)
    return replace(measured(networks, np.array([ms for _, _, ms in rows]), (160, 224)), whole=False)


def _note10_block(key: str) -> Block:
    fields = dict(part.split(":") for part in key.split("-")[1:] if ":" in part)
    sizes = [tuple(map(int, fields[end].split("x"))) for end in ("input", "output")]
    shape, out = ((size[-1], *size[:-1]) for size in sizes)
    if key.startswith("AvgPool"):
        return [Kernel("global_pool", shape, out)]
    if key.startswith("Logits"):
        return [Kernel("linear", shape[:1], out[:1])]
    if key.startswith("Conv"):
        first = key.startswith("Conv-")
        return [conv(shape, out[0], 3 if first else 1, 2 if first else 1)]
    flags = {name: int(fields[name]) for name in ("expand", "kernel", "stride", "idskip", "se")}
    return bottleneck(
        shape,
        flags["expand"],
        out[0],
        flags["kernel"],
        flags["stride"],
        expand=flags["expand"] != shape[0],
        squeeze=bool(flags["se"]),
        residual=bool(flags["idskip"]),
    )


# ---------------------------------------------------------------- together


def numbered(names: Sequence[Hashable]) -> npt.NDArray[np.int64]:
    """Equal names, equal numbers, in order of appearance."""
    seen: dict[Hashable, int] = {}
    return np.array([seen.setdefault(name, len(seen)) for name in names], np.int64)


def networks_of(space: str, nets: Sequence[Counter[Kernel]], groups: IntArray, table: IntArray) -> Networks:
    """Networks from the kernels that each runs."""
    index: dict[Kernel, int] = {}
    for net in nets:
        for kernel in net:
            index.setdefault(kernel, len(index))
    counts = np.zeros((len(nets), len(index)))
    for row, net in enumerate(nets):
        for kernel, times in net.items():
            counts[row, index[kernel]] = times
    return Networks(space, tuple(index), counts, groups, table)


def measured(
    networks: Networks, ms: FloatArray, sizes: tuple[int, ...], dropped: dict[str, int] | None = None
) -> Measured:
    """Rows that are no time at all (below a thousandth of the median) are dropped, and counted."""
    real = ms > 0.001 * np.median(ms)
    counted = {**(dropped or {}), "below a thousandth of the median": int((~real).sum())}
    return Measured(networks.only(real), ms[real] * 1e6, {k: v for k, v in counted.items() if v}, sizes)


SPACES: dict[str, Callable[[Path, str], Measured]] = {
    "NAS-Bench-201": nasbench201,
    "FBNet": fbnet,
    "Once-for-all": ofa,
    "Once-for-all blocks": note10,
}

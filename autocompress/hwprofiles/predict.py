"""Measured kernels -> the time of any kernel: exact where measured, else interpolated within its family.

A *family* shares operator, format, window, stride, grouping and layout regime; its members differ in widths and image
size. Within a family and image size, times stand on a grid of (c_in, c_out), are made non-decreasing in both widths and
read by bilinear interpolation. Gaps, other sizes and wider layers follow a roofline (Williams et al., CACM 2009):
``a + b macs + c in + d out + e weights``, non-negative coefficients, least squares of relative errors.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from scipy.optimize import nnls

from autocompress.types import APART, Kernel

FloatArray = npt.NDArray[np.float64]
Family = tuple[str, ...]
FLOOR_NS = 100.0
"""The least a kernel is said to take: what ONNX Runtime needs to call a node."""
_WINDOWED = ("conv", "pool")
_FUSES_RELU = ("conv", "add")


@dataclass(frozen=True)
class Layout:
    """How the runtime rounds channels: ``block`` channels lie together (1: not at all), in groups of ``granule``.

    Measured on AVX-512: block 16, granule 4. Inputs wider than a block that are no multiple of the granule are computed
    without the blocked layout, at about twice the time.
    """

    block: int = 1
    granule: int = 1

    def regime(self, kernel: Kernel) -> str:
        """``blocked``, ``narrow`` (less than one block comes in) or ``plain``."""
        if kernel.kind != "conv" or self.block == 1:
            return "blocked"
        c_in, c_out = kernel.in_shape[0], kernel.out_shape[0]
        if kernel.format == "int8":
            return "blocked" if c_in % self.granule == 0 and c_out % self.granule == 0 else "plain"
        if kernel.format != "float":
            return "plain"
        if kernel.groups > 1:
            return "blocked" if kernel.groups == c_in == c_out and c_in % self.granule == 0 else "plain"
        if c_in < self.block:
            return "narrow"
        return "blocked" if c_in % self.granule == 0 else "plain"

    def canonical(self, kernel: Kernel) -> Kernel:
        """The kernel that takes the same time: widths rounded up to what is computed, a fused ReLU left out."""
        fused = self._fused(kernel)
        if fused != kernel.fused:
            kernel = replace(kernel, fused=fused)
        if kernel.format != "float" or self.block == 1 or self.regime(kernel) == "plain":
            return kernel
        if kernel.kind == "conv" and kernel.groups > 1:
            width = self._up(kernel.out_shape[0])
            return _with_widths(kernel, width, width)
        if kernel.kind == "conv":
            narrow = kernel.in_shape[0] < self.block
            c_in = kernel.in_shape[0] if narrow else self._up(kernel.in_shape[0])
            return _with_widths(kernel, c_in, self._up(kernel.out_shape[0]))
        if kernel.kind == "add" and len(kernel.out_shape) == 3:
            return _with_widths(kernel, self._up(kernel.in_shape[0]), self._up(kernel.out_shape[0]))
        return kernel

    def family(self, kernel: Kernel) -> Family:
        """The words that name a kernel's family: ``("conv", "int8", "3x3", "stride 2", "dense", "blocked")``."""
        words: list[str] = [kernel.kind, kernel.format]
        if kernel.kind in _WINDOWED:
            words += [f"{kernel.kernel[0]}x{kernel.kernel[1]}", f"stride {max(kernel.stride)}"]
        if kernel.kind == "conv":
            dense, depthwise = kernel.groups == 1, kernel.groups == kernel.in_shape[0]
            words += ["dense" if dense else "depthwise" if depthwise else "grouped", self.regime(kernel)]
        fused = self._fused(kernel)
        return (*words, fused) if fused not in ("", "relu") else tuple(words)

    def _fused(self, kernel: Kernel) -> str:
        """What tells the kernel from others: no ReLU that is taken in; without blocks nothing is in another layout."""
        alone = self.block == 1 and kernel.fused.startswith(APART)
        return "" if alone or (kernel.kind in _FUSES_RELU and kernel.fused == "relu") else kernel.fused

    def _up(self, width: int) -> int:
        return -(-width // self.block) * self.block


def _with_widths(kernel: Kernel, c_in: int, c_out: int) -> Kernel:
    """A depthwise convolution stays one."""
    groups = c_in if kernel.groups > 1 and kernel.groups == kernel.in_shape[0] else kernel.groups
    return replace(
        kernel, in_shape=(c_in, *kernel.in_shape[1:]), out_shape=(c_out, *kernel.out_shape[1:]), groups=groups
    )


def features(kernel: Kernel) -> list[float]:
    """What a roofline weighs: 1, and thousands of MACs, elements read, elements written, and weights."""
    work = kernel.macs, math.prod(kernel.in_shape) * kernel.n_inputs, math.prod(kernel.out_shape), kernel.weights
    return [1.0, *(value / 1e3 for value in work)]


class Roofline:
    """Nanoseconds as a non-negative combination of overhead, MACs, elements read and written, and weights."""

    def __init__(self, kernels: Sequence[Kernel], ns: Sequence[float]) -> None:
        times = np.array(ns, np.float64)  # (n,)
        rows = np.array([features(k) for k in kernels]) / times[:, None]  # (n, 5)
        scale = np.maximum(rows.max(axis=0), 1e-30)
        self.coefficients = nnls(rows / scale, np.ones(len(times)))[0] / scale  # (5,)

    def __call__(self, kernel: Kernel) -> float:
        return max(float(np.dot(features(kernel), self.coefficients)), FLOOR_NS)


Spatial = tuple[tuple[int, ...], tuple[int, ...]]


def _spatial(kernel: Kernel) -> Spatial:
    return kernel.in_shape[1:], kernel.out_shape[1:]


class _Table:
    """Times of one family at one image size on a grid of widths, non-decreasing in both."""

    def __init__(self, like: Kernel, points: Mapping[tuple[int, int], float], roofline: Roofline) -> None:
        self._like, self._roofline = like, roofline
        self._square = all(a == b for a, b in points) and like.kind != "linear"
        self._rows = np.array(sorted({a for a, _ in points}))  # c_in
        self._columns = np.array([0]) if self._square else np.array(sorted({b for _, b in points}))  # c_out
        cells = {(a, 0) if self._square else (a, b): ns for (a, b), ns in points.items()}
        grid = [
            [cells.get((a, b)) or self._fill(a, b, cells) for b in self._columns.tolist()] for a in self._rows.tolist()
        ]
        rising = np.maximum.accumulate(np.array(grid, np.float64), axis=0)
        self._grid: FloatArray = np.maximum.accumulate(rising, axis=1)  # (n_rows, n_columns)

    def _at(self, c_in: int, c_out: int) -> float:
        return self._roofline(_with_widths(self._like, c_in, c_in if self._square else c_out))

    def _fill(self, c_in: int, c_out: int, cells: Mapping[tuple[int, int], float]) -> float:
        """The roofline, corrected by how far it is off at the measured widths (nearer ones count more)."""
        total = correction = 0.0
        for (a, b), ns in sorted(cells.items()):
            distance = math.log(a / c_in) ** 2 + (0.0 if self._square else math.log(b / c_out) ** 2)
            weight = 1.0 / distance
            total, correction = total + weight, correction + weight * math.log(ns / self._at(a, b))
        return self._at(c_in, c_out) * math.exp(correction / total)

    def __call__(self, kernel: Kernel) -> float:
        c_in, c_out = kernel.in_shape[0], 0 if self._square else kernel.out_shape[0]
        a = int(np.clip(c_in, self._rows[0], self._rows[-1]))
        b = int(np.clip(c_out, self._columns[0], self._columns[-1]))
        inside = _bilinear(self._grid, self._rows, self._columns, a, b)
        if (a, b) == (c_in, c_out):
            return inside
        return inside * self._at(c_in, c_out) / self._at(a, b)


def _bilinear(grid: FloatArray, rows: FloatArray, columns: FloatArray, a: int, b: int) -> float:
    i, u = _bracket(rows, a)
    j, v = _bracket(columns, b)
    i1, j1 = min(i + 1, len(rows) - 1), min(j + 1, len(columns) - 1)
    low = grid[i, j] + v * (grid[i, j1] - grid[i, j])
    high = grid[i1, j] + v * (grid[i1, j1] - grid[i1, j])
    return float(low + u * (high - low))


def _bracket(axis: FloatArray, value: int) -> tuple[int, float]:
    """Index of the last point at or below ``value``, and how far it lies towards the next."""
    i = int(np.searchsorted(axis, value, side="right")) - 1
    if i >= len(axis) - 1:
        return len(axis) - 1, 0.0
    return i, float((value - axis[i]) / (axis[i + 1] - axis[i]))


class Predictor:
    """Nanoseconds of any kernel from those that were measured; deterministic, and remembers what it was asked."""

    def __init__(self, measured: Iterable[tuple[Kernel, float]], layout: Layout) -> None:
        self.layout = layout
        self._exact: dict[Kernel, float] = {}
        self._families: dict[Family, dict[Kernel, float]] = {}
        for kernel, ns in measured:
            self._exact[kernel] = ns
            self._exact.setdefault(layout.canonical(kernel), ns)
            self._families.setdefault(layout.family(kernel), {})[layout.canonical(kernel)] = ns
        self._rooflines: dict[Family, Roofline] = {}
        self._tables: dict[tuple[Family, Spatial], _Table] = {}
        self._known: dict[Kernel, int] = {}

    def __call__(self, kernel: Kernel) -> int:
        if kernel not in self._known:
            self._known[kernel] = round(max(self._predict(kernel), FLOOR_NS))
        return self._known[kernel]

    def knows(self, kernel: Kernel) -> bool:
        """Whether the kernel's family was measured."""
        return kernel in self._exact or self.layout.family(kernel) in self._families

    def _predict(self, kernel: Kernel) -> float:
        canonical = self.layout.canonical(kernel)
        for candidate in (kernel, canonical):
            if candidate in self._exact:
                return self._exact[candidate]
        family = self.layout.family(kernel)
        if family not in self._families:
            return self._roofline(family)(canonical)
        return self._table(family, canonical)(canonical)

    def _table(self, family: Family, kernel: Kernel) -> _Table:
        """The table at the kernel's image size, or the nearest size's table carried over by the roofline."""
        key = family, _spatial(kernel)
        if key not in self._tables:
            members, roofline = self._families[family], self._roofline(family)
            points = {k: ns for k, ns in members.items() if _spatial(k) == _spatial(kernel)}
            if not points:
                area = math.prod(kernel.out_shape[1:])
                nearest = min(members, key=lambda k: (abs(math.log(math.prod(k.out_shape[1:]) / area)), _spatial(k)))
                for k, ns in members.items():
                    if _spatial(k) == _spatial(nearest):
                        moved = replace(
                            k,
                            in_shape=(k.in_shape[0], *kernel.in_shape[1:]),
                            out_shape=(k.out_shape[0], *kernel.out_shape[1:]),
                        )
                        points[moved] = ns * roofline(moved) / roofline(k)
            widths = {(k.in_shape[0], k.out_shape[0]): ns for k, ns in points.items()}
            self._tables[key] = _Table(kernel, widths, roofline)
        return self._tables[key]

    def _roofline(self, family: Family) -> Roofline:
        """Fitted on the family; on fewer common words where it has less than three members."""
        if family not in self._rooflines:
            for words in range(len(family), -1, -1):
                members = [
                    item
                    for name, group in self._families.items()
                    if name[:words] == family[:words]
                    for item in group.items()
                ]
                if len(members) >= 3 or (words == 0 and members):
                    break
            self._rooflines[family] = Roofline([k for k, _ in members], [ns for _, ns in members])
        return self._rooflines[family]

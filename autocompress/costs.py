"""Ops x profile -> cost tables: MACs, parameters, file bytes, peak activation bytes and latency of whole batches of plans.

Each operator's cost is indexed by what the kernel sees (its widths in and out, rank and format, the formats of the tensors it
reads and writes), computed once and kept. Sums are integers (MACs, bytes, nanoseconds), so equal plans compare equal.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from autocompress.graph import Graph, Op
from autocompress.methods import ChannelPruning, StaticInt8, handler_of
from autocompress.space import GROUP_4BIT
from autocompress.types import METRICS, CostFactor, IntArray, Kernel, LatencyModel, Plan, SearchSpace, cost_key

MAX_TABLE = 4096
"""Entries of a factor's dense table; larger ones are given as a function."""
NODE_BYTES = 160
"""Bytes of one ONNX node with its names and shapes: the dense file's own overhead replaces it once it is exported."""
STATIC = ("macs", "params", "size_mb")


@dataclass(frozen=True, eq=False)
class _Width:
    """Channels of one tensor: a constant part and, for each group on it, how many of its channels each level keeps."""

    constant: int
    sites: tuple[int, ...]
    tables: tuple[IntArray, ...]

    def of(self, plans: IntArray) -> IntArray:
        """Widths of plans ``(n, n_sites)``.  # (n,)"""
        total = np.full(len(plans), self.constant, dtype=np.int64)
        for site, table in zip(self.sites, self.tables, strict=True):
            total += table[plans[:, site]]
        return total


@dataclass(frozen=True, eq=False)
class _Template:
    """One operator with everything its cost depends on.

    ``flags``: for each tensor it reads and then the one it writes, the layer sites whose int8 levels quantize that tensor.
    """

    op: Op
    inputs: tuple[_Width, ...]
    output: _Width
    layer_site: int | None
    layer_level_count: int
    block_sites: tuple[int, ...]
    flags: tuple[tuple[int, ...], ...]
    sites: tuple[int, ...]


class CostModel:
    """Costs of plans on any number of devices; columns are ``keys``.

    ``profiles``: device name -> latency model. ``dense_bytes``: size of the original's ONNX file, once it is known; file sizes are then
    exact up to names.
    """

    def __init__(
        self,
        graph: Graph,
        space: SearchSpace,
        profiles: Mapping[str, LatencyModel],
        dense_bytes: int | None = None,
    ) -> None:
        self.graph, self.space, self.profiles = graph, space, dict(profiles)
        self._site = {site.name: i for i, site in enumerate(space.sites)}
        self._int8 = {
            i: np.array([any(isinstance(s, StaticInt8) for s in level.steps) for level in levels])
            for i, levels in enumerate(space.levels)
            if space.sites[i].kind == "layer"
        }
        self._touching = self._quantizing_sites()
        self._templates = tuple(self._template(op) for op in graph.ops)
        self._memo: list[dict[tuple[int, ...], npt.NDArray[np.int64]]] = [{} for _ in self._templates]
        self._live = self._live_results()
        self.base_bytes = 0
        if dense_bytes is not None:
            column = self.additive_keys.index("size_mb")
            predicted = int(self._additive(np.zeros((1, len(space.sites)), dtype=np.int64))[0, column])
            self.base_bytes = dense_bytes - predicted

    # ------------------------------------------------------------ the columns

    @property
    def additive_keys(self) -> tuple[str, ...]:
        return (*STATIC, *(cost_key("latency_ms", device) for device in self.profiles))

    @property
    def keys(self) -> tuple[str, ...]:
        return (*self.additive_keys, "peak_mb")

    def cost(self, plans: Sequence[Plan]) -> IntArray:
        """Integer base units: MACs, weights, bytes, nanoseconds, bytes.  # (n_plans, n_keys)"""
        matrix = np.asarray(plans, dtype=np.int64).reshape(len(plans), len(self.space.sites))
        return np.concatenate([self._additive(matrix), self._peak(matrix)[:, None]], axis=1)

    def in_units(self, plan: Plan) -> dict[str, float]:
        """One plan's costs by key, in the metrics' units."""
        row = self.cost([plan])[0]
        return {key: float(v) * METRICS[key.partition("@")[0]].scale for key, v in zip(self.keys, row, strict=True)}

    def factors(self) -> list[CostFactor]:
        """The same costs as small tables; ``peak_mb``, a maximum and not a sum, is zero in them."""
        constant = np.zeros(len(self.keys), dtype=np.int64)
        constant[: len(self.additive_keys)] = self._overhead()
        factors = [CostFactor("overhead", (), constant)]
        for index, template in enumerate(self._templates):
            counts = [self.space.n_levels[site] for site in template.sites]

            def rows(levels: IntArray, index: int = index, template: _Template = template) -> IntArray:
                plans = np.zeros((len(levels), len(self.space.sites)), dtype=np.int64)
                plans[:, list(template.sites)] = levels
                return np.concatenate([self._op_costs(index, plans), np.zeros((len(levels), 1), dtype=np.int64)], axis=1)

            table = None
            if math.prod(counts) <= MAX_TABLE:
                grid = np.array(list(itertools.product(*(range(n) for n in counts))), dtype=np.int64)
                table = rows(grid.reshape(-1, len(counts))).reshape(*counts, len(self.keys))
            factors.append(CostFactor(template.op.name, template.sites, table, rows))
        return factors

    def kernels(self, plan: Plan) -> list[tuple[str, tuple[Kernel, ...]]]:
        """What runs for a plan: operator name and its kernels; dropped operators have none."""
        matrix = np.asarray([plan], dtype=np.int64)
        return [
            (template.op.name, self._lower(template, tuple(self._features(template, matrix)[0].tolist())))
            for template in self._templates
        ]

    def all_kernels(self, plans: Sequence[Plan]) -> list[Kernel]:
        """Every distinct kernel of some plans, in a stable order: what a profile must know."""
        return list(dict.fromkeys(k for plan in plans for _, group in self.kernels(plan) for k in group))

    # ------------------------------------------------------------ templates

    def _width(self, node: str) -> _Width:
        ids = self.graph.values[node].ids
        constant, sites, tables = len(ids), [], []
        for group in self.graph.groups:
            site = self._site.get(f"channels:{group.name}")
            copies = int(np.isin(ids, group.classes).sum())
            if site is None or copies == 0:
                continue
            constant -= copies
            width = len(group.classes)
            kept = [
                next((s.keep for s in level.steps if isinstance(s, ChannelPruning)), width)
                for level in self.space.levels[site]
            ]
            sites.append(site)
            tables.append(np.array([copies * k // width for k in kept], dtype=np.int64))
        return _Width(constant, tuple(sites), tuple(tables))

    def _quantizing_sites(self) -> dict[str, tuple[int, ...]]:
        """Node -> layer sites whose int8 levels quantize its value."""
        outputs = {n.name for node in self.graph.module.graph.nodes if node.op == "output" for n in node.all_input_nodes}
        found: dict[str, list[int]] = {}
        for layer in self.graph.layers.values():
            site = self._site.get(f"layer:{layer.name}")
            if site is None or not self._int8[site].any():
                continue
            found.setdefault(layer.source, []).append(site)
            if layer.result not in outputs:
                found.setdefault(layer.result, []).append(site)
        return {name: tuple(dict.fromkeys(sites)) for name, sites in found.items()}

    def _template(self, op: Op) -> _Template:
        layer_site = self._site.get(f"layer:{op.layer}") if op.layer else None
        blocks = tuple(
            self._site[f"block:{block.name}"]
            for block in self.graph.blocks
            if f"block:{block.name}" in self._site and (op.node in block.body or op.node == block.add)
        )
        inputs = tuple(self._width(name) for name in op.inputs)
        output = self._width(op.result)
        flags = tuple(self._touching.get(name, ()) for name in (*op.inputs, op.result))
        sites = [*(s for width in (*inputs, output) for s in width.sites), *blocks, *(s for f in flags for s in f)]
        if layer_site is not None:
            sites.append(layer_site)
        count = len(self.space.levels[layer_site]) if layer_site is not None else 1
        return _Template(op, inputs, output, layer_site, count, blocks, flags, tuple(sorted(set(sites))))

    def _features(self, template: _Template, plans: IntArray) -> IntArray:
        """What the kernel sees, as columns: alive, layer level, widths in, width out, a flag a tensor.  # (n, ...)"""
        n = len(plans)
        alive = np.ones(n, dtype=np.int64)
        for site in template.block_sites:
            alive &= plans[:, site] == 0
        level = plans[:, template.layer_site] if template.layer_site is not None else np.zeros(n, dtype=np.int64)
        columns = [alive, level, *(width.of(plans) for width in template.inputs), template.output.of(plans)]
        for sites in template.flags:
            flag = np.zeros(n, dtype=bool)
            for site in sites:
                flag |= self._int8[site][plans[:, site]]
            columns.append(flag.astype(np.int64))
        features = np.stack(columns, axis=1)
        features[alive == 0] = 0
        return features

    def _lower(self, template: _Template, features: tuple[int, ...]) -> tuple[Kernel, ...]:
        """The kernels of one operator at given features, quantizing nodes included."""
        if not features[0]:
            return ()
        op, n = template.op, len(template.inputs)
        widths, flags = features[2 : 3 + n], features[3 + n :]
        in_shape = self._shape(op.inputs[0] if op.inputs else op.result, widths[0] if n else widths[-1])
        out_shape = self._shape(op.result, widths[-1])
        groups = in_shape[0] if op.layer and self.graph.layers[op.layer].depthwise else 1
        if op.kind == "linear" and len(in_shape) == 3:
            in_shape = (math.prod(in_shape),)
        kernel = Kernel(op.kind, in_shape, out_shape, op.kernel, op.stride, groups, "float", op.fused, max(1, n))
        kernels: tuple[Kernel, ...] = (kernel,)
        if template.layer_site is not None:
            for step in self.space.levels[template.layer_site][features[1]].steps:
                handler = handler_of(step)
                if handler is not None:
                    kernels = tuple(low for k in kernels for low in handler.lower(step, k))
        integer = kernels[-1].format == "int8"
        if op.kind in ("add", "concat", "global_pool", "pool") and all(flags):
            kernels, integer = (Kernel(op.kind, in_shape, out_shape, op.kernel, op.stride, 1, "int8", op.fused, n),), True
        reads = [flag for flag in flags[:-1] if flag] if not integer else []
        before = tuple(
            Kernel("dequantize", shape, shape)
            for shape in (self._shape(name, w) for name, w, f in zip(op.inputs, widths, flags, strict=False) if f and reads)
        )
        after = (Kernel("quantize", out_shape, out_shape),) if flags[-1] and not integer else ()
        return (*before, *kernels, *after)

    def _shape(self, node: str, width: int) -> tuple[int, ...]:
        value = self.graph.values[node]
        rest = [size for i, size in enumerate(value.shape) if i not in (0, value.dim)]
        return (width, *rest)

    # ------------------------------------------------------------ sums

    def _op_costs(self, index: int, plans: IntArray) -> IntArray:
        """Additive costs of one operator.  # (n, n_additive)"""
        template, memo = self._templates[index], self._memo[index]
        unique, inverse = np.unique(self._features(template, plans), axis=0, return_inverse=True)
        missing = [row for row in map(tuple, unique.tolist()) if row not in memo]
        if missing:
            lowered = [self._lower(template, row) for row in missing]
            flat = [kernel for kernels in lowered for kernel in kernels]
            times = [profile.predict_ns(flat) for profile in self.profiles.values()]
            start = 0
            for row, kernels in zip(missing, lowered, strict=True):
                end = start + len(kernels)
                static = np.sum([_static_costs(k) for k in kernels], axis=0) if kernels else np.zeros(3, dtype=np.int64)
                memo[row] = np.array([*static, *(int(t[start:end].sum()) for t in times)], dtype=np.int64)
                start = end
        table = np.stack([memo[row] for row in map(tuple, unique.tolist())])
        return table[inverse.reshape(-1)]

    def _overhead(self) -> IntArray:
        """Costs of running anything at all."""
        fixed = [int(getattr(profile, "overhead_ns", 0)) for profile in self.profiles.values()]
        return np.array([0, 0, self.base_bytes, *fixed], dtype=np.int64)

    def _additive(self, plans: IntArray) -> IntArray:
        total = np.tile(self._overhead(), (len(plans), 1))
        for index in range(len(self._templates)):
            total = total + self._op_costs(index, plans)
        return np.asarray(total, dtype=np.int64)

    def _live_results(self) -> list[list[int]]:
        """For each operator in order: which operators' results are live while it runs, itself included."""
        producer = {t.op.result: i for i, t in enumerate(self._templates)}
        free = {node.name: node for node in self.graph.module.graph.nodes}

        def resolve(name: str) -> int | None:
            while name not in producer:
                node = free.get(name)
                sources = node.all_input_nodes if node is not None else []
                if not sources:
                    return None
                name = sources[0].name
            return producer[name]

        last: dict[int, int] = {i: i for i in range(len(self._templates))}
        for i, template in enumerate(self._templates):
            for name in template.op.inputs:
                made = resolve(name)
                if made is not None:
                    last[made] = max(last[made], i)
        return [[j for j in range(i + 1) if last[j] >= i] for i in range(len(self._templates))]

    def _peak(self, plans: IntArray) -> IntArray:
        """Most bytes of live activations of one example while any operator runs.  # (n,)"""
        sizes = np.zeros((len(plans), len(self._templates)), dtype=np.int64)
        for i, template in enumerate(self._templates):
            features = self._features(template, plans)
            positions = math.prod(self._shape(template.op.result, 1))
            sizes[:, i] = features[:, 2 + len(template.inputs)] * positions * np.where(features[:, -1] > 0, 1, 4)
        steps = [sizes[:, live].sum(axis=1) for live in self._live]
        return np.max(np.stack(steps, axis=1), axis=1)


def _static_costs(kernel: Kernel) -> npt.NDArray[np.int64]:
    """MACs, parameters and file bytes of one kernel."""
    if kernel.kind not in ("conv", "linear"):
        return np.array([0, 0, 2 * NODE_BYTES if kernel.kind == "quantize" else 0], dtype=np.int64)
    weights, outputs = kernel.weights, kernel.out_shape[0]
    inputs = kernel.in_shape[0] // kernel.groups
    if kernel.format == "float":
        size = 4 * (weights + outputs)
    elif kernel.format == "int8":
        size = weights + 12 * outputs + 4 * NODE_BYTES
    elif kernel.format == "w8":
        size = weights + 8 * outputs + NODE_BYTES
    else:
        area = kernel.kernel[0] * kernel.kernel[1]
        blocks = -(-inputs // GROUP_4BIT) if kernel.kind == "conv" or inputs > GROUP_4BIT else 1
        size = -(-weights // 2) + 4 * outputs * blocks * area + 4 * outputs + NODE_BYTES
    return np.array([kernel.macs, weights + outputs, size], dtype=np.int64)

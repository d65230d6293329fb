"""Ops x profile -> cost tables: MACs, parameters, file bytes, peak activation bytes and latency of whole batches of plans.

Each operator's cost is indexed by what the kernel sees (its widths in and out, rank and format, the formats of the tensors it
reads and writes), computed once and kept. Sums are integers (MACs, bytes, nanoseconds), so equal plans compare equal.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import nn
from torch.nn import functional as F

from autocompress.features import Feature, Features
from autocompress.graph import Graph, Op
from autocompress.methods import ChannelPruning, InputChannels, StaticInt8, WeightQuant, handler_of
from autocompress.methods.inputs import INDEX_BYTES, SELECT_BYTES
from autocompress.plan_tables import PlanTables
from autocompress.types import (
    APART,
    METRICS,
    CostFactor,
    IntArray,
    Kernel,
    LatencyModel,
    MethodConfig,
    Plan,
    SearchSpace,
    Storage,
    cost_key,
)

CHUNK = 4096
"""Plans that are looked at together."""
BLOCKED = ("conv", "add", "pool", "global_pool", "batch_norm")
"""Operators that runtimes with a blocked layout compute in it."""
MANY = 128
"""From so many plans on, tables of whole operators are quicker than looking up each operator of each plan."""
MAX_TABLE = 4096
"""Entries of a factor's dense table; larger ones are given as a function."""
NODE_BYTES, LAYER_BYTES, DEQUANTIZE_BYTES, QUANTIZED_BYTES = 100, 250, 180, 460
"""Bytes of names and attributes in an ONNX file: of an operator without weights, of a layer with its initializers, of a
``DequantizeLinear`` behind an initializer, and of a quantized tensor (``QuantizeLinear``, ``DequantizeLinear``, their grid).
Means over both exporters; what they get wrong on the dense model is made good once its file is known."""
NAME = 14
NAMED = {"w8": 9, "int8": 9, "w4": 5}
FACTOR_NAMED = 14
"""These means are for layers' names of so many letters; a file repeats a longer one so often for a stored format, and for a
second factor."""
STATIC = ("macs", "params", "size_mb", "nonzeros", "weight_bits")
SIZE = STATIC.index("size_mb")
BILLIONTHS = 1_000_000_000
"""``weight_bits`` is an average; its table has billionths of it, so that operators' shares add up."""
PACKED_TEXT, PACKED_FLOAT = 0.25, 0.85
"""Packed bytes over bytes: of names and attributes, of float weights that are no layer's (embeddings, norms); what they get wrong
on the dense model is made good once its file is known."""


@dataclass(frozen=True, eq=False)
class Packing:
    """Packed bytes as measured: of each level of a layer with all its channels, and of the original's ONNX file."""

    layers: Mapping[str, Sequence[int]]
    dense_bytes: int


@dataclass(frozen=True, eq=False)
class _Template:
    """One operator with everything its cost depends on: ``sites``, through ``features``.

    ``features``: whether it runs, the level of its layer (and, times ``layer_levels``, that of the layer's inputs), the width of
    each tensor it reads and of the one it writes, and whether an int8 level quantizes each of these tensors. ``groups``: of a
    convolution as it is; 0 for one filter a channel, however many there are. ``bias``: the dense layer has one, its own or its
    norm's. ``dense_inputs``: channels it reads when nothing is pruned. ``vocabulary``: rows of an embedding's table; ``tied``:
    another operator counts them.
    """

    op: Op
    features: tuple[Feature, ...]
    layer_site: int | None
    inputs_site: int | None
    layer_levels: int
    sites: tuple[int, ...]
    groups: int = 1
    bias: bool = True
    dense_inputs: int = 0
    vocabulary: int = 0
    tied: bool = False


class CostModel:
    """Costs of plans on any number of devices; columns are ``keys``.

    ``profiles``: device name -> latency model. ``dense_bytes``: size of the original's ONNX file, once it is known; file
    sizes are then exact up to names. ``packing``: what coding makes of each layer's levels; without it there is no ``packed_mb``.
    """

    def __init__(
        self,
        graph: Graph,
        space: SearchSpace,
        profiles: Mapping[str, LatencyModel],
        dense_bytes: int | None = None,
        packing: Packing | None = None,
    ) -> None:
        self.packing, self._shares = packing, dict[tuple[int, int], float]()
        self.graph, self.space, self.profiles = graph, space, dict(profiles)
        self._site = {site.name: i for i, site in enumerate(space.sites)}
        self._int8 = {
            i: np.array([any(isinstance(s, StaticInt8) for s in level.steps) for level in levels])
            for i, levels in enumerate(space.levels)
            if space.sites[i].kind == "layer"
        }
        self._made_by = self._results()
        self._touching = self._quantizing_sites()
        nodes = graph.module.graph.nodes
        readers = [op.inputs[0] for op in graph.ops if op.inputs]
        self._given = {n.name for n in nodes if n.op == "placeholder" and readers.count(n.name) == 1}
        self._stored = _constants(graph)
        self._apart = self._additions_apart()
        self._templates = tuple(self._template(op) for op in graph.ops)
        self._weights = sum(_weights_of(graph, name) for name in graph.layers) or 1
        self._features = Features([t.features for t in self._templates], space.n_levels, self._rows, self._alike())
        self._positions = [math.prod(self._shape(t.op.result, 1)) for t in self._templates]
        until, order = np.array(self._last_readers(), dtype=np.int64), np.arange(len(self._templates))
        # Which operators' results are live while each one runs, itself included: (n_ops, n_ops). Floats, for BLAS; exact.
        self._live = ((order <= order[:, None]) & (until >= order[:, None])).astype(np.float64)
        operators = [t.features for t in self._templates]
        self._tables = PlanTables(self._features, operators, until.tolist(), len(self.additive_keys))
        self.base_bytes = self.base_packed = 0
        dense = (
            dict(zip(self.keys, self.cost([space.dense])[0].tolist(), strict=True)) if dense_bytes or packing else {}
        )
        if dense_bytes is not None:
            self.base_bytes = dense_bytes - dense["size_mb"]
        if packing is not None:
            self.base_packed = packing.dense_bytes - dense["packed_mb"]

    # ------------------------------------------------------------ the columns

    @property
    def additive_keys(self) -> tuple[str, ...]:
        packed = ("packed_mb",) if self.packing is not None else ()
        return (*(cost_key("latency_ms", device) for device in self.profiles), *STATIC, *packed)

    @property
    def keys(self) -> tuple[str, ...]:
        return (*self.additive_keys, "peak_mb")

    def cost(self, plans: Sequence[Plan]) -> IntArray:
        """Integer base units: nanoseconds a device, MACs, weights, bytes, bytes.  # (n_plans, n_keys)"""
        matrix = np.asarray(plans, dtype=np.int64).reshape(len(plans), len(self.space.sites))
        parts = [self._cost(matrix[i : i + CHUNK]) for i in range(0, len(matrix), CHUNK)]
        return np.concatenate([np.zeros((0, len(self.keys)), dtype=np.int64), *parts])

    def _cost(self, plans: IntArray) -> IntArray:
        if len(plans) >= MANY:
            total = self._tables.cost(plans)
        else:
            rows = self._features.rows(self._features.values(plans))  # (n, n_ops, n_keys)
            total = rows.sum(axis=1)
            total[:, -1] = (rows[:, :, -1] @ self._live.T).max(axis=1)
        total[:, :-1] += self._overhead()
        return total

    def deltas(self, plan: Plan) -> IntArray:
        """Change of the additive costs when one site of ``plan`` switches to one level, zero for ``peak_mb``.

        Options are numbered site by site, level by level.  # (n_options, n_keys)
        """
        return _without_bytes(self._features.deltas(plan))

    def in_units(self, plan: Plan) -> dict[str, float]:
        """One plan's costs by key, in the metrics' units."""
        row = self.cost([plan])[0]
        return {key: float(v) * METRICS[key.partition("@")[0]].scale for key, v in zip(self.keys, row, strict=True)}

    def factors(self) -> list[CostFactor]:
        """The same costs as small tables over levels that an operator tells apart; ``peak_mb``, a maximum and not a sum, is
        zero in them."""
        constant = np.zeros(len(self.keys), dtype=np.int64)
        constant[: len(self.additive_keys)] = self._overhead()
        factors = [CostFactor("overhead", (), constant)]
        for index, template in enumerate(self._templates):
            merged = [self._features.classes(index, site) for site in template.sites]
            counts = [len(first) for first, _ in merged]

            def rows(levels: IntArray, index: int = index, sites: tuple[int, ...] = template.sites) -> IntArray:
                return _without_bytes(self._features.one_operator(index, sites, levels))

            table = None
            if math.prod(counts) <= MAX_TABLE:
                grid = np.array(list(itertools.product(*(first for first, _ in merged))), dtype=np.int64)
                table = rows(grid.reshape(math.prod(counts), len(counts))).reshape(*counts, len(self.keys))
            factors.append(CostFactor(template.op.name, template.sites, table, rows, tuple(of for _, of in merged)))
        return factors

    def kernels(self, plan: Plan) -> list[tuple[str, tuple[Kernel, ...]]]:
        """What runs for a plan: operator name and its kernels; dropped operators have none."""
        return [(t.op.name, self._lower(t, row)) for t, row in zip(self._templates, self.seen(plan), strict=True)]

    def executed(self, plan: Plan) -> list[Kernel]:
        """Every kernel that a plan runs, in order."""
        return [kernel for _, kernels in self.kernels(plan) for kernel in kernels]

    def seen(self, plan: Plan) -> list[tuple[int, ...]]:
        """Each operator's features under a plan; see :class:`_Template`."""
        values = self._features.values(np.asarray([plan], dtype=np.int64))[0]
        return [self._features.of_operator(values, i) for i in range(len(self._templates))]

    def all_kernels(self, plans: Sequence[Plan]) -> list[Kernel]:
        """Every distinct kernel of some plans, in a stable order: what a profile must know."""
        return list(dict.fromkeys(kernel for plan in plans for kernel in self.executed(plan)))

    # ------------------------------------------------------------ templates

    def _width(self, node: str) -> Feature:
        """Channels of one tensor: a constant part and, for each group on it, how many of its channels each level keeps."""
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
        return Feature(constant, tuple(sites), tuple(tables))

    def _quantized(self, node: str) -> Feature:
        """Whether an int8 level quantizes a tensor."""
        sites = self._touching.get(self._made_by[node], ())
        return Feature(0, sites, tuple(self._int8[site].astype(np.int64) for site in sites), "any")

    def _results(self) -> dict[str, str]:
        """Node -> the node that wrote its tensor: an operator's result or an input, through flattening and the like."""
        written = {op.result for op in self.graph.ops}
        found: dict[str, str] = {}
        for node in self.graph.module.graph.nodes:
            sources = [n.name for n in node.all_input_nodes if n.name in self.graph.values]
            found[node.name] = node.name if node.name in written or not sources else found[sources[0]]
        return found

    def _quantizing_sites(self) -> dict[str, tuple[int, ...]]:
        """Node -> layer sites whose int8 levels quantize its value."""
        outputs = {
            n.name for node in self.graph.module.graph.nodes if node.op == "output" for n in node.all_input_nodes
        }
        found: dict[str, list[int]] = {}
        for layer in self.graph.layers.values():
            site = self._site.get(f"layer:{layer.name}")
            if site is None or not self._int8[site].any():
                continue
            found.setdefault(self._made_by[layer.source], []).append(site)
            if layer.result not in outputs:
                found.setdefault(layer.result, []).append(site)
        return {name: tuple(dict.fromkeys(sites)) for name, sites in found.items()}

    def _additions_apart(self) -> set[str]:
        """Results of additions that meet another layout whatever the plan: behind a padded shortcut, and on from there."""
        made = {op.result: op for op in self.graph.ops}
        found: set[str] = set()
        for op in self.graph.ops:
            makers = [made.get(self._made_by[name]) for name in op.inputs]
            if op.kind == "add" and any(m is None or m.kind not in BLOCKED or m.result in found for m in makers):
                found.add(op.result)
        return found

    def _template(self, op: Op) -> _Template:
        layer_site = self._site.get(f"layer:{op.layer}") if op.layer else None
        blocks = tuple(
            self._site[f"block:{block.name}"]
            for block in self.graph.blocks
            if f"block:{block.name}" in self._site and (op.node in block.body or op.node == block.add)
        )
        inputs_site = self._site.get(f"inputs:{op.layer}") if op.layer else None
        layer_levels = 1 if layer_site is None else self.space.n_levels[layer_site]
        own = [(site, by * np.arange(self.space.n_levels[site]))
               for site, by in ((layer_site, 1), (inputs_site, layer_levels)) if site is not None]  # fmt: skip
        level = Feature(0, tuple(site for site, _ in own), tuple(table for _, table in own))
        tensors = (*op.inputs, op.result)
        features = (
            Feature(0, blocks, tuple((np.arange(self.space.n_levels[s]) > 0).astype(np.int64) for s in blocks), "none"),
            level,
            *(self._width(name) for name in tensors),
            *(self._quantized(name) for name in tensors),
        )
        sites = tuple(sorted({site for feature in features for site in feature.sites}))
        groups, bias = self._form(op)
        dense = len(self.graph.values[op.inputs[0]].ids) if op.inputs else 0
        vocabulary, tied = self._table(op) if op.kind == "embedding" else (0, False)
        return _Template(
            op, features, layer_site, inputs_site, layer_levels, sites, groups, bias, dense, vocabulary, tied
        )

    def _alike(self) -> list[int]:
        """For each operator the first that costs the same at the same features: blocks repeat. All that :meth:`_rows` reads
        of a template is compared."""
        first: dict[object, int] = {}
        found = []
        for i, t in enumerate(self._templates):
            shapes = [
                (self._shape(name, 0), self._shape(name, 0, True), bool(self.graph.values[name].heads))
                for name in (*t.op.inputs, t.op.result)
            ]
            given = tuple(name in self._given for name in t.op.inputs)
            name = len(t.op.layer or "") if self.packing is None else t.op.layer
            levels = [None if s is None else self.space.levels[s] for s in (t.layer_site, t.inputs_site)]
            apart = t.op.result in self._apart
            kernel = (t.op.kind, t.op.kernel, t.op.stride, t.op.fused, apart, t.op.layer is None, name, *levels)
            rest = (t.groups, t.bias, t.dense_inputs, t.vocabulary, t.tied)
            found.append(first.setdefault((tuple(shapes), given, kernel, rest), i))
        return found

    def _table(self, op: Op) -> tuple[int, bool]:
        """Rows of an embedding, and whether a head reads the same weight (and has it counted)."""
        name = next(str(node.target) for node in self.graph.module.graph.nodes if node.name == op.node)
        heads = [
            node for node in self.graph.module.graph.nodes if node.op == "call_function" and node.target is F.linear
        ]
        tied = any(str(n.target) == f"{name}.weight" for head in heads for n in head.all_input_nodes)
        return int(self.graph.module.get_submodule(name).num_embeddings), tied  # type: ignore[arg-type]

    def _form(self, op: Op) -> tuple[int, bool]:
        """Groups and bias of a layer, see :class:`_Template`; a layer without a site is found by its node."""
        if op.kind not in ("conv", "linear"):
            return 1, False
        node = next(node for node in self.graph.module.graph.nodes if node.name == op.node)
        if node.op != "call_module":
            return 1, len(node.args) > 2 and node.args[2] is not None
        module = self.graph.module.get_submodule(str(node.target))
        norm = op.layer is not None and self.graph.layers[op.layer].norm is not None
        bias = norm or getattr(module, "bias", None) is not None
        if not isinstance(module, nn.Conv2d) or module.groups == 1:
            return 1, bias
        return (0 if module.groups == module.in_channels else module.groups), bias

    def _steps(self, template: _Template, level: int) -> tuple[MethodConfig, ...]:
        """What a level's number says is done to an operator's layer."""
        _, own = divmod(level, template.layer_levels)
        return () if template.layer_site is None else self.space.levels[template.layer_site][own].steps

    def _read(self, template: _Template, level: int, width: int) -> int:
        """Channels that an operator's layer reads of a tensor of that many."""
        if template.inputs_site is None:
            return width
        steps = self.space.levels[template.inputs_site][level // template.layer_levels].steps
        return min([width, *(step.keep for step in steps if isinstance(step, InputChannels))])

    def _lower(self, template: _Template, features: tuple[int, ...]) -> tuple[Kernel, ...]:
        """The kernels of one operator at given features, quantizing nodes included."""
        if not features[0]:
            return ()
        op, n = template.op, len(template.op.inputs)
        widths, flags = features[2 : 3 + n], features[3 + n :]
        whole = op.kind == "attention"
        in_shape = self._shape(op.inputs[0] if op.inputs else op.result, widths[0] if n else widths[-1], whole)
        out_shape = self._shape(op.result, widths[-1], whole)
        if template.vocabulary:
            in_shape = (template.vocabulary, *out_shape[1:])
        groups = template.groups or in_shape[0]
        whole_shape, read = in_shape, self._read(template, features[1], widths[0] if n else 0)
        if n and read < widths[0]:
            in_shape = self._shape(op.inputs[0], read)
            groups = template.groups or read
        kernel = Kernel(op.kind, in_shape, out_shape, op.kernel, op.stride, groups, "float", op.fused, max(1, n))
        if op.kind == "add" and len(out_shape) == 3 and (op.result in self._apart or any(flags[:-1])):
            kernel = replace(kernel, fused=f"{APART} {op.fused}".strip())
        kernels: tuple[Kernel, ...] = (kernel,)
        for step in self._steps(template, features[1]):
            handler = handler_of(step)
            if handler is not None:
                kernels = tuple(low for k in kernels for low in handler.lower(step, k))
        if all(flags) and len(kernels) == 1 and kernel.weights and kernels[0].format == "w8":
            kernels = (
                replace(kernels[0], format="int8"),
            )  # between quantized tensors runtimes compute on the integers
        integer = kernels[-1].format == "int8"
        if op.kind in ("add", "concat", "global_pool", "pool") and all(flags):
            kernels, integer = (
                (Kernel(op.kind, in_shape, out_shape, op.kernel, op.stride, 1, "int8", op.fused, n),),
                True,
            )
        reads = [flag for flag in flags[:-1] if flag] if not integer else []
        before = tuple(
            Kernel("dequantize", shape, shape)
            for shape in (
                self._shape(name, w) for name, w, f in zip(op.inputs, widths, flags, strict=False) if f and reads
            )
        )
        after = (Kernel("quantize", out_shape, out_shape),) if flags[-1] and not integer else ()
        selection = (Kernel("slice", whole_shape, in_shape),) if in_shape != whole_shape else ()
        return (*before, *selection, *kernels, *after)

    def _shape(self, node: str, width: int, whole: bool = False) -> tuple[int, ...]:
        """``(C, ...)`` without the batch; what lies behind a head is one axis (it is no image) unless ``whole``."""
        value = self.graph.values[node]
        rest = [size for i, size in enumerate(value.shape) if i not in (0, value.dim)]
        return (width, math.prod(rest)) if value.heads and not whole else (width, *rest)

    # ------------------------------------------------------------ sums

    def _rows(self, asked: Sequence[tuple[int, tuple[int, ...]]]) -> IntArray:
        """Additive costs of operators at given features, and behind them the bytes of their results.  # (n, n_keys)"""
        lowered = [self._lower(self._templates[index], features) for index, features in asked]
        flat = [kernel for kernels in lowered for kernel in kernels]
        owner = np.repeat(np.arange(len(asked)), [len(kernels) for kernels in lowered])
        rows = np.zeros((len(asked), len(self.keys)), dtype=np.int64)
        for column, profile in enumerate(self.profiles.values()):
            np.add.at(rows[:, column], owner, profile.predict_ns(flat) if flat else [])
        for row, (index, features), kernels in zip(rows, asked, lowered, strict=True):
            static = self._static(self._templates[index], features, kernels)
            row[len(self.profiles) : len(self.profiles) + len(STATIC)] = static
            if self.packing is not None:
                row[-2] = round(int(static[SIZE]) * self._packed_share(index, features, self.packing))
            width, quantized = features[2 + len(self._templates[index].op.inputs)], features[-1]
            row[-1] = width * self._positions[index] * (1 if quantized else 4)
        return rows

    def _packed_share(self, index: int, features: tuple[int, ...], packing: Packing) -> float:
        """Packed bytes over bytes of an operator: as measured on its layer at this level with all its channels."""
        template, level = self._templates[index], features[1]
        level %= template.layer_levels
        measured = packing.layers.get(template.op.layer or "")
        if measured is None or not features[0] or template.tied:
            return PACKED_FLOAT if template.op.kind in ("embedding", "batch_norm", "norm") else PACKED_TEXT
        if (index, level) not in self._shares:
            whole = (
                1,
                level,
                *(len(self.graph.values[name].ids) for name in (*template.op.inputs, template.op.result)),
            )
            whole += (0,) * (len(features) - len(whole))
            size = int(self._static(template, whole, self._lower(template, whole))[SIZE])
            self._shares[index, level] = measured[level] / size
        return self._shares[index, level]

    def _static(self, template: _Template, row: tuple[int, ...], kernels: Sequence[Kernel]) -> IntArray:
        """The columns ``STATIC`` of an operator; of two factors only the second has the bias."""
        if not kernels:
            return np.zeros(len(STATIC), dtype=np.int64)
        heavy = [kernel for kernel in kernels if kernel.weights and not template.tied]
        read = self._read(template, row[1], row[2])
        refitted = template.op.layer is not None and template.groups == 1 and read < template.dense_inputs
        light = sum(kernel.macs for kernel in kernels if not kernel.weights)  # products without weights: attention
        total = np.array([light, 0, 0 if heavy else NODE_BYTES, 0, 0], dtype=np.int64)
        steps = self._steps(template, row[1])
        if read < row[2]:
            total[2] += SELECT_BYTES + INDEX_BYTES * read
        weights_only = any(isinstance(step, WeightQuant) for step in steps)
        group = next((step.group for step in steps if isinstance(step, WeightQuant)), 0)
        for kernel in heavy:
            stored = replace(kernel, format="w8") if weights_only and kernel.format == "int8" else kernel
            biased = kernel is heavy[-1] and (template.bias or refitted or len(heavy) > 1)
            biases = row[2 + len(template.op.inputs)] if biased else 0
            total[:3] += _static_costs(stored, biases, group)
            kept = Storage(kernel.weights)
            for step in steps:
                kept = step.store(kernel, kept)
            total[3] += kept.values + biases
            if template.op.layer is not None:
                total[4] += BILLIONTHS * kept.total_bits // self._weights
        longer = max(0, len(template.op.layer or "") - NAME)
        total[2] += longer * (sum(NAMED.get(kernel.format, 0) for kernel in heavy) + FACTOR_NAMED * len(heavy[1:]))
        if template.op.kind == "batch_norm":  # factor, shift, mean and variance of each channel
            total += np.array([0, 4 * row[3], 16 * row[3], 4 * row[3], 0])
        if template.op.kind == "norm":
            total += np.array([0, row[3], 4 * row[3], row[3], 0])
        written = row[-1] + (len(heavy) > 1 and heavy[0].format == "int8")
        flags = row[3 + len(template.op.inputs) :]
        written += sum(flag for name, flag in zip(template.op.inputs, flags, strict=False) if name in self._given)
        total[2] += written * QUANTIZED_BYTES
        return total

    def _overhead(self) -> IntArray:
        """Costs of running anything at all."""
        fixed = [int(getattr(profile, "overhead_ns", 0)) for profile in self.profiles.values()]
        packed = [self.base_packed] if self.packing is not None else []
        return np.array([*fixed, 0, self._stored, self.base_bytes, self._stored, 0, *packed], dtype=np.int64)

    def _last_readers(self) -> list[int]:
        """For each operator in order: the last one that reads its result, itself if none does."""
        producer = {t.op.result: i for i, t in enumerate(self._templates)}
        last = list(range(len(self._templates)))
        for i, template in enumerate(self._templates):
            for name in template.op.inputs:
                made = producer.get(self._made_by[name])
                if made is not None:
                    last[made] = max(last[made], i)
        return last


def _without_bytes(rows: IntArray) -> IntArray:
    """Rows of operators with zero in the last column: a peak is no sum of bytes."""
    rows = rows.copy()
    rows[:, -1] = 0
    return rows


def _constants(graph: Graph) -> int:
    """Numbers of constants that are no module's weight (rotary tables): a file holds them like parameters."""
    modules = {str(node.target) for node in graph.module.graph.nodes if node.op == "call_module"}
    names = {str(node.target) for node in graph.module.graph.nodes if node.op == "get_attr"}
    free = [name for name in sorted(names) if name.rpartition(".")[0] not in modules]
    return sum(operator.attrgetter(name)(graph.module).numel() for name in free)


def _weights_of(graph: Graph, layer: str) -> int:
    """Number of a dense layer's weights."""
    return int(graph.module.get_submodule(layer).weight.numel())  # type: ignore[operator]


def _static_costs(kernel: Kernel, biases: int, group: int) -> IntArray:
    """MACs, parameters and file bytes of one convolution or linear layer, as ``onnx_quant`` writes it.

    ``group``: inputs with one scale, 0 for an output channel's.
    """
    weights, outputs, bias = kernel.weights, kernel.out_shape[0], biases > 0
    if kernel.format == "float":
        size = 4 * weights + 4 * biases
    elif kernel.format == "int8":  # scales and zero points of the weights; integers and scale of the bias
        size = weights + 5 * outputs + 8 * biases + DEQUANTIZE_BYTES * (1 + bias)
    elif kernel.format == "w8":
        size = weights + 5 * outputs + 4 * biases + DEQUANTIZE_BYTES
    else:
        columns = kernel.in_shape[0] // kernel.groups
        blocks = -(-columns // group) * kernel.kernel[0] * kernel.kernel[1] if group else 1
        size = -(-weights // 2) + 4 * outputs * blocks + 4 * biases + DEQUANTIZE_BYTES
    return np.array([kernel.macs, weights + biases, size + LAYER_BYTES], dtype=np.int64)

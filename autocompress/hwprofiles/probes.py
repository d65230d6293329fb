"""Kernel -> a small graph in which ONNX Runtime treats it as it would in a real network.

Layout is the point: a convolution stands behind another one, so that it runs in the blocked layout without reorders of
its own, and what a kernel does to the layout of its neighbours (reorders, transposes) is counted as its cost. Nodes are
told apart by their names: ``k…`` is what is measured, ``h…`` and ``s…`` are its surroundings, ``p…`` is the same
without the kernel; all other nodes were inserted by ONNX Runtime.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from onnx import TensorProto

from autocompress.hwprofiles.builder import GraphBuilder
from autocompress.hwprofiles.device import NodeEvent
from autocompress.types import APART, Int8Format, Kernel

HARNESS = 16
"""Channels of a probe's input: one full block of the blocked layout."""
REPEATS = 4
_HEAVY = 30_000_000
"""MACs from which one copy is enough to be timed well."""


@dataclass(frozen=True)
class Probe:
    """A graph that holds ``repeats`` copies of a kernel; ``delta`` probes hold the same copies without it, too."""

    kernel: Kernel
    model: bytes
    shape: tuple[int, ...]
    repeats: int = 1
    shared_inserts: bool = False
    """Inserted nodes serve all copies together (they prepare the common input)."""
    count_inserts: bool = True
    delta: bool = False

    def cost(self, run: list[NodeEvent]) -> tuple[float, float]:
        """Microseconds of one copy in one profiled run, and how many nodes they are."""
        mine = [e for e in run if e.name.startswith("k")]
        if self.delta:
            without = [e.us for e in run if e.name.startswith("p")]
            return (sum(e.us for e in mine) - sum(without)) / self.repeats, 0.0
        inserts = self._inserted(run) if self.count_inserts else []
        share = 1 if self.shared_inserts else self.repeats
        us = sum(e.us for e in mine) / self.repeats + sum(e.us for e in inserts) / share
        return us, len(mine) / self.repeats + len(inserts) / share

    def _inserted(self, run: list[NodeEvent]) -> list[NodeEvent]:
        """Nodes of ONNX Runtime behind the first one of the harness, without those of 1x1 sinks.

        They end at the first copy where they prepare the common input, else at the node named ``hend`` if there is one.
        """
        named = [i for i, e in enumerate(run) if e.name[0] in "hp"] or [-1]
        stop = "k" if self.shared_inserts else "hend"
        last = next((i for i, e in enumerate(run) if e.name.startswith(stop)), len(run))
        sinks = any(e.name.startswith("s") for e in run)
        return [
            e
            for i, e in enumerate(run)
            if named[0] < i < last and e.name[0] not in "hpsk" and not (sinks and math.prod(e.output_shape[2:]) == 1)
        ]


_Maker = Callable[[Kernel, int, Int8Format], Probe | None]


def build_probe(kernel: Kernel, batch: int = 1, int8: Int8Format = "u8u8") -> Probe | None:
    """The probe of a kernel, or ``None`` where there is none (its family is then named by ``explains``)."""
    maker = _MAKERS.get(kernel.kind)
    if maker is None or (len(kernel.in_shape) not in (1, 2, 3)):
        return None
    return maker(kernel, batch, int8)


def pads_of(kernel: Kernel) -> tuple[int, int, int, int]:
    """ONNX pads (top, left, bottom, right) that lead from ``in_shape`` to ``out_shape``."""
    begin, end = [], []
    for size, out, k, s in zip(kernel.in_shape[1:], kernel.out_shape[1:], kernel.kernel, kernel.stride, strict=True):
        total = max(0, (out - 1) * s + k - size)
        begin.append(total // 2)
        end.append(total - total // 2)
    return (begin[0], begin[1], end[0], end[1])


def _start(kernel: Kernel, batch: int, int8: Int8Format, channels: int = HARNESS) -> GraphBuilder:
    return GraphBuilder((batch, channels, *kernel.in_shape[1:]), int8)


def _sink(graph: GraphBuilder, x: str, name: str, form: str = "float", channels: int = 0) -> None:
    """A consumer that leaves almost nothing to write out; given ``channels``, a convolution comes first."""
    if channels:
        x = graph.conv(x, f"s{name}", (channels, HARNESS), form=form)
        x = graph.quantize(x, f"s{name}q") if form == "int8" else x
    x = graph.node("GlobalAveragePool", [x], f"s{name}pool")
    graph.output(graph.quantize(x, f"s{name}end") if form == "int8" else x)


def _producer(graph: GraphBuilder, kernel: Kernel, name: str, channels: int) -> str:
    """A convolution and ReLU that give ``channels``, in int8 where the kernel is."""
    if kernel.format != "int8":
        return graph.activation(graph.conv("x", name, (HARNESS, channels)), name, "relu")
    x = graph.quantize("x", f"{name}in")
    return graph.quantize(graph.conv(x, name, (HARNESS, channels), form="int8"), f"{name}q")


def _conv(kernel: Kernel, batch: int, int8: Int8Format) -> Probe | None:
    if len(kernel.in_shape) != 3 or len(kernel.out_shape) != 3:
        return None
    c_in, c_out = kernel.in_shape[0], kernel.out_shape[0]
    image = c_in <= 4  # such a layer reads the network's input, which is not in the blocked layout
    graph = _start(kernel, batch, int8, c_in if image else HARNESS)
    x = "x" if image else graph.activation(graph.conv("x", "h", (HARNESS, c_in)), "h", "relu")
    if kernel.format == "int8":
        x = graph.quantize(x, "hq")
    copies = REPEATS if kernel.macs * batch < _HEAVY else 1
    for i in range(copies):
        name = f"k{i}"
        y = graph.conv(
            x, name, (c_in, c_out), kernel.kernel, kernel.stride, pads_of(kernel), kernel.groups, kernel.format
        )
        y = graph.activation(y, name, kernel.fused)
        _sink(
            graph,
            graph.quantize(y, f"s{i}q") if kernel.format == "int8" else y,
            str(i),
            "int8" if kernel.format == "int8" else "float",
        )
    return Probe(kernel, graph.build(), graph.shape, copies, shared_inserts=True, count_inserts=kernel.format != "int8")


def _linear(kernel: Kernel, batch: int, int8: Int8Format) -> Probe:
    rows = math.prod(kernel.in_shape[1:])
    c_in, c_out = kernel.in_shape[0], kernel.out_shape[0]
    graph = GraphBuilder((batch, c_in) if rows == 1 else (batch, rows, c_in), int8)
    x = graph.quantize("x", "hq") if kernel.format == "int8" else "x"
    for i in range(REPEATS):
        y = graph.activation(graph.linear(x, f"k{i}", (c_in, c_out), rows, kernel.format), f"k{i}", kernel.fused)
        graph.output(graph.quantize(y, f"s{i}q") if kernel.format == "int8" else y)
    return Probe(kernel, graph.build(), graph.shape, REPEATS, count_inserts=kernel.format != "int8")


def _add(kernel: Kernel, batch: int, int8: Int8Format) -> Probe:
    channels = kernel.out_shape[0]
    if len(kernel.in_shape) != 3:
        return _flat(kernel, batch, int8, "Add")
    graph = _start(kernel, batch, int8)
    if kernel.format == "int8":
        return _add_int8(kernel, graph, channels)
    if kernel.fused.startswith(APART):
        return _add_apart(kernel, graph, channels)
    skip = graph.activation(graph.conv("x", "h", (HARNESS, channels)), "h", "relu")
    for i in range(REPEATS):
        plain = graph.activation(graph.conv("x", f"p{i}", (HARNESS, channels)), f"p{i}", kernel.fused)
        _sink(graph, plain, f"p{i}")
        summed = graph.node("Add", [graph.conv("x", f"k{i}", (HARNESS, channels)), skip], f"k{i}add")
        _sink(graph, graph.activation(summed, f"k{i}", kernel.fused), f"k{i}")
    return Probe(kernel, graph.build(), graph.shape, REPEATS, delta=True)


def _add_apart(kernel: Kernel, graph: GraphBuilder, channels: int) -> Probe:
    """What comes by the shortcut is not in the blocked layout: reorders on both sides, and a ReLU of its own."""
    skip = graph.node("Neg", [graph.conv("x", "sskip", (HARNESS, channels))], "sneg")
    for i in range(REPEATS):
        summed = graph.node("Add", [graph.conv("x", f"h{i}", (HARNESS, channels)), skip], f"k{i}add")
        _sink(graph, graph.activation(summed, f"k{i}", kernel.fused[len(APART) + 1 :]), str(i), channels=channels)
    return Probe(kernel, graph.build(), graph.shape, REPEATS)


def _add_int8(kernel: Kernel, graph: GraphBuilder, channels: int) -> Probe:
    """A chain of residual blocks: how often ONNX Runtime transposes between them is part of the cost."""
    stream = _producer(graph, kernel, "h", channels)
    for i in range(REPEATS):
        branch = graph.quantize(graph.conv(stream, f"hc{i}", (channels, channels), form="int8"), f"hc{i}q")
        summed = graph.activation(graph.node("Add", [branch, stream], f"k{i}"), f"k{i}", kernel.fused)
        stream = graph.quantize(summed, f"k{i}q")
    last = graph.quantize(graph.conv(stream, "hend", (channels, HARNESS), form="int8"), "hendq")
    _sink(graph, last, "", "int8")
    return Probe(kernel, graph.build(), graph.shape, REPEATS)


def _flat(kernel: Kernel, batch: int, int8: Int8Format, op: str) -> Probe:
    """An element-wise operator on tensors without a spatial layout."""
    graph = GraphBuilder((batch, *kernel.in_shape[::-1]), int8)
    for i in range(REPEATS):
        left, right = graph.node("Relu", ["x"], f"h{i}a"), graph.node("Neg", ["x"], f"h{i}b")
        y = graph.node(op, [left, right], f"k{i}") if op else left
        graph.output(graph.activation(y, f"k{i}", kernel.fused if op else kernel.fused or "sigmoid"))
    return Probe(kernel, graph.build(), graph.shape, REPEATS, count_inserts=False)


Operator = Callable[[GraphBuilder, Kernel, str, str], str]


def _unary(operator: Operator, sink: bool = True) -> Callable[[Kernel, int, Int8Format], Probe | None]:
    """The maker of probes ``convolution -> operator -> sink``."""

    def make(kernel: Kernel, batch: int, int8: Int8Format) -> Probe | None:
        if len(kernel.in_shape) != 3:
            return _flat(kernel, batch, int8, "") if kernel.kind in ("relu", "activation") else None
        graph = _start(kernel, batch, int8)
        for i in range(REPEATS):
            x = _producer(graph, kernel, f"h{i}", kernel.in_shape[0])
            y = operator(graph, kernel, x, f"k{i}")
            y = graph.quantize(y, f"k{i}q") if kernel.format == "int8" else y
            if sink:
                _sink(graph, y, str(i), kernel.format, kernel.out_shape[0])
            else:
                graph.output(y)
        return Probe(kernel, graph.build(), graph.shape, REPEATS)

    return make


def _activation(graph: GraphBuilder, kernel: Kernel, x: str, name: str) -> str:
    return graph.activation(x, name, kernel.fused or ("relu" if kernel.kind == "relu" else "sigmoid"))


def _pool(graph: GraphBuilder, kernel: Kernel, x: str, name: str) -> str:
    op = "AveragePool" if kernel.fused.startswith("av") else "MaxPool"
    window = {"kernel_shape": list(kernel.kernel), "strides": list(kernel.stride), "pads": list(pads_of(kernel))}
    return graph.node(op, [x], name, **window)


def _global_pool(graph: GraphBuilder, kernel: Kernel, x: str, name: str) -> str:
    return graph.node("GlobalAveragePool", [x], name)


def _slice(graph: GraphBuilder, kernel: Kernel, x: str, name: str) -> str:
    steps = [max(1, round(a / b)) for a, b in zip(kernel.in_shape, kernel.out_shape, strict=True)]
    ends = [(b - 1) * s + 1 for b, s in zip(kernel.out_shape, steps, strict=True)]
    rows = {"starts": [0, 0, 0], "ends": ends, "axes": [1, 2, 3], "steps": steps}
    return graph.node(
        "Slice", [x, *(graph.constant(f"{name}_{k}", np.array(v, np.int64)) for k, v in rows.items())], name
    )


def _batch_norm(graph: GraphBuilder, kernel: Kernel, x: str, name: str) -> str:
    ones = [graph.constant(f"{name}_{i}", np.ones(kernel.in_shape[0], np.float32)) for i in range(4)]
    return graph.activation(graph.node("BatchNormalization", [x, *ones], name), name, kernel.fused)


def _flat_mul(kernel: Kernel, batch: int, int8: Int8Format) -> Probe:
    """A product of two tensors of a sequence, or a change of sign."""
    return _flat(kernel, batch, int8, "Mul")


def _attention(kernel: Kernel, batch: int, int8: Int8Format) -> Probe | None:
    """Causal attention as exporters write it: both factors scaled, a mask of the window added, no fused operator."""
    if len(kernel.in_shape) != 3:
        return None
    graph = GraphBuilder((batch, *kernel.in_shape), int8)
    length, root = kernel.in_shape[1], kernel.in_shape[2] ** -0.25
    mask = graph.constant("mask", np.triu(np.full((length, length), -np.inf, np.float32), 1))
    scale = graph.constant("root", np.float32(root))
    for i in range(REPEATS):
        keys = graph.node("Transpose", [graph.node("Neg", ["x"], f"h{i}a")], f"k{i}t", perm=[0, 1, 3, 2])
        scaled = [graph.node("Mul", [y, scale], f"k{i}{n}") for y, n in ((keys, "s"), ("x", "q"))]
        scores = graph.node("Add", [graph.node("MatMul", [scaled[1], scaled[0]], f"k{i}qk"), mask], f"k{i}m")
        weights = graph.node("Softmax", [scores], f"k{i}w", axis=-1)
        graph.output(graph.node("MatMul", [weights, "x"], f"k{i}"))
    return Probe(kernel, graph.build(), graph.shape, REPEATS, count_inserts=False)


def _norm(kernel: Kernel, batch: int, int8: Int8Format) -> Probe:
    """An RMSNorm over the channels of (batch, positions, channels), which ONNX Runtime fuses into one node."""
    graph = GraphBuilder((batch, *kernel.in_shape[::-1]), int8)
    two, eps = graph.constant("two", np.float32(2)), graph.constant("eps", np.float32(1e-6))
    weight = graph.constant("weight", np.ones(kernel.in_shape[0], np.float32))
    axes = graph.constant("axes", np.array([-1], np.int64))
    for i in range(REPEATS):
        x = graph.node("Neg", ["x"], f"h{i}")
        mean = graph.node("ReduceMean", [graph.node("Pow", [x, two], f"k{i}p"), axes], f"k{i}r", keepdims=1)
        root = graph.node("Sqrt", [graph.node("Add", [mean, eps], f"k{i}a")], f"k{i}s")
        graph.output(graph.node("Mul", [graph.node("Div", [x, root], f"k{i}d"), weight], f"k{i}"))
    return Probe(kernel, graph.build(), graph.shape, REPEATS, count_inserts=False)


def _embedding(kernel: Kernel, batch: int, int8: Int8Format) -> Probe:
    """Rows of a table (vocabulary, channels) by token."""
    graph = GraphBuilder((batch, *kernel.in_shape[1:]), int8)
    table = graph.weight("table", (kernel.in_shape[0], kernel.out_shape[0]), "float")
    ids = graph.node("Cast", ["x"], "h", to=TensorProto.INT64)
    graph.output(graph.node("Gather", [table, ids], "k0"))
    return Probe(kernel, graph.build(), graph.shape, count_inserts=False)


def _copy(kernel: Kernel, batch: int, int8: Int8Format) -> Probe | None:
    """What moves the channels of a sequence: transposed or repeated heads, halves cut off or joined."""
    if len(kernel.out_shape) != 2:
        return None
    channels, size = kernel.out_shape
    graph = GraphBuilder((batch, *_copied(kernel)), int8)
    steps = {k: graph.constant(k, np.array([v], np.int64)) for k, v in {"zero": 0, "end": size, "last": -1}.items()}
    share = max(1, channels // kernel.in_shape[0])
    shape = graph.constant("shape", np.array([batch, kernel.in_shape[0], share, size], np.int64))
    for i in range(REPEATS):
        x, name = graph.node("Neg", ["x"], f"h{i}"), f"k{i}"
        if kernel.kind == "transpose":
            y = graph.node("Transpose", [x], name, perm=[0, 2, 1, 3])
        elif kernel.kind == "repeat":
            y = graph.node("Expand", [x, shape], name)
        elif kernel.kind == "slice":
            y = graph.node("Slice", [x, steps["zero"], steps["end"], steps["last"]], name)
        else:
            y = graph.node("Concat", [x] * kernel.n_inputs, name, axis=-1)
        graph.output(y)
    return Probe(kernel, graph.build(), graph.shape, REPEATS, count_inserts=False)


def _copied(kernel: Kernel) -> tuple[int, ...]:
    """The input's shape of :func:`_copy`, without the batch."""
    channels, size = kernel.out_shape
    if kernel.kind == "transpose":
        inner = math.gcd(size, 64)
        return (size // inner, channels, inner)
    if kernel.kind == "repeat":
        return (kernel.in_shape[0], 1, size)
    return (channels, 2 * size) if kernel.kind == "slice" else (channels, max(1, size // max(1, kernel.n_inputs)))


def _either(flat: _Maker, image: _Maker) -> _Maker:
    """Sequences ``(C, T)`` have probes of their own; images stand behind convolutions."""
    return lambda kernel, batch, int8: (image if len(kernel.out_shape) == 3 else flat)(kernel, batch, int8)


def _mul(graph: GraphBuilder, kernel: Kernel, x: str, name: str) -> str:
    """A gate a channel, as squeeze-and-excitation has it."""
    gate = graph.node("GlobalAveragePool", [x], name.replace("k", "hg"))
    return graph.node("Mul", [x, gate], name)


def _concat(kernel: Kernel, batch: int, int8: Int8Format) -> Probe | None:
    if len(kernel.out_shape) != 3 or kernel.n_inputs < 1:
        return None
    graph = GraphBuilder((batch, HARNESS, *kernel.out_shape[1:]), int8)
    parts, rest = divmod(kernel.out_shape[0], kernel.n_inputs)
    if parts == 0:
        return None
    widths = [parts + (i < rest) for i in range(kernel.n_inputs)]
    inputs = [_producer(graph, kernel, f"h{i}", c) for i, c in enumerate(widths)]
    y = graph.node("Concat", inputs, "k0", axis=1)
    y = graph.quantize(y, "k0q") if kernel.format == "int8" else y
    _sink(graph, y, "", kernel.format, kernel.out_shape[0])
    return Probe(kernel, graph.build(), graph.shape)


def _pad(kernel: Kernel, batch: int, int8: Int8Format) -> Probe | None:
    """Channel padding of a shortcut; the addition behind it is another kernel, ``apart``."""
    if len(kernel.in_shape) != 3:
        return None
    graph = _start(kernel, batch, int8, kernel.in_shape[0])
    before = [0, *((b - a) // 2 for a, b in zip(kernel.in_shape, kernel.out_shape, strict=True))]
    after = [0, *(b - a - (b - a) // 2 for a, b in zip(kernel.in_shape, kernel.out_shape, strict=True))]
    pads = graph.constant("pads", np.array(before + after, np.int64))
    for i in range(REPEATS):
        x = graph.node("Neg", ["x"], f"h{i}")
        graph.output(graph.node("Pad", [x, pads], f"k{i}"))
    return Probe(kernel, graph.build(), graph.shape, REPEATS, count_inserts=False)


def _quantize(kernel: Kernel, batch: int, int8: Int8Format) -> Probe | None:
    """The edge from float to int8 between two layers."""
    channels = kernel.in_shape[0]
    if len(kernel.in_shape) != 3:
        return _flat_quantize(kernel, batch, int8)
    image = channels <= 4
    graph = _start(kernel, batch, int8, channels if image else HARNESS)
    for i in range(REPEATS):
        x = graph.activation("x" if image else graph.conv("x", f"h{i}", (HARNESS, channels)), f"h{i}", "relu")
        x = graph.quantize(x, f"k{i}")
        _sink(graph, x, str(i), "int8", channels)
    return Probe(kernel, graph.build(), graph.shape, REPEATS)


def _flat_quantize(kernel: Kernel, batch: int, int8: Int8Format) -> Probe:
    """The edge in front of or behind an int8 linear layer: one node."""
    graph = GraphBuilder((batch, *kernel.in_shape[::-1]), int8)
    names = ("k0", "h0") if kernel.kind == "quantize" else ("h0", "k0")
    graph.output(graph.quantize("x", *names))
    return Probe(kernel, graph.build(), graph.shape, count_inserts=False)


def _dequantize(kernel: Kernel, batch: int, int8: Int8Format) -> Probe | None:
    """The edge from int8 to float between two layers."""
    channels = kernel.in_shape[0]
    if len(kernel.in_shape) != 3:
        return _flat_quantize(kernel, batch, int8)
    graph = _start(kernel, batch, int8)
    x = graph.quantize("x", "hin")
    for i in range(REPEATS):
        y = graph.quantize(graph.conv(x, f"h{i}", (HARNESS, channels), form="int8"), f"k{i}")
        _sink(graph, y, str(i), "float", channels)
    return Probe(kernel, graph.build(), graph.shape, REPEATS)


_MAKERS: dict[str, _Maker] = {
    "conv": _conv,
    "linear": _linear,
    "add": _add,
    "concat": _either(_copy, _concat),
    "attention": _attention,
    "norm": _norm,
    "embedding": _embedding,
    "transpose": _copy,
    "repeat": _copy,
    "pad": _pad,
    "quantize": _quantize,
    "dequantize": _dequantize,
    "relu": _unary(_activation),
    "activation": _unary(_activation),
    "pool": _unary(_pool),
    "global_pool": _unary(_global_pool, sink=False),
    "slice": _either(_copy, _unary(_slice, sink=False)),
    "batch_norm": _unary(_batch_norm),
    "mul": _either(_flat_mul, _unary(_mul)),
}

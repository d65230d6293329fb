"""Which channels of an operation's output are which channels of its inputs: one rule an operation.

A rule returns the output's :class:`Value`. What has no rule pins its inputs' channels, with the operation's name as the
reason, so that nothing is pruned on a guess.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import fx, nn
from torch.nn import functional as F

Ids = npt.NDArray[np.int64]
AXIS = "a layer reads another axis than that of the channels"
Fix = Callable[[fx.Node, npt.NDArray[np.bool_]], None]


class Classes:
    """Union-find over channels; a class can be pinned with a reason."""

    def __init__(self) -> None:
        self._parent: list[int] = []
        self._reason: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self._parent)

    def fresh(self, n: int) -> Ids:
        start = len(self._parent)
        self._parent.extend(range(start, start + n))
        return np.arange(start, start + n, dtype=np.int64)

    def fresh_pinned(self, n: int, reason: str) -> Ids:
        ids = self.fresh(n)
        self.pin(ids, reason)
        return ids

    def root(self, i: int) -> int:
        while self._parent[i] != i:
            self._parent[i] = self._parent[self._parent[i]]
            i = self._parent[i]
        return i

    def roots(self, ids: Ids) -> Ids:
        return np.array([self.root(int(i)) for i in ids], dtype=np.int64)

    def unite(self, a: Ids, b: Ids) -> None:
        for i, j in zip(a.tolist(), b.tolist(), strict=True):
            low, high = sorted((self.root(i), self.root(j)))
            if low != high:
                self._parent[high] = low
                if high in self._reason:
                    self._reason.setdefault(low, self._reason[high])

    def pin(self, ids: Ids, reason: str) -> None:
        for i in dict.fromkeys(self.roots(ids).tolist()):
            self._reason.setdefault(i, reason)

    def pinned(self, i: int) -> str | None:
        return self._reason.get(self.root(i))


@dataclass(eq=False)
class Value:
    """A tensor in the graph: its shape with the batch, and the class of each channel along ``dim``.

    ``fix(node, keep)`` rewrites the constants of the node that made it (paddings, slices, sizes). ``parts``: the values of
    a tuple (chunk, split).
    """

    shape: tuple[int, ...]
    ids: Ids
    dim: int = 1
    fix: Fix | None = None
    parts: list[Value] | None = None

    def pin(self, classes: Classes, reason: str) -> None:
        classes.pin(self.ids, reason)
        for part in self.parts or []:
            part.pin(classes, reason)

    def resolved(self, classes: Classes) -> Value:
        self.ids = classes.roots(self.ids)
        return self


@dataclass(eq=False)
class Call:
    """One node with what its rule needs."""

    module: fx.GraphModule
    node: fx.Node
    shape: Any
    inputs: list[Value]
    classes: Classes
    channelwise: dict[str, Ids]
    part: nn.Module | None

    def pinned(self, reason: str) -> Value:
        """Pin all inputs; the output gets pinned channels of its own."""
        for value in self.inputs:
            value.pin(self.classes, reason)
        if isinstance(self.shape, list):
            parts = [_opaque(shape, self.classes, reason) for shape in self.shape]
            return Value((), np.zeros(0, dtype=np.int64), parts=parts)
        return _opaque(self.shape, self.classes, reason)

    def like_input(self, fix: Fix | None = None) -> Value:
        return Value(self.shape, self.inputs[0].ids, self.inputs[0].dim, fix)

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        if len(self.node.args) > position:
            return self.node.args[position]
        return self.node.kwargs.get(name, default)


def _opaque(shape: tuple[int, ...], classes: Classes, reason: str) -> Value:
    dim = 1 if len(shape) in (2, 4) else len(shape) - 1
    return Value(shape, classes.fresh_pinned(shape[dim] if shape else 0, reason), dim)


def call_target(module: fx.GraphModule, node: fx.Node) -> Any:
    """The called module, function or method name; ``None`` for other nodes."""
    if node.op == "call_module":
        return module.get_submodule(str(node.target))
    return node.target if node.op in ("call_function", "call_method") else None


def apply_rule(
    module: fx.GraphModule,
    node: fx.Node,
    shape: Any,
    values: Mapping[str, Value],
    classes: Classes,
    channelwise: dict[str, Ids],
    shared: bool,
) -> Value:
    """The value of a node that yields a tensor (or a tuple of tensors)."""
    if node.op == "placeholder":
        return _opaque(shape, classes, "they are the model's input")
    if node.op == "get_attr":
        return _opaque(shape, classes, f"{node.target} is a constant of the model")
    inputs = [values[n.name] for n in node.all_input_nodes if n.name in values]
    target = call_target(module, node)
    part = target if isinstance(target, nn.Module) else None
    call = Call(module, node, shape, inputs, classes, channelwise, part)
    if shared:
        return call.pinned(f"{node.target} is used in more than one place")
    name = str(node.target) if node.op == "call_module" else getattr(target, "__name__", str(target))
    rule = _module_rule(part) if part is not None else _RULES.get(target)
    value = rule(call) if rule is not None and inputs else None
    return value if value is not None else call.pinned(f"no rule tells how {name} moves channels")


# ---------------------------------------------------------------- rules: None means "no rule for this form"


def _conv(call: Call) -> Value | None:
    conv, (source,) = call.part, call.inputs
    if not isinstance(conv, nn.Conv2d) or source.dim != 1:
        return None
    if conv.groups == 1:
        return Value(call.shape, call.classes.fresh(conv.out_channels), 1)
    if conv.groups == conv.in_channels:
        return Value(call.shape, np.repeat(source.ids, conv.out_channels // conv.in_channels), 1)
    return call.pinned(f"{call.node.target} is a grouped convolution ({conv.groups} groups)")


def _linear(call: Call) -> Value | None:
    dim = len(call.shape) - 1
    if not isinstance(call.part, nn.Linear):
        return None
    if call.inputs[0].dim != dim:
        call.inputs[0].pin(call.classes, AXIS)
        return Value(call.shape, call.classes.fresh_pinned(call.part.out_features, AXIS), dim)
    return Value(call.shape, call.classes.fresh(call.part.out_features), dim)


def _per_channel(call: Call) -> Value | None:
    source = call.inputs[0]
    if isinstance(call.part, nn.PReLU) and call.part.num_parameters == 1:
        return call.like_input()
    if source.dim != 1:
        return None
    call.channelwise[str(call.node.target)] = source.ids
    return call.like_input()


def _pass(call: Call) -> Value | None:
    return call.like_input()


def _spatial(call: Call) -> Value | None:
    """Pooling, interpolation: channels stay."""
    same = len(call.inputs) == 1 and call.inputs[0].dim == 1 and call.shape[1] == call.inputs[0].shape[1]
    return call.like_input() if same else None


def _elementwise(call: Call) -> Value | None:
    first, *others = call.inputs
    for other in others:
        if other.dim != first.dim or len(other.ids) != len(first.ids) or len(other.shape) != len(first.shape):
            return None
    for other in others:
        call.classes.unite(first.ids, other.ids)
    return call.like_input()


def _cat(call: Call) -> Value | None:
    dim = int(call.argument(1, "dim", 0)) % len(call.shape)
    if any(value.dim != call.inputs[0].dim for value in call.inputs):
        return None
    if dim != call.inputs[0].dim:
        return _elementwise(call)
    parts = cast(Sequence[fx.Node], call.node.args[0])
    values = {n.name: v for n, v in zip(call.node.all_input_nodes, call.inputs, strict=True)}
    return Value(call.shape, np.concatenate([values[n.name].ids for n in parts]), dim)


def _mean(call: Call) -> Value | None:
    dims = call.argument(1, "dim")
    source = call.inputs[0]
    dims = [dims] if isinstance(dims, int) else dims
    if dims is None or source.dim in [int(d) % len(source.shape) for d in dims]:
        return None
    below = sum(int(d) % len(source.shape) < source.dim for d in dims)
    keep_dim = len(call.shape) == len(source.shape)
    return Value(call.shape, source.ids, source.dim if keep_dim else source.dim - below)


def _flatten(call: Call) -> Value | None:
    """``(N, C, H, W) -> (N, C*H*W)`` in any spelling; sizes are rewritten so that pruned models still run."""
    source = call.inputs[0]
    if source.dim == 1 and len(source.shape) == 2 and call.shape == (*source.shape, 1, 1):
        return Value(call.shape, source.ids, 1, _unflatten)
    if source.dim != 1 or len(call.shape) != 2 or call.shape[0] != source.shape[0]:
        return call.like_input() if call.shape == source.shape else None
    copies = int(np.prod(source.shape[2:], dtype=np.int64))
    if copies * source.shape[1] != call.shape[1]:
        return None

    def fix(node: fx.Node, keep: npt.NDArray[np.bool_]) -> None:
        if node.op != "call_module":
            node.op, node.target, node.args, node.kwargs = "call_function", torch.flatten, (node.args[0], 1), {}

    return Value(call.shape, np.repeat(source.ids, copies), 1, fix)


def _unflatten(node: fx.Node, keep: npt.NDArray[np.bool_]) -> None:
    """``(N, C) -> (N, C, 1, 1)``, as gates are written, with C left open."""
    if node.op != "call_module":
        node.op, node.target, node.args, node.kwargs = (
            "call_function",
            torch.unflatten,
            (node.args[0], 1, (-1, 1, 1)),
            {},
        )


def _pad(call: Call) -> Value | None:
    source, pads = call.inputs[0], list(call.argument(1, "pad"))
    if not all(isinstance(p, int) for p in pads):
        return None
    axis = 2 * (len(source.shape) - 1 - source.dim)
    if len(pads) <= axis or pads[axis] == pads[axis + 1] == 0:
        return call.like_input()
    if call.argument(2, "mode", "constant") != "constant" or min(pads[axis], pads[axis + 1]) < 0:
        return None
    before, after = call.classes.fresh(pads[axis]), call.classes.fresh(pads[axis + 1])

    def fix(node: fx.Node, keep: npt.NDArray[np.bool_]) -> None:
        new = list(pads)
        new[axis] = int(keep[call.classes.roots(before)].sum())
        new[axis + 1] = int(keep[call.classes.roots(after)].sum())
        if len(node.args) > 1:
            node.args = (node.args[0], tuple(new), *node.args[2:])
        else:
            node.kwargs = {**node.kwargs, "pad": tuple(new)}

    return Value(call.shape, np.concatenate([before, source.ids, after]), source.dim, fix)


def _getitem(call: Call) -> Value | None:
    source, index = call.inputs[0], cast(Any, call.node.args[1])
    if source.parts is not None:
        return source.parts[index] if isinstance(index, int) else None
    index = index if isinstance(index, tuple) else (index,)
    if any(part is Ellipsis or isinstance(part, int | fx.Node) or part is None for part in index):
        return None
    if not all(isinstance(part, slice) for part in index):
        return None
    if len(index) <= source.dim or index[source.dim] == slice(None):
        return call.like_input()
    window = index[source.dim]
    if any(isinstance(bound, fx.Node) for bound in (window.start, window.stop, window.step)) or (window.step or 1) != 1:
        return None
    start, stop, _ = window.indices(source.shape[source.dim])
    ids = source.ids

    def fix(node: fx.Node, keep: npt.NDArray[np.bool_]) -> None:
        kept = keep[call.classes.roots(ids)]
        new = list(index)
        new[source.dim] = slice(int(kept[:start].sum()), int(kept[:stop].sum()))
        node.args = (node.args[0], tuple(new))

    return Value(call.shape, ids[start:stop], source.dim, fix)


def _split(call: Call) -> Value | None:
    source = call.inputs[0]
    is_chunk = getattr(call.node.target, "__name__", call.node.target) == "chunk"
    dim = int(call.argument(2, "dim", 0)) % len(source.shape)
    if dim != source.dim or not isinstance(call.shape, list):
        return None
    bounds = np.cumsum([0, *(shape[dim] for shape in call.shape)])
    pieces = [source.ids[a:b] for a, b in itertools.pairwise(bounds)]

    def fix(node: fx.Node, keep: npt.NDArray[np.bool_]) -> None:
        sizes = [int(keep[call.classes.roots(piece)].sum()) for piece in pieces]
        node.args, node.kwargs = (node.args[0], sizes, dim), {}
        if is_chunk:
            node.target = torch.split if node.op == "call_function" else "split"

    parts = [Value(shape, piece, dim) for shape, piece in zip(call.shape, pieces, strict=True)]
    return Value((), source.ids, dim, fix, parts)


_MODULE_RULES: tuple[tuple[tuple[type[nn.Module], ...], Callable[[Call], Value | None]], ...] = (
    ((nn.Conv2d,), _conv),
    ((nn.Linear,), _linear),
    ((nn.BatchNorm1d, nn.BatchNorm2d, nn.PReLU), _per_channel),
    (
        (
            nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish, nn.Hardsigmoid, nn.Sigmoid,
            nn.Tanh, nn.Softplus, nn.Hardtanh, nn.Identity, nn.Dropout, nn.Dropout2d, nn.SELU, nn.CELU, nn.LogSigmoid,
        ),
        _pass,
    ),
    (
        (
            nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.Upsample, nn.ZeroPad2d,
            nn.ReflectionPad2d, nn.ReplicationPad2d, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d,
        ),
        _spatial,
    ),
    ((nn.Flatten,), _flatten),
)  # fmt: skip


def _module_rule(part: nn.Module) -> Callable[[Call], Value | None] | None:
    return next((rule for kinds, rule in _MODULE_RULES if isinstance(part, kinds)), None)


_RULES: dict[Any, Callable[[Call], Value | None]] = {
    **dict.fromkeys(
        (
            F.relu, F.relu6, F.gelu, F.silu, F.hardswish, F.hardsigmoid, F.leaky_relu, F.elu, F.mish, F.dropout, F.hardtanh,
            torch.relu, torch.sigmoid, torch.tanh, torch.clamp, F.softplus, "relu", "sigmoid", "tanh", "clamp",
            "contiguous", "clone", "detach", "float", operator.neg, torch.abs,
        ),
        _pass,
    ),
    **dict.fromkeys(
        (F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d, F.interpolate, torch.max_pool2d), _spatial
    ),
    **dict.fromkeys(
        (
            operator.add, operator.mul, operator.sub, operator.truediv, torch.add, torch.mul, torch.sub, torch.div,
            torch.maximum, torch.minimum, "add", "mul", "sub", "div",
        ),
        _elementwise,
    ),
    **dict.fromkeys((torch.cat, torch.concat), _cat),
    **dict.fromkeys((torch.mean, "mean", torch.sum, "sum"), _mean),
    **dict.fromkeys((torch.flatten, "flatten", "view", "reshape", torch.reshape, "squeeze", torch.squeeze), _flatten),
    **dict.fromkeys((torch.chunk, "chunk", torch.split, "split"), _split),
    F.pad: _pad,
    operator.getitem: _getitem,
}  # fmt: skip


# ---------------------------------------------------------------- what an operation runs as

_KINDS: tuple[tuple[tuple[Any, ...], str], ...] = (
    ((operator.add, torch.add, operator.sub, "add"), "add"),
    ((operator.mul, torch.mul, "mul"), "mul"),
    ((torch.cat, torch.concat), "concat"),
    ((F.pad,), "pad"),
    ((operator.getitem,), "slice"),
    ((F.adaptive_avg_pool2d, torch.mean, "mean"), "global_pool"),
    ((F.max_pool2d, F.avg_pool2d, torch.max_pool2d), "pool"),
)
_FREE = (
    torch.chunk,
    "chunk",
    torch.split,
    "split",
    torch.flatten,
    "flatten",
    "view",
    "reshape",
    "size",
    "contiguous",
    F.dropout,
    "squeeze",
    torch.squeeze,
)


def is_relu(module: fx.GraphModule, node: fx.Node) -> bool:
    """ReLU or ReLU6, as module, function or method: what runtimes fuse into the operator before it."""
    target = call_target(module, node)
    return isinstance(target, nn.ReLU | nn.ReLU6) or target in (F.relu, F.relu6, torch.relu, "relu")


def relu_ceiling(module: fx.GraphModule, node: fx.Node) -> float:
    """Where a ReLU's output ends: infinity, or 6."""
    target = call_target(module, node)
    return 6.0 if isinstance(target, nn.ReLU6) or target is F.relu6 else math.inf


def op_kind(target: Any, part: nn.Module | None) -> str:
    """What a called target runs as (``types.Kernel.kind``); ``free`` where nothing runs."""
    if isinstance(part, nn.Identity | nn.Dropout | nn.Dropout2d | nn.Flatten):
        return "free"
    for types, kind in (
        ((nn.ReLU, nn.ReLU6), "relu"),
        ((nn.BatchNorm2d, nn.BatchNorm1d), "batch_norm"),
        ((nn.AdaptiveAvgPool2d,), "global_pool"),
        ((nn.MaxPool2d, nn.AvgPool2d), "pool"),
        (
            (nn.SiLU, nn.GELU, nn.Hardswish, nn.Sigmoid, nn.Hardsigmoid, nn.Tanh, nn.LeakyReLU, nn.ELU, nn.PReLU),
            "activation",
        ),
        ((nn.Conv2d,), "conv"),
        ((nn.Linear,), "linear"),
    ):
        if isinstance(part, types):
            return kind
    if target in (F.relu, F.relu6, torch.relu, "relu"):
        return "relu"
    if target in _FREE:
        return "free"
    for targets, kind in _KINDS:
        if target in targets:
            return kind
    return "other"


def op_window(node: fx.Node, part: nn.Module | None) -> tuple[tuple[int, int], tuple[int, int]]:
    """Kernel size and stride of a convolution or pooling, as module or function."""
    size: Any = getattr(part, "kernel_size", None)
    stride: Any = getattr(part, "stride", None)
    if part is None:
        size = node.kwargs.get("kernel_size", node.args[1] if len(node.args) > 1 else 1)
        stride = node.kwargs.get("stride", node.args[2] if len(node.args) > 2 else None) or size

    def pair(v: Any) -> tuple[int, int]:
        if isinstance(v, int):
            return v, v
        return (int(v[0]), int(v[1])) if isinstance(v, tuple | list) else (1, 1)

    return pair(size), pair(stride)

"""Which channels of an operation's output are which channels of its inputs: one rule an operation.

A rule returns the output's :class:`Value`. What has no rule pins its inputs' channels, with the operation's name as the
reason, so that nothing is pruned on a guess.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import fx, nn
from torch.nn import functional as F

from autocompress.op_kinds import call_target

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
    a tuple (chunk, split). ``heads``: the channels are attention heads, each with axes of its own; then ``ids`` are of heads.
    """

    shape: tuple[int, ...]
    ids: Ids
    dim: int = 1
    fix: Fix | None = None
    parts: list[Value] | None = None
    heads: bool = False

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
        source = self.inputs[0]
        return Value(self.shape, source.ids, source.dim, fix, heads=source.heads)

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        if len(self.node.args) > position:
            return self.node.args[position]
        return self.node.kwargs.get(name, default)


def _opaque(shape: tuple[int, ...], classes: Classes, reason: str) -> Value:
    dim = 1 if len(shape) in (2, 4) else len(shape) - 1
    return Value(shape, classes.fresh_pinned(shape[dim] if shape else 0, reason), dim)


def _constant(
    module: fx.GraphModule, target: str, shape: tuple[int, ...], classes: Classes, channelwise: dict[str, Ids]
) -> Value:
    """A constant's channels are pinned, but for the columns of an embedding's weight: a head that is tied to it reads them."""
    owner, _, leaf = target.rpartition(".")
    part = module.get_submodule(owner)
    if leaf == "weight" and isinstance(part, nn.Embedding):
        return Value(shape, _columns(owner, part, classes, channelwise), 1)
    return _opaque(shape, classes, f"{target} is a constant of the model")


def _columns(name: str, part: nn.Embedding, classes: Classes, channelwise: dict[str, Ids]) -> Ids:
    """An embedding's columns, wherever it is read."""
    if name not in channelwise:
        channelwise[name] = classes.fresh(part.embedding_dim)
        if part.max_norm is not None:
            classes.pin(channelwise[name], f"{name} limits the norm of its rows")
    return channelwise[name]


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
        return _constant(module, str(node.target), shape, classes, channelwise)
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
    """Channels of equal place are united; what is the same for all channels (a rotary table beside heads) goes along."""
    rank = len(call.shape)
    first = next((v for v in call.inputs if tuple(v.shape) == tuple(call.shape)), call.inputs[0])
    if len(first.shape) != rank:
        return None
    for other in call.inputs:
        axis = first.dim - (rank - len(other.shape))  # the channels' axis in the other, as broadcasting aligns it
        if other is first:
            continue
        if axis >= 0 and other.dim == axis and len(other.ids) == len(first.ids):
            call.classes.unite(first.ids, other.ids)
        elif axis < 0 or (other.shape[axis] == 1 and first.shape[first.dim] > 1):
            other.pin(call.classes, "they are spread over an axis that is not followed")
        else:
            return None
    return Value(call.shape, first.ids, first.dim, heads=first.heads)


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
    if source.heads or source.dim == len(source.shape) - 1 > 1:
        return _heads(call)
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


def _heads(call: Call) -> Value | None:
    """``(..., heads * d) -> (..., heads, d)`` and back: all channels of a head live and die together."""
    source, shape = call.inputs[0], tuple(call.shape)
    if shape == tuple(source.shape):
        return call.like_input()
    dim = len(shape) - 2
    if not source.heads and shape[:-2] == tuple(source.shape[:-1]) and shape[-2] * shape[-1] == source.shape[-1]:
        matrix = source.ids.reshape(shape[-2:])  # (heads, d)
        for column in matrix.T[1:]:
            call.classes.unite(matrix[:, 0], column)
        ids = matrix[:, 0]
    elif source.heads and source.dim == len(source.shape) - 2 and shape[:-1] == tuple(source.shape[:-2]):
        dim, ids = len(shape) - 1, np.repeat(source.ids, source.shape[-1])
        if shape[-1] != len(ids):
            return None
    else:
        return None

    def fix(node: fx.Node, keep: npt.NDArray[np.bool_]) -> None:
        _write_size(node, len(shape), dim, int(keep[call.classes.roots(ids)].sum()))

    return Value(shape, ids, dim, fix, heads=not source.heads)


def _write_size(node: fx.Node, rank: int, dim: int, size: int) -> None:
    """Put the channels' new number into a view, reshape or unflatten that has the old one as a constant."""
    if node.op == "call_module" or getattr(node.target, "__name__", node.target) == "flatten":
        return
    if getattr(node.target, "__name__", node.target) == "unflatten":
        sizes = list(cast(Sequence[Any], node.args[2]))
        place = len(sizes) - (rank - dim)
        if isinstance(sizes[place], int) and sizes[place] != -1:
            sizes[place] = size
        node.args = (*node.args[:2], tuple(sizes))
        return
    flat = len(node.args) > 2 or not isinstance(node.args[1], tuple | list)
    sizes = list(node.args[1:] if flat else cast(Sequence[Any], node.args[1]))
    if isinstance(sizes[dim], int) and sizes[dim] != -1:
        sizes[dim] = size
    node.args = (node.args[0], *sizes) if flat else (node.args[0], tuple(sizes))


def _transpose(call: Call) -> Value | None:
    source, rank = call.inputs[0], len(call.shape)
    if getattr(call.node.target, "__name__", call.node.target) == "permute":
        given = call.node.args[1:] if not isinstance(call.node.args[1], tuple | list) else call.node.args[1]
        order = [int(cast(int, d)) % rank for d in cast(Sequence[Any], given)]
    else:
        a, b = int(call.argument(1, "dim0")) % rank, int(call.argument(2, "dim1")) % rank
        order = list(range(rank))
        order[a], order[b] = b, a
    return Value(call.shape, source.ids, order.index(source.dim), heads=source.heads)


def _repeat(call: Call) -> Value | None:
    """``repeat_interleave`` by a number: each channel (a head of keys) is read that often."""
    source, times, dim = call.inputs[0], call.argument(1, "repeats"), call.argument(2, "dim")
    if not isinstance(times, int) or not isinstance(dim, int):
        return None
    ids = np.repeat(source.ids, times) if dim % len(call.shape) == source.dim else source.ids
    return Value(call.shape, ids, source.dim, heads=source.heads)


def _attention(call: Call) -> Value | None:
    """Heads of queries, keys and values at one place live and die together; with ``enable_gqa`` so do those that share."""
    query, key, value, *masks = call.inputs
    if any(not v.heads or v.dim != 1 or len(v.shape) != 4 for v in (query, key, value)) or any(
        len(mask.shape) > 2 and mask.shape[-3] != 1 for mask in masks
    ):
        return None
    for other in (key, value):
        share = len(query.ids) // len(other.ids)
        call.classes.unite(query.ids, np.repeat(other.ids, share))
    for mask in masks:
        mask.pin(call.classes, "they mask attention")
    return call.like_input()


def _across(call: Call) -> Value | None:
    """A norm over its last axes: where the channels are among these, each depends on all of them.

    An RMSNorm over what is left is the one over all with zeros but for two numbers (``slicing.py``). A mean that is
    taken off has no such form: zeros would become what is taken off.
    """
    source, axes = call.inputs[0], len(cast(Any, call.part).normalized_shape)
    if source.dim < len(source.shape) - axes:
        return call.like_input()
    if isinstance(call.part, nn.RMSNorm) and axes == 1:
        call.channelwise[str(call.node.target)] = source.ids
    else:
        what = "several axes" if isinstance(call.part, nn.RMSNorm) else "with their mean, as an RMSNorm does not"
        source.pin(call.classes, f"{call.node.target} normalizes across them, {what}")
    return call.like_input()


def _embedding(call: Call) -> Value | None:
    ids = _columns(str(call.node.target), cast(nn.Embedding, call.part), call.classes, call.channelwise)
    return Value(call.shape, ids, len(call.shape) - 1)


def _tied_head(call: Call) -> Value | None:
    """``F.linear(x, weight)`` with a constant as its weight reads the channels that the constant's columns are."""
    weight = call.node.args[1] if len(call.node.args) == 2 else None
    if not isinstance(weight, fx.Node) or weight.op != "get_attr" or len(call.inputs) != 2:
        return None
    source, columns = call.inputs
    if source.dim != len(source.shape) - 1 or source.heads or columns.dim != 1:
        return None
    call.classes.unite(source.ids, columns.ids)
    dim = len(call.shape) - 1
    return Value(call.shape, call.classes.fresh_pinned(call.shape[dim], f"{call.node.name} is a function call"), dim)


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
    if index.count(Ellipsis) == 1:
        at, rest = index.index(Ellipsis), len(source.shape) - len(index) + 1
        index = (*index[:at], *[slice(None)] * rest, *index[at + 1 :])
    if any(isinstance(part, int | fx.Node) or part is None for part in index):
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
    if not isinstance(call.shape, list):
        return None
    if dim != source.dim:
        parts = [Value(shape, source.ids, source.dim, heads=source.heads) for shape in call.shape]
        return Value((), source.ids, source.dim, parts=parts, heads=source.heads)
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
    ((nn.RMSNorm, nn.LayerNorm), _across),
    ((nn.Embedding,), _embedding),
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
    **dict.fromkeys((torch.unflatten, "unflatten"), _heads),
    **dict.fromkeys((torch.transpose, "transpose", torch.permute, "permute"), _transpose),
    **dict.fromkeys((torch.repeat_interleave, "repeat_interleave"), _repeat),
    F.scaled_dot_product_attention: _attention,
    F.linear: _tied_head,
    **dict.fromkeys((torch.chunk, "chunk", torch.split, "split"), _split),
    F.pad: _pad,
    operator.getitem: _getitem,
}  # fmt: skip

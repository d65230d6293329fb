"""What a node of the graph runs as: its target, the kind of its kernel, its window."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F


def call_target(module: fx.GraphModule, node: fx.Node) -> Any:
    """The called module, function or method name; ``None`` for other nodes."""
    if node.op == "call_module":
        return module.get_submodule(str(node.target))
    return node.target if node.op in ("call_function", "call_method") else None


_KINDS: tuple[tuple[tuple[Any, ...], str], ...] = (
    ((operator.add, torch.add, operator.sub, "add"), "add"),
    ((operator.mul, torch.mul, "mul", operator.neg), "mul"),
    ((torch.cat, torch.concat), "concat"),
    ((F.pad,), "pad"),
    ((operator.getitem,), "slice"),
    ((F.adaptive_avg_pool2d, torch.mean, "mean"), "global_pool"),
    ((F.max_pool2d, F.avg_pool2d, torch.max_pool2d), "pool"),
    (
        (F.silu, F.gelu, F.hardswish, F.hardsigmoid, torch.sigmoid, "sigmoid", torch.tanh, "tanh"),
        "activation",
    ),
    (("transpose", torch.transpose, "permute", torch.permute), "transpose"),
    (("repeat_interleave", torch.repeat_interleave), "repeat"),
    ((F.scaled_dot_product_attention,), "attention"),
    ((F.linear,), "linear"),
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
    "unflatten",
    torch.unflatten,
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
        ((nn.RMSNorm, nn.LayerNorm), "norm"),
        ((nn.Embedding,), "embedding"),
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

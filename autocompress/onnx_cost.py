"""What an ONNX graph costs, counted on the file: parameters and multiply-accumulates. Runs nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from pathlib import Path

import onnx
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper

from autocompress.errors import UsageError
from autocompress.methods.coding import pack
from autocompress.onnx_file import first_line, load_model

_WEIGHT_INPUT = {
    "Conv": 1,
    "ConvTranspose": 1,
    "ConvInteger": 1,
    "QLinearConv": 3,
    "Gemm": 1,
    "MatMul": 1,
    "MatMulInteger": 1,
    "QLinearMatMul": 3,
}
"""Operator -> which input holds its weight."""
_GRID_INPUTS = {
    "QuantizeLinear": (1, 2),
    "DequantizeLinear": (1, 2),
    "QLinearConv": (1, 2, 4, 5, 6, 7),
    "QLinearMatMul": (1, 2, 4, 5, 6, 7),
}
"""Operator -> inputs that are scales and zero points: how a weight is written, not weights."""


def count_params(model: ModelProto) -> int:
    """Weights and biases, whatever their format; scales, zero points, scalars, shapes and indices do not count."""
    return sum(math.prod(t.dims) for t in _weights(model))


def count_nonzeros(model: ModelProto) -> int:
    """Those of :func:`count_params` that are not zero; what stands for zero in unsigned integers is their zero point."""
    zero_points = {
        node.input[0]: node.input[2]
        for node in model.graph.node
        if node.op_type == "DequantizeLinear" and len(node.input) > 2
    }
    tensors = {t.name: t for t in model.graph.initializer}
    total = 0
    for tensor in _weights(model):
        values = numpy_helper.to_array(tensor)
        zero = tensors.get(zero_points.get(tensor.name, ""))
        level = 0 if zero is None else numpy_helper.to_array(zero).flat[0]
        total += int((values != level).sum())
    return total


def _weights(model: ModelProto) -> list[TensorProto]:
    """Initializers that are weights and biases."""
    grids = {
        node.input[i] for node in model.graph.node for i in _GRID_INPUTS.get(node.op_type, ()) if i < len(node.input)
    }
    indices = (TensorProto.INT64, TensorProto.BOOL, TensorProto.STRING)
    return [t for t in model.graph.initializer if t.dims and t.data_type not in indices and t.name not in grids]


def count_macs(model: ModelProto) -> int:
    """Multiply-accumulates of one example in convolutions and matrix products.

    Raises :class:`UsageError` when a shape cannot be inferred, naming the node.
    """
    single = ModelProto()
    single.CopyFrom(model)
    weights = {t.name for t in single.graph.initializer}
    for value in single.graph.input:
        if value.name not in weights and value.type.tensor_type.shape.dim:
            value.type.tensor_type.shape.dim[0].dim_value = 1
    for value in single.graph.output:
        value.type.tensor_type.ClearField("shape")
    del single.graph.value_info[:]
    try:
        graph = onnx.shape_inference.infer_shapes(single, data_prop=True).graph
    except Exception as error:
        raise UsageError(f"The shapes of the ONNX model cannot be inferred: {first_line(error)}") from error
    shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in (*graph.value_info, *graph.output)}
    shapes |= {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in graph.input}
    shapes |= {t.name: list(t.dims) for t in graph.initializer}
    return sum(_node_macs(node, shapes) for node in graph.node if node.op_type in _WEIGHT_INPUT)


def _node_macs(node: NodeProto, shapes: dict[str, list[int]]) -> int:
    weight, output = shapes.get(node.input[_WEIGHT_INPUT[node.op_type]]), shapes.get(node.output[0])
    if not weight or not output or 0 in output:
        raise UsageError(f"The shape of {node.op_type} {node.name!r} cannot be inferred; export with fixed sizes.")
    if node.op_type == "ConvTranspose":  # every input element meets the whole kernel
        return math.prod(shapes[node.input[0]]) * math.prod(weight[1:])
    if "Conv" in node.op_type:
        return math.prod(output) * math.prod(weight[1:])
    transposed = any(a.name == "transB" and a.i for a in node.attribute)
    return math.prod(output) * (weight[-1] if transposed else weight[-2])


def file_costs(
    path: Path | str, metrics: Collection[str] = ("size_mb", "packed_mb", "params", "macs", "nonzeros")
) -> dict[str, float]:
    """Those of ``metrics`` that a file has (the default ones), in the units of ``types.METRICS``."""
    model = load_model(path)
    count: dict[str, Callable[[], float]] = {
        "size_mb": lambda: Path(path).stat().st_size / 1e6,
        "packed_mb": lambda: len(pack(Path(path).read_bytes(), ".onnx")) / 1e6,
        "params": lambda: float(count_params(model)),
        "macs": lambda: float(count_macs(model)),
        "nonzeros": lambda: float(count_nonzeros(model)),
    }
    return {name: value() for name, value in count.items() if name in metrics}

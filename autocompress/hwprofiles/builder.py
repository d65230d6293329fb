"""Small ONNX graphs written node by node, in the forms that exported models have. Knows nothing of timing."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from autocompress.types import Int8Format

SCALE = 0.05
"""Step of every quantized tensor."""
W4_GROUP = 32
"""Input channels that share one scale of a 4-bit weight."""
_FUSED = {
    "relu6": "Clip",
    "clip": "Clip",
    "sigmoid": "Sigmoid",
    "tanh": "Tanh",
    "hardswish": "HardSwish",
    "hardsigmoid": "HardSigmoid",
    "leaky_relu": "LeakyRelu",
    "elu": "Elu",
    "gelu": "Gelu",
    "softmax": "Softmax",
}


class GraphBuilder:
    """Adds nodes and gives back the names of their outputs. ``shape`` is the input's, with the batch.

    Weights are drawn with ``seed``: the time of dense kernels does not depend on their values.
    """

    def __init__(self, shape: tuple[int, ...], int8: Int8Format = "u8u8", seed: int = 0) -> None:
        self.shape, self.int8, self.input = shape, int8, "x"
        self._rng = np.random.default_rng(seed)
        self._nodes: list[onnx.NodeProto] = []
        self._inits: list[onnx.TensorProto] = []
        self._outputs: list[str] = []

    def constant(self, name: str, array: npt.ArrayLike) -> str:
        """An initializer."""
        self._inits.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def node(self, op: str, inputs: list[str], name: str, **attributes: Any) -> str:
        """One node whose output is named after it."""
        self._nodes.append(helper.make_node(op, inputs, [f"{name}_y"], name=name, **attributes))
        return f"{name}_y"

    def activation(self, x: str, name: str, fused: str) -> str:
        """The activation ``fused`` (``""`` is none, ``"silu"`` is x * sigmoid(x))."""
        if fused in ("", "none"):
            return x
        if fused in ("silu", "swish"):
            return self.node("Mul", [x, self.node("Sigmoid", [x], f"{name}_sigmoid")], f"{name}_silu")
        if fused in ("relu6", "clip"):
            ends = [self.constant(f"{name}_low", np.float32(0)), self.constant(f"{name}_high", np.float32(6))]
            return self.node("Clip", [x, *ends], f"{name}_clip")
        return self.node(_FUSED.get(fused, "Relu"), [x], f"{name}_{fused}")

    def quantize(self, x: str, name: str, back: str = "") -> str:
        """``QuantizeLinear`` and ``DequantizeLinear`` (named ``back``) on one grid: zero point 0, or -128 if signed."""
        zero = np.int8(-128) if self.int8 == "s8s8" else np.uint8(0)
        grid = [self.constant(f"{name}_scale", np.float32(SCALE)), self.constant(f"{name}_zero", zero)]
        quantized = self.node("QuantizeLinear", [x, *grid], f"{name}_Q")
        return self.node("DequantizeLinear", [quantized, *grid], f"{back or name}_DQ")

    def conv(
        self,
        x: str,
        name: str,
        widths: tuple[int, int],
        kernel: tuple[int, int] = (1, 1),
        stride: tuple[int, int] = (1, 1),
        pads: tuple[int, int, int, int] | None = None,
        groups: int = 1,
        form: str = "float",
    ) -> str:
        """A convolution ``widths = (c_in, c_out)`` with bias; its weight is stored in ``form``."""
        weight = (widths[1], widths[0] // groups, *kernel)
        top, left = (kernel[0] - 1) // 2, (kernel[1] - 1) // 2
        pads = pads or (top, left, kernel[0] - 1 - top, kernel[1] - 1 - left)
        inputs = [x, self.weight(f"{name}_w", weight, form), self.bias(f"{name}_b", widths[1], form)]
        return self.node(
            "Conv", inputs, name, kernel_shape=list(kernel), strides=list(stride), pads=list(pads), group=groups
        )

    def linear(self, x: str, name: str, widths: tuple[int, int], rows: int, form: str = "float") -> str:
        """A linear layer: ``Gemm`` on ``(batch, c_in)``, else (more rows, or stored weights) ``MatMul`` and ``Add``."""
        if rows == 1 and form not in ("w8", "w4"):
            inputs = [
                x,
                self.weight(f"{name}_w", (widths[1], widths[0]), form),
                self.bias(f"{name}_b", widths[1], form),
            ]
            return self.node("Gemm", inputs, name, transB=1)
        product = self.node("MatMul", [x, self.weight(f"{name}_w", widths, form, out_axis=1)], name)
        return self.node("Add", [product, self.constant(f"{name}_b", np.zeros(widths[1], np.float32))], f"{name}_bias")

    def weight(self, name: str, shape: tuple[int, ...], form: str, out_axis: int = 0) -> str:
        """A weight as floats, as int8 with a scale a channel (``int8``, ``w8``), or as int4 in blocks (``w4``)."""
        if form == "float":
            return self.constant(name, (self._rng.standard_normal(shape) * 0.05).astype(np.float32))
        if form == "w4":
            return self._int4(name, shape, 1 - out_axis)
        drawn = self._rng.integers(-127, 128, shape)
        offset, dtype = (128, np.uint8) if self.int8 == "u8u8" else (0, np.int8)
        integers = self.constant(f"{name}_q", (drawn + offset).astype(dtype))
        # Without an explicit zero point ONNX Runtime leaves a Gemm in float and dequantizes its weight in every run.
        zero = self.constant(f"{name}_z", np.full(shape[out_axis], offset, dtype))
        inputs = [integers, self.constant(f"{name}_s", np.full(shape[out_axis], 0.002, np.float32)), zero]
        self._nodes.append(helper.make_node("DequantizeLinear", inputs, [name], f"{name}_dq", axis=out_axis))
        return name

    def _int4(self, name: str, shape: tuple[int, ...], axis: int) -> str:
        count = int(np.prod(shape))
        packed = self._rng.integers(0, 256, (count + 1) // 2, dtype=np.uint8).tobytes()
        self._inits.append(TensorProto(name=f"{name}_q", data_type=TensorProto.INT4, dims=shape, raw_data=packed))
        blocks = list(shape)
        blocks[axis] = -(-shape[axis] // W4_GROUP)
        inputs = [f"{name}_q", self.constant(f"{name}_s", np.full(blocks, 0.02, np.float32))]
        self._nodes.append(
            helper.make_node("DequantizeLinear", inputs, [name], f"{name}_dq", axis=axis, block_size=W4_GROUP)
        )
        return name

    def bias(self, name: str, width: int, form: str) -> str:
        """A bias; int32 with scale ``input scale * weight scale`` where the layer runs in int8."""
        if form != "int8":
            return self.constant(name, np.zeros(width, np.float32))
        scale = self.constant(f"{name}_s", np.full(width, SCALE * 0.002, np.float32))
        return self.node_named(name, "DequantizeLinear", [self.constant(f"{name}_q", np.zeros(width, np.int32)), scale])

    def node_named(self, output: str, op: str, inputs: list[str]) -> str:
        """One node on axis 0 whose output has a given name."""
        self._nodes.append(helper.make_node(op, inputs, [output], f"{output}_dq", axis=0))
        return output

    def output(self, name: str) -> None:
        """Make a tensor an output of the graph."""
        self._outputs.append(name)

    def build(self) -> bytes:
        """The serialized model (opset 21: blocked and 4-bit weights)."""
        outputs = [onnx.ValueInfoProto(name=name) for name in self._outputs]
        inputs = [helper.make_tensor_value_info(self.input, TensorProto.FLOAT, self.shape)]
        graph = helper.make_graph(self._nodes, "probe", inputs, outputs, self._inits)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
        return bytes(model.SerializeToString())

"""What a model's file says, beside what ONNX Runtime makes of it: which nodes were meant to be int8, and their weights."""

from __future__ import annotations

import re
from functools import cached_property

import onnx

from autocompress.hwprofiles.device import Node

COMPUTE = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_BYTES: dict[int, str] = {onnx.TensorProto.UINT8: "u8", onnx.TensorProto.INT8: "s8"}
_OPTIMIZER = re.compile(r"(_nchwc|_token_\d+|/duplicated|_MatMulNBits|/MatMulScaleFusion)+$")


class Written:
    """The nodes of a model's main graph by their names, and how formats run through them."""

    def __init__(self, model: bytes) -> None:
        graph = onnx.load_from_string(model).graph
        self.nodes = {node.name or node.output[0]: node for node in graph.node}
        self.producer = {name: node for node in graph.node for name in node.output}
        self.consumers: dict[str, list[onnx.NodeProto]] = {}
        for node in graph.node:
            for name in node.input:
                self.consumers.setdefault(name, []).append(node)
        self.initializers: dict[str, onnx.TensorProto] = {tensor.name: tensor for tensor in graph.initializer}
        self._order = list(graph.node)

    def source(self, node: Node) -> onnx.NodeProto | None:
        """The file's node behind one of the optimized graph; ``None`` for what ONNX Runtime put in."""
        name = _OPTIMIZER.sub("", node.name)
        return self.nodes.get(node.name) or self.nodes.get(name) or self.producer.get(name) or self._fused_into(name)

    def _fused_into(self, name: str) -> onnx.NodeProto | None:
        """A blocked convolution is named after the output of the activation that it took in."""
        return self.nodes.get(name.removesuffix("_y"))

    def compute(self, node: Node) -> onnx.NodeProto | None:
        """The convolution or product behind an optimized node, through an activation that it took in."""
        found = self.source(node)
        while found is not None and found.op_type not in COMPUTE:
            if not ("Conv" in node.op or "Gemm" in node.op or "MatMul" in node.op):
                return None
            found = self.producer.get(found.input[0]) if found.input else None
        return found

    def is_weight(self, name: str) -> bool:
        """Whether a tensor is stored in the file, quantized or not."""
        made = self.producer.get(name)
        return name in self.initializers or bool(
            made and made.op_type == "DequantizeLinear" and made.input[0] in self.initializers
        )

    def weight(self, node: onnx.NodeProto) -> onnx.TensorProto | None:
        """The stored weight of a convolution or product."""
        for name in node.input[:2][::-1]:
            made = self.producer.get(name)
            stored = made.input[0] if made and made.op_type == "DequantizeLinear" else name
            if stored in self.initializers:
                return self.initializers[stored]
        return None

    def widths(self, node: onnx.NodeProto) -> tuple[int, int, int] | None:
        """Channels in, channels out and groups of a convolution."""
        weight = self.weight(node)
        if node.op_type != "Conv" or weight is None:
            return None
        groups = next((a.i for a in node.attribute if a.name == "group"), 1)
        return weight.dims[1] * groups, weight.dims[0], groups

    def form(self, node: onnx.NodeProto) -> str:
        """``u8s8``, ``s8s8``, ``u8u8`` … where a node was meant to run in int8: types of activations and weights."""
        act = next((self.producer.get(name) for name in node.input[:2] if not self.is_weight(name)), None)
        weight = self.weight(node)
        if act is None or act.op_type != "DequantizeLinear" or weight is None or weight.data_type not in _BYTES:
            return ""
        zero = self.initializers.get(act.input[2]) if len(act.input) > 2 else None
        return _BYTES.get(zero.data_type if zero else onnx.TensorProto.UINT8, "") + _BYTES[weight.data_type]

    @cached_property
    def inner_edges(self) -> set[str]:
        """Names of the changes of format on activations that lie between int8 layers: none at the model's borders."""
        before = self._reached("DequantizeLinear", forwards=True)
        after = self._reached("QuantizeLinear", forwards=False)
        edges = [n for n in self._order if n.op_type in ("QuantizeLinear", "DequantizeLinear")]
        return {
            n.name or n.output[0]
            for n in edges
            if not self.is_weight(n.output[0])
            and ((n.input[0] in before) if n.op_type == "QuantizeLinear" else (n.output[0] in after))
        }

    def _reached(self, start: str, *, forwards: bool) -> set[str]:
        """Tensors that lie behind (or before) a change of format ``start`` on activations."""
        found: set[str] = set()
        for node in self._order if forwards else self._order[::-1]:
            near, far = (node.input, node.output) if forwards else (node.output, node.input)
            starts = node.op_type == start and not self.is_weight(node.output[0])
            if starts or any(name in found for name in near):
                found.update(far)
        return found

"""Quantization written into an ONNX graph: markers become QuantizeLinear / DequantizeLinear with integer initializers.

The exporters see every quantized weight and tensor as an opaque node of the domain :data:`DOMAIN`, so neither of them
can fold, merge or rename it. :func:`insert_quantization` then puts the integers of the search in its place:

* weight: ``DequantizeLinear(8-bit or int4 initializer)``, a scale a channel or a block of ``group`` inputs;
* activation: ``QuantizeLinear`` and ``DequantizeLinear`` with one scale a tensor;
* bias of an int8 layer: an int32 initializer with scale ``input scale * weight scale``, as ``QLinearConv`` defines it.

Knows nothing of exporters and files; a model without markers is left as it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from autocompress.errors import VerificationError
from autocompress.methods.quantization import ActivationQuant, PackedWeight
from autocompress.types import Int8Format

DOMAIN = "autocompress"
WEIGHT, ACTIVATION = "Weight", "Activation"
BLOCK_OPSET = 21
"""The first opset with int4 tensors and with blocked DequantizeLinear."""
FUSED_BLOCKS = (16, 32, 64, 128, 256)
"""Block sizes that ONNX Runtime's MatMulNBits takes."""

UNSIGNED_ZERO = 128
"""What stands for zero in an unsigned weight."""
FloatArray = npt.NDArray[np.float32]

INTEGER_KERNELS = ("QLinearConv", "QGemm", "QLinearMatMul", "MatMulIntegerToFloat", "MatMulInteger", "ConvInteger")
"""Operators of ONNX Runtime that multiply integers with integers."""
_LINEAR = ("Conv", "Gemm", "MatMul")
_KEEPS_GRID = ("Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Identity", "MaxPool", "Slice", "Dropout")
"""Operators whose output lies on the grid of their first input."""


@dataclass(frozen=True)
class Grids:
    """What the markers stand for, by module name."""

    weights: Mapping[str, PackedWeight]
    activations: Mapping[str, ActivationQuant]

    @property
    def opset(self) -> int:
        """The lowest opset that can say it: int4 and blocks need 21, all else is in 18."""
        blocked = any(stored_bits(p) == 4 or p.group for p in self.weights.values())
        return BLOCK_OPSET if blocked else 18


def initializer_name(layer: str, packed: PackedWeight) -> str:
    """Name of a layer's integers in the file; it survives ONNX Runtime's optimizations."""
    return f"{layer}.weight_int{stored_bits(packed)}"


def stored_bits(packed: PackedWeight) -> int:
    """What a file takes for each integer: ONNX has no 3 bits, and 2 bits only in versions that runtimes here do not know."""
    return 8 if packed.bits == 8 else 4


def family(packed: PackedWeight) -> str:
    """``int8`` (weights and activations), or weights only: ``w8``, ``w4``, ``w3``, ``w2``."""
    return "int8" if packed.activations else f"w{packed.bits}"


def insert_quantization(model: ModelProto, grids: Grids, int8_format: Int8Format = "u8u8") -> None:
    """Replace every marker of ``model`` in place and drop the float weights they stood on.

    Raises :class:`VerificationError` naming the layers whose marker the exporter lost.
    """
    surgeon = _Surgeon(model.graph, grids, int8_format)
    surgeon.operate()
    lost = sorted((set(grids.weights) - surgeon.seen_weights) | (set(grids.activations) - surgeon.seen_activations))
    if lost:
        raise VerificationError(f"The exporter lost the quantization of {', '.join(lost)}; nothing was written.")
    for opset in [o for o in model.opset_import if o.domain == DOMAIN]:
        model.opset_import.remove(opset)


@dataclass
class _Surgeon:
    """One pass over a graph's nodes, in order; new nodes and initializers are collected and written back at the end."""

    graph: GraphProto
    grids: Grids
    int8_format: Int8Format
    nodes: list[NodeProto] = field(default_factory=list)
    made: dict[str, TensorProto] = field(default_factory=dict)
    weight_outputs: dict[str, str] = field(default_factory=dict)
    alias: dict[str, str] = field(default_factory=dict)
    seen_weights: set[str] = field(default_factory=set)
    seen_activations: set[str] = field(default_factory=set)

    def operate(self) -> None:
        self.floats = {t.name: t for t in self.graph.initializer}
        self.producer = {o: n for n in self.graph.node for o in n.output}
        self.transposed = self._transposed_weights()
        for node in self.graph.node:
            if node.domain == DOMAIN:
                (self._weight if node.op_type == WEIGHT else self._activation)(node)
            elif node.op_type == "Transpose" and node.input[0] in self.transposed:
                continue  # the integers are stored transposed, see _weight
            else:
                if node.op_type in _LINEAR:
                    self._linear(node)
                for i, name in enumerate(node.input):
                    node.input[i] = self.alias.get(name, name)
                self.nodes.append(node)
        self._split_gemms()
        self._shield_products()
        self._shield_floats()
        _replace(self.graph.node, self.nodes)
        used = {i for n in self.nodes for i in n.input} | {o.name for o in self.graph.output}
        kept = [t for t in self.graph.initializer if t.name in used and t.name not in self.made]
        _replace(self.graph.initializer, [*kept, *self.made.values()])
        # Shapes of tensors that are gone, and the stack traces of whoever exported: inference writes the shapes anew.
        del self.graph.value_info[:]
        for node in self.graph.node:
            del node.metadata_props[:]
            node.doc_string = ""

    def _transposed_weights(self) -> dict[str, str]:
        """Marker output -> output of the only ``Transpose`` that reads it (a linear layer exported as MatMul)."""
        readers: dict[str, list[NodeProto]] = {}
        for node in self.graph.node:
            for name in node.input:
                readers.setdefault(name, []).append(node)
        found = {}
        for node in self.graph.node:
            if node.domain == DOMAIN and node.op_type == WEIGHT:
                users = readers.get(node.output[0], [])
                if len(users) == 1 and users[0].op_type == "Transpose" and len(_packed(self, node).integers.shape) == 2:
                    found[node.output[0]] = users[0].output[0]
        return found

    def _constant(self, name: str, array: npt.NDArray[np.generic]) -> str:
        if name not in self.made:
            self.made[name] = numpy_helper.from_array(array, name)
        return name

    def _weight(self, marker: NodeProto) -> None:
        layer, packed = _name(marker), _packed(self, marker)
        self.seen_weights.add(layer)
        integers, scale = packed.integers.numpy(), packed.scale.numpy().astype(np.float32)
        output, axis = marker.output[0], 1 if packed.group else 0
        if output in self.transposed:
            output, axis = self.transposed[output], 1 - axis
            integers, scale = integers.T, scale.T if packed.group else scale
        if layer in self.weight_outputs:  # called a second time: both calls read one tensor
            self.alias[output] = self.weight_outputs[layer]
            return
        self.weight_outputs[layer] = output
        attributes: dict[str, Any] = {"axis": axis} | ({"block_size": packed.group} if packed.group else {})
        stored = initializer_name(layer, packed)
        unsigned = packed.bits == 8 and self.int8_format == "u8u8"
        self.made[stored] = integer_tensor(stored, integers, stored_bits(packed), unsigned)
        inputs = [stored, self._constant(f"{layer}.weight_scale", scale)]
        if packed.activations or unsigned:
            # Zero is the default, but ONNX Runtime 1.32 fuses a Gemm only where it is written out.
            zero = np.full(scale.shape, UNSIGNED_ZERO, np.uint8) if unsigned else np.zeros(scale.shape, np.int8)
            inputs.append(self._constant(f"{layer}.weight_zero_point", zero))
        self.nodes.append(
            helper.make_node("DequantizeLinear", inputs, [output], f"{layer}.weight_dequantize", **attributes)
        )

    def _activation(self, marker: NodeProto) -> None:
        name = _name(marker)
        grid = self.grids.activations[name]
        self.seen_activations.add(name)
        scale = self._constant(f"{name}.scale", np.asarray(grid.scale, np.float32))
        zero = np.int8(grid.zero_point - 128) if self.int8_format == "s8s8" else np.uint8(grid.zero_point)
        zero_point = self._constant(f"{name}.zero_point", np.asarray(zero))
        source, output = marker.input[0], marker.output[0]
        quantized = f"{output}_quantized"
        self.nodes.append(
            helper.make_node("QuantizeLinear", [source, scale, zero_point], [quantized], f"{output}_quantize")
        )
        self.nodes.append(
            helper.make_node("DequantizeLinear", [quantized, scale, zero_point], [output], f"{output}_dequantize")
        )

    def _linear(self, node: NodeProto) -> None:
        """Name a quantized layer's node after it, and put an int8 layer's bias on its integer grid."""
        marker = self._marker_of(node)
        if marker is None:
            return
        layer, packed = _name(marker), _packed(self, marker)
        node.name = layer if all(n.name != layer for n in self.nodes) else f"{layer}.{node.output[0]}"
        grid = self._grid_of(node.input[0])
        bias = self.floats.get(node.input[2]) if len(node.input) > 2 else None
        if not packed.activations or grid is None or bias is None:
            return
        scale = np.float32(grid.scale) * packed.scale.numpy().astype(np.float32)  # (out,)
        steps = np.rint(numpy_helper.to_array(bias).astype(np.float64) / scale.astype(np.float64))
        if np.abs(steps).max(initial=0) > np.iinfo(np.int32).max:
            return  # too fine a grid for 32 bits: the bias stays float, and coverage tells if that costs the fusion
        # A layer that is called twice may see two input scales, and then has two integer biases.
        stem = layer if f"{layer}.bias_int32" not in self.made else f"{layer}.{node.output[0]}"
        inputs = [
            self._constant(f"{stem}.bias_int32", steps.astype(np.int32)),
            self._constant(f"{stem}.bias_scale", scale),
        ]
        node.input[2] = f"{stem}.bias_dequantized"
        self.nodes.append(
            helper.make_node("DequantizeLinear", inputs, [node.input[2]], f"{stem}.bias_dequantize", axis=0)
        )

    def _split_gemms(self) -> None:
        """A ``Gemm`` on stored weights and float inputs becomes ``MatMul`` and ``Add``: only those run on the integers
        (MatMulNBits), with the same grid whether its scales are an output channel's or a block's.
        """
        turned = self._turnable()
        for source in turned.values():
            self._transpose(source)
        done = list[NodeProto]()
        for node in self.nodes:
            if node.op_type != "Gemm" or node.input[1] not in turned:
                done.append(node)
                continue
            product = f"{node.output[0]}_product" if len(node.input) > 2 else node.output[0]
            done.append(helper.make_node("MatMul", node.input[:2], [product], node.name))
            if len(node.input) > 2:
                done.append(helper.make_node("Add", [product, node.input[2]], node.output, f"{node.name}.bias_add"))
        self.nodes = done

    def _turnable(self) -> dict[str, NodeProto]:
        """Output -> DequantizeLinear of a weight that one plain Gemm on float inputs reads (of two the runtime fuses neither)."""
        readers: dict[str, list[NodeProto]] = {}
        for node in self.nodes:
            for name in node.input:
                readers.setdefault(name, []).append(node)
        found = {}
        for node in self.nodes:
            packed = self.grids.weights.get(node.name.removesuffix(".weight_dequantize"))
            if node.op_type != "DequantizeLinear" or packed is None or packed.activations:
                continue
            fits = packed.group == 0 or packed.group in FUSED_BLOCKS
            reading = readers.get(node.output[0], [])
            if fits and len(reading) == 1 and self._is_plain_gemm(reading[0]):
                found[node.output[0]] = node
        return found

    def _is_plain_gemm(self, node: NodeProto) -> bool:
        """``x W^T + b`` of an input that is no grid's: between grids a Gemm runs on integers altogether."""
        settings = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        plain = settings.get("alpha", 1.0) == settings.get("beta", 1.0) == 1.0 and not settings.get("transA", 0)
        return node.op_type == "Gemm" and plain and settings.get("transB", 0) == 1 and not self._grid_of(node.input[0])

    def _transpose(self, source: NodeProto) -> None:
        """Store the matrix of one DequantizeLinear the other way round, with its scales and its axis."""
        packed = self.grids.weights[source.name.removesuffix(".weight_dequantize")]
        unsigned = packed.bits == 8 and self.int8_format == "u8u8"
        self.made[source.input[0]] = integer_tensor(
            source.input[0], packed.integers.numpy().T, stored_bits(packed), unsigned
        )
        for name in source.input[1:]:  # scales, zero points
            array = np.ascontiguousarray(numpy_helper.to_array(self.made[name]).T)
            self.made[name] = numpy_helper.from_array(array, name)
        for attribute in source.attribute:
            if attribute.name == "axis":
                attribute.i = 1 - attribute.i

    def _shield_products(self) -> None:
        """Keep ReLUs off products with stored weights: ONNX Runtime (seen in 1.32) fuses such a ReLU with a float product, and
        then dequantizes the weight in every run. The identity is the one of :meth:`_shield_floats`.
        """
        weights = {f"{name}.weight_dequantize" for name, packed in self.grids.weights.items() if not packed.activations}
        stored = {n.output[0] for n in self.nodes if n.name in weights}
        products = {n.output[0] for n in self.nodes if n.op_type == "MatMul" and n.input[1] in stored}
        products |= {n.output[0] for n in self.nodes if n.op_type == "Add" and products & set(n.input)}
        done: list[NodeProto] = []
        for node in self.nodes:
            if node.op_type == "Relu" and node.input[0] in products:
                source, shielded = node.input[0], f"{node.output[0]}_shielded"
                done.append(helper.make_node("LeakyRelu", [source], [shielded], f"{shielded}_product", alpha=1.0))
                node.input[0] = shielded
            done.append(node)
        self.nodes = done

    def _shield_floats(self) -> None:
        """Keep ONNX Runtime from quantizing float layers that stand between quantized tensors.

        Its WeightBiasQuantization (seen in 1.32) turns such a Conv or Gemm into an int8 one with one scale for the
        whole weight, which nobody searched. ``LeakyRelu(alpha=1)`` is the identity, is fused into the float kernel, and
        the optimizer does not look behind it. Inputs are not looked at: grids travel through pooling and reshaping.
        """
        readers: dict[str, list[NodeProto]] = {}
        for node in self.nodes:
            for name in node.input:
                readers.setdefault(name, []).append(node)
        done: list[NodeProto] = []
        for node in self.nodes:
            done.append(node)
            if node.op_type not in ("Conv", "Gemm") or node.input[1] not in self.floats:
                continue
            after = readers.get(node.output[0], [])
            while len(after) == 1 and after[0].op_type in ("Relu", "Clip"):
                after = readers.get(after[0].output[0], [])
            if len(after) == 1 and after[0].op_type == "QuantizeLinear":
                output = node.output[0]
                node.output[0] = f"{output}_float"
                done.append(
                    helper.make_node("LeakyRelu", [node.output[0]], [output], f"{output}_stays_float", alpha=1.0)
                )
        self.nodes = done

    def _marker_of(self, node: NodeProto) -> NodeProto | None:
        """The weight marker a linear node reads, through the transposition of a MatMul."""
        source = self.producer.get(node.input[1])
        if source is not None and source.op_type == "Transpose":
            source = self.producer.get(source.input[0])
        return source if source is not None and (source.domain, source.op_type) == (DOMAIN, WEIGHT) else None

    def _grid_of(self, tensor: str) -> ActivationQuant | None:
        """The grid a tensor lies on, if it is quantized."""
        source = self.producer.get(tensor)
        while source is not None and source.domain != DOMAIN and source.op_type in _KEEPS_GRID:
            source = self.producer.get(source.input[0])
        if source is None or (source.domain, source.op_type) != (DOMAIN, ACTIVATION):
            return None
        return self.grids.activations[_name(source)]


def integer_tensor(name: str, integers: npt.NDArray[np.int8], bits: int, unsigned: bool = False) -> TensorProto:
    """An 8-bit initializer, or an int4 one with two values a byte, the first in the low half (ONNX IR, 4-bit types).

    ``unsigned`` 8-bit values are stored with :data:`UNSIGNED_ZERO` added.
    """
    if bits == 8:
        if unsigned:
            integers = (integers.astype(np.int16) + UNSIGNED_ZERO).astype(np.uint8)
        return numpy_helper.from_array(np.ascontiguousarray(integers), name)
    flat = np.ascontiguousarray(integers).reshape(-1).view(np.uint8) & 0xF
    flat = np.append(flat, np.uint8(0)) if flat.size % 2 else flat
    data = (flat[0::2] | flat[1::2] << 4).astype(np.uint8).tobytes()
    return TensorProto(name=name, data_type=TensorProto.INT4, dims=integers.shape, raw_data=data)


def stored_as_integers(model: ModelProto, grids: Grids) -> dict[str, list[str]]:
    """Family -> layers whose weight is in the file as integers of the right type and shape, and in no other form."""
    types = {8: (TensorProto.INT8, TensorProto.UINT8), 4: (TensorProto.INT4,)}
    tensors = {t.name: t for t in model.graph.initializer}
    found: dict[str, list[str]] = {}
    for layer, packed in grids.weights.items():
        tensor = tensors.get(initializer_name(layer, packed))
        whole = tensor is not None and int(np.prod(tensor.dims)) == packed.integers.numel()
        if (
            whole
            and tensor is not None
            and tensor.data_type in types[stored_bits(packed)]
            and f"{layer}.weight" not in tensors
        ):
            found.setdefault(family(packed), []).append(layer)
    return found


def dequantized_in_every_run(optimized: ModelProto, grids: Grids) -> list[str]:
    """Linear layers with stored weights that a graph optimized by ONNX Runtime turns into floats again."""
    left = {n.input[0] for n in optimized.graph.node if n.op_type == "DequantizeLinear"}
    linear = {name: p for name, p in grids.weights.items() if p.integers.ndim == 2 and not p.activations}
    return [name for name, packed in linear.items() if initializer_name(name, packed) in left]


def run_as_integers(optimized: ModelProto, grids: Grids) -> list[str]:
    """int8 layers that a graph optimized by ONNX Runtime computes on integers."""
    read = {name for n in optimized.graph.node if n.op_type in INTEGER_KERNELS for name in n.input}
    int8 = {name: p for name, p in grids.weights.items() if p.activations}
    return [name for name, packed in int8.items() if initializer_name(name, packed) in read]


def quantized_by_runtime(optimized: ModelProto, grids: Grids) -> list[str]:
    """Nodes that ONNX Runtime computes on integers although the model has their weight as floats."""
    ours = {initializer_name(name, packed) for name, packed in grids.weights.items()}
    integer = [n for n in optimized.graph.node if n.op_type in INTEGER_KERNELS]
    return [n.name for n in integer if not ours & set(n.input)]


def why_float(model: ModelProto, layer: str) -> str:
    """The known reason why ONNX Runtime keeps an int8 layer of ``model`` in float."""
    nodes = {n.name: n for n in model.graph.node}
    producer = {o: n for n in model.graph.node for o in n.output}
    node = nodes.get(layer)
    if node is None:
        return "its node was merged into another one"
    source = producer.get(node.input[0])
    while source is not None and source.op_type in _KEEPS_GRID:
        source = producer.get(source.input[0])
    if source is None or source.op_type != "DequantizeLinear":
        return "its input is not quantized"
    zero = next((t for t in model.graph.initializer if t.name == source.input[2]), None)
    signed = zero is not None and zero.data_type == TensorProto.INT8
    readers = [n for n in model.graph.node if node.output[0] in n.input]
    if len(readers) == 1 and readers[0].op_type in ("Relu", "Clip"):
        readers = [n for n in model.graph.node if readers[0].output[0] in n.input]
    if node.op_type == "Conv" and any(n.op_type != "QuantizeLinear" for n in readers):
        return f"its output is not quantized before {readers[0].op_type}"
    return "ONNX Runtime does not fuse it on this CPU" + (
        "; int8 activations with several readers stay float where only uint8 is native, export as u8u8"
        if signed
        else ""
    )


def _replace(target: object, items: Iterable[object]) -> None:
    """Assign a repeated field of a protobuf message."""
    kept = list(items)
    del target[:]  # type: ignore[attr-defined]
    target.extend(kept)  # type: ignore[attr-defined]


def _name(marker: NodeProto) -> str:
    return str(next(a.s for a in marker.attribute if a.name == "name").decode())


def _packed(surgeon: _Surgeon, marker: NodeProto) -> PackedWeight:
    return surgeon.grids.weights[_name(marker)]

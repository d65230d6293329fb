"""Where the tensors of a model file lie in its bytes: what is between them is kept as it is, so any file comes back whole.

ONNX: initializers and constants with raw data inside the file. safetensors: all tensors.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import onnx
from onnx import TensorProto

from autocompress.errors import UsageError
from autocompress.methods.coding.planes import Form

SMALLEST = 64
"""Bytes of tensors that are worth an entry of their own in the index of an ONNX file; safetensors lists all of its own."""


@dataclass(frozen=True)
class Span:
    """One tensor: its name, what its bytes are, and which of the file's bytes. ``dtype``: as the file's format calls it."""

    name: str
    dtype: str
    form: Form
    start: int
    stop: int


def spans_of(data: bytes, suffix: str) -> list[Span]:
    """Tensors of a file in order, none over another; raises :class:`UsageError` for other kinds of files."""
    if suffix not in _READERS:
        raise UsageError(
            f"Only {' and '.join(_READERS)} files can be packed, got one that ends in {suffix or 'nothing'!r}."
        )
    return list(_READERS[suffix](data))


_ONNX_FORMS: dict[int, tuple[str, int]] = {
    TensorProto.FLOAT: ("float", 4), TensorProto.DOUBLE: ("float", 8), TensorProto.FLOAT16: ("float", 2),
    TensorProto.BFLOAT16: ("float", 2), TensorProto.INT8: ("integer", 1), TensorProto.UINT8: ("integer", 1),
    TensorProto.INT16: ("integer", 2), TensorProto.UINT16: ("integer", 2), TensorProto.INT32: ("integer", 4),
    TensorProto.UINT32: ("integer", 4), TensorProto.INT64: ("integer", 8), TensorProto.UINT64: ("integer", 8),
    TensorProto.INT4: ("nibbles", 1), TensorProto.UINT4: ("nibbles", 1), TensorProto.BOOL: ("integer", 1),
}  # fmt: skip


def _onnx(data: bytes) -> Iterator[Span]:
    """Tensors are found by their bytes, from where the one before ended: a parser does not tell where it read them."""
    try:
        model = onnx.load_model_from_string(data)
    except Exception as error:
        raise UsageError("The file is not a valid ONNX file, so it cannot be packed.") from error
    if not model.graph.node:
        raise UsageError("The file is not a valid ONNX model, its graph has no nodes; so it cannot be packed.")
    constants = [(node.output[0], a.t) for node in model.graph.node for a in node.attribute if a.HasField("t")]
    at = 0
    for name, tensor in [*constants, *((t.name, t) for t in model.graph.initializer)]:
        if tensor.data_location == TensorProto.EXTERNAL:
            raise UsageError(
                f"The weights of an ONNX file must lie inside it, those of {name!r} lie in another; "
                "save it as one file."
            )
        raw = tensor.raw_data
        start = data.find(raw, at) if len(raw) >= SMALLEST else -1
        if start < 0:
            continue
        at = start + len(raw)
        number, size = _ONNX_FORMS.get(tensor.data_type, ("bytes", 1))
        dtype = TensorProto.DataType.Name(tensor.data_type).lower()
        yield Span(name, dtype, Form(number, size, tuple(tensor.dims)), start, at)  # type: ignore[arg-type]


_SAFETENSORS_FORMS = {
    "F64": ("float", 8), "F32": ("float", 4), "F16": ("float", 2), "BF16": ("float", 2),
    "I64": ("integer", 8), "I32": ("integer", 4), "I16": ("integer", 2), "I8": ("integer", 1),
    "U64": ("integer", 8), "U32": ("integer", 4), "U16": ("integer", 2), "U8": ("integer", 1), "BOOL": ("integer", 1),
}  # fmt: skip


def _safetensors(data: bytes) -> Iterator[Span]:
    try:
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        listed = sorted(
            (tuple(entry["data_offsets"]), name, entry["dtype"], tuple(entry["shape"]))
            for name, entry in header.items()
            if name != "__metadata__"
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError("The file is not a valid safetensors file, so it cannot be packed.") from error
    at, base = 0, 8 + length
    for (start, stop), name, dtype, shape in listed:
        number, size = _SAFETENSORS_FORMS.get(dtype, ("bytes", 1))
        if start < at or stop > len(data) - base or (number != "bytes" and math.prod(shape) * size != stop - start):
            raise UsageError(f"The safetensors file is damaged at {name!r}, so it cannot be packed.")
        at = stop
        yield Span(name, dtype, Form(number, size, shape), base + start, base + stop)  # type: ignore[arg-type]


_READERS: dict[str, Callable[[bytes], Iterator[Span]]] = {".onnx": _onnx, ".safetensors": _safetensors}

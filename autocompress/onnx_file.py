"""An ONNX file: what it is, how it is loaded and run in ONNX Runtime, and whether it computes what torch computes.

Everything here works on the file alone (and on a torch model to compare with): it knows nothing of plans and tasks.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from autocompress.errors import UnsupportedModel, UsageError, VerificationError
from autocompress.methods.quantization import ActivationQuant, PackedWeight
from autocompress.onnx_quant import UNSIGNED_ZERO

FloatArray = npt.NDArray[np.float32]
Arrays = tuple[FloatArray, ...]
"""The inputs of one run, one array an input of the model; the first axis is the batch."""

OPTIMIZATION = {
    "off": onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "fused": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "all": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL,
}
Optimization = Literal["off", "fused", "all"]

FLOAT_TOLERANCE = 1e-4
"""Largest difference of a float model over the range of its outputs: 100 times what fp32 rounding was seen to do."""
INT8_TOLERANCE, INT8_MEAN_TOLERANCE = 3e-2, 5e-3
"""Largest and mean difference that a few flipped roundings may make, see :func:`parity`."""
LOOSEST = 0.5
"""However noisy a model is, beyond this (a tenth of it on average) its file is not believed."""
MATMUL_TOLERANCE, MATMUL_MEAN_TOLERANCE = 2e-2, 4e-3
"""The same where a MatMul has an integer weight: ONNX Runtime's MatMulNBits rounds the other factor to 8 bits in blocks
(``session.qdq_matmulnbits_accuracy_level`` is 4 where nobody sets it)."""
MATMUL_BLOCK = 32


@dataclass(frozen=True)
class Artifact:
    """An exported ONNX file. ``coverage`` maps a method to how many layers should carry it and how many do.

    ``missing`` names the layers that make the difference, with the reason where it is known.
    """

    path: str
    sha256: str
    bytes: int
    opset: int
    exporter: Literal["dynamo", "legacy"]
    fallback_reason: str | None = None
    int8_format: str = "u8u8"
    coverage: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    missing: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def sha256_of(path: Path | str) -> str:
    """Hex SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_model(path: Path | str) -> onnx.ModelProto:
    """Read and check an ONNX file; a missing, corrupt or foreign one is a :class:`UsageError` of one sentence."""
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"There is no ONNX file at {str(path)!r}.")
    try:
        model = onnx.load(str(path))
        onnx.checker.check_model(model)
    # protobuf, checker and external-data loader each raise their own kind
    except Exception as error:
        raise UsageError(f"{str(path)!r} is not a valid ONNX file: {first_line(error)}") from error
    if not model.graph.node or not model.graph.input:
        raise UsageError(f"{str(path)!r} is not a valid ONNX model: its graph has no nodes or no inputs.")
    return model


def first_line(error: BaseException, length: int = 300) -> str:
    """The first line of a library's message, for a sentence of ours."""
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:length]


def open_session(
    model: Path | str | bytes, *, optimization: Optimization = "all", threads: int = 1, save: Path | None = None
) -> onnxruntime.InferenceSession:
    """A CPU session of ONNX Runtime; ``save`` also writes the optimized graph.

    Raises :class:`UsageError` in one sentence when ONNX Runtime refuses the model.
    """
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = OPTIMIZATION[optimization]
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # its errors come back as exceptions
    if save is not None:
        options.optimized_model_filepath = str(save)
    name = "the exported model" if isinstance(model, bytes) else repr(str(model))
    if not isinstance(model, bytes) and not Path(model).is_file():
        raise UsageError(f"There is no ONNX file at {name}.")
    source = model if isinstance(model, bytes) else str(model)
    try:
        return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    # ONNX Runtime's exceptions share no base but Exception
    except Exception as error:
        raise UsageError(f"ONNX Runtime cannot load {name}: {first_line(error)}") from error


def run_session(session: onnxruntime.InferenceSession, arrays: Sequence[npt.NDArray[Any]]) -> FloatArray:
    """The model's first output for one batch.  # (N, ...)"""
    names = [i.name for i in session.get_inputs()]
    if len(names) != len(arrays):
        raise UsageError(f"The ONNX model takes {len(names)} inputs ({', '.join(names)}), got {len(arrays)}.")
    try:
        return np.asarray(session.run(None, dict(zip(names, arrays, strict=True)))[0])
    except Exception as error:
        shapes = ", ".join(str(a.shape) for a in arrays)
        raise UsageError(f"ONNX Runtime cannot run the model on inputs {shapes}: {first_line(error)}") from error


def ort_outputs(
    path: Path | str | bytes, batches: Iterable[Sequence[npt.NDArray[Any]]], threads: int = 1
) -> FloatArray:
    """Outputs of all batches, one below the other, as the optimized model computes them.  # (N, ...)"""
    session = open_session(path, threads=threads)
    outputs = [run_session(session, batch) for batch in batches]
    if not outputs:
        raise UsageError("There is nothing to run: no batches were given.")
    return np.concatenate(outputs)


# ---------------------------------------------------------------- parity


@dataclass(frozen=True)
class Difference:
    """Outputs of ONNX Runtime against torch's.

    ``relative`` and ``mean_relative`` are over the range of torch's outputs, less each output's mean over the examples.
    ``agreement``: fraction of rows with the same largest entry along the last axis.
    """

    max_abs: float
    relative: float
    mean_relative: float
    agreement: float


@dataclass(frozen=True)
class Parity:
    """The exported file against the torch model, with ONNX Runtime's graph optimizations off and all of them on."""

    off: Difference
    on: Difference
    examples: int
    tolerance: float
    mean_tolerance: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def difference(expected: FloatArray, found: FloatArray) -> Difference:
    """Compare outputs of one shape ``(N, ...)``; a NaN on either side is an infinite difference."""
    gap = np.abs(found.astype(np.float64) - expected.astype(np.float64))
    gap = np.where(np.isnan(gap), np.inf, gap)
    span = 1e-12
    if np.isfinite(expected).all():
        # What is the same for all examples (a head's bias) says nothing of the layers before it.
        whole, moving = float(np.ptp(expected)), float(np.ptp(expected - expected.mean(0, keepdims=True)))
        span = max(moving if moving > 1e-3 * whole else whole, span)  # examples may be all alike
    agree = np.mean(expected.argmax(-1) == found.argmax(-1)) if expected.ndim > 1 else 1.0
    largest = float(gap.max(initial=0.0))
    return Difference(largest, largest / span, float(gap.mean()) / span, float(agree))


def as_arrays(inputs: Tensor | Sequence[Tensor]) -> Arrays:
    """Torch inputs as the arrays that ONNX Runtime takes."""
    tensors = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
    return tuple(t.detach().cpu().contiguous().numpy() for t in tensors)


def parity(model: nn.Module, path: Path | str | bytes, inputs: Tensor | Sequence[Tensor]) -> Parity:
    """Compare an exported file with the model it came from, on real inputs ``(N, ...)``.

    A float model must agree to :data:`FLOAT_TOLERANCE`. With int8 tensors two correct programs differ by more: sums
    that differ by 1e-7 now and then fall on two sides of a rounding threshold, and each such flip causes more
    downstream (ResNet-56: 1 % of the range at most, 0.1 % on average). How much is a property of the model, so it is
    measured: torch runs once more with every tensor scaled by 1 + 1e-6 before it is rounded, and the file may differ 4
    times as much as that, or by :data:`INT8_TOLERANCE` where that is more, never by :data:`LOOSEST`. Where ONNX Runtime
    rounds what integer weights are multiplied with, torch runs with such rounding, and the file may differ twice as
    much: through the layers of a decoder such errors add up. Integers and
    scales must be the model's to the bit, integer biases to half a step; the outputs are then compared on the file's
    biases.

    Raises :class:`VerificationError` with the numbers, :class:`UsageError` when ONNX Runtime refuses the file.
    """
    proto = onnx.load_from_string(path) if isinstance(path, bytes) else load_model(path)
    arrays = as_arrays(inputs)
    _check_grids(model, proto)
    reference = _with_biases_of(model, proto)
    expected = _torch_outputs(reference, arrays)
    tensors = [m for m in reference.modules() if isinstance(m, ActivationQuant)]
    limit, mean_limit = FLOAT_TOLERANCE, FLOAT_TOLERANCE
    if tensors:
        for module in tensors:
            module.register_forward_pre_hook(lambda _, args: (args[0] * (1 + 1e-6),))
        noise = difference(expected, _torch_outputs(reference, arrays))
        limit = min(max(INT8_TOLERANCE, 4 * noise.relative), LOOSEST)
        mean_limit = min(max(INT8_MEAN_TOLERANCE, 4 * noise.mean_relative), LOOSEST / 10)
    if rounding := [m for name, m in reference.named_modules() if name in _multiplied_by_integers(proto)]:
        for module in rounding:
            module.register_forward_pre_hook(lambda _, args: (_to_8_bits(args[0]),))
        noise = difference(expected, _torch_outputs(reference, arrays))
        limit = min(max(MATMUL_TOLERANCE, 2 * noise.relative, limit), LOOSEST)
        mean_limit = min(max(MATMUL_MEAN_TOLERANCE, 2 * noise.mean_relative, mean_limit), LOOSEST / 10)
    found = {level: run_session(open_session(path, optimization=level), arrays) for level in ("off", "all")}
    for level, outputs in found.items():
        if outputs.shape != expected.shape:
            raise VerificationError(
                f"The exported model gives outputs {outputs.shape} where torch gives {expected.shape}; "
                "if the first numbers differ, the model has its batch size written into it."
            )
        gap = difference(expected, outputs)
        if not (gap.relative <= limit and gap.mean_relative <= mean_limit):
            raise VerificationError(
                f"The exported model differs from torch by {gap.relative:.2g} of the range of its outputs "
                f"(mean {gap.mean_relative:.2g}), allowed are {limit:.2g} (mean {mean_limit:.2g}); "
                f"ONNX Runtime's optimizations are {'off' if level == 'off' else 'on'}."
            )
    off, on = (difference(expected, found[level]) for level in ("off", "all"))
    return Parity(off, on, len(expected), limit, mean_limit)


def _multiplied_by_integers(proto: onnx.ModelProto) -> set[str]:
    """Layers whose weight is stored in integers and read by a MatMul."""
    stored = {n.output[0]: n.input[0].rpartition(".weight_int") for n in proto.graph.node if n.input}
    read = [n.input[1] for n in proto.graph.node if n.op_type == "MatMul"]
    return {stored[name][0] for name in read if name in stored and stored[name][2] in ("4", "8")}


def _to_8_bits(x: Tensor) -> Tensor:
    """Each block of a row rounded to a symmetric grid of its own.  # (..., d)"""
    blocks = torch.nn.functional.pad(x, (0, -x.shape[-1] % MATMUL_BLOCK)).reshape(*x.shape[:-1], -1, MATMUL_BLOCK)
    scale = blocks.abs().amax(-1, keepdim=True).clamp_min(1e-12) / 127
    return ((blocks / scale).round() * scale).flatten(-2)[..., : x.shape[-1]]


def _torch_outputs(model: nn.Module, arrays: Arrays) -> FloatArray:
    with torch.no_grad():
        outputs = model(*(torch.from_numpy(a) for a in arrays))
    if not isinstance(outputs, Tensor):
        raise UnsupportedModel(
            f"Export takes models with one output tensor, this one gives a {type(outputs).__name__}."
        )
    return np.asarray(outputs.cpu().numpy())


def _check_grids(model: nn.Module, proto: onnx.ModelProto) -> None:
    """Every scale and integer of the model that the file has must be the same there, perhaps transposed."""
    tensors = {t.name: t for t in proto.graph.initializer}
    for name, module in model.named_modules():
        own: dict[str, npt.NDArray[Any]] = {}
        packed = getattr(module, "packed", None)
        if isinstance(module, ActivationQuant):
            own[f"{name}.scale"] = np.asarray(module.scale, np.float32)
        elif isinstance(packed, PackedWeight):
            own[f"{name}.weight_scale"] = packed.scale.numpy()
            own[f"{name}.weight_int{packed.bits}"] = packed.integers.numpy()
        for key in [k for k in own if k in tensors]:
            found = numpy_helper.to_array(tensors[key])
            if found.dtype == np.uint8:
                found = found.astype(np.int16) - UNSIGNED_ZERO
            found = found.astype(own[key].dtype)
            if not (np.array_equal(found, own[key]) or np.array_equal(found.T, own[key])):
                raise VerificationError(f"{key} in the exported model is not the one that was searched.")


def _with_biases_of(model: nn.Module, proto: onnx.ModelProto) -> nn.Module:
    """A copy of ``model`` with the file's integer biases, which must be its own to half a step."""
    copied = copy.deepcopy(model).eval()
    tensors = {t.name: t for t in proto.graph.initializer}
    for name, tensor in tensors.items():
        layer, _, kind = name.rpartition(".")
        if kind != "bias_int32" or f"{layer}.bias_scale" not in tensors:
            continue
        scale = numpy_helper.to_array(tensors[f"{layer}.bias_scale"]).copy()
        bias = torch.from_numpy(numpy_helper.to_array(tensor).astype(np.float32) * scale)
        try:
            module = copied.get_submodule(layer)
        except AttributeError:
            continue  # the second integer bias of a layer that is called twice
        if not isinstance(own := getattr(module, "bias", None), Tensor):
            raise VerificationError(f"The exported model has a bias at {layer!r} where torch has none.")
        # float32 integers beyond 2^24 are rounded, hence the relative part
        if ((bias - own.detach()).abs() > torch.from_numpy(scale) * 0.51 + own.detach().abs() * 1e-6).any():
            raise VerificationError(f"The exported bias of {layer!r} is more than half a step from torch's.")
        module.bias = nn.Parameter(bias, requires_grad=False)
    return copied

"""From a deployed torch model to an ONNX file that stores and runs what was searched.

A deployed model has batch norm folded; quantized layers carry ``packed`` and :class:`ActivationQuant` modules stand on
quantized tensors. The dynamo exporter is tried first, the legacy one is the recorded fall-back. Neither is believed:
the file must compute what torch computes, and must store every quantized weight as integers.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import logging
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt
import onnx
import torch
from torch import Tensor, nn

from autocompress.errors import AutoCompressError, UnknownName, UnsupportedModel, UsageError, VerificationError
from autocompress.files import write_bytes
from autocompress.methods.quantization import ActivationQuant, PackedWeight
from autocompress.onnx_file import Artifact, first_line, open_session, parity, sha256_of
from autocompress.onnx_quant import (
    ACTIVATION,
    DOMAIN,
    FUSED_BLOCKS,
    WEIGHT,
    Grids,
    dequantized_in_every_run,
    family,
    insert_quantization,
    quantized_by_runtime,
    run_as_integers,
    stored_as_integers,
    why_float,
)
from autocompress.types import Int8Format

Exporter = Literal["dynamo", "legacy"]
EXPORTERS: tuple[Exporter, ...] = ("dynamo", "legacy")
COUNTED = ("int8", "w8", "w4", "w3", "w2", "lowrank", "sparse", "lookup", "spqr", "billm")
"""Methods whose layers are counted in the file."""
TWIN_NUMBERS = 1024
"""Smaller matrices are not worth a node."""
LEGACY_OPSET = 20
"""The highest opset the legacy exporter writes; nothing it writes changes its meaning in opset 21."""


def export_onnx(
    model: nn.Module,
    example_inputs: Tensor | Sequence[Tensor],
    path: Path | str,
    *,
    int8_format: Int8Format = "u8u8",
    opset: int | None = None,
    expected: Mapping[str, int] | None = None,
    exporters: Sequence[Exporter] = EXPORTERS,
) -> Artifact:
    """Write ``model`` to ``path`` with a dynamic batch and prove that ONNX Runtime computes the same.

    ``example_inputs``: real examples, ``(N, ...)`` a model input; they are what parity is judged on. ``int8_format``:
    activations as uint8 or int8 (the same real grid), weights always int8. ``opset``: 18, or 21 where int4 or blocks
    need it, if ``None``. ``expected``: family (``int8``, ``w8``, ``w4``, ``lowrank``) -> how many layers (``lowrank``:
    pairs) the plan asks for; what is not given is counted on ``model``.

    Raises :class:`UnsupportedModel` when no exporter can write the model, :class:`VerificationError` when what is
    written differs from the model or lacks integer weights.
    """
    inputs = _checked_inputs(model, example_inputs)
    grids = _grids(model)
    chosen_opset = max(opset or 0, grids.opset)
    if opset is not None and opset < grids.opset:
        raise UsageError(f"4-bit and blocked weights need opset {grids.opset}, got {opset}; leave the opset out.")
    failures: list[AutoCompressError] = []
    for exporter in exporters:
        try:
            # Written for two examples and judged on three or more: a batch size that got into the graph shows.
            pair = tuple(t[:2] for t in inputs)
            proto = _export_with(exporter, model, grids, pair, chosen_opset, int8_format)
            parity(model, proto.SerializeToString(), inputs)
        except (UnsupportedModel, UsageError, VerificationError) as error:
            failures.append(error)
            continue
        coverage, missing = _coverage(model, proto, grids, expected or {})
        write_bytes(Path(path), proto.SerializeToString())
        return Artifact(
            path=str(path),
            sha256=sha256_of(path),
            bytes=Path(path).stat().st_size,
            opset=next(o.version for o in proto.opset_import if o.domain == ""),
            exporter=exporter,
            fallback_reason=str(failures[0]) if failures else None,
            int8_format=int8_format,
            coverage=coverage,
            missing=missing,
        )
    if len(failures) == 1:
        raise failures[0]
    kind = next((type(f) for f in failures if isinstance(f, VerificationError)), UnsupportedModel)
    raise kind(" ".join(dict.fromkeys(str(f) for f in failures)))


def _checked_inputs(model: nn.Module, example_inputs: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The inputs as a tuple of batches of at least three examples: exporters take a batch of 1 for a constant."""
    inputs = (example_inputs,) if isinstance(example_inputs, Tensor) else tuple(example_inputs)
    if not inputs or any(t.ndim == 0 or len(t) == 0 for t in inputs):
        raise UsageError("Export needs example inputs with at least one example in the first axis.")
    if model.training:
        raise UsageError("Export takes a model in eval mode; call model.eval() first.")
    return tuple(torch.cat([t] * -(-3 // len(t))) for t in inputs)


def _grids(model: nn.Module) -> Grids:
    """What is quantized in ``model``, checked against its weights."""
    weights: dict[str, PackedWeight] = {}
    activations: dict[str, ActivationQuant] = {}
    for name, module in model.named_modules():
        packed = getattr(module, "packed", None)
        if isinstance(packed, PackedWeight):
            if not isinstance(module, nn.Conv2d | nn.Linear):
                raise UnsupportedModel(f"Only Conv2d and Linear store integers, {name!r} is a {type(module).__name__}.")
            if not torch.equal(packed.dequantize(), module.weight.detach().cpu()):
                raise VerificationError(
                    f"The integers of {name!r} do not give its weight; pack it again after changes."
                )
            weights[name] = packed
        elif isinstance(module, ActivationQuant):
            activations[name] = module
    return Grids(weights, activations)


# ---------------------------------------------------------------- markers


class _LegacyMark(torch.autograd.Function):
    """An identity that the legacy exporter writes as an opaque node."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kind: str, name: str) -> Tensor:
        return x.clone()

    @staticmethod
    def symbolic(graph: Any, x: Any, kind: str, name: str) -> Any:
        return graph.op(f"{DOMAIN}::{kind}", x, name_s=name).setType(x.type())


def _mark(x: Tensor, kind: str, name: str, exporter: Exporter) -> Tensor:
    if exporter == "legacy":
        return cast(Tensor, _LegacyMark.apply(x, kind, name))  # type: ignore[no-untyped-call]
    return torch.onnx.ops.symbolic(f"{DOMAIN}::{kind}", (x,), {"name": name}, dtype=x.dtype, shape=x.shape, version=1)


class _MarkedActivation(nn.Module):
    def __init__(self, name: str, exporter: Exporter) -> None:
        super().__init__()
        self.name, self.exporter = name, exporter

    def forward(self, x: Tensor) -> Tensor:
        return _mark(x, ACTIVATION, self.name, self.exporter)


class _MarkedLayer(nn.Module):
    """A convolution or linear layer that reads its weight through a marker; parameters keep their names."""

    def __init__(self, layer: nn.Conv2d | nn.Linear, name: str, exporter: Exporter) -> None:
        super().__init__()
        self.weight, self.bias, self.name, self.exporter = layer.weight, layer.bias, name, exporter
        self.__dict__["layer"] = layer  # settings only; not a submodule

    def forward(self, x: Tensor) -> Tensor:
        layer, weight = self.__dict__["layer"], _mark(self.weight, WEIGHT, self.name, self.exporter)
        if isinstance(layer, nn.Conv2d):
            return cast(Tensor, layer._conv_forward(x, weight, self.bias))
        return nn.functional.linear(x, weight, self.bias)


class _PlainRMSNorm(nn.Module):
    """An RMSNorm in plain operators: the legacy exporter has none, and ONNX Runtime fuses this form."""

    def __init__(self, norm: nn.RMSNorm) -> None:
        super().__init__()
        self.weight, self.axes = norm.weight, list(range(-len(norm.normalized_shape), 0))
        self.eps = norm.eps if norm.eps is not None else torch.finfo(torch.float32).eps

    def forward(self, x: Tensor) -> Tensor:
        normed = x / torch.sqrt(x.pow(2).mean(self.axes, keepdim=True) + self.eps)
        return normed if self.weight is None else normed * self.weight


def _marked(model: nn.Module, grids: Grids, exporter: Exporter) -> nn.Module:
    """A copy of ``model`` whose quantized weights and tensors are markers."""
    marked = copy.deepcopy(model)
    for name, norm in [(n, m) for n, m in marked.named_modules() if n and isinstance(m, nn.RMSNorm)]:
        marked.set_submodule(name, _PlainRMSNorm(norm))
    for name in grids.activations:
        marked.set_submodule(name, _MarkedActivation(name, exporter))
    for name in grids.weights:
        layer = cast("nn.Conv2d | nn.Linear", marked.get_submodule(name))
        marked.set_submodule(name, _MarkedLayer(layer, name, exporter))
    return marked.eval()


# ---------------------------------------------------------------- exporters


def _export_with(
    exporter: Exporter,
    model: nn.Module,
    grids: Grids,
    inputs: tuple[Tensor, ...],
    opset: int,
    int8_format: Int8Format,
) -> onnx.ModelProto:
    """One exporter's graph with integers in it, checked and with inferred shapes."""
    run = _dynamo if exporter == "dynamo" else _legacy
    try:
        with _quiet():
            proto = run(_marked(model, grids, exporter), inputs, opset)
    except AutoCompressError:
        raise
    # The exporters raise whatever their passes raise
    except Exception as error:
        raise UnsupportedModel(f"The {exporter} exporter cannot write this model: {_reason(error)}") from error
    insert_quantization(proto, grids, int8_format)
    _name_weights(proto.graph, model)
    _store_once(proto.graph)
    try:
        onnx.checker.check_model(proto, full_check=True)
    except Exception as error:
        raise VerificationError(f"The {exporter} exporter wrote an invalid graph: {first_line(error)}") from error
    return proto


def _name_weights(graph: onnx.GraphProto, model: nn.Module) -> None:
    """Give weights that an exporter transposed and renamed (linear layers on sequences) the names of their layers back."""
    names = {t.name for t in graph.initializer}
    lost = [
        (f"{name}.weight", module.weight)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and f"{name}.weight" not in names
    ]
    if not lost:
        return
    numbered: dict[bytes, onnx.TensorProto] = {}
    for tensor in graph.initializer:
        if len(tensor.dims) == 2 and tensor.data_type == onnx.TensorProto.FLOAT:
            numbered.setdefault(_fingerprint(onnx.numpy_helper.to_array(tensor)), tensor)
    new: dict[str, str] = {}
    for name, weight in lost:
        found = numbered.get(_fingerprint(weight.detach().numpy().T))
        if found is not None and found.name not in new and not found.name.endswith(".weight"):
            new[found.name] = name
    for tensor in graph.initializer:
        tensor.name = new.get(tensor.name, tensor.name)
    for node in graph.node:
        for i, name in enumerate(node.input):
            node.input[i] = new.get(name, name)


def _fingerprint(array: npt.NDArray[Any]) -> bytes:
    return hashlib.blake2b(repr(array.shape).encode() + np.ascontiguousarray(array).tobytes()).digest()


def _store_once(graph: onnx.GraphProto) -> None:
    """A matrix that stands in the file twice, once transposed, is stored once: a head that is tied to its embedding.

    ONNX Runtime transposes it again when it loads the file.
    """
    matrices = [t for t in graph.initializer if len(t.dims) == 2 and t.data_type == onnx.TensorProto.FLOAT]
    kept: dict[tuple[int, ...], list[onnx.TensorProto]] = {}
    for tensor in matrices:
        array = onnx.numpy_helper.to_array(tensor)
        twins = kept.get(array.shape[::-1], [])
        twin = next((t for t in twins if np.array_equal(onnx.numpy_helper.to_array(t).T, array)), None)
        if twin is None or array.size < TWIN_NUMBERS:
            kept.setdefault(array.shape, []).append(tensor)
            continue
        node = onnx.helper.make_node("Transpose", [twin.name], [tensor.name], f"{tensor.name}_transpose", perm=[1, 0])
        graph.initializer.remove(tensor)
        graph.node.insert(0, node)


def _dynamo(model: nn.Module, inputs: tuple[Tensor, ...], opset: int) -> onnx.ModelProto:
    batch = torch.export.Dim("batch", min=1)
    program = torch.onnx.export(
        model,
        inputs,
        dynamo=True,
        opset_version=opset,
        input_names=_input_names(inputs),
        output_names=["output"],
        dynamic_shapes=tuple({0: batch} for _ in inputs),
        verbose=False,
    )
    if program is None:
        raise UnsupportedModel("The dynamo exporter gave no program.")
    return program.model_proto


def _legacy(model: nn.Module, inputs: tuple[Tensor, ...], opset: int) -> onnx.ModelProto:
    names, buffer = _input_names(inputs), io.BytesIO()
    torch.onnx.export(
        model,
        inputs,
        cast(Any, buffer),  # a file object is taken, though not declared
        dynamo=False,
        opset_version=min(opset, LEGACY_OPSET),
        input_names=names,
        output_names=["output"],
        dynamic_axes={name: {0: "batch"} for name in [*names, "output"]},
        custom_opsets={DOMAIN: 1}
        if any(isinstance(m, _MarkedLayer | _MarkedActivation) for m in model.modules())
        else None,
    )
    proto = onnx.load_from_string(buffer.getvalue())
    for imported in proto.opset_import:
        if imported.domain == "":
            imported.version = opset
    return proto


def _input_names(inputs: tuple[Tensor, ...]) -> list[str]:
    return ["input"] if len(inputs) == 1 else [f"input_{i}" for i in range(len(inputs))]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporters' warnings, log lines and progress from the user; their errors still come as exceptions."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "torch.fx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    sink = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _reason(error: BaseException) -> str:
    """The innermost cause: the dynamo exporter wraps it in a page of advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {first_line(error)}"


# ---------------------------------------------------------------- coverage


def _coverage(
    model: nn.Module, proto: onnx.ModelProto, grids: Grids, expected: Mapping[str, int]
) -> tuple[dict[str, dict[str, int]], dict[str, str]]:
    """Method -> expected and found, and why layers are missing.

    ``int8`` counts layers that ONNX Runtime computes on integers; ``w8`` to ``w2`` count stored weights; the forms of weights
    (``sparse``, ``lookup``, ``spqr``, ``billm``) are looked for in the numbers of the file.
    """
    families: dict[str, list[str]] = {}
    for name, packed in grids.weights.items():
        families.setdefault(family(packed), []).append(name)
    stored = stored_as_integers(proto, grids)
    as_float = [n for key, names in families.items() for n in names if n not in stored.get(key, [])]
    if as_float:
        raise VerificationError(
            f"These weights are not stored as integers: {', '.join(as_float)}; nothing was written."
        )
    missing: dict[str, str] = {}
    optimized = _optimized(proto) if grids.activations or grids.weights else proto
    for name in dequantized_in_every_run(optimized, grids):
        group = grids.weights[name].group
        reason = f"; blocks are {', '.join(map(str, FUSED_BLOCKS))} or a whole channel, not {group}" if group else ""
        missing[name] = f"its weight is stored as integers and dequantized in every run{reason}"
    if grids.activations:
        if "int8" in families:
            stored["int8"] = run_as_integers(optimized, grids)
            missing |= {n: why_float(proto, n) for n in families["int8"] if n not in stored["int8"]}
        missing |= dict.fromkeys(quantized_by_runtime(optimized, grids), "a float layer that ONNX Runtime runs in int8")
    pairs = _factor_pairs(model)
    families["lowrank"] = list(pairs)
    stored["lowrank"] = [name for name, layers in pairs.items() if all(_has_layer(proto, n) for n in layers)]
    for name, module in model.named_modules():
        for form in getattr(module, "forms", ()):
            families.setdefault(form.family, []).append(name)
            weight = _weight_in_file(proto, name, module, grids)
            if weight is not None and form.holds(weight):
                stored.setdefault(form.family, []).append(name)
    for name in expected:
        if name not in COUNTED:
            raise UnknownName("method to count in the file", name, COUNTED)
    coverage = {
        key: {"expected": expected.get(key, len(families.get(key, []))), "found": len(stored.get(key, []))}
        for key in COUNTED
        if families.get(key) or expected.get(key)
    }
    return coverage, missing


def _weight_in_file(proto: onnx.ModelProto, name: str, module: nn.Module, grids: Grids) -> Tensor | None:
    """A layer's weight as the file holds it, in the layer's shape; integers stand for themselves."""
    if name in grids.weights:  # that these are the file's has been checked
        return grids.weights[name].integers
    tensor = next((t for t in proto.graph.initializer if t.name == f"{name}.weight"), None)
    if tensor is None:
        return None
    found, weight = torch.from_numpy(onnx.numpy_helper.to_array(tensor).copy()), cast(Tensor, module.weight).detach()
    ways = (found, found.T.contiguous()) if found.ndim == 2 else (found,)  # a MatMul's matrix lies the other way round
    return next((way for way in ways if torch.equal(way, weight)), None)


def _optimized(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The graph after ONNX Runtime's fusions."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "optimized.onnx"
        open_session(proto.SerializeToString(), optimization="fused", save=path)
        return onnx.load(str(path))


def _factor_pairs(model: nn.Module) -> dict[str, list[str]]:
    """Factorized layers: modules that hold two linear layers or more, ``0``, ``1`` .., and no activation function.

    A ``Sequential`` that was traced through is such a module, too.
    """
    pairs = {}
    for name, module in model.named_modules():
        children = {
            k: m for k, m in module.named_children() if name and not isinstance(m, ActivationQuant | nn.Identity)
        }
        if len(children) >= 2 and all(
            k.isdigit() and isinstance(m, nn.Conv2d | nn.Linear) for k, m in children.items()
        ):
            pairs[name] = [f"{name}.{k}" for k in children]
    return pairs


def _has_layer(proto: onnx.ModelProto, layer: str) -> bool:
    """Whether a layer's weight, in any format, is an initializer that some node reads."""
    names = {f"{layer}.weight", f"{layer}.weight_int8", f"{layer}.weight_int4"}
    stored = names & {t.name for t in proto.graph.initializer}
    return any(name in stored for node in proto.graph.node for name in node.input)

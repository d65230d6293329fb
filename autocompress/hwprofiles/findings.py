"""Why a model is not faster: what the profiler saw, held against what the file says. One function a defect.

Each finding says how many microseconds of a run are at stake: at most so much goes when the defect goes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx

from autocompress.hwprofiles.device import Node
from autocompress.hwprofiles.written import Written

SMALL_US = 3.0
"""Below this a node's time is mostly that of being called."""
_MISALIGNED, _WASTE, _GRANULE = 0.5, 0.15, 4
_CALLS = 0.3
"""Share of a run from which calls are worth a finding; :data:`_REORDERS` is that of reorders."""
_REORDERS, _SLOWER = 0.05, 1.15
_INSERTED = ("ReorderInput", "ReorderOutput", "Transpose")


@dataclass(frozen=True)
class Finding:
    """``kind`` in a few words, microseconds a run at stake, the file's nodes, why, and what the search can do."""

    kind: str
    us: float
    nodes: tuple[str, ...]
    why: str
    fix: str


@dataclass(frozen=True)
class Profiled:
    """A model as it was written and as it runs: the optimized nodes, and µs of each without the profiler's own."""

    written: Written
    nodes: Sequence[Node]
    us: Sequence[float]
    overhead_us: float
    """What a run costs beside its nodes."""

    @property
    def total_us(self) -> float:
        """One run."""
        return sum(self.us) + self.overhead_us

    def timed(self) -> list[tuple[Node, float]]:
        """Nodes with their times."""
        return list(zip(self.nodes, self.us, strict=True))


@dataclass(frozen=True)
class Scene:
    """What a rule looks at: the model, the original, the device's description, and its milliseconds in each int8 form."""

    model: Profiled
    original: Profiled
    host: Mapping[str, Any]
    int8_ms: Mapping[str, float]
    int8_best: str


def find(scene: Scene) -> list[Finding]:
    """All findings, those with most at stake first."""
    found = [finding for rule in RULES if (finding := rule(scene)) is not None]
    return sorted(found, key=lambda finding: -finding.us)


def channel_block(host: Mapping[str, Any]) -> int:
    """Channels that float convolutions compute together (``MlasNchwcGetBlockSize``): 1 where none are."""
    flags = host.get("flags", ())
    return 16 if "avx512f" in flags else 8 if "avx" in flags or "avx2" in flags else 1


def misaligned(scene: Scene) -> Finding | None:
    """Convolutions whose widths leave the blocked layout, or are padded to whole blocks, and that were not so before."""
    block, model = channel_block(scene.host), scene.model
    before = {name: scene.original.written.widths(node) for name, node in scene.original.written.nodes.items()}
    found: list[tuple[str, float]] = []
    for node, us in model.timed():
        conv = model.written.compute(node)
        widths = model.written.widths(conv) if conv is not None else None
        if conv is None or widths is None or before.get(conv.name) == widths or block == 1:
            continue
        lost = _waste(widths, block, quantized=node.op.startswith("QLinear"))
        if lost >= _WASTE:
            found.append((f"{conv.name} ({widths[0]} to {widths[1]} channels)", us * lost))
    fix = (
        f"Search with a latency budget on a profile measured on this device, whose tables know these cliffs; widths that are "
        f"multiples of {block} (at least of {_GRANULE}) lose nothing."
    )
    why = f"Channels are computed in blocks of {block}; widths beside that are padded, or leave the fast layout altogether."
    return _finding("misaligned widths", found, why, fix)


def _waste(widths: tuple[int, int, int], block: int, quantized: bool) -> float:
    """Share of a convolution's time that its widths waste."""
    c_in, c_out, groups = widths
    if quantized:
        return _MISALIGNED if c_in % _GRANULE or c_out % _GRANULE else 0.0
    if groups > 1:
        return 0.0 if groups != c_in else 1 - c_out / _up(c_out, block)
    if c_in > block and c_in % _GRANULE:
        return _MISALIGNED
    return 1 - (c_in * c_out) / ((_up(c_in, block) if c_in >= block else c_in) * _up(c_out, block))


def _up(width: int, block: int) -> int:
    return -(-width // block) * block


def unfused(scene: Scene) -> Finding | None:
    """Layers written as int8 that run in float, and the changes of format around them."""
    model = scene.model
    layers = [
        (_name(conv), 0.0) for node, _ in model.timed() if (conv := _meant_int8(model, node)) and not _is_int8(node)
    ]
    edges = []
    for node, us in model.timed():
        source = model.written.source(node)
        if node.op in ("QuantizeLinear", "DequantizeLinear") and source is not None:
            stored = model.written.is_weight(source.output[0])
            if _name(source) in model.written.inner_edges or (stored and _serves_int8(model.written, source)):
                edges.append((_name(source), us))
    why = "ONNX Runtime did not fuse these QuantizeLinear and DequantizeLinear nodes: they run, and what lies between is float."
    fix = (
        "Leave these layers in float, or give the DequantizeLinear of their weights an explicit zero point and one type of "
        "integers to all activations, as 'autocompress export' writes them."
    )
    return _finding("unfused Q/DQ", layers + edges, why, fix)


def slow_int8(scene: Scene) -> Finding | None:
    """Layers in a form of int8 that is slower on this device than another one that is exact there."""
    best, found, forms = scene.int8_best, list[tuple[str, float]](), set[str]()
    for node, us in scene.model.timed():
        layer = _meant_int8(scene.model, node)
        form = scene.model.written.form(layer) if layer else ""
        ms, least = scene.int8_ms.get(f"{form}_ms", 0.0), scene.int8_ms.get(f"{best}_ms", 0.0)
        if layer and form != best and ms > _SLOWER * least:
            found.append((_name(layer), us * (1 - least / ms)))
            forms.add(f"{form} ({ms:.3g} ms against {least:.3g} ms of one small network)")
    why = f"The layers are quantized as {', '.join(sorted(forms))}; {best} is the fast exact form here."
    fix = f"Export with a budget on a profile of this device: it says that {best} is the form to write."
    return _finding("slow int8 format", found, why, fix)


def weight_only(scene: Scene) -> Finding | None:
    """Stored weights that are turned into floats in every run."""
    model, found = scene.model, list[tuple[str, float]]()
    for node, us in model.timed():
        source = model.written.source(node)
        if node.op != "DequantizeLinear" or source is None or not model.written.is_weight(source.output[0]):
            continue
        if not _serves_int8(model.written, source):
            found += [(_name(layer), us) for layer in model.written.consumers.get(source.output[0], [])[:1]]
    why = (
        "Their weights are stored as integers, but ONNX Runtime makes floats of them in every run: smaller, not faster."
    )
    fix = "Leave w8 and w4 out for these layers (--methods channels,blocks,lowrank,int8), or use int8."
    return _finding("weights dequantized at every run", found, why, fix)


def reorders(scene: Scene) -> Finding | None:
    """Changes of layout that ONNX Runtime put in, where the original has fewer and they take a share of the run."""
    found, before = _inserted(scene.model), _inserted(scene.original)
    if len(found) <= len(before) or sum(us for _, us in found) < _REORDERS * scene.model.total_us:
        return None
    why = f"ONNX Runtime put in {len(found)} changes of layout, and {len(before)} in the original."
    fix = (
        "Keep the widths of neighbouring convolutions multiples of 4, and do not leave single float layers between int8 ones; "
        "a latency budget on a measured profile counts them."
    )
    return _finding("reorders", found, why, fix)


def _inserted(profiled: Profiled) -> list[tuple[str, float]]:
    """Inserted changes of layout, named by the node behind each."""
    found = []
    for i, (node, us) in enumerate(profiled.timed()):
        if node.op in _INSERTED and (node.op != "Transpose" or node.name not in profiled.written.nodes):
            behind = next((s for n in profiled.nodes[i + 1 :] if (s := profiled.written.source(n)) is not None), None)
            found.append((f"{node.op} before {_name(behind)}" if behind is not None else f"{node.op} at the end", us))
    return found


def overhead_bound(scene: Scene) -> Finding | None:
    """Many nodes so small that a run is mostly the calling of nodes."""
    model = scene.model
    small = [
        (_name(source) if (source := model.written.source(node)) is not None else node.name, us)
        for node, us in model.timed()
        if us < SMALL_US
    ]
    if sum(us for _, us in small) + model.overhead_us < _CALLS * model.total_us:
        return None
    why = (
        f"{len(small)} of {len(model.nodes)} nodes take less than {SMALL_US:g} µs each, which is mostly the time to call them; "
        f"a run costs {model.overhead_us:.0f} µs beside."
    )
    fix = (
        "Narrower layers or fewer bits gain nothing here: drop whole blocks (--methods blocks), or time larger batches."
    )
    return _finding("overhead-bound small ops", small, why, fix)


RULES: tuple[Callable[[Scene], Finding | None], ...] = (
    misaligned,
    unfused,
    slow_int8,
    weight_only,
    reorders,
    overhead_bound,
)


def _finding(kind: str, found: Sequence[tuple[str, float]], why: str, fix: str) -> Finding | None:
    if not found:
        return None
    return Finding(kind, sum(us for _, us in found), tuple(dict.fromkeys(name for name, _ in found)), why, fix)


def _name(node: onnx.NodeProto) -> str:
    return str(node.name or node.output[0])


def _meant_int8(model: Profiled, node: Node) -> onnx.NodeProto | None:
    """The layer behind an optimized node, where the file wants it in int8."""
    layer = model.written.compute(node)
    return layer if layer is not None and model.written.form(layer) else None


def _is_int8(node: Node) -> bool:
    return node.op.startswith(("QLinear", "QGemm", "MatMulInteger", "DynamicQuantize", "ConvInteger", "QAttention"))


def _serves_int8(written: Written, source: onnx.NodeProto) -> bool:
    """Whether a stored weight or bias belongs to a layer that was meant to be int8."""
    return any(bool(written.form(node)) for node in written.consumers.get(source.output[0], []))

"""``explain``: a model against its original, node by node, with the reasons why it is not faster."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from autocompress.hwprofiles.bench import Comparison, compare, node_trace
from autocompress.hwprofiles.device import Device, Model, local_device, read_model
from autocompress.hwprofiles.findings import Finding, Profiled, Scene, find
from autocompress.hwprofiles.measure import fastest_int8
from autocompress.hwprofiles.robust import middle_mean
from autocompress.hwprofiles.timing import MAX_EXCESS_NS, run_overhead_ns
from autocompress.hwprofiles.written import Written

_INT8_SECONDS = 1.0
_LEAST_US = 0.1


@dataclass(frozen=True)
class OpRow:
    """All nodes of one operator in the optimized graphs: how many, and microseconds of a run."""

    op: str
    original_nodes: int
    nodes: int
    original_us: float
    us: float


@dataclass(frozen=True)
class Explanation:
    """The comparison, the findings with most at stake first, and the operators with the largest change first."""

    speed: Comparison
    findings: tuple[Finding, ...]
    ops: tuple[OpRow, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        rows = {"findings": [asdict(f) for f in self.findings], "ops": [asdict(row) for row in self.ops]}
        return {"speed": self.speed.to_json(), **rows}


def explain(
    model: Model,
    original: Model,
    *,
    batch: int = 1,
    threads: int = 1,
    seconds: float = 5,
    runs: int = 50,
    device: Device | None = None,
) -> Explanation:
    """Compare two models for ``seconds``, profile ``runs`` runs of each, and look for what keeps the first one slow.

    Raises ``UsageError`` for models that cannot be loaded or run.
    """
    device = device or local_device()
    speed = compare(model, original, batch=batch, threads=threads, seconds=seconds, device=device)
    overhead = run_overhead_ns(threads, device) / 1e3
    ours, theirs = (_profiled(m, batch, threads, runs, overhead, device) for m in (model, original))
    best, int8_ms = fastest_int8(threads, _INT8_SECONDS, device)
    findings = find(Scene(ours, theirs, device.host, int8_ms, best))
    return Explanation(speed, tuple(findings), tuple(_ops(ours, theirs)))


def _profiled(model: Model, batch: int, threads: int, runs: int, overhead: float, device: Device) -> Profiled:
    trace, rounds = node_trace(model, batch=batch, threads=threads, runs=runs, device=device)
    us = np.array([middle_mean(column) for column in trace.us.T])  # (n_nodes,)
    plain = middle_mean(rounds.lane(1)) / 1e3 - overhead
    # The profiler's own time is spread evenly over the nodes, as in timing.py.
    excess = np.clip((us.sum() - plain) / max(len(us), 1), 0.0, MAX_EXCESS_NS / 1e3)
    written = Written(read_model(model) if isinstance(model, Path) else model)
    return Profiled(written, trace.nodes, np.maximum(us - excess, _LEAST_US).tolist(), overhead)


def _ops(ours: Profiled, theirs: Profiled) -> list[OpRow]:
    sums: dict[str, list[float]] = defaultdict(lambda: [0, 0, 0.0, 0.0])
    for i, profiled in enumerate((theirs, ours)):
        for node, us in profiled.timed():
            sums[node.op][i] += 1
            sums[node.op][2 + i] += us
    rows = [OpRow(op, int(a), int(b), c, d) for op, (a, b, c, d) in sums.items()]
    return sorted(rows, key=lambda row: -abs(row.us - row.original_us))

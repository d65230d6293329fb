"""Kernels -> nanoseconds: interleaved rounds, drift taken out, and the profiler's own cost subtracted.

The profiler makes every node look about 3 µs slower than it is. So each probe has two sessions, one profiled and one
not: the profiled one tells how the time is shared out, the plain one what the sum really is. Their difference, spread
evenly over the nodes, is subtracted. Drift of the host (clock, neighbours) is divided out by a reference network that
runs in every round.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from autocompress.hwprofiles.builder import GraphBuilder
from autocompress.hwprofiles.predict import FLOOR_NS
from autocompress.hwprofiles.probes import REPEATS, Probe, build_probe
from autocompress.hwprofiles.references import residual_network
from autocompress.hwprofiles.sessions import NodeEvent, middle_mean, open_session, random_feeds, read_trace, timer
from autocompress.types import Int8Format, Kernel

FloatArray = npt.NDArray[np.float64]
CHUNK = 32
"""Kernels whose sessions are open at the same time, at most."""
CHUNK_BYTES = 400e6
_SLOW_NS, _SETTLE_NS = 2e7, 5e5
WARM_UP, MIN_ROUNDS, MAX_ROUNDS = 2, 6, 100
_REFERENCE = ((16, 16), (16, 16), (32, 32), (32, 32))
MAX_EXCESS_NS = 8_000.0
"""The most that profiling is believed to add to a node: more is noise of the host."""


@dataclass(frozen=True)
class Timed:
    """Nanoseconds of one kernel, and the half width of its 95 % interval relative to it."""

    ns: float
    interval: float


class Clock:
    """A small reference network that is timed in every round; its time is the unit of all others."""

    def __init__(self, threads: int) -> None:
        session = open_session(residual_network(_REFERENCE, size=16)[0], threads)
        self._once = timer(session, random_feeds(session, 1), threads)
        for _ in range(20):
            self._once()
        self.ticks: list[float] = []

    def tick(self) -> float:
        """Nanoseconds of the reference now: the fastest of three runs."""
        value = min(self._once()[0] for _ in range(3))
        self.ticks.append(value)
        return value

    @property
    def usual(self) -> float:
        """Its median over all rounds so far."""
        return float(np.median(self.ticks))


@dataclass
class _Running:
    """One probe while it is measured: a profiled and a plain session, and what they gave."""

    probe: Probe
    traced: ort.InferenceSession
    run_traced: Callable[[], tuple[float, bool]]
    run_plain: Callable[[], tuple[float, bool]]
    settle: int = 1
    """Uncounted runs before each counted one: other sessions have left cold caches, which a network has not."""
    traced_quiet: list[bool] = field(default_factory=list)  # one a round, and so are these:
    plain: list[float] = field(default_factory=list)  # ns
    plain_quiet: list[bool] = field(default_factory=list)


@dataclass(frozen=True)
class Setting:
    """What all kernels are measured with."""

    threads: int = 1
    batch: int = 1
    int8: Int8Format = "u8u8"


def time_kernels(
    kernels: Sequence[Kernel], setting: Setting, seconds: float, tick: Callable[[int], None] = lambda done: None
) -> tuple[dict[Kernel, Timed], Clock]:
    """The times of as many of ``kernels`` (most important first) as ``seconds`` allow; those without a probe are left
    out. ``tick`` is told how many are done."""
    end = time.perf_counter() + seconds
    clock, found = Clock(setting.threads), dict[Kernel, tuple[FloatArray, FloatArray]]()
    overhead, done = run_overhead_ns(setting.threads), 0
    with tempfile.TemporaryDirectory(prefix="autocompress-") as folder:
        for chunk in _chunks(kernels, setting.batch):
            left = end - time.perf_counter()
            if left <= 0 and found:
                break
            stop = time.perf_counter() + max(left, 0.0) * len(chunk) / (len(kernels) - done)
            running = list(_open(chunk, setting, Path(folder), end if found else math.inf))
            if running:
                found |= _run_chunk(running, clock, overhead, stop, end)
            done += len(chunk)
            tick(done)
    return {k: _summary(samples / ticks * clock.usual) for k, (samples, ticks) in found.items()}, clock


def _chunks(kernels: Sequence[Kernel], batch: int) -> Iterator[list[Kernel]]:
    """Kernels whose sessions may be open together: at most ``CHUNK``, and about ``CHUNK_BYTES``."""
    chunk: list[Kernel] = []
    size = 0.0
    for kernel in kernels:
        activations = math.prod(kernel.in_shape) + math.prod(kernel.out_shape)
        needed = 2 * 4 * REPEATS * (activations * batch + kernel.weights)
        if chunk and (len(chunk) == CHUNK or size + needed > CHUNK_BYTES):
            yield chunk
            chunk, size = [], 0.0
        chunk.append(kernel)
        size += needed
    if chunk:
        yield chunk


def _open(chunk: Sequence[Kernel], setting: Setting, folder: Path, end: float) -> Iterator[_Running]:
    """The chunk's sessions, as far as ``end`` allows."""
    for i, kernel in enumerate(chunk):
        probe = build_probe(kernel, setting.batch, setting.int8) if time.perf_counter() < end else None
        if probe is None:
            continue
        traced = open_session(probe.model, setting.threads, folder / f"trace{i}")
        plain = open_session(probe.model, setting.threads)
        feeds = random_feeds(plain, 1)
        runs = timer(traced, feeds, setting.threads), timer(plain, feeds, setting.threads)
        slowest = max(once()[0] for _ in range(WARM_UP - 1) for once in runs)
        yield _Running(probe, traced, *runs, settle=int(np.clip(_SETTLE_NS / slowest, slowest < _SLOW_NS, 4)))


def _run_chunk(
    chunk: list[_Running], clock: Clock, overhead: float, stop: float, end: float
) -> dict[Kernel, tuple[FloatArray, FloatArray]]:
    """Rounds over all sessions until ``stop``, at least ``MIN_ROUNDS`` unless ``end`` passes; ns and ticks a round."""
    ticks: list[float] = []
    while len(ticks) < MAX_ROUNDS:
        now = time.perf_counter()
        if (len(ticks) >= MIN_ROUNDS and now > stop) or (len(ticks) >= 3 and now > end):
            break
        ticks.append(clock.tick())
        for running in chunk:
            for _ in range(running.settle):
                running.run_traced()
            running.traced_quiet.append(running.run_traced()[1])
            for _ in range(running.settle):
                running.run_plain()
            ns, quiet = running.run_plain()
            running.plain.append(ns)
            running.plain_quiet.append(quiet)
    rounds = np.array(ticks)
    return {r.probe.kernel: _per_round(r, rounds, overhead) for r in chunk}


def _per_round(running: _Running, ticks: FloatArray, overhead: float) -> tuple[FloatArray, FloatArray]:
    """Nanoseconds of one copy of the kernel in each undisturbed round, and the clock's.  # (n_rounds,), (n_rounds,)"""
    runs: list[list[NodeEvent]] = read_trace(running.traced)[WARM_UP:][running.settle :: 1 + running.settle]
    costs = np.array([running.probe.cost(run) for run in runs])  # (n_rounds, 2): µs, nodes
    sums = np.array([sum(e.us for e in run) for run in runs]) * 1e3
    scale = ticks / ticks.mean()
    traced, plain = _enough(running.traced_quiet), _enough(running.plain_quiet)
    # One number a probe: in a single round the difference is too noisy.
    total = middle_mean((np.array(running.plain) / scale)[plain]) - overhead
    excess = (middle_mean((sums / scale)[traced]) - total) / len(runs[0])
    ns = costs[:, 0] * 1e3 - costs[:, 1] * float(np.clip(excess, 0.0, MAX_EXCESS_NS))
    return ns[traced], ticks[traced]


def _enough(quiet: list[bool]) -> npt.NDArray[np.bool_]:
    """The undisturbed rounds, or all of them where fewer than three are."""
    mask = np.array(quiet)
    return mask if mask.sum() >= 3 else np.ones_like(mask)


def _summary(samples: FloatArray) -> Timed:
    """Middle mean and McGill's interval of a median: 1.57 times the interquartile range over the root of n."""
    ns = max(middle_mean(samples), FLOOR_NS)
    low, high = np.percentile(samples, [25, 75])
    return Timed(ns, float(1.57 * (high - low) / np.sqrt(len(samples)) / ns))


def run_overhead_ns(threads: int) -> float:
    """Nanoseconds of a run that computes next to nothing: one ReLU of 16 numbers."""
    graph = GraphBuilder((1, 16))
    graph.output(graph.node("Relu", ["x"], "relu"))
    session = open_session(graph.build(), threads)
    once = timer(session, random_feeds(session, 1), threads)
    for _ in range(100):
        once()
    return middle_mean([once()[0] for _ in range(500)])

"""Kernels -> nanoseconds: interleaved rounds, drift taken out, and the profiler's own cost subtracted.

The profiler makes every node look about 3 µs slower than it is. So each probe has two sessions, one profiled and one
not: the profiled one tells how the time is shared out, the plain one what the sum really is. Their difference, spread
evenly over the nodes, is subtracted. Drift of the host (clock, neighbours) is divided out by a reference network that
runs in every round. The rounds themselves are the agent's.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from autocompress.hwprofiles.agent import FOREVER
from autocompress.hwprofiles.builder import GraphBuilder
from autocompress.hwprofiles.device import Device, FloatArray, Lane, Rounds, local_device
from autocompress.hwprofiles.predict import FLOOR_NS
from autocompress.hwprofiles.probes import REPEATS, Probe, build_probe
from autocompress.hwprofiles.references import residual_network
from autocompress.hwprofiles.robust import middle_mean
from autocompress.types import Int8Format, Kernel

CHUNK = 32
"""Kernels whose sessions are open at the same time, at most."""
CHUNK_BYTES = 400e6
_SETTLE_NS = 5e5
WARM_UP, MIN_ROUNDS, MAX_ROUNDS = 2, 6, 100
_REFERENCE = ((16, 16), (16, 16), (32, 32), (32, 32))
MAX_EXCESS_NS = 8_000.0
"""The most that profiling is believed to add to a node: more is noise of the host."""


@dataclass(frozen=True)
class Timed:
    """Nanoseconds of one kernel, and the half width of its 95 % interval relative to it."""

    ns: float
    interval: float


@dataclass
class Samples:
    """What was measured so far: of each kernel its nanoseconds and the clock's in each undisturbed round, and every
    tick of the clock (a small reference network, timed in every round: the unit of all others)."""

    kernels: dict[Kernel, tuple[FloatArray, FloatArray]] = field(default_factory=dict)
    ticks: list[float] = field(default_factory=list)  # ns

    @property
    def usual(self) -> float:
        """The clock's median over all rounds so far, in nanoseconds."""
        return float(np.median(self.ticks))

    def times(self) -> dict[Kernel, Timed]:
        """Each kernel's time where the clock takes its usual."""
        return {k: _summary(ns / ticks * self.usual) for k, (ns, ticks) in self.kernels.items()}


@dataclass(frozen=True)
class Setting:
    """What all kernels are measured with."""

    threads: int = 1
    batch: int = 1
    int8: Int8Format = "u8u8"
    device: Device = field(default_factory=local_device)


def time_kernels(
    kernels: Sequence[Kernel],
    setting: Setting,
    seconds: float,
    tick: Callable[[Samples, int], None] = lambda samples, done: None,
    samples: Samples | None = None,
) -> Samples:
    """The times of as many of ``kernels`` (most important first) as ``seconds`` allow; those without a probe are left
    out. ``samples`` are filled, where given, and ``tick`` is told of them and of how many kernels are done."""
    end = time.perf_counter() + seconds
    samples = samples or Samples()
    before, overhead, done = len(samples.kernels), run_overhead_ns(setting.threads, setting.device), 0
    for chunk in _chunks(kernels, setting.batch):
        left = end - time.perf_counter()
        first = len(samples.kernels) == before  # a call that has time for nothing measures one chunk all the same
        if left <= 0 and not first:
            break
        share = max(left, 0.0) * len(chunk) / (len(kernels) - done)
        limit = FOREVER if first else max(left, 0.0)
        probes = [probe for k in chunk if (probe := build_probe(k, setting.batch, setting.int8))]
        if probes:
            _run_chunk(probes, setting, samples, overhead, (share, max(left, 0.0), limit))
        done += len(chunk)
        tick(samples, done)
    return samples


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


def clock_lane(threads: int) -> Lane:
    """The reference network: the fastest of three runs, in a session that stays open."""
    model = residual_network(_REFERENCE, size=16)[0]
    return Lane(model, threads, keep=True, warm_up=20, slow_ns=0.0, turn_ns=FOREVER, turn_most=3, statistic="min")


def _run_chunk(
    probes: Sequence[Probe],
    setting: Setting,
    samples: Samples,
    overhead: float,
    limits: tuple[float, float, float],
) -> None:
    """Rounds over a chunk's probes, each profiled and plain; ``limits`` are seconds of the rounds, of at least three of
    them, and of opening."""
    # Uncounted runs before each counted one: other sessions have left cold caches, which a network has not.
    pairs = [
        Lane(p.model, setting.threads, trace=traced, warm_up=WARM_UP - 1, settle_ns=_SETTLE_NS, settle_most=4)
        for p in probes
        for traced in (True, False)
    ]
    rounds = setting.device.rounds(
        [clock_lane(setting.threads), *pairs],
        seconds=limits[0],
        least=MIN_ROUNDS,
        most=MAX_ROUNDS,
        at_most=limits[1],
        open_within=limits[2],
        opening_counts=True,
    )
    ticks = rounds.lane(0)
    samples.ticks += ticks.tolist()
    for i, probe in enumerate(probes[: (rounds.opened - 1) // 2]):
        samples.kernels[probe.kernel] = _per_round(probe, rounds, 1 + 2 * i, overhead)


def _per_round(probe: Probe, rounds: Rounds, lane: int, overhead: float) -> tuple[FloatArray, FloatArray]:
    """Nanoseconds of one copy of the kernel in each undisturbed round, and the clock's.  # (n_rounds,), (n_rounds,)"""
    trace, ticks = rounds.traces[lane], rounds.lane(0)
    costs = np.array([probe.cost(run) for run in trace.runs])  # (n_rounds, 2): µs, nodes
    scale = ticks / ticks.mean()
    traced, plain = _enough(rounds.undisturbed(lane)), _enough(rounds.undisturbed(lane + 1))
    # One number a probe: in a single round the difference is too noisy.
    total = middle_mean((rounds.lane(lane + 1) / scale)[plain]) - overhead
    excess = (middle_mean((trace.us.sum(axis=1) * 1e3 / scale)[traced]) - total) / len(trace.nodes)
    ns = costs[:, 0] * 1e3 - costs[:, 1] * float(np.clip(excess, 0.0, MAX_EXCESS_NS))
    return ns[traced], ticks[traced]


def _enough(quiet: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """The undisturbed rounds, or all of them where fewer than three are."""
    return quiet if quiet.sum() >= 3 else np.ones_like(quiet)


def _summary(samples: FloatArray) -> Timed:
    """Middle mean and McGill's interval of a median: 1.57 times the interquartile range over the root of n."""
    ns = max(middle_mean(samples), FLOOR_NS)
    low, high = np.percentile(samples, [25, 75])
    return Timed(ns, float(1.57 * (high - low) / np.sqrt(len(samples)) / ns))


def run_overhead_ns(threads: int, device: Device | None = None) -> float:
    """Nanoseconds of a run that computes next to nothing: one ReLU of 16 numbers."""
    graph = GraphBuilder((1, 16))
    graph.output(graph.node("Relu", ["x"], "relu"))
    # One turn: what Python does between turns would cool the caches.
    lane = Lane(graph.build(), threads, warm_up=100, slow_ns=0.0, turn_ns=FOREVER, turn_most=500)
    return float((device or local_device()).rounds([lane], seconds=0.0, least=1, most=1).ns[0, 0])

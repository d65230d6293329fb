"""Is it faster? Models timed against each other in the same rounds, with intervals and the host's own noise.

A host's speed moves by tens of percent within minutes, so times of different minutes are not compared: each round runs
all models forwards and backwards (A B B A), ratios are taken within the round, and the median over rounds gets a
bootstrap interval (Efron & Tibshirani 1993, percentile method).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from autocompress.errors import UsageError
from autocompress.hwprofiles.device import Device, Feeds, FloatArray, Lane, Model, Rounds, Trace, local_device
from autocompress.hwprofiles.robust import middle_mean

MARGIN = 0.03
"""Differences below this are never called: memory placement alone makes two sessions of one file differ so much."""
MIN_ROUNDS, MAX_ROUNDS, _RESAMPLES = 10, 400, 2000
_MOST_RUNS = 2000
_TURN_NS = 2e6
"""A turn's counted runs, and the uncounted ones before them, take so long (at most 16 runs)."""


@dataclass(frozen=True)
class Comparison:
    """A candidate against a baseline. ``ratio`` is candidate / baseline: below 1 is faster; intervals are 95 %.

    ``noise``: the interval of the same ratio for a second session of the baseline. ``verdict``: ``faster``, ``slower``
    or ``not measurably faster``. Latencies are milliseconds of one run: wall time, and with one thread without the time
    that other processes held the core.
    """

    ratio: float
    ratio_interval: tuple[float, float]
    noise: tuple[float, float]
    verdict: str
    candidate_p50_ms: float
    candidate_p90_ms: float
    baseline_p50_ms: float
    baseline_p90_ms: float
    rounds: int
    threads: int
    batch: int
    seconds: float
    seed: int

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @property
    def sentence(self) -> str:
        """The verdict with its numbers."""
        low, high = self.ratio_interval
        return (
            f"{self.verdict}: {1 / self.ratio:.2f}x the baseline's speed (95 % interval {1 / high:.2f}-{1 / low:.2f}), "
            f"{self.candidate_p50_ms:.3g} ms against {self.baseline_p50_ms:.3g} ms"
        )


@dataclass(frozen=True)
class Timing:
    """One of several models timed against a common reference; ``ms`` is ``ratio * reference_ms``, so comparable."""

    ms: float
    interval_ms: tuple[float, float]
    ratio: float
    ratio_interval: tuple[float, float]
    reference_ms: float
    rounds: int

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}


@dataclass(frozen=True)
class Latency:
    """One model's milliseconds: percentiles of single runs, the median's 95 % bootstrap interval, and the host's noise.

    ``noise``: the interval of the ratio of a second session of the same model to it. ``disturbed``: share of runs during
    which another process had the core.
    """

    p50_ms: float
    p90_ms: float
    p99_ms: float
    interval_ms: tuple[float, float]
    noise: tuple[float, float]
    disturbed: float
    runs: int
    threads: int
    batch: int
    seconds: float
    seed: int

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @property
    def sentence(self) -> str:
        """The numbers in words."""
        low, high = self.interval_ms
        return (
            f"{self.p50_ms:.3g} ms in the median (95 % interval {low:.3g}-{high:.3g}), 90 % of runs within "
            f"{self.p90_ms:.3g} ms and 99 % within {self.p99_ms:.3g} ms"
        )


def compare(
    candidate: Model,
    baseline: Model,
    *,
    inputs: Feeds | None = None,
    batch: int = 1,
    threads: int = 1,
    seconds: float = 10,
    seed: int = 0,
    device: Device | None = None,
) -> Comparison:
    """Time two ONNX models against each other for about ``seconds``, on this machine unless ``device`` is given.

    ``inputs``: name -> array for both models; random ones are made where it is ``None``. Faster or slower is said only
    where the ratio's whole interval lies outside the baseline's own noise and a margin of 3 %. Raises ``UsageError``
    for models that cannot be loaded or run.
    """
    models = [baseline, candidate, baseline]
    times = _times(models, inputs, batch, threads, seconds, seed, device)  # (n_rounds, 3)
    low, high = _interval(times[:, 1] / times[:, 0], seed)
    noise = _interval(times[:, 2] / times[:, 0], seed)
    band = max(math.log(1 + MARGIN), abs(math.log(noise[0])), abs(math.log(noise[1])))
    verdict = "faster" if math.log(high) < -band else "slower" if math.log(low) > band else "not measurably faster"
    spread = np.percentile(times / 1e6, [50, 90], axis=0)  # (2, 3)
    return Comparison(
        ratio=float(np.median(times[:, 1] / times[:, 0])),
        ratio_interval=(low, high),
        noise=noise,
        verdict=verdict,
        candidate_p50_ms=float(spread[0, 1]),
        candidate_p90_ms=float(spread[1, 1]),
        baseline_p50_ms=float(spread[0, 0]),
        baseline_p90_ms=float(spread[1, 0]),
        rounds=len(times),
        threads=threads,
        batch=batch,
        seconds=seconds,
        seed=seed,
    )


def measure_ms(
    models: Sequence[Model],
    reference: Model,
    *,
    inputs: Feeds | None = None,
    batch: int = 1,
    threads: int = 1,
    seconds: float = 10,
    seed: int = 0,
    device: Device | None = None,
) -> list[Timing]:
    """Time several ONNX models at once, each as its median ratio to ``reference`` in the same rounds.

    About ``seconds`` altogether. Raises ``UsageError`` for models that cannot be loaded or run.
    """
    times = _times([reference, *models], inputs, batch, threads, seconds, seed, device)  # (n_rounds, 1 + n_models)
    base = float(np.median(times[:, 0])) / 1e6
    found = []
    for i in range(1, times.shape[1]):
        ratios = times[:, i] / times[:, 0]
        ratio, (low, high) = float(np.median(ratios)), _interval(ratios, seed)
        found.append(Timing(ratio * base, (low * base, high * base), ratio, (low, high), base, len(times)))
    return found


def measure_one(
    model: Model,
    *,
    inputs: Feeds | None = None,
    batch: int = 1,
    threads: int = 1,
    seconds: float = 10,
    seed: int = 0,
    device: Device | None = None,
) -> Latency:
    """Time one ONNX model for about ``seconds``: every run counts, so that the percentiles are those of runs.

    A second session of the same model takes turns with it; what differs between the two is the host's noise.
    """
    _check(threads, batch, seconds)
    lane = Lane(model, threads, batch, seed, inputs, warm_up=10, slow_ns=0.0)
    rounds = (device or local_device()).rounds(
        [lane, lane], order=[0, 1, 1, 0], seconds=seconds, least=MIN_ROUNDS, most=_MOST_RUNS
    )
    turns = np.array(rounds.order) == 0
    runs = rounds.ns[:, turns].ravel() / 1e6  # (n_rounds * 2,)
    p50, p90, p99 = np.percentile(runs, [50, 90, 99])
    return Latency(
        p50_ms=float(p50),
        p90_ms=float(p90),
        p99_ms=float(p99),
        interval_ms=_interval(runs, seed),
        noise=_interval(rounds.lane(1) / rounds.lane(0), seed),
        disturbed=float(1 - rounds.quiet[:, turns].mean()),
        runs=len(runs),
        threads=threads,
        batch=batch,
        seconds=seconds,
        seed=seed,
    )


def node_trace(
    model: Model,
    *,
    inputs: Feeds | None = None,
    batch: int = 1,
    threads: int = 1,
    runs: int = 30,
    seed: int = 0,
    device: Device | None = None,
) -> tuple[Trace, Rounds]:
    """The profiler's nodes and their µs in each run; lane 1 of the rounds is the same model without the profiler."""
    _check(threads, batch, 1.0)
    lanes = [Lane(model, threads, batch, seed, inputs, trace=traced) for traced in (True, False)]
    count = max(runs, 3)
    rounds = (device or local_device()).rounds(lanes, seconds=0.0, least=count, most=count)
    return rounds.traces[0], rounds


def node_profile(
    model: Model,
    *,
    inputs: Feeds | None = None,
    batch: int = 1,
    threads: int = 1,
    runs: int = 30,
    seed: int = 0,
    device: Device | None = None,
) -> list[tuple[str, str, float]]:
    """(node, operator, microseconds) of the optimized graph in the order it runs, from ONNX Runtime's profiler.

    Nodes carry about 3 µs of the profiler's own time; use it to compare nodes, and :func:`compare` for totals.
    """
    trace, _ = node_trace(model, inputs=inputs, batch=batch, threads=threads, runs=runs, seed=seed, device=device)
    return [(node.name, node.op, middle_mean(trace.us[:, i])) for i, node in enumerate(trace.nodes)]


def _check(threads: int, batch: int, seconds: float) -> None:
    if threads < 1 or batch < 1 or not seconds > 0:
        raise UsageError(
            f"Timing needs threads >= 1, batch >= 1 and seconds > 0, "
            f"got threads={threads}, batch={batch}, seconds={seconds:g}."
        )


def _times(
    models: Sequence[Model],
    inputs: Feeds | None,
    batch: int,
    threads: int,
    seconds: float,
    seed: int,
    device: Device | None,
) -> FloatArray:
    """Nanoseconds of each model in each round, the mean of its two turns.  # (n_rounds, n_models)"""
    _check(threads, batch, seconds)
    usual = Lane(
        b"", threads, batch, seed, inputs, warm_up=5, settle_ns=_TURN_NS, settle_most=16, turn_ns=_TURN_NS, turn_most=16
    )
    lanes = [replace(usual, model=model) for model in models]
    order = list(range(len(models)))
    rounds = (device or local_device()).rounds(
        lanes, order=order + order[::-1], seconds=seconds, least=MIN_ROUNDS, most=MAX_ROUNDS
    )
    return np.column_stack([rounds.lane(i) for i in order])


def _interval(ratios: FloatArray, seed: int) -> tuple[float, float]:
    """95 % bootstrap interval of the median over rounds."""
    rng = np.random.default_rng(seed)
    picks = rng.integers(0, len(ratios), (_RESAMPLES, len(ratios)))
    low, high = np.percentile(np.median(ratios[picks], axis=1), [2.5, 97.5])
    return float(low), float(high)

"""Is it faster? Models timed against each other in the same rounds, with intervals and the host's own noise.

A host's speed moves by tens of percent within minutes, so times of different minutes are not compared: each round runs
all models forwards and backwards (A B B A), ratios are taken within the round, and the median over rounds gets a
bootstrap interval (Efron & Tibshirani 1993, percentile method).
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from autocompress.errors import UsageError
from autocompress.hwprofiles.sessions import Feeds, middle_mean, open_session, random_feeds, read_trace, timer

FloatArray = npt.NDArray[np.float64]
MARGIN = 0.03
"""Differences below this are never called: memory placement alone makes two sessions of one file differ so much."""
MIN_ROUNDS, MAX_ROUNDS, _RESAMPLES = 10, 400, 2000
_TURN_NS, _SLOW_NS = 2e6, 2e7


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


def compare(
    candidate: Path | bytes,
    baseline: Path | bytes,
    *,
    inputs: Feeds | None = None,
    batch: int = 1,
    threads: int = 1,
    seconds: float = 10,
    seed: int = 0,
) -> Comparison:
    """Time two ONNX models against each other for about ``seconds``.

    ``inputs``: name -> array for both models; random ones are made where it is ``None``. Faster or slower is said only
    where the ratio's whole interval lies outside the baseline's own noise and a margin of 3 %. Raises ``UsageError``
    for models that cannot be loaded or run.
    """
    models = [baseline, candidate, baseline]
    times = _rounds(models, inputs, batch, threads, seconds, seed)  # (n_rounds, 3)
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
    models: Sequence[Path | bytes],
    reference: Path | bytes,
    *,
    inputs: Feeds | None = None,
    batch: int = 1,
    threads: int = 1,
    seconds: float = 10,
    seed: int = 0,
) -> list[Timing]:
    """Time several ONNX models at once, each as its median ratio to ``reference`` in the same rounds.

    About ``seconds`` altogether. Raises ``UsageError`` for models that cannot be loaded or run.
    """
    times = _rounds([reference, *models], inputs, batch, threads, seconds, seed)  # (n_rounds, 1 + n_models)
    base = float(np.median(times[:, 0])) / 1e6
    found = []
    for i in range(1, times.shape[1]):
        ratios = times[:, i] / times[:, 0]
        ratio, (low, high) = float(np.median(ratios)), _interval(ratios, seed)
        found.append(Timing(ratio * base, (low * base, high * base), ratio, (low, high), base, len(times)))
    return found


def node_profile(
    model: Path | bytes, *, inputs: Feeds | None = None, batch: int = 1, threads: int = 1, runs: int = 30, seed: int = 0
) -> list[tuple[str, str, float]]:
    """(node, operator, microseconds) of the optimized graph in the order it runs, from ONNX Runtime's profiler.

    Nodes carry about 3 µs of the profiler's own time; use it to compare nodes, and :func:`compare` for totals.
    """
    _check(threads, batch, 1.0)
    with tempfile.TemporaryDirectory(prefix="autocompress-") as folder:
        session = open_session(model, threads, Path(folder) / "trace")
        once = timer(session, _feeds(session, inputs, batch, seed), threads)
        for _ in range(max(runs, 3)):
            once()
        traced = read_trace(session)[1:]
    nodes = [(event.name, event.op) for event in traced[0]]
    times = np.array([[event.us for event in run] for run in traced])  # (n_runs, n_nodes)
    return [(name, op, middle_mean(times[:, i])) for i, (name, op) in enumerate(nodes)]


def _check(threads: int, batch: int, seconds: float) -> None:
    if threads < 1 or batch < 1 or not seconds > 0:
        raise UsageError(
            f"Timing needs threads >= 1, batch >= 1 and seconds > 0, "
            f"got threads={threads}, batch={batch}, seconds={seconds:g}."
        )


def _feeds(session: Any, inputs: Feeds | None, batch: int, seed: int) -> Feeds:
    if inputs is None:
        return random_feeds(session, batch, seed)
    names = [value.name for value in session.get_inputs()]
    missing = [name for name in names if name not in inputs]
    if missing:
        raise UsageError(
            f"The model needs inputs {', '.join(names)}; {', '.join(missing)} is missing from those given."
        )
    return {name: inputs[name] for name in names}


def _rounds(
    models: Sequence[Path | bytes], inputs: Feeds | None, batch: int, threads: int, seconds: float, seed: int
) -> FloatArray:
    """Nanoseconds of each model in each round, the mean of its two turns.  # (n_rounds, n_models)"""
    _check(threads, batch, seconds)
    sessions = [open_session(model, threads) for model in models]
    turns = [_turn(timer(s, _feeds(s, inputs, batch, seed), threads)) for s in sessions]
    order = list(range(len(models)))
    end, rows = time.perf_counter() + seconds, list[list[float]]()
    while len(rows) < MIN_ROUNDS or (time.perf_counter() < end and len(rows) < MAX_ROUNDS):
        row = [0.0] * len(models)
        for i in order + order[::-1]:
            row[i] += turns[i]() / 2
        rows.append(row)
    return np.array(rows)


def _turn(once: Callable[[], tuple[float, bool]]) -> Callable[[], float]:
    """One model's turn in a round: the median of as many runs as make 2 ms, after as long a warm-up.

    The warm-up (none from 20 ms a run on) matters because the others have just filled the caches with what is theirs.
    """
    usual = float(np.median([once()[0] for _ in range(5)]))
    runs = int(min(max(_TURN_NS / usual, 1), 16))
    warm_up = runs if usual < _SLOW_NS else 0

    def turn() -> float:
        for _ in range(warm_up):
            once()
        return float(np.median([once()[0] for _ in range(runs)]))

    return turn


def _interval(ratios: FloatArray, seed: int) -> tuple[float, float]:
    """95 % bootstrap interval of the median over rounds."""
    rng = np.random.default_rng(seed)
    picks = rng.integers(0, len(ratios), (_RESAMPLES, len(ratios)))
    low, high = np.percentile(np.median(ratios[picks], axis=1), [2.5, 97.5])
    return float(low), float(high)

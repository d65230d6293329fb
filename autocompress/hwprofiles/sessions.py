"""ONNX Runtime sessions with pinned threads, and the times of their nodes as its own profiler tells them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from autocompress.errors import MeasurementError, UsageError

Feeds = Mapping[str, npt.NDArray[Any]]
_ONNX_TO_NUMPY = {
    "tensor(float)": np.float32,
    "tensor(double)": np.float64,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(uint8)": np.uint8,
    "tensor(int8)": np.int8,
    "tensor(bool)": np.bool_,
}


@dataclass(frozen=True)
class NodeEvent:
    """One run of one node: ``output_shape`` is that of its first output, ``us`` whole microseconds."""

    name: str
    op: str
    us: float
    output_shape: tuple[int, ...]


def open_session(
    model: bytes | Path, threads: int, trace: Path | None = None, *, optimized: bool = True
) -> ort.InferenceSession:
    """A session on the CPU provider with all optimizations (or none), ``threads`` workers and sequential execution.

    Workers spin while they wait (ONNX Runtime's default): lowest latency for one model on an otherwise idle host.
    ``trace`` is the prefix of the profiler's file. Raises ``UsageError`` when the model cannot be loaded.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = 3
    if not optimized:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if trace is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(trace)
    source = str(model) if isinstance(model, Path) else model
    try:
        return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime raises a dozen classes of its own
        name = str(model) if isinstance(model, Path) else "the model"
        reason = str(error).splitlines()[0]
        raise UsageError(f"ONNX Runtime must be able to load what is timed, but it refuses {name}: {reason}") from error


def random_feeds(session: ort.InferenceSession, batch: int, seed: int = 0) -> dict[str, npt.NDArray[Any]]:
    """Random inputs of the right shapes; free dimensions become ``batch`` (the first) or 1."""
    rng = np.random.default_rng(seed)
    feeds: dict[str, npt.NDArray[Any]] = {}
    for value in session.get_inputs():
        shape = [d if isinstance(d, int) and d > 0 else (batch if i == 0 else 1) for i, d in enumerate(value.shape)]
        kind = _ONNX_TO_NUMPY.get(value.type)
        if kind is None:
            raise UsageError(f"Input {value.name!r} has type {value.type}, which cannot be made up; pass `inputs`.")
        real = np.issubdtype(kind, np.floating)
        feeds[value.name] = (rng.standard_normal(shape) if real else np.zeros(shape)).astype(kind)
    return feeds


def timer(session: ort.InferenceSession, feeds: Feeds, threads: int) -> Callable[[], tuple[float, bool]]:
    """A function that runs the session once; one run is made at once, to check the inputs.

    Returns nanoseconds, and whether the run was undisturbed: CPU time tells if another process had the core. They are
    wall time; with one thread the time others held the core is taken out, for it belongs to the host's load.
    """
    names, dictionary = [o.name for o in session.get_outputs()], dict(feeds)
    try:
        session.run(names, dictionary)
    except Exception as error:
        raise UsageError(f"The model cannot be run on the given inputs: {str(error).splitlines()[0]}") from error

    def once() -> tuple[float, bool]:
        cpu, start = time.thread_time_ns(), time.perf_counter_ns()
        session.run(names, dictionary)
        wall = time.perf_counter_ns() - start
        cpu = time.thread_time_ns() - cpu
        quiet = wall - cpu < max(5_000, 0.02 * wall)
        return float(wall if quiet or threads > 1 else cpu), quiet

    return once


def read_trace(session: ort.InferenceSession) -> list[list[NodeEvent]]:
    """End the session's profiling and return its node events, a list a run in order; the trace file is removed."""
    path = Path(session.end_profiling())
    try:
        events = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise MeasurementError(f"ONNX Runtime's profile could not be read ({error}); is the disk full?") from error
    finally:
        path.unlink(missing_ok=True)
    runs: list[list[NodeEvent]] = [[]]
    # A run's `model_run` event is written when the run ends, after those of its nodes.
    for event in events:
        if event.get("name") == "model_run":
            runs.append([])
        elif event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            shapes = event["args"].get("output_type_shape") or [{}]
            shape = tuple(next(iter(shapes[0].values()), ()))
            name = event["name"].removesuffix("_kernel_time").removeprefix("fused ")
            runs[-1].append(NodeEvent(name, event["args"]["op_name"], float(event["dur"]), shape))
    return [run for run in runs if run]


def middle_mean(values: npt.NDArray[np.float64] | Sequence[float]) -> float:
    """Mean of the middle half (of fewer than 8 values, the median): as robust as the median, but finer than the
    profiler's whole microseconds."""
    ordered = np.sort(np.asarray(values, np.float64))
    quarter = len(ordered) // 4 if len(ordered) >= 8 else (len(ordered) - 1) // 2
    return float(ordered[quarter : len(ordered) - quarter].mean())

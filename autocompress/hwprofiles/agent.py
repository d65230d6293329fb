"""What runs on the device that is measured: a single file that needs only Python 3.10, numpy and onnxruntime.

Copied alone to another machine it answers requests, one JSON document a line: ``python3 agent.py`` reads them from
standard input and writes replies to standard output; ``--requests FILE --replies FILE`` does the same with files. On
this machine it is imported, so every measurement is made by this code. It builds no graphs and draws no conclusions.

Requests are ``{"id": 1, "do": NAME, ...}``, replies ``{"id": 1, "ok": true, "value": ...}``, or with ``"ok": false``,
``"error"`` (one sentence) and ``"kind"`` (``usage`` or ``measurement``). While rounds run, ``{"id": 1, "progress": n}``
comes about once a second. ``NAME``: ``hello``, ``put`` (a model's bytes by their SHA-256), ``rounds``, ``outputs``,
``stop``. Whoever closes the pipes stops a measurement within one round.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

try:
    import numpy as np
    import onnxruntime as ort
except ImportError as missing:
    if __name__ != "__main__":
        raise
    sys.stdout.write(json.dumps({"id": 0, "ok": False, "kind": "missing", "error": str(missing)}) + "\n")
    sys.exit(3)

PROTOCOL = 1
Run = Callable[[], "tuple[float, bool]"]
FOREVER = 1e9
"""Seconds: no limit."""
_REPORT_SECONDS = 1.0
_CPU_FLAGS = (
    "sse4_2", "avx", "avx2", "fma", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "asimd", "asimddp", "i8mm", "sve",
)  # fmt: skip
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


class AgentError(Exception):
    """One sentence for a person; ``kind`` is ``usage`` (of the request) or ``measurement`` (of the device)."""

    def __init__(self, message: str, kind: str = "usage") -> None:
        super().__init__(message)
        self.kind = kind


def describe_host() -> dict[str, Any]:
    """CPU model, the flags that decide about kernels, cores this process may use, operating system."""
    model, flags = platform.processor() or platform.machine(), set[str]()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        key, _, value = (part.strip() for part in line.partition(":"))
        if key in ("model name", "Hardware"):
            model = value
        elif key in ("flags", "Features"):
            flags = set(value.split())
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    known = [flag for flag in _CPU_FLAGS if flag in flags]
    return {"cpu": model, "flags": known, "cores": cores, "system": platform.platform(), "machine": platform.machine()}


def encode_array(array: np.ndarray[Any, Any]) -> dict[str, Any]:
    """An array as JSON values."""
    data = base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()
    return {"dtype": array.dtype.str, "shape": list(array.shape), "data": data}


def decode_array(value: Mapping[str, Any]) -> np.ndarray[Any, Any]:
    """Inverse of :func:`encode_array`."""
    return np.frombuffer(base64.b64decode(value["data"]), np.dtype(value["dtype"])).reshape(value["shape"])


# ---------------------------------------------------------------- sessions


def open_session(model: Any, name: str, threads: int, trace: str = "", *, optimized: bool = True) -> Any:
    """A session on the CPU provider with all optimizations (or none), ``threads`` workers and sequential execution.

    Workers spin while they wait (ONNX Runtime's default): lowest latency for one model on an otherwise idle host.
    ``model`` is a path or bytes, ``trace`` the prefix of the profiler's file.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = 3
    if not optimized:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if trace:
        options.enable_profiling, options.profile_file_prefix = True, trace
    try:
        return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime raises a dozen classes of its own
        reason = str(error).splitlines()[0]
        raise AgentError(f"ONNX Runtime must be able to load what is timed, but it refuses {name}: {reason}") from error


def random_feeds(session: Any, batch: int, seed: int = 0) -> dict[str, np.ndarray[Any, Any]]:
    """Random inputs of the right shapes; free dimensions become ``batch`` (the first) or 1."""
    rng = np.random.default_rng(seed)
    feeds: dict[str, np.ndarray[Any, Any]] = {}
    for value in session.get_inputs():
        shape = [d if isinstance(d, int) and d > 0 else (batch if i == 0 else 1) for i, d in enumerate(value.shape)]
        kind = _ONNX_TO_NUMPY.get(value.type)
        if kind is None:
            raise AgentError(f"Input {value.name!r} has type {value.type}, which cannot be made up; pass `inputs`.")
        real = np.issubdtype(kind, np.floating)
        feeds[value.name] = (rng.standard_normal(shape) if real else np.zeros(shape)).astype(kind)
    return feeds


def given_feeds(session: Any, inputs: Mapping[str, Any]) -> dict[str, np.ndarray[Any, Any]]:
    """The model's inputs out of those given."""
    names = [value.name for value in session.get_inputs()]
    missing = [name for name in names if name not in inputs]
    if missing:
        raise AgentError(
            f"The model needs inputs {', '.join(names)}; {', '.join(missing)} is missing from those given."
        )
    return {name: decode_array(inputs[name]) for name in names}


def timer(session: Any, feeds: Mapping[str, Any], threads: int) -> Run:
    """A function that runs the session once; one run is made at once, to check the inputs.

    Returns nanoseconds, and whether the run was undisturbed: CPU time tells if another process had the core. They are
    wall time; with one thread the time others held the core is taken out, for it belongs to the host's load.
    """
    names, dictionary = [o.name for o in session.get_outputs()], dict(feeds)
    try:
        session.run(names, dictionary)
    except Exception as error:
        raise AgentError(f"The model cannot be run on the given inputs: {str(error).splitlines()[0]}") from error

    def once() -> tuple[float, bool]:
        cpu, start = time.thread_time_ns(), time.perf_counter_ns()
        session.run(names, dictionary)
        wall = time.perf_counter_ns() - start
        cpu = time.thread_time_ns() - cpu
        quiet = wall - cpu < max(5_000, 0.02 * wall)
        return float(wall if quiet or threads > 1 else cpu), quiet

    return once


def read_trace(session: Any, counted: list[int]) -> dict[str, Any]:
    """End the session's profiling: its nodes in the order they run, and µs of each in the ``counted`` runs.

    ``{"nodes": [{"name", "op", "inputs": [[dtype, shape], ...], "outputs"}], "us": (n_runs, n_nodes)}``.
    """
    path = Path(session.end_profiling())
    try:
        events = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        message = f"ONNX Runtime's profile could not be read ({error}); is the disk full?"
        raise AgentError(message, "measurement") from error
    finally:
        path.unlink(missing_ok=True)
    runs: list[list[Any]] = [[]]
    # A run's `model_run` event is written when the run ends, after those of its nodes.
    for event in events:
        if event.get("name") == "model_run":
            runs.append([])
        elif event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            runs[-1].append(event)
    runs = [run for run in runs if run]
    if not runs:
        return {"nodes": [], "us": [[] for _ in counted]}
    nodes = [_node(event) for event in runs[0]]
    if any(len(run) != len(nodes) for run in runs):
        raise AgentError("A model can be profiled if it runs the same nodes every time, and this one does not.")
    return {"nodes": nodes, "us": [[float(event["dur"]) for event in runs[i]] for i in counted]}


def _node(event: Mapping[str, Any]) -> dict[str, Any]:
    def types(key: str) -> list[Any]:
        return [[kind, list(shape)] for entry in event["args"].get(key) or [] for kind, shape in entry.items()]

    name = event["name"].removesuffix("_kernel_time").removeprefix("fused ")
    inputs, outputs = types("input_type_shape"), types("output_type_shape")
    return {"name": name, "op": event["args"]["op_name"], "inputs": inputs, "outputs": outputs}


# ---------------------------------------------------------------- rounds


class Lane:
    """A session that takes turns with others. A turn is a few uncounted runs, then a few counted ones.

    Uncounted runs matter because the others have just filled the caches with what is theirs. Both are as many as make
    ``settle_ns`` and ``turn_ns``; from ``slow_ns`` a run on, none is uncounted.
    """

    def __init__(self, session: Any, once: Run, plan: Mapping[str, Any]) -> None:
        self.session, self._once, self._fastest = session, once, plan["statistic"] == "min"
        warm = [once()[0] for _ in range(plan["warm_up"])]
        usual = float(np.median(warm)) if warm else 1.0
        least = 1 if usual < plan["slow_ns"] else 0
        self._settle = int(min(max(plan["settle_ns"] / usual, least), plan["settle_most"]))
        self._count = int(min(max(plan["turn_ns"] / usual, 1), plan["turn_most"]))
        self._runs = 1 + len(warm)
        self.counted: list[int] = []
        """Which of the session's runs were the last of a turn."""

    def turn(self) -> tuple[float, bool]:
        """Nanoseconds (median or fastest of the counted runs), and whether all were undisturbed."""
        for _ in range(self._settle):
            self._once()
        runs = [self._once() for _ in range(self._count)]
        self._runs += self._settle + self._count
        self.counted.append(self._runs - 1)
        ns = [run[0] for run in runs]
        return min(ns) if self._fastest else statistics.median(ns), all(run[1] for run in runs)


class Agent:
    """Answers requests; keeps the models it was sent (in memory, or in ``folder``) and the sessions to be kept."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._models: dict[str, bytes] = {}
        self._kept: dict[str, Lane] = {}

    def answer(self, request: Mapping[str, Any], report: Callable[[int], None]) -> Any:
        """The value of a reply. Raises ``AgentError``."""
        done = {"hello": self._hello, "put": self._put, "outputs": self._outputs}.get(request["do"])
        if done:
            return done(request)
        if request["do"] == "rounds":
            return self._rounds(request, report)
        raise AgentError(f"The agent knows hello, put, outputs, rounds and stop, got {request['do']!r}.")

    def _hello(self, request: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "protocol": PROTOCOL,
            "pid": os.getpid(),
            "agent": hashlib.sha256(Path(__file__).read_bytes()).hexdigest(),
            "python": platform.python_version(),
            "numpy": np.__version__,
            "onnxruntime": str(ort.__version__),
            "providers": list(ort.get_available_providers()),
            "host": describe_host(),
        }

    def _put(self, request: Mapping[str, Any]) -> None:
        data = base64.b64decode(request["data"])
        if hashlib.sha256(data).hexdigest() != request["model"]:
            raise AgentError("A model must arrive as it was sent, and its hash differs; send it again.", "measurement")
        self._models[request["model"]] = data

    def _source(self, lane: Mapping[str, Any]) -> Any:
        """A path or bytes: what ``InferenceSession`` takes. In this process they come as ``path`` or ``data``."""
        if "path" in lane or "data" in lane:
            return lane.get("path") or lane["data"]
        if lane["model"] in self._models:
            return self._models[lane["model"]]
        path = (self._folder or Path()) / f"{lane['model']}.onnx"
        if self._folder is None or not path.is_file():
            raise AgentError("A model is sent before it is timed, and this one was not.", "measurement")
        return str(path)

    def _outputs(self, request: Mapping[str, Any]) -> list[list[dict[str, Any]]]:
        """What each model computes on the same inputs."""
        found = []
        for plan in request["models"]:
            session = open_session(self._source(plan), plan["name"], 1, optimized=request["optimized"])
            arrays = session.run(None, given_feeds(session, request["inputs"]))
            found.append([encode_array(array) for array in arrays])
        return found

    def _lane(self, plan: Mapping[str, Any], trace: str) -> Lane:
        key = json.dumps({k: plan.get(k) for k in ("model", "path", "threads", "batch", "seed")})
        if plan["keep"] and key in self._kept:
            return self._kept[key]
        session = open_session(self._source(plan), plan["name"], plan["threads"], trace if plan["trace"] else "")
        inputs = plan.get("inputs")
        feeds = given_feeds(session, inputs) if inputs else random_feeds(session, plan["batch"], plan["seed"])
        lane = Lane(session, timer(session, feeds, plan["threads"]), plan)
        if plan["keep"]:
            self._kept[key] = lane
        return lane

    def _rounds(self, request: Mapping[str, Any], report: Callable[[int], None]) -> dict[str, Any]:
        """Take turns in ``order``, ``least`` to ``most`` rounds, until ``seconds`` have passed (at three rounds from
        ``at_most`` on, opening included). Models are opened in order within ``open_within`` seconds; the rest is left.

        ``{"opened": n, "order": lanes, "ns": (n_rounds, n_turns), "quiet": the same, "traces": {lane: trace}}``.
        """
        start = time.perf_counter()
        with tempfile.TemporaryDirectory(prefix="autocompress-") as folder:
            lanes = []
            for i, plan in enumerate(request["lanes"]):
                if i and time.perf_counter() - start > request["open_within"]:
                    break
                lanes.append(self._lane(plan, str(Path(folder) / f"trace{i}")))
            order = [i for i in request["order"] if i < len(lanes)]
            since = start if request["opening_counts"] else time.perf_counter()
            ns: list[list[float]] = []
            quiet: list[list[bool]] = []
            reported = time.perf_counter()
            while len(ns) < request["most"]:
                now = time.perf_counter()
                enough = len(ns) >= request["least"] and now - since > request["seconds"]
                if enough or (len(ns) >= 3 and now - start > request["at_most"]):
                    break
                if now - reported > _REPORT_SECONDS:
                    report(len(ns))
                    reported = now
                turns = [lanes[i].turn() for i in order]
                ns.append([turn[0] for turn in turns])
                quiet.append([turn[1] for turn in turns])
            traced = [i for i, plan in enumerate(request["lanes"][: len(lanes)]) if plan["trace"]]
            traces = {str(i): read_trace(lanes[i].session, lanes[i].counted) for i in traced}
        return {"opened": len(lanes), "order": order, "ns": ns, "quiet": quiet, "traces": traces}


# ---------------------------------------------------------------- the wire


def serve(agent: Agent, lines: Iterable[str], write: Callable[[dict[str, Any]], None]) -> None:
    """Answer each line until ``stop`` or the end."""
    for line in lines:
        if not line.strip():
            continue
        request = json.loads(line)
        number = request["id"]
        if request["do"] == "stop":
            write({"id": number, "ok": True, "value": None})
            return

        def report(done: int, number: int = number) -> None:
            write({"id": number, "progress": done})

        try:
            write({"id": number, "ok": True, "value": agent.answer(request, report)})
        except AgentError as error:
            write({"id": number, "ok": False, "kind": error.kind, "error": str(error)})


def _lines(stream: Any) -> Iterator[str]:
    """Lines as they come: iterating over a pipe would wait for a full buffer."""
    while line := stream.readline():
        yield line


def main() -> int:
    """The command: see the module's own words."""
    parser = argparse.ArgumentParser(description="Times ONNX models for autocompress, as it is asked to.")
    parser.add_argument("--folder", type=Path, help="where models lie as HASH.onnx")
    parser.add_argument("--requests", type=Path, help="read requests from this file")
    parser.add_argument("--replies", type=Path, help="and write the replies to this one")
    given = parser.parse_args()
    agent = Agent(given.folder)
    if given.requests:
        replies: list[str] = []
        serve(agent, given.requests.read_text().splitlines(), lambda reply: replies.append(json.dumps(reply)))
        given.replies.write_text("\n".join(replies) + "\n")
        return 0
    # What libraries print must not come between the replies.
    wire = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def write(reply: dict[str, Any]) -> None:
        wire.write(json.dumps(reply) + "\n")
        wire.flush()

    try:
        serve(agent, _lines(sys.stdin), write)
    except (BrokenPipeError, KeyboardInterrupt):
        os._exit(
            1
        )  # whoever asked has gone; nobody reads a traceback, and nothing is left to clean but what the OS does
    return 0


if __name__ == "__main__":
    sys.exit(main())

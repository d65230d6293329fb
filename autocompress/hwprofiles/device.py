"""The controlling side of the agent: typed requests over a link to wherever it runs, errors in this package's classes.

What runs at measuring time is in ``agent.py``, on this machine too; a :class:`Link` only carries requests there.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import onnx

from autocompress.errors import MeasurementError, UsageError
from autocompress.hwprofiles import agent

Feeds = Mapping[str, npt.NDArray[Any]]
FloatArray = npt.NDArray[np.float64]
Model = bytes | Path


@dataclass(frozen=True)
class Node:
    """A node of the optimized graph: types and shapes of its inputs and outputs as they are at run time."""

    name: str
    op: str
    inputs: tuple[tuple[str, tuple[int, ...]], ...] = ()
    outputs: tuple[tuple[str, tuple[int, ...]], ...] = ()


@dataclass(frozen=True)
class NodeEvent:
    """One run of one node: ``output_shape`` is that of its first output, ``us`` whole microseconds."""

    name: str
    op: str
    us: float
    output_shape: tuple[int, ...]


@dataclass(frozen=True)
class Trace:
    """What ONNX Runtime's profiler tells of a session: its nodes in order, and µs of each in each round."""

    nodes: tuple[Node, ...]
    us: FloatArray  # (n_rounds, n_nodes)

    @property
    def runs(self) -> list[list[NodeEvent]]:
        """The events, a list a round."""
        shapes = [node.outputs[0][1] if node.outputs else () for node in self.nodes]
        return [
            [NodeEvent(node.name, node.op, us, shape) for node, us, shape in zip(self.nodes, row, shapes, strict=True)]
            for row in self.us.tolist()
        ]


@dataclass(frozen=True)
class Lane:
    """A model that takes turns with others; see ``agent.Lane`` for what a turn is.

    ``keep``: the session stays open for later rounds. ``warm_up`` runs come after a first one, and tell how long one
    takes. ``inputs`` are random where they are ``None``.
    """

    model: Model
    threads: int = 1
    batch: int = 1
    seed: int = 0
    inputs: Feeds | None = None
    trace: bool = False
    keep: bool = False
    warm_up: int = 1
    settle_ns: float = 0.0
    settle_most: int = 1
    slow_ns: float = 2e7
    turn_ns: float = 0.0
    turn_most: int = 1
    statistic: Literal["median", "min"] = "median"


@dataclass(frozen=True)
class Rounds:
    """What rounds gave: nanoseconds and undisturbedness of each turn; ``order`` names the lane of each turn."""

    ns: FloatArray  # (n_rounds, n_turns)
    quiet: npt.NDArray[np.bool_]  # (n_rounds, n_turns)
    order: tuple[int, ...]
    opened: int
    traces: Mapping[int, Trace]

    def lane(self, i: int) -> FloatArray:
        """Nanoseconds of a lane, the mean of its turns in a round.  # (n_rounds,)"""
        mean: FloatArray = self.ns[:, [turn for turn, lane in enumerate(self.order) if lane == i]].mean(axis=1)
        return mean

    def undisturbed(self, i: int) -> npt.NDArray[np.bool_]:
        """Whether all of a lane's turns were undisturbed.  # (n_rounds,)"""
        return np.asarray(self.quiet[:, [turn for turn, lane in enumerate(self.order) if lane == i]].all(axis=1))


class Link(Protocol):
    """A way to an agent. ``call`` raises ``agent.AgentError`` for what the agent refuses, ``MeasurementError`` when the
    device is gone."""

    name: str
    """What the user calls the device: ``local``, ``ssh://…``, ``adb://…``."""

    def call(self, request: dict[str, Any], report: Callable[[int], None]) -> Any:
        """The value of the agent's reply."""

    def put(self, digest: str, data: bytes) -> None:
        """Bring a model to the device."""

    def close(self) -> None:
        """End the agent."""


class LocalLink:
    """The agent in this process."""

    name = "local"

    def __init__(self) -> None:
        self._agent = agent.Agent()

    def call(self, request: dict[str, Any], report: Callable[[int], None]) -> Any:
        """The value of the agent's reply."""
        return self._agent.answer(request, report)

    def put(self, digest: str, data: bytes) -> None:
        """Models are handed over as they are."""

    def close(self) -> None:
        """Nothing to end."""


class Device:
    """A device that is measured, over its link. Use as a context manager; sessions end with it.

    Raises ``UsageError`` for models it cannot load or run, ``MeasurementError`` when it vanishes.
    """

    def __init__(self, link: Link) -> None:
        self._link, self._sent = link, set[str]()
        try:
            self.hello: Mapping[str, Any] = self._call({"do": "hello"})
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Device:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the agent; harmless when it has ended."""
        self._link.close()

    @property
    def name(self) -> str:
        """What the user calls it."""
        return self._link.name

    @property
    def host(self) -> dict[str, Any]:
        """CPU model, flags, cores, system."""
        return dict(self.hello["host"])

    def rounds(
        self,
        lanes: Sequence[Lane],
        *,
        seconds: float,
        least: int,
        most: int,
        order: Sequence[int] | None = None,
        at_most: float = agent.FOREVER,
        open_within: float = agent.FOREVER,
        opening_counts: bool = False,
        report: Callable[[int], None] = lambda done: None,
    ) -> Rounds:
        """Time ``lanes`` in turns: ``least`` to ``most`` rounds until ``seconds`` have passed; see the agent's words."""
        value = self._call(
            {
                "do": "rounds",
                "lanes": [self._plan(lane) for lane in lanes],
                "order": list(range(len(lanes)) if order is None else order),
                "seconds": seconds,
                "least": least,
                "most": most,
                "at_most": at_most,
                "open_within": open_within,
                "opening_counts": opening_counts,
            },
            report,
        )
        traces = {int(i): _trace(trace) for i, trace in value["traces"].items()}
        turns = len(value["order"])
        ns = np.array(value["ns"], np.float64).reshape(-1, turns)
        quiet = np.array(value["quiet"], np.bool_).reshape(-1, turns)
        return Rounds(ns, quiet, tuple(value["order"]), value["opened"], traces)

    def outputs(
        self, models: Sequence[Model], inputs: Feeds, *, optimized: bool = True
    ) -> list[list[npt.NDArray[Any]]]:
        """What each model computes there, with all of ONNX Runtime's optimizations or none."""
        plans = [self._where(model) for model in models]
        request = {"do": "outputs", "optimized": optimized, "models": plans, "inputs": _encoded(inputs)}
        return [[agent.decode_array(value) for value in values] for values in self._call(request)]

    def _plan(self, lane: Lane) -> dict[str, Any]:
        fields = {k: v for k, v in lane.__dict__.items() if k not in ("model", "inputs")}
        inputs = {"inputs": _encoded(lane.inputs)} if lane.inputs is not None else {}
        return fields | self._where(lane.model) | inputs

    def _where(self, model: Model) -> dict[str, Any]:
        """Where the agent finds a model; a remote one is sent it first."""
        name = {"name": str(model) if isinstance(model, Path) else "the model"}
        if isinstance(self._link, LocalLink):
            # A path as it is: what the file keeps in files beside it is found there.
            if isinstance(model, Path):
                return {"path": str(model), **name}
            return {"data": model, "model": hashlib.sha256(model).hexdigest(), **name}
        data = model if isinstance(model, bytes) else read_model(model)
        digest = hashlib.sha256(data).hexdigest()
        if digest not in self._sent:
            self._guarded(lambda: self._link.put(digest, data))
            self._sent.add(digest)
        return {"model": digest, **name}

    def _call(self, request: dict[str, Any], report: Callable[[int], None] = lambda done: None) -> Any:
        return self._guarded(lambda: self._link.call(request, report))

    def _guarded(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except agent.AgentError as error:
            kind = UsageError if error.kind == "usage" else MeasurementError
            where = "" if isinstance(self._link, LocalLink) else f"{self.name}: "
            raise kind(f"{where}{error}") from error


@functools.cache
def local_device() -> Device:
    """This machine, measured by the agent in this process."""
    return Device(LocalLink())


def _encoded(inputs: Feeds) -> dict[str, Any]:
    return {name: agent.encode_array(np.asarray(array)) for name, array in inputs.items()}


def _trace(value: Mapping[str, Any]) -> Trace:
    def types(values: list[Any]) -> tuple[tuple[str, tuple[int, ...]], ...]:
        return tuple((kind, tuple(shape)) for kind, shape in values)

    nodes = tuple(Node(n["name"], n["op"], types(n["inputs"]), types(n["outputs"])) for n in value["nodes"])
    return Trace(nodes, np.array(value["us"], np.float64).reshape(-1, len(nodes)))


def read_model(path: Path) -> bytes:
    """A model file as one piece, with the weights that it keeps in files beside it."""
    try:
        proto = onnx.load(path, load_external_data=False)
        if any(t.data_location == onnx.TensorProto.EXTERNAL for t in proto.graph.initializer):
            return bytes(onnx.load(path).SerializeToString())
        return path.read_bytes()
    except OSError as error:
        raise UsageError(f"The model must be a readable file, {path} is not: {error.strerror or error}.") from None
    except Exception as error:  # protobuf raises classes of its own
        raise UsageError(f"The model must be an ONNX file, {path} is not: {str(error).splitlines()[0]}") from None

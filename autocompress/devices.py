"""One more device for a finished job: the latency of all its plans there, predicted without judging anything again.

Needs the task's model for its operators, and a profile; no data, no database, no search.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from autocompress.costs import CostModel
from autocompress.errors import StoreError, UsageError
from autocompress.graph import trace
from autocompress.hwprofiles import HardwareProfile
from autocompress.prepare import kernels_of, notes_of_profiles, offered
from autocompress.report import device_row
from autocompress.results import JobResult, OpRow, Point, Request
from autocompress.space import make_space
from autocompress.tasks import Task, load_task
from autocompress.types import METRICS, Budget, Kernel, cost_key
from autocompress.validate import same_batch

_NAME = re.compile(r"\w[\w.-]*")


@dataclass(frozen=True)
class Prediction:
    """Latencies of a result's plans on one device, by plan id (ms); ``ops``: of each operator, where the result lists them.

    ``intervals``: relative half widths, where the profile states an error. ``row``: what the result says of the device.
    """

    device: str
    latency_ms: Mapping[str, float]
    intervals: Mapping[str, float]
    ops: Mapping[str, Sequence[float]]
    row: Mapping[str, Any]
    notes: tuple[str, ...]

    def added_to(self, result: JobResult) -> JobResult:
        """The result with this device in it. Raises ``UsageError`` where it is there already."""
        _refuse_known(result, self.device)
        return result.model_copy(
            update={
                "original": self._point(result.original),
                "points": tuple(map(self._point, result.points)),
                "devices": {**result.devices, self.device: dict(self.row)},
                "notes": (*result.notes, *self.notes),
            }
        )

    def _point(self, point: Point) -> Point:
        key = cost_key("latency_ms", self.device)
        intervals = (
            {**point.intervals, key: self.intervals[point.id]} if point.id in self.intervals else point.intervals
        )
        ops = point.ops and tuple(
            op.model_copy(update={"predicted_ms": {**op.predicted_ms, self.device: ms}})
            for op, ms in zip(point.ops, self.ops[point.id], strict=True)
        )
        costs = {**point.costs, key: self.latency_ms[point.id]}
        return point.model_copy(update={"costs": costs, "intervals": intervals, "ops": ops})


def predict(
    result: JobResult, profile: HardwareProfile, name: str | None = None, task: Task | None = None
) -> Prediction:
    """Latencies of all plans of a finished job on another device.

    ``name``: what budgets call the device (default: the profile's name); ``task``: where the job was given a Task object. Raises
    ``UsageError`` for a device that is there already, a profile of another batch size, or a task that is not what it was.
    """
    request = result.request
    if request is None:
        raise UsageError("The result does not say what was asked; run the job again.")
    device = name or profile.name
    _refuse_name(device)
    _refuse_known(result, device)
    same_batch(device, profile, request.batch)
    return _predicted(result, request, device, profile, task or load_task(request.task, request.data, request.seed))


def _predicted(result: JobResult, request: Request, device: str, profile: HardwareProfile, task: Task) -> Prediction:
    graph = trace(task.model, task.example_inputs)
    space = make_space(graph, offered(task, request), request.importance)
    costs = CostModel(graph, space, {device: profile})
    scale = METRICS["latency_ms"].scale
    points = {point.id: point for point in (*result.points, result.original)}
    plans = {point_id: space.plan_from_json(point.levels) for point_id, point in points.items()}
    ns = costs.cost(list(plans.values()))[:, costs.keys.index(cost_key("latency_ms", device))]  # (n_plans,)
    intervals, ops = {}, {}
    for point in (result.original, *result.points):
        if not point.ops or point.id in ops:
            continue
        kernels = costs.executed(plans[point.id])
        _refuse_other_operators(point.ops, kernels)
        ops[point.id] = [float(one) * scale for one in profile.predict_ns(kernels)]
        if profile.expected_error:
            intervals[point.id] = round(profile.relative_error(kernels), 4)
    notes = (
        f"Latency on {device} was predicted after the search: its plans were chosen without that device.",
        *notes_of_profiles({device: profile}, kernels_of(graph, space, samples=0)),
    )
    latency = {point_id: float(one) * scale for point_id, one in zip(plans, ns, strict=True)}
    return Prediction(device, latency, intervals, ops, device_row(profile), notes)


def check_limit(result: JobResult, pick: str) -> None:
    """Where ``pick`` is a limit on a device (``latency_ms<=5@pixel2``), its latency must be known. Raises ``UnknownName``."""
    if "<" not in pick and "=" not in pick:
        return
    budget = Budget.parse(pick)
    timed = any(budget.key in point.measured for point in result.points)
    if budget.device is not None and not timed:
        result.device_key(budget.device)


def _refuse_name(device: str) -> None:
    if device == "local":
        raise UsageError(
            "'local' is this machine, which a job measures with its own model; submit one with a budget '@local', "
            "or name the profile's device with --name."
        )
    if not _NAME.fullmatch(device):
        raise UsageError(
            f"A device's name stands in budgets, {device!r} cannot; name it with letters and digits by --name."
        )


def _refuse_known(result: JobResult, device: str) -> None:
    if cost_key("latency_ms", device) in result.original.costs:
        raise UsageError(
            f"The job has {result.device_label(device)!r} already; look at it with 'autocompress front JOB --device {device}', "
            "or give another profile another name with --name."
        )


def _refuse_other_operators(rows: Sequence[OpRow], kernels: Sequence[Kernel]) -> None:
    """What is predicted must be what the job lists: another version may cut a model into other operators."""
    listed = [(row.kind, row.in_shape, row.out_shape, row.format) for row in rows]
    if listed != [(k.kind, k.in_shape, k.out_shape, k.format) for k in kernels]:
        raise StoreError("The result was written by another version of AutoCompress; run the job again.")

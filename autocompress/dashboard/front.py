"""What a picture of a front shows: which point is what, the front's line, budget lines and the part worth seeing.

Pure functions of a :class:`~autocompress.results.JobResult`; ``plots`` (plotly) and ``picture`` (matplotlib) draw it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from autocompress.errors import UnknownName, UsageError
from autocompress.results import BudgetRow, JobResult, Point
from autocompress.types import FIDELITIES, METRICS, Fidelity

Role = Literal["infeasible", "dominated", "front", "original", "best"]


@dataclass(frozen=True)
class Mark:
    """Shape *and* colour of a role; colours are Okabe and Ito's, which the colour-blind can tell apart."""

    label: str
    colour: str
    symbol: str  # plotly's name
    marker: str  # matplotlib's name
    size: int  # pixels across


MARKS: dict[Role, Mark] = {
    "infeasible": Mark("over budget", "#D55E00", "x-thin-open", "x", 8),
    "dominated": Mark("feasible, dominated", "#8A8F98", "square-open", "s", 8),
    "front": Mark("front", "#0072B2", "circle", "o", 11),
    "original": Mark("original", "#E69F00", "star", "*", 17),
    "best": Mark("best, exported", "#009E73", "diamond", "D", 14),
}
"""In drawing order: the last lies on top."""

LINES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Colours of lines; their dashes differ, too."""

_TITLES = {
    "loss": "loss",
    "latency_ms": "latency",
    "size_mb": "ONNX file",
    "packed_mb": "packed file",
    "macs": "MACs",
    "params": "parameters",
    "nonzeros": "nonzeros",
    "weight_bits": "bits a weight",
    "peak_mb": "peak activations",
    "accuracy_drop": "accuracy drop",
}


@dataclass(frozen=True)
class Axis:
    """One quantity: a key of ``Point.values`` or ``Point.costs``."""

    key: str
    title: str
    maximize: bool = False


@dataclass(frozen=True)
class BudgetLine:
    axis: Literal["x", "y"]
    value: float
    text: str


@dataclass(frozen=True)
class Front:
    """A front in two axes on one rung; its ranges hold every feasible point, the original and the best."""

    x: Axis
    y: Axis
    rung: Fidelity
    points: dict[Role, tuple[Point, ...]]
    budgets: tuple[BudgetLine, ...]
    x_range: tuple[float, float]
    y_range: tuple[float, float]
    outside: int
    """Points outside the ranges (all of them over budget)."""
    not_finite: int
    """Points that cannot be drawn because a value is missing, infinite or not a number."""

    def at(self, point: Point) -> tuple[float, float]:
        """Where a point lies."""
        return value_of(point, self.x.key), value_of(point, self.y.key)


def value_of(point: Point, key: str) -> float:
    """A value or cost of a point, as measured where it was, else as predicted; NaN where it has none."""
    known = point.values.get(key, point.costs.get(key, math.nan))
    return point.measured.get(key, known)  # a budget is judged by what was measured, so it is drawn there


def axes_of(result: JobResult) -> list[str]:
    """The keys that can be an axis: the search's objectives first, then every other value and cost."""
    points = (result.original, *result.points)
    known = dict.fromkeys(result.objectives)
    for part in ("values", "costs"):
        for point in points:
            known.update(dict.fromkeys(sorted(getattr(point, part))))
    return [key for key in known if any(math.isfinite(value_of(point, key)) for point in points)]


def default_axes(result: JobResult) -> tuple[str, str]:
    """Cost on x (the first one that is an objective) and on y the task's metric, or the loss where there is none."""
    keys = axes_of(result)
    x = next((key for key in keys if key in result.original.costs), keys[0])
    y = "metric" if "metric" in keys else next(key for key in keys if key != x)
    return x, y


def rungs_of(result: JobResult) -> list[Fidelity]:
    """The rungs that have points, in the order of the ladder."""
    present = {point.fidelity for point in result.points}
    return [rung for rung in FIDELITIES if rung in present]


def default_rung(result: JobResult) -> Fidelity:
    """The highest rung with at least five points: higher ones are truer, but a few points are no front."""
    rungs = rungs_of(result) or [result.original.fidelity]
    counts = {rung: sum(point.fidelity == rung for point in result.points) for rung in rungs}
    rich = [rung for rung in rungs if counts[rung] >= 5]
    return rich[-1] if rich else max(rungs, key=lambda rung: counts[rung])


def axis_of(result: JobResult, key: str) -> Axis:
    """Title with unit, and direction: the task's metric may be better when higher, all else is better when lower."""
    if key not in axes_of(result):
        raise UnknownName("axis", key, axes_of(result))
    if key == "metric":
        return Axis(key, result.metric_name, result.higher_is_better)
    name, _, device = key.partition("@")
    title = _TITLES.get(name, name.replace("_", " ")) + (f" on {result.device_label(device)}" if device else "")
    unit = METRICS[name].unit if name in METRICS else ""
    return Axis(key, f"{title} ({unit})" if unit else title)


def format_value(key: str, value: float) -> str:
    """A value with its unit, for people: ``2.31 ms``, ``20.4 M``."""
    if not math.isfinite(value):
        return "-"
    unit = METRICS[name].unit if (name := key.partition("@")[0]) in METRICS else ""
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit and not unit:
            return f"{value / limit:.3g} {suffix}"
    return f"{value:.4g} {unit}".rstrip()


def read_front(result: JobResult, x: str | None = None, y: str | None = None, rung: Fidelity | None = None) -> Front:
    """Sort a result's points of one rung into roles, as seen in the axes ``x`` and ``y`` (defaults: ``default_axes``).

    Dominance is judged in the two axes shown, among the points that hold every budget.
    """
    default_x, default_y = default_axes(result)
    x_axis, y_axis = axis_of(result, x or default_x), axis_of(result, y or default_y)
    if x_axis.key == y_axis.key:
        raise UsageError(f"A front needs two different axes, got {x_axis.key!r} twice.")
    rung = rung or default_rung(result)
    if result.points and rung not in rungs_of(result):
        raise UnknownName("rung", rung, rungs_of(result))
    of_rung = [point for point in result.points if point.fidelity == rung]
    drawn = [p for p in of_rung if math.isfinite(value_of(p, x_axis.key) + value_of(p, y_axis.key))]
    feasible = [point for point in drawn if point.feasible]
    front = _non_dominated(feasible, x_axis, y_axis)
    on_front = {point.id for point in front}
    points: dict[Role, tuple[Point, ...]] = {
        "infeasible": tuple(point for point in drawn if not point.feasible),
        "dominated": tuple(point for point in feasible if point.id not in on_front),
        "front": tuple(front),
        "original": (result.original,),
        "best": tuple(point for point in drawn if point.id == result.best),
    }
    lines = _budget_lines(result, x_axis, y_axis)
    core = [*feasible, result.original, *points["best"]] if feasible else [*drawn, result.original]
    x_range = _range([value_of(p, x_axis.key) for p in core], [b.value for b in lines if b.axis == "x"])
    y_range = _range([value_of(p, y_axis.key) for p in core], [b.value for b in lines if b.axis == "y"])
    outside = sum(
        not (_within(value_of(p, x_axis.key), x_range) and _within(value_of(p, y_axis.key), y_range)) for p in drawn
    )
    shown = tuple(b for b in lines if _within(b.value, x_range if b.axis == "x" else y_range))
    return Front(x_axis, y_axis, rung, points, shown, x_range, y_range, outside, len(of_rung) - len(drawn))


def handed_out(result: JobResult, key: str) -> list[Point]:
    """Of the plans that could be handed out, those that no other beats in loss and in ``key``; from the cheap to the costly."""
    known = [p for p in result.deliverable if math.isfinite(value_of(p, key) + value_of(p, "loss"))]
    return _non_dominated(known, axis_of(result, key), Axis("loss", _TITLES["loss"]))


def front_line(front: Front) -> tuple[list[float], list[float], Literal["hv", "vh"]]:
    """The front's steps: what can be had at every x. ``hv``: hold y until the next point, then jump."""
    places = sorted(front.at(point) for point in front.points["front"])
    return [x for x, _ in places], [y for _, y in places], "vh" if front.x.maximize else "hv"


def _non_dominated(points: Sequence[Point], x: Axis, y: Axis) -> list[Point]:
    def minimized(point: Point, axis: Axis) -> float:
        return -value_of(point, axis.key) if axis.maximize else value_of(point, axis.key)

    front: list[Point] = []
    lowest = math.inf
    for point in sorted(points, key=lambda p: (minimized(p, x), minimized(p, y), p.id)):
        if minimized(point, y) < lowest:
            front.append(point)
            lowest = minimized(point, y)
    return front


def _budget_lines(result: JobResult, x: Axis, y: Axis) -> list[BudgetLine]:
    lines = []
    axes: tuple[tuple[Literal["x", "y"], Axis], ...] = (("x", x), ("y", y))
    for budget in result.budgets:
        for name, axis in axes:
            limit = _limit_on(result, budget, axis.key)
            if math.isfinite(limit):
                lines.append(BudgetLine(name, limit, budget.text))
    return lines


def _limit_on(result: JobResult, budget: BudgetRow, key: str) -> float:
    """A budget's limit on an axis. A drop in points is also a line on the metric's axis, at the metric's own scale."""
    if budget.key == key:
        return budget.limit
    if budget.key != "accuracy_drop" or key != "metric":
        return math.nan
    dense = value_of(result.original, "metric")
    changes = [(value_of(p, "accuracy_drop"), dense - value_of(p, "metric")) for p in result.points]
    drop, change = max(
        ((abs(d), c if d > 0 else -c) for d, c in changes if math.isfinite(d + c)), default=(0.0, 0.0)
    )  # the largest drop seen gives the metric's change a point
    return dense - budget.limit * change / drop if drop else math.nan


def _range(values: Iterable[float], limits: Iterable[float]) -> tuple[float, float]:
    """Holds all values, and those limits that are near, with some air around."""
    finite = [value for value in values if math.isfinite(value)] or [0.0]
    low, high = min(finite), max(finite)
    span = (high - low) or abs(high) or 1.0
    near = [limit for limit in limits if low - span <= limit <= high + span]
    low, high = min([low, *near]), max([high, *near])
    air = 0.07 * ((high - low) or span)
    return low - air, high + air


def _within(value: float, interval: tuple[float, float]) -> bool:
    return interval[0] <= value <= interval[1]

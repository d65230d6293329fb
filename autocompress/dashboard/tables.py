"""A plan as rows: its sites, its operators, its latencies. Pure functions of a result."""

from __future__ import annotations

from typing import Any

from autocompress.dashboard.front import format_value, value_of
from autocompress.results import JobResult, Point
from autocompress.types import METRICS


def site_rows(result: JobResult, point: Point) -> list[dict[str, Any]]:
    """One row a site, in the model's order, with the level the plan has there."""
    return [
        {
            "site": site.name,
            "level": point.plan.get(site.name, "dense"),
            "kind": site.kind,
            "width": site.width,
            "MACs": site.macs,
            "weights": site.params,
        }
        for site in result.sites
    ]


def race_rows(result: JobResult) -> list[dict[str, Any]]:
    """One row a controller that raced, in the order they were named; seconds are those of a processor."""
    return [
        {
            "controller": entry.controller,
            "evaluations": entry.evaluations,
            "seconds": entry.end.seconds,
            "its own": entry.own_seconds,
            "best loss": entry.end.loss,
            "found after": entry.found.evaluations if entry.end.loss is not None else None,
            "found after (s)": entry.found.seconds if entry.end.loss is not None else None,
            "hypervolume": entry.end.hypervolume,
        }
        for entry in result.race
    ]


def op_rows(point: Point) -> list[dict[str, Any]]:
    """One row an executed operator, in execution order, with predicted milliseconds a device."""
    return [
        {
            "operator": op.name,
            "kind": op.kind,
            "format": op.format,
            "in": " x ".join(map(str, op.in_shape)),
            "out": " x ".join(map(str, op.out_shape)),
            **{f"{device} (ms)": milliseconds for device, milliseconds in op.predicted_ms.items()},
        }
        for op in point.ops
    ]


def op_devices(point: Point) -> list[str]:
    """The devices for which the plan's operators have a prediction."""
    return list(dict.fromkeys(device for op in point.ops for device in op.predicted_ms))


def latency_rows(result: JobResult, point: Point) -> list[dict[str, str]]:
    """Predicted against measured latency, a row a device; ``-`` where a plan was not timed."""
    rows = []
    for key, predicted in sorted(point.costs.items()):
        name, _, device = key.partition("@")
        if name not in METRICS or not METRICS[name].per_device:
            continue
        measured, before = point.measured.get(key), result.original.costs.get(key)
        rows.append(
            {
                "device": result.device_label(device),
                "original, predicted": "-" if before is None else format_value(key, before),
                "predicted": format_value(key, predicted)
                + (f" ± {point.intervals[key]:.0%}" if key in point.intervals else ""),
                "measured": "not timed yet" if measured is None else format_value(key, measured),
                "measured / predicted": f"{measured / predicted:.2f}" if measured is not None and predicted else "-",
            }
        )
    return rows


def plan_title(result: JobResult, point: Point, key: str) -> str:
    """One line for lists: what the plan is, its metric and its cost on ``key``."""
    name = point.id[:8]
    if point == result.original:
        name = "original"
    elif point.id == result.best:
        name = f"best {name}"
    values = [f"{result.metric_name} {format_value('metric', value_of(point, 'metric'))}"] * ("metric" in point.values)
    over = "" if point.feasible else " · over budget"
    return " · ".join([name, *values, format_value(key, value_of(point, key))]) + over

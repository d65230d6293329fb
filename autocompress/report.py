"""A run's outcome as the record that the store keeps and the pages show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from autocompress.deliver import Delivery
from autocompress.hwprofiles import HardwareProfile
from autocompress.prepare import Prepared
from autocompress.results import BudgetRow, Diagnosis, JobResult, LedgerRow, OpRow, Point, RaceEntry, Request, SiteRow
from autocompress.search import ParetoFront
from autocompress.search.front import non_dominated
from autocompress.types import METRICS, Budget, Evaluation, Plan, cost_key, digest

MOST_POINTS = 1500


def make_result(
    request: Request,
    made: Prepared,
    front: ParetoFront,
    deliveries: Sequence[Delivery],
    best: Delivery | None,
    budgets: Sequence[Budget],
    seconds: Mapping[str, float],
    evaluations: int,
    notes: Sequence[str],
    ledger: LedgerRow,
    race: Sequence[RaceEntry],
    diagnosis: Diagnosis | None,
) -> JobResult:
    """All judged plans of the upper rungs as points; those that could be handed out and that nothing beats are the front."""
    space = made.space
    deliverable = {id(d) for d in _unbeaten(deliveries, front)}
    points = []
    for delivery in deliveries:
        on_front = id(delivery) in deliverable
        points.append(_point(made, budgets, delivery.evaluation, delivery.measured, on_front, ops=True))
    for evaluation in front.evaluations("full")[:MOST_POINTS]:
        if evaluation.plan != space.dense:
            points.append(_point(made, budgets, evaluation, {}, False, ops=False))
    dense = next((e for e in front.evaluations("full") if e.plan == space.dense), None)
    values = dict(dense.values) if dense else {}
    original = Evaluation(space.dense, "full", values, dict(made.dense_costs), 0.0)
    measured = {"size_mb": made.original.bytes / 1e6}
    return JobResult(
        task=request.task,
        metric_name=made.task.metric_name,
        higher_is_better=made.task.higher_is_better,
        original=_point(made, budgets, original, measured, False, ops=True),
        budgets=tuple(
            BudgetRow(text=t, key=b.key, limit=b.limit) for t, b in zip(request.budgets, budgets, strict=True)
        ),
        objectives=tuple(o.key for o in front.objectives),
        sites=tuple(
            SiteRow(name=s.name, kind=s.kind, members=s.members, width=s.width, macs=s.macs, params=s.params)
            for s in space.sites
        ),
        points=tuple(points),
        hypervolume=_hypervolume(deliveries, front, made),
        best=plan_id(made, best.evaluation.plan) if best else None,
        evaluations=evaluations,
        seconds={stage: round(value, 2) for stage, value in seconds.items()},
        devices={name: device_row(profile) for name, profile in made.profiles.items()},
        notes=tuple(notes),
        ledger=ledger,
        race=tuple(race),
        diagnosis=diagnosis,
        request=request,
    )


def device_row(profile: HardwareProfile) -> dict[str, Any]:
    """What a result says of a device whose latency it holds."""
    return {
        "device": profile.device,
        "provenance": profile.provenance,
        "noise_floor": profile.noise_floor,
        "threads": profile.threads,
        "source": dict(profile.source),
        "expected_error": profile.expected_error,
    }


def plan_id(made: Prepared, plan: Plan) -> str:
    """The plan's hash over sites and level hashes: the same in every run on this space."""
    return digest(made.space.plan_to_json(plan))


def _objectives(delivery: Delivery, front: ParetoFront) -> list[float]:
    return [delivery.value(o.key) for o in front.objectives]


def _unbeaten(deliveries: Sequence[Delivery], front: ParetoFront) -> list[Delivery]:
    """Deliverable plans that no other beats; all were judged on the same whole search split, as they would be handed out."""
    rows = np.array([_objectives(d, front) for d in deliveries], float).reshape(len(deliveries), len(front.objectives))
    return [deliveries[i] for i in non_dominated(rows)] if len(rows) else []


def _hypervolume(deliveries: Sequence[Delivery], front: ParetoFront, made: Prepared) -> float | None:
    """Share of the box between (loss 1 nat, the original's cost) and the origin that the front covers."""
    from autocompress.search.front import hypervolume

    key = front.objectives[-1].key
    if key not in made.dense_costs or not deliveries:
        return None
    rows = np.array([[d.value("loss"), d.value(key) / made.dense_costs[key]] for d in deliveries], float)
    return hypervolume(rows, (1.0, 1.0))


def _point(
    made: Prepared,
    budgets: Sequence[Budget],
    evaluation: Evaluation,
    measured: Mapping[str, float],
    on_front: bool,
    ops: bool,
) -> Point:
    def value(key: str) -> float:
        return measured[key] if key in measured else {**evaluation.costs, **evaluation.values}.get(key, float("nan"))

    violation = sum(b.violation(value(b.key)) for b in budgets) if evaluation.values else 0.0
    plan = evaluation.plan
    return Point(
        id=plan_id(made, plan),
        plan=made.space.describe(plan),
        levels=made.space.plan_to_json(plan),
        fidelity=evaluation.fidelity,
        values={k: v for k, v in evaluation.values.items() if v == v},
        costs=dict(evaluation.costs),
        measured=dict(measured),
        violation=min(violation, 1e9),
        feasible=violation <= 0 and all(v == v for v in evaluation.values.values()),
        on_front=on_front,
        intervals=_intervals(made, plan) if ops else {},
        ops=_ops(made, plan) if ops else (),
    )


def _intervals(made: Prepared, plan: Plan) -> dict[str, float]:
    """Relative half width of each device's prediction, where its profile states an error."""
    kernels = made.costs.executed(plan)
    stated = {device: profile for device, profile in made.profiles.items() if profile.expected_error}
    return {cost_key("latency_ms", device): round(p.relative_error(kernels), 4) for device, p in stated.items()}


def _ops(made: Prepared, plan: Plan) -> tuple[OpRow, ...]:
    """Every kernel that runs, with its predicted time on each device."""
    named = [(name, kernel) for name, kernels in made.costs.kernels(plan) for kernel in kernels]
    times = {device: profile.predict_ns([k for _, k in named]) for device, profile in made.profiles.items()}
    return tuple(
        OpRow(
            name=name,
            kind=kernel.kind,
            in_shape=kernel.in_shape,
            out_shape=kernel.out_shape,
            format=kernel.format,
            predicted_ms={device: float(ns[i]) * METRICS["latency_ms"].scale for device, ns in times.items()},
        )
        for i, (name, kernel) in enumerate(named)
    )

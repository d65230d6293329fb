"""A realistic result: ResNet-20 on CIFAR-10 with numbers as a search makes them, from a fixed seed."""

from __future__ import annotations

import random

from autocompress.results import (
    BudgetRow,
    ClassRow,
    ContributionRow,
    Diagnosis,
    Exemplar,
    JobResult,
    LayerRow,
    OpRow,
    Point,
    RaceEntry,
    RaceMark,
    Request,
    SensitivityRow,
    SiteRow,
)
from autocompress.types import Fidelity, digest

DEVICE = "local"
_STAGES = ((16, 32), (32, 16), (64, 8))  # (channels, height)
_KEEP = {"dense": 1.0, "keep 12/16": 0.75, "keep 8/16": 0.5, "keep 4/16": 0.25}
_RUNGS: tuple[tuple[Fidelity, int, float], ...] = (("full", 48, 1.0), ("refitted", 18, 0.45), ("recovered", 4, 0.25))


def request() -> Request:
    return Request(
        task="cifar10:resnet20", budgets=("latency_ms<=60%@local", "accuracy_drop<=2"), evaluations=400, minutes=5
    )


def sites() -> tuple[SiteRow, ...]:
    rows = []
    for stage, (channels, height) in enumerate(_STAGES, 1):
        for block in range(3):
            macs = channels * channels * 9 * height * height
            name = f"layer{stage}.{block}"
            members = (f"{name}.conv1", f"{name}.conv2")
            rows.append(
                SiteRow(
                    name=f"{name}.inner",
                    kind="channels",
                    members=members,
                    width=channels,
                    macs=2 * macs,
                    params=2 * channels * channels * 9,
                )
            )
            rows.append(
                SiteRow(
                    name=f"{name}.conv2",
                    kind="layer",
                    members=members[1:],
                    width=1,
                    macs=macs,
                    params=channels * channels * 9,
                )
            )
    return tuple(rows)


def _ops(plan: dict[str, str]) -> tuple[OpRow, ...]:
    rows = []
    for stage, (channels, height) in enumerate(_STAGES, 1):
        for block in range(3):
            name = f"layer{stage}.{block}"
            inner = int(channels * _KEEP[plan.get(f"{name}.inner", "dense")])
            format_ = "int8" if f"{name}.conv2" in plan else "float"
            for conv, a, b, kind in (("conv1", channels, inner, "float"), ("conv2", inner, channels, format_)):
                ms = a * b * 9 * height * height / 1.1e7 * (0.45 if kind == "int8" else 1.0) + 0.012
                rows.append(
                    OpRow(
                        name=f"{name}.{conv}",
                        kind="conv",
                        in_shape=(a, height, height),
                        out_shape=(b, height, height),
                        format=kind,
                        predicted_ms={DEVICE: round(ms, 4)},
                    )
                )
    rows.append(
        OpRow(
            name="linear", kind="linear", in_shape=(64,), out_shape=(10,), format="float", predicted_ms={DEVICE: 0.004}
        )
    )
    return tuple(rows)


def _point(plan: dict[str, str], rung: Fidelity, softness: float, rng: random.Random) -> Point:
    ops = _ops(plan)
    latency = sum(op.predicted_ms[DEVICE] for op in ops)
    damage = sum((1 - _KEEP.get(level, 0.97)) ** 2 for level in plan.values())
    drop = 0.0 if not plan else softness * (1.6 * damage + 0.15 * damage**2) + rng.uniform(0, 0.5) * softness
    drop = round(min(drop, 80.0), 2)
    size = sum(
        a * b * 9 * (1 if op.format == "int8" else 4) for op in ops for a, b in [(op.in_shape[0], op.out_shape[0])]
    )
    limit = 0.6 * sum(op.predicted_ms[DEVICE] for op in _ops({}))
    violation = max(0.0, latency / limit - 1) + max(0.0, (drop - 2) / 2)
    areas = [op.in_shape[1] ** 2 if len(op.in_shape) > 1 else 1 for op in ops]
    macs = sum(op.in_shape[0] * op.out_shape[0] * 9 * area for op, area in zip(ops, areas, strict=True))
    loss = 0.012 * drop + 0.001 * len(plan)
    return Point(
        id=digest(sorted(plan.items())),
        plan=plan,
        levels={site: digest(label) for site, label in plan.items()},
        fidelity=rung,
        values={"loss": round(loss, 5), "metric": round(92.6 - drop, 2), "accuracy_drop": drop},
        costs={f"latency_ms@{DEVICE}": round(latency, 4), "size_mb": round(size / 1e6, 4), "macs": float(macs)},
        violation=violation,
        feasible=violation == 0.0,
        ops=ops,
    )


def _plans(n: int, rng: random.Random) -> list[dict[str, str]]:
    plans = []
    for i in range(n):
        rate = 0.25 + 0.75 * i / n
        plan: dict[str, str] = {}
        for site in sites():
            if rng.random() < rate:
                plan[site.name] = rng.choice(list(_KEEP)[1:]) if site.kind == "channels" else "int8"
        plans.append(plan)
    return plans


def result() -> JobResult:
    rng = random.Random(7)
    original = _point({}, "full", 1.0, rng).model_copy(update={"violation": 0.0, "feasible": True})
    plans = _plans(_RUNGS[0][1], rng)
    points: list[Point] = []
    for rung, count, softness in _RUNGS:
        points += [_point(plan, rung, softness, rng) for plan in plans[-count:]]
        if rung == "refitted":  # the most promising go on to be distilled
            kept = [p for p in points if p.fidelity == rung and p.feasible]
            plans = [p.plan for p in sorted(kept, key=lambda p: -p.values["accuracy_drop"])]
    refitted = [p for p in points if p.fidelity == "refitted" and p.feasible]
    best = min(refitted, key=lambda p: (p.values["accuracy_drop"], p.id))
    key = f"latency_ms@{DEVICE}"
    timed = {key: round(best.costs[key] * 1.08, 4)}
    points = [p.model_copy(update={"measured": timed}) if p.id == best.id else p for p in points]
    return JobResult(
        task="cifar10:resnet20",
        metric_name="accuracy",
        higher_is_better=True,
        original=original,
        budgets=(
            BudgetRow(text="latency_ms<=60%@local", key=key, limit=0.6 * original.costs[key]),
            BudgetRow(text="accuracy_drop<=2", key="accuracy_drop", limit=2.0),
        ),
        objectives=("loss", key),
        sites=sites(),
        points=tuple(points),
        hypervolume=0.731,
        best=best.id,
        evaluations=400,
        seconds={"database": 21.0, "search": 96.0, "refit": 44.0, "recover": 120.0},
        devices={DEVICE: {"name": "local", "threads": 1}},
        notes=("The plan is 2.1 times smaller, but on local it is only 1.6 times faster.",),
        request=request(),
    )


def diagnosed() -> JobResult:
    """The same with a diagnosis of its best plan."""
    plain = result()
    assert plain.best is not None
    best = plain.point(plain.best)
    levels = [(s, label) for s in sites() for label in (list(_KEEP)[1:] if s.kind == "channels" else ["int8"])]
    costs = dict(best.costs)
    diagnosis = Diagnosis(
        plan=best.id,
        rung="refitted",
        models=(best.id, plain.points[-1].id),
        examples=2000,
        changed=2,
        right=(0.5, 0.0),
        exemplars=(
            Exemplar(index=11, target=3, original=3, compressed=5, agreement=1.0, drop=1.0),
            Exemplar(index=7, target=4, original=7, compressed=5, agreement=0.5, drop=0.0),
        ),
        classes=(
            ClassRow(
                label=3,
                examples=200,
                original=0.9,
                compressed=0.8,
                change=-10.0,
                half_width=2.0,
                relative=-8.0,
                unlike=True,
            ),
        ),
        sensitivity=tuple(
            SensitivityRow(site=s.name, level=label, loss=(1 - _KEEP.get(label, 0.99)) ** 3) for s, label in levels
        ),
        layers=(
            LayerRow(name="layer1.0.conv1", level="dense", width="8/16", error=0.02),
            LayerRow(name="layer1.0.conv2", level="int8", width="16/16", error=0.11, bits=7.5, pq=0.3),
        ),
        contributions=(
            ContributionRow(without="nothing", sites=0, loss=0.02, accuracy_drop=1.5, costs=costs),
            ContributionRow(without="int8", sites=3, loss=0.01, accuracy_drop=None, costs=costs),
        ),
    )
    return plain.model_copy(update={"diagnosis": diagnosis})


def raced() -> JobResult:
    """The same where two controllers raced, and the second found nothing within the budgets at first."""

    def entry(name: str, *rows: tuple[int, float, float | None, float]) -> RaceEntry:
        history = tuple(RaceMark(evaluations=n, seconds=s, loss=loss, hypervolume=h) for n, s, loss, h in rows)
        return RaceEntry(controller=name, evaluations=rows[-1][0], own_seconds=1.5, history=history)

    first = entry("evolution", (2, 1.0, 0.4, 0.1), (120, 61.0, 0.02, 0.6), (200, 101.0, 0.02, 0.61))
    second = entry("random", (90, 44.0, 0.3, 0.2), (200, 98.0, 0.3, 0.25))
    request_ = request().model_copy(update={"controller": "evolution,random", "race": True})
    return result().model_copy(update={"race": (first, second), "request": request_})

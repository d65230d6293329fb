"""From judged plans to files: what they take when run, which one to hand out, and its certificate."""

from __future__ import annotations

import shlex
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from autocompress.errors import (
    AutoCompressError,
    BudgetUnmet,
    Cancelled,
    UnknownName,
    UnsupportedModel,
    UsageError,
    VerificationError,
)
from autocompress.export import export_onnx
from autocompress.hwprofiles import compare, measure_ms
from autocompress.models import Models
from autocompress.onnx_file import parity
from autocompress.prepare import EXAMPLES, Prepared
from autocompress.results import METHOD_FAMILIES, JobResult, Point, RaceEntry, Request
from autocompress.types import FIDELITIES, METRICS, Budget, Evaluation, cost_key, digest
from autocompress.verify import Certificate, certify, quality

LOCAL = cost_key("latency_ms", "local")
LEDGER_START = "ledger_start.json"
"""Where a folder keeps what its job started from, when that was not an empty ledger."""
SECONDS_A_MODEL = 2.0
COMPARE_SECONDS = 10.0


@dataclass(frozen=True)
class Delivery:
    """A plan that could be handed out: how it was judged, and what its file was measured at, by cost key.

    ``ratio``: its latency over the original's, both timed in the same rounds.
    """

    evaluation: Evaluation
    measured: Mapping[str, float] = field(default_factory=dict)
    ratio: float = 1.0

    def value(self, key: str) -> float:
        """What was measured where it was, else what was judged or predicted."""
        return self.measured[key] if key in self.measured else self.evaluation[key]


def timed(
    judged: Sequence[Evaluation],
    models: Models,
    made: Prepared,
    request: Request,
    tick: Callable[[int, int | None], None],
    cancelled: Callable[[], bool] | None,
) -> tuple[list[Delivery], list[AutoCompressError]]:
    """Export plans to a scratch folder and time them all interleaved with the original, on this machine.

    A plan whose file cannot be written or computes something else is left out, and why is told. The quick exporter will
    do for timing; its files are some 2 kB smaller than the one that is handed out, which is written and proved by
    :func:`certified`: for bytes the prediction is nearer.
    """
    task = made.task
    examples = task.inputs(task.calibration.take(3))
    with tempfile.TemporaryDirectory(prefix="autocompress-") as scratch:
        paths: list[Path] = []
        exported: list[Evaluation] = []
        failures: list[AutoCompressError] = []
        for i, evaluation in enumerate(judged):
            tick(i, len(judged))
            if cancelled and cancelled():
                raise Cancelled("Stopped while timing the front; everything evaluated so far is kept.")
            path, model = Path(scratch) / f"{i}.onnx", models.deployed(evaluation.plan, evaluation.fidelity)
            try:
                export_onnx(model, examples, path, int8_format=made.int8_format, exporters=("legacy", "dynamo"))
            except (UnsupportedModel, VerificationError) as error:
                failures.append(error)
                continue
            paths.append(path)
            exported.append(evaluation)
        if not paths:
            return [], failures
        threads = made.profiles["local"].threads if "local" in made.profiles else 1
        timings = measure_ms(
            paths,
            Path(made.original.path),
            batch=request.batch,
            threads=threads,
            seconds=SECONDS_A_MODEL * len(paths) + 2,
        )
    known = made.dense_costs.get(LOCAL)
    deliveries = []
    for evaluation, timing in zip(exported, timings, strict=True):
        # One scalar a round: the ratio to the original, times what the profile knows the original to take.
        ms = timing.ratio * known if known is not None else timing.ms
        deliveries.append(Delivery(evaluation, {LOCAL: ms}, timing.ratio))
    return deliveries, failures


def choose(result: JobResult, pick: str) -> Point:
    """The point that ``pick`` names: ``best``, ``knee``, ``fastest``, ``smallest``, a plan's id, or a limit (``latency_ms<=4``).

    Raises :class:`UnknownName` or :class:`BudgetUnmet` with the nearest plan.
    """
    final = result.deliverable
    if not final:
        raise UsageError("This run judged no plan that could be exported; run it longer.")

    def value(point: Point, key: str) -> float:
        return {**point.costs, **point.values, **point.measured}.get(key, float("inf"))

    def loss(point: Point) -> float:
        return value(point, "loss")

    feasible = [p for p in final if p.feasible] or final
    if pick == "best":
        mine = [p for p in final if p.id == result.best] or feasible
        return max(mine, key=lambda p: (FIDELITIES.index(p.fidelity), -loss(p))) if result.best else min(mine, key=loss)
    if pick in ("fastest", "smallest"):
        keys = {"fastest": (LOCAL, "macs"), "smallest": ("size_mb", "params")}[pick]
        return min(feasible, key=lambda p: (*(value(p, key) for key in keys), loss(p)))
    if pick == "knee":
        front = [p for p in feasible if p.on_front] or feasible
        return min(front, key=lambda p: (_from_ideal(p, front, [*result.objectives], value), p.id))
    if "=" in pick or "<" in pick:
        budget = Budget.parse(pick).absolute(result.original.costs | result.original.measured)
        fits = [p for p in final if budget.violation(value(p, budget.key)) == 0]
        if fits:
            return min(fits, key=loss)
        nearest = min(final, key=lambda p: budget.violation(value(p, budget.key)))
        raise BudgetUnmet(
            f"No plan of this run holds {pick}: the nearest is {nearest.id} with "
            f"{value(nearest, budget.key):.4g} {METRICS[budget.metric].unit}; ask for that, or run the job with this budget."
        )
    for point in sorted(final, key=lambda p: -FIDELITIES.index(p.fidelity)):
        if point.id.startswith(pick):
            return point
    raise UnknownName("plan", pick, ["best", "knee", "fastest", "smallest", *(p.id for p in final)])


def _from_ideal(
    point: Point, front: Sequence[Point], keys: Sequence[str], value: Callable[[Point, str], float]
) -> float:
    """Sum of the objectives, each scaled to 0..1 over the front: smallest at the knee."""
    total = 0.0
    for key in keys:
        values = [value(p, key) for p in front]
        span = max(values) - min(values)
        total += (value(point, key) - min(values)) / span if span > 0 else 0.0
    return total


def certified(
    evaluation: Evaluation,
    models: Models,
    made: Prepared,
    path: Path,
    request: Request,
    replay: str,
    ledger: str,
    verifying: Callable[[], AbstractContextManager[Any]],
) -> Certificate:
    """Export one plan, prove it and write its certificate beside it; ``ledger``: hash of the one the search started from."""
    task = made.task
    examples = task.inputs(task.calibration.take(EXAMPLES))
    model = models.deployed(evaluation.plan, evaluation.fidelity)
    expected = expected_layers(made, evaluation)
    artifact = export_onnx(model, examples, path, int8_format=made.int8_format, expected=expected)
    with verifying():
        threads = made.profiles["local"].threads if "local" in made.profiles else 1
        original = Path(made.original.path)
        return certify(
            artifact,
            original,
            parity=parity(model, path, examples),
            quality=quality(original, path, task, seed=request.seed),
            speed=compare(
                path, original, batch=request.batch, threads=threads, seconds=COMPARE_SECONDS, seed=request.seed
            ),
            budgets=[Budget.parse(text) for text in request.budgets],
            hashes={
                "plan": digest(made.space.plan_to_json(evaluation.plan)),
                "task": task.hash,
                "database": made.database.key,
                "space": made.space.hash,
                "ledger": ledger,
                **{f"profile {name}": profile.hash for name, profile in made.profiles.items()},
            },
            replay=replay,
        )


def expected_layers(made: Prepared, evaluation: Evaluation) -> dict[str, int]:
    """How many layers each method must have changed in the file: what the certificate's coverage is held against."""
    from autocompress.methods import Factored, Lookup, LowRank, Sparse, StaticInt8, WeightQuant

    count: dict[str, int] = {}
    gone = {n for b in made.graph.blocks if b.name in made.database.dropped(evaluation.plan) for n in b.body}
    for layer in made.graph.layers.values():
        if layer.node in gone:
            continue
        steps = made.database.layer_steps(evaluation.plan, layer.name)
        parts = 2 if any(isinstance(step, LowRank) for step in steps) else 1
        for step in steps:
            if isinstance(step, Factored):
                count["lowrank"] = count.get("lowrank", 0) + 1
            elif isinstance(step, StaticInt8):
                count["int8"] = count.get("int8", 0) + parts
            elif isinstance(step, WeightQuant):
                key = f"w{step.bits}"
                count[key] = count.get(key, 0) + parts
            elif isinstance(step, Sparse | Lookup):
                key = type(step).__name__.lower()
                count[key] = count.get(key, 0) + parts
    return count


def replay_command(request: Request, out: Path, evaluations: int, race: Sequence[RaceEntry] = ()) -> str:
    """The command that makes the same files again, with the measured profile and the resolved choices given.

    ``evaluations``: how many a search by the clock has made; ``race``: how many each controller has, where they raced.
    """
    words = ["autocompress", "compress", request.task]
    for folder in request.data:
        words += ["--data", folder]
    for budget in request.budgets:
        words += ["--budget", budget]
    controller, count = request.controller, request.evaluations
    if request.minutes is not None and race:  # a clock does not repeat, a count does
        controller = ",".join(f"{entry.controller}:{max(1, entry.evaluations)}" for entry in race)
    elif request.minutes is not None:
        count = evaluations
    words += ["--controller", controller] + ["--race"] * request.race
    words += ["--seed", str(request.seed), "--importance", request.importance]
    if count is not None:
        words += ["--evaluations", str(count)]
    if request.device != "cpu":
        words += ["--device", request.device]
    if request.precision != "auto":
        words += ["--precision", request.precision]
    if request.methods != METHOD_FAMILIES:
        words += ["--methods", ",".join(request.methods)]
    profiles = dict(request.profiles)
    if (out / "profile_local.json").exists():
        profiles.setdefault("local", str(out / "profile_local.json"))
    for name, file in profiles.items():
        words += ["--profile", f"{name}={file}"]
    words += ["--recover-steps", str(request.recover_steps or 0)]
    if request.recovery != "logits":
        words += ["--recovery", request.recovery]
    if request.warm or request.warm_from:
        words += ["--warm-from", str(out / LEDGER_START)]
    if request.batch != 1:
        words += ["--batch", str(request.batch)]
    if request.threads:
        words += ["--threads", str(request.threads)]
    return shlex.join([*words, "--out", f"{out}-replay"])

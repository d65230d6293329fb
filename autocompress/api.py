"""Python's way in: ``compress(task, budgets)`` runs everything and returns a :class:`Result` to look at and export from.

Runs in the foreground with an embedded store in its folder, so that the same call continues after an interruption.
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autocompress.errors import BudgetUnmet, StoreError, UnknownName, UsageError
from autocompress.files import make_folder, write_text
from autocompress.results import JobResult, Point, Progress, Request
from autocompress.types import FIDELITIES, METRICS, Budget, digest
from autocompress.validate import make_request

if TYPE_CHECKING:
    from autocompress.tasks import Task

RUNS = Path("runs")
"""Where results go when no folder is named: one folder a request, so that the same request continues in its own."""


@dataclass(frozen=True)
class Result:
    """The outcome of a compress job and the folder with its files (``model.onnx``, ``certificate.json``, ``front.png`` …)."""

    folder: Path
    result: JobResult
    task: Task | None = field(default=None, repr=False)

    @classmethod
    def load(cls, folder: str | Path, task: Task | None = None) -> Result:
        """Read a finished run; ``task`` is needed for exports when the run was given a Task object, not its name."""
        return cls(Path(folder), read_result(Path(folder)), task)

    @property
    def front(self) -> list[Point]:
        """The Pareto front, the most accurate plan first."""
        return sorted((p for p in self.result.points if p.on_front), key=_loss)

    def best(self, budget: str | None = None) -> Point:
        """The best plan under every budget of the run, or the front's best under one more, such as ``"size_mb<=0.3"``.

        Raises ``BudgetUnmet`` when no plan holds it, with the nearest one.
        """
        if budget is None:
            if self.result.best is None:
                raise BudgetUnmet("No plan of this run holds every budget; result.front shows what there is.")
            return judged_last(self.result, self.result.best)
        limit = Budget.parse(budget)
        key = limit.key
        points = [p for p in self.front if key in p.costs or key in p.values]
        if not points:
            known = ", ".join([*self.result.original.costs, "accuracy_drop"])
            raise UsageError(f"This run holds no {key!r}; it has {known}.")
        limit = limit.absolute(self.result.original.costs)
        fits = [p for p in points if limit.violation(_value(p, key)) == 0]
        if not fits:
            nearest = min(points, key=lambda p: limit.violation(_value(p, key)))
            unit = METRICS[limit.metric].unit
            raise BudgetUnmet(
                f"No plan on the front holds {budget}; the nearest is {nearest.id[:8]} with {_value(nearest, key):.4g} {unit}."
            )
        return min(fits, key=_loss)

    def export(self, path: str | Path, pick: str | None = None) -> Path:
        """Write the ONNX file of a plan and, beside it, its certificate; returns the file's path.

        ``pick``: ``knee``, ``fastest``, ``best``, ``smallest``, a plan's id or a limit like ``latency_ms<=4``; default:
        the best plan under the run's budgets. Raises ``VerificationError`` when the file does not compute the plan.
        """
        from autocompress import devices, finished

        devices.check_limit(self.result, pick or "best")
        written = finished.export(self.folder, pick or "best", Path(path), task=self.task)
        return Path(written["onnx"])

    def predict(self, profile: str | Path, name: str | None = None) -> Result:
        """This result with the latency of every plan on another device, predicted in seconds and kept in ``result.json``.

        ``profile``: a name or a file; ``name``: what budgets call the device, by default the profile's name. ``front``,
        ``best("latency_ms<=5@pixel2")`` and ``export`` know it then. Raises ``UsageError`` where it is there already.
        """
        from autocompress import devices
        from autocompress.hwprofiles import load_profile

        prediction = devices.predict(self.result, load_profile(profile), name, self.task)
        return replace(self, result=amend(self.folder, prediction.added_to))

    def _repr_html_(self) -> str:
        """The front as a table, for notebooks."""
        keys = list(self.result.original.costs)
        labels = map(self.result.key_label, keys)
        head = "".join(f"<th>{html.escape(h)}</th>" for h in ("plan", self.result.metric_name, "drop", *labels, "rung"))
        rows = []
        for point in (self.result.original, *self.front):
            name = "original" if point.id == self.result.original.id else point.id[:8]
            cells = [point.values.get("metric"), point.values.get("accuracy_drop"), *(point.costs.get(k) for k in keys)]
            texts = [name, *("–" if cell is None else f"{cell:.4g}" for cell in cells), point.fidelity]
            bold = ' style="font-weight:bold"' if point.id == self.result.best else ""
            rows.append(f"<tr{bold}>" + "".join(f"<td>{html.escape(text)}</td>" for text in texts) + "</tr>")
        notes = "".join(f"<li>{html.escape(note)}</li>" for note in self.result.notes)
        return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table><ul>{notes}</ul>"


def judged_last(result: JobResult, point_id: str) -> Point:
    """A plan as it was judged at its highest rung: the same plan may stand in a result once a rung."""
    points = [p for p in (result.original, *result.points) if p.id == point_id]
    if not points:
        raise UnknownName("plan", point_id, (p.id for p in result.points if p.on_front))
    return max(points, key=lambda p: FIDELITIES.index(p.fidelity))


def _loss(point: Point) -> float:
    return point.values.get("loss", float("inf"))


def _value(point: Point, key: str) -> float:
    """What was measured where it was, else what was predicted."""
    known = {**point.values, **point.costs, **point.measured}
    return known.get(key, float("nan"))


def read_result(folder: Path) -> JobResult:
    """``result.json`` of a folder; raises ``UsageError`` or ``StoreError`` in one sentence."""
    path = folder / "result.json"
    if not path.is_file():
        raise UsageError(f"{str(folder)!r} holds no result.json; run 'autocompress compress … --out {folder}' first.")
    try:
        return JobResult.model_validate_json(path.read_bytes())
    except ValueError as error:
        raise StoreError(
            f"{path} is damaged or was written by another version of AutoCompress; run the job again."
        ) from error


def amend(folder: Path, change: Callable[[JobResult], JobResult]) -> JobResult:
    """Change ``result.json`` of a folder, atomically; returns the new result. A job of a store is changed there, too, by
    ``JobStore.amend``."""
    result = change(read_result(folder))
    write_text(folder / "result.json", result.model_dump_json(indent=1))
    return result


def best_under(result: JobResult, budget: str) -> Point:
    """The plan that an export takes under one limit. Raises ``BudgetUnmet`` with the nearest one."""
    from autocompress.deliver import choose

    return choose(result, budget)


def default_folder(request: Request, task: Task | None = None) -> Path:
    """``runs/<task>-<hash>``: the same request finds its own folder again."""
    name = re.sub(r"[^\w.-]+", "-", Path(request.task).name).strip("-") or "task"
    content = [request.hash, task.hash] if task else request.hash
    return RUNS / f"{name}-{digest(content)[:8]}"


def run(
    request: Request,
    out: Path,
    *,
    task: Task | None = None,
    progress: Callable[[Progress], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> Result:
    """Run ``request`` in this process; evaluations are kept in a store in ``out`` and are not paid twice.

    A missed budget leaves its results and its picture in ``out``, too, before ``BudgetUnmet`` is raised.
    """
    from autocompress import pipeline
    from autocompress.service.store import JobStore, shared_ledger

    make_folder(out)
    with JobStore(out / "ledger.sqlite") as store:
        ledger = store.ledger(request.hash)
        try:
            result = pipeline.compress(
                request, out, task=task, ledger=ledger, shared=shared_ledger, progress=progress, cancelled=cancelled
            )
        except BudgetUnmet:
            _draw(read_result(out), out)
            raise
    _draw(result, out)
    return Result(out, result, task)


def _draw(result: JobResult, out: Path) -> None:
    from autocompress.dashboard.picture import write_front_png, write_race_png, write_sensitivity_png

    write_front_png(result, out / "front.png")
    if result.diagnosis is not None:
        write_sensitivity_png(result, out / "sensitivity.png", result.point(result.diagnosis.plan).plan)
    if result.race:
        write_race_png(result, out / "race.png")


def compress(
    task: str | Task,
    budgets: Sequence[str],
    *,
    out: str | Path | None = None,
    data: Sequence[str | Path] = (),
    controller: str = "auto",
    evaluations: int | None = None,
    minutes: float | None = None,
    seed: int = 0,
    progress: Callable[[Progress], None] | None = None,
    **options: Any,
) -> Result:
    """Search compressions of ``task`` under hard ``budgets``, export the best plan and verify it.

    ``task``: ``"digits"``, ``"cifar10:resnet20"``, ``"path/to/file.py:factory"`` or a :class:`~autocompress.Task`.
    ``budgets``: upper limits such as ``"latency_ms<=50%@local"``, ``"size_mb<=3"``, ``"accuracy_drop<=1.0"`` (points).
    ``out``: folder for the files (default ``runs/<task>-<hash>``); calling again with the same arguments continues there.
    ``options``: further fields of :class:`~autocompress.Request`: ``methods``, ``importance``, ``profiles``,
    ``recover_minutes``, ``recovery``, ``batch``, ``threads``, ``device``, ``precision``, ``workers``, ``warm``,
    ``warm_from``, ``race``.

    Raises ``InfeasibleBudget`` or ``BudgetUnmet`` when the budgets cannot be, or are not, met, and the other classes of
    :mod:`autocompress.errors` for what cannot be used as given.
    """
    texts = [budgets] if isinstance(budgets, str) else list(budgets)
    fields = {
        "task": task if isinstance(task, str) else task.name,
        "budgets": texts,
        "data": [str(folder) for folder in data],
        "controller": controller,
        "evaluations": evaluations,
        "minutes": minutes,
        "seed": seed,
    }
    request = make_request({**fields, **options})
    given = None if isinstance(task, str) else task
    folder = Path(out) if out is not None else default_folder(request, given)
    return run(request, folder, task=given, progress=progress)

"""How results look in a terminal: progress by stage, a front, the paths that were written."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.table import Column, Table

from autocompress.api import judged_last
from autocompress.cli.console import err, out, say
from autocompress.dashboard.diagnosis import class_rows, contribution_rows, exemplar_rows, layer_rows, summary
from autocompress.dashboard.front import handed_out
from autocompress.dashboard.tables import race_rows
from autocompress.results import JobResult, Point, Progress, Stage

STAGE_WORDS: dict[Stage, str] = {
    "task": "loading the task",
    "graph": "finding the sites",
    "database": "building the level database",
    "profile": "taking the latency profile of the device",
    "search": "searching",
    "refit": "refitting the front",
    "recover": "distilling plans near the budgets",
    "export": "exporting to ONNX",
    "verify": "verifying the file",
    "diagnose": "diagnosing the plan",
}

LISTED = 10
"""Rows of each table of a diagnosis; ``--json`` has them all."""
WIDEST = 160
"""Columns a table may take; a terminal that is narrower wraps lines, but loses nothing."""


class StageProgress:
    """One bar a stage on a terminal; one line a stage where there is none (a log, a pipe)."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._stage: Stage | None = None
        self._rows: dict[Stage, TaskID] = {}
        self._bars: Bars | None = None
        if err.is_terminal:
            whole = Column(no_wrap=True)
            self._bars = Bars(
                SpinnerColumn(finished_text="[green]✓[/]"),
                TextColumn("{task.description}", table_column=whole),
                BarColumn(bar_width=16),
                TextColumn("{task.fields[steps]}", table_column=whole, justify="right"),
                TimeElapsedColumn(table_column=whole),
                TextColumn(
                    "[dim]{task.fields[message]}", table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1)
                ),
                console=err,
                expand=True,
            )

    def __enter__(self) -> StageProgress:
        if self._bars:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars:
            if error is None:
                self._complete()
            self._bars.stop()

    def __call__(self, tick: Progress) -> None:
        if tick.stage != self._stage:
            if self._bars:
                self._complete()
            else:
                say(f"[{time.monotonic() - self._started:6.1f} s] {STAGE_WORDS[tick.stage]} {tick.message}".rstrip())
            self._stage = tick.stage
        if self._bars:
            if tick.stage not in self._rows:
                self._rows[tick.stage] = self._bars.add_task(STAGE_WORDS[tick.stage], total=None, message="", steps="")
            steps = f"{tick.done}/{tick.total}" if tick.total else ""
            row, message = self._rows[tick.stage], escape(tick.message)
            self._bars.update(row, completed=tick.done, total=tick.total, message=message, steps=steps)

    def _complete(self) -> None:
        """Close the bar of the stage that ends: it is done, however many steps it announced."""
        if self._bars and self._stage:
            row = self._rows[self._stage]
            done = max(1, int(self._bars.tasks[row].completed))
            self._bars.update(row, completed=done, total=done, message="")


def number(value: float | None) -> str:
    """Four significant digits, and k, M or G for what is counted."""
    if value is None:
        return "–"
    value += 0.0  # no minus before a zero
    for least, unit, suffix in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if abs(value) >= least:
            return f"{value / unit:.4g} {suffix}"
    return f"{value:.4g}"


def front_rows(result: JobResult, x: str | None = None) -> list[Point]:
    """The original first, then the front from the costly to the cheap; the exported plan always among them.

    ``x``: the front in the loss and this cost, in place of the one that was searched.
    """
    key = x or next((key for key in result.objectives if key in result.original.costs), None)
    points = handed_out(result, x) if x else [p for p in result.points if p.on_front]
    if result.best not in (None, result.original.id, *(p.id for p in points)):
        points.append(judged_last(result, str(result.best)))
    points.sort(key=lambda p: (-(p.costs.get(key, 0.0) if key else 0.0), p.id))  # as predicted: all plans have that
    return [result.original, *points]


def cost_keys(result: JobResult, x: str | None = None) -> list[str]:
    """Costs worth a column: what is asked for, budgeted or traded, every device, then size and MACs; ``--json`` has them all."""
    devices = [key for key in result.original.costs if "@" in key]
    wanted = [*filter(None, [x]), *(row.key for row in result.budgets), *result.objectives, *devices, "size_mb", "macs"]
    return [key for key in dict.fromkeys(wanted) if key in result.original.costs]


def print_front(result: JobResult, x: str | None = None) -> None:
    """The front as a table, never cut off: metric, drop, costs as predicted and measured, budgets and rung; ``x``: its cost."""
    rows = front_rows(result, x)
    keys = cost_keys(result, x)
    timed = [key for key in keys if "@" in key and any(key in point.measured for point in rows)]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="bold")
    table.add_column("plan")
    for title in (result.metric_name, "drop", *map(result.key_label, keys), *(f"measured {key}" for key in timed)):
        table.add_column(title.replace("@", "\n@").replace("measured ", "measured\n", 1), justify="right")
    table.add_column("budgets")
    table.add_column("rung")
    for point in rows:
        holds = "[green]hold[/]" if point.feasible else f"[red]missed by {point.violation:.0%}[/]"
        values = (
            point.values.get("metric"),
            point.values.get("accuracy_drop"),
            *(point.costs.get(key) for key in keys),
        )
        numbers = [number(value) for value in (*values, *(point.measured.get(key) for key in timed))]
        is_best = point.id == result.best
        name = "original" if point.id == result.original.id else point.id[:8]
        table.add_row(
            name + (" *" if is_best else ""), *numbers, holds, point.fidelity, style="bold" if is_best else ""
        )
    which = f" of {result.key_label(x)}" if x else ""
    exported = ", * exported" if result.best else ""
    out.print(f"{result.task}: {len(rows) - 1} plans on the front{which}{exported}", markup=False)
    Console(width=max(out.width, WIDEST), highlight=False).print(table)


def print_race(result: JobResult) -> None:
    """What each controller of a race found, and what it took; the best in bold."""
    rows = race_rows(result)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="bold")
    for title in rows[0]:
        table.add_column(title, justify="left" if title == "controller" else "right")
    losses = [row["best loss"] for row in rows if row["best loss"] is not None]
    for row in rows:
        cells = [number(value) if not isinstance(value, str) else value for value in row.values()]
        table.add_row(*cells, style="bold" if losses and row["best loss"] == min(losses) else "")
    out.print(f"A race of {len(rows)} controllers; seconds are those of a processor.", markup=False)
    Console(width=max(out.width, WIDEST), highlight=False).print(table)


def print_diagnosis(result: JobResult) -> None:
    """What each method contributed, the layers, classes and exemplars that changed most, and the costliest levels."""
    diagnosis = result.diagnosis
    assert diagnosis is not None
    out.print(f"Plan {diagnosis.plan[:8]} on the rung {diagnosis.rung}. {summary(diagnosis)}", markup=False)
    levels = sorted(diagnosis.sensitivity, key=lambda row: -row.loss)
    layers = sorted(layer_rows(diagnosis), key=lambda row: -row["error"])
    _print_rows("The plan without each of its methods, refitted", contribution_rows(result))
    _print_rows("Layers with the largest error of their outputs", layers[:LISTED])
    _print_rows("Levels that cost most alone", [row.model_dump() for row in levels[:LISTED]])
    _print_rows("Classes that lost most", class_rows(diagnosis)[:LISTED])
    _print_rows("Exemplars, of the report split", exemplar_rows(diagnosis)[:LISTED])


def _print_rows(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    if not rows:
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="bold")
    for i, name in enumerate(rows[0]):
        table.add_column(name, justify="right" if i else "left")
    for row in rows:
        table.add_row(*(value if isinstance(value, str) else number(value) for value in row.values()))
    out.print(f"\n{title}", style="bold", markup=False)
    Console(width=max(out.width, WIDEST), highlight=False).print(table)


def front_json(result: JobResult, x: str | None = None) -> list[dict[str, Any]]:
    """The same rows for machines."""
    return [
        {
            "id": point.id,
            "original": point.id == result.original.id,
            "exported": point.id == result.best,
            "metric": point.values.get("metric"),
            "accuracy_drop": point.values.get("accuracy_drop"),
            "costs": point.costs,
            "intervals": point.intervals,
            "measured": point.measured,
            "feasible": point.feasible,
            "violation": point.violation,
            "rung": point.fidelity,
            "plan": point.plan,
        }
        for point in front_rows(result, x)
    ]

"""A run's folder opened: what it stands on, the models of its plans, and the evaluator that judges them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from autocompress.evaluate import Measurer, ModelEvaluator
from autocompress.files import write_text
from autocompress.models import Models
from autocompress.precision import allowed
from autocompress.prepare import Prepared, Ticker, prepare, recovery_of
from autocompress.results import Request
from autocompress.tasks import Task
from autocompress.types import Budget


@dataclass(frozen=True, eq=False)
class Opened:
    """``request``: with its steps of recovery; ``budgets``: absolute; ``notes``: sentences for whoever reads the results.

    The evaluator has no ledger yet.
    """

    request: Request
    made: Prepared
    budgets: list[Budget]
    models: Models
    evaluator: ModelEvaluator
    notes: list[str]


def open_run(
    request: Request,
    out: Path,
    task: Task | None,
    stages: Ticker,
    cancelled: Callable[[], bool] | None = None,
) -> Opened:
    """Prepare a request in the folder ``out``, or find there what was prepared before; request.json comes to lie there."""
    made = prepare(request, out, task, stages, cancelled)
    budgets = [b.absolute(made.dense_costs) for b in map(Budget.parse, request.budgets)]
    recovery = recovery_of(request, made, out)
    request = request.model_copy(update={"recover_steps": recovery.steps if recovery else 0})
    write_text(out / "request.json", request.model_dump_json(indent=1))
    where, told = allowed(made.database, request.device, request.precision, request.seed)
    measurer = Measurer(made.database, where=where)
    threads = torch.get_num_threads()
    evaluator = ModelEvaluator(made.database, made.costs, budgets, threads=threads, measurer=measurer)
    models = Models(made.database, out / "models", recovery, measurer.reference, cancelled)
    measurer.build, evaluator.recovery_key = models.deployed, models.recovery_key
    return Opened(request, made, budgets, models, evaluator, [*made.notes, *([told] if told else [])])

"""A finished run: one of its plans written as a verified ONNX file."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from autocompress.deliver import certified, choose, replay_command
from autocompress.errors import StoreError, UsageError
from autocompress.files import make_folder
from autocompress.ledger import Start
from autocompress.opened import open_run
from autocompress.results import JobResult, Progress
from autocompress.stages import Stages
from autocompress.tasks import Task
from autocompress.types import Evaluation
from autocompress.verify import certificate_of


def export(
    folder: Path,
    pick: str,
    out: Path | None = None,
    *,
    task: Task | None = None,
    progress: Callable[[Progress], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> dict[str, Any]:
    """Write one plan of a finished run as a verified ONNX file; see :func:`deliver.choose` for ``pick``.

    Returns ``onnx``, ``certificate`` and ``statements``. Raises :class:`UsageError` when the run has no such plan.
    """
    try:
        result = JobResult.model_validate_json((folder / "result.json").read_bytes())
    except OSError as error:
        raise UsageError(f"{folder} holds no result.json; run the job first.") from error
    except ValueError as error:
        raise StoreError(
            f"{folder / 'result.json'} is damaged or was written by another version of AutoCompress; run the job again."
        ) from error
    request = result.request
    if request is None:
        raise UsageError(f"{folder / 'result.json'} does not say what was asked; run the job again.")
    stages = Stages(progress)
    torch.set_num_threads(request.threads or len(os.sched_getaffinity(0)))
    point = choose(result, pick)
    run = open_run(request, folder, task, stages, cancelled)
    path = out or folder / f"{point.id}.onnx"
    make_folder(path.parent)
    plan = run.made.space.plan_from_json(point.levels)
    evaluation = Evaluation(plan, point.fidelity, point.values, point.costs, point.violation)
    again = shlex.join(["autocompress", "export", str(folder), "--pick", point.id, "--out", str(path)])
    replay = f"{replay_command(request, folder, result.evaluations, result.race)} && {again}"
    with stages.at("export", point.id):
        ledger = result.ledger.hash if result.ledger else Start().hash
        delivered = certified(
            evaluation, run.models, run.made, path, request, replay, ledger, lambda: stages.at("verify")
        )
    return {
        "onnx": str(path),
        "certificate": str(certificate_of(path)),
        "plan": point.id,
        "holds": delivered.holds,
        "statements": list(delivered.statements),
    }

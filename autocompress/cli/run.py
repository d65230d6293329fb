"""The verbs that work in the foreground: compress, export and check."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from autocompress.cli import options as o
from autocompress.cli.console import out, print_json, quiet_stdout, say
from autocompress.cli.find import find
from autocompress.cli.tables import StageProgress, front_json, print_diagnosis, print_front, print_race
from autocompress.errors import BudgetUnmet, UsageError
from autocompress.results import JobResult

FILES = ("model.onnx", "certificate.json", "front.png", "sensitivity.png", "race.png", "result.json")


def compress(
    task: o.TaskSpec,
    budget: o.Budgets,
    out_folder: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Folder for the results; default: runs/TASK-HASH.")
    ] = None,
    controller: o.Controller = "auto",
    race: o.Race = False,
    evaluations: o.Evaluations = None,
    minutes: o.Minutes = None,
    warm: o.Warm = False,
    warm_from: o.WarmFrom = None,
    seed: o.Seed = 0,
    methods: o.Methods = o.ALL_METHODS,
    importance: o.Importance = o.DEFAULT_IMPORTANCE,
    profile: o.Profiles = None,
    recover_minutes: o.RecoverMinutes = 2.0,
    recover_steps: o.RecoverSteps = None,
    recovery: o.RecoveryRecipe = "logits",
    batch: o.Batch = 1,
    threads: o.Threads = 1,
    device: o.Device = "cpu",
    precision: o.Precision = "auto",
    workers: o.Workers = None,
    data: o.Data = None,
    as_json: o.Json = False,
) -> None:
    """Search, recover, export and verify, here and now.

    Interrupted, the same command continues where it stopped. Exit code 3: a budget cannot be met, or does not hold
    when measured.

    \b
    Example:
      autocompress compress digits --budget 'latency_ms<=50%@local' --budget 'size_mb<=0.3' --out digits
    """
    request = o.request_of(locals())
    from autocompress import api

    folder = out_folder or api.default_folder(request)
    try:
        with quiet_stdout(), StageProgress() as progress:
            result = api.run(request, folder, progress=progress).result
    except BudgetUnmet as error:
        _show(api.read_result(folder), folder, as_json, error)  # what there is, beside what is not
        raise typer.Exit(error.exit_code) from None
    _show(result, folder, as_json)


def _show(result: JobResult, folder: Path, as_json: bool, error: BudgetUnmet | None = None) -> None:
    if as_json:
        failure = {"error": str(error), "exit_code": error.exit_code} if error else {}
        print_json({**failure, **result_json(result, folder)})
    else:
        show_result(result, folder)
    if error:
        say(str(error))


def result_json(result: JobResult, folder: Path) -> dict[str, Any]:
    """A finished run for machines: where its files are, and the front."""
    files = {name: str(folder / name) for name in FILES if (folder / name).is_file()}
    return {
        "task": result.task,
        "folder": str(folder),
        "files": files,
        "best": result.best,
        "evaluations": result.evaluations,
        "hypervolume": result.hypervolume,
        "seconds": result.seconds,
        "notes": list(result.notes),
        "front": front_json(result),
        "race": [entry.model_dump(mode="json") for entry in result.race],
    }


def show_result(result: JobResult, folder: Path) -> None:
    """A finished run for people: the front, what the certificate states, the files."""
    print_front(result)
    if result.race:
        print_race(result)
    for note in result.notes:
        out.print(f"• {note}", markup=False)
    spent = sum(result.seconds.values())
    out.print(f"{result.evaluations} evaluations, {spent:.0f} s.")
    for name in FILES:
        if (folder / name).is_file():
            out.print(f"  {folder / name}", markup=False)


def diagnose(
    job: o.JobName,
    png: Annotated[Path | None, typer.Option("--png", metavar="FILE", help="Draw the sensitivity map, too.")] = None,
    store: o.Store = None,
    as_json: o.Json = False,
) -> None:
    """Say what compression did to the model, where, and by what.

    Of the plan that a job handed out: examples and classes whose answers changed, the loss of each level at each site, the
    error of each layer's outputs, and the plan without each of its methods.

    \b
    Example:
      autocompress diagnose 3f2a --png sensitivity.png
    """
    found = find(job, store)
    result = found.need_result()
    if result.diagnosis is None:
        raise UsageError(f"The result in {found.folder} has no diagnosis; run the job again.")
    if png is not None:
        if png.suffix != ".png":
            raise UsageError(f"--png names a .png file, got {str(png)!r}.")
        from autocompress.dashboard.picture import write_sensitivity_png

        write_sensitivity_png(result, png, result.point(result.diagnosis.plan).plan)
    if as_json:
        print_json({"diagnosis": result.diagnosis.model_dump(mode="json"), "picture": str(png) if png else None})
        return
    print_diagnosis(result)
    if png is not None:
        out.print(f"  {png}", markup=False)


def export(
    job: o.JobName,
    pick: Annotated[
        str, typer.Option("--pick", help="knee, fastest, best, smallest, a plan's id, or a limit like 'latency_ms<=4'.")
    ] = "best",
    out_file: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="The ONNX file; default: beside the job's results.")
    ] = None,
    store: o.Store = None,
    as_json: o.Json = False,
) -> None:
    """Write a plan of a job as a verified ONNX file.

    Its certificate lies beside it. Exit code 4: the file does not compute what was searched.

    \b
    Example:
      autocompress export 3f2a --pick 'latency_ms<=4' --out model.onnx
    """
    if out_file is not None and out_file.suffix != ".onnx":
        raise UsageError(f"--out names an .onnx file, got {str(out_file)!r}.")
    found = find(job, store)
    result = found.need_result()
    with quiet_stdout(), StageProgress() as progress:
        from autocompress import devices, finished

        devices.check_limit(result, pick)
        written = finished.export(found.folder, pick, out_file, progress=progress)
    if as_json:
        print_json(written)
        return
    for statement in written["statements"]:
        out.print(f"• {statement}", markup=False)
    for name in ("onnx", "certificate"):
        out.print(f"  {written[name]}", markup=False)

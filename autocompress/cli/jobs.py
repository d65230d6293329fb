"""The verbs around the job store: submit, worker, jobs list, show, front and cancel."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from autocompress.cli import options as o
from autocompress.cli.console import out, print_json, say
from autocompress.cli.find import find
from autocompress.cli.run import result_json, show_result
from autocompress.cli.tables import STAGE_WORDS, front_json, print_front
from autocompress.errors import UnknownName, UsageError
from autocompress.results import JobResult

if TYPE_CHECKING:
    from autocompress.service.store import Job

jobs_app = typer.Typer(help="Look at the jobs of the store.", no_args_is_help=True, rich_markup_mode=None)


def job_json(job: Job) -> dict[str, Any]:
    """A row of the store for machines; times in seconds since 1970."""
    return {
        "id": job.id,
        "kind": job.kind,
        "state": job.state,
        "request": job.request,
        "folder": str(job.folder),
        "created": job.created,
        "started": job.started,
        "finished": job.finished,
        "progress": job.progress.model_dump() if job.progress else None,
        "error": job.error,
        "exit_code": job.exit_code,
    }


def submit(
    task: o.TaskSpec,
    budget: o.Budgets,
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
    store: o.Store = None,
    as_json: o.Json = False,
) -> None:
    """Put the same job into the store, for a worker to run.

    \b
    Example:
      autocompress submit digits --budget 'latency_ms<=50%@local' --budget 'accuracy_drop<=1.0'
    """
    request = o.request_of(locals())
    with o.open_store(store) as jobs:
        job = jobs.submit("compress", request)
        if as_json:
            print_json(job_json(job))
            return
        out.print(f"Job {job.id} is queued in {jobs.path}.", markup=False)
        out.print(f"Run it with 'autocompress worker --once'; look at it with 'autocompress show {job.id}'.")


def worker(
    once: Annotated[bool, typer.Option("--once", help="Stop when no job is queued.")] = False,
    store: o.Store = None,
    as_json: o.Json = False,
) -> None:
    """Run queued jobs, one after another.

    Ctrl-C puts the running one back into the queue. Exit code 0 also when a job failed: each job keeps its own, see
    'autocompress show'.

    \b
    Example:
      autocompress worker --once
    """
    from autocompress.service.worker import work

    seen: dict[str, tuple[str, str | None]] = {}

    def tell(job: Job) -> None:
        now = (job.state, job.progress.stage if job.progress else None)
        if seen.get(job.id) != now:
            seen[job.id] = now
            say(f"{time.strftime('%H:%M:%S')} {job.id} {describe(job)}")

    with o.open_store(store) as jobs:
        say(f"Working on {jobs.path}{'' if once else '; Ctrl-C stops'}.")
        count = work(jobs, once=once, on_event=tell)
        if as_json:
            print_json({"jobs": count, "ids": list(seen), "states": {i: jobs.get(i).state for i in seen}})
        else:
            out.print(f"{count} job{'' if count == 1 else 's'} done.")


def describe(job: Job) -> str:
    """State and, while it runs, its stage; why it failed, if it did."""
    if job.state == "running" and job.progress:
        tick = job.progress
        steps = f" {tick.done}/{tick.total}" if tick.total else ""
        return f"running: {STAGE_WORDS[tick.stage]}{steps}"
    if job.state == "failed":
        return f"failed: {job.error}"
    return "running, to be cancelled" if job.state == "running" and job.cancel_requested else job.state


@jobs_app.command("list")
def jobs_list(store: o.Store = None, as_json: o.Json = False) -> None:
    """List the jobs of the store, the newest first.

    \b
    Example:
      autocompress jobs list
    """
    with o.open_store(store) as jobs:
        rows = jobs.list()
        place = jobs.path
    if as_json:
        print_json([job_json(job) for job in rows])
        return
    if not rows:
        out.print(f"No jobs in {place}; 'autocompress submit' adds one.", markup=False)
        return
    table = Table(header_style="bold")
    for column in ("job", "kind", "what", "submitted", "state"):
        table.add_column(column)
    for job in rows:
        submitted = time.strftime("%Y-%m-%d %H:%M", time.localtime(job.created))
        table.add_row(job.id, job.kind, _what(job), submitted, describe(job))
    out.print(table, markup=False)


def _what(job: Job) -> str:
    if job.kind == "compress":
        return f"{job.request['task']}  {'  '.join(job.request['budgets'])}"
    if job.kind == "export":
        return f"{job.request['job']}  {job.request['pick']}"
    return ""


def show(job: o.JobName, store: o.Store = None, as_json: o.Json = False) -> None:
    """Show where a job stands, and its outcome.

    \b
    Example:
      autocompress show 3f2a
    """
    found = find(job, store)
    if as_json:
        outcome = result_json(found.result, found.folder) if found.result else None
        print_json({"job": job_json(found.job) if found.job else None, "result": outcome})
        return
    if found.job:
        out.print(f"Job {found.job.id}: {describe(found.job)}", markup=False)
        out.print(_what(found.job), markup=False)
    if found.result:
        show_result(found.result, found.folder)
    else:
        out.print(f"Its files: {found.folder}", markup=False)


def front(
    job: o.JobName,
    png: Annotated[Path | None, typer.Option("--png", metavar="FILE", help="Draw the front, too.")] = None,
    x: Annotated[str | None, typer.Option("--x", metavar="COST", help="The front's cost, such as size_mb.")] = None,
    device: Annotated[
        str | None, typer.Option("--device", metavar="NAME", help="The same as --x latency_ms@NAME.")
    ] = None,
    store: o.Store = None,
    as_json: o.Json = False,
) -> None:
    """Print a job's Pareto front.

    As a table and, with --png, as a picture. With --x or --device it is that of the loss and another cost.

    \b
    Example:
      autocompress front 3f2a --png front.png
      autocompress front 3f2a --device pixel3 --png pixel3.png
    """
    found = find(job, store)
    result = found.need_result()
    x = _cost(result, x, device)
    if png is not None:
        _draw(result, png, x)
    if as_json:
        print_json({"task": result.task, "front": front_json(result, x), "picture": str(png) if png else None})
        return
    print_front(result, x)
    if png is not None:
        out.print(f"  {png}", markup=False)


def _cost(result: JobResult, x: str | None, device: str | None) -> str | None:
    """The cost of the front that is wanted; ``None`` is the one that was searched."""
    if x is not None and device is not None:
        raise UsageError(f"A front has one cost: --x {x} or --device {device}, not both; leave one out.")
    if device is not None:
        return result.device_key(device)
    if x is not None and x not in result.original.costs:
        raise UnknownName("cost", x, result.original.costs)
    return x


def _draw(result: JobResult, path: Path, x: str | None) -> None:
    if path.suffix != ".png":
        raise UsageError(f"--png names a .png file, got {str(path)!r}.")
    from autocompress.dashboard.picture import write_front_png

    write_front_png(result, path, x)


def cancel(job: o.JobName, store: o.Store = None, as_json: o.Json = False) -> None:
    """Cancel a queued or a running job.

    What a running one has done so far is kept; a finished one stays as it is.

    \b
    Example:
      autocompress cancel 3f2a
    """
    with o.open_store(store) as jobs:
        before = jobs.get(job)
        if before.over:
            raise UsageError(f"Only a queued or running job can be cancelled, {before.id} has {before.state}.")
        after = jobs.cancel(before.id)
    if as_json:
        print_json(job_json(after))
    else:
        out.print(f"Job {after.id} is {'cancelled' if after.over else 'asked to stop; its worker will do so'}.")

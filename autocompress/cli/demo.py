"""``autocompress demo``: the whole way through on scikit-learn's digits, with the real store, worker and files."""

from __future__ import annotations

import json
import math
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from autocompress.cli import options as o
from autocompress.cli.console import out, print_json, say
from autocompress.cli.tables import StageProgress, front_json, print_front
from autocompress.errors import AutoCompressError, StoreError
from autocompress.results import JobResult, Request

if TYPE_CHECKING:
    from autocompress.service.store import Job, JobStore

BUDGETS = ("latency_ms<=70%@local", "size_mb<=40%")
EVALUATIONS = 240
RECOVER_MINUTES = 0.2


def demo(
    out_folder: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="Where the demo keeps its store, picture and model.")
    ] = Path("autocompress-demo"),
    evaluations: Annotated[
        int, typer.Option("--evaluations", help="How many plans the search may judge.")
    ] = EVALUATIONS,
    seed: o.Seed = 0,
    as_json: o.Json = False,
) -> None:
    """Compress a small network end to end.

    Under five minutes on two cores: submits a digits job with a latency and a size budget, runs it, shows its front,
    exports an ONNX file and verifies it.

    \b
    Example:
      autocompress demo --out autocompress-demo
    """
    from autocompress.dashboard.picture import write_front_png
    from autocompress.validate import make_request

    fields = {
        "task": "digits",
        "budgets": BUDGETS,
        "evaluations": evaluations,
        "seed": seed,
        "recover_minutes": RECOVER_MINUTES,
        "threads": 1,
    }
    request = make_request(fields)
    with o.open_store(str(out_folder / "jobs.sqlite")) as store:
        job = _queue(store, request)
        say(f"1. Job {job.id}: digits under {' and '.join(request.budgets)}, in {store.path}.")
        job = _work(store, job)
        result = _result(store, job)
        picture = write_front_png(result, out_folder / "front.png")
        if not as_json:
            say("2. The front: no plan here is beaten in every respect by another.")
            print_front(result)
        say("3. The most accurate plan within the budgets as an ONNX file, verified.")
        model = out_folder.absolute() / "model.onnx"
        export = _work(store, store.submit("export", {"job": job.id, "pick": "best", "out": str(model)}))
        _raise_if_failed(export)
        written = store.outcome(export.id) or {}
    following = next_commands(out_folder, job.id, written)
    if as_json:
        print_json(
            {"job": job.id, "front": front_json(result), "picture": str(picture), "export": written, "next": following}
        )
        return
    for statement in written["statements"]:
        out.print(f"• {statement}", markup=False)
    for path in (written["onnx"], written["certificate"], picture):
        out.print(f"  {path}", markup=False)
    out.print("\nWhat to try next:", *(f"  {line}" for line in following), sep="\n", markup=False)


def _queue(store: JobStore, request: Request) -> Job:
    """The job that an interrupted demo left behind, else a new one."""
    content = request.model_dump(mode="json")
    left = [job for job in store.list(kind="compress") if not job.over and job.request == content]
    return left[0] if left else store.submit("compress", request)


def _work(store: JobStore, job: Job) -> Job:
    """Run the store's queue with progress on the screen; returns the job as it ended."""
    from autocompress.service.worker import work

    with StageProgress() as progress:

        def tell(event: Job) -> None:
            if event.id == job.id and event.state == "running" and event.progress:
                progress(event.progress)

        work(store, once=True, poll_seconds=0.2, on_event=tell)
    return store.get(job.id)


def _result(store: JobStore, job: Job) -> JobResult:
    """The job's result; a failed job raises its own sentence with its own exit code."""
    _raise_if_failed(job)
    result = store.result(job.id)
    if result is None:
        raise StoreError(f"Job {job.id} is {job.state} and has no result; run the same command again.")
    return result


def _raise_if_failed(job: Job) -> None:
    if job.state == "succeeded":
        return
    error = AutoCompressError(job.error or f"Job {job.id} is {job.state}; run the same command again.")
    error.exit_code = job.exit_code or AutoCompressError.exit_code
    raise error


def next_commands(folder: Path, job: str, written: dict[str, Any]) -> list[str]:
    """Commands that work as they stand, after this very demo."""
    store = f"--store {shlex.quote(str(folder / 'jobs.sqlite'))}"
    model = shlex.quote(str(folder / "model.onnx"))
    fast = shlex.quote(str(folder / "fastest" / "model.onnx"))
    lost = json.loads(Path(written["certificate"]).read_text())["costs"]["compressed"]["accuracy_drop"]
    drop = max(math.ceil(lost), 0) + 1  # points, with room: a command that is shown must hold
    return [
        f"autocompress front {job} --x size_mb --png {shlex.quote(str(folder / 'size.png'))} {store}",
        f"autocompress export {job} --pick fastest --out {fast} {store}",
        f"autocompress check {model} --task digits --budget 'size_mb<=0.5' --budget 'accuracy_drop<={drop}'",
        f"autocompress dashboard {store}",
        "autocompress compress digits --budget 'macs<=30%' --budget 'accuracy_drop<=1' --out digits-macs",
        "autocompress compress --help",
    ]

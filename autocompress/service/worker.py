"""Runs queued jobs, each in a process of its own, so that a job can be stopped and its crash stays its own.

Nothing is lost when a worker is killed: its job goes back to the queue, and the pipeline resumes from the job's folder
and ledger.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType
from typing import Any

from pydantic import BaseModel, ValidationError

from autocompress.errors import AutoCompressError, Cancelled, UsageError
from autocompress.results import JobResult, Progress, Request
from autocompress.service.store import Job, JobStore, shared_ledger

Outcome = BaseModel | Mapping[str, Any]
Runner = Callable[[JobStore, Job, Callable[[Progress], None], Callable[[], bool]], Outcome]
"""``(store, job, progress, cancelled) -> result``; a module's function, because it runs in another process."""

PROGRESS_SECONDS = 0.25
BUG = 70
"""Exit code of what no one foresaw (sysexits' EX_SOFTWARE)."""


def run_job(store: JobStore, job: Job, progress: Callable[[Progress], None], cancelled: Callable[[], bool]) -> Outcome:
    """What a job asks for, by the pipeline. A job's ledger is its own and starts empty, or as the job says (determinism)."""
    if job.kind not in ("compress", "export"):
        raise UsageError(f"A worker runs jobs of kind compress and export, got {job.kind!r}.")
    from autocompress import finished, pipeline

    if job.kind == "compress":
        request = Request.model_validate(job.request)
        return pipeline.compress(
            request,
            job.folder,
            ledger=store.ledger(job.id),
            shared=shared_ledger,
            progress=progress,
            cancelled=cancelled,
        )
    source = store.get(job.request["job"])
    out = Path(job.request["out"]) if job.request["out"] else job.folder / "model.onnx"
    return finished.export(source.folder, job.request["pick"], out, progress=progress, cancelled=cancelled)


def work(
    store: JobStore,
    *,
    once: bool = False,
    poll_seconds: float = 1.0,
    grace_seconds: float = 10.0,
    lost_seconds: float = 60.0,
    runner: Runner = run_job,
    on_event: Callable[[Job], None] = lambda job: None,
) -> int:
    """Run queued jobs until interrupted (``once``: until none is queued); returns how many were run.

    ``on_event`` gets a job when it is requeued, taken, makes progress or ends. A cancelled job gets ``grace_seconds``
    to stop by itself. Ctrl-C and SIGTERM put the running job back into the queue and raise ``KeyboardInterrupt``.
    """
    count = 0
    with _terminable():
        while True:
            for lost in store.requeue_lost(lost_seconds):
                on_event(lost)
            job = store.claim()
            if job is not None:
                on_event(job)
                _supervise(store, job, runner, min(poll_seconds, lost_seconds / 4), grace_seconds, on_event)
                on_event(store.get(job.id))
                count += 1
            elif once:
                return count
            else:
                time.sleep(poll_seconds)


def _supervise(
    store: JobStore, job: Job, runner: Runner, poll: float, grace: float, on_event: Callable[[Job], None]
) -> None:
    """Start the job's process and stay beside it until it is over."""
    process = multiprocessing.get_context("spawn").Process(target=_child, args=(str(store.path), job, runner))
    process.start()
    seen: Progress | None = None
    try:
        while process.is_alive():
            process.join(poll)
            signal_now = store.heartbeat(job)
            if signal_now == "cancel":
                _stop(process, grace)
                store.stopped(job)
            elif signal_now == "lost":
                _stop(process, grace)  # over already, or another worker has it now
            elif (current := store.get(job.id)).progress != seen:
                seen = current.progress
                on_event(current)
    except BaseException:
        _stop(process, grace)
        with suppress(AutoCompressError):
            store.release(job)
        raise
    if store.heartbeat(job) != "lost":  # it ended without a word: a crash in native code, or out of memory
        store.fail(job, _death(process.exitcode, job))


def _death(exit_code: int | None, job: Job) -> str:
    code = exit_code or 0
    how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
    hint = " (often: out of memory)" if code == -signal.SIGKILL else ""
    return f"The job's process {how}{hint} before it had a result; see {job.folder / 'job.log'}."


def _stop(process: BaseProcess, grace: float) -> None:
    """Ask first (SIGINT makes ``cancelled()`` true), then kill with all that it started."""
    if process.pid is None:
        return
    with suppress(ProcessLookupError):
        if process.is_alive():
            os.kill(process.pid, signal.SIGINT)
    process.join(grace)
    if process.is_alive():
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()  # it may not have come as far as having a group
    process.join()


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends a worker like Ctrl-C does, where signals can be handled (the main thread)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


# ---------------------------------------------------------------- in the job's process


def _child(path: str, job: Job, runner: Runner) -> None:
    stop = threading.Event()

    def interrupted(_number: int, _frame: FrameType | None) -> None:
        stop.set()

    signal.signal(signal.SIGINT, interrupted)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.setpgid(0, 0)  # Ctrl-C in the terminal reaches the worker only, which then asks
    threading.Thread(target=_die_with_parent, daemon=True).start()
    _log_to(job.folder / "job.log")
    with JobStore(path) as store:
        _run(store, job, runner, stop)


def _run(store: JobStore, job: Job, runner: Runner, stop: threading.Event) -> None:
    try:
        result = runner(store, job, _throttled(store, job), stop.is_set)
    except Cancelled:
        if store.heartbeat(job) == "cancel":  # otherwise its worker is going and has put the job back
            store.stopped(job)
    except AutoCompressError as error:
        store.fail(job, str(error), error.exit_code, _what_there_is(job))
    except Exception as error:
        (job.folder / "error.log").write_text(traceback.format_exc(), encoding="utf-8")
        traceback.print_exc()
        store.fail(job, f"{type(error).__name__}: {error} (traceback in {job.folder / 'error.log'})", BUG)
    else:
        store.finish(job, result)


def _what_there_is(job: Job) -> JobResult | None:
    """A job whose budget is missed when measured fails, but the front it wrote is worth seeing."""
    try:
        return (
            JobResult.model_validate_json((job.folder / "result.json").read_bytes()) if job.kind == "compress" else None
        )
    except (OSError, ValidationError):
        return None


def _throttled(store: JobStore, job: Job) -> Callable[[Progress], None]:
    """Writes at most four ticks a second, but every change of stage and every last tick."""
    last: tuple[float, str] = (0.0, "")

    def progress(tick: Progress) -> None:
        nonlocal last
        now = time.monotonic()
        if tick.stage == last[1] and now - last[0] < PROGRESS_SECONDS and tick.done != tick.total:
            return
        last = (now, tick.stage)
        store.progress(job, tick)

    return progress


def _die_with_parent() -> None:
    """A worker that is killed takes its job's processes along; the job is run again by the next one."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os.killpg(0, signal.SIGKILL)


def _log_to(path: Path) -> None:
    """What a job prints (exporters print a lot) goes to its log and not into the worker's terminal."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)

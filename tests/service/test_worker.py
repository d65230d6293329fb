"""Workers with real processes: success, failure, crash, cancellation, kill -9 and Ctrl-C."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from autocompress.results import Request
from autocompress.service.store import Job, JobStore
from autocompress.service.worker import Runner, work
from tests.dashboard import sample
from tests.service import runners

REQUEST = Request(task="digits", budgets=("size_mb<=1",))


@pytest.fixture
def store(tmp_path: Path) -> Iterator[JobStore]:
    with JobStore(tmp_path / "jobs.sqlite") as store:
        yield store


def run(store: JobStore, runner: Runner, grace: float = 5.0) -> list[Job]:
    events: list[Job] = []
    work(store, once=True, poll_seconds=0.05, grace_seconds=grace, runner=runner, on_event=events.append)
    return events


def start_worker(store: JobStore, runner: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.service.worker_main", str(store.path), runner]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(condition: Callable[[], object], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)


def started(store: JobStore, job: Job, done: int) -> bool:
    tick = store.get(job.id).progress
    return tick is not None and tick.done >= done


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.mark.slow
def test_it_runs_what_is_queued(store: JobStore) -> None:
    jobs = [store.submit("compress", REQUEST) for _ in range(2)]
    events = run(store, runners.count_to_twenty)
    assert [store.get(job.id).state for job in jobs] == ["succeeded"] * 2
    assert store.outcome(jobs[0].id) == {"total": 2470, "computed": 20}
    states = [event.state for event in events if event.id == jobs[0].id]
    assert states[0] == "running" and states[-1] == "succeeded"
    assert any(event.progress and 0 < event.progress.done < 20 for event in events)


@pytest.mark.parametrize(
    ("runner", "message", "exit_code"),
    [
        (runners.miss_a_budget, "^The plan takes 7 ms and the budget is 5 ms.$", 3),
        (runners.divide_by_zero, "^ZeroDivisionError: .*error.log", 70),
        (runners.die, "killed by signal 9 .*out of memory", 2),
    ],
)
def test_failures_are_told(store: JobStore, runner: Runner, message: str, exit_code: int) -> None:
    job = store.submit("compress", REQUEST)
    run(store, runner)
    ended = store.get(job.id)
    assert (ended.state, ended.exit_code) == ("failed", exit_code)
    assert re.search(message, ended.error or "")
    assert (ended.folder / "error.log").exists() == (exit_code == 70)


def test_a_failed_job_keeps_the_front_it_wrote(store: JobStore) -> None:
    job = store.submit("compress", REQUEST)
    run(store, runners.miss_a_budget_with_a_front)
    assert (store.get(job.id).state, store.get(job.id).exit_code) == ("failed", 3)
    assert store.result(job.id) == sample.result()


@pytest.mark.slow
def test_a_running_job_is_cancelled(store: JobStore) -> None:
    job = store.submit("compress", REQUEST)
    canceller = threading.Thread(target=lambda: (wait_for(lambda: started(store, job, 2)), store.cancel(job.id)))
    canceller.start()
    run(store, runners.count_to_twenty)
    canceller.join()
    assert store.get(job.id).state == "cancelled" and 2 <= len(store.ledger(job.id)) < 20


@pytest.mark.slow
def test_a_deaf_job_is_killed_with_its_processes(store: JobStore) -> None:
    job = store.submit("compress", REQUEST)
    canceller = threading.Thread(target=lambda: (wait_for(lambda: started(store, job, 1)), store.cancel(job.id)))
    canceller.start()
    run(store, runners.never_ask, grace=0.2)
    canceller.join()
    assert store.get(job.id).state == "cancelled"
    wait_for(lambda: gone(int((job.folder / "child").read_text())))


@pytest.mark.slow
def test_a_killed_worker_loses_nothing(store: JobStore) -> None:
    """kill -9 of the worker in mid-job: its job's process dies too, the next worker finishes from the ledger."""
    job = store.submit("compress", REQUEST)
    worker = start_worker(store, "count_to_twenty")
    wait_for(lambda: started(store, job, 5))
    worker.kill()
    worker.communicate()
    kept = len(store.ledger(job.id))
    time.sleep(0.5)
    assert 5 <= len(store.ledger(job.id)) <= kept + 1 and store.get(job.id).state == "running"
    events = run(store, runners.count_to_twenty)
    assert (events[0].state, events[0].attempts) == ("queued", 1)
    outcome = store.outcome(job.id)
    assert outcome is not None and outcome["total"] == 2470 and 19 - kept <= outcome["computed"] <= 20 - kept
    assert store.get(job.id).attempts == 2


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_worker_puts_its_job_back(store: JobStore, number: signal.Signals) -> None:
    job = store.submit("compress", REQUEST)
    worker = start_worker(store, "count_to_twenty")
    wait_for(lambda: started(store, job, 2))
    worker.send_signal(number)
    worker.communicate(timeout=30)
    assert worker.returncode != 0
    waiting = store.get(job.id)
    assert (waiting.state, waiting.attempts, waiting.pid) == ("queued", 0, None)
    run(store, runners.count_to_twenty)
    assert store.get(job.id).state == "succeeded"


@pytest.mark.slow
def test_two_workers_share_the_queue(store: JobStore) -> None:
    jobs = [store.submit("compress", REQUEST) for _ in range(4)]
    workers = [start_worker(store, "count_to_twenty") for _ in range(2)]
    outputs = [worker.communicate(timeout=60)[0] for worker in workers]
    assert [store.get(job.id).state for job in jobs] == ["succeeded"] * 4
    for job in jobs:
        assert store.outcome(job.id) == {"total": 2470, "computed": 20}
        assert sum(f"{job.id} succeeded" in output for output in outputs) == 1


def test_a_kind_without_a_runner_fails_in_a_sentence(store: JobStore) -> None:
    job = store.submit("measure", {"model": "model.onnx"})
    work(store, once=True, poll_seconds=0.05)
    assert "compress and export, got 'measure'" in (store.get(job.id).error or "")
    assert (job.folder / "job.log").exists()

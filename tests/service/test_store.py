"""The contract of the job store: states, claims, ids, the ledger, and files it must refuse."""

from __future__ import annotations

import math
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from sqlalchemy import event

from autocompress.errors import StoreError, UnknownName, UsageError
from autocompress.results import JobResult, Point, Progress, Request
from autocompress.service.store import MAX_ATTEMPTS, Job, JobStore
from autocompress.types import Ledger

REQUEST = Request(task="digits", budgets=("size_mb<=1",), evaluations=10)


@pytest.fixture
def store(tmp_path: Path):
    with JobStore(tmp_path / "home" / "jobs.sqlite") as store:
        yield store


def claimed(store: JobStore) -> Job:
    job = store.claim()
    assert job is not None
    return job


def test_a_job_goes_its_way(store: JobStore) -> None:
    queued = store.submit("compress", REQUEST)
    assert (queued.state, queued.kind, queued.over) == ("queued", "compress", False)
    assert Request.model_validate(queued.request) == REQUEST
    assert queued.folder.is_dir() and queued.folder == store.path.parent / "jobs" / queued.id
    job = claimed(store)
    assert (job.id, job.state, job.pid) == (queued.id, "running", os.getpid())
    assert store.claim() is None
    assert store.heartbeat(job) == "go on"
    tick = Progress(stage="search", done=3, total=10, message="generation 1")
    assert store.progress(job, tick) and store.get(job.id).progress == tick
    dense = Point(id="00ff", plan={}, levels={}, fidelity="full", values={"loss": 0.0}, costs={"size_mb": 2.0})
    broken = dense.model_copy(update={"values": {"loss": math.inf}, "violation": math.inf, "feasible": False})
    result = JobResult(
        task="digits",
        metric_name="accuracy",
        higher_is_better=True,
        original=dense,
        budgets=(),
        objectives=("loss", "size_mb"),
        sites=(),
        points=(broken,),
        request=REQUEST,
    )
    assert store.result(job.id) is None
    assert store.finish(job, result)
    done = store.get(job.id)
    assert (done.state, done.exit_code, done.error) == ("succeeded", 0, None)
    assert done.finished is not None and done.started is not None and done.finished >= done.started
    assert store.result(job.id) == result
    assert store.heartbeat(job) == "lost" and not store.fail(job, "too late") and not store.progress(job, tick)


def test_oldest_first_but_exports_before_all(store: JobStore) -> None:
    first, second = store.submit("compress", REQUEST), store.submit("compress", REQUEST)
    export = store.submit("export", {"job": first.id[:6], "pick": "knee"})
    assert export.request == {"job": first.id, "pick": "knee", "out": None}
    assert [job.id for job in store.list()] == [export.id, second.id, first.id]
    assert [claimed(store).id for _ in range(3)] == [export.id, first.id, second.id]
    assert [job.id for job in store.list(kind="compress", state="running", limit=1)] == [second.id]


def test_cancel(store: JobStore) -> None:
    queued = store.submit("compress", REQUEST)
    assert store.cancel(queued.id).state == "cancelled" and store.claim() is None
    store.submit("compress", REQUEST)
    job = claimed(store)
    assert store.cancel(job.id).state == "running" and store.heartbeat(job) == "cancel"
    assert store.stopped(job)
    ended = store.get(job.id)
    assert (ended.state, ended.exit_code) == ("cancelled", 130)
    assert store.cancel(job.id) == ended


def test_a_released_job_is_claimed_again_by_another_claim(store: JobStore) -> None:
    store.submit("compress", REQUEST)
    first = claimed(store)
    assert store.release(first) and not store.finish(first, {"late": 1})
    second = claimed(store)
    assert second.id == first.id and second.claim != first.claim and second.attempts == 1
    assert store.heartbeat(first) == "lost"


def test_lost_jobs(store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.submit("compress", REQUEST)
    assert claimed(store) and store.requeue_lost() == ()  # this process lives
    for attempt in range(1, MAX_ATTEMPTS):
        (job,) = store.requeue_lost(timeout=-1.0)
        assert (job.state, job.attempts) == ("queued", attempt)
        claimed(store)
    (job,) = store.requeue_lost(timeout=-1.0)
    assert job.state == "failed" and "died 5 times" in (job.error or "")
    store.submit("compress", REQUEST)
    store.cancel(claimed(store).id)
    assert [job.state for job in store.requeue_lost(timeout=-1.0)] == ["cancelled"]


def test_ids(store: JobStore) -> None:
    ids = [store.submit("compress", REQUEST).id for _ in range(20)]
    assert store.get(ids[3][:7].upper()).id == ids[3]
    wrong = ids[5][:-1] + ("0" if ids[5][-1] != "0" else "1")
    with pytest.raises(UnknownName, match=f"Unknown job '{wrong}'.* Did you mean '{ids[5]}'"):
        store.get(wrong)
    with pytest.raises(UnknownName):
        store.get("")
    shared = {i[0] for i in ids if sum(j[0] == i[0] for j in ids) > 1}  # 20 ids, 16 digits
    with pytest.raises(UsageError, match="write more of its id"):
        store.get(min(shared))


@pytest.mark.parametrize(
    ("kind", "request_", "message"),
    [
        ("compres", {}, "Did you mean 'compress'"),
        ("compress", {"task": "digits"}, "field 'budgets' is not valid"),
        ("compress", {"task": "digits", "budgets": ["size_mb<=1"], "sed": 1}, "field 'sed' is not valid"),
        ("export", {"job": "0123"}, "names its 'job' and its 'pick'"),
        ("export", {"job": "0123", "pick": "knee"}, "Unknown job '0123'"),
    ],
)
def test_bad_requests(store: JobStore, kind: str, request_: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        store.submit(kind, request_)  # type: ignore[arg-type]
    assert store.list() == []


def test_exports_come_from_compress_jobs(store: JobStore) -> None:
    job = store.submit("compress", REQUEST)
    export = store.submit("export", {"job": job.id, "pick": "knee"})
    with pytest.raises(UsageError, match="job of kind 'export'"):
        store.submit("export", {"job": export.id, "pick": "knee"})


def test_ledger(store: JobStore) -> None:
    ledger = store.ledger("job")
    assert isinstance(ledger, Ledger) and ledger.get("a") is None
    ledger.put("a", {"loss": math.inf, "plan": [0, 1]})
    ledger.put("a", {"loss": 0.0})  # the first stays
    assert ledger.get("a") == {"loss": math.inf, "plan": [0, 1]} and len(ledger) == 1
    assert store.ledger().get("a") is None
    with JobStore(store.path) as other:
        assert other.ledger("job").get("a") == ledger.get("a")


def test_a_killed_process_loses_no_put(store: JobStore) -> None:
    code = f"""
import os, signal
from autocompress.service.store import JobStore
ledger = JobStore({str(store.path)!r}).ledger()
for i in range(50):
    ledger.put(str(i), {{"i": i}})
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    assert [store.ledger().get(str(i)) for i in range(50)] == [{"i": i} for i in range(50)]


@pytest.mark.slow
def test_many_processes_open_and_claim_at_once(tmp_path: Path) -> None:
    """Four processes make the same new store, put the same keys and claim: each job goes to one of them."""
    code = f"""
from autocompress.service.store import JobStore
with JobStore({str(tmp_path / "jobs.sqlite")!r}) as store:
    for i in range(10):
        store.submit("compress", {{"task": "digits", "budgets": ["size_mb<=1"]}})
        store.ledger().put(str(i), {{"i": i}})
    while (job := store.claim()) is not None:
        store.finish(job, {{}})
        print(job.id)
"""
    processes = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(4)]
    outputs = [process.communicate(timeout=60)[0].split() for process in processes]
    assert all(process.returncode == 0 for process in processes)
    ids = [name for output in outputs for name in output]
    with JobStore(tmp_path / "jobs.sqlite") as store:
        assert len(ids) == 40 and len(set(ids)) == 40
        assert {job.id for job in store.list(state="succeeded")} == set(ids)
        assert len(store.ledger()) == 10


def test_where_the_store_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTOCOMPRESS_HOME", str(tmp_path))
    monkeypatch.delenv("AUTOCOMPRESS_STORE", raising=False)
    with JobStore() as store:
        assert store.path == tmp_path / "jobs.sqlite"
    monkeypatch.setenv("AUTOCOMPRESS_STORE", f"sqlite:///{tmp_path}/other.sqlite")
    with JobStore() as store:
        assert store.path == tmp_path / "other.sqlite"
    for url in ("postgresql://host/jobs", "sqlite://", "sqlite:///:memory:"):
        with pytest.raises(UsageError, match="several processes share"):
            JobStore(url)


def test_files_it_refuses(tmp_path: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("not a database, but long enough to have a header " * 10)
    with pytest.raises(StoreError, match=r"notes\.txt is not an SQLite file"):
        JobStore(text)
    foreign = tmp_path / "foreign.sqlite"
    with sqlite3.connect(foreign) as connection:
        connection.execute("CREATE TABLE songs (name TEXT)")
    connection.close()
    with pytest.raises(StoreError, match="another program"):
        JobStore(foreign)
    with pytest.raises(StoreError, match="cannot be"):
        JobStore(text / "jobs.sqlite")
    with pytest.raises(StoreError, match="cannot be opened"):
        JobStore(tmp_path)
    newer = tmp_path / "newer.sqlite"
    JobStore(newer).close()
    with sqlite3.connect(newer) as connection:
        connection.execute("UPDATE meta SET value = '2'")
    connection.close()
    with pytest.raises(StoreError, match=r"schema 2 .* upgrade AutoCompress"):
        JobStore(newer)


@pytest.mark.parametrize(
    ("pragma", "message"),
    [("max_page_count=1", "no room left on its disk"), ("query_only=ON", "cannot be written by this user")],
)
def test_a_full_or_read_only_disk(store: JobStore, pragma: str, message: str) -> None:
    """SQLite itself refuses here: no more pages, or no writing."""
    job = store.submit("compress", REQUEST)
    store.close()
    event.listen(store._engine, "connect", lambda connection, _: connection.execute(f"PRAGMA {pragma}").close())
    with pytest.raises(StoreError, match=message):
        store.ledger().put("a", {"text": "x" * 100_000})
    assert store.get(job.id).state == "queued" and store.ledger().get("a") is None


def test_a_locked_file(store: JobStore) -> None:
    event.listen(store._engine, "connect", lambda connection, _: connection.execute("PRAGMA busy_timeout=50").close())
    store.close()
    other = sqlite3.connect(store.path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreError, match="locked by another process"):
        store.submit("compress", REQUEST)
    assert store.list() == []  # readers go on
    other.close()


def test_the_store_needs_no_torch() -> None:
    code = "import sys, autocompress.service.store; sys.exit('torch' in sys.modules or 'streamlit' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

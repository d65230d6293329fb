"""Jobs and the ledger of evaluations on one SQLite file, shared by the command line, workers and the dashboard.

Knows nothing of torch or the pipeline. Every change is one SQL statement in its own transaction, so that several
processes can use a store at once and a kill -9 leaves it whole.
"""

from __future__ import annotations

import difflib
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ValidationError
from sqlalchemy import Row, Update, case, func, select, update
from sqlalchemy.dialects.sqlite import insert

from autocompress.errors import StoreError, UnknownName, UsageError
from autocompress.files import cache_dir, write_text
from autocompress.results import JobResult, Progress, Request
from autocompress.service.database import clear_errors, default_path, file_of, jobs, ledger, open_engine

Kind = Literal["compress", "recover", "export", "measure"]
State = Literal["queued", "running", "succeeded", "failed", "cancelled"]
MAX_ATTEMPTS = 5
"""How often a job may take its worker down with it before it is given up."""


@dataclass(frozen=True)
class Job:
    """One row of the store as it was when read. Times are seconds since 1970.

    ``request`` is a :class:`~autocompress.results.Request` as JSON for ``compress`` and
    ``{"job": id, "pick": plan, "out": path | None}`` for ``export``. ``claim`` names the claim under which it runs.
    """

    id: str
    kind: Kind
    state: State
    request: dict[str, Any]
    folder: Path
    created: float
    started: float | None = None
    finished: float | None = None
    claim: str | None = None
    pid: int | None = None
    host: str | None = None
    heartbeat: float | None = None
    attempts: int = 0
    progress: Progress | None = None
    cancel_requested: bool = False
    error: str | None = None
    exit_code: int | None = None

    @property
    def over(self) -> bool:
        """Whether it has reached its last state."""
        return self.state in ("succeeded", "failed", "cancelled")


_COLUMNS = [column for column in jobs.columns if column.name not in ("seq", "result")]


class JobStore:
    """A store of jobs on an SQLite file (path or ``sqlite:///`` address; default: see ``default_path``).

    Raises :class:`StoreError` where the file or the disk refuses, in one sentence. Use as a context manager or
    call :meth:`close`.
    """

    def __init__(self, path_or_url: str | Path | None = None) -> None:
        self.path = default_path() if path_or_url is None else file_of(path_or_url)
        self._engine = open_engine(self.path)

    def close(self) -> None:
        """Close the file; the store can be opened again."""
        self._engine.dispose()

    def __enter__(self) -> JobStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ------------------------------------------------------------ asking for work

    def submit(self, kind: Kind, request: Request | Mapping[str, Any], folder: Path | None = None) -> Job:
        """Queue a job; ``folder`` keeps its files (default ``jobs/<id>`` beside the store)."""
        if kind not in get_args(Kind):
            raise UnknownName("kind of job", kind, get_args(Kind))
        content = self._checked(kind, request)
        job_id = secrets.token_hex(4)
        place = f"jobs/{job_id}" if folder is None else str(folder.absolute())
        row = {"id": job_id, "kind": kind, "state": "queued", "request": content, "folder": place}
        with clear_errors(self.path):
            (self.path.parent / place).mkdir(parents=True, exist_ok=True)
            with self._engine.begin() as connection:
                connection.execute(insert(jobs).values(**row, created=time.time()))
        return self.get(job_id)

    def _checked(self, kind: Kind, request: Request | Mapping[str, Any]) -> dict[str, Any]:
        if kind == "compress":
            try:
                return Request.model_validate(request).model_dump(mode="json")
            except ValidationError as error:
                first = error.errors()[0]
                field = ".".join(str(part) for part in first["loc"]) or "request"
                raise UsageError(f"The request's field {field!r} is not valid: {first['msg']}.") from None
        content = request.model_dump(mode="json") if isinstance(request, BaseModel) else dict(request)
        if kind == "export":
            if not isinstance(content.get("job"), str) or not isinstance(content.get("pick"), str):
                raise UsageError(f"An export names its 'job' and its 'pick', got {content!r}.")
            source = self.get(content["job"])
            if source.kind != "compress":
                raise UsageError(
                    f"Plans are exported from compress jobs; {source.id} is a job of kind {source.kind!r}."
                )
            content = {"out": None, **content, "job": source.id}
        return content

    def cancel(self, job_id: str) -> Job:
        """Cancel a queued job at once; ask a running one's worker to stop it. A finished job stays as it is."""
        job = self.get(job_id)
        self._write(
            update(jobs)
            .where(jobs.c.id == job.id, jobs.c.state.in_(("queued", "running")))
            .values(
                cancel_requested=True,
                state=case((jobs.c.state == "queued", "cancelled"), else_=jobs.c.state),
                finished=case((jobs.c.state == "queued", time.time()), else_=None),
                exit_code=case((jobs.c.state == "queued", 130), else_=None),
            )
        )
        return self.get(job.id)

    # ------------------------------------------------------------ reading

    def get(self, job_id: str) -> Job:
        """The job whose id is or starts with ``job_id``; an unknown or ambiguous one is an error that names others."""
        wanted = job_id.strip().lower()
        with clear_errors(self.path), self._engine.connect() as connection:
            exact = connection.execute(select(*_COLUMNS).where(jobs.c.id == wanted)).one_or_none()
            if exact is not None:
                return self._job(exact)
            known = list(connection.scalars(select(jobs.c.id).order_by(jobs.c.seq.desc())))
        matches = [name for name in known if wanted and name.startswith(wanted)]
        if len(matches) == 1:
            return self.get(matches[0])
        if matches:
            raise UsageError(f"Job {job_id!r} could be {', '.join(sorted(matches)[:8])}; write more of its id.")
        near = difflib.get_close_matches(wanted, known, n=1, cutoff=0.5)
        raise UnknownName("job", job_id, {*known[:8], *near}, f"The store is {self.path}.")

    def list(self, *, kind: Kind | None = None, state: State | None = None, limit: int | None = None) -> list[Job]:
        """Jobs, the newest first."""
        query = select(*_COLUMNS).order_by(jobs.c.seq.desc()).limit(limit)
        if kind is not None:
            query = query.where(jobs.c.kind == kind)
        if state is not None:
            query = query.where(jobs.c.state == state)
        with clear_errors(self.path), self._engine.connect() as connection:
            return [self._job(row) for row in connection.execute(query)]

    def outcome(self, job_id: str) -> dict[str, Any] | None:
        """What a job returned, as JSON; ``None`` until it is over, and where it returned nothing."""
        job = self.get(job_id)
        with clear_errors(self.path), self._engine.connect() as connection:
            value: dict[str, Any] | None = connection.scalar(select(jobs.c.result).where(jobs.c.id == job.id))
        return value

    def result(self, job_id: str) -> JobResult | None:
        """The outcome of a compress job, also of one that failed with a front; ``None`` for others and until it is over."""
        value = self.outcome(job_id) if self.get(job_id).kind == "compress" else None
        return None if value is None else _read_result(job_id, value)

    def result_bytes(self, job_id: str) -> int:
        """How much a job's result takes here: another number once it was amended, for those who keep what they have read."""
        query = select(func.length(jobs.c.result)).where(jobs.c.id == job_id)
        with clear_errors(self.path), self._engine.connect() as connection:
            return int(connection.scalar(query) or 0)

    # ------------------------------------------------------------ what is added later

    def amend(self, job_id: str, change: Callable[[JobResult], JobResult]) -> JobResult:
        """Change the result of a compress job that is over, here and in ``result.json`` of its folder; returns the new one.

        Nobody else can change it meanwhile. A kill between the two leaves the file ahead, and the same call brings both
        together. Raises ``UsageError`` where there is no result to change.
        """
        job = self.get(job_id)
        with clear_errors(self.path), self._engine.begin() as connection:
            connection.exec_driver_sql("BEGIN IMMEDIATE")
            mine = jobs.c.id == job.id
            state, value = connection.execute(select(jobs.c.state, jobs.c.result).where(mine)).one()
            if job.kind != "compress" or value is None:
                raise UsageError(
                    f"Only the result of a compress job that is over can be added to; {job.id} is {state}."
                )
            result = change(_read_result(job.id, value))
            write_text(job.folder / "result.json", result.model_dump_json(indent=1))
            connection.execute(update(jobs).where(mine).values(result=result.model_dump(mode="json")))
        return result

    # ------------------------------------------------------------ the worker's side

    def claim(self, worker: str = "") -> Job | None:
        """Take the next queued job for this process, or ``None``; no two callers get the same one.

        Exports go first: they are short, and somebody waits for the file. ``worker`` is a name for the log.
        """
        first = (
            select(jobs.c.seq)
            .where(jobs.c.state == "queued")
            .order_by(jobs.c.kind != "export", jobs.c.seq)
            .limit(1)
            .scalar_subquery()
        )
        now = time.time()
        statement = (
            update(jobs)
            .where(jobs.c.seq == first, jobs.c.state == "queued")
            .values(
                state="running",
                claim=f"{worker}{secrets.token_hex(8)}",
                pid=os.getpid(),
                host=socket.gethostname(),
                started=now,
                heartbeat=now,
                attempts=jobs.c.attempts + 1,
            )
            .returning(*_COLUMNS)
        )
        with clear_errors(self.path), self._engine.begin() as connection:
            row = connection.execute(statement).one_or_none()
        return None if row is None else self._job(row)

    def heartbeat(self, job: Job) -> Literal["go on", "cancel", "lost"]:
        """Say that the claim is alive. ``lost``: the job was given to another worker, or is over."""
        statement = self._owned(job).values(heartbeat=time.time()).returning(jobs.c.cancel_requested)
        with clear_errors(self.path), self._engine.begin() as connection:
            cancel = connection.execute(statement).scalar_one_or_none()
        return "lost" if cancel is None else "cancel" if cancel else "go on"

    def progress(self, job: Job, tick: Progress) -> bool:
        """Keep the newest tick; ``False`` when the claim is lost (so in the four methods below)."""
        return self._write(self._owned(job).values(progress=tick.model_dump(mode="json"), heartbeat=time.time()))

    def finish(self, job: Job, result: BaseModel | Mapping[str, Any]) -> bool:
        """The claimed job has succeeded."""
        content = result.model_dump(mode="json") if isinstance(result, BaseModel) else dict(result)
        return self._end(job, "succeeded", exit_code=0, result=content, error=None)

    def fail(self, job: Job, error: str, exit_code: int = 2, result: JobResult | None = None) -> bool:
        """The claimed job has failed, in one sentence; ``result`` is what it had nevertheless."""
        content = None if result is None else result.model_dump(mode="json")
        return self._end(job, "failed", exit_code=exit_code, error=error, result=content)

    def stopped(self, job: Job) -> bool:
        """The claimed job was stopped as its user asked."""
        return self._end(job, "cancelled", exit_code=130)

    def release(self, job: Job) -> bool:
        """Back to the queue: its worker is going, the job is not."""
        return self._write(self._owned(job).values(**_UNCLAIMED, attempts=jobs.c.attempts - 1))

    def requeue_lost(self, timeout: float = 60.0) -> tuple[Job, ...]:
        """Queue the running jobs whose worker is dead again: silent for ``timeout`` s, or a process of this host gone.

        A job whose worker died ``MAX_ATTEMPTS`` times fails; one that was to be cancelled is cancelled.
        """
        changed = []
        for job in self.list(state="running"):
            if not _is_lost(job, timeout):
                continue
            same = self._owned(job).where(jobs.c.heartbeat == job.heartbeat)  # it may wake up meanwhile
            if job.cancel_requested:
                done = self._write(same.values(state="cancelled", finished=time.time(), exit_code=130))
            elif job.attempts >= MAX_ATTEMPTS:
                reason = f"The worker died {job.attempts} times in this job (out of memory?); see {job.folder}."
                done = self._write(same.values(state="failed", finished=time.time(), exit_code=2, error=reason))
            else:
                done = self._write(same.values(**_UNCLAIMED))
            if done:
                changed.append(self.get(job.id))
        return tuple(changed)

    # ------------------------------------------------------------ evaluations

    def ledger(self, namespace: str = "") -> StoreLedger:
        """Evaluations kept by key; each ``namespace`` is a ledger of its own (a job's is its id)."""
        return StoreLedger(self, namespace)

    # ------------------------------------------------------------ inside

    def _job(self, row: Row[Any]) -> Job:
        fields = dict(row._mapping)
        tick = fields["progress"]
        fields["folder"] = self.path.parent / fields["folder"]  # an absolute folder stays as it is
        fields["progress"] = None if tick is None else Progress.model_validate(tick)
        return Job(**fields)

    def _owned(self, job: Job) -> Update:
        return update(jobs).where(jobs.c.id == job.id, jobs.c.state == "running", jobs.c.claim == job.claim)

    def _end(self, job: Job, state: State, **values: Any) -> bool:
        return self._write(self._owned(job).values(state=state, finished=time.time(), **values))

    def _write(self, statement: Update) -> bool:
        with clear_errors(self.path), self._engine.begin() as connection:
            return connection.execute(statement).rowcount > 0


_UNCLAIMED = {"state": "queued", "claim": None, "pid": None, "host": None, "heartbeat": None}


class StoreLedger:
    """``autocompress.types.Ledger`` on a store: the first value put under a key stays."""

    def __init__(self, store: JobStore, namespace: str) -> None:
        self._store = store
        self._namespace = namespace

    def get(self, key: str) -> dict[str, Any] | None:
        """The value put under ``key``, or ``None``."""
        query = select(ledger.c.value).where(ledger.c.namespace == self._namespace, ledger.c.key == key)
        with clear_errors(self._store.path), self._store._engine.connect() as connection:
            value: dict[str, Any] | None = connection.scalar(query)
        return value

    def put(self, key: str, value: Mapping[str, Any]) -> None:
        """Keep ``value`` for good before returning; a key that is taken keeps its first value."""
        row = {"namespace": self._namespace, "key": key, "value": dict(value), "created": time.time()}
        with clear_errors(self._store.path), self._store._engine.begin() as connection:
            connection.execute(insert(ledger).values(**row).on_conflict_do_nothing())

    def items(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """All keys and values of this namespace, by key."""
        query = select(ledger.c.key, ledger.c.value).where(ledger.c.namespace == self._namespace).order_by(ledger.c.key)
        with clear_errors(self._store.path), self._store._engine.connect() as connection:
            rows = connection.execute(query).all()
        yield from ((key, value) for key, value in rows)

    def __len__(self) -> int:
        query = select(ledger.c.key).where(ledger.c.namespace == self._namespace)
        with clear_errors(self._store.path), self._store._engine.connect() as connection:
            return len(connection.execute(query).all())


@contextmanager
def shared_ledger(model: str) -> Iterator[StoreLedger]:
    """The ledger that all jobs on one model fill: a file in the cache folder, named by the evaluator's key.

    Raises :class:`StoreError` in one sentence when it cannot be opened.
    """
    with JobStore(cache_dir() / "ledgers" / f"{model}.sqlite") as store:
        yield store.ledger()


def _read_result(job_id: str, value: Mapping[str, Any]) -> JobResult:
    try:
        return JobResult.model_validate(value)
    except ValidationError as error:
        raise StoreError(
            f"The result of job {job_id} was written by another version of AutoCompress"
            f" ({error.error_count()} fields differ); run the job again."
        ) from error


def _is_lost(job: Job, timeout: float) -> bool:
    if job.heartbeat is None or time.time() - job.heartbeat > timeout:
        return True
    return job.host == socket.gethostname() and job.pid is not None and not _alive(job.pid)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's, so it is there
        return True
    return True

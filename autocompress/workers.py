"""Other processes that judge plans: on this machine, or over a Ray cluster.

Each worker opens the level database from disk once, by the task's name; from then on plans go out and values come back. What a
plan is worth does not depend on who judged it: a worker computes with as many threads as the parent would. The ledger stays with
the parent, so workers only get what nobody has judged yet, and what a killed worker was doing is asked again.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import socket
import sys
import threading
import traceback
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, cast

import torch

from autocompress.database import LevelDatabase
from autocompress.errors import AutoCompressError, UsageError, WorkerError
from autocompress.evaluate import Measured, Measurer
from autocompress.files import cache_dir, write_bytes
from autocompress.graph import trace
from autocompress.models import Models
from autocompress.prefix import default_limit
from autocompress.prepare import offered
from autocompress.results import Request
from autocompress.space import make_space
from autocompress.tasks import load_task
from autocompress.types import Fidelity, Query
from autocompress.where import Where

RUNGS: tuple[Fidelity, ...] = ("slice", "full", "refitted")
"""What workers judge; distillation stays with the parent, which shows its progress."""
RAY_WIDTH = 16
"""Plans asked for together while nobody knows how many cores a cluster has."""
CONNECT_SECONDS = 10
TRIES = 3
"""A plan that ends so many workers is given up."""


@dataclass(frozen=True)
class Opening:
    """How a worker opens the parent's database; everything is plain data.

    ``groups``: the channel groups that the parent has proved, so that nobody proves them again. ``threads``: those of the parent.
    ``root``: folder of databases, ``database`` the one in it; ``models``: folder of refitted models. ``key``, ``space``: hashes
    that must come out the same. ``data``: the parent's ``AUTOCOMPRESS_DATA``. ``where``: what models run on. ``share``: workers
    that share a machine's memory.
    """

    request: Request
    threads: int
    groups: tuple[str, ...]
    root: str
    database: str
    models: str
    key: str
    space: str
    data: str = ""
    where: Where = field(default_factory=Where)
    share: int = 1

    @classmethod
    def of(
        cls, database: LevelDatabase, request: Request, models: Path, threads: int, where: Where | None = None
    ) -> Opening:
        """The opening of a database that was made for ``request``."""
        groups = tuple(group.name for group in database.graph.groups)
        root, folder = str(database.folder.parent.resolve()), database.folder.name
        hashes = database.key, database.space.hash
        data = os.environ.get("AUTOCOMPRESS_DATA", "")
        return cls(request, threads, groups, root, folder, str(models.resolve()), *hashes, data, where or Where())

    def open(self) -> Measurer:
        """The measurer of the parent's database; raises :class:`WorkerError` if the task is another one here."""
        torch.set_num_threads(self.threads)
        os.environ.setdefault("AUTOCOMPRESS_DATA", self.data)
        request = self.request
        task = load_task(request.task, request.data, request.seed)
        graph = trace(task.model, task.example_inputs, proofs=False)
        graph.groups = tuple(group for group in graph.groups if group.name in set(self.groups))
        space = make_space(graph, offered(task, request), request.importance)
        database = LevelDatabase(graph, space, task, self.folder(), seed=request.seed)
        if (database.key, space.hash) != (self.key, self.space):
            raise WorkerError(
                f"Workers need the same AutoCompress, task and data as their parent; task {request.task!r} is "
                f"{database.key}-{space.hash} there and {self.key}-{self.space} here."
            )
        database.build()
        limit = self.where.room(self.share) or default_limit(self.share)
        measurer = Measurer(database, limit=limit, where=self.where)
        if Path(self.models).parent.is_dir():  # not on another machine that does not see the run's folder
            measurer.build = Models(database, Path(self.models), None, measurer.reference).deployed
        return measurer

    def folder(self) -> Path:
        """Where databases are: the parent's folder, or on another machine that machine's own."""
        root = Path(self.root)
        return root if root.is_dir() else cache_dir() / "databases"


class Judge:
    """What runs in a worker's process: opens the database with the first plan, answers with values or the reason why not."""

    def __init__(self, opening: Opening) -> None:
        self.opening = opening
        self.measurer: Measurer | None = None

    def __call__(self, query: Query) -> Measured | WorkerError:
        try:
            if self.measurer is None:
                self.measurer = self.opening.open()
            return self.measurer(query.plan, query.fidelity, query.part)
        except AutoCompressError as error:
            return WorkerError(str(error))
        except Exception as error:
            traceback.print_exc()
            return WorkerError(f"A worker raised {type(error).__name__}: {error} (traceback on its standard error).")


def workers_of(which: str | int, opening: Opening) -> LocalWorkers | RayWorkers:
    """The workers of ``--workers``: a number of processes, ``ray``, or a cluster's address."""
    if isinstance(which, int):
        return LocalWorkers(opening, which)
    return RayWorkers(opening, None if which == "ray" else which)


class LocalWorkers:
    """``n`` processes on this machine, started with the first plans; to be closed (a context manager, too)."""

    rungs = RUNGS

    def __init__(self, opening: Opening, n: int) -> None:
        if n < 1:
            raise UsageError(f"--workers is 1 or more processes, got {n}.")
        self.opening, self.width = replace(opening, share=n), n
        self._processes: dict[Connection, BaseProcess] = {}

    def measure(self, queries: Sequence[Query]) -> Iterator[tuple[int, Measured]]:
        """(index of a query, its values), as they are done. Raises what a worker raised, or :class:`WorkerError`."""
        todo, doing = deque(range(len(queries))), dict[Connection, int]()
        tries = [0] * len(queries)
        try:
            while todo or doing:
                self._staff(len(todo) + len(doing))
                for pipe in list(self._processes):
                    if todo and pipe not in doing:
                        doing[pipe] = index = todo.popleft()
                        tries[index] += 1
                        with contextlib.suppress(OSError):  # it has just died: that shows below
                            pipe.send(queries[index])
                for pipe in cast(list[Connection], wait(list(doing))):
                    index = doing.pop(pipe)
                    try:
                        answer = pipe.recv()
                    except (EOFError, OSError):
                        self._bury(pipe, tries[index])
                        todo.appendleft(index)
                        continue
                    if isinstance(answer, WorkerError):
                        raise answer
                    yield index, answer
        except BaseException:
            self.close()
            raise

    def _staff(self, wanted: int) -> None:
        """Start processes where some are missing."""
        context = multiprocessing.get_context("spawn")
        while len(self._processes) < min(self.width, wanted):
            mine, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, self.opening), daemon=True)
            process.start()
            theirs.close()
            self._processes[mine] = process

    def _bury(self, pipe: Connection, tries: int) -> None:
        process = self._processes.pop(pipe)
        pipe.close()
        process.join()
        if tries >= TRIES:
            code = process.exitcode or 0
            how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
            raise WorkerError(
                f"A worker {how}, {tries} times on the same plan (often: out of memory, or a script that starts workers "
                "without 'if __name__ == \"__main__\":'); use fewer workers."
            )

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers that run."""
        return [process.pid for process in self._processes.values() if process.pid is not None]

    def close(self) -> None:
        """End all processes."""
        for pipe, process in self._processes.items():
            process.kill()
            pipe.close()
        for process in self._processes.values():
            process.join()
        self._processes = {}

    def __enter__(self) -> LocalWorkers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _serve(pipe: Connection, opening: Opening) -> None:
    """A local worker's life: it ends with its pipe or its parent; Ctrl-C is the parent's."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_die_with_parent, daemon=True).start()
    judge = Judge(opening)
    with contextlib.suppress(EOFError, OSError), contextlib.redirect_stdout(sys.stderr):
        while True:
            pipe.send(judge(pipe.recv()))


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


class RayWorkers:
    """Actors on a Ray cluster, as many as its cores allow, started with the first plans; to be closed (a context manager, too).

    ``address``: ``ray://host:port`` or ``host:port``; ``None`` takes the cluster of this machine, or starts one. A machine
    without the parent's folder gets the database's files once. Ray starts a lost actor again and repeats what it was doing.
    """

    rungs = RUNGS

    def __init__(self, opening: Opening, address: str | None = None) -> None:
        try:
            import ray
        except ImportError as error:
            raise UsageError("--workers ray needs Ray; install it with 'pip install autocompress[ray]'.") from error
        self.ray: Any = ray
        self.opening, self.address, self.width = opening, address, RAY_WIDTH
        self.actors: list[Any] = []
        self._connected = False

    def measure(self, queries: Sequence[Query]) -> Iterator[tuple[int, Measured]]:
        """(index of a query, its values), as they are done. Raises what a worker raised, or :class:`WorkerError`."""
        try:
            if not self.actors:
                self._start()
            todo, doing = deque(enumerate(queries)), dict[Any, tuple[int, Any]]()
            idle = list(self.actors)
            while todo or doing:
                while todo and idle:
                    index, query = todo.popleft()
                    actor = idle.pop()
                    doing[actor.judge.remote(query)] = index, actor
                for done in self.ray.wait(list(doing), num_returns=1)[0]:
                    index, actor = doing.pop(done)
                    answer = self._answer(done)
                    idle.append(actor)
                    yield index, answer
        except BaseException:
            self.close()
            raise

    def _answer(self, done: Any) -> Measured:
        try:
            answer = self.ray.get(done)
        except self.ray.exceptions.RayError as error:
            reason = str(error).strip().splitlines()[0]
            raise WorkerError(
                f"A Ray worker was lost {TRIES} times on the same plan ({reason}); see Ray's logs."
            ) from error
        if isinstance(answer, WorkerError):
            raise answer
        return cast(Measured, answer)

    def _start(self) -> None:
        ray = self.ray
        if not ray.is_initialized():
            try:
                if self.address:  # Ray itself tries for minutes
                    host, _, port = self.address.rpartition("/")[2].partition(":")
                    socket.create_connection((host, int(port)), CONNECT_SECONDS).close()
                ray.init(address=self.address, log_to_driver=False, logging_level="ERROR")
            except (OSError, RuntimeError, ValueError) as error:
                reason = str(error).strip().splitlines()[0]
                raise WorkerError(f"No Ray cluster answers at {self.address or 'this machine'}: {reason}") from error
            self._connected = True
        cores = int(ray.cluster_resources().get("CPU", 0))
        n = cores // self.opening.threads
        if n < 1:
            raise WorkerError(f"A worker takes --threads {self.opening.threads} cores, the Ray cluster has {cores}.")
        here = Path(self.opening.root) / self.opening.database
        files = ray.put({path.name: path.read_bytes() for path in sorted(here.glob("*.safetensors"))})
        actor = ray.remote(num_cpus=self.opening.threads, max_restarts=-1, max_task_retries=TRIES - 1)(_Actor)
        share = -(-n // max(1, len(ray.nodes())))
        self.actors = [actor.remote(replace(self.opening, share=share), [files]) for _ in range(n)]

    def close(self) -> None:
        """End all actors, and the connection if it was made here."""
        for actor in self.actors:
            with contextlib.suppress(Exception):
                self.ray.kill(actor)
        self.actors = []
        if self._connected:
            self.ray.shutdown()
            self._connected = False

    def __enter__(self) -> RayWorkers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Actor:
    """A Ray worker. ``files``: a reference to the database's files, fetched only where they are not."""

    def __init__(self, opening: Opening, files: list[Any]) -> None:
        import ray

        folder = opening.folder() / opening.database
        if not folder.is_dir():
            for name, content in ray.get(files[0]).items():
                write_bytes(folder / name, content)
        self._judge = Judge(opening)

    def judge(self, query: Query) -> Measured | WorkerError:
        return self._judge(query)

    def pid(self) -> int:
        return os.getpid()

"""Workers: the same values from other processes, in whatever order, through kills and to a clean end."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from autocompress.costs import CostModel
from autocompress.database import LevelDatabase
from autocompress.errors import UnknownName, UsageError, WorkerError
from autocompress.evaluate import Measurer, ModelEvaluator
from autocompress.graph import trace
from autocompress.pipeline import compress
from autocompress.results import Request
from autocompress.search import CONTROLLERS, ParetoFront, run
from autocompress.space import make_space
from autocompress.tasks import load_task
from autocompress.types import Budget, Objective, Query
from autocompress.validate import make_request
from autocompress.workers import LocalWorkers, Opening, RayWorkers

FACTORY = """
from tests import networks

def task():
    return networks.task("resnet-b", n=64)
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[LevelDatabase, Opening]:
    folder = tmp_path_factory.mktemp("workers")
    (folder / "small.py").write_text(FACTORY)
    request = Request(task=f"{folder / 'small.py'}:task", budgets=("macs<=50%",))
    task = load_task(request.task)
    graph = trace(task.model, task.example_inputs)
    database = LevelDatabase(graph, make_space(graph), task, folder / "databases")
    database.build()
    return database, Opening.of(database, request, folder / "out" / "models", 1)


def queries(database: LevelDatabase, n: int = 6) -> list[Query]:
    rng = random.Random(0)
    plans = [database.space.dense, *(database.space.sample(rng) for _ in range(n - 1))]
    return [Query(plan, "slice" if i % 2 else "full") for i, plan in enumerate(plans)]


def values(found: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in found.items() if name != "seconds"}


@pytest.fixture(scope="module")
def workers(made: tuple[LevelDatabase, Opening]) -> Iterator[LocalWorkers]:
    with LocalWorkers(made[1], 2) as running:
        yield running


def test_other_processes_find_the_same_to_the_bit(made: tuple[LevelDatabase, Opening], workers: LocalWorkers) -> None:
    database, here = made[0], Measurer(made[0])
    asked = queries(database)
    found = dict(workers.measure(asked))
    assert sorted(found) == list(range(len(asked)))
    assert len(workers.pids) == 2 and os.getpid() not in workers.pids
    for index, query in enumerate(asked):
        assert values(found[index]) == values(here(query.plan, query.fidelity))


def test_the_evaluator_asks_workers_only_for_what_nobody_knows(
    made: tuple[LevelDatabase, Opening], workers: LocalWorkers
) -> None:
    database = made[0]

    def evaluator() -> ModelEvaluator:
        return ModelEvaluator(database, CostModel(database.graph, database.space, {}), [])

    asked = [*queries(database, 4), Query(database.space.dense, "table"), queries(database, 4)[1]]
    here, there = evaluator(), evaluator()
    sent: list[int] = []

    class Watched:
        width, rungs = workers.width, workers.rungs

        def measure(self, queries: Any) -> Any:
            sent.append(len(queries))
            return workers.measure(queries)

    there.workers = Watched()
    want, got = here(asked), there(asked)
    assert [replace(e, seconds=0) for e in got] == [replace(e, seconds=0) for e in want]
    assert there(asked[:4])[0].cached and sent == [4] and there.counts == here.counts


@pytest.mark.slow
def test_a_killed_worker_costs_only_what_it_was_doing(
    made: tuple[LevelDatabase, Opening], workers: LocalWorkers
) -> None:
    asked = queries(made[0])
    list(workers.measure(asked[:2]))
    killed = workers.pids[-1]
    found = {}
    for index, answer in workers.measure(asked):
        if not found:
            os.kill(killed, signal.SIGKILL)
        found[index] = answer
    here = Measurer(made[0])
    assert all(values(found[i]) == values(here(q.plan, q.fidelity)) for i, q in enumerate(asked))
    list(workers.measure(asked[:2]))  # where little was left to do, nobody replaced the killed one before
    assert len(workers.pids) == 2 and killed not in workers.pids


@pytest.mark.slow
def test_a_plan_that_kills_every_worker_is_given_up(
    made: tuple[LevelDatabase, Opening], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("autocompress.workers.TRIES", 2)
    deadly = tmp_path / "deadly.py"
    deadly.write_text("import os\n\ndef task():\n    os.kill(os.getpid(), 9)\n")
    opening = replace(made[1], request=Request(task=f"{deadly}:task", budgets=("macs<=50%",)))
    running = LocalWorkers(opening, 1)
    with pytest.raises(WorkerError, match="killed by signal 9, 2 times"):
        list(running.measure(queries(made[0], 1)))
    assert running.pids == []


@pytest.mark.slow
def test_what_a_worker_cannot_do_is_one_sentence(made: tuple[LevelDatabase, Opening]) -> None:
    with (
        LocalWorkers(replace(made[1], key="other"), 1) as running,
        pytest.raises(WorkerError, match="need the same AutoCompress, task and data"),
    ):
        list(running.measure(queries(made[0], 1)))
    with pytest.raises(UsageError, match="1 or more"):
        LocalWorkers(made[1], 0)


def _gone(pid: int, seconds: float = 20) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks at /proc")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_workers_end_with_their_parent(how: signal.Signals, tmp_path: Path) -> None:
    (tmp_path / "idle.py").write_text("import time\n\ndef task():\n    time.sleep(600)\n")
    script = f"""
        import threading, time
        from autocompress.results import Request
        from autocompress.types import Query
        from autocompress.workers import LocalWorkers, Opening

        if __name__ == "__main__":
            request = Request(task={str(tmp_path / "idle.py") + ":task"!r}, budgets=("macs<=50%",))
            workers = LocalWorkers(Opening(request, 1, (), "", "", "", "", ""), 2)

            def tell():
                while len(workers.pids) < 2:
                    time.sleep(0.01)
                print(*workers.pids, flush=True)

            threading.Thread(target=tell, daemon=True).start()
            list(workers.measure([Query((0,)), Query((1,))]))
    """
    (tmp_path / "parent.py").write_text(textwrap.dedent(script))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, ["."]))}
    with subprocess.Popen(
        [sys.executable, tmp_path / "parent.py"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    ) as parent:
        assert parent.stdout is not None
        pids = list(map(int, parent.stdout.readline().split()))
        parent.send_signal(how)
        assert parent.wait(30) != 0
        assert len(pids) == 2 and all(map(_gone, pids))


@pytest.mark.slow
def test_same_seed_same_front(made: tuple[LevelDatabase, Opening], workers: LocalWorkers) -> None:
    database = made[0]
    costs = CostModel(database.graph, database.space, {})
    budgets = [Budget("macs", 0.5 * costs.in_units(database.space.dense)["macs"])]

    def search(helpers: LocalWorkers | None) -> list[Any]:
        front = ParetoFront([Objective("loss"), Objective("macs")])
        evaluator = ModelEvaluator(database, costs, budgets)
        evaluator.workers = helpers
        run(CONTROLLERS["evolution"](database.space, costs, budgets, 3), evaluator, front, evaluations=40)
        return [(e.plan, e.values, e.costs) for e in front.at("full", feasible=False)]

    assert search(workers) == search(None)


@pytest.mark.slow
def test_a_whole_run_is_the_same_and_its_folder_goes_on(made: tuple[LevelDatabase, Opening], tmp_path: Path) -> None:
    """Refits in workers, too; measured latencies differ from run to run."""
    update = {"evaluations": 20, "methods": ("channels", "blocks"), "recover_minutes": 0.0}
    request = made[1].request.model_copy(update=update)

    def judged(folder: str, workers: int | None) -> list[Any]:
        result = compress(request.model_copy(update={"workers": workers}), tmp_path / folder)
        return sorted((p.id, p.fidelity, p.values, p.costs, p.on_front) for p in result.points)

    alone = judged("alone", None)
    assert any(rung == "refitted" for _, rung, *_ in alone)
    assert judged("shared", 2) == alone
    assert judged("shared", None) == alone, "a folder does not belong to its workers"


def test_workers_do_not_name_a_run() -> None:
    plain = Request(task="digits", budgets=("macs<=50%",))
    assert plain.hash == plain.model_copy(update={"workers": 4}).hash


def test_a_task_object_does_not_travel(made: tuple[LevelDatabase, Opening], tmp_path: Path) -> None:
    request = made[1].request.model_copy(update={"workers": 2})
    with pytest.raises(UsageError, match="Task object"):
        compress(request, tmp_path, task=made[0].task)


@pytest.mark.parametrize("given", ["0", "-1", "1.5", "many", "ray:", "ray://host", ""])
def test_what_workers_are_not(given: str) -> None:
    with pytest.raises(UsageError, match="--workers is 1 or more"):
        make_request({"task": "digits", "budgets": ["macs<=50%"], "workers": given})


def test_workers_from_text() -> None:
    fields = {"task": "digits", "budgets": ["macs<=50%"]}
    assert make_request({**fields, "workers": "3"}).workers == 3
    assert make_request({**fields, "workers": 3}).workers == 3
    with pytest.raises(UnknownName):
        make_request({**fields, "worker": 3})


# ---------------------------------------------------------------- Ray


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Address of a cluster of two nodes with one core each, in processes of their own."""
    pytest.importorskip("ray", reason="needs Ray: pip install autocompress[ray]")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_worker_niceness", "0")  # 15 without it: nothing moves on a busy machine
    monkeypatch.setenv("PYTHONPATH", os.getcwd())  # the nodes find this version
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
    running = Cluster()
    try:
        try:
            running.add_node(**node, include_dashboard=False)
            running.add_node(**node)
        except Exception as error:  # after half a minute, and nothing more special than an Exception
            pytest.skip(f"Ray starts no cluster on this machine now: {error}")
        yield running.address
    finally:
        running.shutdown()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_ray_cluster_finds_the_same_and_a_killed_actor_is_replaced(
    made: tuple[LevelDatabase, Opening], cluster: str
) -> None:
    asked, here = queries(made[0], 4), Measurer(made[0])
    want = [values(here(q.plan, q.fidelity)) for q in asked]
    with RayWorkers(made[1], cluster) as running:
        first = dict(running.measure(asked))
        pids = running.ray.get([actor.pid.remote() for actor in running.actors])
        assert len(set(pids)) == 2 and os.getpid() not in pids
        killer = threading.Timer(0.05, os.kill, (pids[0], signal.SIGKILL))
        killer.start()
        second = dict(running.measure(asked * 3))
        killer.join()
        assert running.ray.get(running.actors[0].pid.remote()) != pids[0]
    assert [values(first[i]) for i in range(len(asked))] == want
    assert [values(second[i]) for i in range(3 * len(asked))] == want * 3


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_no_cluster_is_one_sentence(made: tuple[LevelDatabase, Opening]) -> None:
    pytest.importorskip("ray", reason="needs Ray: pip install autocompress[ray]")
    with RayWorkers(made[1], "127.0.0.1:1") as running, pytest.raises(WorkerError, match="No Ray cluster"):
        list(running.measure(queries(made[0], 1)))


@pytest.mark.slow
def test_without_ray_the_way_out_is_named(made: tuple[LevelDatabase, Opening], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match=r"pip install autocompress\[ray\]"):
        RayWorkers(made[1])

"""What earlier jobs have judged: every job adds to it, ``--warm`` starts from it, a replay from exactly the same."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from autocompress import api
from autocompress.cli import app
from autocompress.errors import Cancelled, StoreError, UsageError
from autocompress.evaluate import Measurer
from autocompress.ledger import JobLedger, NoLedger, Start
from autocompress.results import JobResult, Progress
from autocompress.service.store import JobStore, shared_ledger
from autocompress.service.worker import work
from tests import networks
from tests.test_pipeline import asked, points

FACTORY = "from tests import networks\n\ndef make():\n    return networks.task('resnet-b', n=32)\n"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of its own: nothing is known of any model."""
    monkeypatch.setenv("AUTOCOMPRESS_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def paid(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The rungs at which models were run."""
    rungs: list[str] = []
    original = Measurer._ask
    monkeypatch.setattr(Measurer, "_ask", lambda self, query: (rungs.append(query.fidelity), original(self, query))[1])
    return rungs


def run(out: Path, **changes: Any) -> JobResult:
    return api.run(asked(recover_steps=0, **changes), out, task=networks.task("resnet-b", n=32)).result


@pytest.mark.slow
def test_a_second_budget_pays_less_when_it_starts_warm(tmp_path: Path, home: Path, paid: list[str]) -> None:
    """The same request warm, interrupted and resumed, replayed, and cold: what is known is not paid again."""
    run(tmp_path / "first", evaluations=60)
    (ledger,) = (home / "ledgers").glob("*.sqlite")  # one file a model
    with shared_ledger(ledger.stem) as shared:
        entries = len(shared)
    assert entries == len(paid)

    def stop(tick: Progress) -> None:
        if tick.stage == "search" and tick.done >= 16:
            raise KeyboardInterrupt

    task, request = networks.task("resnet-b", n=32), asked(recover_steps=0, budgets=("macs<=40%",), warm=True)
    paid.clear()
    with pytest.raises(Cancelled):
        api.run(request, tmp_path / "warm", task=task, progress=stop)
    warm_paid = len(paid)
    run(tmp_path / "between", budgets=("macs<=50%",), evaluations=30)  # is shared, but this job has started already
    paid.clear()
    warm = api.run(request, tmp_path / "warm", task=task).result
    warm_paid += len(paid)
    assert warm.ledger is not None and warm.ledger.entries == entries
    assert any(f"from {entries} evaluations of earlier jobs" in note for note in warm.notes)

    certificate = json.loads((tmp_path / "warm" / "certificate.json").read_text())
    assert certificate["hashes"]["ledger"] == warm.ledger.hash
    words = shlex.split(certificate["replay"])
    assert (
        words[words.index("--warm-from") + 1] == str(tmp_path / "warm" / "ledger_start.json") and "--warm" not in words
    )
    paid.clear()
    replay = run(tmp_path / "replay", budgets=("macs<=40%",), warm_from=str(tmp_path / "warm" / "ledger_start.json"))
    assert points(replay) == points(warm) and replay.best == warm.best and replay.ledger == warm.ledger
    assert len(paid) == warm_paid

    paid.clear()
    cold = run(tmp_path / "cold", budgets=("macs<=40%",))
    assert (
        cold.ledger is not None and cold.ledger.entries == 0 and not (tmp_path / "cold" / "ledger_start.json").exists()
    )
    assert len(paid) >= 24, "without --warm a job starts from an empty ledger, whatever is known"
    assert warm_paid < len(paid)
    more = {p.id for p in warm.points if p.fidelity == "full"} - {p.id for p in cold.points}
    assert more, "the front begins where the first job's ended"


@pytest.mark.slow
def test_nothing_known_is_said_and_foreign_ledgers_are_refused(tmp_path: Path, home: Path) -> None:
    warm = run(tmp_path / "warm", evaluations=6, warm=True)
    assert warm.ledger == run(tmp_path / "cold", evaluations=6).ledger, "empty is empty"
    assert any("Nothing is known of this model" in note for note in warm.notes)
    again = run(tmp_path / "again", evaluations=6, warm=True)
    assert again.ledger is not None and again.ledger.entries > 6 and points(again)[-1]["levels"]
    with pytest.raises(UsageError, match="evaluations of another model, other data"):
        run(tmp_path / "foreign", evaluations=6, seed=4, warm_from=str(tmp_path / "again" / "ledger_start.json"))
    assert not (tmp_path / "foreign" / "ledger_start.json").exists()
    (tmp_path / "again" / "ledger_start.json").write_text("{}")
    with pytest.raises(StoreError, match="damaged"):
        run(tmp_path / "again", evaluations=6, warm=True)


@pytest.mark.slow
def test_a_shared_ledger_that_cannot_be_used_stops_only_who_asks_for_it(tmp_path: Path, home: Path) -> None:
    home.mkdir()
    (home / "ledgers").write_text("a file where the folder should be")
    result = run(tmp_path / "cold", evaluations=4)
    assert sum("not kept for others" in note for note in result.notes) == 1 and result.best
    with pytest.raises(StoreError, match="ledgers"):
        run(tmp_path / "warm", evaluations=4, warm=True)


@pytest.mark.slow
def test_from_the_command_line_and_by_a_worker(tmp_path: Path) -> None:
    """A task by its name: compress, then the certificate's replay, then a worker on a second budget."""
    (tmp_path / "mine.py").write_text(FACTORY)
    task = f"{tmp_path / 'mine.py'}:make"
    fast = ["--evaluations", "12", "--recover-steps", "0", "--methods", "channels,blocks,int8", "--json"]

    def call(*args: str) -> Any:
        done = CliRunner().invoke(app, list(args), prog_name="autocompress")
        assert done.exit_code == 0, done.stderr
        return json.loads(done.stdout)

    call("compress", task, "--budget", "macs<=60%", "--out", str(tmp_path / "one"), *fast)
    call("compress", task, "--budget", "macs<=40%", "--warm", "--out", str(tmp_path / "two"), *fast)
    replay = shlex.split(json.loads((tmp_path / "two" / "certificate.json").read_text())["replay"])
    again = call(*replay[1:], "--json")
    two, repeated = api.read_result(tmp_path / "two"), api.read_result(Path(again["folder"]))
    assert points(two) == points(repeated) and two.ledger == repeated.ledger
    job = call("submit", task, "--budget", "macs<=30%", "--warm", *fast)
    with JobStore() as store:
        assert work(store, once=True, poll_seconds=0.1) == 1
        result = store.result(job["id"])
        assert result is not None and result.ledger is not None and result.ledger.entries > 12, store.get(
            job["id"]
        ).error


def test_a_start_is_whole_or_refused(tmp_path: Path) -> None:
    entries = {"k": {"loss": None, "metric": 0.5, "accuracy_drop": 1.0, "seconds": 0.1, "plan": {}, "fidelity": "full"}}
    start, path = Start("model", entries), tmp_path / "ledger_start.json"
    start.save(path)
    assert Start.load(path) == start and Start.load(path).hash == start.hash
    path.write_text(path.read_text().replace("0.5", "0.6"))
    with pytest.raises(StoreError, match="is damaged, or is no ledger"):
        Start.load(path)
    with pytest.raises(StoreError, match="cannot be read"):
        Start.load(tmp_path / "nothing.json")
    assert Start("a").hash == Start("b").hash == Start().hash


def test_a_jobs_ledger_goes_on_when_the_shared_one_refuses() -> None:
    class Full(NoLedger):
        def put(self, key: str, value: Any) -> None:
            raise StoreError("The disk is full.")

    shared, own = NoLedger(), NoLedger()
    ledger = JobLedger(own, Start("m", {"a": {"loss": 1.0}}), shared)
    ledger.put("b", {"loss": 2.0})
    shared.put("c", {"loss": 3.0})
    assert ledger.get("a") == {"loss": 1.0} and ledger.get("c") is None, "the shared one is never asked"
    assert dict(ledger.items()) == {"a": {"loss": 1.0}, "b": {"loss": 2.0}} and own.get("a") is None
    broken = JobLedger(own, Start(), Full())
    broken.put("d", {})
    broken.put("e", {})
    assert broken.refusal == "The disk is full." and own.get("e") == {}

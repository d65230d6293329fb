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
from tests.test_pipeline import _quick, asked, points

__all__ = ["_quick"]  # less time to measure in, for every test here

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
    original = Measurer.__call__
    monkeypatch.setattr(
        Measurer, "__call__", lambda self, plan, rung: (rungs.append(rung), original(self, plan, rung))[1]
    )
    return rungs


def run(out: Path, **changes: Any) -> JobResult:
    return api.run(asked(recover_steps=0, **changes), out, task=networks.task("resnet-b", n=32)).result


@pytest.mark.slow
def test_a_second_budget_pays_less_when_it_starts_warm(tmp_path: Path, paid: list[str]) -> None:
    """The same request cold, warm, killed and resumed, and replayed: one path, and what is known is not paid again."""
    run(tmp_path / "first", evaluations=60)
    entries = len(paid)
    paid.clear()
    cold = run(tmp_path / "cold", budgets=("macs<=40%",))
    cold_paid = len(paid)
    assert cold.ledger is not None and cold.ledger.entries == 0 and not (tmp_path / "cold" / "ledger_start.json").exists()
    assert cold_paid >= 24, "a job without --warm starts from an empty ledger, whatever is known"
    with next_to(tmp_path) as names:
        assert len(names) == 1, "one file a model"
    (tmp_path / "home" / "ledgers" / names[0]).rename(tmp_path / "both.sqlite")
    # only the first job's share again
    paid.clear()
    run(tmp_path / "first-again", evaluations=60)
    assert len(paid) == entries
    paid.clear()

    def stop(tick: Progress) -> None:
        if tick.stage == "search" and tick.done >= 16:
            raise KeyboardInterrupt

    task, request = networks.task("resnet-b", n=32), asked(recover_steps=0, budgets=("macs<=40%",), warm=True)
    with pytest.raises(Cancelled):
        api.run(request, tmp_path / "warm", task=task, progress=stop)
    run(tmp_path / "between", budgets=("macs<=50%",), seed=3)  # adds to what is shared, but not to what this job started from
    between = len(paid)
    warm = api.run(request, tmp_path / "warm", task=task).result
    assert warm.ledger is not None and warm.ledger.entries == entries
    assert any(f"from {entries} evaluations of earlier jobs" in note for note in warm.notes)
    assert between and len(paid) < cold_paid
    certificate = json.loads((tmp_path / "warm" / "certificate.json").read_text())
    assert certificate["hashes"]["ledger"] == warm.ledger.hash
    words = shlex.split(certificate["replay"])
    given = words[words.index("--warm-from") + 1]
    assert Path(given) == tmp_path / "warm" / "ledger_start.json" and "--warm" not in words
    replay = run(tmp_path / "replay", budgets=("macs<=40%",), warm_from=given)
    assert points(replay) == points(warm) and replay.best == warm.best and replay.ledger == warm.ledger
    known = {p.id for p in warm.points if p.fidelity == "full"} - {p.id for p in cold.points}
    assert known, "plans that only the first job judged are in this job's front"


class next_to:
    """Names of the shared ledgers."""

    def __init__(self, tmp_path: Path) -> None:
        self.folder = tmp_path / "home" / "ledgers"

    def __enter__(self) -> list[str]:
        return sorted(p.name for p in self.folder.glob("*.sqlite"))

    def __exit__(self, *_: object) -> None: ...

"""A race the whole way: on the command line, interrupted, replayed, and in what it leaves."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from autocompress import api
from autocompress.cli import app
from autocompress.errors import Cancelled, UsageError
from autocompress.results import JobResult, Progress
from tests import networks
from tests.test_pipeline import asked, points

FACTORY = "from tests import networks\n\ndef make():\n    return networks.task('resnet-b', n=32)\n"


def call(*args: str) -> Any:
    done = CliRunner().invoke(app, list(args), prog_name="autocompress")
    assert done.exit_code == 0, done.stderr
    return done


def untimed(result: JobResult) -> list[Any]:
    return [
        (e.controller, e.evaluations, [(m.evaluations, m.loss, m.hypervolume) for m in e.history]) for e in result.race
    ]


@pytest.mark.slow
def test_from_the_command_line_to_its_replay(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(FACTORY)
    words = [
        "compress",
        f"{tmp_path / 'mine.py'}:make",
        "--budget",
        "macs<=50%",
        "--controller",
        "exact, evolution,random",
    ]
    words += ["--race", "--evaluations", "14", "--recover-steps", "0", "--methods", "channels,blocks,int8"]
    shown = call(*words, "--out", str(tmp_path / "one")).stdout
    assert "A race of 3 controllers" in shown and "hypervolume" in shown and "race.png" in shown
    assert (tmp_path / "one" / "race.png").read_bytes().startswith(b"\x89PNG")
    one = api.read_result(tmp_path / "one")
    assert [(e.controller, e.evaluations) for e in one.race] == [("exact", 14), ("evolution", 14), ("random", 14)]
    assert one.evaluations == 42 and all(e.end.seconds > e.own_seconds > 0 for e in one.race)
    judged = {p.values["loss"] for p in one.points if p.fidelity == "full" and p.feasible}
    assert min(e.end.loss for e in one.race if e.end.loss is not None) == min(judged), "all of them are one front"
    replay = shlex.split(json.loads((tmp_path / "one" / "certificate.json").read_text())["replay"])
    assert "--race" in replay and "exact,evolution,random" in replay
    answer = json.loads(call(*replay[1:], "--json").stdout)
    two = api.read_result(Path(answer["folder"]))
    assert points(two) == points(one) and untimed(two) == untimed(one) and two.best == one.best
    assert answer["race"] == [e.model_dump(mode="json") for e in two.race] and answer["files"]["race.png"]


@pytest.mark.slow
def test_interrupted_and_by_the_clock(tmp_path: Path) -> None:
    def task() -> Any:
        return networks.task("resnet-b", n=32)

    def stop(tick: Progress) -> None:
        if tick.stage == "search" and tick.message.startswith("random") and tick.done >= 8:
            raise KeyboardInterrupt

    request = asked(controller="exact,random", race=True, evaluations=12, recover_steps=0)
    want = api.run(request, tmp_path / "unbroken", task=task()).result
    with pytest.raises(Cancelled):
        api.run(request, tmp_path / "broken", task=task(), progress=stop)
    kept = json.loads((tmp_path / "broken" / "race.json").read_text())
    got = api.run(request, tmp_path / "broken", task=task()).result
    assert points(got) == points(want) and untimed(got) == untimed(want)
    assert got.race[0].model_dump(mode="json") == kept[0]

    clock = request.model_copy(update={"evaluations": None, "minutes": 0.02})
    timed = api.run(clock, tmp_path / "clock", task=task()).result
    words = shlex.split(json.loads((tmp_path / "clock" / "certificate.json").read_text())["replay"])
    counted = words[words.index("--controller") + 1]
    assert counted == ",".join(f"{e.controller}:{e.evaluations}" for e in timed.race) and "--evaluations" not in words
    again = request.model_copy(update={"evaluations": None, "controller": counted})
    replay = api.run(again, tmp_path / "replay", task=task()).result
    assert untimed(replay) == untimed(timed) and points(replay) == points(timed)


def test_a_request_that_does_not_say_race_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="add --race"):
        api.run(asked(controller="exact,random"), tmp_path, task=networks.task("resnet-b", n=16))

"""The whole way on real input, cut short: interrupted, with a budget that cannot be held, and through the Python facade."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path

import onnx
import pytest
from typer.testing import CliRunner, Result

import autocompress
from autocompress.cli import app
from tests.test_demo import ENVIRONMENT, QUICK, command

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
RUN = ["compress", "digits", "--budget", "macs<=40%", "--methods", "channels,blocks,int8", *QUICK]


def call(*args: str, code: int = 0) -> Result:
    """The command line in this process: only what is interrupted needs one of its own."""
    done = CliRunner().invoke(app, list(args), prog_name="autocompress")
    assert done.exit_code == code, done.output
    return done


def front_of(folder: Path) -> list[tuple[str, float]]:
    result = autocompress.Result.load(folder)
    return [(point.id, point.values["loss"]) for point in result.front]


def test_interrupted_run_continues_to_the_same_front(tmp_path: Path) -> None:
    call(*RUN, "--out", str(tmp_path / "whole"))
    process = subprocess.Popen(
        command(*RUN, "--out", "cut"), cwd=tmp_path, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True
    )
    with process:
        assert process.stderr is not None
        for line in process.stderr:
            if "searching" in line:
                process.send_signal(signal.SIGINT)
                break
        rest = process.stderr.read()
        process.wait(timeout=120)
    assert process.returncode == 130, rest
    assert "Traceback" not in rest
    call(*RUN, "--out", str(tmp_path / "cut"))
    assert front_of(tmp_path / "cut") == front_of(tmp_path / "whole")


def test_budget_that_no_plan_can_hold(tmp_path: Path) -> None:
    done = call("compress", "digits", "--budget", "size_mb<=0.0001", *QUICK, "--out", str(tmp_path / "x"), code=3)
    assert done.stdout == ""
    assert len([line for line in done.stderr.splitlines() if "size_mb" in line]) == 1


def test_facade(tmp_path: Path) -> None:
    ticks: list[str] = []
    result = autocompress.compress(
        "digits",
        ["macs<=50%"],
        out=tmp_path / "run",
        evaluations=40,
        methods=["channels", "blocks", "int8"],
        recover_minutes=0,
        threads=1,
        progress=lambda tick: ticks.append(tick.stage),
    )
    assert result.front
    assert result.best().costs["macs"] <= 0.5 * result.result.original.costs["macs"]
    assert "search" in ticks
    path = result.export(tmp_path / "mine.onnx", pick="smallest")
    assert path == tmp_path / "mine.onnx"
    assert onnx.load(path).graph.node
    again = autocompress.Result.load(tmp_path / "run")
    assert again.front == result.front

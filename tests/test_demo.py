"""The whole way on real input: the demo with the commands it ends on."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
ROOT = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}  # also where the package is not installed
QUICK = ["--evaluations", "60", "--recover-minutes", "0", "--threads", "1"]


def command(*args: str) -> list[str]:
    return [sys.executable, "-m", "autocompress", *args]


def call(*args: str, cwd: Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command(*args), cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(scope="module")
def demo(place: Path) -> dict[str, Any]:
    done = call("demo", "--out", "d", "--evaluations", "100", "--json", cwd=place)
    answer: dict[str, Any] = json.loads(done.stdout)  # nothing else may stand there
    assert "Traceback" not in done.stderr
    return answer


def test_demo_leaves_what_it_says(demo: dict[str, Any], place: Path) -> None:
    assert len(demo["front"]) > 2
    assert (place / demo["picture"]).read_bytes().startswith(b"\x89PNG")
    onnx.checker.check_model(onnx.load(demo["export"]["onnx"]))
    certificate = json.loads(Path(demo["export"]["certificate"]).read_text())
    assert certificate["statements"] == demo["export"]["statements"]
    best = next(row for row in demo["front"] if row["exported"])
    assert best["feasible"]


def test_the_commands_a_demo_ends_on_work(demo: dict[str, Any], place: Path) -> None:
    tried = [line for line in demo["next"] if " dashboard " not in line and " compress digits" not in line]
    assert len(tried) >= 4
    for line in tried:
        words = shlex.split(line)
        assert words[0] == "autocompress"
        call(*words[1:], cwd=place)
    assert (place / "d" / "size.png").is_file()
    assert (place / "d" / "fastest" / "model.onnx").is_file()


def test_stored_jobs_can_be_looked_at(demo: dict[str, Any], place: Path) -> None:
    store = ["--store", "d/jobs.sqlite"]
    rows = json.loads(call("jobs", "list", "--json", *store, cwd=place).stdout)
    assert {row["kind"] for row in rows} >= {"compress", "export"}
    assert {row["state"] for row in rows} == {"succeeded"}
    shown = json.loads(call("show", demo["job"], "--json", *store, cwd=place).stdout)
    assert [row["id"] for row in shown["result"]["front"]] == [row["id"] for row in demo["front"]]

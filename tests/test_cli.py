"""The command line: what it refuses and how, what it prints for machines, and that its help and its page are true."""

from __future__ import annotations

import errno
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import typer
from onnx import TensorProto, helper, numpy_helper
from typer.testing import CliRunner, Result

from autocompress.cli import app
from autocompress.cli.console import INTERNAL, explain
from autocompress.cli.docs import render, verbs
from autocompress.dashboard.front import read_front
from autocompress.deliver import replay_command
from autocompress.hwprofiles import Entry, HardwareProfile
from autocompress.hwprofiles.references import residual_network
from autocompress.results import JobResult
from autocompress.service.store import JobStore
from autocompress.types import Kernel
from autocompress.validate import make_request
from tests.dashboard import sample

ROOT = Path(__file__).parents[1]
COMMANDS = dict(verbs(typer.main.get_command(app)))
LEAVES = {path: command for path, command in COMMANDS.items() if not getattr(command, "commands", None)}


def call(*args: str) -> Result:
    return CliRunner().invoke(app, [str(a) for a in args], prog_name="autocompress")


def document(*args: str) -> Any:
    """Standard output as JSON; anything else on it fails the test."""
    done = call(*args, "--json")
    assert done.exit_code == 0, done.stderr
    return json.loads(done.stdout)


def refused(*args: str, code: int = 2) -> str:
    """The one sentence on standard error of a call that must fail, with nothing on standard output."""
    done = call(*args)
    assert done.exit_code == code, done.output
    assert done.stdout == ""
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, lines
    assert "Traceback" not in lines[0]
    return lines[0]


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """The folder of a finished run, as far as reading it goes."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "result.json").write_text(finished().model_dump_json())
    return folder


def finished() -> JobResult:
    """A realistic result whose front is marked, as the pipeline marks it."""
    result = sample.result()
    front = {(p.id, p.fidelity) for p in read_front(result).points["front"]}
    points = [p.model_copy(update={"on_front": (p.id, p.fidelity) in front}) for p in result.points]
    return result.model_copy(update={"points": tuple(points)})


# ---------------------------------------------------------------- help and docs


@pytest.mark.parametrize("path", LEAVES, ids=" ".join)
def test_help_shows_an_example_that_parses(path: tuple[str, ...]) -> None:
    done = call(*path[1:], "--help")
    assert done.exit_code == 0
    examples = re.findall(r"^ +(autocompress .+)$", done.stdout.split("Example:")[1].split("Options:")[0], re.MULTILINE)
    assert examples
    for example in examples:
        words = tuple(shlex.split(example))
        assert words[: len(path)] == path
        with LEAVES[path].make_context(" ".join(path), list(words[len(path) :])):
            pass


@pytest.mark.parametrize("path", LEAVES, ids=" ".join)
def test_every_verb_speaks_json(path: tuple[str, ...]) -> None:
    assert "--json" in call(*path[1:], "--help").stdout


def test_page_does_not_lag_behind_the_help() -> None:
    page = (ROOT / "docs" / "cli.md").read_text()
    assert page == render(), "docs/cli.md differs from the help texts; write it anew with: make docs"


def test_help_is_quick_because_nothing_heavy_is_loaded() -> None:
    code = (
        "import sys\nfrom autocompress.cli import main\nsys.argv = ['autocompress', '--help']\n"
        "try:\n    main()\nexcept SystemExit as e:\n    assert not e.code\n"
        "print([m for m in ('torch', 'onnxruntime', 'scipy', 'sqlalchemy', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "[]"


def test_version() -> None:
    assert call("--version").stdout.startswith("autocompress 0.")


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize("verb", ["compress", "submit"])
@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["digits"], "Missing option '--budget'"),
        (["digits", "--budget", "latency<=5"], "Did you mean 'latency_ms'"),
        (["digits", "--budget", "size_mb=3"], "written '<='"),
        (["digits", "--budget", "size_mb<=3@local"], "does not depend on a device"),
        (["digits", "--budget", "size_mb<=3", "--budget", "size_mb<=50%"], "One limit for each quantity"),
        (["digit", "--budget", "size_mb<=3"], "Did you mean 'digits'"),
        (["cifar10:resnet21", "--budget", "size_mb<=3"], "Did you mean 'cifar10:resnet"),
        (["nowhere.py:make", "--budget", "size_mb<=3"], "A task file must exist"),
        (["digits", "--budget", "size_mb<=3", "--controller", "evolutoin"], "Did you mean 'evolution'"),
        (["digits", "--budget", "size_mb<=3", "--methods", "channels,in8"], "Did you mean 'int8'"),
        (["digits", "--budget", "size_mb<=3", "--methods", ","], "at least one family"),
        (["digits", "--budget", "size_mb<=3", "--importance", "tailor"], "Did you mean 'taylor'"),
        (["digits", "--budget", "size_mb<=3", "--evaluations", "0"], "--evaluations is 1 or more, got 0"),
        (["digits", "--budget", "size_mb<=3", "--evaluations", "many"], "--evaluations"),
        (["digits", "--budget", "size_mb<=3", "--evaluations", "9", "--minutes", "1"], "not by both"),
        (["digits", "--budget", "size_mb<=3", "--minutes", "nan"], "--minutes is more than 0"),
        (
            ["digits", "--budget", "size_mb<=3", "--warm-from", "/no/ledger.json"],
            "takes the ledger_start.json of a job",
        ),
        (["digits", "--budget", "size_mb<=3", "--warm-from", str(ROOT / "LICENSE")], "is damaged, or is no ledger"),
        (["digits", "--budget", "size_mb<=3", "--warm", "--warm-from", "x"], "--warm or --warm-from, not both"),
        (
            ["digits", "--budget", "size_mb<=3", "--controller", "exact,random"],
            "name one or add --race, got 'exact,random'",
        ),
        (["digits", "--budget", "size_mb<=3", "--race"], "A race takes two controllers or more"),
        (["digits", "--budget", "size_mb<=3", "--race", "--controller", "exact,randm"], "Did you mean 'random'"),
        (["digits", "--budget", "size_mb<=3", "--race", "--controller", "exact,random,exact"], "got 'exact' 2 times"),
        (["digits", "--budget", "size_mb<=3", "--race", "--controller", "exact:0,random:3"], "NAME:N with N 1 or more"),
        (
            ["digits", "--budget", "size_mb<=3", "--race", "--controller", "exact:9,random"],
            "own number of evaluations or none",
        ),
        (
            ["digits", "--budget", "size_mb<=3", "--race", "--controller", "exact:9,random:9", "--evaluations", "5"],
            "leave out --evaluations and --minutes",
        ),
        (["digits", "--budget", "size_mb<=3", "--batch", "0"], "--batch is 1 or more"),
        (["digits", "--budget", "size_mb<=3", "--data", "/no/such/folder"], "takes a folder that exists"),
        (["digits", "--budget", "latency_ms<=3@nowhere"], "Unknown profile 'nowhere'"),
        (["digits", "--budget", "latency_ms<=3@pixel3", "--profile", "pixel3"], "reads NAME=PATH"),
        (["digits", "--budget", "latency_ms<=3@pixel3", "--profile", "pixel=x.json"], "did you mean 'pixel3'"),
        (["digits", "--budget", "latency_ms<=3@pixel3", "--profile", "pixel3=x.json"], "takes a file that exists"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_bad_request_is_one_sentence(verb: str, args: list[str], sentence: str) -> None:
    assert sentence in refused(verb, *args)


def test_replay_command_of_a_certificate_is_understood(tmp_path: Path) -> None:
    (tmp_path / "profile_local.json").write_text("{}")
    fields = {
        "task": "digits",
        "budgets": ["macs<=50%"],
        "evaluations": 9,
        "methods": ["int8"],
        "batch": 4,
        "threads": 2,
    }
    request = make_request(fields).model_copy(update={"recover_steps": 30})
    words = shlex.split(replay_command(request, tmp_path, 9))
    assert words[:2] == ["autocompress", "compress"]
    with LEAVES["autocompress", "compress"].make_context("compress", words[2:]) as context:
        asked = context.params
    assert (asked["evaluations"], asked["methods"], asked["recover_steps"], asked["batch"]) == (9, "int8", 30, 4)


def test_own_task_file_is_named_absolutely(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text("def make(): ...\n")
    monkeypatch.chdir(tmp_path)
    job = document("submit", "mine.py:make", "--budget", "macs<=50%")
    assert job["request"]["task"] == f"{tmp_path / 'mine.py'}:make"
    assert "named with its factory" in refused("submit", "mine.py", "--budget", "macs<=50%")


def test_unknown_verb() -> None:
    assert "Did you mean 'compress'" in refused("compres")


def test_error_for_machines() -> None:
    done = call("submit", "digits", "--budget", "latency<=5", "--json")
    assert done.exit_code == 2
    answer = json.loads(done.stdout)
    assert answer["exit_code"] == 2
    assert "latency_ms" in answer["error"]


@pytest.mark.parametrize("place", [0, 1, 4])
def test_debug_shows_the_traceback_wherever_it_stands(place: int) -> None:
    args = ["submit", "digits", "--budget", "latency<=5"]
    done = call(*args[:place], "--debug", *args[place:])
    assert done.exit_code == 2
    assert "Traceback" in done.stderr
    assert "UnknownName" in done.stderr


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (KeyError("x"), INTERNAL, "bug in AutoCompress"),
        (KeyboardInterrupt(), 130, "continues where it stopped"),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "disk is full"),
        (PermissionError(errno.EACCES, "Permission denied", "a.onnx"), 2, "a.onnx: Permission denied"),
    ],
)
def test_every_exception_has_its_sentence(error: BaseException, code: int, words: str) -> None:
    found, sentence = explain(error)
    assert found == code
    assert words in sentence
    assert "\n" not in sentence


# ---------------------------------------------------------------- the store


def test_submit_list_show_cancel() -> None:
    assert document("jobs", "list") == []
    assert "No jobs" in call("jobs", "list").stdout
    job = document("submit", "digits", "--budget", "latency_ms<=50%@local", "--seed", "7", "--methods", "int8, w8")
    assert job["state"] == "queued"
    assert job["request"]["budgets"] == ["latency_ms<=50%@local"]
    assert job["request"]["methods"] == ["int8", "w8"]
    assert [row["id"] for row in document("jobs", "list")] == [job["id"]]
    assert document("show", job["id"][:4])["job"]["request"]["seed"] == 7
    assert "start 'autocompress worker'" in refused("front", job["id"])
    assert "queued" in call("jobs", "list").stdout
    assert document("cancel", job["id"])["state"] == "cancelled"
    assert "cancelled" in call("show", job["id"]).stdout
    assert "Only a queued or running job" in refused("cancel", job["id"])


def test_unknown_job_and_foreign_store(tmp_path: Path) -> None:
    assert "Unknown job 'zzzz'" in refused("show", "zzzz")
    (tmp_path / "notes.txt").write_text("not a database " * 100)
    assert "choose another with --store" in refused("jobs", "list", "--store", str(tmp_path / "notes.txt"))


@pytest.mark.slow
def test_failed_job_keeps_its_sentence(tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text("def make():\n    raise RuntimeError('no data today')\n")
    job = document("submit", f"{tmp_path / 'bad.py'}:make", "--budget", "macs<=50%")
    done = document("worker", "--once")
    assert done["states"] == {job["id"]: "failed"}
    assert "no data today" in document("show", job["id"])["job"]["error"]
    assert "no data today" in refused("front", job["id"])


@pytest.mark.slow
def test_worker_stopped_by_ctrl_c(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "autocompress", "worker", "--store", str(tmp_path / "s.sqlite")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT) as worker:
        assert worker.stderr is not None
        assert "Working on" in worker.stderr.readline()
        time.sleep(0.5)
        worker.send_signal(signal.SIGINT)
        try:
            out, err = worker.communicate(timeout=60)
        finally:
            worker.kill()
    assert worker.returncode == 130
    assert out == ""
    assert err.strip().splitlines() == [
        "Stopped; what was done is kept, and the same command continues where it stopped."
    ]


# ---------------------------------------------------------------- results


def test_front_of_a_folder_as_table_json_and_picture(run_folder: Path, tmp_path: Path) -> None:
    result = finished()
    table = call("front", str(run_folder)).stdout
    answer = document("front", str(run_folder), "--png", str(tmp_path / "front.png"))
    shown = [row["id"] for row in answer["front"]]
    assert shown[0] == result.original.id
    assert set(shown[1:]) == {p.id for p in result.points if p.on_front}
    assert all(point[:8] in table for point in shown[1:])
    assert table.count("exported") == 1
    assert (tmp_path / "front.png").read_bytes().startswith(b"\x89PNG")
    costs = [row["costs"]["latency_ms@local"] for row in answer["front"][1:]]
    assert costs == sorted(costs, reverse=True)


def test_front_picture_refusals(run_folder: Path, tmp_path: Path) -> None:
    assert "names a .png file" in refused("front", str(run_folder), "--png", str(tmp_path / "front.jpg"))
    unknown = refused("front", str(run_folder), "--png", str(tmp_path / "f.png"), "--x", "sizemb")
    assert "Did you mean 'size_mb'" in unknown


def test_show_of_a_folder(run_folder: Path) -> None:
    answer = document("show", str(run_folder))
    assert answer["job"] is None
    assert answer["result"]["best"] == finished().best
    assert "evaluations" in call("show", str(run_folder)).stdout


def test_damaged_result(run_folder: Path) -> None:
    (run_folder / "result.json").write_text('{"task": 1}')
    assert "is damaged" in refused("show", str(run_folder))


def test_export_needs_an_onnx_name(run_folder: Path) -> None:
    assert "names an .onnx file" in refused("export", str(run_folder), "--out", "model.pt")


def test_check_needs_a_file() -> None:
    assert "must exist" in refused("check", "nowhere.onnx", "--budget", "size_mb<=3")


def onnx_file(path: Path) -> Path:
    """A real, small ONNX file: one linear layer of 64 x 10."""
    weight = numpy_helper.from_array(np.ones((64, 10), np.float32), "w")
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 64])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 10])
    graph = helper.make_graph([node], "g", [x], [y], [weight])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), str(path))
    return path


def test_check_is_a_gate(tmp_path: Path) -> None:
    model = onnx_file(tmp_path / "m.onnx")
    size = model.stat().st_size / 1e6
    answer = document("check", str(model), "--budget", f"size_mb<={size * 1.01:.6f}", "--budget", "macs<=640")
    assert answer["holds"]
    assert [c["measured"] for c in answer["checks"]] == [pytest.approx(size), 640]
    sentence = refused("check", str(model), "--budget", f"size_mb<={size * 0.9:.6f}", code=1)
    assert "size_mb" in sentence
    assert "does not hold" in sentence
    failed = call("check", str(model), "--budget", "macs<=639", "--json")
    assert failed.exit_code == 1
    assert json.loads(failed.stdout)["holds"] is False


def test_check_refuses_what_it_cannot_judge(tmp_path: Path) -> None:
    model = str(onnx_file(tmp_path / "m.onnx"))
    assert "--task" in refused("check", model, "--budget", "accuracy_drop<=1")
    assert "relative" in refused("check", model, "--budget", "size_mb<=50%")


# ---------------------------------------------------------------- profiles


@pytest.mark.slow
def test_profile_list_and_show(tmp_path: Path) -> None:
    entry = Entry(Kernel("linear", (64,), (10,)), 1500.0)
    profile = HardwareProfile("toy", "a toy", "none", "1", 1, 1, "2020-01-01T00:00:00+00:00", (entry,))
    profile.save(tmp_path / "toy.json")
    shown = document("profile", "show", str(tmp_path / "toy.json"))
    assert shown["kernels"] == 1
    assert shown["hash"] == profile.hash
    assert "a toy" in call("profile", "show", str(tmp_path / "toy.json")).stdout
    assert isinstance(document("profile", "list"), list)
    assert "Unknown profile 'nowhere'" in refused("profile", "show", "nowhere")
    args = ("digits", "--budget", "latency_ms<=50%@toy", "--profile", f"toy={tmp_path / 'toy.json'}")
    assert document("submit", *args)["request"]["profiles"] == {"toy": str(tmp_path / "toy.json")}


@pytest.mark.slow
def test_bench_and_explain(tmp_path: Path) -> None:
    small, large = (tmp_path / f"{name}.onnx" for name in ("small", "large"))
    small.write_bytes(residual_network([(16, 16)], size=8)[0])
    large.write_bytes(residual_network([(16, 16)] * 8, size=8)[0])
    one = document("bench", str(small), "--seconds", "0.2")
    assert 0 < one["p50_ms"] <= one["p90_ms"] <= one["p99_ms"] and one["against"] is None
    assert "noise floor" in call("bench", str(small), "--seconds", "0.2").stdout
    two = document("bench", str(large), "--against", str(small), "--seconds", "0.3")
    assert two["verdict"] == "slower" and two["target"] == "local"
    why = document("explain", str(large), "--against", str(small), "--seconds", "0.2")
    assert {"speed", "findings", "ops"} <= set(why)
    assert "operator" in call("explain", str(large), "--against", str(small), "--seconds", "0.2").stdout
    assert "must exist, got 'absent.onnx'" in refused("bench", "absent.onnx")
    assert "seconds > 0" in refused("bench", str(small), "--seconds", "0")
    assert "A target is local, ssh" in refused("bench", str(small), "--target", "phone")


def test_profile_measure_refusals() -> None:
    assert "name the profile of adb://x with --name" in refused("profile", "measure", "--target", "adb://x")
    assert "names a .json file" in refused("profile", "measure", "--out", "a.txt")
    assert "--minutes is more than 0" in refused("profile", "measure", "--minutes", "0")


# ---------------------------------------------------------------- diagnose


def test_a_diagnosis_in_tables_as_json_and_as_a_picture(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    result = sample.diagnosed()
    (folder / "result.json").write_text(result.model_dump_json())
    done = call("diagnose", folder, "--png", tmp_path / "map.png")
    assert done.exit_code == 0 and (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
    for words in ("answer 2 of 2000 examples", "without each of its methods", "layer1.0.conv2", "keep 4/16", "-8.0 *"):
        assert words in done.stdout, words
    assert result.diagnosis is not None
    assert document("diagnose", folder)["diagnosis"] == result.diagnosis.model_dump(mode="json")
    assert "--png names a .png file" in refused("diagnose", folder, "--png", tmp_path / "map.svg")


def test_a_result_without_a_diagnosis_says_so(run_folder: Path) -> None:
    assert "has no diagnosis; run the job again" in refused("diagnose", str(run_folder))


# ---------------------------------------------------------------- doctor and dashboard


@pytest.mark.slow
def test_doctor() -> None:
    answer = document("doctor")
    assert answer["ok"]
    states = {finding["name"]: finding["state"] for finding in answer["findings"]}
    assert states["torch"] == "ok"
    assert states["cache"] == "ok"


def test_doctor_says_what_is_broken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("AUTOCOMPRESS_HOME", str(tmp_path / "file" / "cache"))
    monkeypatch.setenv("AUTOCOMPRESS_DATA", str(tmp_path / "gone"))
    done = call("doctor", "--json")
    assert done.exit_code == 2
    assert set(json.loads(done.stdout)["broken"]) == {"cache", str(tmp_path / "gone")}


def test_dashboard_refuses_a_taken_port() -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"Port {port} is taken" in refused("dashboard", "--port", str(port))


def test_store_is_where_the_environment_says() -> None:
    document("submit", "digits", "--budget", "macs<=50%")
    with JobStore(os.environ["AUTOCOMPRESS_STORE"]) as store:
        assert len(store.list()) == 1

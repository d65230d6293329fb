"""The whole way on real input: what it writes, that it can be killed at any stage, and what bad input gets."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import autocompress.deliver as deliver
from autocompress import api, finished, pipeline
from autocompress.errors import (
    AutoCompressError,
    BudgetUnmet,
    Cancelled,
    InfeasibleBudget,
    StoreError,
    TaskError,
    UnknownName,
    UnsupportedModel,
    UsageError,
    VerificationError,
)
from autocompress.evaluate import Measurer
from autocompress.methods.coding import pack
from autocompress.results import METHOD_FAMILIES, JobResult, Progress, Request
from autocompress.tasks import Task
from autocompress.tasks.base import Split
from autocompress.types import Evaluation, Query
from autocompress.verify import BudgetCheck
from tests import networks
from tests.quick import shorten

ROOT = Path(__file__).parents[1]


def asked(**changes: Any) -> Request:
    """A short job without latency, so that nothing depends on the clock, and with methods whose levels are quickly made."""
    fields: dict[str, Any] = {
        "task": "resnet-b", "budgets": ("macs<=60%",), "evaluations": 24, "recover_steps": 8, "threads": 1, "seed": 3,
        "methods": ("channels", "blocks", "int8", "w8"),
    }  # fmt: skip
    return Request(**{**fields, **changes})


def points(result: JobResult) -> list[dict[str, Any]]:
    """All that must repeat: everything but what a clock measured."""
    return [
        {**p.model_dump(), "measured": {k: v for k, v in p.measured.items() if "latency" not in k}}
        for p in result.points
    ]


# ---------------------------------------------------------------- digits, all of it


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, JobResult, list[Progress]]:
    """One real job: two budgets, all methods, 40 evaluations, 20 steps of distillation."""
    out = tmp_path_factory.mktemp("digits")
    request = asked(
        task="digits",
        budgets=("macs<=50%", "size_mb<=0.4"),
        evaluations=40,
        recover_steps=20,
        methods=METHOD_FAMILIES,
    )
    ticks: list[Progress] = []
    with pytest.MonkeyPatch.context() as patch:
        shorten(patch, exporter="dynamo")  # as users get it
        result = api.run(request, out, progress=ticks.append).result
    return out, result, ticks


@pytest.mark.slow
def test_everything_is_written(digits: tuple[Path, JobResult, list[Progress]]) -> None:
    out, result, _ = digits
    for name in (
        "request.json",
        "result.json",
        "model.onnx",
        "certificate.json",
        "original.onnx",
        "front.png",
        "ledger.sqlite",
    ):
        assert (out / name).stat().st_size > 100, name
    assert not list(out.rglob(".*")), "temporary files stay"
    stored = JobResult.model_validate_json((out / "result.json").read_bytes())
    assert stored == result
    assert Request.model_validate_json((out / "request.json").read_bytes()) == result.request
    json.loads((out / "result.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


@pytest.mark.slow
def test_the_result_says_what_was_judged(digits: tuple[Path, JobResult, list[Progress]]) -> None:
    _, result, _ = digits
    rungs = {p.fidelity for p in result.points}
    assert rungs == {"full", "refitted", "recovered"}
    assert result.evaluations >= 40 and result.best is not None
    best = max((p for p in result.points if p.id == result.best), key=lambda p: p.fidelity == "recovered")
    assert best.costs["macs"] <= 0.5 * result.original.costs["macs"] and best.costs["size_mb"] <= 0.4
    assert best.feasible and best.violation == 0.0
    front = [p for p in result.points if p.on_front]
    assert front and all(p.fidelity != "full" for p in front)
    assert all(p.ops for p in front) and result.original.ops
    assert {site.kind for site in result.sites} == {"channels", "block", "layer"}
    assert {"database", "search", "refit", "recover", "export", "verify"} <= set(result.seconds)


@pytest.mark.slow
def test_the_certificate_holds_what_it_must(digits: tuple[Path, JobResult, list[Progress]]) -> None:
    out, result, _ = digits
    certificate = json.loads((out / "certificate.json").read_text())
    text = json.dumps(certificate)
    for word in ("parity", "quality", "speed", "coverage", "sha256", "replay", "hashes", "noise"):
        assert word in text, word
    assert certificate["hashes"]["plan"] == result.best
    assert "--recover-steps 20" in certificate["replay"] and "--seed 3" in certificate["replay"]


@pytest.mark.slow
def test_progress_goes_through_the_stages(digits: tuple[Path, JobResult, list[Progress]]) -> None:
    _, _, ticks = digits
    order = list(dict.fromkeys(tick.stage for tick in ticks))
    assert order[:4] == ["task", "graph", "database", "export"] and order[-2:] == ["verify", "diagnose"]
    for tick in ticks:
        assert tick.total is None or 0 <= tick.done <= tick.total


@pytest.mark.slow
def test_a_second_run_pays_for_nothing_and_a_point_can_be_exported(
    digits: tuple[Path, JobResult, list[Progress]], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, result, _ = digits
    monkeypatch.setattr(Measurer, "_ask", lambda *a: pytest.fail("a model was judged again"))
    assert result.request is not None
    again = api.run(result.request, out).result
    assert points(again) == points(result) and again.best == result.best
    written = finished.export(out, "smallest", out / "small.onnx")
    assert Path(written["onnx"]).exists() and written["plan"] in {p.id for p in result.points}


# ---------------------------------------------------------------- killed and resumed

_CHILD = """
import os, signal, sys
from pathlib import Path
import pytest
from autocompress import api
from autocompress.results import Request
from tests import networks
from tests.quick import shorten
shorten(pytest.MonkeyPatch())
stage, after = sys.argv[3], int(sys.argv[4])
def progress(tick):
    if tick.stage == stage and tick.done >= after:
        os.kill(os.getpid(), signal.SIGKILL)
request = Request.model_validate_json(sys.argv[1])
api.run(request, Path(sys.argv[2]), task=networks.task("resnet-b"), progress=progress)
"""


def in_a_child(request: Request, out: Path, stage: str, after: int) -> int:
    """Run a job in another process, which kills itself (SIGKILL) at a stage."""
    command = [sys.executable, "-W", "ignore", "-c", _CHILD, request.model_dump_json(), str(out), stage, str(after)]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False).returncode


@pytest.mark.slow
def test_killed_anywhere_it_ends_as_if_it_had_not_been(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three kills in other processes, then the end in this one: the same points as an unbroken run elsewhere."""
    request = asked()
    unbroken = tmp_path / "unbroken"
    assert in_a_child(request, unbroken, "never", 0) == 0
    want = JobResult.model_validate_json((unbroken / "result.json").read_bytes())
    out = tmp_path / "killed"
    for stage, after in (("search", 10), ("refit", 2), ("recover", 1)):
        assert in_a_child(request, out, stage, after) == -signal.SIGKILL
        assert not (out / "result.json").exists()
    measured: list[str] = []
    stages: list[str] = []
    original = Measurer._ask

    def counted(self: Measurer, query: Query) -> Any:
        if stages[-1] != "diagnose":  # which judges plans that no search asked for
            measured.append(query.fidelity)
        return original(self, query)

    monkeypatch.setattr(Measurer, "_ask", counted)
    got = api.run(request, out, task=networks.task("resnet-b"), progress=lambda tick: stages.append(tick.stage)).result
    assert points(got) == points(want) and got.best == want.best and got.evaluations == want.evaluations
    assert got.diagnosis == want.diagnosis
    assert "full" not in measured and "refitted" not in measured, "what was judged before the kills is kept"


@pytest.mark.slow
def test_ctrl_c_and_cancel_are_one_sentence(tmp_path: Path) -> None:
    def interrupt(tick: Progress) -> None:
        if tick.stage == "search" and tick.done > 4:
            raise KeyboardInterrupt

    task = networks.task("resnet-b")
    with pytest.raises(Cancelled, match="kept"):
        api.run(asked(), tmp_path, task=task, progress=interrupt)
    with pytest.raises(Cancelled, match="kept|continues"):
        api.run(asked(), tmp_path, task=task, cancelled=lambda: True)


# ---------------------------------------------------------------- bad input


def refused(expected: type[AutoCompressError], task: Task, out: Path, **changes: Any) -> str:
    with pytest.raises(expected) as caught:
        api.run(asked(**changes), out, task=task)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
    return str(caught.value)


def test_a_model_with_nan_weights(tmp_path: Path) -> None:
    task = networks.task("resnet-b", n=16)
    task.model.conv1.weight.data[0, 0, 0, 0] = float("nan")  # type: ignore[union-attr,index]
    assert "Weights must be finite" in refused(TaskError, task, tmp_path)


def test_an_empty_calibration_split(tmp_path: Path) -> None:
    task = networks.task("resnet-b", n=16)
    empty = Split(task.calibration.inputs[:0], task.calibration.targets[:0])
    assert "calibration split" in refused(TaskError, replace(task, calibration=empty), tmp_path)


class _Branching(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean((2, 3)).repeat(1, 4) if x.sum() > 1e9 else x.amax((2, 3)).repeat(1, 4)


class _NoLayers(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean((2, 3)).repeat(1, 4)


def test_a_model_that_cannot_be_followed_or_has_nothing_to_compress(tmp_path: Path) -> None:
    task = networks.task("resnet-b", n=16)
    assert "cannot be traced" in refused(UnsupportedModel, replace(task, model=_Branching()), tmp_path)
    assert "nothing to choose" in refused(UsageError, replace(task, model=_NoLayers()), tmp_path)


def test_unknown_names(tmp_path: Path) -> None:
    task = networks.task("resnet-b", n=16)
    for changes, word in (
        ({"controller": "evolutoin"}, "evolution"),
        ({"budgets": ("latency_ms<=5@lokal",)}, "local"),
        ({"budgets": ("mac<=50%",)}, "macs"),
        ({"methods": ("channel",)}, "channels"),
    ):
        assert f"Did you mean {word!r}" in refused(UnknownName, task, tmp_path / word, **changes)


def test_a_budget_that_no_plan_can_meet(tmp_path: Path) -> None:
    message = refused(InfeasibleBudget, networks.task("resnet-b", n=32), tmp_path, budgets=("macs<=0.01%",))
    assert "macs" in message


@pytest.mark.slow
def test_quality_that_nobody_reaches_is_told_after_everything_is_written(tmp_path: Path) -> None:
    """Chance level is allowed nowhere near: everything is written, then the sentence."""
    task = networks.task("resnet-b", n=32)
    message = refused(
        BudgetUnmet, task, tmp_path, budgets=("macs<=60%", "accuracy_drop<=-50"), evaluations=6, recover_steps=2
    )
    assert "nearest plan" in message
    result = JobResult.model_validate_json((tmp_path / "result.json").read_bytes())
    assert result.best is None and (tmp_path / "model.onnx").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "methods",
    [
        ("channels",),
        ("blocks",),
        ("int8",),
        ("w8", "w4"),
        ("lowrank",),
        ("rate",),
        ("lord", "cur", "tucker", "grouped", "mpo"),
    ],
)
def test_every_family_can_search_alone(tmp_path: Path, methods: tuple[str, ...]) -> None:
    """Cost tables, controllers and export with only some of the sites."""
    budget = {"blocks": "macs<=95%", "rate": "packed_mb<=60%"}.get(methods[0], "size_mb<=95%")
    result = api.run(
        asked(methods=methods, budgets=(budget,), evaluations=8, recover_steps=0),
        tmp_path,
        task=networks.task("resnet-b", n=32),
    ).result
    assert result.best is not None


@pytest.mark.slow
def test_a_budget_on_the_packed_size(tmp_path: Path) -> None:
    """Predicted from levels, measured in the file, and stated in the certificate beside the file's own size."""
    api.run(
        asked(budgets=("packed_mb<=40%",), evaluations=12, recover_steps=0, methods=METHOD_FAMILIES),
        tmp_path,
        task=networks.task("resnet-b", n=32),
    )
    certificate = json.loads((tmp_path / "certificate.json").read_text())
    (check,) = certificate["budgets"]
    assert check["holds"] and check["measured"] <= check["limit"]
    packed = len(pack((tmp_path / "model.onnx").read_bytes(), ".onnx")) / 1e6
    assert certificate["costs"]["compressed"]["packed_mb"] == packed == check["measured"]
    assert packed < certificate["costs"]["compressed"]["size_mb"]
    assert any(text.startswith("Packed, it has") for text in certificate["statements"])


@pytest.mark.slow
def test_a_task_without_training_data_is_compressed_without_recovery(tmp_path: Path) -> None:
    task = networks.task("mobilenet", n=32, train=False)
    result = api.run(asked(evaluations=8), tmp_path, task=task).result
    assert {p.fidelity for p in result.points} == {"full", "refitted"}


@pytest.mark.slow
def test_a_plan_whose_file_fails_costs_only_that_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The exporter fails for the first plan that is timed and for the first that is handed out."""
    written, broken = deliver.export_onnx, {"0.onnx", "model.onnx"}

    def export(model: nn.Module, inputs: Any, path: Path, **settings: Any) -> Any:
        if path.name in broken:
            broken.remove(path.name)
            raise VerificationError("The exported model differs from torch.")
        return written(model, inputs, path, **settings)

    monkeypatch.setattr(deliver, "export_onnx", export)
    result = pipeline.compress(asked(), tmp_path, task=networks.task("resnet-b"))
    assert not broken
    assert any(note.startswith("1 of ") and "are left out" in note for note in result.notes)
    assert any(note.startswith("A plan is left out, as its file fails") for note in result.notes)
    assert result.best and json.loads((tmp_path / "certificate.json").read_text())["holds"]
    monkeypatch.setattr(deliver, "export_onnx", lambda *_, **__: (_ for _ in ()).throw(VerificationError("All fail.")))
    with pytest.raises(VerificationError, match="All fail"):
        pipeline.compress(asked(seed=4), tmp_path / "none", task=networks.task("resnet-b"))


def test_after_a_missed_limit_comes_a_plan_with_room() -> None:
    """After a file that takes a tenth more than expected, plans within a tenth of the limit are passed over."""

    def priced(ms: float) -> deliver.Delivery:
        costs = {"latency_ms@local": ms, "size_mb": 1.0}
        return deliver.Delivery(Evaluation((0,), "refitted", {"loss": 1.0}, costs, 0.0), {"latency_ms@local": ms})

    missed, near, far = priced(9.9), priced(9.5), priced(8.0)
    check = BudgetCheck("latency_ms<=10@local", 10.0, 10.89, False)
    assert pipeline._with_room([near, far], missed, [check]) == [far]
    assert pipeline._with_room([near], missed, [check]) == [near]
    assert pipeline._with_room([near, far], missed, [replace(check, measured=20.0)]) == [far]
    assert pipeline._with_room([], missed, [check]) == []


def test_damaged_files_are_sentences(tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text("{")
    with pytest.raises(AutoCompressError):
        finished.export(tmp_path, "best")
    with pytest.raises(UsageError, match="run the job first"):
        finished.export(tmp_path / "nothing", "best")


@pytest.mark.slow
def test_a_damaged_original_is_made_again(tmp_path: Path) -> None:
    task = networks.task("resnet-b", n=16)
    (tmp_path / "original.json").write_text("{")
    (tmp_path / "original.onnx").write_text("x")
    api.run(asked(evaluations=4, recover_steps=0, budgets=("macs<=90%",)), tmp_path, task=task)


def test_an_output_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError):
        pipeline.compress(asked(), tmp_path / "file", task=networks.task("resnet-b", n=16))

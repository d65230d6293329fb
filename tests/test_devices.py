"""One more device for a finished job: right numbers, nothing judged again, and a result that stays whole."""

from __future__ import annotations

import json
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import streamlit as st
from streamlit.testing.v1 import AppTest
from typer.testing import CliRunner

from autocompress import api
from autocompress.cli import app
from autocompress.costs import CostModel
from autocompress.dashboard.front import axis_of, handed_out, value_of
from autocompress.dashboard.launch import launch
from autocompress.errors import BudgetUnmet, StoreError, UnknownName, UsageError
from autocompress.graph import trace
from autocompress.hwprofiles import load_profile
from autocompress.results import BudgetRow, JobResult, OpRow, Point
from autocompress.service.store import JobStore
from autocompress.space import make_space
from autocompress.types import Plan, digest
from autocompress.validate import make_request
from tests import networks

FACTORY = "from tests import networks\n\n\ndef small():\n    return networks.task('resnet-b', n=16)\n"
KEY = "latency_ms@pixel2"


class Finished:
    """A job's result on a small network: real plans and costs on pixel3, made-up losses."""

    def __init__(self, spec: str) -> None:
        self.task = networks.task("resnet-b", n=16)
        self.graph = trace(self.task.model, self.task.example_inputs)
        self.space = make_space(self.graph, ["channels", "blocks", "int8"])
        self.costs = CostModel(self.graph, self.space, {"pixel3": load_profile("pixel3")})
        rng = random.Random(0)
        plans = [self.space.sample(rng) for _ in range(12)]
        points = [self.point(plan, rng.random(), "refitted" if i < 6 else "full") for i, plan in enumerate(plans)]
        self.request = make_request(
            {"task": spec, "budgets": ["latency_ms<=60%@pixel3"], "methods": ["channels", "blocks", "int8"]}
        )
        dense = self.costs.in_units(self.space.dense)["latency_ms@pixel3"]
        self.result = JobResult(
            task="small",
            metric_name="accuracy",
            higher_is_better=True,
            original=self.point(self.space.dense, 0.0, "full"),
            budgets=(BudgetRow(text="latency_ms<=60%@pixel3", key="latency_ms@pixel3", limit=0.6 * dense),),
            objectives=("loss", "latency_ms@pixel3"),
            sites=(),
            points=tuple(points),
            best=points[0].id,
            devices={"pixel3": {"provenance": "fitted from published measurements"}},
            request=self.request,
        )

    def point(self, plan: Plan, loss: float, rung: Any) -> Point:
        stored = self.space.plan_to_json(plan)
        named = [(name, kernel) for name, group in self.costs.kernels(plan) for kernel in group]
        ops = [
            OpRow(name=name, kind=k.kind, in_shape=k.in_shape, out_shape=k.out_shape, format=k.format)
            for name, k in named
        ]
        return Point(
            id=digest(stored),
            plan=self.space.describe(plan),
            levels=stored,
            fidelity=rung,
            values={"loss": loss, "metric": 1 - loss, "accuracy_drop": 100 * loss},
            costs=self.costs.in_units(plan),
            on_front=rung == "refitted",
            ops=tuple(ops) if rung == "refitted" else (),
        )

    def in_a_store(self, place: Path) -> tuple[JobStore, str]:
        store = JobStore(place / "jobs.sqlite")
        job = store.submit("compress", self.request)
        claimed = store.claim()
        assert claimed is not None
        (claimed.folder / "result.json").write_text(self.result.model_dump_json())
        store.finish(claimed, self.result)
        return store, job.id


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    file = tmp_path_factory.mktemp("factory") / "mine.py"
    file.write_text(FACTORY)
    return Finished(f"{file}:small")


def call(*args: str) -> str:
    run = CliRunner().invoke(app, list(args))
    assert run.exit_code == 0, run.output
    return run.stdout


def refused(*args: str, code: int = 2) -> str:
    run = CliRunner().invoke(app, list(args))
    assert run.exit_code == code, run.output
    assert len(run.stderr.strip().splitlines()) == 1
    return run.stderr


class TestPrediction:
    def test_is_what_a_job_on_that_device_would_have_said(self, finished: Finished) -> None:
        from autocompress import devices

        both = CostModel(finished.graph, finished.space, {name: load_profile(name) for name in ("pixel3", "pixel2")})
        result = devices.predict(finished.result, load_profile("pixel2"), task=finished.task).added_to(finished.result)
        for point in (result.original, *result.points):
            assert point.costs == pytest.approx(both.in_units(finished.space.plan_from_json(point.levels)), rel=1e-12)
            if point.ops:
                total = sum(op.predicted_ms["pixel2"] for op in point.ops) + load_profile("pixel2").overhead_ns / 1e6
                assert total == pytest.approx(point.costs[KEY], rel=1e-9) and point.intervals[KEY] > 0
        assert result.device_label("pixel2") == "pixel2, fitted"
        assert any("fitted profile" in note for note in result.notes)

    def test_all_else_stays(self, finished: Finished) -> None:
        from autocompress import devices

        before = finished.result
        after = devices.predict(before, load_profile("pixel2"), "phone", finished.task).added_to(before)
        assert after.best == before.best and after.evaluations == before.evaluations
        for old, new in zip(before.points, after.points, strict=True):
            assert new.costs.pop("latency_ms@phone") > 0
            assert (new.id, new.costs, new.values, new.feasible) == (old.id, old.costs, old.values, old.feasible)

    @pytest.mark.parametrize(
        ("profile", "name", "sentence"),
        [
            ("pixel3", None, "has 'pixel3, fitted' already"),
            ("pixel2", "local", "'local' is this machine"),
            ("pixel2", "a@b", "stands in budgets"),
            ("1080ti-batch32", None, "batches of 32"),
        ],
    )
    def test_what_cannot_be_added(self, finished: Finished, profile: str, name: str | None, sentence: str) -> None:
        from autocompress import devices

        with pytest.raises(UsageError, match=sentence):
            devices.predict(finished.result, load_profile(profile), name, finished.task)

    def test_operators_of_another_version_are_refused(self, finished: Finished) -> None:
        from autocompress import devices

        first = finished.result.points[0]
        other = first.model_copy(update={"ops": first.ops[1:]})
        result = finished.result.model_copy(update={"points": (other, *finished.result.points[1:])})
        with pytest.raises(StoreError, match="another version"):
            devices.predict(result, load_profile("pixel2"), task=finished.task)


class TestCommandLine:
    def test_a_job_of_the_store(self, finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("AUTOCOMPRESS_STORE", str(tmp_path / "jobs.sqlite"))
        store, job = finished.in_a_store(tmp_path)
        said = call("predict", job, "pixel2", "--budget", "latency_ms<=100%")
        assert "pixel2, fitted" in said and "Best under latency_ms<=100%@pixel2: plan" in said
        kept = store.result(job)
        assert kept is not None and KEY in kept.original.costs
        assert api.read_result(tmp_path / "jobs" / job) == kept  # the file and the store agree
        picked = api.best_under(kept, "latency_ms<=100%@pixel2")
        assert f"plan {picked.id[:8]}" in said
        assert picked.values["loss"] == min(
            p.values["loss"]
            for p in kept.points
            if p.fidelity == "refitted" and p.costs[KEY] <= kept.original.costs[KEY]
        )
        assert "already" in refused("predict", job, "pixel2")
        assert "already" in refused("predict", str(tmp_path / "jobs" / job), "pixel2")
        unmet = CliRunner().invoke(app, ["predict", job, "raspi4", "--budget", "latency_ms<=0.1%"])
        assert unmet.exit_code == 3 and "the nearest is" in unmet.stderr
        again = store.result(job)
        assert again is not None and set(again.devices) == {"pixel3", "pixel2", "raspi4"}
        store.close()

    def test_a_jobs_folder_changes_the_store_too(self, finished: Finished, tmp_path: Path, monkeypatch: Any) -> None:
        monkeypatch.setenv("AUTOCOMPRESS_STORE", str(tmp_path / "jobs.sqlite"))
        store, job = finished.in_a_store(tmp_path)
        call("predict", str(tmp_path / "jobs" / job), "pixel2", "--name", "phone", "--json")
        kept = store.result(job)
        assert kept is not None and "latency_ms@phone" in kept.original.costs
        store.close()

    def test_a_folder_and_a_profiles_file(self, finished: Finished, tmp_path: Path) -> None:
        (tmp_path / "result.json").write_text(finished.result.model_dump_json())
        load_profile("pixel2").save(tmp_path / "mine.json")
        answer = json.loads(
            call(
                "predict",
                str(tmp_path),
                str(tmp_path / "mine.json"),
                "--name",
                "mine",
                "--json",
                "--budget",
                "latency_ms<=100%",
            )
        )
        assert answer["key"] == "latency_ms@mine" and answer["best"] in {row["id"] for row in answer["front"]}
        assert answer["provenance"].startswith("fitted")
        assert "mine" in api.read_result(tmp_path).devices
        assert not list(tmp_path.glob(".result*"))  # nothing half-written

    def test_refusals(self, finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("AUTOCOMPRESS_STORE", str(tmp_path / "jobs.sqlite"))
        with JobStore(tmp_path / "jobs.sqlite") as store:
            waiting = store.submit("compress", finished.request).id
            assert "is queued; a device can be added once it is over" in refused("predict", waiting, "pixel2")
            running = store.claim()
            assert running is not None
            (running.folder / "result.json").write_text(finished.result.model_dump_json())
            assert "is running" in refused("predict", waiting, "pixel2")
            with pytest.raises(UsageError, match="is running"):
                store.amend(waiting, lambda result: result)
        (tmp_path / "result.json").write_text(finished.result.model_dump_json())
        assert "Did you mean 'pixel2'" in refused("predict", str(tmp_path), "pixle2")
        assert "limits the latency on 'pixel2'" in refused(
            "predict", str(tmp_path), "pixel2", "--budget", "latency_ms<=1@raspi4"
        )
        for pick in ("latency_ms<=50%@pixel2", "latency_ms<=5@pixel2"):
            assert "autocompress predict JOB pixel2" in refused("export", str(tmp_path), "--pick", pick)

    def test_the_front_of_a_device(self, finished: Finished, tmp_path: Path) -> None:
        (tmp_path / "result.json").write_text(finished.result.model_dump_json())
        call("predict", str(tmp_path), "raspi4")
        result = api.read_result(tmp_path)
        rows = json.loads(call("front", str(tmp_path), "--device", "raspi4", "--json"))["front"]
        assert rows == json.loads(call("front", str(tmp_path), "--x", "latency_ms@raspi4", "--json"))["front"]
        key = "latency_ms@raspi4"
        shown = {row["id"] for row in rows[1:]}
        for point in (p for p in result.points if p.fidelity == "refitted"):
            beaten = any(
                q.costs[key] <= point.costs[key] and q.values["loss"] < point.values["loss"]
                for q in result.points
                if q.fidelity == "refitted"
            )
            assert (point.id in shown) != beaten or point.id == result.best
        assert "front of latency_ms@raspi4, fitted" in call("front", str(tmp_path), "--device", "raspi4")
        call("front", str(tmp_path), "--device", "raspi4", "--png", str(tmp_path / "front.png"))
        assert (tmp_path / "front.png").read_bytes().startswith(b"\x89PNG")
        assert "predict JOB pixel2" in refused("front", str(tmp_path), "--device", "pixel2")
        assert "not both" in refused("front", str(tmp_path), "--device", "raspi4", "--x", "macs")


class TestTheStore:
    def test_a_change_that_fails_changes_nothing(self, finished: Finished, tmp_path: Path) -> None:
        store, job = finished.in_a_store(tmp_path)

        def fail(result: JobResult) -> JobResult:
            raise UsageError("no")

        with pytest.raises(UsageError, match="no"):
            store.amend(job, fail)
        assert store.result(job) == api.read_result(tmp_path / "jobs" / job) == finished.result
        store.close()

    def test_changes_at_the_same_time_are_all_kept(self, finished: Finished, tmp_path: Path) -> None:
        store, job = finished.in_a_store(tmp_path)

        def add(name: str) -> None:
            with JobStore(store.path) as mine:
                mine.amend(job, lambda r: r.model_copy(update={"notes": (*r.notes, name)}))

        names = [f"device {i}" for i in range(6)]
        with ThreadPoolExecutor(6) as pool:
            list(pool.map(add, names))
        kept = store.result(job)
        assert kept is not None and sorted(kept.notes) == names
        assert api.read_result(tmp_path / "jobs" / job) == kept
        store.close()


def test_in_python(finished: Finished, tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text(finished.result.model_dump_json())
    run = api.Result.load(tmp_path, finished.task).predict("pixel2")
    assert run.best("latency_ms<=100%@pixel2") in run.front
    assert KEY in api.read_result(tmp_path).original.costs
    with pytest.raises(BudgetUnmet, match="the nearest"):
        run.best("latency_ms<=0.001@pixel2")
    with pytest.raises(UnknownName, match="predict JOB raspi4"):
        run.export(tmp_path / "model.onnx", "latency_ms<=5@raspi4")


def test_the_explorer_offers_each_device(finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTOCOMPRESS_STORE", str(tmp_path / "jobs.sqlite"))
    st.cache_resource.clear()
    store, job = finished.in_a_store(tmp_path)
    page = AppTest.from_file(launch("", 0)[4], default_timeout=30)
    page.query_params["job"] = job
    page.run()
    assert not page.exception and "latency on pixel3, fitted (ms)" in page.selectbox(key="x").options
    assert "latency on pixel2, fitted (ms)" not in page.selectbox(key="x").options
    call("predict", job, "pixel2")
    page.run()  # the open page learns of it
    assert not page.exception and "latency on pixel2, fitted (ms)" in page.selectbox(key="x").options
    page.selectbox(key="x").set_value(KEY).run()
    assert not page.exception
    store.close()
    st.cache_resource.clear()


def test_the_front_of_plans_that_can_be_handed_out(finished: Finished) -> None:
    key = "latency_ms@pixel3"
    points = handed_out(finished.result, key)
    assert {p.fidelity for p in points} == {"refitted"}
    costs, losses = [value_of(p, key) for p in points], [p.values["loss"] for p in points]
    assert costs == sorted(costs) and losses == sorted(losses, reverse=True)
    assert axis_of(finished.result, key).title == "latency on pixel3, fitted (ms)"

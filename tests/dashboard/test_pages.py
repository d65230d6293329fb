"""The dashboard's pages on real stores, by Streamlit's AppTest."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import streamlit as st
from streamlit.testing.v1 import AppTest

from autocompress.dashboard.launch import launch
from autocompress.results import Progress
from autocompress.service.store import Job, JobStore
from autocompress.service.worker import work
from tests.dashboard import sample
from tests.dashboard.exporter import export_something
from tests.dashboard.filled import fill

APP = launch("", 0)[4]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    path = tmp_path / "jobs.sqlite"
    monkeypatch.setenv("AUTOCOMPRESS_STORE", str(path))
    st.cache_resource.clear()
    yield path
    st.cache_resource.clear()


@pytest.fixture
def filled(place: Path) -> Iterator[tuple[JobStore, Job]]:
    store, job = fill(place)
    yield store, job
    store.close()


def open_page(job: str | None = None) -> AppTest:
    app = AppTest.from_file(APP, default_timeout=30)
    if job is not None:
        app.query_params["job"] = job
    app.run()
    assert not app.exception
    return app


def texts(app: AppTest) -> str:
    return "\n".join(element.value for kind in (app.markdown, app.caption) for element in kind)


def test_an_empty_store_says_what_to_do(place: Path) -> None:
    app = open_page()
    assert "no jobs yet; submit one with `autocompress submit" in app.info[0].value


@pytest.mark.slow
def test_the_list_of_jobs(filled: tuple[JobStore, Job]) -> None:
    _store, job = filled
    app = open_page()
    text = texts(app)
    assert f"**cifar10:resnet20** `{job.id}`" in text and "latency_ms<=60%@local · accuracy_drop<=2" in text
    assert "the smallest has 0.14 MB" in text
    for state in ("succeeded", "failed", "running", "cancelled"):
        assert state in text
    app.button(key=f"open-{job.id}").click().run()
    assert app.query_params["job"] in (job.id, [job.id]) and not app.exception
    assert app.selectbox(key=f"plan-{job.id}").value == sample.result().best


def test_a_job_page(filled: tuple[JobStore, Job]) -> None:
    _store, job = filled
    result = sample.result()
    app = open_page(job.id)
    assert not app.warning and all(f"- {note}" in texts(app) for note in result.notes)
    assert len(app.get("plotly_chart")) == 2
    plan = app.selectbox(key=f"plan-{job.id}")
    assert plan.value == result.best and len(plan.options) == 18 + 1
    assert "16 of 18 sites are compressed" in texts(app)
    tables = [frame.value for frame in app.dataframe]
    levels = next(table for table in tables if "site" in table)
    best = next(p for p in result.points if p.id == result.best and p.fidelity == "refitted")
    assert (
        dict(zip(levels["site"], levels["level"], strict=True)) == {s.name: "dense" for s in result.sites} | best.plan
    )
    latency = next(table for table in tables if "measured" in table)
    assert list(latency["measured / predicted"]) == ["1.08"]


def test_a_race_on_its_jobs_page(filled: tuple[JobStore, Job]) -> None:
    store, _job = filled
    store.submit("compress", sample.request())
    claimed = store.claim()
    assert claimed is not None
    store.finish(claimed, sample.raced())
    app = open_page(claimed.id)
    assert "The race" in texts(app) and len(app.get("plotly_chart")) == 3
    table = next(frame.value for frame in app.dataframe if "controller" in frame.value)
    assert list(table["controller"]) == ["evolution", "random"] and list(table["found after"]) == [120, 90]


@pytest.mark.slow
def test_a_diagnosis_on_its_jobs_page(filled: tuple[JobStore, Job]) -> None:
    store, _job = filled
    store.submit("compress", sample.request())
    claimed = store.claim()
    assert claimed is not None
    store.finish(claimed, sample.diagnosed())
    app = open_page(claimed.id)
    assert [tab.label for tab in app.tabs] == ["Sensitivity", "Layers", "Methods", "Examples and classes"]
    assert "answer 2 of 2000 examples otherwise" in texts(app) and len(app.get("plotly_chart")) == 4
    methods = next(frame.value for frame in app.dataframe if "without" in frame.value)
    assert list(methods["without"]) == ["nothing", "int8"]
    examples = next(frame.value for frame in app.dataframe if "agreement" in frame.value)
    assert list(examples["example"]) == [11, 7] and list(examples["compressed"]) == [5, 5]
    assert "Diagnosis" not in texts(open_page(_job.id))


@pytest.mark.slow
def test_another_plan_rung_and_axes(filled: tuple[JobStore, Job]) -> None:
    _store, job = filled
    result = sample.result()
    app = open_page(job.id)
    app.selectbox(key=f"plan-{job.id}").set_value(result.original.id).run()
    assert "0 of 18 sites are compressed" in texts(app) and "The original needs no export." in texts(app)
    app.get_by_key("rung").set_value("recovered").run()
    assert not app.exception and len(app.selectbox(key=f"plan-{job.id}").options) == 4 + 1
    app.get_by_key("rung").set_value("full").run()
    assert len(app.selectbox(key=f"plan-{job.id}").options) == 48 + 1
    app.selectbox(key="y").set_value(f"latency_ms@{sample.DEVICE}").run()  # the other axis gives way
    assert not app.exception and app.selectbox(key="x").value != app.selectbox(key="y").value
    app.selectbox(key="x").set_value("macs").run()
    over = next(p for p in result.points if p.fidelity == "full" and not p.feasible)
    app.selectbox(key=f"plan-{job.id}").set_value(over.id).run()
    assert not app.exception and any("Over budget by" in w.value for w in app.warning)


@pytest.mark.slow
def test_an_export_goes_through_the_store(filled: tuple[JobStore, Job]) -> None:
    store, job = filled
    app = open_page(job.id)
    app.button(key="export").click().run()
    (export,) = store.list(kind="export")
    assert export.request == {"job": job.id, "pick": sample.result().best, "out": None}
    assert app.button(key="export").disabled and "waiting for a worker" in texts(app)
    work(store, once=True, poll_seconds=0.05, runner=export_something)
    app.run()
    assert not app.exception
    assert [b.label for b in app.get("download_button")] == ["ONNX file", "Certificate"]
    outcome = store.outcome(export.id)
    assert outcome is not None
    Path(outcome["onnx"]).unlink()
    app.run()
    assert "is gone; export the plan again" in texts(app)


@pytest.mark.slow
def test_running_failed_and_cancelled_jobs(filled: tuple[JobStore, Job]) -> None:
    store, _job = filled
    by_state = {job.state: job for job in store.list()}
    assert open_page(by_state["failed"].id).error[0].value == by_state["failed"].error
    assert "was cancelled" in open_page(by_state["cancelled"].id).info[0].value
    app = open_page(by_state["running"].id)
    next(button for button in app.button if button.label == "Cancel this job").click().run()
    assert store.get(by_state["running"].id).cancel_requested
    assert any(button.label == "Stopping" and button.disabled for button in app.button)


@pytest.mark.slow
def test_a_failed_job_shows_the_front_it_has(filled: tuple[JobStore, Job]) -> None:
    store, _job = filled
    store.submit("compress", sample.request())
    claimed = store.claim()
    assert claimed is not None
    store.fail(claimed, "The best plan takes 3.1 ms and the budget is 2.4 ms.", 3, sample.result())
    app = open_page(claimed.id)
    assert "takes 3.1 ms" in app.error[0].value and len(app.get("plotly_chart")) == 2


def test_a_job_that_finishes_while_watched(filled: tuple[JobStore, Job]) -> None:
    store, _job = filled
    queued = store.submit("compress", sample.request())
    app = open_page(queued.id)
    assert "waiting for a worker" in texts(app)
    claimed = store.claim()
    assert claimed is not None and claimed.id == queued.id
    store.progress(claimed, Progress(stage="search", done=1))
    app.run()
    assert not app.exception
    store.finish(claimed, sample.result())
    app.run()
    assert len(app.get("plotly_chart")) == 2


def test_a_wrong_id_and_a_wrong_file(filled: tuple[JobStore, Job], monkeypatch: pytest.MonkeyPatch) -> None:
    app = open_page("nothing")
    assert "Unknown job 'nothing'" in app.error[0].value
    app.button[0].click().run()
    assert not app.error and not app.exception
    monkeypatch.setenv("AUTOCOMPRESS_STORE", APP)
    st.cache_resource.clear()
    assert "is not an SQLite file" in open_page().error[0].value

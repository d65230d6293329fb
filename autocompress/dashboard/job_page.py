"""One job: its state, its front, a plan of it layer by layer, and the export of that plan."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, ParamSpec

import streamlit as st

from autocompress.dashboard.diagnosis import (
    class_rows,
    contribution_rows,
    exemplar_rows,
    layer_rows,
    summary,
)
from autocompress.dashboard.front import (
    axes_of,
    axis_of,
    default_axes,
    default_rung,
    format_value,
    read_front,
    rungs_of,
    value_of,
)
from autocompress.dashboard.plots import errors_figure, front_figure, ops_figure, race_figure, sensitivity_figure
from autocompress.dashboard.tables import latency_rows, op_devices, op_rows, plan_title, race_rows, site_rows
from autocompress.errors import AutoCompressError
from autocompress.results import Diagnosis, JobResult, Point
from autocompress.service.store import Job, JobStore
from autocompress.types import Fidelity

STATES: dict[str, tuple[str, str]] = {
    "queued": ("gray", ":material/hourglass_empty:"),
    "running": ("blue", ":material/autorenew:"),
    "succeeded": ("green", ":material/check_circle:"),
    "failed": ("red", ":material/error:"),
    "cancelled": ("orange", ":material/cancel:"),
}
"""Colour and sign of each state; the word stands beside them."""

RUNGS_HELP = """Values of different rungs do not compare, so one rung is shown at a time.

- **slice**, **full**: as judged in the search, on a part or all of the search split
- **refitted**: after the weights were refitted layer by layer, without training
- **recovered**: after distillation from the original"""
REFRESH_SECONDS = 2
SHOWN_NOTES = 3
P = ParamSpec("P")


def refreshing(draw: Callable[P, None]) -> Callable[P, None]:
    """Draws a part of the page again every two seconds; what the store refuses is shown as its sentence."""

    @functools.wraps(draw)
    def safely(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            draw(*args, **kwargs)
        except AutoCompressError as error:
            st.error(str(error))

    return st.fragment(safely, run_every=REFRESH_SECONDS)


def describe(job: Job) -> tuple[str, str]:
    """Title and details of a job, for lists."""
    if job.kind == "compress":
        request = job.request
        return str(request["task"]), " · ".join([*request["budgets"], f"controller {request['controller']}"])
    if job.kind == "export":
        return "export", f"plan {job.request['pick'][:8]} of job {job.request['job']}"
    return job.kind, ""


def show_progress(job: Job) -> None:
    """What can be said of a job's advance in one line."""
    tick = job.progress
    if job.state == "running" and tick is not None:
        count = f" {tick.done} of {tick.total}" if tick.total else f" {tick.done}" if tick.done else ""
        text = f"{tick.stage}{count}" + (f" · {tick.message}" if tick.message else "")
        st.progress(min(tick.done / tick.total, 1.0) if tick.total else 0.0, text=text)
    elif job.state == "running":
        st.caption("starting")
    elif job.state == "queued":
        st.caption("waiting for a worker: `autocompress worker`")
    elif job.state == "failed":
        st.caption(f":red[{(job.error or '')[:120]}]")
    elif job.finished is not None and job.started is not None:
        st.caption(f"took {job.finished - job.started:,.0f} s")


@st.cache_resource(max_entries=16)
def load_result(_store: JobStore, path: str, job_id: str, size: int) -> JobResult | None:
    """The front of a job that is over, read once a ``size`` (a device may be added later); ``None`` where there is none."""
    return _store.result(job_id)


def show(store: JobStore, job: Job) -> None:
    """The page of a job."""
    back, title, state = st.columns([1, 8, 1.4], vertical_alignment="center")
    if back.button("Jobs", icon=":material/arrow_back:", type="tertiary"):
        st.query_params.clear()
        st.rerun()
    name, details = describe(job)
    title.markdown(f"#### {name} `{job.id}`\n:small[{details}]")
    colour, icon = STATES[job.state]
    state.badge(job.state, color=colour, icon=icon)  # type: ignore[arg-type]
    if not job.over:
        _follow(store, job.id)
        return
    if job.state == "failed":
        st.error(job.error or "It failed without a message.")
    elif job.state == "cancelled":
        st.info("This job was cancelled; submit it again to go on.")
    result = load_result(store, str(store.path), job.id, store.result_bytes(job.id))
    if result is not None:
        _show_notes(result)
        _show_result(store, job, result)
        if result.diagnosis is not None:
            _show_diagnosis(result, result.diagnosis)
        if result.race:
            _show_race(result)
    elif job.state == "succeeded":
        st.json(store.outcome(job.id) or {})


@refreshing
def _follow(store: JobStore, job_id: str) -> None:
    """A job that waits or runs: how far it is, and the way to stop it."""
    job = store.get(job_id)
    if job.over:
        st.rerun(scope="app")
    show_progress(job)
    stopping = job.cancel_requested
    if st.button("Stopping" if stopping else "Cancel this job", disabled=stopping, icon=":material/stop_circle:"):
        store.cancel(job.id)
        st.rerun(scope="app")


def _show_notes(result: JobResult) -> None:
    """What was measured and decided, as a list: a note is a fact to read, not an alarm."""
    with st.container(border=True):
        st.markdown("\n".join(f"- {_escaped(note)}" for note in result.notes[:SHOWN_NOTES]))
        if rest := result.notes[SHOWN_NOTES:]:
            with st.expander(f"{len(rest)} more notes"):
                st.markdown("\n".join(f"- {_escaped(note)}" for note in rest))


def _escaped(text: str) -> str:
    """Text as it is: no Markdown, no formulas, no HTML."""
    return re.sub(r"([\\`*_{}\[\]<>$#|~:])", r"\\\1", text)


def _show_result(store: JobStore, job: Job, result: JobResult) -> None:
    rung, x, y = _controls(result)
    points = _choices(result, x, y, rung)
    key = f"plan-{job.id}"
    if st.session_state.get(key) not in points:
        st.session_state[key] = next(iter(points))
    chart, plan = st.columns([1.75, 1], gap="medium")
    with chart:
        _show_chart(result, rung, x, y, key, points)
    with plan:
        st.selectbox("Plan", list(points), format_func=lambda p: plan_title(result, points[p], x), key=key)
        point = points[st.session_state[key]]
        _show_numbers(result, point)
        _show_export(store, job.id, point.id, is_original=point == result.original)
    _show_layers(result, point)


def _show_diagnosis(result: JobResult, diagnosis: Diagnosis) -> None:
    """What the delivered plan did to the model: always that plan's, whichever is looked at above."""
    plan = result.point(diagnosis.plan)
    st.markdown(f"##### Diagnosis of plan `{diagnosis.plan[:8]}`\n:small[{summary(diagnosis)}]")
    sensitivity, layers, methods, examples = st.tabs(["Sensitivity", "Layers", "Methods", "Examples and classes"])
    with sensitivity:
        st.caption(
            "The loss that one level costs when all other sites stay dense; a ring marks what the plan has there."
        )
        st.plotly_chart(sensitivity_figure(result, plan.plan), key="sensitivity", config={"displayModeBar": False})
    with layers:
        st.caption(
            "How far each layer's outputs are from the original's, all layers before it compressed, too. "
            "`pq`: how unequal its weights were (0: all alike; near 1: few hold everything)."
        )
        st.plotly_chart(errors_figure(diagnosis), key="errors", config={"displayModeBar": False})
        st.dataframe(layer_rows(diagnosis), hide_index=True, height=300)
    with methods:
        st.caption("The plan, and the plan without one of its methods, each refitted; costs against the original's.")
        st.dataframe(contribution_rows(result), hide_index=True, height="content")
    with examples:
        left, right = st.columns(2, gap="medium")
        left.caption("Examples of the report split by their number; how many of the models agree.")
        left.dataframe(exemplar_rows(diagnosis), hide_index=True, height=380)
        right.caption("Classes, the one that lost most first; * differs from the mean change by more than chance.")
        right.dataframe(class_rows(diagnosis), hide_index=True, height=380)


def _show_race(result: JobResult) -> None:
    st.markdown(
        "##### The race\n:small[The best loss within the budgets. Seconds are those of a processor: what the answers cost when "
        "they were paid, and what the controller thought itself.]"
    )
    chart, table = st.columns([1.35, 1], gap="medium")
    chart.plotly_chart(race_figure(result), key="race", config={"displayModeBar": False})
    table.dataframe(race_rows(result), hide_index=True, height="content")


def _controls(result: JobResult) -> tuple[Fidelity, str, str]:
    rungs = rungs_of(result) or [result.original.fidelity]
    keys = axes_of(result)
    default_x, default_y = default_axes(result)
    first, second, third = st.columns([2, 1, 1], gap="medium")
    rung = first.segmented_control(
        "Plans on the rung",
        rungs,
        default=default_rung(result),
        required=True,
        help=RUNGS_HELP,
        key="rung",
    )

    def title(key: str) -> str:
        return axis_of(result, key).title

    y = second.selectbox("Up", keys, index=keys.index(default_y), format_func=title, key="y")
    others = [key for key in keys if key != y]
    x = third.selectbox(
        "Across", others, index=others.index(default_x) if default_x in others else 0, format_func=title, key="x"
    )
    return rung or rungs[0], x, y


def _choices(result: JobResult, x: str, y: str, rung: Fidelity) -> dict[str, Point]:
    """Id -> point, the best first, then the front, the dominated, those over budget, and the original."""
    front = read_front(result, x, y, rung)
    ordered = [p for role in ("best", "front", "dominated", "infeasible") for p in front.points[role]]
    return {point.id: point for point in [*ordered, result.original]}


def _show_chart(result: JobResult, rung: Fidelity, x: str, y: str, plan_key: str, points: dict[str, Point]) -> None:
    chart_key = f"front-{plan_key}"

    def clicked() -> None:
        for picked in st.session_state[chart_key]["selection"]["points"]:
            if picked.get("customdata"):
                custom = picked["customdata"]
                st.session_state[plan_key] = custom[0] if isinstance(custom, list) else custom["0"]

    st.plotly_chart(
        front_figure(result, x, y, rung=rung, selected=st.session_state[plan_key]),
        key=chart_key,
        on_select=clicked,
        selection_mode="points",
        config={"displaylogo": False, "scrollZoom": True, "modeBarButtonsToRemove": ["lasso2d", "select2d"]},
        alt=f"{len(points) - 1} plans on rung {rung}: {y} against {x}",
    )
    front = read_front(result, x, y, rung)
    remarks = ["Click a point to see its plan."]
    if front.outside:
        remarks.append(f"{front.outside} over-budget plans lie outside this view: zoom out to see them.")
    if front.not_finite:
        remarks.append(f"{front.not_finite} plans have no finite value here and are not drawn.")
    if not front.points["front"]:
        remarks.append("No plan on this rung holds every budget.")
    st.caption(" ".join(remarks))


def _show_numbers(result: JobResult, point: Point) -> None:
    dense = result.original
    keys = [k for k in ("metric", "accuracy_drop", *sorted(point.costs)) if k in (*point.values, *point.costs)]
    rows = [
        {
            "": axis_of(result, key).title.partition(" (")[0] if key in axes_of(result) else key,
            "this plan": format_value(key, value_of(point, key)),
            "original": format_value(key, value_of(dense, key)),
            "ratio": _ratio(value_of(point, key), value_of(dense, key)) if key in point.costs else "",
        }
        for key in keys
    ]
    st.dataframe(rows, hide_index=True, height="content")
    if not point.feasible:
        st.warning(f"Over budget by {point.violation:.0%} in sum.", icon=":material/warning:")


def _ratio(value: float, dense: float) -> str:
    return f"{value / dense:.0%}" if dense else "-"


def _show_layers(result: JobResult, point: Point) -> None:
    layers, operators = st.columns([1, 1.35], gap="medium")
    with layers:
        changed = len(point.plan)
        st.markdown(f"##### Layer by layer\n:small[{changed} of {len(result.sites)} sites are compressed.]")
        counts = {name: st.column_config.NumberColumn(format="compact") for name in ("MACs", "weights")}
        st.dataframe(site_rows(result, point), hide_index=True, height=420, column_config=counts)
    with operators:
        st.markdown("##### Latency\n:small[Predicted from the device's tables; measured once the plan is exported.]")
        st.dataframe(latency_rows(result, point), hide_index=True)
        devices = op_devices(point)
        if not devices:
            st.caption("No table of operators is stored for this plan; the plans on the front have one.")
            return
        device = st.selectbox("Device", devices, key="device") if len(devices) > 1 else devices[0]
        st.plotly_chart(
            ops_figure(point, device, result.device_label(device)), key="ops", config={"displayModeBar": False}
        )
        with st.expander(f"All {len(point.ops)} operators"):
            st.dataframe(op_rows(point), hide_index=True)


@refreshing
def _show_export(store: JobStore, job_id: str, plan_id: str, is_original: bool) -> None:
    """Submit an export of the plan, follow it, and hand out its files."""
    exports = [e for e in store.list(kind="export") if (e.request["job"], e.request["pick"]) == (job_id, plan_id)]
    newest = exports[0] if exports else None
    busy = newest is not None and not newest.over
    label = "Exporting" if busy else "Export this plan again" if newest else "Export this plan"
    if is_original:
        st.caption("The original needs no export.")
        return
    kind = "secondary" if newest else "primary"
    if st.button(label, type=kind, disabled=busy, icon=":material/output:", width="stretch", key="export"):  # type: ignore[arg-type]
        store.submit("export", {"job": job_id, "pick": plan_id, "out": None})
        st.rerun(scope="app")
    if newest is None:
        return
    colour, icon = STATES[newest.state]
    st.badge(f"export {newest.id} {newest.state}", color=colour, icon=icon)  # type: ignore[arg-type]
    if newest.state == "failed":
        st.error(newest.error or "It failed without a message.")
    elif newest.state == "succeeded":
        _show_files(newest, store.outcome(newest.id) or {})
    else:
        show_progress(newest)


def _show_files(job: Job, outcome: dict[str, Any]) -> None:
    """Download buttons; a file is read when its button is pressed."""
    left, right = st.columns(2)
    model = Path(outcome.get("onnx", ""))
    if model.is_file():
        left.download_button(
            "ONNX file", model.read_bytes, f"{job.request['pick'][:8]}.onnx", "application/octet-stream",
            icon=":material/download:", width="stretch", on_click="ignore", key="download-onnx",
        )  # fmt: skip
    else:
        left.caption(f"The exported file {model} is gone; export the plan again.")
    certificate = outcome.get("certificate")
    text = certificate if isinstance(certificate, dict) else _read_json(certificate)
    if text is not None:
        right.download_button(
            "Certificate", json.dumps(text, indent=2), "certificate.json", "application/json",
            icon=":material/verified:", width="stretch", on_click="ignore", key="download-certificate",
        )  # fmt: skip


def _read_json(path: object) -> Any:
    if not isinstance(path, str) or not Path(path).is_file():
        return None
    return json.loads(Path(path).read_text(encoding="utf-8"))

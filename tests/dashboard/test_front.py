"""What pictures of a front show: roles, dominance, rungs, budget lines, ranges; the PNG and the plotly figure."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import plotly.graph_objects as go
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autocompress.dashboard.diagnosis import column_of, contribution_rows, layer_rows, sensitivity_grid, summary
from autocompress.dashboard.front import (
    MARKS,
    axes_of,
    default_axes,
    default_rung,
    format_value,
    front_line,
    read_front,
    rungs_of,
)
from autocompress.dashboard.launch import launch
from autocompress.dashboard.picture import write_front_png, write_race_png, write_sensitivity_png
from autocompress.dashboard.plots import errors_figure, front_figure, ops_figure, race_figure, sensitivity_figure
from autocompress.dashboard.tables import latency_rows, op_rows, plan_title, site_rows
from autocompress.errors import StoreError, UnknownName, UsageError
from autocompress.results import JobResult, Point
from tests.dashboard import sample

LATENCY = f"latency_ms@{sample.DEVICE}"


@pytest.fixture(scope="module")
def result() -> JobResult:
    return sample.result()


def point(i: int, metric: float, latency: float, feasible: bool = True) -> Point:
    return Point(
        id=f"{i:016x}",
        plan={"conv": f"level {i}"},
        levels={},
        fidelity="full",
        values={"metric": metric},
        costs={LATENCY: latency},
        feasible=feasible,
    )


def of_points(points: list[Point], higher_is_better: bool = True) -> JobResult:
    return JobResult(
        task="t",
        metric_name="accuracy",
        higher_is_better=higher_is_better,
        original=point(99, 1.0, 1.0),
        budgets=(),
        objectives=(LATENCY,),
        sites=(),
        points=tuple(points),
    )


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 9), st.booleans()), min_size=1, max_size=30), st.booleans())
def test_the_front_is_what_no_feasible_plan_dominates(rows: list[tuple[int, int, bool]], higher: bool) -> None:
    points = [point(i, metric, latency, feasible) for i, (metric, latency, feasible) in enumerate(rows)]
    front = read_front(of_points(points, higher), LATENCY, "metric")
    sign = -1 if higher else 1
    places = {(p.costs[LATENCY], sign * p.values["metric"]) for p in points if p.feasible}
    expected = {a for a in places if not any(b != a and b[0] <= a[0] and b[1] <= a[1] for b in places)}
    found = [(p.costs[LATENCY], sign * p.values["metric"]) for p in front.points["front"]]
    assert set(found) == expected and len(found) == len(expected)
    assert len(front.points["dominated"]) == sum(p.feasible for p in points) - len(found)
    assert {p.id for p in front.points["infeasible"]} == {p.id for p in points if not p.feasible}
    xs, ys, shape = front_line(front)
    assert shape == "hv" and xs == sorted(xs) and ys == sorted(ys, reverse=not higher)


def test_steps_turn_round_when_x_is_better_to_the_right() -> None:
    front = read_front(of_points([point(1, 90, 2.0), point(2, 80, 1.0)]), "metric", LATENCY)
    assert front_line(front) == ([80.0, 90.0], [1.0, 2.0], "vh")


def test_rungs_are_never_mixed(result: JobResult) -> None:
    assert rungs_of(result) == ["full", "refitted", "recovered"]
    assert default_rung(result) == "refitted"  # four recovered plans are no front
    for rung in rungs_of(result):
        front = read_front(result, rung=rung)
        drawn = [p for role in ("infeasible", "dominated", "front") for p in front.points[role]]  # type: ignore[index]
        assert {p.fidelity for p in drawn} == {rung}
        assert len(drawn) == sum(p.fidelity == rung for p in result.points)
        assert [p.id for p in front.points["best"]] == [result.best]


def test_axes(result: JobResult) -> None:
    assert axes_of(result) == ["loss", LATENCY, "accuracy_drop", "metric", "macs", "size_mb"]
    assert default_axes(result) == (LATENCY, "metric")
    front = read_front(result)
    assert (front.x.title, front.y.title, front.y.maximize) == ("latency on local (ms)", "accuracy", True)
    with pytest.raises(UnknownName, match="Did you mean 'size_mb'"):
        read_front(result, "size", "loss")
    with pytest.raises(UsageError, match="two different axes"):
        read_front(result, "loss", "loss")
    with pytest.raises(UnknownName, match="Unknown rung 'slice'"):
        read_front(result, rung="slice")


def test_budget_lines(result: JobResult) -> None:
    """A drop in points is a line on the metric's axis too, also where the metric is a fraction."""
    lines = {line.axis: line for line in read_front(result, LATENCY, "metric").budgets}
    assert lines["x"].value == pytest.approx(0.6 * result.original.costs[LATENCY])
    assert lines["x"].text == "latency_ms<=60%@local"
    assert lines["y"].value == pytest.approx(90.6)
    values = [{**p.values, "metric": p.values["metric"] / 100} for p in (result.original, *result.points)]
    as_fraction = [p.model_copy(update={"values": v}) for p, v in zip(result.points, values[1:], strict=True)]
    original = result.original.model_copy(update={"values": values[0]})
    fractions = result.model_copy(update={"points": tuple(as_fraction), "original": original})
    (line,) = [b for b in read_front(fractions, LATENCY, "metric").budgets if b.axis == "y"]
    assert line.value == pytest.approx(0.906)
    assert read_front(result, "macs", "loss").budgets == ()


def test_ranges_hold_what_matters_and_count_the_rest() -> None:
    points = [point(1, 90, 2.0), point(2, 80, 1.0), point(3, 10, 0.1, feasible=False)]
    broken = [point(4, math.nan, 1.0, feasible=False), point(5, 70, math.inf, feasible=False)]
    front = read_front(of_points([*points, *broken]), LATENCY, "metric")
    assert (front.outside, front.not_finite) == (1, 2)
    assert front.x_range[0] < 1.0 and front.x_range[1] > 2.0
    assert read_front(of_points(points[2:]), LATENCY, "metric").outside == 0  # nothing feasible: all is shown
    empty = read_front(of_points([]), LATENCY, "metric")
    assert empty.points["front"] == () and empty.points["original"]


def test_marks_differ_by_shape_and_colour() -> None:
    for name in ("colour", "symbol", "marker", "label"):
        assert len({getattr(mark, name) for mark in MARKS.values()}) == len(MARKS)


def test_the_figure_draws_every_point_once(result: JobResult) -> None:
    figure = front_figure(result, selected=result.best)
    assert isinstance(figure, go.Figure)
    by_name = {trace.name: trace for trace in figure.data if trace.mode == "markers"}
    refitted = [p for p in result.points if p.fidelity == "refitted"]
    ids = [row[0] for name in ("over budget", "feasible, dominated", "front") for row in by_name[name].customdata]
    assert sorted(ids) == sorted(p.id for p in refitted)
    assert by_name["selected"].x[0] == by_name["best, exported"].x[0]
    assert "measured latency on local" in by_name["best, exported"].hovertext[0]
    assert {a.text for a in figure.layout.annotations} == {b.text for b in result.budgets}
    (line,) = [trace for trace in figure.data if trace.mode == "lines"]
    assert line.line.shape == "hv" and len(line.x) == len(by_name["front"].x)


def test_the_png(result: JobResult, tmp_path: Path) -> None:
    path = write_front_png(result, tmp_path / "pictures" / "front.png")
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n" and int.from_bytes(content[16:20]) == 1440
    assert [p.name for p in path.parent.iterdir()] == ["front.png"]
    other = write_front_png(result, tmp_path / "macs.png", "macs", "loss", "full")
    assert other.read_bytes() != content
    write_front_png(of_points([]), tmp_path / "empty.png")
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="Cannot write"):
        write_front_png(result, tmp_path / "file" / "front.png")


def test_a_plan_as_tables(result: JobResult) -> None:
    best = next(p for p in result.points if p.id == result.best and p.fidelity == "refitted")
    rows = site_rows(result, best)
    assert [row["site"] for row in rows] == [site.name for site in result.sites]
    assert {row["site"]: row["level"] for row in rows if row["level"] != "dense"} == best.plan
    assert len(op_rows(best)) == len(best.ops) == 19
    (latency,) = latency_rows(result, best)
    assert latency["measured / predicted"] == "1.08" and latency["measured"].endswith(" ms")
    assert latency_rows(result, result.original)[0]["measured"] == "not timed yet"
    assert plan_title(result, best, LATENCY).startswith(f"best {best.id[:8]} · accuracy 9")
    assert plan_title(result, result.original, LATENCY).startswith("original · accuracy 92.6 · 4.081 ms")
    bars = ops_figure(best, sample.DEVICE)
    assert sum(len(trace.x) for trace in bars.data) == 19
    assert sum(sum(trace.y) for trace in bars.data) == pytest.approx(best.costs[LATENCY], abs=1e-3)


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [("macs", 20.4e6, "20.4 M"), (LATENCY, 2.40812, "2.408 ms"), ("metric", 91.9, "91.9"), ("loss", math.nan, "-")],
)
def test_numbers_for_people(key: str, value: float, text: str) -> None:
    assert format_value(key, value) == text


def test_launch_listens_here_only() -> None:
    command = launch("my store/jobs.sqlite", port=8765, headless=True)
    assert command[:4] == [sys.executable, "-m", "streamlit", "run"] and Path(command[4]).is_file()
    assert command[command.index("--server.address") + 1] == "localhost"
    assert command[command.index("--server.port") + 1] == "8765"
    assert command[-3:] == ["--", "--store", "my store/jobs.sqlite"]


@pytest.mark.slow
def test_the_dashboard_needs_no_torch() -> None:
    modules = "job_page, front, launch, picture, plots, tables"
    code = f"import sys; from autocompress.dashboard import {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.slow
def test_the_sensitivity_map_has_a_row_a_site_and_rings_on_the_plan(tmp_path: Path) -> None:
    result = sample.diagnosed()
    assert result.diagnosis is not None
    plan = result.point(result.diagnosis.plan).plan
    sites, columns, grid = sensitivity_grid(result.diagnosis)
    assert sites == [site.name for site in result.sites] and columns == ["keep 75 %", "keep 50 %", "keep 25 %", "int8"]
    assert grid[0] == [pytest.approx((1 - keep) ** 3) for keep in (0.75, 0.5, 0.25)] + [None]
    assert grid[1][:3] == [None] * 3 and grid[1][3] is not None
    heat, rings = sensitivity_figure(result, plan).data
    assert list(heat.y) == sites and heat.z[0][2] == pytest.approx(math.log10(0.75**3))
    assert sorted(zip(rings.y, rings.x, strict=True)) == sorted(
        (site, column_of(level)) for site, level in plan.items()
    )
    picture = write_sensitivity_png(result, tmp_path / "map.png", plan).read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert picture != write_sensitivity_png(result, tmp_path / "none.png", {}).read_bytes()


def test_layers_and_methods_of_a_diagnosis_as_rows() -> None:
    result = sample.diagnosed()
    assert result.diagnosis is not None
    assert [row["bits used"] for row in layer_rows(result.diagnosis)] == [None, 7.5]
    assert [row["pq"] for row in layer_rows(result.diagnosis)] == [None, 0.3]
    assert list(errors_figure(result.diagnosis).data[0].y) == [0.02, 0.11]
    whole, without = contribution_rows(result)
    assert whole["without"] == "nothing" and without["drop (points)"] is None and without["macs"].endswith("%")
    plain = result.diagnosis.model_copy(update={"layers": result.diagnosis.layers[:1], "right": None, "changed": 0})
    assert not {"bits used", "pq"} & set(layer_rows(plain)[0])
    assert summary(plain) == "Most of 2 compressed models answer 0 of 2000 examples otherwise than the original."
    assert "score falls most" in summary(plain.model_copy(update={"changed": None}))


def test_a_race_in_two_panels(tmp_path: Path) -> None:
    raced = sample.raced()
    assert write_race_png(raced, tmp_path / "race.png").read_bytes().startswith(b"\x89PNG")
    figure = race_figure(raced)
    assert [(trace.name, list(trace.x)) for trace in figure.data] == [
        ("evolution", [2, 120, 200]),
        ("evolution", [1.0, 61.0, 101.0]),
        ("random", [90, 200]),
        ("random", [44.0, 98.0]),
    ]
    assert sum(trace.showlegend for trace in figure.data) == 2
    nothing = raced.race[1].model_copy(update={"history": (raced.race[1].end.model_copy(update={"loss": None}),)})
    write_race_png(raced.model_copy(update={"race": (nothing,)}), tmp_path / "none.png")
    assert not any(trace.x for trace in race_figure(raced.model_copy(update={"race": (nothing,)})).data)

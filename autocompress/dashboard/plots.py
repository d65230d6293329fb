"""Plotly figures of a result: pure functions, for the page and for anyone who wants an HTML file."""

from __future__ import annotations

import math

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from autocompress.dashboard.diagnosis import FLOOR, SCALE, ringed, sensitivity_grid
from autocompress.dashboard.front import (
    LINES,
    MARKS,
    Axis,
    Front,
    Role,
    axes_of,
    axis_of,
    format_value,
    front_line,
    read_front,
    value_of,
)
from autocompress.results import Diagnosis, JobResult, Point
from autocompress.types import Fidelity

FORMAT_STYLE = {"float": ("#0072B2", ""), "int8": ("#009E73", "/"), "w8": ("#CC79A7", "x"), "w4": ("#E69F00", ".")}
"""Colour and pattern of each format's bars."""


def front_figure(
    result: JobResult,
    x: str | None = None,
    y: str | None = None,
    *,
    rung: Fidelity | None = None,
    selected: str | None = None,
) -> go.Figure:
    """The plans of one rung in two axes (keys of values or costs), each point's ``customdata`` being its id.

    Roles differ by shape and colour, budgets are dashed lines, ``selected`` (a point's id) gets a ring.
    """
    front = read_front(result, x, y, rung)
    figure = go.Figure()
    _add_budgets(figure, front)
    xs, ys, shape = front_line(front)
    line = {"color": MARKS["front"].colour, "width": 2, "shape": shape}
    figure.add_scatter(x=xs, y=ys, mode="lines", line=line, hoverinfo="skip", showlegend=False)
    for role in MARKS:
        _add_points(figure, result, front, role)
    _add_ring(figure, front, selected)
    figure.update_layout(
        xaxis=_axis_style(front.x, front.x_range),
        yaxis=_axis_style(front.y, front.y_range),
        legend={"orientation": "h", "y": -0.2, "yanchor": "top", "x": 0, "itemsizing": "constant"},
        margin={"l": 8, "r": 8, "t": 28, "b": 8},
        height=440,
        hoverlabel={"align": "left"},
        clickmode="event+select",
        dragmode="pan",
    )
    return figure


def ops_figure(point: Point, device: str, label: str = "") -> go.Figure:
    """Predicted milliseconds of each operator of a plan on ``device`` (shown as ``label``), in execution order, by format."""
    figure = go.Figure()
    numbered = list(enumerate(point.ops, 1))
    for format_ in dict.fromkeys(op.format for op in point.ops):
        colour, pattern = FORMAT_STYLE.get(format_, ("#8A8F98", "+"))
        ops = [(i, op) for i, op in numbered if op.format == format_]
        figure.add_bar(
            x=[i for i, _ in ops],
            y=[op.predicted_ms.get(device, 0.0) for _, op in ops],
            name=format_,
            width=0.8,
            marker={
                "color": colour,
                "pattern": {"shape": pattern, "fgcolor": "white", "fgopacity": 0.6, "fillmode": "overlay"},
            },
            hovertext=[f"<b>{op.name}</b><br>{op.kind} {op.in_shape} → {op.out_shape}" for _, op in ops],
            hovertemplate="%{hovertext}<br>%{y:.4f} ms<extra></extra>",
        )
    figure.update_layout(
        xaxis={"title": "operator, in order of execution", "range": [0.3, len(point.ops) + 0.7]},
        yaxis={"title": f"predicted on {label or device} (ms)", "rangemode": "tozero"},
        barmode="overlay",
        height=280,
        margin={"l": 8, "r": 8, "t": 8, "b": 8},
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 1, "xanchor": "right"},
        showlegend=True,
    )
    return figure


def race_figure(result: JobResult) -> go.Figure:
    """The best loss within the budgets of each controller that raced, against its evaluations and its processor seconds."""
    figure = make_subplots(1, 2, shared_yaxes=True, horizontal_spacing=0.04)
    dashes = ("solid", "dash", "dot", "dashdot")
    for i, entry in enumerate(result.race):
        marks = [mark for mark in entry.history if mark.loss is not None]
        line = {"color": LINES[i % len(LINES)], "dash": dashes[i % len(dashes)], "width": 2, "shape": "hv"}
        for column, key in ((1, "evaluations"), (2, "seconds")):
            figure.add_scatter(
                x=[getattr(mark, key) for mark in marks],
                y=[mark.loss for mark in marks],
                mode="lines+markers",
                name=entry.controller,
                legendgroup=entry.controller,
                showlegend=column == 1,
                line=line,
                marker={"size": 5},
                hovertemplate=f"<b>{entry.controller}</b><br>%{{x:.4g}} {key}: %{{y:.4g}}<extra></extra>",
                row=1,
                col=column,
            )
    figure.update_xaxes(title="evaluations", row=1, col=1)
    figure.update_xaxes(title="processor time (s)", row=1, col=2)
    figure.update_yaxes(title="best loss", row=1, col=1)
    figure.update_layout(
        height=320,
        margin={"l": 8, "r": 8, "t": 8, "b": 8},
        legend={"orientation": "h", "y": -0.25, "yanchor": "top", "x": 0},
    )
    return figure


def sensitivity_figure(result: JobResult, plan: dict[str, str]) -> go.Figure:
    """Loss of each level at each site, all others dense, on a logarithmic scale; a ring marks what ``plan`` has there."""
    assert result.diagnosis is not None
    sites, columns, grid = sensitivity_grid(result.diagnosis)
    shown = [[None if v is None else math.log10(max(v, FLOOR)) for v in row] for row in grid]
    texts = [["" if v is None else f"{v:.3g}" for v in row] for row in grid]
    ticks = list(range(-4, 3))
    figure = go.Figure(
        go.Heatmap(
            z=shown, x=columns, y=sites, customdata=texts, colorscale=SCALE, xgap=1, ygap=1,
            hovertemplate="%{y}<br>%{x}<br>loss +%{customdata}<extra></extra>",
            colorbar={"title": "loss", "tickvals": ticks, "ticktext": [f"{10.0**t:g}" for t in ticks], "thickness": 12},
        )
    )  # fmt: skip
    chosen = ringed(plan, sites, columns)
    figure.add_scatter(
        x=[columns[x] for x, _ in chosen], y=[sites[y] for _, y in chosen], mode="markers", hoverinfo="skip", showlegend=False,
        marker={"symbol": "circle-open", "size": 11, "color": "#0072B2", "line": {"width": 2.5}},
    )  # fmt: skip
    figure.update_layout(
        height=max(240, 110 + 19 * len(sites)), margin={"l": 8, "r": 8, "t": 8, "b": 8}, plot_bgcolor="rgba(0,0,0,0)"
    )
    figure.update_yaxes(autorange="reversed", automargin=True, tickfont={"size": 11}, showgrid=False)
    figure.update_xaxes(side="top", tickangle=-30, automargin=True, tickfont={"size": 11}, showgrid=False)
    return figure


def errors_figure(diagnosis: Diagnosis) -> go.Figure:
    """Relative squared error of each layer's outputs in the delivered plan, in the model's order."""
    rows = diagnosis.layers
    figure = go.Figure(
        go.Bar(
            x=[row.name for row in rows], y=[max(row.error, 1e-9) for row in rows], marker={"color": "#0072B2"},
            customdata=[f"{row.level}, {row.width} channels" for row in rows],
            hovertemplate="%{x}<br>%{customdata}<br>%{y:.3g}<extra></extra>",
        )
    )  # fmt: skip
    figure.update_layout(height=300, margin={"l": 8, "r": 8, "t": 8, "b": 8}, bargap=0.25)
    figure.update_yaxes(title="|y − y'|² / |y|²", rangemode="tozero", gridcolor="rgba(128,128,128,0.18)")
    figure.update_xaxes(tickangle=-60, automargin=True, tickfont={"size": 10})
    return figure


def _add_budgets(figure: go.Figure, front: Front) -> None:
    colour = MARKS["infeasible"].colour
    for budget in front.budgets:
        line = {"line": {"color": colour, "width": 1.5, "dash": "dash"}, "opacity": 0.9, "annotation_text": budget.text}
        font = {"annotation_font": {"color": colour, "size": 12}}
        if budget.axis == "x":
            figure.add_vline(budget.value, **line, **font, annotation_position="top")
        else:
            figure.add_hline(budget.value, **line, **font, annotation_position="bottom right")


def _add_points(figure: go.Figure, result: JobResult, front: Front, role: Role) -> None:
    """An empty role keeps its place in the legend only where it was possible at all."""
    points, mark = front.points[role], MARKS[role]
    if not points:
        return
    places = [front.at(point) for point in points]
    figure.add_scatter(
        x=[x for x, _ in places],
        y=[y for _, y in places],
        mode="markers",
        name=mark.label,
        marker={"symbol": mark.symbol, "color": mark.colour, "size": mark.size, "line": {"width": 1.6}},
        customdata=[[point.id] for point in points],
        hovertext=[_hover(result, point, mark.label) for point in points],
        hovertemplate="%{hovertext}<extra></extra>",
        selected={"marker": {"opacity": 1.0}},
        unselected={"marker": {"opacity": 1.0}},
    )
    if role in ("front", "original", "best"):  # filled shapes get a thin edge of their own colour
        figure.data[-1].marker.line = {"width": 1, "color": "white"}


def _add_ring(figure: go.Figure, front: Front, selected: str | None) -> None:
    for point in (point for points in front.points.values() for point in points if point.id == selected):
        x, y = front.at(point)
        marker = {"symbol": "circle-open", "size": 24, "color": "#CC79A7", "line": {"width": 3}}
        figure.add_scatter(x=[x], y=[y], mode="markers", marker=marker, hoverinfo="skip", name="selected")
        figure.data[-1].update(unselected={"marker": {"opacity": 1.0}}, showlegend=True)
        return


def _hover(result: JobResult, point: Point, label: str) -> str:
    lines = [f"<b>{point.id[:8]}</b> · {label}"]
    for key in axes_of(result):
        value = value_of(point, key)
        if math.isfinite(value):
            lines.append(f"{axis_of(result, key).title.partition(' (')[0]}: {format_value(key, value)}")
    lines += [
        f"measured {axis_of(result, k).title.partition(' (')[0]}: {format_value(k, v)}"
        for k, v in point.measured.items()
        if k in axes_of(result)
    ]
    return "<br>".join([*lines, f"{len(point.plan)} of {len(result.sites)} sites compressed"])


def _axis_style(axis: Axis, interval: tuple[float, float]) -> dict[str, object]:
    """Ticks like ``20M`` for counts; the range can be left with the mouse, a double click returns to it."""
    style: dict[str, object] = {"title": axis.title, "range": list(interval), "showgrid": True, "zeroline": False}
    style["gridcolor"] = "rgba(128,128,128,0.18)"
    if axis.key in ("macs", "params"):
        style["tickformat"] = "~s"
    return style

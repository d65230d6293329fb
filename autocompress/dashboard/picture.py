"""The front's picture as a PNG, without a browser: same marks, colours and lines as the page's figure."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patheffects import withStroke
from matplotlib.ticker import EngFormatter

from autocompress.dashboard.diagnosis import FLOOR, SCALE, ringed, sensitivity_grid
from autocompress.dashboard.front import LINES, MARKS, Front, Role, format_value, front_line, read_front
from autocompress.files import write_atomically
from autocompress.results import JobResult
from autocompress.types import Fidelity

_INK, _GREY = "#1F2328", "#6A737D"
_DASHES = ("-", "--", ":", "-.")
_HALO = [withStroke(linewidth=3, foreground="white")]


def write_front_png(
    result: JobResult, path: Path, x: str | None = None, y: str | None = None, rung: Fidelity | None = None
) -> Path:
    """Write the front's picture, 1440 x 900 pixels, and return ``path``; arguments as for ``front_figure``.

    Raises ``StoreError`` when the disk refuses.
    """
    figure = _draw(result, read_front(result, x, y, rung))
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png"))
    return path


def write_race_png(result: JobResult, path: Path) -> Path:
    """Write how the controllers that raced came down, best loss against evaluations and processor time; 1440 x 720 pixels.

    Raises ``StoreError`` when the disk refuses.
    """
    layout = ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.12)
    figure = Figure(figsize=(9.0, 4.5), dpi=160, facecolor="white", layout=layout)
    for axes, key in zip(figure.subplots(1, 2, sharey=True), ("evaluations", "seconds"), strict=True):
        for i, entry in enumerate(result.race):
            marks = [mark for mark in entry.history if mark.loss is not None]
            axes.plot(
                [getattr(mark, key) for mark in marks], [mark.loss for mark in marks], drawstyle="steps-post",
                color=LINES[i % len(LINES)], linestyle=_DASHES[i % len(_DASHES)], linewidth=1.8, marker="o", markersize=3,
                label=entry.controller,
            )  # fmt: skip
        _soften(axes)
        axes.set_xlabel({"evaluations": "evaluations", "seconds": "processor time (s)"}[key], fontsize=11, color=_INK)
    first = figure.axes[0]
    first.set_ylabel("best loss within the budgets", fontsize=11, color=_INK, labelpad=8)
    first.set_title(f"{result.task}: a race", loc="left", fontsize=14, fontweight="bold", color=_INK)
    handles, labels = first.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left", ncols=6, frameon=False, fontsize=9.5, labelcolor=_INK)
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png"))
    return path


def write_sensitivity_png(result: JobResult, path: Path, plan: dict[str, str]) -> Path:
    """Write the sensitivity map's picture, and return ``path``; ``plan``: site -> label, ringed as on the page.

    Raises ``StoreError`` when the disk refuses.
    """
    assert result.diagnosis is not None
    sites, columns, grid = sensitivity_grid(result.diagnosis)
    values = [[math.nan if v is None else max(v, FLOOR) for v in row] for row in grid]
    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1)
    figure = Figure(figsize=(9.0, 1.8 + 0.19 * len(sites)), dpi=160, facecolor="white", layout=layout)
    axes = figure.add_subplot()
    top = max((v for row in grid for v in row if v is not None), default=1.0)
    image = axes.imshow(values, cmap=SCALE, norm=LogNorm(FLOOR, max(top, 10 * FLOOR)), aspect="auto")
    axes.set_yticks(range(len(sites)), sites, fontsize=7)
    axes.set_xticks(range(len(columns)), columns, fontsize=7.5, rotation=30, ha="left")
    axes.xaxis.tick_top()
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, colors=_INK)
    axes.set_title(f"{result.task}: what one level alone costs", loc="left", fontsize=14, fontweight="bold", color=_INK)
    for x, y in ringed(plan, sites, columns):
        axes.plot(
            x, y, marker="o", markersize=7, markerfacecolor="none", markeredgecolor="#0072B2", markeredgewidth=1.8
        )
    figure.colorbar(image, ax=axes, shrink=0.6, label="loss (○: the delivered plan)")
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png"))
    return path


def _draw(result: JobResult, front: Front) -> Figure:
    layout = ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.12)
    figure = Figure(figsize=(9.0, 5.625), dpi=160, facecolor="white", layout=layout)
    axes = figure.add_subplot()
    _style(axes, front)
    _draw_budgets(axes, front)
    xs, ys, shape = front_line(front)
    step = "steps-post" if shape == "hv" else "steps-pre"
    axes.plot(xs, ys, drawstyle=step, color=MARKS["front"].colour, linewidth=1.8, zorder=2)
    for depth, role in enumerate(MARKS, start=3):
        _draw_points(axes, front, role, depth)
    for role in ("original", "best"):
        _label(axes, front, role)
    count = sum(point.fidelity == front.rung for point in result.points)
    y_title, x_title = (axis.title.partition(" (")[0] for axis in (front.y, front.x))
    title = f"{result.task}: {y_title} against {x_title}"
    axes.set_title(title, loc="left", fontsize=14, fontweight="bold", color=_INK, pad=26)
    axes.text(0.0, 1.025, _subtitle(front, count), transform=axes.transAxes, fontsize=9.5, color=_GREY)
    figure.legend(loc="outside lower left", ncols=6, frameon=False, fontsize=9.5, handletextpad=0.4, labelcolor=_INK)
    return figure


def _subtitle(front: Front, count: int) -> str:
    parts = [f"{count} plans on the rung “{front.rung}”"]
    if front.outside:
        parts.append(f"{front.outside} over-budget plans lie outside the picture")
    if front.not_finite:
        parts.append(f"{front.not_finite} without a finite value are not drawn")
    return " · ".join(parts)


def _style(axes: Axes, front: Front) -> None:
    axes.set_xlim(*front.x_range)
    axes.set_ylim(*front.y_range)
    axes.set_xlabel(front.x.title, fontsize=11, color=_INK, labelpad=8)
    axes.set_ylabel(front.y.title, fontsize=11, color=_INK, labelpad=8)
    _soften(axes)
    for axis, ticks in ((front.x, axes.xaxis), (front.y, axes.yaxis)):
        if axis.key in ("macs", "params"):
            ticks.set_major_formatter(EngFormatter(sep=""))


def _soften(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#C8CDD3")
    axes.tick_params(colors=_GREY, labelsize=9.5, length=3)
    axes.grid(color="#EBEDF0", linewidth=0.8)
    axes.set_axisbelow(True)


def _draw_budgets(axes: Axes, front: Front) -> None:
    """A dashed line, its text, and a breath of colour on the side that is over."""
    colour = MARKS["infeasible"].colour
    text: dict[str, Any] = {"color": colour, "fontsize": 9.5, "zorder": 9, "path_effects": _HALO}
    for budget in front.budgets:
        if budget.axis == "x":
            axes.axvline(budget.value, color=colour, linewidth=1.3, linestyle=(0, (5, 3)), zorder=1)
            axes.axvspan(budget.value, front.x_range[1], color=colour, alpha=0.045, linewidth=0, zorder=0)
            place = (budget.value, 0.015)
            axes.annotate(
                budget.text, place, (5, 2), xycoords=axes.get_xaxis_transform(), textcoords="offset points",
                rotation=90, va="bottom", **text,
            )  # fmt: skip
        else:
            over = front.y_range[0] if front.y.maximize else front.y_range[1]
            axes.axhline(budget.value, color=colour, linewidth=1.3, linestyle=(0, (5, 3)), zorder=1)
            axes.axhspan(budget.value, over, color=colour, alpha=0.045, linewidth=0, zorder=0)
            axes.annotate(
                budget.text, (0.99, budget.value), (0, 4), xycoords=axes.get_yaxis_transform(),
                textcoords="offset points", ha="right", va="bottom", **text,
            )  # fmt: skip


def _draw_points(axes: Axes, front: Front, role: Role, depth: int) -> None:
    points, mark = front.points[role], MARKS[role]
    if not points:
        return
    places = [front.at(point) for point in points]
    face = {"dominated": "none", "infeasible": mark.colour}.get(role, mark.colour)
    edge = mark.colour if role in ("dominated", "infeasible") else "white"
    width = 1.3 if role in ("dominated", "infeasible") else 0.9
    axes.plot(
        [x for x, _ in places], [y for _, y in places], linestyle="none", marker=mark.marker,
        markersize=mark.size * 0.72, markerfacecolor=face, markeredgecolor=edge, markeredgewidth=width,
        label=mark.label, zorder=depth,
    )  # fmt: skip


def _label(axes: Axes, front: Front, role: Role) -> None:
    """Name and numbers beside the two points everybody looks for."""
    for point in front.points[role]:
        x, y = front.at(point)
        left = x > sum(front.x_range) / 2
        above = y < front.y_range[0] + 0.9 * (front.y_range[1] - front.y_range[0])
        text = f"{role}\n{format_value(front.y.key, y)} at {format_value(front.x.key, x)}"
        axes.annotate(
            text, (x, y), (-10 if left else 10, 8 if above else -8), textcoords="offset points",
            ha="right" if left else "left", va="bottom" if above else "top", fontsize=9.5, fontweight="bold",
            color=_INK, zorder=10, path_effects=_HALO,
        )  # fmt: skip

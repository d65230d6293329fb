"""A diagnosis as rows and as a grid: pure functions of a result."""

from __future__ import annotations

import re
from typing import Any

from autocompress.results import Diagnosis, JobResult

FLOOR = 1e-4
"""Losses below that look alike: nothing is lost."""
SCALE = "YlOrRd"
_KEEP = re.compile(r"keep (\d+)/(\d+)")


def column_of(level: str) -> str:
    """Widths of all groups stand in the same columns, as shares."""
    kept = _KEEP.fullmatch(level)
    return f"keep {round(100 * int(kept[1]) / int(kept[2]))} %" if kept else level


def sensitivity_grid(diagnosis: Diagnosis) -> tuple[list[str], list[str], list[list[float | None]]]:
    """Sites, columns and losses; ``None`` where a site does not offer a level or it was not judged.  # (sites, columns)"""
    sites = list(dict.fromkeys(row.site for row in diagnosis.sensitivity))
    names = dict.fromkeys(column_of(row.level) for row in diagnosis.sensitivity)
    widths = sorted((n for n in names if n.startswith("keep ")), key=lambda n: -int(n.split()[1]))
    columns = widths + [n for n in names if n not in widths]
    place = {name: i for i, name in enumerate(columns)}
    grid: list[list[float | None]] = [[None] * len(columns) for _ in sites]
    for row in diagnosis.sensitivity:
        grid[sites.index(row.site)][place[column_of(row.level)]] = row.loss
    return sites, columns, grid


def ringed(plan: dict[str, str], sites: list[str], columns: list[str]) -> list[tuple[int, int]]:
    """Where a plan's levels are in the grid: (column, site)."""
    pairs = ((column_of(level), site) for site, level in plan.items())
    return [(columns.index(c), sites.index(s)) for c, s in pairs if c in columns and s in sites]


def contribution_rows(result: JobResult) -> list[dict[str, Any]]:
    """One row a method: loss, drop and costs of the plan without it, the whole plan first."""
    assert result.diagnosis is not None
    keys = list(dict.fromkeys((*(b.key for b in result.budgets), *result.objectives[1:], "macs", "size_mb")))
    rows = result.diagnosis.contributions
    return [
        {
            "without": row.without,
            "sites": row.sites,
            "loss": row.loss,
            "drop (points)": row.accuracy_drop,
            **{
                key: f"{row.costs[key] / result.original.costs[key]:.0%}"
                for key in keys
                if result.original.costs.get(key)
            },
        }
        for row in rows
    ]


def exemplar_rows(diagnosis: Diagnosis) -> list[dict[str, Any]]:
    """One row an exemplar; columns of classes only where there are some."""
    return [
        {
            "example": row.index,
            **(
                {}
                if row.target is None
                else {
                    "label": row.target,
                    "original": row.original,
                    "compressed": row.compressed,
                    "agreement": row.agreement,
                }
            ),
            "drop of score": row.drop,
        }
        for row in diagnosis.exemplars
    ]


def class_rows(diagnosis: Diagnosis) -> list[dict[str, Any]]:
    """One row a class, the one that lost most against the mean first."""
    return [
        {
            "class": row.label,
            "examples": row.examples,
            "original": row.original,
            "compressed": row.compressed,
            "change (points)": f"{row.change:+.1f} ± {row.half_width:.1f}",
            "against the mean": f"{row.relative:+.1f}" + (" *" if row.unlike else ""),
        }
        for row in diagnosis.classes
    ]


def layer_rows(diagnosis: Diagnosis) -> list[dict[str, Any]]:
    """One row a layer, in the model's order; bits only where some layer has integers, the PQ index unless the job is older."""
    integers = any(row.bits is not None for row in diagnosis.layers)
    known = any(row.pq is not None for row in diagnosis.layers)
    return [
        {
            "layer": row.name,
            "level": row.level,
            "channels": row.width,
            "error": row.error,
            **({"bits used": row.bits} if integers else {}),
            **({"pq": row.pq} if known else {}),
        }
        for row in diagnosis.layers
    ]


def summary(diagnosis: Diagnosis) -> str:
    """The exemplars in one sentence."""
    models = f"{len(diagnosis.models)} compressed model{'s' if len(diagnosis.models) > 1 else ''}"
    if diagnosis.changed is None:
        return f"The {len(diagnosis.exemplars)} of {diagnosis.examples} examples whose score falls most over {models}."
    text = f"Most of {models} answer {diagnosis.changed} of {diagnosis.examples} examples otherwise than the original"
    if diagnosis.right is None:
        return text + "."
    original, compressed = diagnosis.right
    return f"{text}; there it is right in {original:.0%}, they are in {compressed:.0%}."

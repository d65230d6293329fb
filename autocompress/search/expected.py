"""What a plan is expected to cost when every site draws its level by itself, and how that changes with the probabilities."""

from __future__ import annotations

import numpy as np

from autocompress.search.tables import CostTables, FloatArray
from autocompress.types import CostFactor, Plan


def expected_cost(tables: CostTables, probabilities: FloatArray, plan: Plan) -> tuple[FloatArray, FloatArray]:
    """Expected cost in base units and its slope along each probability.  # (n_columns,), (n_options, n_columns)

    Exact where a factor has a table: its multilinear extension. A factor without one, and a cost that is a maximum, is
    linearised around ``plan``, the likeliest one.
    """
    cost, slope = np.zeros(len(tables.columns)), np.zeros((tables.n_options, len(tables.columns)))
    for factor in tables.factors:
        if factor.table is None:
            _linearised(tables, factor, probabilities, plan, cost, slope)
        else:
            _multilinear(tables, factor, factor.table.astype(float), probabilities, cost, slope)
    if tables.maxima:
        delta = tables.deltas(plan)[:, tables.maxima]
        cost[tables.maxima] = tables.cost([plan])[0, tables.maxima] + probabilities @ delta
        slope[:, tables.maxima] = delta
    return cost, slope


def _multilinear(
    tables: CostTables,
    factor: CostFactor,
    table: FloatArray,
    probabilities: FloatArray,
    cost: FloatArray,
    slope: FloatArray,
) -> None:
    spans = [slice(int(tables.offsets[s]), int(tables.offsets[s + 1])) for s in factor.sites]
    chances = [np.bincount(of, probabilities[span]) for of, span in zip(factor.classes, spans, strict=True)]
    rest = table
    for axis, (of, span) in enumerate(zip(factor.classes, spans, strict=True)):
        rest = table
        for other in reversed(range(len(spans))):
            if other != axis:
                rest = np.tensordot(chances[other], rest, (0, other))
        slope[span] += rest[of]  # (n_classes, n_columns)
    cost += chances[-1] @ rest if spans else rest


def _linearised(
    tables: CostTables,
    factor: CostFactor,
    probabilities: FloatArray,
    plan: Plan,
    cost: FloatArray,
    slope: FloatArray,
) -> None:
    here = np.array([plan[s] for s in factor.sites], np.int64)
    base = factor.rows(here[None])[0]
    cost += base
    for place, site in enumerate(factor.sites):
        levels = np.tile(here, (tables.n_levels[site], 1))
        levels[:, place] = np.arange(tables.n_levels[site])
        change = factor.rows(levels) - base
        span = slice(int(tables.offsets[site]), int(tables.offsets[site + 1]))
        slope[span] += change
        cost += probabilities[span] @ change

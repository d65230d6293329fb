"""The whole front of a table model: for each cost, the least loss at a row of limits, without evaluating anything."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from autocompress.errors import UsageError
from autocompress.search.feasible import floors
from autocompress.search.solver import Solution, Solver
from autocompress.search.tables import UNLIMITED, CostTables, FloatArray


@dataclass(frozen=True)
class FrontPoint:
    """The best plan with ``cost[column] <= limit`` (integer base units), the other costs free."""

    column: int
    limit: int
    solution: Solution


def table_front(tables: CostTables, losses: FloatArray, n: int, solver: Solver | None = None) -> list[FrontPoint]:
    """``n`` limits a column, evenly from the dense cost (left out) down to the cheapest plan known (epsilon constraints).

    Solved from the tightest limit on: a plan that holds one limit holds the next, where it starts the search; so the loss
    never rises with the limit. ``losses``  # (n_options,). Columns in the order of ``tables.columns``, limits falling.
    """
    if n < 1:
        raise UsageError(f"A front has a positive number of limits, got {n}.")
    solver = solver or Solver(tables)
    dense = tables.dense
    out: list[FrontPoint] = []
    for column, floor in enumerate(floors(tables).tolist()):
        points: list[FrontPoint] = []
        for limit in np.linspace(floor, int(dense[column]), n, endpoint=False).astype(np.int64).tolist():
            limits = np.full(len(dense), UNLIMITED, np.int64)
            limits[column] = limit
            before = points[-1].solution if points else None
            found = solver.solve(losses, limits, [before.plan] if before else (), quick=True)
            if found is None or (before is not None and before.loss < found.loss):
                found = before
            if found is not None:
                points.append(FrontPoint(column, limit, found))
        out += reversed(points)
    return out

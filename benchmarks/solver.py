"""The exact solver: time and proved gap for additive tables, ResNet-56's joint tables, and a front of 20 budgets on 4 costs.

python benchmarks/solver.py [--only NAME]; resumable row by row (CPU-seconds of one thread).
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))
from common import load, save

from autocompress.costs import CostModel
from autocompress.graph import trace
from autocompress.results import METHOD_FAMILIES
from autocompress.search.dp import min_loss
from autocompress.search.solver import Solver, minimise
from autocompress.search.table_front import table_front
from autocompress.search.tables import CostTables, FloatArray
from autocompress.space import make_space
from autocompress.tasks.resnet import PadBlock, ResNet
from autocompress.types import CostFactor, IntArray, Level, MethodConfig, Plan, SearchSpace, Site

KEYS = ("latency_ms@a", "latency_ms@b", "macs", "size_mb")
COLUMNS = [("what", "problem"), ("seconds", "CPU s"), ("gap", "proved gap"), ("target", "target"), ("note", "note")]


class Additive:
    """One random falling table a site, and its space."""

    def __init__(self, sites: int, levels: int, keys: tuple[str, ...], seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.keys, self.tables = keys, []
        for _ in range(sites):
            share = np.linspace(1, 0.1, levels)[:, None] * rng.uniform(0.9, 1.1, (levels, len(keys)))
            self.tables.append((share * rng.integers(500_000, 5_000_000, len(keys))).astype(np.int64))
        named = tuple(Level() if i == 0 else Level((_Setting(i),)) for i in range(levels))
        self.space = SearchSpace(tuple(Site(f"s{i}", "layer", (f"s{i}",)) for i in range(sites)), (named,) * sites)

    def factors(self) -> list[CostFactor]:
        return [CostFactor(f"layer{site}", (site,), table) for site, table in enumerate(self.tables)]

    def cost(self, plans: list[Plan]) -> IntArray:
        rows = np.array(plans, np.int64)
        return np.sum([table[rows[:, site]] for site, table in enumerate(self.tables)], axis=0, dtype=np.int64)

    def deltas(self, plan: Plan) -> IntArray:
        return np.concatenate([table - table[level] for table, level in zip(self.tables, plan, strict=True)])


@dataclass(frozen=True)
class _Setting(MethodConfig):
    number: int = 0


def losses_of(tables: CostTables, kind: str, seed: int) -> FloatArray:
    """``smooth``: a sensitivity times the squared level; ``random``: rising and noisy. Dense loses nothing."""
    rng = np.random.default_rng(seed)
    most = np.array(tables.n_levels)[tables.site_of] - 1
    sensitivity = np.exp(rng.uniform(-3, 0, len(tables.n_levels)))[tables.site_of]
    smooth: FloatArray = sensitivity * (tables.level_of / np.maximum(most, 1)) ** 2
    noisy = np.abs(rng.exponential(1.0, tables.n_options) * tables.level_of + rng.normal(0, 0.1, tables.n_options))
    return smooth if kind == "smooth" else np.where(tables.level_of == 0, 0.0, noisy)


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    start = time.process_time()
    return work(), time.process_time() - start


def additive(kind: str, n_budgets: int) -> dict[str, Any]:
    seconds, gaps, highs = [], [], []
    for seed in (1, 2, 3):
        problem = Additive(200, 20, KEYS[:n_budgets], seed)
        tables = CostTables(problem.space, problem, range(n_budgets))
        losses, solver = losses_of(tables, kind, seed), Solver(tables)
        limit = (problem.cost([problem.space.dense])[0] * np.array([0.5, 0.52, 0.48, 0.5])[:n_budgets]).astype(np.int64)
        found, spent = timed(lambda: solver.solve(losses, limit))  # noqa: B023
        seconds.append(spent)
        gaps.append(found.gap)
        plain, spent = timed(lambda: minimise(solver.exact_program, tables, losses, limit))  # type: ignore[arg-type]  # noqa: B023
        highs.append((spent, (float(losses[tables.current(plain.plan)].sum()) - plain.bound) / found.loss))
    note = f"HiGHS alone: {max(s for s, _ in highs):.1f} s, gap {max(g for _, g in highs):.1e}"
    if n_budgets == 1:
        costs = [table[:, 0] for table in problem.tables]
        parts, spent = timed(lambda: min_loss(np.split(losses, tables.offsets[1:-1]), costs, int(limit[0])))
        loss = sum(float(losses[o + v]) for o, v in zip(tables.offsets, parts, strict=False))
        note += f"; 10,000 buckets: {spent:.1f} s, {loss / found.loss - 1:.1%} above"
    name = f"200 sites x 20 levels x {n_budgets} budget{'s' * (n_budgets > 1)}, {kind}"
    return row(name, max(seconds), max(gaps), "<= 10 s, 1e-4", note + "; worst of 3")


def resnet56(families: tuple[str, ...], share: float, size: float) -> dict[str, Any]:
    torch.manual_seed(0)
    graph = trace(ResNet(PadBlock, 9).eval(), torch.zeros(1, 3, 32, 32), proofs=False)
    space = make_space(graph, families)
    costs = CostModel(graph, space, {})
    tables = CostTables(space, costs, [costs.keys.index("macs"), costs.keys.index("size_mb")])
    losses = losses_of(tables, "smooth", 0)
    limit = (tables.cost([space.dense])[0] * np.array([share, size])).astype(np.int64)
    solver = Solver(tables)
    _, prepared = timed(lambda: (solver.exact_program, solver._elimination))
    found, spent = timed(lambda: solver.solve(losses, limit))
    name = f"ResNet-56, {'+'.join(families)}: macs <= {share:.0%}, size <= {size:.0%}"
    note = f"of which tables {prepared:.1f} s; {len(space.sites)} sites, {sum(space.n_levels)} options"
    return row(name, prepared + spent, found.gap, "<= 60 s, 1e-2", note)


def front() -> dict[str, Any]:
    problem = Additive(200, 20, KEYS, 1)
    tables = CostTables(problem.space, problem, range(4))
    losses, solver = losses_of(tables, "smooth", 1), Solver(tables)
    limit = (problem.cost([problem.space.dense])[0] * 0.5).astype(np.int64)
    _, one = timed(lambda: solver.solve(losses, limit))
    points, spent = timed(lambda: table_front(tables, losses, 20, solver))
    gap = max(p.solution.gap for p in points)
    note = f"{len(points)} plans; one solve of all four budgets takes {one:.1f} s: {spent / one:.1f}x"
    return row("front: 20 budgets on each of 4 costs, 200 sites x 20 levels", spent, gap, "quick", note)


def row(what: str, seconds: float, gap: float, target: str, note: str) -> dict[str, Any]:
    return {"what": what, "seconds": f"{seconds:.1f}", "gap": f"{gap:.1e}", "target": target, "note": note}


PROBLEMS: dict[str, Callable[[], dict[str, Any]]] = {
    **{
        f"additive:{kind}:{n}": (lambda kind=kind, n=n: additive(kind, n))  # type: ignore[misc]
        for kind, n in itertools.product(("smooth", "random"), (1, 3))
    },
    "resnet56:channels": lambda: resnet56(("channels", "blocks"), 0.5, 0.5),
    "resnet56:channels:30": lambda: resnet56(("channels", "blocks"), 0.3, 0.3),
    "resnet56:int8": lambda: resnet56(("channels", "blocks", "int8"), 0.5, 0.2),
    "resnet56:all": lambda: resnet56(METHOD_FAMILIES, 0.5, 0.2),
    "front": front,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=list(PROBLEMS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = load("solver")
    for key in [args.only] if args.only else [key for key in PROBLEMS if key not in rows]:
        rows[key] = PROBLEMS[key]()
        print(key, rows[key], flush=True)
        ordered = {k: rows[k] for k in PROBLEMS if k in rows}
        save("solver", ordered, COLUMNS, "The exact solver", "python benchmarks/solver.py")


if __name__ == "__main__":
    main()

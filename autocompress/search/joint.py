"""Costs that depend on several sites: branch and bound over the few sites that couple many, with Lagrangian bounds.

The bound of a node comes from variable elimination at the best prices, with the node's sites fixed. Branching takes the site with
the most cost factors first: in residual networks these are the streams, and once their widths are fixed the blocks are on their
own. Then the rest is additive over components, and a knapsack to a proved gap. Where components stay large (formats that meet
at additions), bounds and repaired minimisers close in until the gap or the limit of nodes is reached.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from autocompress.search import knapsack
from autocompress.search.elimination import Elimination
from autocompress.search.lagrange import dual
from autocompress.search.tables import UNLIMITED, CostTables, FloatArray
from autocompress.types import CostFactor, IntArray, Plan

COMPONENT = 4096
"""Options of one component of a knapsack."""
EFFORT = 300_000_000
"""Table entries that may be looked at: a few seconds."""
OFFER = 20_000_000
"""What repairing and polishing one plan counts as."""

Improve = Callable[[Plan], Plan | None]
"""A plan near ``plan`` that holds the limits, or ``None``."""


@dataclass(frozen=True, eq=False)
class _Node:
    costs: Elimination
    bound: float
    prices: FloatArray
    plan: Plan  # the minimiser at the prices


class Branching:
    """One table model and one limit."""

    def __init__(self, costs: Elimination, losses: FloatArray, limit: IntArray, improve: Improve) -> None:
        self.root, self.tables, self.losses, self.limit, self.improve = costs, costs.tables, losses, limit, improve
        self.columns = np.flatnonzero(limit < UNLIMITED)
        self.unit = np.maximum(limit, 1).astype(float)
        self.cap = 1e2 * float(np.ptp(losses)) * max(len(self.tables.n_levels), 1) + 1.0
        degree = [0] * len(self.tables.n_levels)
        for factor in self.tables.factors:
            for site in factor.sites:
                degree[site] += 1
        self.order = sorted(range(len(degree)), key=lambda s: (-degree[s], s))
        self.best: Plan | None = None
        self.loss, self.left = math.inf, 0

    def solve(self, starts: Sequence[Plan], gap: float, effort: int = EFFORT) -> knapsack.Proof:
        """The least loss within the limits, to a relative gap if the effort lasts."""
        self.left = effort
        for start in starts:
            self._offer(start)
        count, floor = itertools.count(), math.inf  # floor: the least bound of what was cut off within the gap
        root = self._bounded(self.root, None)
        heap = [] if root is None else [(root.bound, next(count), root)]
        while heap:
            bound, _, node = heapq.heappop(heap)
            if bound >= self._cut(gap):
                floor = min(floor, bound)
                break
            if self.left <= 0:
                return knapsack.Proof(self.best, self.loss, min(bound, floor, self.loss), False)
            closed = self._component_plan(node, gap)
            if closed is not None:
                floor = min(floor, closed)
                continue
            self._offer(node.plan)
            site = next((s for s in self.order if s not in node.costs.fixed and self.tables.n_levels[s] > 1), None)
            if site is None:
                continue  # one plan, and it was offered
            for level in range(self.tables.n_levels[site]):
                child = self._bounded(node.costs.at(site, level), node, self._cut(gap))
                if child is not None:
                    heapq.heappush(heap, (max(child.bound, bound), next(count), child))
                else:
                    floor = min(floor, self._cut(gap))
        return knapsack.Proof(self.best, self.loss, min(floor, self.loss), self.best is not None)

    def _cut(self, gap: float) -> float:
        """Bounds from here on are of no interest."""
        return self.loss - gap * abs(self.loss) if math.isfinite(self.loss) else math.inf

    def _offer(self, plan: Plan) -> None:
        self.left -= OFFER
        found = self.improve(plan)
        if found is not None:
            loss = float(self.losses[self.tables.current(found)].sum())
            if loss < self.loss:
                self.best, self.loss = found, loss

    def _bounded(self, costs: Elimination, parent: _Node | None, cut: float = math.inf) -> _Node | None:
        """A node with its best bound; ``None`` where that reaches ``cut``."""
        columns, unit, entries = self.columns, self.unit[self.columns], costs.entries

        def oracle(prices: FloatArray) -> tuple[float, FloatArray, Plan]:
            plan = self._at(costs, prices)
            self.left -= entries
            loss = float(self.losses[self.tables.current(plan)].sum())
            # the factors' own sum, not ``cost``: a peak counts as zero in them
            return loss, self._sum(plan)[columns] / unit - 1.0, plan

        start = None if parent is None else parent.prices
        found = dual(oracle, len(columns), self.cap, 1e-4, 60, start, cut)
        return None if found.bound >= cut else _Node(costs, found.bound, found.prices, self._at(costs, found.prices))

    def _at(self, costs: Elimination, prices: FloatArray) -> Plan:
        """The minimiser at prices."""
        full = np.zeros(len(self.limit))
        full[self.columns] = prices / self.unit[self.columns]
        return costs.minimum(self.losses, full)[1]

    def _sum(self, plan: Plan) -> FloatArray:
        """The factors' costs of a plan.  # (n_columns,)"""
        rows = [f.rows(np.array([[plan[s] for s in f.sites]], np.int64))[0] for f in self.tables.factors]
        total: FloatArray = np.sum(rows, axis=0, dtype=float)
        return total

    def _component_plan(self, node: _Node, gap: float) -> float | None:
        """Solve a node whose free sites fall into small components; its bound, or ``None`` where they do not."""
        groups = _components(self.tables, node.costs.fixed)
        if any(math.prod(self.tables.n_levels[s] for s in group) > COMPONENT for group in groups):
            return None
        grids = [
            np.array(list(itertools.product(*(range(self.tables.n_levels[s]) for s in group))), np.int64)
            for group in groups
        ]
        of = {site: i for i, group in enumerate(groups) for site in group}
        costs = [np.zeros((len(grid), len(self.limit)), np.int64) for grid in grids]
        constant = np.zeros(len(self.limit), np.int64)
        for factor in self.tables.factors:
            target = next((of[s] for s in factor.sites if s in of), None)
            if target is None:
                constant += factor.rows(np.array([[node.costs.fixed[s] for s in factor.sites]], np.int64))[0]
            else:
                costs[target] += factor.rows(self._levels(factor, node.costs.fixed, groups[target], grids[target]))
        offsets = self.tables.offsets[:-1]
        losses = [
            self.losses[offsets[list(group)] + grid].sum(axis=1) for group, grid in zip(groups, grids, strict=True)
        ]
        base = sum(float(self.losses[offsets[s] + level]) for s, level in node.costs.fixed.items())
        # the knapsack's gap is relative to a loss without ``base``: asking for the same absolute one is at least as strict
        problem = knapsack.Knapsack(
            np.concatenate([*losses, np.zeros(0)]),
            np.concatenate([*costs, np.zeros((0, len(self.limit)), np.int64)])[:, self.columns],
            (self.limit - constant)[self.columns],
            np.concatenate([[0], np.cumsum([len(grid) for grid in grids])]).astype(np.int64),
        )
        found = knapsack.solve(problem, (), gap)
        if found.plan is None:
            return None if found.bound + base < self._cut(gap) else found.bound + base
        plan = list(self.tables.n_levels)
        for site, level in node.costs.fixed.items():
            plan[site] = level
        for group, grid, row in zip(groups, grids, found.plan, strict=True):
            for site, level in zip(group, grid[row].tolist(), strict=True):
                plan[site] = level
        self._offer(tuple(plan))
        closed = found.proved and self.loss <= found.loss + base + 1e-12
        return found.bound + base if closed else None

    def _levels(self, factor: CostFactor, fixed: dict[int, int], group: tuple[int, ...], grid: IntArray) -> IntArray:
        columns = [grid[:, group.index(s)] if s in group else np.full(len(grid), fixed[s]) for s in factor.sites]
        return np.stack(columns, axis=1).astype(np.int64)


def _components(tables: CostTables, fixed: dict[int, int]) -> list[tuple[int, ...]]:
    """Free sites that share cost factors, directly or through others."""
    group = {site: {site} for site in range(len(tables.n_levels)) if site not in fixed}
    for factor in tables.factors:
        free = [s for s in factor.sites if s not in fixed]
        if free:
            joined = set().union(*(group[s] for s in free))
            for site in joined:
                group[site] = joined
    return sorted({tuple(sorted(joined)) for joined in group.values()})

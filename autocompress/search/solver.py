"""The table model, solved: the plan with the least sum of one-site losses that holds every cost limit.

A multiple-choice knapsack with one row a budget, and ``knapsack`` solves it where costs add up over sites. Costs
that depend on several sites get joint variables tied to their sites' by marginal constraints, which is exact; where the tables
are too large for that, switches are linearised around a plan and the result is repaired and polished with the true costs.
Wall time decides nothing: the effort is limited in branch-and-bound nodes.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import itertools
import math
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_matrix, vstack

from autocompress.search import knapsack
from autocompress.search.elimination import Elimination, elimination
from autocompress.search.joint import Branching
from autocompress.search.tables import UNLIMITED, CostTables, FloatArray, tabulate
from autocompress.types import CostFactor, IntArray, Plan

MAX_JOINT = 2_000
"""Joint variables of one factor; a larger table is linearised (or projected, for bounds)."""
MAX_TOTAL = 20_000
"""Joint variables of one program: ResNet-56 with three formats has 7,000 to 17,000, solved in 1 to 3 s."""
BRANCHED = 2_000
"""Programs with more joint variables are branched over the sites that couple many, where the tables allow (``joint``)."""
LISTED = 4_096
"""Spaces up to this many plans are listed."""
QUICK_TOTAL = 100
"""Above this a quick solve takes the heuristic, which is within a few percent in a fraction of the time."""
GAP = 1e-4
NODES = 500
_SAFETY_SECONDS = 300.0


@dataclass(frozen=True)
class Solution:
    """``exact``: proved optimal for the table model, within ``GAP``; ``bound``: no plan within the limits loses less."""

    plan: Plan
    loss: float
    exact: bool
    bound: float = -math.inf

    @property
    def gap(self) -> float:
        """How far the loss is from the bound, relative to the loss; infinite when nothing was proved."""
        return max(0.0, self.loss - self.bound) / max(abs(self.loss), 1e-30)


@dataclass(frozen=True, eq=False)
class Program:
    """Costs as linear terms: ``constant + linear[options] + joint tables``; ``exact`` unless a table was projected."""

    constant: FloatArray  # (n_columns,)
    linear: FloatArray  # (n_options, n_columns)
    joints: tuple[CostFactor, ...]  # with tables and classes
    exact: bool

    @property
    def size(self) -> int:
        return sum(math.prod(tabulate(joint).shape[:-1]) for joint in self.joints)


def project(joint: CostFactor, limit: int) -> CostFactor:
    """A lower bound of a large table: minima over sites until at most ``limit`` entries remain, largest axes first."""
    sites, classes, table = list(joint.sites), list(joint.classes), tabulate(joint)
    while math.prod(table.shape[:-1]) > limit:
        axis = int(np.argmax(table.shape[:-1]))
        table = table.min(axis=axis)
        del sites[axis], classes[axis]
    return CostFactor(joint.name, tuple(sites), table, None, tuple(classes))


def program(tables: CostTables, relax: bool = False) -> Program | None:
    """The costs as a linear program, or ``None`` when it would be too large; ``relax`` bounds large tables from below."""
    k = len(tables.columns)
    constant, linear = np.zeros(k), np.zeros((tables.n_options, k))
    joints, exact = [], True
    for factor in tables.factors:
        if factor.table is None:
            if not relax:
                return None
            exact = False  # a cost is never negative: zero is a bound
            continue
        joint = factor
        if math.prod(factor.table.shape[:-1]) > MAX_JOINT:
            if not relax:
                return None
            joint, exact = project(factor, MAX_JOINT // 10), False
        rest = _separate(joint, constant, linear, tables)
        if rest is not None:
            joints.append(rest)
    result = Program(constant, linear, tuple(joints), exact)
    if result.size <= MAX_TOTAL:
        return result
    if not relax:
        return None
    projected = [project(joint, 12) for joint in joints]
    left = [rest for joint in projected if (rest := _separate(joint, constant, linear, tables)) is not None]
    return Program(constant, linear, tuple(left), False)


def _separate(joint: CostFactor, constant: FloatArray, linear: FloatArray, tables: CostTables) -> CostFactor | None:
    """Add a table that is a sum of one-site terms to the linear costs; any other one is handed back."""
    table = tabulate(joint)
    first = table[(0,) * len(joint.sites)]
    terms, total = [], np.broadcast_to(first, table.shape).copy()
    for axis in range(len(joint.sites)):
        where: list[Any] = [0] * len(joint.sites)
        where[axis] = slice(None)
        term = table[tuple(where)] - first
        total += term.reshape(*(-1 if i == axis else 1 for i in range(len(joint.sites))), term.shape[-1])
        terms.append(term)
    if not np.array_equal(total, table):
        return joint
    constant += first
    for site, classes, term in zip(joint.sites, joint.classes, terms, strict=True):
        linear[tables.offsets[site] : tables.offsets[site + 1]] += term[classes]
    return None


@dataclass(frozen=True, eq=False)
class Answer:
    """``plan`` when one was found; ``bound`` on the objective; ``infeasible`` when that is proved."""

    plan: Plan | None
    bound: float
    optimal: bool
    infeasible: bool


def minimise(
    costs: Program,
    tables: CostTables,
    objective: FloatArray,
    limit: IntArray,
    gap: float = GAP,
    column: int | None = None,
) -> Answer:
    """Mixed-integer program by HiGHS. ``objective``  # (n_options,). With ``column``, that cost is minimised instead."""
    n, size = tables.n_options, costs.size
    rows, weights = [], [costs.linear]
    at = n
    for joint in costs.joints:
        table = tabulate(joint)
        shape = table.shape[:-1]
        entries = np.arange(math.prod(shape))
        for axis, (site, classes) in enumerate(zip(joint.sites, joint.classes, strict=True)):
            of = np.unravel_index(entries, shape)[axis]
            levels = np.arange(len(classes))
            r = np.concatenate([of, classes])
            c = np.concatenate([at + entries, tables.offsets[site] + levels])
            v = np.concatenate([np.ones(len(entries)), -np.ones(len(levels))])
            rows.append(csr_matrix((v, (r, c)), shape=(shape[axis], n + size)))
        weights.append(table.reshape(len(entries), -1).astype(float))
        at += len(entries)
    choose = csr_matrix((np.ones(n), (tables.site_of, np.arange(n))), shape=(len(tables.n_levels), n + size))
    constraints = [LinearConstraint(choose, 1, 1)]
    if rows:
        constraints.append(LinearConstraint(vstack(rows), 0, 0))
    linear = np.concatenate(weights)  # (n + size, n_columns)
    bounded = limit < UNLIMITED
    if bounded.any():
        unit = np.maximum(limit[bounded], 1)
        room = (limit[bounded] - costs.constant[bounded]) / unit
        constraints.append(LinearConstraint(csr_matrix((linear[:, bounded] / unit).T), -np.inf, room))
    goal = np.concatenate([objective, np.zeros(size)]) if column is None else linear[:, column]
    scale = max(float(np.abs(goal).max(initial=0.0)), 1e-30)
    with _quiet():
        result = milp(
            goal / scale,
            integrality=np.concatenate([np.ones(n), np.zeros(size)]),
            bounds=Bounds(0, 1),
            constraints=constraints,
            options={"mip_rel_gap": gap, "node_limit": NODES, "time_limit": _SAFETY_SECONDS},
        )
    bound = -math.inf if result.mip_dual_bound is None else float(result.mip_dual_bound) * scale
    if column is not None:
        bound += float(costs.constant[column])
    plan = None
    if result.x is not None:
        plan = tuple(
            int(np.argmax(result.x[a:b])) for a, b in zip(tables.offsets[:-1], tables.offsets[1:], strict=True)
        )
    return Answer(plan, bound, result.status == 0, result.status == 2)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep a debugging line that HiGHS prints from C off the standard output, where ``--json`` writes."""
    try:
        libc, kept = ctypes.CDLL(None), os.dup(1)
    except (OSError, TypeError):  # no C library by that name, or no standard output: nothing to keep clean
        yield
        return
    sink = os.open(os.devnull, os.O_WRONLY)
    try:
        sys.stdout.flush()
        libc.fflush(None)
        os.dup2(sink, 1)
        yield
    finally:
        libc.fflush(None)
        os.dup2(kept, 1)
        os.close(sink)
        os.close(kept)


def holds(cost: IntArray, limit: IntArray) -> bool:
    return bool((cost <= limit).all())


def repair(tables: CostTables, losses: FloatArray, plan: Plan, limit: IntArray) -> Plan:
    """Greedy switches, the most relief for the least loss first, until every limit holds or no switch helps."""
    unit = np.maximum(limit, 1).astype(float)
    for _ in range(4 * tables.n_options + 4):
        cost = tables.cost([plan])[0]
        if holds(cost, limit):
            return plan
        over = np.maximum(0, (cost - limit) / unit).sum()
        relief = over - np.maximum(0, (cost + tables.deltas(plan) - limit) / unit).sum(axis=1)
        harm = np.maximum(losses - losses[tables.current(plan)][tables.site_of], 1e-12)
        if relief.max(initial=0.0) <= 0:
            return plan
        option = int(np.argmax(np.where(relief > 0, relief / harm, -1.0)))
        plan = tables.switched(plan, option)
    return plan


def polish(tables: CostTables, losses: FloatArray, plan: Plan, limit: IntArray, width: int = 160) -> Plan:
    """Best single switches and pairs of switches that lower the loss and hold the limits, until none is left."""
    for _ in range(200):
        cost, delta = tables.cost([plan])[0], tables.deltas(plan)
        change = losses - losses[tables.current(plan)][tables.site_of]
        fits = (cost + delta <= limit).all(axis=1)
        single = np.where(fits, change, 0.0)
        best_gain, best = float(single.min(initial=0.0)), int(np.argmin(single)) if len(single) else 0
        step = None
        if best_gain < -1e-12:
            step = tables.switched(plan, best)
        step = _pair(tables, plan, cost, delta, change, limit, width, best_gain) or step
        if step is None:
            return plan
        plan = step
    return plan


def _pair(
    tables: CostTables,
    plan: Plan,
    cost: IntArray,
    delta: IntArray,
    change: FloatArray,
    limit: IntArray,
    width: int,
    best_gain: float,
) -> Plan | None:
    """The best pair of switches that beats ``best_gain``: one lowers the loss, the other pays for it."""
    unit = np.maximum(np.minimum(limit, cost + 1), 1)
    relief = -(delta / unit).sum(axis=1)
    ups = np.flatnonzero(change < -1e-12)
    downs = np.flatnonzero(((delta < 0).any(axis=1)) & (change > -1e-12))
    ups = ups[np.argsort(change[ups], kind="stable")][:width]
    downs = downs[np.argsort(-relief[downs] / np.maximum(change[downs], 1e-9), kind="stable")][:width]
    if not len(ups) or not len(downs):
        return None
    total = change[ups][:, None] + change[downs]
    fits = (cost + delta[ups][:, None, :] + delta[downs][None] <= limit).all(axis=2)
    fits &= tables.site_of[ups][:, None] != tables.site_of[downs]
    total = np.where(fits, total, 0.0)
    order = np.argsort(total, axis=None, kind="stable")[:16]
    pairs = []
    for i, j in zip(*np.unravel_index(order, total.shape), strict=True):
        if total[i, j] >= best_gain - 1e-12:
            break
        up, down = ups[i], downs[j]
        half = tables.switched(plan, up)
        pairs.append(tables.switched(half, down))
    if not pairs:
        return None
    good = (tables.cost(pairs) <= limit).all(axis=1)
    return pairs[int(np.argmax(good))] if good.any() else None


class Solver:
    """Solves one table model for many limits; plans found for one limit start the next."""

    def __init__(self, tables: CostTables) -> None:
        self.tables = tables
        self._listed: tuple[IntArray, IntArray] | None = None  # options of all plans (n_plans, n_sites), their costs
        if 0 < math.prod(tables.n_levels) <= LISTED:
            plans = list(itertools.product(*(range(n) for n in tables.n_levels)))
            self._listed = (np.array(plans, np.int64) + tables.offsets[:-1], tables.cost(plans))

    @functools.cached_property
    def exact_program(self) -> Program | None:
        """The costs as a linear program; ``None`` when it would be too large."""
        return program(self.tables)

    @functools.cached_property
    def _elimination(self) -> Elimination | None:
        return elimination(self.tables)

    def solve(
        self, losses: FloatArray, limit: IntArray, starts: Sequence[Plan] = (), quick: bool = False
    ) -> Solution | None:
        """The plan with the least ``losses[options].sum()`` within ``limit``; ``None`` when none was found.

        ``losses``  # (n_options,), ``limit``  # (n_columns,) in integer base units. ``quick`` is less exact.
        """
        gap = 1e-3 if quick else GAP
        if self._listed is not None:
            return self._from_list(*self._listed, losses, limit)
        if self.exact_program is not None and not self.exact_program.joints:
            found = self._additive(self.exact_program, losses, limit, starts, gap, quick)
            if found is not None:
                return found
        if not quick and (self.exact_program is None or self.exact_program.size > BRANCHED):
            found = self._branched(losses, limit, starts, gap)
            if found is not None or self.exact_program is None:
                return found
        if self.exact_program is not None and not (quick and self.exact_program.size > QUICK_TOTAL):
            found = self._exact(self.exact_program, losses, limit, gap)
            if found is not None:
                return found
        return self._heuristic(losses, limit, starts, gap)

    def _from_list(self, options: IntArray, costs: IntArray, losses: FloatArray, limit: IntArray) -> Solution | None:
        total = np.where((costs <= limit).all(axis=1), losses[options].sum(axis=1), np.inf)
        best = int(np.argmin(total))
        if not np.isfinite(total[best]):
            return None
        plan = tuple((options[best] - self.tables.offsets[:-1]).tolist())
        return Solution(plan, float(total[best]), True, float(total[best]))

    def _branched(self, losses: FloatArray, limit: IntArray, starts: Sequence[Plan], gap: float) -> Solution | None:
        """Branch and bound over coupling sites, from the heuristic's plan; ``None`` when tables are too large or nothing fits."""
        first = self._heuristic(losses, limit, starts, gap)
        if first is None or self._elimination is None:
            return first

        def improve(plan: Plan) -> Plan | None:
            plan = repair(self.tables, losses, plan, limit)
            return polish(self.tables, losses, plan, limit, 40) if holds(self.tables.cost([plan])[0], limit) else None

        found = Branching(self._elimination, losses, limit, improve).solve([first.plan], gap)
        if found.plan is None:
            return first
        return Solution(found.plan, found.loss, found.proved, found.bound)

    def minimax(self, losses: FloatArray, limit: IntArray, starts: Sequence[Plan] = ()) -> Solution | None:
        """The plan whose largest one-site loss is least within ``limit``, among such plans one with the least sum (ALDS's aim).

        One common level is bisected over the losses that occur. ``loss`` is the largest one-site loss, above dense. Exact
        (``exact``) where costs add up over sites; elsewhere plans are looked for by repair, and a smaller level may exist.
        """
        rises = losses - losses[self.tables.offsets[:-1]][self.tables.site_of]
        additive = self._listed is not None or (self.exact_program is not None and not self.exact_program.joints)
        marks = np.unique(np.maximum(rises, 0.0))
        best: Plan | None = None
        low, high = 0, len(marks) - 1
        if not additive:
            starts = [*starts, (0,) * len(self.tables.n_levels), self.tables.cheapest(1 / np.maximum(limit, 1))]
        while low <= high:
            middle = (low + high) // 2
            plan = self._allowed(rises, float(marks[middle]), limit, starts, additive)
            best, low, high = (best, middle + 1, high) if plan is None else (plan, low, middle - 1)
        if best is None:
            return None
        level = float(marks[low])
        return Solution(best, level, additive, level if additive else 0.0)

    def _allowed(
        self, rises: FloatArray, level: float, limit: IntArray, starts: Sequence[Plan], additive: bool
    ) -> Plan | None:
        """A plan within the limit that takes no option whose loss is above the level; of low loss."""
        allowed = rises <= level
        barred = np.where(
            allowed, rises, 10.0 * (np.abs(rises).max(initial=0.0) + 1.0) * (len(self.tables.n_levels) + 1)
        )
        if additive:
            found = self.solve(barred, limit, quick=True)
            plan = None if found is None else found.plan
        else:
            plan = None
            for start in dict.fromkeys(starts):
                clean = tuple(v if a else 0 for v, a in zip(start, allowed[self.tables.current(start)], strict=True))
                plan = repair(self.tables, barred, clean, limit)
                if holds(self.tables.cost([plan])[0], limit) and allowed[self.tables.current(plan)].all():
                    break
        if plan is None or not holds(self.tables.cost([plan])[0], limit):
            return None
        return plan if allowed[self.tables.current(plan)].all() else None

    def _additive(
        self,
        costs: Program,
        losses: FloatArray,
        limit: IntArray,
        starts: Sequence[Plan],
        gap: float,
        quick: bool,
    ) -> Solution | None:
        """Costs that add up over sites: a knapsack. ``None`` when it found nothing, or nothing proved where that is asked."""
        columns = np.flatnonzero(limit < UNLIMITED)
        rows = np.rint(costs.linear[:, columns]).astype(np.int64)
        room = limit[columns] - np.rint(costs.constant[columns]).astype(np.int64)
        problem = knapsack.Knapsack(losses, rows, room, self.tables.offsets)
        found = knapsack.solve(problem, starts, gap, prove=not quick)
        if found.plan is None or not (found.proved or quick):
            return None
        if not holds(self.tables.cost([found.plan])[0], limit):  # a cost that is no sum, as peak bytes
            return None
        return Solution(found.plan, found.loss, found.proved, found.bound)

    def _exact(self, costs: Program, losses: FloatArray, limit: IntArray, gap: float) -> Solution | None:
        """Exact up to the gap; a plan over a limit by the solver's tolerance is excluded by tightening that limit."""
        asked = limit.copy()
        for _ in range(4):
            answer = minimise(costs, self.tables, losses, asked, gap)
            if answer.plan is None:
                return None
            cost = self.tables.cost([answer.plan])[0]
            if holds(cost, limit):
                return Solution(answer.plan, self._loss(losses, answer.plan), answer.optimal, answer.bound)
            asked = np.where(cost > limit, asked - 2 * (cost - limit), asked)
        return None

    def _heuristic(self, losses: FloatArray, limit: IntArray, starts: Sequence[Plan], gap: float) -> Solution | None:
        tables = self.tables
        unit = np.where(limit < UNLIMITED, 1 / np.maximum(limit, 1), 0.0)
        dense = (0,) * len(tables.n_levels)
        if tables.maxima:  # they fall only when all that reach them do: single switches from one start often stop short
            starts = [*starts, *tables.uniform_plans()]
        best: Solution | None = None
        for start in dict.fromkeys([*starts, dense]):
            best = self._better(best, losses, start, limit)
        if best is None or gap <= GAP:  # from below: formats that only pay in company are never found from dense
            best = self._better(best, losses, tables.cheapest(unit), limit)
        for _ in range(4):
            if best is None:
                return None
            delta = tables.deltas(best.plan).astype(float)
            around = Program(tables.cost([best.plan])[0].astype(float), delta, (), False)
            answer = minimise(around, tables, losses, limit, max(gap, 1e-3))
            if answer.plan is None:
                break
            after = self._better(best, losses, answer.plan, limit)
            if after is best:
                break
            best = after
        return best

    def _better(self, best: Solution | None, losses: FloatArray, plan: Plan, limit: IntArray) -> Solution | None:
        plan = repair(self.tables, losses, plan, limit)
        if not holds(self.tables.cost([plan])[0], limit):
            return best
        plan = polish(self.tables, losses, plan, limit)
        found = Solution(plan, self._loss(losses, plan), False)
        return found if best is None or found.loss < best.loss - 1e-12 else best

    def _loss(self, losses: FloatArray, plan: Plan) -> float:
        return float(losses[self.tables.current(plan)].sum())

"""Additive costs, any number of budgets: the multiple-choice knapsack, to a proved gap.

The Lagrangian bound leaves each option a *reduced loss*: what it loses above the best option of its site at the bound's prices. A
plan's loss is the bound + its reduced losses + the price of the room it leaves. So only options whose reduced loss is below the
gap matter (the core, Pisinger 1995): usually two or three a site. With one budget, dynamic programming solves the core. With
several, the sites are split in two halves, plans of each half are listed while their reduced losses stay below the gap, and a k-d
tree finds partners that use up the room (Horowitz & Sahni's meet in the middle). When the lists are complete and no pair is
better, the best plan known is proved. Wall time decides nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.spatial import cKDTree

from autocompress.search.dp import min_loss
from autocompress.search.lagrange import Dual, dual
from autocompress.search.tables import FloatArray
from autocompress.types import IntArray, Plan

SEARCH = (1 << 11, 1 << 13)
"""Partial plans a half in the search; 200 sites x 20 levels x 3 budgets end within 1e-3 of the bound with the first."""
PROOF = 1 << 17
PARTNERS = 64
CHUNK = 1 << 13


@dataclass(frozen=True, eq=False)
class Knapsack:
    """One option a site: ``losses``  # (n_options,), ``costs``  # (n_options, n_budgets), ``limit``  # (n_budgets,).

    Options of site ``s`` are ``offsets[s]:offsets[s + 1]``; limits are those of ``UNLIMITED`` budgets left out.
    """

    losses: FloatArray
    costs: IntArray
    limit: IntArray
    offsets: IntArray

    def cost(self, options: IntArray) -> IntArray:
        return np.asarray(self.costs[options].sum(axis=0), np.int64)

    def fits(self, options: IntArray) -> bool:
        return bool((self.cost(options) <= self.limit).all())

    def loss(self, options: IntArray) -> float:
        return float(self.losses[options].sum())

    def plan(self, options: IntArray) -> Plan:
        return tuple((options - self.offsets[:-1]).tolist())

    def options(self, plan: Plan) -> IntArray:
        return np.asarray(self.offsets[:-1] + np.asarray(plan, np.int64), np.int64)


@dataclass(frozen=True)
class Proof:
    """A plan and a lower bound on the loss of any; ``proved`` when they are within the gap that was asked for."""

    plan: Plan | None
    loss: float
    bound: float
    proved: bool


def bound(problem: Knapsack) -> Dual[Plan]:
    """The Lagrangian bound; prices are those of one limit."""
    unit = np.maximum(problem.limit, 1).astype(float)
    share = problem.costs / unit
    room = problem.limit / unit

    def oracle(prices: FloatArray) -> tuple[float, FloatArray, Plan]:
        plan = _argmin(problem.losses + share @ prices, problem.offsets)
        options = problem.options(plan)
        return problem.loss(options), share[options].sum(axis=0) - room, plan

    spread = float(np.ptp(problem.losses)) if len(problem.losses) else 0.0
    return dual(oracle, len(unit), 1e2 * spread * max(len(problem.offsets) - 1, 1) + 1.0)


def solve(problem: Knapsack, starts: Sequence[Plan] = (), gap: float = 1e-4, prove: bool = True) -> Proof:
    """The least loss within the limits, to a relative ``gap``; ``starts`` within the limits are where the search begins.

    Without ``prove`` it ends with the search, usually within 1e-3 of the bound. A plan of ``None`` only says that none was found.
    """
    known = bound(problem)
    inside = [p for p in dict.fromkeys([*starts, *known.seen]) if problem.fits(problem.options(p))]
    if not len(problem.limit):
        return Proof(known.seen[0], problem.loss(problem.options(known.seen[0])), known.bound, True)
    if not inside:
        return Proof(None, np.inf, known.bound, False)
    best = min(inside, key=lambda p: (problem.loss(problem.options(p)), p))
    loss = problem.loss(problem.options(best))
    core = _Core(problem, known)
    if len(problem.limit) == 1:
        best, loss = core.by_buckets(best, loss)
    for size in SEARCH:
        if loss - known.bound <= gap * abs(loss):
            return Proof(best, loss, known.bound, True)
        best, loss, complete = core.by_halves(best, loss, loss - known.bound, size)
        if complete:
            return Proof(best, loss, loss, True)
        if not prove:
            break
    rest = loss - known.bound - gap * abs(loss)
    while prove and rest > 0:
        before = loss
        best, loss, complete = core.by_halves(best, loss, rest, PROOF)
        rest = loss - known.bound - gap * abs(loss)
        if loss == before:
            return Proof(best, loss, loss - gap * abs(loss) if complete else known.bound, complete)
    return Proof(best, loss, known.bound, loss - known.bound <= gap * abs(loss))


def _argmin(values: FloatArray, offsets: IntArray) -> Plan:
    """The first best option of each site, as levels."""
    return tuple(int(np.argmin(values[a:b])) for a, b in itertools.pairwise(offsets.tolist()))


@dataclass(frozen=True, eq=False)
class _Half:
    """Partial plans: reduced losses  # (n,), costs beyond the base's  # (n, n_budgets), and the way back to their options."""

    reduced: FloatArray
    costs: IntArray
    steps: tuple[tuple[int, IntArray, IntArray], ...]  # site, row of the list before, option
    complete: bool

    def write(self, row: int, options: IntArray) -> None:
        """Put the options of one partial plan into ``options``."""
        for site, before, option in reversed(self.steps):
            options[site] = option[row]
            row = int(before[row])


class _Core:
    """A knapsack at the prices of its bound."""

    def __init__(self, problem: Knapsack, known: Dual[Plan]) -> None:
        self.problem, self.floor = problem, known.bound
        self.prices = known.prices / np.maximum(problem.limit, 1)  # of one base unit
        value = problem.losses + problem.costs @ self.prices
        self.base = problem.options(_argmin(value, problem.offsets))
        self.reduced = value - np.repeat(value[self.base], np.diff(problem.offsets))
        self.excess = problem.cost(self.base) - problem.limit

    def by_buckets(self, best: Plan, loss: float) -> tuple[Plan, float]:
        """One budget: dynamic programming over the options that the gap leaves."""
        problem, kept = self.problem, self._kept(loss - self.floor)
        fixed = sum(int(problem.costs[own[0], 0]) for own in kept if len(own) == 1)
        free = [site for site, own in enumerate(kept) if len(own) > 1]
        levels = min_loss(
            [problem.losses[kept[site]] for site in free],
            [problem.costs[kept[site], 0] for site in free],
            int(problem.limit[0]) - fixed,
        )
        if levels is None:
            return best, loss
        options = np.array([own[0] for own in kept], np.int64)
        options[free] = [kept[site][level] for site, level in zip(free, levels, strict=True)]
        found = problem.loss(options)
        return (problem.plan(options), found) if found < loss else (best, loss)

    def by_halves(self, best: Plan, loss: float, gap: float, size: int) -> tuple[Plan, float, bool]:
        """Plans whose reduced losses and unused room cost less than ``gap`` above the bound; whether all were looked at."""
        kept = self._kept(gap)
        free = sorted((s for s in range(len(kept)) if len(kept[s]) > 1), key=lambda s: self.reduced[kept[s][1]])
        left, right = (self._list(free[i::2], kept, gap, size) for i in (0, 1))
        priced = self.prices > 1e-9 * self.prices.max(initial=0.0)
        tree = cKDTree(np.column_stack([right.costs[:, priced] * self.prices[priced], right.reduced]))
        complete, found = left.complete and right.complete, (gap, -1, -1)
        for start in range(0, len(left.reduced), CHUNK):
            rows = slice(start, start + CHUNK)
            all_seen, (total, at, partner) = self._pairs(left, right, tree, priced, rows, gap)
            complete &= all_seen
            found = min(found, (total, start + at, partner))
        if found[1] < 0:
            return best, loss, complete
        options = self.base.copy()
        left.write(found[1], options)
        right.write(found[2], options)
        total = self.problem.loss(options)
        return (self.problem.plan(options), total, complete) if total < loss else (best, loss, complete)

    def _pairs(
        self, left: _Half, right: _Half, tree: cKDTree, priced: npt.NDArray[np.bool_], rows: slice, gap: float
    ) -> tuple[bool, tuple[float, int, int]]:
        """The best partners of some left halves: whether none was overlooked; loss above the bound, left, right."""
        reduced, costs = left.reduced[rows], left.costs[rows] + self.excess
        goals = np.column_stack([-costs[:, priced] * self.prices[priced], np.zeros(len(costs))])
        n = min(PARTNERS, len(right.reduced))
        distance, partner = tree.query(goals, n, p=1, distance_upper_bound=gap * (1 + 1e-9))
        distance, partner = distance.reshape(-1, n), partner.reshape(-1, n)
        reached = np.isfinite(distance)
        partner = np.where(reached, partner, 0)
        excess = costs[:, None] + right.costs[partner]  # (n_left, n_partners, n_budgets)
        total = reduced[:, None] + right.reduced[partner] - excess @ self.prices
        total = np.where((excess <= 0).all(axis=2) & reached, total, np.inf)
        at, column = np.unravel_index(int(np.argmin(total)), total.shape)
        # a left half with as many partners within reach as were asked for may have more
        seen = n == len(right.reduced) or not bool((distance[:, -1] + reduced < gap).any())
        return seen, (float(total[at, column]), int(at), int(partner[at, column]))

    def _kept(self, gap: float) -> list[IntArray]:
        """Options of each site whose reduced loss is below the gap, the best first."""
        out = []
        for a, b in itertools.pairwise(self.problem.offsets.tolist()):
            own = a + np.flatnonzero(self.reduced[a:b] <= max(gap, 0.0))
            out.append(own[np.argsort(self.reduced[own], kind="stable")])
        return out

    def _list(self, sites: Sequence[int], kept: Sequence[IntArray], gap: float, size: int) -> _Half:
        """Partial plans over some sites, at most ``size`` of the least reduced losses."""
        reduced, costs = np.zeros(1), np.zeros((1, len(self.prices)), np.int64)
        steps, complete = [], True
        for site in sites:
            own = kept[site]
            sums = (reduced[:, None] + self.reduced[own]).reshape(-1)
            chosen = np.flatnonzero(sums <= gap)
            if len(chosen) > size:
                chosen = np.sort(chosen[np.argpartition(sums[chosen], size)[:size]])
                complete = False
            before, option = chosen // len(own), own[chosen % len(own)]
            reduced = sums[chosen]
            costs = costs[before] + self.problem.costs[option] - self.problem.costs[self.base[site]]
            steps.append((site, before, option))
        return _Half(reduced, costs, tuple(steps), complete)

"""The exact minimum of a sum of small tables over all plans: variable elimination, one site after the other.

A convolution's cost joins the sites that decide its widths and its format. Residual networks join few at a time: given the
widths of the streams, every block is on its own. So sites are eliminated in an order that keeps the joined tables small (least
weight first, Dechter's bucket elimination 1999); going back along it reads off the best plan.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from autocompress.search.tables import CostTables, FloatArray, tabulate
from autocompress.types import CostFactor, IntArray, Plan

LARGEST = 1 << 20
"""Entries of the largest joined table."""
TOTAL = 1 << 23
"""Entries of all of them together."""


@dataclass(frozen=True, eq=False)
class _Bucket:
    """What is joined when ``site`` (the last of ``sites``) is eliminated."""

    sites: tuple[int, ...]
    costs: FloatArray | None  # (*levels of sites, n_columns): the sum of its cost factors
    messages: tuple[int, ...]  # earlier buckets whose minimum comes here


class Elimination:
    """Minimises ``options + costs @ prices`` over plans; ``buckets`` in the order of elimination, ``fixed``: site -> level."""

    def __init__(
        self,
        tables: CostTables,
        buckets: Sequence[_Bucket],
        constant: FloatArray,
        fixed: Mapping[int, int] | None = None,
    ) -> None:
        self.tables, self.buckets, self.constant, self.fixed = tables, tuple(buckets), constant, dict(fixed or {})

    @property
    def entries(self) -> int:
        """Entries of all joined tables: the effort of one minimum."""
        n_levels = [1 if site in self.fixed else n for site, n in enumerate(self.tables.n_levels)]
        return sum(math.prod(n_levels[s] for s in bucket.sites) for bucket in self.buckets)

    def at(self, site: int, level: int) -> Elimination:
        """The same with one site fixed: the tables are views, smaller by its levels."""
        buckets = []
        for bucket in self.buckets:
            costs = bucket.costs
            if costs is not None and site in bucket.sites:
                axis = bucket.sites.index(site)
                costs = costs[(slice(None),) * axis + (slice(level, level + 1),)]
            buckets.append(replace(bucket, costs=costs))
        return Elimination(self.tables, buckets, self.constant, {**self.fixed, site: level})

    def minimum(self, options: FloatArray, prices: FloatArray) -> tuple[float, Plan]:
        """The least value and a plan that has it. ``options``  # (n_options,), ``prices``  # (n_columns,)"""
        offsets, fixed = self.tables.offsets, self.fixed
        n_levels = [1 if site in fixed else n for site, n in enumerate(self.tables.n_levels)]
        total = float(self.constant @ prices)
        minima: list[FloatArray] = []
        choices: list[IntArray] = []
        for bucket in self.buckets:
            site = bucket.sites[-1]
            joined = np.zeros([n_levels[s] for s in bucket.sites])
            if bucket.costs is not None:
                joined = bucket.costs @ prices
            first = int(offsets[site]) + fixed.get(site, 0)
            joined = joined + options[first : first + n_levels[site]]
            for message in bucket.messages:
                joined = joined + _aligned(minima[message], self.buckets[message].sites[:-1], bucket.sites)
            choices.append(joined.argmin(axis=-1))
            minima.append(joined.min(axis=-1))
            if len(bucket.sites) == 1:
                total += float(minima[-1])
        plan = [0] * len(n_levels)
        for bucket, choice in zip(reversed(self.buckets), reversed(choices), strict=True):
            plan[bucket.sites[-1]] = int(choice[tuple(plan[s] for s in bucket.sites[:-1])])
        return total, tuple(fixed.get(site, level) for site, level in enumerate(plan))


def elimination(tables: CostTables) -> Elimination | None:
    """Prepared for the cost factors of ``tables``; ``None`` where joined tables would be too large."""
    scopes = [set(factor.sites) for factor in tables.factors]
    order, sizes = _order(tables.n_levels, scopes)
    if max(sizes, default=0) > LARGEST or sum(sizes) > TOTAL:
        return None
    place = {site: i for i, site in enumerate(order)}
    own: list[list[CostFactor]] = [[] for _ in order]
    constant = np.zeros(len(tables.columns))
    for factor in tables.factors:
        if factor.sites:
            own[min(place[s] for s in factor.sites)].append(factor)
        else:
            constant += np.asarray(tabulate(factor), float)
    incoming: list[list[int]] = [[] for _ in order]
    buckets: list[_Bucket] = []
    for i, site in enumerate(order):
        joined = {site}.union(*(f.sites for f in own[i]), *(buckets[m].sites[:-1] for m in incoming[i]))
        sites = (*sorted(joined - {site}), site)
        buckets.append(_Bucket(sites, _summed(own[i], sites, tables), tuple(incoming[i])))
        if len(sites) > 1:
            incoming[min(place[s] for s in sites[:-1])].append(i)
    return Elimination(tables, buckets, constant)


def _order(n_levels: Sequence[int], scopes: Sequence[set[int]]) -> tuple[list[int], list[int]]:
    """Sites by the size of the table that eliminating them joins, the smallest first; and those sizes."""
    near = {site: {site}.union(*(scope for scope in scopes if site in scope)) for site in range(len(n_levels))}
    order, sizes = [], []
    while near:
        size, site = min((math.prod(n_levels[s] for s in joined), site) for site, joined in near.items())
        joined = near.pop(site) - {site}
        for other in joined:
            near[other] = (near[other] | joined) - {site}
        order.append(site)
        sizes.append(size)
    return order, sizes


def _summed(factors: Sequence[CostFactor], sites: tuple[int, ...], tables: CostTables) -> FloatArray | None:
    """Cost factors of one bucket, added up over its sites."""
    if not factors:
        return None
    out = np.zeros((*(tables.n_levels[s] for s in sites), len(tables.columns)))
    for factor in factors:
        table = tabulate(factor).astype(float)[np.ix_(*factor.classes)]
        out += _aligned(table, factor.sites, sites, 1)
    return out


def _aligned(table: FloatArray, sites: Sequence[int], onto: Sequence[int], extra: int = 0) -> FloatArray:
    """``table`` over ``sites`` (and ``extra`` last axes) with its axes in the order of ``onto``, ones where a site is missing."""
    axes = sorted(range(len(sites)), key=lambda axis: onto.index(sites[axis]))
    moved = table.transpose(*axes, *range(len(sites), len(sites) + extra))
    sizes = {sites[axis]: table.shape[axis] for axis in axes}
    return moved.reshape(*(sizes.get(s, 1) for s in onto), *table.shape[len(sites) :])

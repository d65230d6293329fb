"""``random``: plans drawn at random within the cost limits, half of them for the budgets, half spread along the cost axis."""

from __future__ import annotations

import numpy as np

from autocompress.search.base import CONTROLLERS, Asking, BaseController
from autocompress.search.feasible import floors
from autocompress.search.solver import holds, repair
from autocompress.search.tables import all_plans
from autocompress.types import IntArray, Plan

TINY = 4096
"""Spaces up to this size are drawn without replacement from the list of all plans."""


@CONTROLLERS.register("random")
class Random(BaseController):
    """The yardstick for the others; never asks a plan twice."""

    group = 8

    def _search(self) -> Asking:
        self.dense_cost = self.tables.dense
        self.floor = floors(self.tables)
        plans = self._all() if self.space.size <= TINY else None
        while True:
            batch: list[Plan] = []
            for _ in range(self.group):
                plan = self._fresh(batch) if plans is None else (plans.pop() if plans else None)
                if plan is not None:
                    batch.append(plan)
            if not batch:
                return
            yield from self._judge(batch, "full")

    def _all(self) -> list[Plan]:
        """All plans within the limits, shuffled; all plans, the nearest asked first, when there are none."""
        plans = all_plans(self.space)
        limit = self.limits.limit
        inside = [p for p, fits in zip(plans, self.tables.fits(plans, limit), strict=True) if fits]
        if inside:
            self.rng.shuffle(inside)
            return inside
        over = np.maximum(self.tables.cost(plans) / np.maximum(limit, 1) - 1, 0).sum(axis=1)
        return [plans[i] for i in np.argsort(-over, kind="stable")]

    def _fresh(self, batch: list[Plan]) -> Plan | None:
        for _ in range(100):
            plan = self.space.effective(self._draw(self._limit()))
            if plan not in batch and ("full", plan) not in self.seen:
                return plan
        return None

    def _limit(self) -> IntArray:
        """The user's limits, or a random place between dense and them (or, without limits, and the cheapest plan)."""
        limit = np.minimum(self.limits.limit, self.dense_cost)
        free = (limit >= self.dense_cost).all()
        if not free and self.rng.random() < 0.5:
            return self.limits.limit
        end = self.floor if free else limit
        saved: IntArray = ((self.dense_cost - end) * self.rng.random()).astype(np.int64)
        return self.dense_cost - saved

    def _draw(self, limit: IntArray) -> Plan:
        """A random share of sites at random levels, then random switches that save, until the limit holds."""
        share = self.rng.random()
        plan = tuple(self.rng.randrange(n) if self.rng.random() < share else 0 for n in self.space.n_levels)
        unit = np.maximum(limit, 1).astype(float)
        for _ in range(self.tables.n_options):
            cost = self.tables.cost([plan])[0]
            if holds(cost, limit):
                return plan
            over = np.maximum(cost - limit, 0) / unit
            after = np.maximum(cost + self.tables.deltas(plan) - limit, 0) / unit
            helpful = np.flatnonzero(after.sum(axis=1) < over.sum())
            if not len(helpful):
                break
            option = int(helpful[self.rng.randrange(len(helpful))])
            plan = self.tables.switched(plan, option)
        zero = np.zeros(self.tables.n_options)
        fixed = repair(self.tables, zero, plan, limit)
        return fixed if holds(self.tables.cost([fixed])[0], limit) else self.tables.cheapest(1 / unit)

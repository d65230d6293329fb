"""``spdy``: SPDY's searched sensitivities (Frantar & Alistarh 2022), under any budgets on any costs.

The loss of a site is a coefficient times a quadratic prior in its level; nothing is measured one site at a time. Coefficients
are searched instead: random vectors, then re-drawing a few at a time, each scored by judging the solved plan on the slice.
"""

from __future__ import annotations

import itertools
from collections.abc import Generator

import numpy as np

from autocompress.search.base import CONTROLLERS, Asking, fitness
from autocompress.search.exact import TableSearch
from autocompress.search.tables import FloatArray
from autocompress.types import Evaluation, Plan, Query


@CONTROLLERS.register("spdy")
class Spdy(TableSearch):
    """Constants as published: 100 random vectors, then 10 % of the coefficients re-drawn down to one, 100 misses to give up.

    Every improvement is judged at ``full`` too; at the end the best coefficients give the other targets, and the losses are
    measured around the best plan as ``exact`` does. With quality budgets alone, equal coefficients look for the cheapest plan
    that holds them, and its cost is the limit of the search.
    """

    random_vectors = 100
    share = 0.1
    patience = 100

    def _search(self) -> Asking:
        self._prepare()
        n_sites = len(self.space.sites)
        self.prior = self._quadratic()
        self.limit = self.targets[
            1 if self.free and self.limits.limited else 0
        ]  # dense holds the goal: the middle instead
        self.last: Plan | None = None
        best = np.ones(n_sites)
        yield from self._bisect(self.prior)
        cheapest = self._incumbent()
        if self.free and self.budgets and cheapest is not None and cheapest.feasible:
            self.limit = self.tables.cost([cheapest.plan])[0]
        least, plan = yield from self._score(best)
        if plan is not None:
            yield from self._judge([plan], "full")
        improved = False
        for _ in range(self.random_vectors):
            drawn = np.array([self.rng.random() for _ in range(n_sites)])
            score, found = yield from self._score(drawn)
            if score < least:
                best, least, plan, improved = drawn, score, found, True
        if improved and plan is not None:
            yield from self._judge([plan], "full")
        best = yield from self._local(best, least)
        losses = yield from self._scaled(best)
        yield from self._ask_targets(losses, range(len(self.targets)))
        yield from self._bisect(losses)
        yield from self._around(losses)

    def _local(self, best: FloatArray, least: float) -> Generator[list[Query], list[Evaluation], FloatArray]:
        """Re-draw ever fewer coefficients; a gain starts the same number again."""
        for n in range(max(1, round(self.share * len(best))), 0, -1):
            misses = 0
            while misses < self.patience:
                drawn = best.copy()
                for _ in range(n):
                    drawn[self.rng.randrange(len(best))] = self.rng.random()
                score, plan = yield from self._score(drawn)
                misses += 1
                if score < least and plan is not None:
                    best, least, misses = drawn, score, 0
                    yield from self._judge([plan], "full")
        return best

    def _score(self, coefficients: FloatArray) -> Generator[list[Query], list[Evaluation], tuple[float, Plan | None]]:
        """The loss on the slice of the plan that coefficients lead to."""
        losses = coefficients[self.tables.site_of] * self.prior
        plan = self._decide(lambda: self._within(losses, self.limit, *([self.last] if self.last else [])))
        if plan is None:
            return np.inf, None
        self.last = plan
        [answer] = yield from self._judge([plan], "slice")
        return fitness(answer), plan

    def _scaled(self, coefficients: FloatArray) -> Generator[list[Query], list[Evaluation], FloatArray]:
        """The searched losses in the unit of the measured ones, so that measurements can be mixed in."""
        losses = coefficients[self.tables.site_of] * self.prior
        if self.last is None:
            return losses
        plan = self._decide(lambda: self._within(losses, self.limit)) or self.last
        dense, here = yield from self._judge([self.space.dense, plan], "slice")
        gain = fitness(here) - fitness(dense)
        total = float(losses[self.tables.current(plan)].sum())
        return losses * (gain / total if np.isfinite(gain) and gain > 0 and total > 0 else 1.0)

    def _quadratic(self) -> FloatArray:
        """``(i / (n - 1))^2`` of the i-th of ``n`` levels, ordered by what they save.  # (n_options,)"""
        prior = np.zeros(self.tables.n_options)
        for order, (a, _) in zip(self.orders, itertools.pairwise(self.tables.offsets.tolist()), strict=True):
            prior[[a + level for level in order]] = (np.arange(len(order)) / max(len(order) - 1, 1)) ** 2
        return prior

"""``genetic``: the largest capacity at a size, found without judging anything (Compressor, Shi et al. 2022).

Capacity stands in for quality: the fitness of a plan is its MACs minus its distance to the target, both read from cost tables.
So a target takes a second and no evaluation; the winners are judged at ``full``, and distillation does the rest. The published
algorithm searches five numbers of an architecture; here a gene is the level of a site, and the size is every budgeted cost.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np

from autocompress.search.base import CONTROLLERS, Asking
from autocompress.search.exact import TableSearch
from autocompress.search.solver import repair
from autocompress.search.tables import FloatArray
from autocompress.types import IntArray, Plan

CAPACITY = ("macs", "params")
"""What stands for capacity: the first of these without a budget, else any cost without one, else the budgeted costs."""


@CONTROLLERS.register("genetic")
class Genetic(TableSearch):
    """One run of the algorithm a target; the goal's runners-up are judged last. With quality budgets alone it bisects the size.

    From the release: one-point crossover with probability 0.6, else mutation, parents drawn uniformly, no plan twice, the best
    of parents and children survive. A mutation there redraws every gene from a random one on, which is a restart for a hundred
    sites; here it redraws one to three.
    """

    population = 50
    generations = 300
    patience = 40
    crossover = 0.6
    winners = 4

    def _search(self) -> Asking:
        self._prepare()
        self.prior = self.one_site.losses()  # nothing is measured: only for repairing what misses a target
        self.columns = self.capacity()
        self._runs: dict[tuple[int, ...], list[Plan]] = {}
        yield from self._ask_targets(self.prior, range(len(self.targets)))
        yield from self._bisect(self.prior)
        for rank in range(1, self.winners):
            for limit in self.targets:
                plan = self._decide(lambda limit=limit, rank=rank: self._ranked(limit, rank))  # type: ignore[misc]
                if plan is not None:
                    yield from self._judge([plan], "full")

    def _solve(self, losses: FloatArray, target: int, quick: bool = False) -> Plan | None:
        return self._decide(lambda: self._ranked(self.targets[target], 0))

    def _within(self, losses: FloatArray, limit: IntArray, *starts: Plan) -> Plan | None:
        return self._ranked(limit, 0)

    def capacity(self) -> list[int]:
        """Columns of ``costs.keys`` that are summed, as shares of the dense ones."""
        budgeted = set(self.limits.keys) if self.limits.limited else set()
        others = [key for key in (*CAPACITY, *self.costs.keys) if key in self.costs.keys and key not in budgeted]
        return [self.costs.keys.index(key) for key in (others[:1] or self.limits.keys)]

    def _ranked(self, limit: IntArray, rank: int) -> Plan | None:
        """The plan of that rank among the winners for a limit, repaired where it misses it."""
        key = tuple(limit.tolist())
        if key not in self._runs:
            found = self._evolve(limit, random.Random(f"{self.seed} {key}"))
            self._runs[key] = list(dict.fromkeys(repair(self.tables, self.prior, p, limit) for p in found))
        return self._runs[key][rank] if rank < len(self._runs[key]) else None

    def fitness(self, plans: Sequence[Plan], limit: IntArray) -> FloatArray:
        """Capacity minus the distance to the target, as shares of the dense costs; over a limit minus 2 more.  # (n_plans,)"""
        costs = self.costs.cost(plans)
        dense = np.maximum(self.costs.cost([self.space.dense])[0], 1)
        size, unit = costs[:, self.tables.columns], dense[self.tables.columns]
        target = np.minimum(limit, unit)
        distance = (np.abs(size - target) / unit).mean(axis=1)
        over = (size > limit).any(axis=1)
        capacity = (costs[:, self.columns] / dense[self.columns]).mean(axis=1)
        fitness: FloatArray = capacity - distance - np.where(over, 2.0, 0.0)
        return fitness

    def _evolve(self, limit: IntArray, rng: random.Random) -> list[Plan]:
        """The best plans of the last generation, the fittest first."""
        n_levels = self.tables.n_levels
        people = {self.space.dense: None}
        for _ in range(4 * self.population):
            share = rng.random()
            people[tuple(rng.randrange(n) if rng.random() < share else 0 for n in n_levels)] = None
        alive = self._fittest({}, list(people), limit)
        idle = 0
        for _ in range(self.generations):
            parents, best = list(alive), max(alive.values())
            children: dict[Plan, None] = {}
            for _ in range(self.population // 2):
                one, two = rng.sample(parents, 2) if len(parents) > 1 else (parents[0], parents[0])
                children |= dict.fromkeys(self._children(one, two, rng))
            alive = self._fittest(alive, [child for child in children if child not in alive], limit)
            idle = 0 if max(alive.values()) > best else idle + 1
            if idle == self.patience:
                break
        return list(alive)[: self.winners]

    def _fittest(self, alive: dict[Plan, float], new: list[Plan], limit: IntArray) -> dict[Plan, float]:
        """Those that survive and their fitness, the fittest first."""
        fitness = alive | dict(zip(new, self.fitness(new, limit).tolist() if new else [], strict=True))
        return {p: fitness[p] for p in sorted(fitness, key=lambda p: (-fitness[p], p))[: self.population]}

    def _children(self, one: Plan, two: Plan, rng: random.Random) -> tuple[Plan, Plan]:
        if len(one) > 1 and rng.random() < self.crossover:
            cut = rng.randrange(1, len(one))
            return one[:cut] + two[cut:], two[:cut] + one[cut:]
        return self._mutated(one, rng), self._mutated(two, rng)

    def _mutated(self, plan: Plan, rng: random.Random) -> Plan:
        genes = list(plan)
        for site in rng.sample(range(len(genes)), min(len(genes), rng.randint(1, 3))):
            genes[site] = rng.randrange(self.tables.n_levels[site])
        return tuple(genes)

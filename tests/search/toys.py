"""Small spaces with known answers: real costs, and an evaluator whose losses are formulas instead of a model."""

from __future__ import annotations

import functools
import itertools
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from autocompress.search.tables import all_plans, scale_of
from autocompress.types import (
    Budget,
    CostFactor,
    Evaluation,
    IntArray,
    Level,
    MethodConfig,
    Plan,
    Query,
    SearchSpace,
    Site,
)


@dataclass(frozen=True)
class Shrink(MethodConfig):
    """A toy method: keeps ``keep`` of 16 channels."""

    keep: int = 16


def space_of(*n_levels: int, kind: str = "channels") -> SearchSpace:
    """Sites ``s0, s1, ...`` whose level ``i`` keeps ``16 - i`` channels."""
    sites = tuple(Site(f"s{i}", kind, (f"layer{i}",)) for i in range(len(n_levels)))  # type: ignore[arg-type]
    levels = tuple((Level(), *(Level((Shrink(16 - j),)) for j in range(1, n))) for n in n_levels)
    return SearchSpace(sites, levels)


class ToyCosts:
    """A cost model that is given by its factors."""

    def __init__(self, keys: tuple[str, ...], factors: Sequence[CostFactor], n_levels: Sequence[int]) -> None:
        self._keys, self._factors, self.n_levels = keys, tuple(factors), n_levels

    @property
    def keys(self) -> tuple[str, ...]:
        return self._keys

    def factors(self) -> Sequence[CostFactor]:
        return self._factors

    def cost(self, plans: Sequence[Plan]) -> IntArray:
        if not plans:
            return np.zeros((0, len(self._keys)), np.int64)
        rows = np.array(plans, np.int64)
        total = np.zeros((len(plans), len(self._keys)), np.int64)
        for factor in self._factors:
            levels = rows[:, list(factor.sites)]
            if factor.table is not None:
                total += factor.table[tuple(levels.T)]
            else:
                assert factor.cost is not None
                total += factor.cost(levels)
        return total

    def deltas(self, plan: Plan) -> IntArray:
        switched = [
            (*plan[:site], level, *plan[site + 1 :]) for site, n in enumerate(self.n_levels) for level in range(n)
        ]
        return self.cost(switched) - self.cost([plan])


def separable(n_levels: Sequence[int], seed: int = 0, keys: tuple[str, ...] = ("macs",)) -> ToyCosts:
    """One falling table a site."""
    rng = np.random.default_rng(seed)
    factors = []
    for site, n in enumerate(n_levels):
        size = rng.integers(500, 5000, len(keys))
        share = np.linspace(1, 0.1, n)[:, None] * rng.uniform(0.9, 1.1, (n, len(keys)))
        factors.append(CostFactor(f"layer{site}", (site,), (size * share).astype(np.int64)))
    return ToyCosts(keys, factors, n_levels)


def _look_up(table: IntArray, levels: IntArray) -> IntArray:
    return table[levels[:, 0], levels[:, 1]]


def chain(n_levels: Sequence[int], seed: int = 0, keys: tuple[str, ...] = ("macs",), lazy: bool = False) -> ToyCosts:
    """Width in times width out between neighbours, as in a row of convolutions; ``lazy`` gives functions, not tables."""
    rng = np.random.default_rng(seed)
    factors = []
    for a in range(len(n_levels) - 1):
        size = rng.integers(500, 5000, len(keys))
        kept = [1 - 0.9 * np.arange(n) / max(n - 1, 1) for n in (n_levels[a], n_levels[a + 1])]
        table = (kept[0][:, None, None] * kept[1][None, :, None] * size).astype(np.int64) + 7
        if lazy:
            function = functools.partial(_look_up, table)
            factors.append(CostFactor(f"conv{a}", (a, a + 1), None, function))
        else:
            factors.append(CostFactor(f"conv{a}", (a, a + 1), table))
    return ToyCosts(keys, factors, n_levels)


@dataclass
class ToyLoss:
    """Loss of a plan: one-site terms, and (``pairs``) a penalty where neighbours are both compressed hard."""

    space: SearchSpace
    costs: ToyCosts
    budgets: Sequence[Budget] = ()
    pairs: float = 0.0
    seed: int = 0
    broken: Callable[[Plan], bool] = lambda plan: False
    slice_noise: float = 0.0

    def __post_init__(self) -> None:
        rng = random.Random(self.seed)
        self.sensitivity = [math.exp(rng.uniform(-3, 0)) for _ in self.space.sites]
        self.n = 0

    def loss(self, plan: Plan) -> float:
        shares = [v / max(n - 1, 1) for v, n in zip(plan, self.space.n_levels, strict=True)]
        alone = sum(s * share**2 for s, share in zip(self.sensitivity, shares, strict=True))
        return alone + self.pairs * sum(a * b for a, b in itertools.pairwise(shares))

    def __call__(self, queries: Sequence[Query]) -> list[Evaluation]:
        self.n += len(queries)
        rows = self.costs.cost([q.plan for q in queries])
        out = []
        for query, row in zip(queries, rows, strict=True):
            loss = math.nan if self.broken(query.plan) else self.loss(query.plan)
            if query.fidelity == "slice" and self.slice_noise:
                loss *= 1 + self.slice_noise * random.Random(str(query.plan)).uniform(-1, 1)
            costs = {k: int(c) * scale_of(k) for k, c in zip(self.costs.keys, row, strict=True)}
            values = {"loss": loss, "accuracy_drop": 10 * loss}
            violation = sum(b.violation({**costs, **values}[b.key]) for b in self.budgets)
            out.append(Evaluation(query.plan, query.fidelity, values, costs, violation))
        return out

    def optimum(self) -> tuple[float, Plan]:
        """Brute force over a small space: the least loss that holds all budgets."""
        answers = self([Query(plan) for plan in all_plans(self.space)])
        return min((e.values["loss"], e.plan) for e in answers if e.feasible)

"""Small spaces with known answers: real costs, and an evaluator whose losses are formulas instead of a model."""

from __future__ import annotations

import functools
import itertools
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from autocompress.search.tables import FloatArray, all_plans, scale_of
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
        return self._sum(np.array(plans, np.int64).reshape(len(plans), len(self.n_levels)))

    def _sum(self, plans: IntArray) -> IntArray:
        total = np.zeros((len(plans), len(self._keys)), np.int64)
        for factor in self._factors:
            total += factor.rows(plans[:, list(factor.sites)])
        return total

    def deltas(self, plan: Plan) -> IntArray:
        sites = np.repeat(np.arange(len(plan)), self.n_levels)
        switched = np.tile(np.array(plan, np.int64), (len(sites), 1))
        switched[np.arange(len(sites)), sites] = np.concatenate([np.arange(n) for n in self.n_levels])
        return self._sum(switched) - self._sum(np.array([plan], np.int64))


class PeakCosts(ToyCosts):
    """``macs``, and ``peak_mb``: what two neighbours keep together, at most; no factor and no difference has it."""

    def __init__(self, n_levels: Sequence[int], seed: int = 0) -> None:
        super().__init__(("macs", "peak_mb"), separable(n_levels, seed, ("macs", "peak_mb"))._factors, n_levels)

    def cost(self, plans: Sequence[Plan]) -> IntArray:
        total = super().cost(plans)
        rows = np.array(plans, np.int64)
        tables = [f.table[:, 1] for f in self._factors if f.table is not None]
        kept = np.stack([table[rows[:, site]] for site, table in enumerate(tables)], axis=1)
        total[:, 1] = (kept[:, 1:] + kept[:, :-1]).max(axis=1)
        return total

    def deltas(self, plan: Plan) -> IntArray:
        return super().deltas(plan) * np.array([1, 0])

    def factors(self) -> Sequence[CostFactor]:
        blind = [(f.name, f.sites, f.table * np.array([1, 0])) for f in self._factors if f.table is not None]
        return [CostFactor(*parts) for parts in blind]


def separable(n_levels: Sequence[int], seed: int = 0, keys: tuple[str, ...] = ("macs",)) -> ToyCosts:
    """One falling table a site."""
    rng = np.random.default_rng(seed)
    factors = []
    for site, n in enumerate(n_levels):
        size = rng.integers(500, 5000, len(keys))
        share = np.linspace(1, 0.1, n)[:, None] * rng.uniform(0.9, 1.1, (n, len(keys)))
        factors.append(CostFactor(f"layer{site}", (site,), (size * share).astype(np.int64)))
    return ToyCosts(keys, factors, n_levels)


def nested(n_blocks: int = 3, levels: int = 4) -> tuple[SearchSpace, ToyCosts]:
    """Blocks that can be dropped, two layers in each; what is in a dropped block costs nothing and has no say."""
    sites, kept, factors = [], [], []
    for b in range(n_blocks):
        layers = (f"b{b}.one", f"b{b}.two")
        sites += [Site(f"b{b}", "block", layers), *(Site(name, "channels", (name,)) for name in layers)]
        kept += [2, levels, levels]
        for i in (1, 2):
            table = np.zeros((2, levels, 1), np.int64)
            table[0, :, 0] = (1000 + 300 * b + 100 * i) * np.linspace(1, 0.2, levels)
            factors.append(CostFactor(f"b{b}.{i}", (3 * b, 3 * b + i), table))
    space = SearchSpace(tuple(sites), space_of(*kept).levels)
    return space, ToyCosts(("macs",), factors, space.n_levels)


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

    def loss_and_grad(self, probabilities: FloatArray) -> tuple[float, FloatArray]:
        """The expected loss where sites are independent; no number where the likeliest plan is broken."""
        self.n += 1
        shares = [np.arange(n) / max(n - 1, 1) for n in self.space.n_levels]
        parts = np.split(probabilities, np.cumsum(self.space.n_levels)[:-1])
        slopes = [s * share**2 for s, share in zip(self.sensitivity, shares, strict=True)]
        loss = sum(float(p @ slope) for p, slope in zip(parts, slopes, strict=True))
        means = [float(p @ share) for p, share in zip(parts, shares, strict=True)]
        loss += self.pairs * sum(a * b for a, b in itertools.pairwise(means))
        for i, share in enumerate(shares):
            slopes[i] = slopes[i] + self.pairs * sum(means[i - 1 : i] + means[i + 1 : i + 2]) * share
        if self.broken(tuple(int(p.argmax()) for p in parts)):
            return math.nan, np.zeros(len(probabilities))
        return loss, np.concatenate(slopes)

    def optimum(self) -> tuple[float, Plan]:
        """Brute force over a small space: the least loss that holds all budgets."""
        answers = self([Query(plan) for plan in all_plans(self.space)])
        return min((e.values["loss"], e.plan) for e in answers if e.feasible)

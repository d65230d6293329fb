"""Polish: a climb where plans are handed out, from what the search before it knows."""

from __future__ import annotations

import numpy as np
import pytest

from autocompress.search.polish import Polish
from autocompress.search.process import Process
from autocompress.types import Budget, Evaluation, LevelErrors, Plan, Query
from tests.search import toys

SITES, LEVELS = 10, 4
SPACE = toys.space_of(*[LEVELS] * SITES)
GONE = np.r_[np.ones(3), np.zeros(SITES - 3)]
"""A refit makes little good at the first three sites, and much at the others."""


class Refitted:
    """Plans lose a sum over sites: before refit, after it, and as output errors say, which are off by up to twice."""

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.costs = toys.separable(SPACE.n_levels)
        dense = float(self.costs.cost([SPACE.dense])[0][0])
        self.budgets = [Budget("macs", 0.6 * dense)]
        self.harm = np.cumsum(np.c_[np.zeros(SITES), rng.uniform(0.5, 1.5, (SITES, LEVELS - 1))], axis=1) / SITES
        self.harm *= 10.0 ** rng.uniform(-1, 0, (SITES, 1))
        self.left = self.harm * np.where(GONE, 0.8, 0.1)[:, None]
        said = self.harm * 2.0 ** rng.uniform(-1, 1, (SITES, 1))
        self.errors = {site: tuple(row.tolist()) for site, row in enumerate(said)}
        plans = [tuple(int(v) for v in rng.integers(0, LEVELS, SITES)) for _ in range(200)]
        self.plans = [p for p in plans if self.costs.cost([p])[0][0] <= 0.6 * dense]
        self.dense = dense

    def climb(self, known: list[Evaluation], errors: LevelErrors | None = None, seed: int = 0) -> Polish:
        climb = Polish(SPACE, self.costs, self.budgets, seed)
        climb.learn(known, errors)
        return climb

    def judged(self, plan: Plan, fidelity: str) -> Evaluation:
        table = self.left if fidelity == "refitted" else self.harm
        loss = float(table[np.arange(SITES), list(plan)].sum())
        over = max(float(self.costs.cost([plan])[0][0]) / (0.6 * self.dense) - 1, 0.0)
        return Evaluation(plan, fidelity, {"loss": loss}, {}, over, slices=(loss,) if fidelity == "full" else ())  # type: ignore[arg-type]

    def known(self) -> list[Evaluation]:
        """The search: fifty plans at ``full``, the best six of them refitted."""
        full = [self.judged(p, "full") for p in (SPACE.dense, *self.plans[:50])]
        best = sorted(full[1:], key=lambda e: e.values["loss"])[:6]
        return [*full, *(self.judged(e.plan, "refitted") for e in best)]


@pytest.mark.parametrize("seed", range(3))
def test_it_finds_what_is_good_after_refit(seed: int) -> None:
    toy = Refitted(seed)
    known = toy.known()
    climb, found = toy.climb(known, toy.errors, seed), list[Evaluation]()
    while len(found) < 20 and (queries := climb.ask(2)):
        assert all(isinstance(q, Query) and q.fidelity == "refitted" for q in queries)
        answers = [toy.judged(q.plan, "refitted") for q in queries]
        assert not any(e.violation for e in answers), "costs are known beforehand"
        climb.tell(answers)
        found += answers
    assert len({e.plan for e in found}) == len(found)
    before = min(e.values["loss"] for e in known if e.fidelity == "refitted")
    after = min(e.values["loss"] for e in found)
    best_of_all = min(toy.judged(p, "refitted").values["loss"] for p in toy.plans)
    assert after < before and after < best_of_all


def test_it_begins_with_the_optimum_of_output_errors() -> None:
    toy = Refitted(0)
    climb = toy.climb(toy.known(), toy.errors)
    (first,) = climb.ask(2)
    assert isinstance(first, Query)
    said = {p: sum(toy.errors[s][v] for s, v in enumerate(p)) for p in (first.plan, *toy.plans)}
    assert min(said, key=said.__getitem__) == first.plan


def test_without_output_errors_it_climbs_from_the_plans_of_the_search() -> None:
    toy = Refitted(0)
    climb = toy.climb(toy.known())
    for _ in range(5):
        queries = climb.ask(2)
        assert 0 < len(queries) <= 2
        climb.tell([toy.judged(q.plan, "refitted") for q in queries])


def test_a_process_learns_faster_on_top_of_that_of_a_cheaper_rung() -> None:
    """How far from true it is on plans not seen, from ten refitted plans, with and without the process of ``full``."""
    off: dict[bool, list[float]] = {True: [], False: []}
    for seed in range(5):
        toy = Refitted(seed)
        toy.left = toy.harm * 0.2
        orders = [list(range(LEVELS))] * SITES
        full = {p: toy.judged(p, "full").values["loss"] for p in toy.plans}
        after = {p: toy.judged(p, "refitted").values["loss"] for p in toy.plans}
        below = Process(SPACE, orders)
        below.fit([{p: full[p] for p in toy.plans[:60]}])
        for told in off:
            model = Process(SPACE, orders, below=below if told else None)
            model.fit([{p: after[p] for p in toy.plans[:10]}])
            guess = model.predict(toy.plans[60:])[0]
            off[told].append(
                float(np.abs(np.log(np.maximum(guess, 1e-6)) - np.log([after[p] for p in toy.plans[60:]])).mean())
            )
    assert np.mean(off[True]) < 0.7 * np.mean(off[False])

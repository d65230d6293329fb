"""The process over plans, and ``auto`` on top of it, where each plan is judged on other examples."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr
from toys import ToyCosts, chain, space_of

from autocompress.methods import Sparse
from autocompress.search import CONTROLLERS, ParetoFront, run
from autocompress.search.process import Process, mean_roots
from autocompress.search.tables import FloatArray, all_plans
from autocompress.types import Budget, Evaluation, Level, Objective, Plan, Query, SearchSpace, Site

SPACE = space_of(4, 3, 5, 4, 3, 4)
ORDERS = [list(range(n)) for n in SPACE.n_levels]
PARTS, ROWS, CLASSES = 3, 40, 5


class Speaker:
    """A model in miniature: sites shift hidden features, of which the answers are a nonlinear function."""

    def __init__(self, space: SearchSpace, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.shifts = [rng.normal(0, 0.5, (PARTS * ROWS, 8)) * (1 + s % 3) for s in range(len(space.sites))]
        self.base, self.out = rng.normal(0, 2, (PARTS * ROWS, 8)), rng.normal(0, 1, (8, CLASSES))
        self.n_levels = space.n_levels
        self.dense = self.log_p((0,) * len(space.sites))

    def log_p(self, plan: Plan) -> FloatArray:
        hidden = self.base.copy()
        for shift, level, n in zip(self.shifts, plan, self.n_levels, strict=True):
            hidden = hidden * (1 - 0.1 * level / n) + shift * (level / (n - 1)) ** 2
        z = np.tanh(hidden / 2) @ self.out * 2
        found: FloatArray = z - np.log(np.exp(z).sum(1, keepdims=True))
        return found

    def losses(self, plan: Plan) -> FloatArray:
        """KL to the original's answers on each slice.  # (PARTS,)"""
        each = (np.exp(self.dense) * (self.dense - self.log_p(plan))).sum(1)
        losses: FloatArray = each.reshape(PARTS, ROWS).mean(1)
        return losses


def drawn(n: int, seed: int = 0) -> list[Plan]:
    rng = np.random.default_rng(seed)
    raw = [tuple(int(v) for v in rng.integers(0, SPACE.n_levels)) for _ in range(2 * n)]
    return list(dict.fromkeys(raw))[:n]


def observed(speaker: Speaker, plans: list[Plan], everywhere: int = 2) -> list[dict[Plan, float]]:
    """Each plan was seen on one slice alone, but for the first ones, which were seen on all."""
    known: list[dict[Plan, float]] = [{} for _ in range(PARTS)]
    for i, plan in enumerate(plans):
        losses = speaker.losses(plan)
        for part in range(PARTS) if i < everywhere else (i % PARTS,):
            known[part][plan] = float(losses[part])
    return known


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 50))
def test_it_orders_plans_that_it_never_saw(seed: int) -> None:
    speaker, plans = Speaker(SPACE, seed), drawn(160, seed)
    model = Process(SPACE, ORDERS)
    model.fit(observed(speaker, plans[:90]))
    loss, hope = model.predict(plans[90:])
    assert spearmanr([float(speaker.losses(p).mean()) for p in plans[90:]], loss).statistic > 0.8
    assert (hope <= loss).all()


def test_what_was_seen_is_predicted_and_surer_than_what_was_not() -> None:
    speaker, plans = Speaker(SPACE), drawn(60)
    model = Process(SPACE, ORDERS)
    model.fit(observed(speaker, plans[:40], everywhere=40))
    seen, hope = model.predict(plans[:40])
    np.testing.assert_allclose(seen, [float(speaker.losses(p).mean()) for p in plans[:40]], rtol=0.25, atol=0.02)
    unseen, far = model.predict(plans[40:])
    assert (np.sqrt(seen) - np.sqrt(np.abs(hope))).mean() < (np.sqrt(unseen) - np.sqrt(np.abs(far))).mean()


def test_hard_slices_are_told_from_bad_plans() -> None:
    """One slice is four times as hard: a plan that was judged there counts as what it is on all."""
    plans = drawn(6)
    loss = {plan: 0.1 * (1 + i) for i, plan in enumerate(plans)}
    known = [{p: loss[p] for p in [*plans[:2], plans[2]]}, {p: 4 * loss[p] for p in [*plans[:2], plans[3]]}]
    found = mean_roots(known)
    ratio = {p: found[p][0] / loss[p] ** 0.5 for p in plans[:4]}
    assert max(ratio.values()) == pytest.approx(min(ratio.values()))
    assert [found[p][1] for p in plans[:4]] == [2, 2, 1, 1]


def ordered(seed: int) -> list[float]:
    """How well a process orders plans from twelve known ones: told of all sites' output errors, of half of them, of none."""
    rng, space = np.random.default_rng(seed), space_of(*[5] * 12)
    harm = [np.cumsum(np.r_[0.0, row]) * 10.0 ** rng.uniform(-3, 0) for row in rng.uniform(0.5, 1.5, (12, 4))]
    plans = [tuple(int(v) for v in rng.integers(0, 5, 12)) for _ in range(80)]
    loss = {plan: sum(float(row[v]) for row, v in zip(harm, plan, strict=True)) for plan in plans}
    errors = {site: tuple(float(v) * 3 * 2 ** rng.uniform(-1, 1) for v in row) for site, row in enumerate(harm)}
    found = []
    for told in (errors, {site: errors[site] for site in range(0, 12, 2)}, {}):
        model = Process(space, [list(range(5))] * 12, told)
        model.fit([{plan: loss[plan] for plan in plans[:12]}])
        found.append(float(spearmanr([loss[p] for p in plans[12:]], model.predict(plans[12:])[0]).statistic))
    return found


def test_output_errors_tell_what_few_plans_cannot() -> None:
    whole, half, none = np.mean([ordered(seed) for seed in range(6)], axis=0)
    assert whole > 0.75 and whole > half > none


def test_without_data_it_predicts_nothing_and_does_not_fail() -> None:
    model = Process(SPACE, ORDERS)
    model.fit([{}, {}])
    loss, hope = model.predict(drawn(3))
    assert loss.tolist() == hope.tolist() == [0.0, 0.0, 0.0]


class Speaking:
    """An evaluator of a :class:`Speaker`; keeps what it was asked."""

    def __init__(self, seed: int) -> None:
        self.costs: ToyCosts = chain(SPACE.n_levels, seed, ("macs",))
        self.budget = Budget("macs", float(self.costs.cost([SPACE.dense])[0][0]) * 0.6)
        self.speaker = Speaker(SPACE, seed)
        self.asked: list[Query] = []

    def __call__(self, queries: Sequence[Query]) -> list[Evaluation]:
        self.asked += queries
        return [self.one(q) for q in queries]

    def one(self, query: Query) -> Evaluation:
        cost, losses = float(self.costs.cost([query.plan])[0][0]), self.speaker.losses(query.plan)
        full = query.fidelity == "full"
        values = {"loss": float(losses.mean() if full else losses[query.part]), "metric": 1.0, "accuracy_drop": 0.0}
        violation, slices = self.budget.violation(cost), tuple(losses.tolist()) if full else ()
        return Evaluation(query.plan, query.fidelity, values, {"macs": cost}, violation, part=query.part, slices=slices)

    def search(self, n: int, seed: int = 0, known: list[Evaluation] | None = None) -> float:
        """The best loss that ``auto`` finds."""
        front = ParetoFront([Objective("loss"), Objective("macs")])
        controller = CONTROLLERS["auto"](SPACE, self.costs, [self.budget], seed)
        controller.learn(known or [])
        run(controller, self, front, evaluations=n)
        found = front.best(fidelity="full")
        assert found is not None
        return found.values["loss"]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_auto_finds_the_best_plan_over_all_slices(seed: int) -> None:
    """Though nearly every plan was judged on one slice of three, each slice about as often as another."""
    evaluator = Speaking(seed)
    found = evaluator.search(130, seed)
    inside = [p for p in all_plans(SPACE) if evaluator.costs.cost([p])[0][0] <= evaluator.budget.limit]
    assert found <= 1.02 * min(float(evaluator.speaker.losses(p).mean()) for p in inside) + 1e-9
    counts = np.bincount([q.part for q in evaluator.asked if q.fidelity == "slice"], minlength=PARTS)
    assert counts.min() >= 20 and counts.max() - counts.min() <= 12


def test_auto_starts_from_what_is_known() -> None:
    """Told of an earlier search, it asks its best plan first."""
    evaluator = Speaking(0)
    best = evaluator.search(130)
    known = [evaluator.one(q) for q in evaluator.asked]
    assert evaluator.search(15, 1, known) <= best < evaluator.search(15, 1)


def formats(n: int) -> SearchSpace:
    """Layers that all offer the same three levels."""
    kinds = [Level(), *(Level((Sparse(share),)) for share in (0.5, 0.7, 0.9))]
    sites = tuple(Site(f"layer:{i}", "layer", (f"{i}",), 1, (), 1, 1) for i in range(n))
    return SearchSpace(sites, (tuple(kinds),) * n)


def test_what_a_level_costs_in_some_layers_tells_of_the_others() -> None:
    """Losses by level alone: layers that no plan has touched are predicted from those that were."""
    space = formats(12)
    process = Process(space, [list(range(4))] * 12)
    price = np.array([0.0, 0.01, 0.05, 0.4])
    rng = np.random.default_rng(0)
    plans = [tuple(int(v) for v in np.where(np.arange(12) < 6, rng.integers(0, 4, 12), 0)) for _ in range(40)]
    process.fit([{plan: float(price[list(plan)].sum()) for plan in plans}])
    elsewhere = [(0,) * 6 + (level,) * 6 for level in range(4)]
    found = process.predict(elsewhere)[0]
    assert list(np.argsort(found)) == [0, 1, 2, 3], "six layers that were always dense"
    assert found[3] > 3 * max(found[1], 0.01)
    apart = Process(space, [list(range(4))] * 12)
    apart.common = {}
    apart.fit([{plan: float(price[list(plan)].sum()) for plan in plans}])
    alone = apart.predict(elsewhere)[0]
    assert np.ptp(alone) < 0.5 * np.ptp(found), "without what they have in common nothing is known there"


def test_groups_have_no_level_in_common() -> None:
    assert not Process(SPACE, ORDERS).common

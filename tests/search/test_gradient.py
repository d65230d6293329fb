"""What the gradient controller is made of: expected costs, distributions within limits, and what an evaluator must have."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from controller_contract import LARGE, problem, searched
from toys import PeakCosts, ToyCosts, ToyLoss, chain, separable, space_of

from autocompress.errors import UsageError
from autocompress.search import CONTROLLERS, ParetoFront, run
from autocompress.search.expected import expected_cost
from autocompress.search.gradient import Gradient
from autocompress.search.run import answered
from autocompress.search.tables import CostTables, FloatArray
from autocompress.types import Budget, Evaluation, Objective, Query, SoftEvaluation, SoftQuery, best_levels


def distribution(tables: CostTables, seed: int = 0) -> FloatArray:
    rng = np.random.default_rng(seed)
    return np.concatenate([rng.dirichlet(np.ones(n)) for n in tables.n_levels])


def sampled(tables: CostTables, p: FloatArray, n: int = 20_000) -> FloatArray:
    """Mean cost of plans drawn from the distribution."""
    rng, ends = np.random.default_rng(1), tables.offsets[1:-1]
    draws = [rng.choice(len(part), n, p=part) for part in np.split(p, ends)]
    return np.asarray(tables.cost(list(map(tuple, np.stack(draws, 1).tolist()))).mean(axis=0))


@pytest.mark.parametrize("make", [separable, chain])
def test_expected_costs_are_the_mean_over_plans(make: type[ToyCosts]) -> None:
    space = space_of(4, 3, 5, 2)
    costs = make(space.n_levels, 2, ("macs", "params"))
    tables = CostTables(space, costs, [0, 1])
    p = distribution(tables)
    cost, slope = expected_cost(tables, p, best_levels(p, tables.offsets))
    np.testing.assert_allclose(cost, sampled(tables, p), rtol=0.02)
    step = np.random.default_rng(3).normal(size=p.shape) * 1e-4
    ahead, behind = (expected_cost(tables, p + sign * step, space.dense)[0] for sign in (1, -1))
    np.testing.assert_allclose(step @ slope, (ahead - behind) / 2, rtol=1e-6)


def test_what_has_no_table_is_linearised_around_the_likeliest_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    space = space_of(4, 3, 5, 2)
    monkeypatch.setattr("autocompress.search.tables.TABULATED", 0)
    for costs in (chain(space.n_levels, 2, lazy=True), PeakCosts(space.n_levels)):
        tables = CostTables(space, costs, list(range(len(costs.keys))))
        plan = (1, 2, 3, 0)
        corner = np.zeros(tables.n_options)
        corner[tables.current(plan)] = 1.0
        cost, slope = expected_cost(tables, corner, plan)
        np.testing.assert_allclose(cost, tables.cost([plan])[0])
        change = slope - slope[tables.current(plan)][tables.site_of]
        np.testing.assert_allclose(change, tables.deltas(plan))


@pytest.mark.parametrize("share", [0.3, 0.6, 2.0])
def test_a_distribution_holds_its_limits_and_uses_them(share: float) -> None:
    costs, budgets, _ = problem(share=share)
    controller = Gradient(LARGE, costs, budgets)
    controller._prepare()
    tables, limit = controller.tables, controller.limits.limit
    losses = controller.one_site.losses()
    p = controller._held(losses, 0.1, controller._uniform(), limit, rounds=10)
    np.testing.assert_allclose(np.bincount(tables.site_of, p), 1.0)
    over = expected_cost(tables, p, best_levels(p, tables.offsets))[0] / limit
    assert over.max() <= 1.02
    assert over.max() >= 0.97 or share > 1


class Plain:
    """Judges plans, and has no gradients."""

    def __init__(self, inner: ToyLoss) -> None:
        self.inner = inner

    def __call__(self, queries: Sequence[Query]) -> list[Evaluation]:
        return self.inner(queries)


def test_an_evaluator_without_gradients_is_named() -> None:
    costs, budgets, evaluator = problem()
    controller = CONTROLLERS["gradient"](LARGE, costs, budgets, 0)
    with pytest.raises(UsageError, match="Plain.* has no loss_and_grad.*'evolution', 'exact'"):
        run(controller, Plain(evaluator), ParetoFront([Objective("loss")]), evaluations=10)


def test_a_mixture_counts_and_reaches_no_front() -> None:
    costs, budgets, evaluator = problem()
    front = searched(CONTROLLERS["gradient"](LARGE, costs, budgets, 0), evaluator, 12)
    assert evaluator.n == 12
    kept = front.evaluations("slice") + front.evaluations("full")
    assert 0 < len(kept) < 6 and not any(isinstance(e, SoftEvaluation) for e in kept)


def test_the_slope_of_a_toy_is_its_difference() -> None:
    costs, _, evaluator = problem(pairs=0.3)
    tables = CostTables(LARGE, costs, [0])
    p = distribution(tables)
    plan = best_levels(p, tables.offsets)
    (answer,) = answered(evaluator, [SoftQuery(plan, "slice", probabilities=tuple(p.tolist()))])
    assert isinstance(answer, SoftEvaluation) and not answer.feasible
    step = np.random.default_rng(0).normal(size=p.shape) * 1e-5
    ahead, behind = (evaluator.loss_and_grad(p + sign * step)[0] for sign in (1, -1))
    assert np.array(answer.gradient) @ step == pytest.approx((ahead - behind) / 2, rel=1e-4)


@pytest.mark.slow
def test_gradients_pay() -> None:
    """At 60 evaluations: better than chance where pairs of sites matter."""
    space = space_of(*[6] * 14)
    found = {}
    for name in ("gradient", "random"):
        costs, budgets, evaluator = problem(space, pairs=0.3)
        best = searched(CONTROLLERS[name](space, costs, budgets, 0), evaluator, 60).best(fidelity="full")
        assert best is not None
        found[name] = best.values["loss"]
    assert found["gradient"] < 0.7 * found["random"]


def test_a_peak_is_held() -> None:
    space = space_of(*[5] * 8)
    costs = PeakCosts(space.n_levels)
    budgets = [Budget("peak_mb", costs.cost([space.dense])[0, 1] * 1e-6 * 0.5)]
    front = searched(CONTROLLERS["gradient"](space, costs, budgets, 0), ToyLoss(space, costs, budgets), 30)
    assert front.best(fidelity="full") is not None

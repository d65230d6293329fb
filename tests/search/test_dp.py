"""Dynamic programming, the knapsack and its bounds against brute force; the bucket error as stated."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autocompress.search import knapsack
from autocompress.search.dp import min_cost, min_largest, min_loss
from autocompress.search.knapsack import Knapsack
from autocompress.search.tables import FloatArray
from autocompress.types import IntArray

Sites = tuple[list[FloatArray], list[IntArray]]


def sites(seed: int, most: int) -> Sites:
    """Up to five sites of up to four levels: losses and costs."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, 5, rng.integers(1, 6))
    return [rng.normal(1, 1, n) for n in counts], [rng.integers(0, most, n) for n in counts]


def least(of: list[FloatArray], within: list[FloatArray], limit: float) -> float | None:
    """Brute force: the least sum of ``of`` where ``within`` sums to at most the limit."""
    choices = itertools.product(*(range(len(v)) for v in of))
    sums = (
        (sum(v[i] for v, i in zip(of, c, strict=True)), sum(w[i] for w, i in zip(within, c, strict=True)))
        for c in choices
    )
    return min((float(a) for a, b in sums if b <= limit), default=None)


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 10**6), st.floats(0, 1.2), st.sampled_from([50, 10**9]), st.sampled_from([7, 10_000]))
def test_least_loss_is_brute_force_up_to_the_bucket_error(seed: int, share: float, most: int, buckets: int) -> None:
    losses, costs = sites(seed, most)
    limit = int(share * sum(int(c.max()) for c in costs))
    found, best = min_loss(losses, costs, limit, buckets), least(losses, costs, limit)
    if best is None:
        assert found is None
        return
    assert found is not None
    assert sum(int(c[i]) for c, i in zip(costs, found, strict=True)) <= limit
    loss = sum(v[i] for v, i in zip(losses, found, strict=True))
    room = min(limit, sum(int(c.max()) for c in costs)) - sum(int(c.min()) for c in costs)
    bucket = max(1, -(-room // buckets))
    if bucket == 1:
        assert loss == pytest.approx(best)
    within = least(losses, costs, limit - len(costs) * bucket)
    assert within is None or loss <= within + 1e-9


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 10**6), st.floats(0, 1.2), st.sampled_from([8, 10_000]))
def test_least_cost_is_brute_force_up_to_the_bucket_error(seed: int, share: float, buckets: int) -> None:
    errors, costs = sites(seed, 1000)
    low, high = (sum(float(f(e)) for e in errors) for f in (np.min, np.max))
    budget = low + share * (high - low)
    found = min_cost(costs, errors, budget, buckets)
    assert found is not None
    assert sum(e[i] for e, i in zip(errors, found, strict=True)) <= budget + 1e-9
    cost = sum(int(c[i]) for c, i in zip(costs, found, strict=True))
    within = least(
        [c.astype(float) for c in costs], errors, budget - len(costs) * min(share, 1) * (high - low) / buckets - 1e-9
    )
    assert within is None or cost <= within
    best = least([c.astype(float) for c in costs], errors, budget + 1e-9)
    assert best is not None
    assert cost >= best


def test_least_cost_on_the_grid_is_exact_and_nothing_fits_below_the_least_error() -> None:
    costs = [np.array([9, 4, 1]), np.array([8, 3, 2])]
    errors = [np.array([0.0, 1.0, 4.0]), np.array([0.0, 2.0, 3.0])]
    assert min_cost(costs, errors, 4.0, 4) == (1, 2)
    assert min_cost(costs, errors, 4.0, 400) == (1, 2)
    assert min_cost(costs, errors, -0.5) is None


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 10**6), st.floats(0, 1.1))
def test_the_largest_loss_is_brute_force(seed: int, share: float) -> None:
    losses, costs = sites(seed, 100)
    limit = int(share * sum(int(c.max()) for c in costs))
    choices = itertools.product(*(range(len(v)) for v in losses))
    fitting = [c for c in choices if sum(int(w[i]) for w, i in zip(costs, c, strict=True)) <= limit]
    best = min((max(float(v[i]) for v, i in zip(losses, c, strict=True)) for c in fitting), default=None)
    found = min_largest(losses, costs, limit)
    assert found is None if best is None else found == pytest.approx(best)


def knapsack_of(seed: int, n_sites: int, n_levels: int, n_budgets: int, share: float) -> Knapsack:
    rng = np.random.default_rng(seed)
    losses = rng.exponential(1, (n_sites, 1)) * np.linspace(0, 1, n_levels) ** 2 + rng.normal(
        0, 0.01, (n_sites, n_levels)
    )
    costs = np.linspace(1, 0.1, n_levels)[:, None] * rng.integers(100, 5000, (n_sites, 1, n_budgets))
    rows = costs.astype(np.int64).reshape(-1, n_budgets)
    limit = (rows[::n_levels].sum(axis=0) * share * rng.uniform(0.9, 1.1, n_budgets)).astype(np.int64)
    return Knapsack(losses.reshape(-1), rows, limit, np.arange(n_sites + 1) * n_levels)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 4), st.floats(0.05, 1.2), st.booleans())
def test_knapsack_is_brute_force_within_the_gap(seed: int, n_budgets: int, share: float, prove: bool) -> None:
    problem = knapsack_of(seed, 5, 4, n_budgets, share)
    plans = np.array(list(itertools.product(range(4), repeat=5)))
    options = plans + problem.offsets[:-1]
    fits = (problem.costs[options].sum(axis=1) <= problem.limit).all(axis=1)
    best = min((float(v) for v in problem.losses[options][fits].sum(axis=1)), default=None)
    found = knapsack.solve(problem, prove=prove)
    if found.plan is None:
        assert best is None or not found.proved
        return
    assert best is not None
    assert problem.fits(problem.options(found.plan))
    assert found.loss == pytest.approx(problem.loss(problem.options(found.plan)))
    assert found.bound <= best + 1e-9
    if found.proved:
        assert found.loss - best <= 1e-4 * abs(found.loss) + 1e-9


def test_a_large_knapsack_is_proved_to_its_gap() -> None:
    problem = knapsack_of(1, 60, 12, 3, 0.5)
    found = knapsack.solve(problem)
    assert found.plan is not None
    assert found.proved
    assert problem.fits(problem.options(found.plan))
    assert found.loss - found.bound <= 1e-4 * found.loss


def test_lists_that_are_cut_short_prove_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knapsack, "SEARCH", (4,))
    monkeypatch.setattr(knapsack, "PROOF", 4)
    problem = knapsack_of(3, 60, 12, 3, 0.5)
    found = knapsack.solve(problem, gap=1e-9)
    assert found.plan is not None
    assert not found.proved
    assert found.bound < found.loss

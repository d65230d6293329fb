"""The table model's optimum against brute force: separable, coupled, lazily given costs, one budget or several."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import ToyCosts, chain, separable, space_of

from autocompress.search import solver as solving
from autocompress.search.solver import Solver, holds, program
from autocompress.search.tables import CostTables, FloatArray, all_plans
from autocompress.types import CostFactor, IntArray, Plan, SearchSpace

KEYS = ("macs", "size_mb", "params")


def brute_force(space: SearchSpace, tables: CostTables, losses: FloatArray, limit: IntArray) -> float | None:
    plans = all_plans(space)
    fits = tables.fits(plans, limit)
    sums = [float(losses[tables.current(p)].sum()) for p, ok in zip(plans, fits, strict=True) if ok]
    return min(sums, default=None)


def random_losses(tables: CostTables, seed: int) -> FloatArray:
    """Rising with the level, noisy, some below zero; dense is zero."""
    rng = np.random.default_rng(seed)
    losses = rng.exponential(1.0, tables.n_options) * tables.level_of + rng.normal(0, 0.1, tables.n_options)
    return np.where(tables.level_of == 0, 0.0, losses)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 3), st.floats(0.15, 1.1), st.sampled_from(["separable", "chain", "lazy"]))
def test_equals_brute_force(seed: int, n_keys: int, share: float, kind: str) -> None:
    levels = [2 + (seed // 7**i) % 3 for i in range(5)]
    space = space_of(*levels)
    costs = (
        separable(levels, seed, KEYS[:n_keys])
        if kind == "separable"
        else chain(levels, seed, KEYS[:n_keys], kind == "lazy")
    )
    tables = CostTables(space, costs, range(n_keys))
    losses = random_losses(tables, seed)
    limit = (tables.cost([space.dense])[0] * share).astype(np.int64)
    expected, found = brute_force(space, tables, losses, limit), Solver(tables).solve(losses, limit)
    if expected is None:
        assert found is None
    else:
        assert found is not None
        assert found.exact
        assert holds(tables.cost([found.plan])[0], limit)
        assert found.loss == pytest.approx(expected, abs=2e-4 * max(1.0, abs(expected)))


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.3, 0.9))
def test_heuristic_is_feasible_and_near_the_optimum(seed: int, share: float) -> None:
    levels = [4] * 6
    space = space_of(*levels)
    tables = CostTables(space, chain(levels, seed, KEYS[:2]), [0, 1])
    losses = np.abs(random_losses(tables, seed))
    limit = (tables.cost([space.dense])[0] * share).astype(np.int64)
    expected, found = brute_force(space, tables, losses, limit), Solver(tables)._heuristic(losses, limit, (), 1e-4)
    assert expected is not None
    assert found is not None
    assert holds(tables.cost([found.plan])[0], limit)
    assert expected - 1e-9 <= found.loss <= 1.25 * expected + 0.05


def test_large_tables_fall_back_and_stay_feasible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(solving, "MAX_JOINT", 3)
    levels = [3, 4, 5, 3]
    space = space_of(*levels)
    tables = CostTables(space, chain(levels, 1), [0])
    limit = (tables.cost([space.dense])[0] // 2).astype(np.int64)
    losses = np.abs(random_losses(tables, 3))
    assert program(tables) is None
    found = Solver(tables).solve(losses, limit)
    assert found is not None
    assert not found.exact
    assert holds(tables.cost([found.plan])[0], limit)


def test_deltas_are_differences_of_costs() -> None:
    levels = [3, 4, 2, 3]
    space = space_of(*levels)
    for costs in (separable(levels, 0, KEYS), chain(levels, 0, KEYS), chain(levels, 0, KEYS, lazy=True)):
        tables = CostTables(space, costs, [2, 0])
        plan: Plan = (1, 3, 0, 2)
        delta = tables.deltas(plan)
        for option, (site, level) in enumerate(zip(tables.site_of, tables.level_of, strict=True)):
            other = (*plan[:site], int(level), *plan[site + 1 :])
            assert (delta[option] == tables.cost([other])[0] - tables.cost([plan])[0]).all()


def test_a_function_over_too_many_levels_to_tabulate() -> None:
    """A peak over all sites has no table; the plan still holds it."""
    levels = [5] * 8
    space = space_of(*levels)

    def peak(rows: IntArray) -> IntArray:
        heights: IntArray = 100 - 20 * rows.min(axis=1, keepdims=True)
        return heights

    costs = ToyCosts(("peak_mb",), [CostFactor("peak", tuple(range(8)), None, peak)], levels)
    tables = CostTables(space, costs, [0])
    losses = np.where(tables.level_of > 0, 1.0 * tables.level_of, 0.0)
    found = Solver(tables).solve(losses, np.array([60]))
    assert found is not None
    assert found.plan == (2,) * 8


def test_solving_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    levels = [8] * 12
    space = space_of(*levels)
    tables = CostTables(space, chain(levels), [0])
    solver, dense = Solver(tables), tables.cost([space.dense])[0]
    for seed in range(4):
        assert solver.solve(np.abs(random_losses(tables, seed)), (dense * 0.4).astype(np.int64)) is not None
    assert capfd.readouterr().out == ""


@pytest.mark.slow
def test_two_hundred_sites_twenty_levels_three_budgets() -> None:
    levels = [20] * 200
    space = space_of(*levels)
    tables = CostTables(space, separable(levels, 1, KEYS), [0, 1, 2])
    losses = np.abs(random_losses(tables, 1))
    limit = (tables.cost([space.dense])[0] * np.array([0.5, 0.52, 0.48])).astype(np.int64)
    found = Solver(tables).solve(losses, limit)
    assert found is not None
    assert holds(tables.cost([found.plan])[0], limit)

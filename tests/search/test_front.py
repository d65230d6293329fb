"""The front against brute force, and hypervolume against optuna's."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from optuna._hypervolume import compute_hypervolume

from autocompress.errors import UsageError
from autocompress.search import ParetoFront
from autocompress.search.front import hypervolume, non_dominated
from autocompress.types import Budget, Evaluation, Fidelity, Objective

AXES = (Objective("loss"), Objective("macs"))
integers = st.integers(0, 9).map(float)


def judged(plan: int, loss: float, macs: float, violation: float = 0.0, fidelity: Fidelity = "full") -> Evaluation:
    return Evaluation((plan,), fidelity, {"loss": loss, "accuracy_drop": 10 * loss}, {"macs": macs}, violation)


def front_of(*evaluations: Evaluation, axes: tuple[Objective, ...] = AXES) -> ParetoFront:
    front = ParetoFront(axes)
    front.add(evaluations)
    return front


@given(st.integers(1, 3).flatmap(lambda m: arrays(float, st.tuples(st.integers(0, 9), st.just(m)), elements=integers)))
def test_hypervolume_equals_counting_unit_cells(points: np.ndarray) -> None:
    m = points.shape[1]
    cells = itertools.product(range(8), repeat=m)
    covered = sum(any((p <= cell).all() for p in points) for cell in cells)
    assert hypervolume(points, [8.0] * m) == covered


@pytest.mark.parametrize("m", [2, 3])
def test_hypervolume_equals_optuna(m: int) -> None:
    rng = np.random.default_rng(m)
    for n in (1, 5, 40):
        points = rng.uniform(0, 1, (n, m))
        assert hypervolume(points, [1.1] * m) == pytest.approx(compute_hypervolume(points, np.full(m, 1.1)))


@given(arrays(float, st.tuples(st.integers(1, 12), st.just(3)), elements=integers))
def test_non_dominated_equals_brute_force(points: np.ndarray) -> None:
    kept = non_dominated(points)
    beaten = [any((q <= p).all() and (q < p).any() for q in points) for p in points]
    expected = {tuple(p) for p, bad in zip(points, beaten, strict=True) if not bad}
    assert {tuple(points[i]) for i in kept} == expected
    assert len(kept) == len(expected)


def test_rungs_do_not_mix_and_the_highest_is_the_default() -> None:
    front = front_of(judged(0, 0.1, 10.0), judged(1, 0.5, 5.0), judged(0, 0.9, 10.0, fidelity="refitted"))
    assert [e.plan for e in front.at("full")] == [(0,), (1,)]
    assert [e.values["loss"] for e in front.at()] == [0.9]


def test_infeasible_and_broken_evaluations_stay_off_the_front() -> None:
    front = front_of(judged(0, 0.1, 10.0, 0.5), judged(1, 0.5, 5.0), judged(2, math.nan, 1.0))
    assert [e.plan for e in front.at()] == [(1,)]
    assert [e.plan for e in front.at(feasible=False)] == [(0,), (1,)]


def test_order_of_adding_does_not_matter() -> None:
    some = [judged(i, loss, macs) for i, (loss, macs) in enumerate([(1, 5), (1, 5), (2, 4), (3, 3), (0, 9)])]
    expected = [e.plan for e in front_of(*some).at()]
    assert expected == [(4,), (0,), (2,), (3,)]
    for order in itertools.permutations(some):
        assert [e.plan for e in front_of(*order).at()] == expected


def test_best_holds_other_budgets_than_those_of_the_search() -> None:
    front = front_of(judged(0, 0.1, 10.0, 1.0), judged(1, 0.5, 5.0), judged(2, 0.7, 4.0))
    best = front.best()
    assert best is not None
    assert best.plan == (1,)
    best = front.best([Budget("macs", 4.5)])
    assert best is not None
    assert best.plan == (2,)
    assert front.best([Budget("macs", 1.0)]) is None


def test_best_of_quality_budgets_is_the_cheapest_that_holds_them() -> None:
    front = front_of(judged(0, 0.0, 10.0), judged(1, 0.05, 5.0), judged(2, 0.7, 4.0))
    best = front.best([Budget("accuracy_drop", 1.0)])
    assert best is not None
    assert best.plan == (1,)


def test_nearest_misses_least_when_nothing_holds() -> None:
    front = front_of(judged(0, 0.1, 10.0, 1.0), judged(1, 0.5, 5.0, 0.2), judged(2, 0.4, 5.0, 0.2))
    assert front.best() is None
    nearest = front.nearest()
    assert nearest is not None
    assert nearest.plan == (2,)
    assert front_of().nearest() is None


def test_knee_is_the_bend_of_the_front() -> None:
    front = front_of(judged(0, 0.0, 10.0), judged(1, 0.1, 3.0), judged(2, 1.0, 2.0), judged(3, 0.05, 9.0))
    knee = front.knee()
    assert knee is not None
    assert knee.plan == (1,)
    assert front_of().knee() is None


def test_maximized_objectives_are_turned() -> None:
    axes = (Objective("loss"), Objective("macs", "maximize"))
    front = front_of(judged(0, 0.0, 1.0), judged(1, 0.5, 2.0), judged(2, 0.6, 1.5), axes=axes)
    assert [e.plan for e in front.at()] == [(0,), (1,)]
    assert front.hypervolume([1.0, 0.0]) == pytest.approx(1.0 * 1.0 + 0.5 * 1.0)


def test_what_cannot_be_asked_is_said() -> None:
    front = front_of(judged(0, 0.1, 10.0))
    with pytest.raises(UsageError, match="one number an objective: 2"):
        front.hypervolume([1.0])
    with pytest.raises(UsageError, match="known: accuracy_drop, loss, macs"):
        front.best([Budget("params", 3)])
    with pytest.raises(UsageError, match="'size_mb' is not among what was judged"):
        front_of(judged(0, 0.1, 10.0), axes=(Objective("size_mb"),)).at()
    with pytest.raises(UsageError, match="1 to 3 objectives, got 4"):
        hypervolume(np.zeros((1, 4)), [1.0] * 4)
    with pytest.raises(UsageError, match="at least one objective"):
        ParetoFront([])

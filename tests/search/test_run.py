"""The loop: counts, stops, keeps what it has."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from toys import ToyLoss, chain, space_of

from autocompress.errors import Cancelled, UsageError
from autocompress.search import CONTROLLERS, ParetoFront, run
from autocompress.types import Budget, Controller, Evaluation, Objective, Query

SPACE = space_of(4, 4, 4, 4, 4, 4, 4)
COSTS = chain(SPACE.n_levels)
BUDGETS = [Budget("macs", COSTS.cost([SPACE.dense])[0, 0] * 0.5)]


def parts(name: str = "random") -> tuple[Controller, ToyLoss, ParetoFront]:
    front = ParetoFront([Objective("loss"), Objective("macs")])
    return CONTROLLERS[name](SPACE, COSTS, BUDGETS, 0), ToyLoss(SPACE, COSTS, BUDGETS), front


@pytest.mark.parametrize("n", [1, 7, 30])
def test_exactly_the_evaluations_asked_for(n: int) -> None:
    controller, evaluator, front = parts()
    ticks: list[tuple[int, int | None]] = []
    outcome = run(controller, evaluator, front, evaluations=n, batch=4, on_progress=lambda a, b: ticks.append((a, b)))
    assert outcome.n == evaluator.n == n == len(front.evaluations("full"))
    assert ticks[-1] == (n, n)
    assert not outcome.finished


@pytest.mark.slow
@pytest.mark.parametrize("name", list(CONTROLLERS))
def test_the_batch_size_does_not_change_the_path(name: str) -> None:
    found, evaluations = [], {"bayes-gp": 15, "amc": 20}.get(name, 40)  # these take long to choose a plan
    for batch in (1, 5, 64):
        controller, evaluator, front = parts(name)
        run(controller, evaluator, front, evaluations=evaluations, batch=batch)
        found.append([(e.plan, e.fidelity) for rung in ("slice", "full") for e in front.evaluations(rung)])
    assert found[0] == found[1] == found[2]


def test_minutes_are_read_from_the_clock() -> None:
    controller, evaluator, front = parts()
    times = iter(range(0, 1000, 10))
    outcome = run(controller, evaluator, front, minutes=1, batch=2, clock=lambda: float(next(times)))
    assert outcome.n == 2 * 5  # looked at before each batch: 10, 20, ... 50 s
    assert outcome.seconds == 70.0


def test_history_is_the_best_feasible_loss_so_far() -> None:
    controller, evaluator, front = parts("evolution")
    outcome = run(controller, evaluator, front, evaluations=100)
    best = front.best(fidelity="full")
    assert best is not None
    assert outcome.history[-1][1] == best.values["loss"]
    losses = [mark.loss for mark in outcome.history]
    assert losses == sorted(losses, reverse=True)
    assert outcome.end.loss == losses[-1] and outcome.end.evaluations == 100
    assert outcome.end.hypervolume is None and 0 < outcome.own_seconds == outcome.end.seconds, "toys cost nothing"


def test_a_front_that_has_something_is_where_history_begins() -> None:
    controller, evaluator, front = parts()
    run(controller, evaluator, front, evaluations=20)
    best = front.best(fidelity="full")
    assert best is not None
    reference = (best.values["loss"] + 1, COSTS.cost([SPACE.dense])[0, 0])
    again = run(parts()[0], evaluator, front, evaluations=20, reference=reference)
    first = again.history[0]
    assert first[:3] == (0, best.values["loss"], 0.0) and len(again.history) == 1, "the same plans are no improvement"
    assert first.hypervolume == again.end.hypervolume == front.hypervolume(reference, "full")


def test_cancelling_keeps_what_was_judged() -> None:
    controller, evaluator, front = parts()
    with pytest.raises(Cancelled, match="after 8 evaluations; they are kept"):
        run(controller, evaluator, front, evaluations=50, batch=4, cancelled=lambda: evaluator.n >= 8)
    assert len(front.evaluations("full")) == 8


def test_ctrl_c_keeps_what_was_judged() -> None:
    controller, evaluator, front = parts()

    def interrupted(queries: Sequence[Query]) -> list[Evaluation]:
        if evaluator.n >= 12:
            raise KeyboardInterrupt
        return evaluator(queries)

    with pytest.raises(Cancelled, match="interrupted after 12 evaluations"):
        run(controller, interrupted, front, evaluations=50, batch=4)
    assert len(front.evaluations("full")) == 12


def test_a_search_needs_an_end() -> None:
    controller, evaluator, front = parts()
    with pytest.raises(UsageError, match="number of evaluations or of minutes"):
        run(controller, evaluator, front)
    with pytest.raises(UsageError, match="positive, got evaluations=0"):
        run(controller, evaluator, front, evaluations=0)

"""Several controllers on one problem: each is charged for all it asks, and an interruption changes nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from toys import ToyLoss, chain, space_of

from autocompress.errors import Cancelled, UnknownName, UsageError
from autocompress.results import RaceEntry
from autocompress.search import CONTROLLERS, ParetoFront, Racer, racers, run, run_race
from autocompress.types import Budget, Evaluation, Objective, Query

SPACE = space_of(4, 4, 4, 4, 4, 4, 4)
COSTS = chain(SPACE.n_levels)
DENSE = float(COSTS.cost([SPACE.dense])[0, 0])
BUDGETS = [Budget("macs", DENSE * 0.5)]
REFERENCE = (3.0, DENSE)


class Paid:
    """A ledger over toys: every plan costs half a second of processor time, when it is paid."""

    def __init__(self) -> None:
        self.toy, self.known = ToyLoss(SPACE, COSTS, BUDGETS, pairs=0.3), dict[Any, Evaluation]()

    def __call__(self, queries: Sequence[Query]) -> list[Evaluation]:
        out = []
        for query in queries:
            key = query.plan, query.fidelity
            cached = key in self.known
            if not cached:
                self.known[key] = replace(self.toy([query])[0], seconds=0.5)
            out.append(replace(self.known[key], cached=cached))
        return out


def race(path: Path, text: str = "exact,evolution,random", evaluator: Paid | None = None, **limits: Any) -> Any:
    front = ParetoFront([Objective("loss"), Objective("macs")])
    entries = run_race(
        racers(text, True),
        lambda name: CONTROLLERS[name](SPACE, COSTS, BUDGETS, 0),
        evaluator or Paid(),
        front,
        reference=REFERENCE,
        path=path,
        **({"evaluations": 40} | limits),
    )
    return entries, front


def untimed(entries: Sequence[RaceEntry]) -> list[Any]:
    return [(e.controller, e.evaluations, [(m.evaluations, m.loss, m.hypervolume) for m in e.history]) for e in entries]


@pytest.mark.slow
def test_each_searches_as_if_alone_and_is_charged_for_all_it_asks(tmp_path: Path) -> None:
    evaluator = Paid()
    entries, front = race(tmp_path / "race.json", evaluator=evaluator)
    assert [e.controller for e in entries] == ["exact", "evolution", "random"]
    assert evaluator.toy.n == len(evaluator.known) < sum(e.evaluations for e in entries), "no plan is paid twice"
    for entry in entries:
        alone = ParetoFront(front.objectives)
        controller = CONTROLLERS[entry.controller](SPACE, COSTS, BUDGETS, 0)
        outcome = run(controller, Paid(), alone, evaluations=40, reference=REFERENCE)
        assert entry.evaluations == outcome.n and entry.end.loss == outcome.end.loss
        assert entry.end.hypervolume == pytest.approx(alone.hypervolume(REFERENCE, "full") / DENSE)
        assert entry.end.seconds == pytest.approx(0.5 * outcome.n + entry.own_seconds, abs=0.01)
        assert [m.evaluations for m in entry.history[:-1]] == [m.evaluations for m in outcome.history]
        losses = [m.loss for m in entry.history if m.loss is not None]
        assert losses == sorted(losses, reverse=True) and entry.found.loss == entry.end.loss
        for rung in ("slice", "full"):
            assert {e.plan for e in alone.evaluations(rung)} <= {e.plan for e in front.evaluations(rung)}


@pytest.mark.slow
def test_interrupted_it_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    unbroken, _ = race(tmp_path / "unbroken.json")
    evaluator, path = Paid(), tmp_path / "race.json"
    with pytest.raises(Cancelled):
        race(path, evaluator=evaluator, cancelled=lambda: len(evaluator.known) > 50)
    paid = evaluator.toy.n
    first = path.read_text()
    entries, front = race(path, evaluator=evaluator)
    assert untimed(entries) == untimed(unbroken) and evaluator.toy.n > paid
    again, other = race(path, evaluator=evaluator)
    assert again == entries, "those who are done keep their times"
    assert other.evaluations("full") == front.evaluations("full")
    assert first.count("controller") in (1, 2)
    path.write_text("[{")
    assert untimed(race(path, evaluator=evaluator)[0]) == untimed(unbroken), "a damaged file costs the times only"


def test_a_race_by_the_clock_is_repeated_by_its_numbers(tmp_path: Path) -> None:
    entries, front = race(tmp_path / "clock.json", evaluations=None, minutes=0.004)
    counted = ",".join(f"{e.controller}:{e.evaluations}" for e in entries)
    again, same = race(tmp_path / "count.json", counted, evaluations=None)
    assert untimed(again) == untimed(entries) and same.evaluations("full") == front.evaluations("full")


@pytest.mark.slow
def test_what_is_known_is_where_everybody_begins(tmp_path: Path) -> None:
    _, front = race(tmp_path / "first.json")
    best = front.best(fidelity="full")
    entries, _ = race(tmp_path / "second.json", "exact,random", known=front.evaluations("full"), evaluations=4)
    assert best is not None
    assert [(e.history[0].evaluations, e.history[0].loss) for e in entries] == [(0, best.values["loss"])] * 2


def test_nothing_within_the_budgets_is_no_number(tmp_path: Path) -> None:
    evaluator = Paid()
    evaluator.toy = ToyLoss(SPACE, COSTS, BUDGETS, broken=lambda plan: True)
    entries, _ = race(tmp_path / "race.json", "exact,random", evaluator=evaluator, evaluations=6)
    assert [(e.end.loss, e.end.hypervolume, e.found) for e in entries] == [(None, 0.0, e.history[0]) for e in entries]
    assert math.isfinite(entries[0].end.seconds)


def test_names() -> None:
    assert racers("evolution", False) == (Racer("evolution"),)
    assert racers(" exact, random ", True) == (Racer("exact"), Racer("random"))
    assert [str(r) for r in racers("exact:3,random:12", True)] == ["exact:3", "random:12"]
    with pytest.raises(UnknownName, match="Unknown controller 'exact:3'"):
        racers("exact:3", False)
    with pytest.raises(UsageError, match="name one or add --race, got ''"):
        racers("", False)

"""A race: several controllers on one problem and one ledger, each with as many evaluations or minutes as the others.

No plan is paid twice, and no controller gains by that: an answer from the ledger is charged with what it cost when it was paid.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter

from autocompress.errors import UsageError
from autocompress.files import write_bytes
from autocompress.results import RaceEntry, RaceMark
from autocompress.search.base import CONTROLLERS
from autocompress.search.front import ParetoFront
from autocompress.search.run import Mark, SearchOutcome, run
from autocompress.types import FIDELITIES, Controller, Evaluation, Evaluator

_ENTRIES = TypeAdapter(tuple[RaceEntry, ...])


@dataclass(frozen=True)
class Racer:
    """A controller by name; ``evaluations``: its own number of them, as the replay of a race by the clock has it."""

    name: str
    evaluations: int | None = None

    def __str__(self) -> str:
        return self.name if self.evaluations is None else f"{self.name}:{self.evaluations}"


def racers(text: str, race: bool) -> tuple[Racer, ...]:
    """``evolution``, or with ``race`` ``evolution,exact`` (or ``evolution:120,exact:87``).

    Raises ``UsageError`` (``UnknownName`` with the nearest spelling) in one sentence.
    """
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if len(parts) != 1 and not race:
        raise UsageError(f"One controller searches, several race: name one or add --race, got {text!r}.")
    found = tuple(_racer(part) if race else Racer(part) for part in parts)
    names = [racer.name for racer in found]
    for name in names:
        CONTROLLERS[name]  # an unknown one raises
        if names.count(name) > 1:
            raise UsageError(f"Each controller races once, got {name!r} {names.count(name)} times in {text!r}.")
    if race and len(found) < 2:
        raise UsageError(
            f"A race takes two controllers or more, as in --controller evolution,exact --race; got {text!r}."
        )
    if len({racer.evaluations is None for racer in found}) > 1:
        raise UsageError(f"In a race all controllers have their own number of evaluations or none has, got {text!r}.")
    return found


def _racer(part: str) -> Racer:
    name, colon, count = part.partition(":")
    if colon and not (count.isdecimal() and int(count) > 0):
        raise UsageError(f"A controller's own number of evaluations is written NAME:N with N 1 or more, got {part!r}.")
    return Racer(name, int(count) if colon else None)


def run_race(
    field: Sequence[Racer],
    build: Callable[[str], Controller],
    evaluator: Evaluator,
    front: ParetoFront,
    *,
    reference: Sequence[float],
    path: Path,
    known: Sequence[Evaluation] = (),
    evaluations: int | None = None,
    minutes: float | None = None,
    batch: int = 8,
    on_progress: Callable[[str, ParetoFront, int, int | None], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> tuple[RaceEntry, ...]:
    """Let each of ``field`` search alone, one after the other; all that they judge comes into ``front``.

    Each has a front of its own, which begins with ``known``; its hypervolume is the share of the box between ``reference``
    (one number an objective of the front, the last one a cost above zero) and the origin of the costs. ``path`` keeps what is
    known of those who are done, so that a race that is interrupted goes on with the next one: the others repeat their
    evaluations from the ledger, not their times. ``on_progress(name, its front, done, total)`` is called after each batch.

    Raises :class:`Cancelled` as ``run`` does.
    """
    done: tuple[RaceEntry, ...] = ()
    with suppress(OSError, ValueError):  # missing or damaged: they race again
        done = _ENTRIES.validate_json(path.read_bytes())
    found: list[RaceEntry] = []
    for racer in field:
        own = ParetoFront(front.objectives)
        own.add(known)
        entry = next((e for e in done if e.controller == racer.name), None)
        limit = max(1, entry.evaluations) if entry else racer.evaluations or evaluations
        outcome = run(
            build(racer.name),
            evaluator,
            own,
            evaluations=limit,
            minutes=None if limit else minutes,
            batch=batch,
            reference=reference,
            on_progress=_told(on_progress, racer.name, own),
            cancelled=cancelled,
        )
        for rung in FIDELITIES:
            front.add(own.evaluations(rung))
        found.append(entry or _entry(racer.name, outcome, reference[-1]))
        write_bytes(path, _ENTRIES.dump_json(tuple(found), indent=1))
    return tuple(found)


def _told(
    on_progress: Callable[[str, ParetoFront, int, int | None], None] | None, name: str, own: ParetoFront
) -> Callable[[int, int | None], None] | None:
    return None if on_progress is None else lambda done, total: on_progress(name, own, done, total)


def _entry(name: str, outcome: SearchOutcome, scale: float) -> RaceEntry:
    history = tuple(_mark(mark, scale) for mark in (*outcome.history, outcome.end))
    return RaceEntry(controller=name, evaluations=outcome.n, own_seconds=round(outcome.own_seconds, 3), history=history)


def _mark(mark: Mark, scale: float) -> RaceMark:
    return RaceMark(
        evaluations=mark.evaluations,
        seconds=round(mark.seconds, 3),
        loss=mark.loss if math.isfinite(mark.loss) else None,
        hypervolume=(mark.hypervolume or 0.0) / scale,
    )

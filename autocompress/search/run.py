"""The loop of a search: ask, evaluate, tell, until the budget of evaluations or minutes is used."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from autocompress.errors import Cancelled, UsageError
from autocompress.search.front import ParetoFront
from autocompress.types import Controller, Evaluation, Evaluator, Query, SoftEvaluation, SoftEvaluator, SoftQuery


class Mark(NamedTuple):
    """Where a search stood: evaluations, best feasible loss of the rung ``full`` (infinite without one), processor seconds (what
    the answers cost when they were paid, and the controller's own), and the front's hypervolume if a reference was given."""

    evaluations: int
    loss: float
    seconds: float
    hypervolume: float | None


@dataclass(frozen=True)
class SearchOutcome:
    """``n`` answered evaluations at all rungs, cached ones too; ``seconds`` of wall time.

    ``history``: one mark an improvement of the best loss, the first at 0 evaluations where the front had a plan before;
    ``end``: the last state. ``own_seconds``: processor time of the controller itself. ``finished``: it had nothing left to ask.
    """

    n: int
    seconds: float
    history: tuple[Mark, ...]
    end: Mark
    own_seconds: float
    finished: bool = False


def answered(evaluator: Evaluator, queries: Sequence[Query]) -> list[Evaluation]:
    """Answers in the order asked; mixtures go to ``loss_and_grad``, and :class:`UsageError` says when there is none."""
    if not any(isinstance(query, SoftQuery) for query in queries):
        return evaluator(queries)
    if not isinstance(evaluator, SoftEvaluator):
        raise UsageError(
            f"This controller descends along gradients, and the evaluator ({type(evaluator).__name__}) has no loss_and_grad(); "
            "take one that judges whole plans: 'evolution', 'exact' or 'random'."
        )
    return [_soft(evaluator, q) if isinstance(q, SoftQuery) else evaluator([q])[0] for q in queries]


def _soft(evaluator: SoftEvaluator, query: SoftQuery) -> SoftEvaluation:
    start = time.process_time()
    loss, gradient = evaluator.loss_and_grad(np.array(query.probabilities, np.float64))
    spent, slope = time.process_time() - start, tuple(gradient.tolist())
    return SoftEvaluation(
        query.plan,
        query.fidelity,
        {"loss": loss},
        {},
        math.inf,
        spent,
        probabilities=query.probabilities,
        gradient=slope,
    )


def run(
    controller: Controller,
    evaluator: Evaluator,
    front: ParetoFront,
    *,
    evaluations: int | None = None,
    minutes: float | None = None,
    batch: int = 8,
    reference: Sequence[float] | None = None,
    on_progress: Callable[[int, int | None], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> SearchOutcome:
    """Search until ``evaluations`` are answered, ``minutes`` are over or the controller is done; ``front`` is filled.

    Every answer counts, at any rung, from the ledger and of a mixture too, so that a resumed run follows the same path. Time is
    looked at between batches. ``reference``: one number an objective, for the hypervolumes of the history.
    ``on_progress(done, total)`` is called after each batch.

    Raises :class:`Cancelled` on Ctrl-C or when ``cancelled()`` holds, with everything told so far in ``front``.
    """
    if evaluations is None and minutes is None:
        raise UsageError("A search needs an end: give a number of evaluations or of minutes.")
    if (evaluations is not None and evaluations < 1) or (minutes is not None and not minutes > 0) or batch < 1:
        raise UsageError(
            f"Search limits are positive, got evaluations={evaluations}, minutes={minutes}, batch={batch}."
        )
    start, n, finished = clock(), 0, False
    before = front.best(fidelity="full")
    best, paid, own = before.values["loss"] if before else math.inf, 0.0, 0.0

    def mark(evaluations: int) -> Mark:
        volume = front.hypervolume(reference, "full") if reference is not None else None
        return Mark(evaluations, best, paid + own, volume)

    history = [mark(0)] if before else []
    try:
        while (evaluations is None or n < evaluations) and (minutes is None or clock() - start < 60 * minutes):
            if cancelled is not None and cancelled():
                raise Cancelled(f"The search was cancelled after {n} evaluations; they are kept.")
            thinking = time.process_time()
            queries = controller.ask(batch if evaluations is None else min(batch, evaluations - n))
            own += time.process_time() - thinking
            if not queries:
                finished = True
                break
            answers = answered(evaluator, queries)
            for i, answer in enumerate(answers, n + 1):
                if not isinstance(answer, SoftEvaluation):
                    front.add([answer])
                paid += answer.seconds
                if answer.fidelity == "full" and answer.feasible and answer.values["loss"] < best:
                    best = answer.values["loss"]
                    history.append(mark(i))
            thinking = time.process_time()
            controller.tell(answers)
            own += time.process_time() - thinking
            n += len(answers)
            if on_progress is not None:
                on_progress(n, evaluations)
    except KeyboardInterrupt:
        raise Cancelled(f"The search was interrupted after {n} evaluations; they are kept.") from None
    return SearchOutcome(n, clock() - start, tuple(history), mark(n), own, finished)

"""The loop of a search: ask, evaluate, tell, until the budget of evaluations or minutes is used."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from autocompress.errors import Cancelled, UsageError
from autocompress.search.front import ParetoFront
from autocompress.types import Controller, Evaluation, Evaluator, Query, SoftEvaluation, SoftEvaluator, SoftQuery


@dataclass(frozen=True)
class SearchOutcome:
    """``n`` answered evaluations at all rungs, cached ones too; ``seconds`` of wall time.

    ``history``: (evaluations so far, best feasible loss of the rung ``full`` so far), one row an improvement.
    ``finished``: the controller had nothing left to ask.
    """

    n: int
    seconds: float
    history: tuple[tuple[int, float], ...]
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
    start = time.perf_counter()
    loss, gradient = evaluator.loss_and_grad(np.array(query.probabilities, np.float64))
    spent, slope = time.perf_counter() - start, tuple(gradient.tolist())
    return SoftEvaluation(
        query.plan, query.fidelity, {"loss": loss}, {}, math.inf, spent, False, query.probabilities, slope
    )


def run(
    controller: Controller,
    evaluator: Evaluator,
    front: ParetoFront,
    *,
    evaluations: int | None = None,
    minutes: float | None = None,
    batch: int = 8,
    on_progress: Callable[[int, int | None], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> SearchOutcome:
    """Search until ``evaluations`` are answered, ``minutes`` are over or the controller is done; ``front`` is filled.

    Every answer counts, at any rung, from the ledger and of a mixture too, so that a resumed run follows the same path. Time is
    looked at between batches. ``on_progress(done, total)`` is called after each batch.

    Raises :class:`Cancelled` on Ctrl-C or when ``cancelled()`` holds, with everything told so far in ``front``.
    """
    if evaluations is None and minutes is None:
        raise UsageError("A search needs an end: give a number of evaluations or of minutes.")
    if (evaluations is not None and evaluations < 1) or (minutes is not None and not minutes > 0) or batch < 1:
        raise UsageError(
            f"Search limits are positive, got evaluations={evaluations}, minutes={minutes}, batch={batch}."
        )
    start, n, best, finished = clock(), 0, math.inf, False
    history: list[tuple[int, float]] = []
    try:
        while (evaluations is None or n < evaluations) and (minutes is None or clock() - start < 60 * minutes):
            if cancelled is not None and cancelled():
                raise Cancelled(f"The search was cancelled after {n} evaluations; they are kept.")
            queries = controller.ask(batch if evaluations is None else min(batch, evaluations - n))
            if not queries:
                finished = True
                break
            answers = answered(evaluator, queries)
            front.add([answer for answer in answers if not isinstance(answer, SoftEvaluation)])
            controller.tell(answers)
            for i, answer in enumerate(answers, n + 1):
                if answer.fidelity == "full" and answer.feasible and answer.values["loss"] < best:
                    best = answer.values["loss"]
                    history.append((i, best))
            n += len(answers)
            if on_progress is not None:
                on_progress(n, evaluations)
    except KeyboardInterrupt:
        raise Cancelled(f"The search was interrupted after {n} evaluations; they are kept.") from None
    return SearchOutcome(n, clock() - start, tuple(history), finished)

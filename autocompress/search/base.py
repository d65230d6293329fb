"""What all controllers share: ask and tell with their checks, one seeded generator, state as JSON.

An algorithm is written as a coroutine, :meth:`BaseController._search`: it yields a group of queries and is sent their
evaluations. ``ask`` hands a group out in portions, so the path of a search depends neither on the size of the portions nor on
how many evaluations it will be given: a longer search begins with the shorter one. The state is what was told; loading it
replays the coroutine, without solving anything again. A group holds plans, or mixtures (:class:`SoftQuery`), never both.
"""

from __future__ import annotations

import itertools
import math
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from typing import Any, cast

from autocompress.errors import UsageError
from autocompress.registry import Registry
from autocompress.search.tables import CostTables, Limits, cost_limits
from autocompress.types import (
    FIDELITIES,
    METRICS,
    Budget,
    Controller,
    Costs,
    Evaluation,
    Fidelity,
    LevelErrors,
    Plan,
    Query,
    SearchSpace,
    SoftEvaluation,
    SoftQuery,
)

Asking = Generator[list[Query], list[Evaluation], Any]
Judged = Generator[list[Query], list[Evaluation], list[Evaluation]]

CONTROLLERS: Registry[Callable[[SearchSpace, Costs, Sequence[Budget], int], Controller]] = Registry("controller")
"""Name of ``--controller`` -> what builds it from ``(space, costs, budgets, seed)``."""


def fitness(evaluation: Evaluation) -> float:
    """The loss, infinite where it is missing or not a number."""
    loss = evaluation.values.get("loss", math.nan)
    return loss if math.isfinite(loss) else math.inf


class BaseController(ABC):
    """A controller; subclasses write ``_search``. ``budgets`` are absolute, quality budgets come back as violations."""

    def __init__(self, space: SearchSpace, costs: Costs, budgets: Sequence[Budget], seed: int = 0) -> None:
        self.space, self.costs, self.budgets, self.seed = space, costs, tuple(budgets), seed
        self.limits: Limits = cost_limits(space, costs, budgets)
        self.tables = CostTables(space, costs, self.limits.columns)
        self.rng = random.Random(seed)
        self.seen: dict[tuple[Fidelity, Plan], Evaluation] = {}
        self.known: tuple[Evaluation, ...] = ()
        """What :meth:`learn` was told, for controllers that make use of it; what is in it may be asked all the same."""
        self.errors: LevelErrors = {}
        """What is known of single levels; the same holds."""
        self._slopes: list[SoftEvaluation] = []
        self._decisions: list[list[int] | None] = []
        self._recalled: list[list[int] | None] = []
        self._asked: list[Query] = []
        self._group: list[Query] = []
        self._answers: list[Evaluation] = []
        self._told = self._over = False
        self._steps: Asking = self._search()

    @abstractmethod
    def _search(self) -> Asking:
        """The algorithm: yields groups of queries, is sent their evaluations, returns when the search is over."""

    def ask(self, n: int) -> list[Query]:
        """At most ``n`` plans to be judged next; an empty list says that the search is over."""
        if n < 1:
            raise UsageError(f"ask() takes a positive number of plans, got {n}.")
        if self._asked:
            raise UsageError(f"{len(self._asked)} plans were asked and not told; call tell() before the next ask().")
        while len(self._answers) == len(self._group) and not self._over:
            try:
                # the first send of a coroutine must be None
                sent = cast(list[Evaluation], self._answers if self._told else None)
                self._group, self._answers = self._steps.send(sent), []
                self._told = True
            except StopIteration:
                self._group, self._answers, self._over = [], [], True
        start = len(self._answers)
        self._asked = self._group[start : start + n]
        return list(self._asked)

    def learn(self, known: Sequence[Evaluation], errors: LevelErrors | None = None) -> None:
        """What earlier searches on the same model have judged, and the output errors of levels.

        Raises ``UsageError`` after the first :meth:`ask`.
        """
        if self._told or self._over:
            raise UsageError("learn() comes before the first ask(); this search has begun.")
        self.known, self.errors = tuple(known), dict(errors or {})

    def tell(self, evaluations: Sequence[Evaluation]) -> None:
        """The answers to the last :meth:`ask`, in its order. A loss that is not a number counts as infeasible."""
        if not _answers(self._asked, evaluations):
            raise UsageError(
                f"tell() takes the answers to the last ask() in its order: {len(self._asked)} plans were asked, "
                f"got {len(evaluations)} or other ones."
            )
        for evaluation in evaluations:
            if isinstance(evaluation, SoftEvaluation):
                self._slopes.append(evaluation)
            else:
                self.seen[evaluation.fidelity, evaluation.plan] = evaluation
        self._answers.extend(evaluations)
        self._asked = []

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on in another process, as JSON values: what was asked and not told is asked again."""
        return {
            "space": self.space.hash,
            "budgets": [str(budget) for budget in self.budgets],
            "seed": self.seed,
            "rng": _rng_to_json(self.rng),
            "known": [_to_json(e) for e in self.known],
            "errors": {str(site): list(row) for site, row in self.errors.items()},
            "told": [_to_json(e) for e in self.seen.values()],
            "slopes": [[*_to_json(e), list(e.probabilities), list(e.gradient)] for e in self._slopes],
            "decisions": list(self._decisions),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken; the controller was built with the same space, budgets and seed."""
        for name, mine in (
            ("space", self.space.hash),
            ("budgets", [str(b) for b in self.budgets]),
            ("seed", self.seed),
        ):
            if state[name] != mine:
                raise UsageError(
                    f"This search state has {name} {state[name]!r}, the controller {mine!r}; build it alike."
                )
        told = [_from_json(item) for item in state["told"]]
        self.known = tuple(_from_json(item) for item in state.get("known", []))
        self.errors = {int(site): tuple(row) for site, row in state.get("errors", {}).items()}
        slopes: list[Evaluation] = [_soft_from_json(item) for item in state["slopes"]]
        self._restart()
        self._recalled = list(state["decisions"])
        while told or slopes:
            queries = self.ask(max(len(told), 1))
            pool = slopes if queries and isinstance(queries[0], SoftQuery) else told
            answers = pool[: len(queries)]
            del pool[: len(queries)]
            if not queries or not _answers(queries, answers):
                raise UsageError("This search state was made by another controller or version; start the search anew.")
            self.tell(answers)
        if not self._recalled and _rng_to_json(self.rng) == state["rng"]:
            return
        self.ask(1)  # the state was taken after an ask whose answers were not told
        self._asked = []
        if self._recalled or _rng_to_json(self.rng) != state["rng"]:
            raise UsageError("This search state was made by another controller or version; start the search anew.")

    def _restart(self) -> None:
        self.rng = random.Random(self.seed)
        self.seen, self._slopes, self._decisions, self._recalled = {}, [], [], []
        self._asked, self._group, self._answers = [], [], []
        self._told = self._over = False
        self._steps = self._search()

    def _decide(self, solve: Callable[[], Plan | None]) -> Plan | None:
        """The plan that ``solve`` finds; kept in the state, so that a replay does not compute it again."""
        plan = self._recalled.pop(0) if self._recalled else solve()
        self._decisions.append(None if plan is None else list(plan))
        return None if plan is None else tuple(plan)

    def _quality_miss(self, evaluation: Evaluation) -> float:
        """Violation of the quality budgets alone."""
        quality = [b for b in self.budgets if METRICS[b.metric].quality]
        return min(sum(b.violation(evaluation.values.get(b.metric, math.nan)) for b in quality), 1e9)

    def _finite(self, fidelity: Fidelity) -> list[Evaluation]:
        """What was told of a rung, without broken plans."""
        return [e for (rung, _), e in self.seen.items() if rung == fidelity and math.isfinite(fitness(e))]

    def _judge(self, plans: Sequence[Plan], fidelity: Fidelity, parts: Iterable[int] = itertools.repeat(0)) -> Judged:
        """Evaluations of plans in effect; those already told are not asked again, on whatever slice they were judged.

        ``parts``: the slices that new plans are judged on, in turn. Full queries within the limits name the budget.
        """
        plans = [self.space.effective(plan) for plan in plans]
        fresh = [p for p in dict.fromkeys(plans) if (fidelity, p) not in self.seen]
        if fresh:
            budget = next((i for i in self.limits.budgets if i >= 0), None) if fidelity == "full" else None
            within = self.tables.fits(fresh, self.limits.limit)
            places = itertools.islice(parts, len(fresh))
            yield [
                Query(plan, fidelity, budget if ok else None, part)
                for plan, ok, part in zip(fresh, within, places, strict=True)
            ]
        return [self.seen[fidelity, p] for p in plans]


def _answers(queries: Sequence[Query], evaluations: Sequence[Evaluation]) -> bool:
    """Whether evaluations are those of the queries, in their order."""
    asked = [(q.plan, q.fidelity, q.part, q.probabilities if isinstance(q, SoftQuery) else None) for q in queries]
    return asked == [
        (e.plan, e.fidelity, e.part, e.probabilities if isinstance(e, SoftEvaluation) else None) for e in evaluations
    ]


def _rng_to_json(rng: random.Random) -> list[Any]:
    version, words, gauss = rng.getstate()
    return [version, list(words), gauss]


def _number(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


def _to_json(e: Evaluation) -> list[Any]:
    values, costs = ({k: _number(v) for k, v in numbers.items()} for numbers in (e.values, e.costs))
    return [
        list(e.plan),
        e.fidelity,
        values,
        costs,
        _number(e.violation),
        e.seconds,
        e.part,
        [_number(loss) for loss in e.slices],
    ]


def _from_json(item: Sequence[Any]) -> Evaluation:
    plan, fidelity, values, costs, violation, seconds, part, slices = item
    if fidelity not in FIDELITIES:
        raise UsageError(f"This search state has an unknown fidelity {fidelity!r}; start the search anew.")
    values, costs = ({k: float(v) for k, v in numbers.items()} for numbers in (values, costs))
    number = float(violation)
    return Evaluation(
        tuple(plan), fidelity, values, costs, number, seconds, part=part, slices=tuple(float(loss) for loss in slices)
    )


def _soft_from_json(item: Sequence[Any]) -> SoftEvaluation:
    *known, probabilities, gradient = item
    e = _from_json(known)
    return SoftEvaluation(
        e.plan,
        e.fidelity,
        e.values,
        e.costs,
        e.violation,
        e.seconds,
        probabilities=tuple(probabilities),
        gradient=tuple(gradient),
    )

"""Plan -> evaluation: the only place that counts, and the only cache.

Quality is measured on the search split: ``slice`` takes a part of it, the first if not another, ``full`` all of it,
``refitted`` all of it after ``finish``, ``recovered`` after distillation. What is measured goes to the ledger under a key of
everything that decides it (model, data, database, plan, rung, threads, batch size); costs and violations are recomputed, so that
a new budget or device re-ranks old evaluations without running a model.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from autocompress.costs import CostModel
from autocompress.database import LevelDatabase
from autocompress.deploy import deploy
from autocompress.errors import UsageError
from autocompress.finish import finish
from autocompress.fitness import LAYOUT, Teacher, Told, fitness, forward, images_last, slice_of, weights_last
from autocompress.ledger import NoLedger
from autocompress.relaxed import FloatArray, Relaxed
from autocompress.stitched import Stitched
from autocompress.tasks import Split
from autocompress.types import FIDELITIES, METRICS, Budget, Evaluation, Fidelity, Ledger, Plan, Query, digest
from autocompress.where import Where

VALUES = ("loss", "metric", "accuracy_drop")
FORM = "losses by slice"
"""What an entry of the ledger holds; part of its key."""
STITCHED: tuple[Fidelity, ...] = ("slice", "full")
"""Rungs that need no model of their own."""
SOFT = "soft"
"""What mixtures of levels are counted under."""
Measured = dict[str, Any]
"""``VALUES`` and ``seconds``, and at ``full`` the losses on all ``slices``; ``None`` where a value is not a number."""


class Measurer:
    """Runs plans of one database and measures how they answer; what a worker process has, too.

    ``build``: ``(plan, rung) -> deployed model``; by default stitched, or finished for ``refitted``, nothing for ``recovered``
    (the pipeline gives one that knows distillation and keeps models on disk). Stitched rungs need no model of their own (see
    :mod:`~autocompress.stitched`), unless ``plain``; values are the same. ``limit``: bytes of activations to keep. ``where``: the
    device, and the precision of the stitched rungs; the original and finished models always run in float32.
    """

    def __init__(
        self,
        database: LevelDatabase,
        build: Callable[[Plan, Fidelity], nn.Module] | None = None,
        *,
        plain: bool = False,
        limit: int | None = None,
        where: Where | None = None,
    ) -> None:
        self.database, self.task = database, database.task
        self.build = build or self._build
        self.where, self.slice = where or Where(), slice_of(self.task)
        few, many = self.slice, len(self.task.search)
        largest = max((math.prod(v.shape[1:]) for v in database.graph.values.values() if v.shape), default=1)
        self.batch = self.where.batch(few, many, largest) if self.where.gpu else self.task.batch_size
        self.stitched = None if plain else Stitched(database, few, many, limit, self.where)
        self._teacher: Teacher | None = None
        self._reference: Tensor | None = None
        self._relaxed: Relaxed | None = None

    def __call__(self, plan: Plan, fidelity: Fidelity, part: int = 0) -> Measured:
        """The values of a plan at a rung, and the processor seconds it took (not those of the original's outputs).

        ``part``: which slice the rung ``slice`` takes.
        """
        [found] = self.many([Query(plan, fidelity, part=part)])
        return found

    def many(self, queries: Sequence[Query]) -> Iterator[Measured]:
        """The same for several plans, in order; a GPU gets them all before the first answer is waited for."""
        if not self.where.gpu:
            yield from (self._read(query, *self._ask(query)) for query in queries)
            return
        asked = [self._ask(query) for query in queries]
        yield from (self._read(query, *given) for query, given in zip(queries, asked, strict=True))

    def _ask(self, query: Query) -> tuple[Told, float]:
        teacher, start = self._original(), time.process_time()
        span = self.span(query.part) if query.fidelity == "slice" else range(len(self.task.search))
        where = self.where if query.fidelity in STITCHED else self.where.exact
        with where.running():
            told = teacher.compare(self._outputs(query.plan, query.fidelity, span), span.start)
        return told, time.process_time() - start

    def _read(self, query: Query, told: Told, seconds: float) -> Measured:
        start = time.process_time()
        loss, score, original, slices = self._original().judgement(told)
        drop = round(self.task.drop_of(original - score), 9)  # 3 of 300 are 1 point, no more
        found = {"loss": loss, "metric": self.task.metric_of(score), "accuracy_drop": drop}
        values: Measured = {name: _number(value) for name, value in found.items()}
        if query.fidelity == "full":
            values["slices"] = [_number(value) for value in slices]
        return {**values, "seconds": seconds + time.process_time() - start}

    @property
    def parts(self) -> int:
        """How many slices the search split has."""
        return max(1, len(self.task.search) // self.slice)

    def span(self, part: int) -> range:
        """The examples of a slice. Raises ``UsageError`` where there is none."""
        if not 0 <= part < self.parts:
            raise UsageError(f"The search split has {self.parts} slices, numbered from 0; there is no slice {part}.")
        return range(part * self.slice, min((part + 1) * self.slice, len(self.task.search)))

    def slope(self, probabilities: FloatArray) -> dict[str, Any]:
        """``loss`` of a mixture of levels on the slice, its ``gradient``  # (n_options,), and ``seconds``; JSON values.

        A loss that is not a number is ``None``, and has a gradient of zeros.
        """
        teacher, start = self._original(), time.process_time()
        if self._relaxed is None:
            self._relaxed = Relaxed(self.database)
        split, put = self.task.search.take(self.slice), self.where.exact.put

        def batches() -> Iterator[tuple[Tensor, Callable[[Tensor], Tensor]]]:
            start = 0
            for inputs, _ in self.task.batches(split, self.task.batch_size):
                share = len(inputs) / len(split)
                yield inputs, lambda out, at=start, share=share: share * teacher.loss(at, put(out)).cpu()  # type: ignore[misc]
                start += len(inputs)

        loss, gradient = self._relaxed.loss_and_grad(probabilities, batches())
        if not math.isfinite(loss):
            gradient = np.zeros_like(gradient)
        seconds = time.process_time() - start
        return {"loss": loss if math.isfinite(loss) else None, "gradient": gradient.tolist(), "seconds": seconds}

    def reference(self) -> Tensor:
        """The original's outputs on the search split, computed once."""
        if self._reference is None:
            self._reference = torch.cat([outputs.cpu() for outputs in self._dense()])
        return self._reference

    def _original(self) -> Teacher:
        if self._teacher is None:
            with self.where.exact.running():
                self._teacher = Teacher(self.task, self.task.search, self._dense())
        return self._teacher

    def _dense(self) -> Iterator[Tensor]:
        dense, split = self.database.space.dense, self.task.search
        if self.stitched is not None and self.where.precision == "float32":
            return self.stitched.outputs(dense, split, self.batch)
        return self._run(self._build(dense, "full"), split)

    def _outputs(self, plan: Plan, fidelity: Fidelity, span: range) -> Iterator[Tensor]:
        split = self.task.search
        if self.stitched is not None and fidelity in STITCHED:
            return self.stitched.outputs(plan, split, self.batch, span)
        return self._run(self.build(plan, fidelity), split if len(span) == len(split) else split.span(span))

    def _run(self, model: nn.Module, split: Split) -> Iterator[Tensor]:
        put = self.where.exact.put
        model = weights_last(put(copy.deepcopy(model)) if self.where.gpu else model)
        for inputs, _ in self.task.batches(split, self.batch):
            with torch.inference_mode():
                outputs = model(images_last(put(inputs)))
            yield outputs

    def _build(self, plan: Plan, fidelity: Fidelity) -> nn.Module:
        if fidelity == "recovered":
            raise UsageError("The rung 'recovered' needs a recovery; evaluate up to 'refitted', or give one.")
        return deploy(finish(self.database, plan) if fidelity == "refitted" else self.database.stitch(plan))


class Workers(Protocol):
    """Other processes with a :class:`Measurer` each. ``width``: how many plans they judge at once; ``rungs``: at which rungs."""

    width: int
    rungs: tuple[Fidelity, ...]

    def measure(self, queries: Sequence[Query]) -> Iterator[tuple[int, Measured]]:
        """(index of a query, its values), as they are done."""
        ...


class ModelEvaluator:
    """Judges plans of one database; ``budgets`` are absolute.

    ``measurer``: what runs models here; ``workers``: who else does. ``recovery_key()`` is what else decides the rung
    ``recovered``. ``counts`` has evaluations by rung that ran a model (cached ones left out), ``seconds`` their processor time;
    under ``SOFT`` those of mixtures, each about three runs of the slice. ``model`` is the key of all that decides an evaluation
    but the plan and its rung.
    """

    def __init__(
        self,
        database: LevelDatabase,
        costs: CostModel,
        budgets: Sequence[Budget],
        ledger: Ledger | None = None,
        *,
        threads: int = 1,
        measurer: Measurer | None = None,
        recovery_key: Callable[[], object] = lambda: None,
    ) -> None:
        self.database, self.costs, self.budgets = database, costs, tuple(budgets)
        self.ledger = ledger if ledger is not None else NoLedger()
        self.measurer = measurer or Measurer(database)
        self.workers: Workers | None = None
        how = [database.key, self.measurer.slice, self.measurer.batch, LAYOUT, FORM, threads, *self.measurer.where.key]
        self.model = digest(how)
        self.counts: dict[str, int] = {}
        self.seconds: dict[str, float] = {}
        self.recovery_key = recovery_key

    def __call__(self, queries: Sequence[Query]) -> list[Evaluation]:
        """Evaluations in ask order; what the ledger does not know is measured once."""
        keys = [None if q.fidelity == "table" else self.key(q.plan, q.fidelity, q.part) for q in queries]
        known = {key: self.ledger.get(key) for key in keys if key is not None}
        missing = {key: q for key, q in zip(keys, queries, strict=True) if key is not None and known[key] is None}
        names = list(missing)
        for index, values in self._measured(list(missing.values())):
            self._count(missing[names[index]].fidelity, float(values["seconds"] or 0.0))
            self.ledger.put(names[index], {**values, **self._asked(missing[names[index]])})
            known[names[index]] = dict(values)
        fresh = set(names)
        found = []
        for key, query in zip(keys, queries, strict=True):
            found.append(self._evaluation(query, known[key] if key else None, key not in fresh))
            fresh.discard(key or "")
        return found

    def known(self, entries: Iterable[tuple[str, Mapping[str, Any]]] | None = None) -> list[Evaluation]:
        """All evaluations of the ledger (or among ``entries``) that this evaluator would answer from it, by rung and plan.

        Costs and violations are today's. What was measured on other data or with other threads is left out, as are plans
        that this space does not have, and distilled ones with another recovery.
        """
        found = []
        for key, entry in self.ledger.items() if entries is None else entries:
            query = self._query(entry)
            if query is not None and self.key(query.plan, query.fidelity, query.part) == key:
                found.append(self._evaluation(query, entry, True))
        return sorted(found, key=lambda e: (FIDELITIES.index(e.fidelity), e.plan, e.part))

    def _asked(self, query: Query) -> dict[str, Any]:
        place = {"part": query.part} if query.part else {}
        return {"plan": self.database.space.plan_to_json(query.plan), "fidelity": query.fidelity, **place}

    def _query(self, entry: Mapping[str, Any]) -> Query | None:
        """What an entry answers, or ``None`` where it does not say so or this space lacks it."""
        if "plan" not in entry or entry.get("fidelity") not in FIDELITIES:
            return None
        try:
            return Query(
                self.database.space.plan_from_json(entry["plan"]), entry["fidelity"], part=entry.get("part", 0)
            )
        except UsageError:
            return None

    def loss_and_grad(self, probabilities: FloatArray) -> tuple[float, FloatArray]:
        """Loss of a mixture of levels on the slice, and its gradient; see :class:`~autocompress.relaxed.Relaxed`.

        ``probabilities``, gradient  # (n_options,). Runs in this process and is kept in the ledger. Raises
        :class:`UsageError` where the probabilities are not those of this space.
        """
        n = sum(self.database.space.n_levels)
        if probabilities.shape != (n,) or not np.isfinite(probabilities).all():
            raise UsageError(
                f"A mixture has a finite probability for each of the {n} options, got {probabilities.shape}."
            )
        key = digest([self.model, self.database.space.hash, SOFT, probabilities.tolist()])
        found = self.ledger.get(key)
        if found is None:
            found = self.measurer.slope(probabilities)
            self._count(SOFT, found["seconds"])
            self.ledger.put(key, found)
        loss = math.nan if found["loss"] is None else float(found["loss"])
        return loss, np.array(found["gradient"], np.float64)

    @property
    def width(self) -> int:
        """How many plans are judged at the same time."""
        return self.workers.width if self.workers is not None else 1

    def key(self, plan: Plan, fidelity: Fidelity, part: int = 0) -> str:
        """The ledger's key of a plan at a rung, on one slice."""
        base = digest([self.model, self.recovery_key()]) if fidelity == "recovered" else self.model
        return digest([base, self.database.space.plan_to_json(plan), fidelity, *([part] if part else [])])

    def _measured(self, queries: list[Query]) -> Iterator[tuple[int, Measured]]:
        """Values of queries by index: workers begin, what they cannot do is done here."""
        away = [i for i, q in enumerate(queries) if self.workers is not None and q.fidelity in self.workers.rungs]
        if self.workers is not None and away:
            for index, values in self.workers.measure([queries[i] for i in away]):
                yield away[index], values
        here = [i for i in range(len(queries)) if i not in away]
        yield from zip(here, self.measurer.many([queries[i] for i in here]), strict=True)

    def _count(self, fidelity: str, seconds: float) -> None:
        self.counts[fidelity] = self.counts.get(fidelity, 0) + 1
        self.seconds[fidelity] = self.seconds.get(fidelity, 0.0) + seconds

    def _evaluation(self, query: Query, known: Mapping[str, Any] | None, cached: bool) -> Evaluation:
        costs = self.costs.in_units(query.plan)
        if known is None:
            return Evaluation(query.plan, query.fidelity, {}, costs, self.violation(costs, {}), part=query.part)
        values = {name: float(known[name]) if known[name] is not None else math.nan for name in VALUES}
        violation, seconds = self.violation(costs, values), float(known["seconds"])
        slices = tuple(math.nan if loss is None else float(loss) for loss in known.get("slices", ()))
        return Evaluation(query.plan, query.fidelity, values, costs, violation, seconds, cached, query.part, slices)

    def priced(self, evaluation: Evaluation) -> Evaluation:
        """The same with today's costs, and the violation that they make."""
        costs = self.costs.in_units(evaluation.plan)
        return replace(evaluation, costs=costs, violation=self.violation(costs, dict(evaluation.values)))

    def violation(self, costs: dict[str, float], values: dict[str, float]) -> float:
        """Sum of the budgets' relative violations; quality budgets count only once quality is known."""
        total = 0.0
        for budget in self.budgets:
            if METRICS[budget.metric].quality:
                total += budget.violation(values[budget.metric]) if budget.metric in values else 0.0
            else:
                total += budget.violation(costs[budget.key])
        return total


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


__all__ = ["Measured", "Measurer", "ModelEvaluator", "NoLedger", "Workers", "fitness", "forward"]

"""Plan -> evaluation: the only place that counts, and the only cache.

Quality is measured on the search split: ``slice`` takes its first examples, ``full`` all of it, ``refitted`` all of it after
``finish``, ``recovered`` after distillation. What is measured goes to the ledger under a key of everything that decides it
(model, data, database, plan, rung, threads, batch size); costs and violations are recomputed, so that a new budget or device
re-ranks old evaluations without running a model.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from autocompress.costs import CostModel
from autocompress.database import LevelDatabase
from autocompress.deploy import deploy
from autocompress.errors import UsageError
from autocompress.finish import finish
from autocompress.tasks import Split, Task
from autocompress.types import METRICS, Budget, Evaluation, Fidelity, Ledger, Plan, Query, digest

KL_NUMBERS = 2**23
"""Logits that are compared at once, in float64: 64 MB a temporary."""


class NoLedger:
    """Remembers nothing beyond this process."""

    def __init__(self) -> None:
        self._kept: dict[str, dict[str, Any]] = {}

    def get(self, key: str) -> dict[str, Any] | None:
        return self._kept.get(key)

    def put(self, key: str, value: Any) -> None:
        self._kept[key] = dict(value)


class ModelEvaluator:
    """Judges plans of one database; ``budgets`` are absolute.

    ``build``: ``(plan, rung) -> deployed model``; by default stitched, or finished for ``refitted``, and nothing for
    ``recovered`` (the pipeline gives one that knows distillation and keeps models on disk). ``recovery_key()`` is what else
    decides that rung. ``counts`` has evaluations by rung that ran a model (cached ones left out), ``seconds`` their time.
    """

    def __init__(
        self,
        database: LevelDatabase,
        costs: CostModel,
        budgets: Sequence[Budget],
        ledger: Ledger | None = None,
        *,
        threads: int = 1,
        build: Callable[[Plan, Fidelity], nn.Module] | None = None,
        recovery_key: Callable[[], object] = lambda: None,
    ) -> None:
        self.database, self.costs, self.budgets = database, costs, tuple(budgets)
        self.ledger = ledger if ledger is not None else NoLedger()
        self.task: Task = database.task
        self.build = build or self._build
        self.counts: dict[Fidelity, int] = {}
        self.seconds: dict[Fidelity, float] = {}
        self._key = digest([database.key, self.task.slice_size, self.task.batch_size, threads])
        self.recovery_key = recovery_key
        self._reference: Tensor | None = None

    def __call__(self, queries: Sequence[Query]) -> list[Evaluation]:
        """Evaluations in ask order."""
        return [self._one(query) for query in queries]

    def key(self, plan: Plan, fidelity: Fidelity) -> str:
        """The ledger's key of a plan at a rung."""
        base = digest([self._key, self.recovery_key()]) if fidelity == "recovered" else self._key
        return digest([base, self.database.space.plan_to_json(plan), fidelity])

    def _build(self, plan: Plan, fidelity: Fidelity) -> nn.Module:
        if fidelity == "recovered":
            raise UsageError("The rung 'recovered' needs a recovery; evaluate up to 'refitted', or give one.")
        return deploy(finish(self.database, plan) if fidelity == "refitted" else self.database.stitch(plan))

    def _one(self, query: Query) -> Evaluation:
        costs = self.costs.in_units(query.plan)
        if query.fidelity == "table":
            return Evaluation(query.plan, "table", {}, costs, self.violation(costs, {}))
        key = self.key(query.plan, query.fidelity)
        known = self.ledger.get(key)
        cached = known is not None
        if known is None:
            start = time.perf_counter()
            known = {**self._measure(query.plan, query.fidelity)}
            known["seconds"] = seconds = time.perf_counter() - start
            self.ledger.put(key, known)
            self.counts[query.fidelity] = self.counts.get(query.fidelity, 0) + 1
            self.seconds[query.fidelity] = self.seconds.get(query.fidelity, 0.0) + seconds
        values = {name: float(known[name]) if known[name] is not None else math.nan for name in VALUES}
        return Evaluation(
            query.plan, query.fidelity, values, costs, self.violation(costs, values), float(known["seconds"]), cached
        )

    def violation(self, costs: dict[str, float], values: dict[str, float]) -> float:
        """Sum of the budgets' relative violations; quality budgets count only once quality is known."""
        total = 0.0
        for budget in self.budgets:
            if METRICS[budget.metric].quality:
                total += budget.violation(values[budget.metric]) if budget.metric in values else 0.0
            else:
                total += budget.violation(costs[budget.key])
        return total

    def _measure(self, plan: Plan, fidelity: Fidelity) -> dict[str, float | None]:
        split = self.task.search.take(self.task.slice_size) if fidelity == "slice" else self.task.search
        outputs = forward(self.build(plan, fidelity), self.task, split)
        reference = self.reference()[: len(outputs)]
        loss = fitness(self.task, outputs, reference, split.targets)
        before, after = (float(self.task.score(o, split.targets).double().mean()) for o in (reference, outputs))
        drop = round(self.task.drop_of(before - after), 9)  # 3 of 300 are 1 point, no more
        found = {"loss": loss, "metric": self.task.metric_of(after), "accuracy_drop": drop}
        return {name: value if math.isfinite(value) else None for name, value in found.items()}

    def reference(self) -> Tensor:
        """The original's outputs on the search split, computed once."""
        if self._reference is None:
            self._reference = forward(
                deploy(self.database.stitch(self.database.space.dense)), self.task, self.task.search
            )
        return self._reference


VALUES = ("loss", "metric", "accuracy_drop")


def forward(model: nn.Module, task: Task, split: Split) -> Tensor:
    """Outputs of a model on a split.  # (n, ...)"""
    with torch.inference_mode():
        return torch.cat([model(inputs) for inputs, _ in task.batches(split, task.batch_size)])


def fitness(task: Task, outputs: Tensor, reference: Tensor, targets: Tensor) -> float:
    """What the search minimizes: KL(original || compressed) in nats, squared error, or the task's own loss."""
    if task.fitness == "kl":
        return _kl(reference, outputs, task.class_axis)
    if task.fitness == "mse":
        return float((outputs.double() - reference.double()).pow(2).mean())
    return float(np.float64(task.loss(outputs, targets)))


def _kl(reference: Tensor, outputs: Tensor, axis: int) -> float:
    """Mean over all rows of logits, in nats; a few examples at a time, as float64 logits of a vocabulary are large."""
    n = max(1, KL_NUMBERS // max(1, outputs[:1].numel()))
    total = 0.0
    for p, q in zip(reference.split(n), outputs.split(n), strict=True):
        log_p, log_q = functional.log_softmax(p.double(), axis), functional.log_softmax(q.double(), axis)
        total += float((log_p.exp() * (log_p - log_q)).sum())
    return total * outputs.shape[axis] / outputs.numel()

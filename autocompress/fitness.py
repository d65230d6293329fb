"""From a model's outputs to numbers: how far from the original it answers, and how well.

Everything goes batch by batch, so that outputs over large vocabularies are never held together.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from autocompress.tasks import Split, Task

VOCABULARY = 2048
"""With more classes, only the original's ``TOP_K`` most likely ones are stored and compared one by one."""
TOP_K = 512
LAYOUT = "channels-last"
"""Images are run channels-last: on CPUs faster by 1.2 to 1.4 times, and equal up to rounding. Part of the ledger's keys."""

Weights = TypeVar("Weights", nn.Module, Tensor)


def slice_of(task: Task) -> int:
    """Examples of the rung ``slice``: whole batches of the search split, so that a plan's slice is a part of its full run."""
    return -(-task.slice_size // task.batch_size) * task.batch_size


def images_last(inputs: Tensor) -> Tensor:
    """Images channels-last, other inputs as they are."""
    return inputs.contiguous(memory_format=torch.channels_last) if inputs.ndim == 4 else inputs


def weights_last(weights: Weights) -> Weights:
    """A model or tensor whose weights of convolutions lie as :func:`images_last` has their inputs; a model is changed itself."""
    if isinstance(weights, Tensor):
        return images_last(weights)
    for tensor in [*weights.parameters(), *weights.buffers()]:
        tensor.data = images_last(tensor.data)
    return weights


def forward(model: nn.Module, task: Task, split: Split) -> Tensor:
    """Outputs of a model on a split.  # (n, ...)"""
    with torch.inference_mode():
        return torch.cat([model(images_last(inputs)) for inputs, _ in task.batches(split, task.batch_size)])


def fitness(task: Task, outputs: Tensor, reference: Tensor, targets: Tensor) -> float:
    """What the search minimizes: KL(original || compressed) in nats, squared error, or the task's own loss."""
    if task.fitness == "kl":
        batches = zip(*(torch.split(o, task.batch_size) for o in (reference, outputs)), strict=True)
        return float(torch.cat([Soft.of(logits(task, p)).kl(logits(task, q)) for p, q in batches]).mean())
    if task.fitness == "mse":
        return float((outputs.double() - reference.double()).pow(2).mean())
    return float(np.float64(task.loss(outputs, targets)))


def logits(task: Task, outputs: Tensor) -> Tensor:
    """A model's outputs with the classes last."""
    return outputs.movedim(task.class_axis, -1)


class Judgement(NamedTuple):
    """Loss and mean score of a model, the original's score on the same examples, and the loss on each slice of them."""

    loss: float
    score: float
    original: float
    slices: tuple[float, ...]


@dataclass(frozen=True, eq=False)
class Soft:
    """The original's log-probabilities.  # (n, ..., classes) float64"""

    log_p: Tensor

    @classmethod
    def of(cls, logits: Tensor) -> Soft:
        return cls(functional.log_softmax(logits.double(), -1))

    def take(self, rows: slice) -> Soft:
        """The same of some examples."""
        return Soft(self.log_p[rows])

    def kl(self, logits: Tensor) -> Tensor:
        """KL(original || these logits) in nats.  # (n, ...)"""
        log_q = functional.log_softmax(logits.double(), -1)
        return (self.log_p.exp() * (self.log_p - log_q)).sum(-1)


@dataclass(frozen=True, eq=False)
class TopK:
    """The original's ``k`` most likely classes, and the mass of the rest as one class more.

    ``log_p``: (n, ..., k) float32; ``log_rest``: (n, ...) float32; ``index``: (n, ..., k) int32. The KL between the coarsened
    distributions is at most the true one (data processing), and short of it by exactly ``p_rest KL(p | rest || q | rest)``.
    """

    log_p: Tensor
    log_rest: Tensor
    index: Tensor

    @classmethod
    def of(cls, logits: Tensor, k: int = TOP_K) -> TopK:
        index = logits.topk(k, -1).indices
        return cls(*_coarse(logits, index), index.to(torch.int32))

    def take(self, rows: slice) -> TopK:
        """The same of some examples."""
        return TopK(self.log_p[rows], self.log_rest[rows], self.index[rows])

    def kl(self, logits: Tensor) -> Tensor:
        """KL(original || these logits) in nats over ``k + 1`` classes.  # (n, ...)"""
        log_q, log_q_rest = (part.double() for part in _coarse(logits, self.index.long()))
        log_p, log_p_rest = self.log_p.double(), self.log_rest.double()
        return (log_p.exp() * (log_p - log_q)).sum(-1) + log_p_rest.exp() * (log_p_rest - log_q_rest)


def _coarse(logits: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the classes in ``index``, and of all others together.  # (n, ..., k), (n, ...)"""
    logits = logits.float()
    total = logits.logsumexp(-1, keepdim=True)
    rest = logits.scatter(-1, index, -torch.inf).logsumexp(-1)
    return logits.gather(-1, index) - total, rest - total.squeeze(-1)


def _joined(parts: Sequence[Soft | TopK]) -> Soft | TopK:
    """Those of consecutive examples as one."""
    fields = [torch.cat([vars(part)[name] for part in parts]) for name in vars(parts[0])]
    return type(parts[0])(*fields)


class Told(NamedTuple):
    """What a model answered on examples from ``start`` on, where it ran: not waited for yet.

    ``scores``: (n,); ``said``: divergence of each example from the original, (n, ...), or the answers themselves.
    """

    start: int
    scores: Tensor
    said: Tensor


class Teacher:
    """What is kept of the original to judge others by, where its outputs are: its answers, and its score of each example."""

    def __init__(self, task: Task, split: Split, outputs: Iterable[Tensor]) -> None:
        self.task, self.split = task, split
        soft: list[Soft | TopK] = []
        plain: list[Tensor] = []
        scores: list[Tensor] = []
        start = 0
        for answers in outputs:
            if task.fitness == "kl":
                given = logits(task, answers)
                soft.append(TopK.of(given) if given.shape[-1] > VOCABULARY else Soft.of(given))
            else:
                plain.append(answers)
            scores.append(self._scores(start, answers))
            start += len(answers)
        self.soft = _joined(soft) if soft else None
        self.outputs = torch.cat(plain) if plain else None
        self.scores = torch.cat(scores).cpu()

    def compare(self, outputs: Iterable[Tensor], start: int = 0) -> Told:
        """``outputs``: batches of answers on the split's examples from ``start`` on."""
        scores: list[Tensor] = []
        said: list[Tensor] = []
        at = start
        for answers in outputs:
            scores.append(self._scores(at, answers))
            soft = self.soft and self.soft.take(slice(at, at + len(answers)))
            said.append(soft.kl(logits(self.task, answers)) if soft else answers)
            at += len(answers)
        return Told(start, torch.cat(scores), torch.cat(said))

    def judgement(self, told: Told) -> Judgement:
        """Loss, mean score, the original's on the same examples, and losses by slice; waits for the answers."""
        found, start = told.scores.cpu(), told.start
        n, size = len(found), slice_of(self.task)
        said = told.said.cpu() if self.soft else told.said.float()

        def loss(a: int, b: int) -> float:
            if self.outputs is None:
                return float(said[a:b].mean())
            rows = slice(start + a, start + min(b, n))
            targets = self.split.targets[rows].to(said.device)
            return fitness(self.task, said[a:b], self.outputs[rows], targets)

        slices = tuple(loss(a, a + size) for a in range(0, max(n // size, 1) * size, size))
        whole = slices[0] if n <= size else loss(0, n)
        original = self.scores[start : start + n]
        return Judgement(whole, float(found.double().mean()), float(original.double().mean()), slices)

    def judge(self, outputs: Iterable[Tensor], start: int = 0) -> Judgement:
        """:meth:`judgement` of :meth:`compare`."""
        return self.judgement(self.compare(outputs, start))

    def loss(self, start: int, outputs: Tensor) -> Tensor:
        """The loss on a batch from ``start`` on alone, with a gradient; a mean over its examples.  # ()"""
        rows = slice(start, start + len(outputs))
        if self.soft is not None:
            return self.soft.take(rows).kl(logits(self.task, outputs)).mean()
        if self.outputs is not None and self.task.fitness == "mse":
            return (outputs.double() - self.outputs[rows].double()).pow(2).mean()
        return self.task.loss(outputs, self._targets(start, outputs))

    def _scores(self, start: int, outputs: Tensor) -> Tensor:
        return self.task.score(outputs.float(), self._targets(start, outputs))

    def _targets(self, start: int, outputs: Tensor) -> Tensor:
        return self.split.targets[start : start + len(outputs)].to(outputs.device)

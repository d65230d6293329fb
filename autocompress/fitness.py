"""From a model's outputs to numbers: how far from the original it answers, and how well.

Everything goes batch by batch, so that outputs over large vocabularies are never held together.
"""

from __future__ import annotations

from collections.abc import Iterable
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


class Told(NamedTuple):
    """What a model answered on the split's batches from the ``first`` on, where it ran: not waited for yet.

    ``scores``: (n,); ``said``: divergence of each example from the original, (n, ...), or the answers themselves.
    """

    first: int
    scores: Tensor
    said: Tensor


class Teacher:
    """What is kept of the original to judge others by: its answers' batches, and its score of each example.

    ``batch``: examples in a batch of answers, the task's unless said. Everything stays on the device of the outputs.
    """

    def __init__(self, task: Task, split: Split, outputs: Iterable[Tensor], batch: int | None = None) -> None:
        self.task, self.split, self.batch = task, split, batch or task.batch_size
        self._soft: list[Soft | TopK] = []
        self._outputs: list[Tensor] = []
        scores: list[Tensor] = []
        for i, answers in enumerate(outputs):
            if task.fitness == "kl":
                given = logits(task, answers)
                self._soft.append(TopK.of(given) if given.shape[-1] > VOCABULARY else Soft.of(given))
            else:
                self._outputs.append(answers)
            scores.append(self._scores(i, answers))
        self.scores = torch.cat(scores).cpu()

    def compare(self, outputs: Iterable[Tensor], first: int = 0) -> Told:
        """``outputs``: the split's batches from the ``first`` on."""
        scores: list[Tensor] = []
        said: list[Tensor] = []
        for i, batch in enumerate(outputs, first):
            scores.append(self._scores(i, batch))
            said.append(self._soft[i].kl(logits(self.task, batch)) if self.task.fitness == "kl" else batch)
        return Told(first, torch.cat(scores), torch.cat(said))

    def judgement(self, told: Told) -> Judgement:
        """Loss, mean score, the original's on the same examples, and losses by slice; waits for the answers."""
        found, start = told.scores.cpu(), told.first * self.batch
        n, size = len(found), slice_of(self.task)
        if self.task.fitness == "kl":
            said = told.said.cpu()

            def loss(a: int, b: int) -> float:
                return float(said[a:b].mean())

        else:
            reference = torch.cat(self._outputs[told.first :])[:n]
            targets = self.split.targets[start : start + n].to(reference.device)

            def loss(a: int, b: int) -> float:
                return fitness(self.task, told.said[a:b].float(), reference[a:b], targets[a:b])

        slices = tuple(loss(a, a + size) for a in range(0, max(n // size, 1) * size, size))
        whole = slices[0] if n <= size else loss(0, n)
        original = self.scores[start : start + n]
        return Judgement(whole, float(found.double().mean()), float(original.double().mean()), slices)

    def judge(self, outputs: Iterable[Tensor], first: int = 0) -> Judgement:
        """:meth:`judgement` of :meth:`compare`."""
        return self.judgement(self.compare(outputs, first))

    def loss(self, i: int, outputs: Tensor) -> Tensor:
        """The loss on batch ``i`` alone, with a gradient; a mean over its examples.  # ()"""
        if self.task.fitness == "kl":
            return self._soft[i].kl(logits(self.task, outputs)).mean()
        if self.task.fitness == "mse":
            return (outputs.double() - self._outputs[i].double()).pow(2).mean()
        return self.task.loss(outputs, self._targets(i, outputs))

    def _scores(self, i: int, outputs: Tensor) -> Tensor:
        return self.task.score(outputs.float(), self._targets(i, outputs))

    def _targets(self, i: int, outputs: Tensor) -> Tensor:
        start = i * self.batch
        return self.split.targets[start : start + len(outputs)].to(outputs.device)

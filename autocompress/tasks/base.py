"""What is compressed and how it is judged: a model, four splits of data and a metric.

Knows nothing of files, devices or compression.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class Split:
    """Examples and their targets, as they are stored; ``Task.prepare`` makes them ready for the model.

    ``inputs``: (n, ...), often uint8 to save memory. ``targets``: (n, ...).
    """

    inputs: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.inputs)

    def take(self, n: int) -> Split:
        """The first ``n`` examples (all, when there are fewer)."""
        return self.span(range(n))

    def span(self, of: range) -> Split:
        """A stretch of the examples."""
        return Split(self.inputs[of.start : of.stop], self.targets[of.start : of.stop])


def top1(outputs: Tensor, targets: Tensor) -> Tensor:
    """1 where the largest logit of (n, classes, ...) is the target of (n, ...), else 0; mean per example.  # (n,)"""
    return (outputs.argmax(1) == targets).float().reshape(len(targets), -1).mean(1)


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of logits (n, classes, ...) in nats, a scalar."""
    return nn.functional.cross_entropy(outputs, targets)


def as_float(inputs: Tensor) -> Tensor:
    """uint8 becomes float, everything else stays as it is."""
    return inputs.float() if inputs.dtype == torch.uint8 else inputs


@dataclass(frozen=True, eq=False)
class Task:
    """A trained model with what is needed to compress and to judge it. The search never sees ``report``.

    - ``model``: float32 on the CPU, one input tensor, one output tensor; it is put into eval mode.
    - ``calibration``: statistics of activations; ``search``: judges candidates, shares no example with ``train``.
    - ``report``: judges the outcome; ``train``: recovery, ``None`` turns it off.
    - ``score``: (outputs, targets) -> one score per example (n,), whose mean is the metric, so that two models can be
      compared pair by pair. ``points`` turns a difference of the metric into points.
    - ``log_scores``: scores are logarithms and the metric is the exponential of their mean (perplexity from nats a token);
      a point then is a hundredth of the *relative* change of the metric.
    - ``loss``: (outputs, targets) -> scalar, for training.
    - ``prepare``: stored inputs (n, ...) -> model inputs; called per batch, row by row independent.
    - ``augment``: (prepared inputs, generator) -> inputs of the same shape, for training.
    - ``fitness``: what the search minimizes: ``kl`` to the original's outputs (class logits along ``class_axis``), ``mse``
      to the original's outputs, or the task's ``loss``.
    - ``withheld``: families of methods that are not offered on this task, each with its reason.
    - ``batch_size``: examples a forward pass; ``slice_size``: examples of the search split that the rung ``slice`` takes.
    """

    name: str
    model: nn.Module
    calibration: Split
    search: Split
    report: Split
    train: Split | None = None
    metric_name: str = "accuracy"
    higher_is_better: bool = True
    points: float = 100.0
    score: Callable[[Tensor, Tensor], Tensor] = top1
    loss: Callable[[Tensor, Tensor], Tensor] = cross_entropy
    prepare: Callable[[Tensor], Tensor] = as_float
    augment: Callable[[Tensor, torch.Generator], Tensor] | None = None
    fitness: Literal["kl", "loss", "mse"] = "kl"
    log_scores: bool = False
    class_axis: int = 1
    batch_size: int = 128
    slice_size: int = 256
    withheld: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if isinstance(self.model, nn.Module):  # anything else is refused by check(), in words
            self.model.eval()

    @property
    def splits(self) -> dict[str, Split]:
        """Splits by name; ``train`` only where there is one."""
        named = {"calibration": self.calibration, "search": self.search, "report": self.report, "train": self.train}
        return {name: split for name, split in named.items() if split is not None}

    @property
    def example_inputs(self) -> Tensor:
        """The first calibration input, prepared, as a batch of one.  # (1, ...)"""
        return self.inputs(self.calibration.take(1))

    def inputs(self, stored: Split | Tensor) -> Tensor:
        """Model inputs of a whole split or of stored inputs.  # (n, ...)"""
        return self.prepare(stored.inputs if isinstance(stored, Split) else stored)

    def batches(self, split: Split, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Prepared inputs and targets in order; the last batch may be smaller."""
        for start in range(0, len(split), batch_size):
            end = start + batch_size
            yield self.prepare(split.inputs[start:end]), split.targets[start:end]

    def metric(self, outputs: Tensor, targets: Tensor) -> float:
        """The metric over all examples, not in points."""
        return self.metric_of(float(self.score(outputs, targets).double().mean()))

    def metric_of(self, mean_score: float) -> float:
        """Mean score -> metric; it rises with the score, so the ends of an interval may be given as well."""
        return _exp(mean_score) if self.log_scores else mean_score

    def drop_of(self, difference: float) -> float:
        """Mean score of the original minus that of the compressed -> drop in points, positive when worse; monotone."""
        if not self.log_scores:
            return difference * self.points * (1 if self.higher_is_better else -1)
        return self.points * (1 - _exp(-difference)) if self.higher_is_better else self.points * (_exp(-difference) - 1)

    @functools.cached_property
    def hash(self) -> str:
        """16 hex digits over weights, code and data: equal in every process, computed once.

        The code is the source of the model's own classes and of the callables, without what these call in turn.
        """
        sha = hashlib.sha256()
        settings: tuple[object, ...] = (self.metric_name, self.higher_is_better, self.points, self.fitness)
        if self.log_scores or self.class_axis != 1:
            settings += (self.log_scores, self.class_axis)
        classes = {type(module) for module in self.model.modules()}
        own = [c for c in classes if c.__module__.partition(".")[0] != "torch"]
        code = sorted(_source(c) for c in own) + [_source(f) for f in (self.score, self.loss, self.prepare)]
        sha.update("\0".join([type(self.model).__qualname__, str(self.model), repr(settings), *code]).encode())
        for name, tensor in self.model.state_dict().items():
            _update(sha, name, tensor)
        for name, split in self.splits.items():
            _update(sha, f"{name}.inputs", split.inputs)
            _update(sha, f"{name}.targets", split.targets)
        _update(sha, "example", self.example_inputs)  # closures and partials of ``prepare`` show here
        return sha.hexdigest()[:16]


def _exp(value: float) -> float:
    """``math.exp`` that ends in infinity."""
    return math.exp(value) if value < 700 else math.inf


def _update(sha: hashlib._Hash, name: str, tensor: Tensor) -> None:
    array = tensor.detach().cpu().contiguous()
    sha.update(f"{name} {array.dtype} {tuple(array.shape)}\0".encode())
    sha.update(tensor_bytes(array))


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor of any dtype, without a copy."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _source(thing: object) -> str:
    """Source text where there is some, else the qualified name: never an address, which changes by process."""
    while isinstance(thing, functools.partial):
        thing = thing.func
    try:
        return inspect.getsource(thing)  # type: ignore[arg-type]
    except (TypeError, OSError):
        return getattr(thing, "__qualname__", type(thing).__qualname__)

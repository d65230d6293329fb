"""Refuses a task that cannot be compressed, in one sentence, before any time is spent on it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from autocompress.errors import TaskError
from autocompress.tasks.base import Split, Task, tensor_bytes

T = TypeVar("T")

MAX_OVERLAP = 0.01
"""Fraction of the report split that may also occur elsewhere; public data sets hold a few duplicates."""


def check(task: Task) -> None:
    """Raise ``TaskError`` with one sentence for the first law that ``task`` breaks.

    Weights float32, finite and on the CPU; splits of tensors, not empty, inputs and targets equally long; the report split
    shares at most 1 % of its examples with any other; model, score and fitness work on the first examples.
    """
    _check_model(task)
    _check_splits(task)
    _check_report(task)
    _check_example(task)


def _check_model(task: Task) -> None:
    if not isinstance(task.model, nn.Module):
        raise TaskError(f"Task {task.name!r} needs a torch.nn.Module as its model, got {type(task.model).__name__}.")
    for name, tensor in [*task.model.named_parameters(), *task.model.named_buffers()]:
        if tensor.device.type != "cpu":
            raise TaskError(
                f"Task {task.name!r} needs its model on the CPU, {name!r} is on {tensor.device}; call model.cpu()."
            )
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            raise TaskError(
                f"Weights must be float32: {name!r} of task {task.name!r} is {str(tensor.dtype).removeprefix('torch.')}; "
                "call model.float() where the task is made."
            )
        if not bool(torch.isfinite(tensor).all()):
            bad = int((~torch.isfinite(tensor)).sum())
            raise TaskError(
                f"Weights must be finite: {bad} of the {tensor.numel()} values in {name!r} of task {task.name!r} "
                "are NaN or infinite; load a sound checkpoint."
            )


def _check_splits(task: Task) -> None:
    for name, split in task.splits.items():
        if not (isinstance(split, Split) and isinstance(split.inputs, Tensor) and isinstance(split.targets, Tensor)):
            raise TaskError(f"The {name} split of task {task.name!r} must be a Split of two tensors (inputs, targets).")
        if split.inputs.ndim == 0 or split.targets.ndim == 0 or len(split.inputs) != len(split.targets):
            raise TaskError(
                f"A split needs one target per input: the {name} split of task {task.name!r} has inputs "
                f"{tuple(split.inputs.shape)} and targets {tuple(split.targets.shape)}."
            )
        if len(split) == 0:
            raise TaskError(f"The {name} split of task {task.name!r} is empty; give it at least one example.")


def _rows(split: Split) -> list[bytes]:
    """One digest per stored example."""
    inputs = split.inputs.detach().contiguous()
    return [hashlib.blake2b(tensor_bytes(row), digest_size=16).digest() for row in inputs]


def _check_report(task: Task) -> None:
    report = _rows(task.report)
    for name, split in task.splits.items():
        if name == "report":
            continue
        seen = set(_rows(split))
        shared = sum(row in seen for row in report)
        if shared > MAX_OVERLAP * len(report):
            raise TaskError(
                f"The report split is never seen by the search: {shared} of the {len(report)} report examples of task "
                f"{task.name!r} also occur in its {name} split; make the splits disjoint."
            )


def _try(task: Task, what: str, call: Callable[[], T]) -> T:
    try:
        return call()
    except Exception as error:
        raised = f"{type(error).__name__} on the first calibration examples"
        reason = (str(error).strip() or "no message").splitlines()[0]
        raise TaskError(f"The {what} of task {task.name!r} raised {raised}: {reason}") from error


@torch.no_grad()
def _check_example(task: Task) -> None:
    few = task.calibration.take(2)
    inputs = _try(task, "prepare function", lambda: task.inputs(few))
    outputs = _try(task, "model", lambda: task.model(inputs))
    if not isinstance(outputs, Tensor):
        raise TaskError(
            f"The model of task {task.name!r} must return one tensor, got {type(outputs).__name__}; "
            "wrap it in a module that does."
        )
    if outputs.ndim == 0 or len(outputs) != len(few):
        raise TaskError(
            f"The model of task {task.name!r} must return one row per example, "
            f"got shape {tuple(outputs.shape)} for {len(few)}."
        )
    if not bool(torch.isfinite(outputs).all()):
        raise TaskError(
            f"The model of task {task.name!r} returns NaN or infinite outputs on its first calibration examples."
        )
    if task.fitness not in ("kl", "loss", "mse"):
        raise TaskError(f"The fitness of a task is 'kl', 'loss' or 'mse', got {task.fitness!r} in task {task.name!r}.")
    axis = task.class_axis
    if task.fitness == "kl" and (axis >= outputs.ndim or axis % outputs.ndim == 0 or outputs.shape[axis] < 2):
        raise TaskError(
            f"Fitness 'kl' needs class logits along axis {axis} (class_axis), the model of task {task.name!r} returns shape "
            f"{tuple(outputs.shape)}; choose fitness='mse' or fitness='loss'."
        )
    scores = _try(task, "score", lambda: task.score(outputs, few.targets))
    if not isinstance(scores, Tensor) or scores.shape != (len(few),):
        shape = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise TaskError(
            f"The score of task {task.name!r} must give one number per example, shape ({len(few)},), got {shape}."
        )
    loss = _try(task, "loss", lambda: task.loss(outputs, few.targets))
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not bool(torch.isfinite(loss).all()):
        raise TaskError(f"The loss of task {task.name!r} must be one finite number per batch, got {loss!r}.")

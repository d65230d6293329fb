"""Recovery: a live model learns to answer like the original (Hinton et al. 2015), or trains on the task's own loss.

Formats stay on while training (straight-through), batch norm is live, and the best checkpoint on the search split wins,
the start among them: recovery never makes a plan worse by its own measure.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from autocompress.deploy import deploy
from autocompress.errors import Cancelled, TaskError
from autocompress.evaluate import fitness, forward
from autocompress.tasks import Task


@dataclass(frozen=True)
class Recovery:
    """How to train. ``steps`` of ``batch_size`` examples decide the outcome, not the clock, so that a run repeats.

    ``learning_rate``: ``None`` takes 0.002 for 100 steps and grows with their square root: a refitted model is near a minimum,
    and short training at a rate fit for long training ends worse than it began. ``temperature`` softens both
    distributions; ``label_weight`` mixes in the task's loss on true labels.
    """

    steps: int = 300
    batch_size: int = 128
    learning_rate: float | None = None
    momentum: float = 0.9
    weight_decay: float = 1e-4
    temperature: float = 2.0
    label_weight: float = 0.1
    checks: int = 4
    seed: int = 0


@torch.enable_grad()
def recover(
    live: fx.GraphModule,
    original: nn.Module,
    task: Task,
    settings: Recovery,
    reference: Tensor,
    progress: Callable[[int, int], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> fx.GraphModule:
    """The distilled live model; ``live`` itself stays as it is. ``reference``: the original's outputs on the search split.

    Raises :class:`TaskError` if the task has no training data.
    """
    if task.train is None:
        raise TaskError(
            f"Task {task.name!r} has no training data, so there is nothing to recover with; give it a train split."
        )
    model = copy.deepcopy(live)
    best, best_loss = live, _judge(live, task, reference)
    parameters = [p for p in model.parameters() if p.is_floating_point()]
    for parameter in parameters:
        parameter.requires_grad_(True)
    rate = settings.learning_rate or min(0.02, 0.002 * math.sqrt(settings.steps / 100))
    optimizer = torch.optim.SGD(parameters, rate, settings.momentum, weight_decay=settings.weight_decay, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, settings.steps, pct_start=0.15)
    generator = torch.Generator().manual_seed(settings.seed)
    original.eval()
    every = max(1, settings.steps // settings.checks)
    for step in range(settings.steps):
        if cancelled and cancelled():
            raise Cancelled("Stopped while distilling; everything evaluated so far is kept.")
        index = torch.randint(len(task.train), (settings.batch_size,), generator=generator)
        inputs, targets = task.prepare(task.train.inputs[index]), task.train.targets[index]
        if task.augment is not None:
            inputs = task.augment(inputs, generator)
        model.train()
        loss = _loss(task, model(inputs), original, inputs, targets, settings)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, 5.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % every == 0 or step + 1 == settings.steps:
            found = _judge(model, task, reference)
            if found < best_loss:
                best, best_loss = copy.deepcopy(model), found
            if progress:
                progress(step + 1, settings.steps)
    for parameter in best.parameters():
        parameter.requires_grad_(False)
    return best.eval()


def _judge(model: fx.GraphModule, task: Task, reference: Tensor) -> float:
    model.eval()
    with torch.no_grad():
        value = fitness(task, forward(deploy(model), task, task.search), reference, task.search.targets)
    return value if math.isfinite(value) else math.inf


def _loss(
    task: Task, outputs: Tensor, original: nn.Module, inputs: Tensor, targets: Tensor, settings: Recovery
) -> Tensor:
    if task.fitness == "loss":
        return task.loss(outputs, targets)
    with torch.no_grad():
        taught = original(inputs)
    if task.fitness == "mse":
        return functional.mse_loss(outputs, taught)
    t, axis = settings.temperature, task.class_axis
    soft = functional.kl_div(
        functional.log_softmax(outputs / t, axis).movedim(axis, -1).flatten(0, -2),
        functional.log_softmax(taught / t, axis).movedim(axis, -1).flatten(0, -2),
        reduction="batchmean",  # over all rows of logits
        log_target=True,
    )
    return soft * t * t + settings.label_weight * task.loss(outputs, targets)

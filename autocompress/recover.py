"""Recovery: a live model learns to answer like the original (Hinton et al. 2015), or trains on the task's own loss.

Formats stay on while training (straight-through), and batch norms keep the statistics that the refit gave them: those of a
batch are noise that short training does not make good (ResNet-56 at half its MACs: they double the loss). The best checkpoint
on the search split wins, running averages of the weights (Polyak & Juditsky 1992) and the start among them: recovery never makes
a plan worse by its own measure.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, fx, nn
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel

from autocompress.deploy import deploy
from autocompress.errors import Cancelled, TaskError
from autocompress.fitness import fitness, forward, logits
from autocompress.tasks import Task
from autocompress.tasks.augment import images_first

MAX_RATE, MIN_RATE = 0.02, 1e-6
RATE_SHARE, RATE_BATCHES = 0.25, 4
CLIP = 5.0


@dataclass(frozen=True)
class Recovery:
    """How to train. ``steps`` of ``batch_size`` examples decide the outcome, not the clock, so that a run repeats.

    ``learning_rate``: ``None`` takes it from the loss and its gradients at the start, see :func:`polyak_rate`.
    ``temperature`` softens both distributions; ``label_weight`` mixes in the task's loss on true labels.
    """

    steps: int = 300
    batch_size: int = 128
    learning_rate: float | None = None
    momentum: float = 0.9
    weight_decay: float = 1e-4
    temperature: float = 1.0
    label_weight: float = 0.0
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
    train = task.train
    if train is None:
        raise TaskError(
            f"Task {task.name!r} has no training data, so there is nothing to recover with; give it a train split."
        )
    model = copy.deepcopy(live)
    best, best_loss = live, _judge(live, task, reference)
    parameters = [p for p in model.parameters() if p.is_floating_point()]
    for parameter in parameters:
        parameter.requires_grad_(True)
    original.eval()
    model.eval()
    generator = torch.Generator().manual_seed(settings.seed)

    def batch_loss() -> Tensor:
        index = torch.randint(len(train), (settings.batch_size,), generator=generator)
        inputs, targets = task.prepare(train.inputs[index]), train.targets[index]
        if task.augment is not None:
            inputs = task.augment(inputs, generator)
        inputs = images_first(inputs)
        return _loss(task, model(inputs), original, inputs, targets, settings)

    rate = settings.learning_rate or polyak_rate(batch_loss, parameters)
    optimizer = torch.optim.SGD(parameters, rate, settings.momentum, weight_decay=settings.weight_decay, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, settings.steps, pct_start=0.15)
    averaged = AveragedModel(model)
    every = max(1, settings.steps // settings.checks)
    for step in range(settings.steps):
        if cancelled and cancelled():
            raise Cancelled("Stopped while distilling; everything evaluated so far is kept.")
        optimizer.zero_grad()
        batch_loss().backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        schedule.step()
        if step >= settings.steps // 4:
            averaged.update_parameters(model)
        if (step + 1) % every == 0 or step + 1 == settings.steps:
            for candidate in (model, cast("fx.GraphModule", averaged.module)):
                found = _judge(candidate, task, reference)
                if found < best_loss:
                    best, best_loss = copy.deepcopy(candidate), found
            if progress:
                progress(step + 1, settings.steps)
    for parameter in best.parameters():
        parameter.requires_grad_(False)
    return best.eval()


def polyak_rate(batch_loss: Callable[[], Tensor], parameters: Sequence[nn.Parameter]) -> float:
    """A learning rate for short training: ``RATE_SHARE * loss / |gradient|^2``, averaged over a few batches.

    The step size of Polyak (1987, section 5.3) for a least loss of about zero, with clipping and momentum on top (Loizou et
    al. 2021). A refitted model is near a minimum, and a rate fit for long training ends worse than it began.
    """
    loss = squared = 0.0
    for _ in range(RATE_BATCHES):
        value = batch_loss()
        gradients = torch.autograd.grad(value, parameters, allow_unused=True)
        norm = float(torch.stack([g.norm() for g in gradients if g is not None]).norm())
        loss, squared = loss + float(value.detach()), squared + norm * min(norm, CLIP)
    return min(MAX_RATE, max(MIN_RATE, RATE_SHARE * loss / squared)) if squared > 0 else MIN_RATE


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
    t = settings.temperature
    soft = functional.kl_div(
        functional.log_softmax(logits(task, outputs) / t, -1).flatten(0, -2),
        functional.log_softmax(logits(task, taught) / t, -1).flatten(0, -2),
        reduction="batchmean",  # over all rows of logits
        log_target=True,
    )
    return soft * t * t + settings.label_weight * task.loss(outputs, targets)

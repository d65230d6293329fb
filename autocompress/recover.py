"""Recovery: a live model learns to answer like the original (Hinton et al. 2015), or trains on the task's own loss.

Formats stay on while training (straight-through), and batch norms keep the statistics that the refit gave them: those of a
batch are noise that short training does not make good (ResNet-56 at half its MACs: they double the loss). The best checkpoint
on the search split wins, running averages of the weights (Polyak & Juditsky 1992) and the start among them: recovery never makes
a plan worse by its own measure. What else a loss may hold and a step may do is the :class:`~autocompress.recipe.Recipe`'s.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import cast

import torch
from torch import Tensor, fx, nn
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel

from autocompress.deploy import deploy
from autocompress.errors import Cancelled, TaskError, UsageError
from autocompress.fitness import fitness, forward, logits
from autocompress.inherit import Inheritance
from autocompress.methods.fisher import block_moments
from autocompress.pairing import Hint, Pairing, pair, tapped, with_originals
from autocompress.recipe import Recipe
from autocompress.schedule import Schedule
from autocompress.shrink import Descent
from autocompress.tasks import Split, Task
from autocompress.tasks.augment import images_first
from autocompress.trained import bits_in, learn, learned, mean_bits, settle

MAX_RATE, MIN_RATE = 0.02, 1e-6
RATE_SHARE, RATE_BATCHES = 0.25, 4
CLIP = 5.0
WARM, AVERAGED = 0.15, 0.25
"""Shares of the steps: until the rate is highest, and after which weights are averaged."""
BETWEEN = 0.5
"""Share of the steps between a plan's stages."""
SCORED = 256
"""Examples on which a plan's blocks are compared: which goes next."""
BITS_SPAN = 8.0
"""How many bits a price alone takes away in all the steps: Adam's rate for learned bits and ranges, times the steps."""
FISHER_EXAMPLES = 256
"""Gradients of one Fisher matrix on the way to a sparse level: one backward pass an example, together five steps of ResNet-20."""
CRAM_SPARSITIES = (0.5, 0.7, 0.9)
"""What the compression-aware step prunes to, drawn anew at each step."""

BITS_RATE = 0.001
"""The highest rate of weights whose bits are learned: a price is no distance to a minimum, as a loss is (ResNet-20 at 0.02:
from KL 0 to 0.08 and more, and never better than the start)."""

Gradients = list[Tensor | None]
Batch = tuple[Tensor, Tensor]  # prepared inputs, targets
Tapped = Callable[[Tensor], tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]]


@dataclass(frozen=True)
class Recovery:
    """How to train. ``steps`` of ``batch_size`` examples decide the outcome, not the clock, so that a run repeats.

    ``learning_rate``: ``None`` takes it from the loss and its gradients at the start, see :func:`polyak_rate`. ``momentum``:
    the mean of a cycle, 0.05 either way, against the rate's. ``checks``: how often the search split is asked. ``recipe``: what
    the loss holds and what a step does.
    """

    steps: int = 300
    batch_size: int = 128
    learning_rate: float | None = None
    momentum: float = 0.9
    weight_decay: float = 1e-4
    checks: int = 4
    seed: int = 0
    recipe: Recipe = field(default_factory=Recipe)


def recover(
    live: fx.GraphModule,
    original: nn.Module,
    task: Task,
    settings: Recovery,
    reference: Tensor,
    progress: Callable[[int, int], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
    pairing: Pairing | None = None,
) -> fx.GraphModule:
    """The distilled live model; ``live`` itself stays as it is. ``reference``: the original's outputs on the search split.

    ``pairing``: what in ``live`` stands for what in the original, for recipes that teach more than outputs. Raises
    :class:`TaskError` if the task has no training data, :class:`UsageError` if such a recipe has no pairing.
    """
    if task.train is None:
        raise TaskError(
            f"Task {task.name!r} has no training data, so there is nothing to recover with; give it a train split."
        )
    recipe = settings.recipe
    begun = recipe.shrink or recipe.wid
    paired = recipe.features or recipe.attention or recipe.theseus or recipe.gradual or begun
    if paired and (pairing is None or (begun and pairing.of is None)):
        raise UsageError(
            f"The recovery '{recipe}' needs a pairing of the live model with the original; give pair(...)."
        )
    pairing = pairing or Pairing()
    with torch.enable_grad():
        start, done = _descend(live, original, task, settings, reference, pairing, cancelled)
        told = None if progress is None else lambda step, _: progress(done + step, settings.steps)
        last = replace(settings, steps=settings.steps - done)
        return _Training(live, original, task, last, reference, pairing, start).run(told, cancelled)


def _descend(
    live: fx.GraphModule,
    original: nn.Module,
    task: Task,
    settings: Recovery,
    reference: Tensor,
    pairing: Pairing,
    cancelled: Callable[[], bool] | None,
) -> tuple[fx.GraphModule, int]:
    """Where the training of the plan itself begins, and the steps taken to get there: in stages, or at once from ``live``."""
    recipe, done = settings.recipe, 0
    if not recipe.shrink or pairing.of is None:
        return live, done
    few, known = replace(task, search=task.search.take(SCORED)), reference[:SCORED]
    each = math.floor(BETWEEN * settings.steps / max(1, recipe.shrink - 1))
    part = replace(settings, steps=each, checks=1, recipe=replace(recipe, shrink=0))
    descent = Descent(*pairing.of, recipe.shrink, lambda model: _fitness(deploy(model), few, known), cancelled)
    for stage in range(1, recipe.shrink):
        if descent.step() and each:
            paired = pair(descent.database, descent.plan)
            seeded = replace(part, seed=settings.seed + stage)
            training = _Training(descent.model, original, task, seeded, reference, paired)
            descent.model, done = training.run(None, cancelled), done + each
    descent.step()
    return (descent.model if done else live), done


class _Training:
    """One recovery on its way: the model that is trained, what it learns from, and the best checkpoint so far.

    ``start``: where training begins, if not at ``live``; the better one of the two is the first checkpoint.
    """

    def __init__(
        self,
        live: fx.GraphModule,
        original: nn.Module,
        task: Task,
        settings: Recovery,
        reference: Tensor,
        pairing: Pairing,
        start: fx.GraphModule | None = None,
    ) -> None:
        self.task, self.settings, self.recipe, self.reference = task, settings, settings.recipe, reference
        self.original, self.pairing = original.eval(), pairing
        start = start or live
        self.model = copy.deepcopy(start).eval()
        learn(self.model, self.recipe)
        steps = settings.steps
        self.schedule = Schedule(self.model, self.recipe, steps, pairing.sparse, self._moments)
        self.bits = [p for step, _ in learned(self.model) for p in (step.width, step.reach)]
        ids = {id(p) for p in self.bits}
        self.weights = [p for p in self.model.parameters() if p.is_floating_point() and id(p) not in ids]
        for parameter in (*self.weights, *self.bits):
            parameter.requires_grad_(True)
        self.inherited = Inheritance(self.model, self.weights, *pairing.of) if self.recipe.wid and pairing.of else None
        self.stepped = self.inherited.parameters if self.inherited else self.weights
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.hints = pairing.hints if self.recipe.features or (self.recipe.attention and not pairing.maps) else ()
        self.maps = pairing.maps if self.recipe.attention else ()
        self.teacher = self._tap(cast("fx.GraphModule", self.original), theirs=True)
        self.student = self._tap(self.model)
        self.best, self.best_loss = live, self._judge(live)
        if start is not live and (loss := self._judge(start)) < self.best_loss:
            self.best, self.best_loss = start, loss

    def run(self, progress: Callable[[int, int], None] | None, cancelled: Callable[[], bool] | None) -> fx.GraphModule:
        steps, recipe = self.settings.steps, self.recipe
        rate = self.settings.learning_rate or polyak_rate(self._batch_loss, self.weights, self._passed_on)
        if self.bits and not self.settings.learning_rate:
            rate = min(rate, BITS_RATE)
        optimizers, schedules = self._optimizers(rate)
        averaged: AveragedModel | None = None
        every, idle = max(1, steps // self.settings.checks), 0
        for step in range(steps):
            if cancelled and cancelled():
                raise Cancelled("Stopped while distilling; everything evaluated so far is kept.")
            self._prepare(step)
            self._step(optimizers, self._batch())
            for schedule in schedules:
                schedule.step()
            if step >= steps * AVERAGED and self.schedule.final(step):
                averaged = averaged or AveragedModel(self.model)
                averaged.update_parameters(self.model)
            if (step + 1) % every == 0 or step + 1 == steps:
                gained = self.schedule.final(step) and self._check(averaged)
                idle = 0 if gained or not self.schedule.final(step) else idle + 1
                if progress:
                    progress(step + 1, steps)
                if recipe.patience and idle >= recipe.patience:
                    break
        for parameter in self.best.parameters():
            parameter.requires_grad_(False)
        return self.best.eval()

    # ------------------------------------------------------------ one step

    def _prepare(self, step: int) -> None:
        """The masks of this step, and which blocks are the original's."""
        self.schedule.mask(step)
        if self.recipe.theseus and self.pairing.units:
            draws = torch.rand(len(self.pairing.units), generator=self.generator)
            theirs = [
                u for u, d in zip(self.pairing.units, draws.tolist(), strict=True) if d >= self.schedule.own(step)
            ]
            mixed = with_originals(self.model, cast("fx.GraphModule", self.original), theirs)
            self.student = self._tap(mixed) if theirs else self._tap(self.model)

    def _step(self, optimizers: Sequence[torch.optim.Optimizer], batch: Batch) -> None:
        gradients = self._gradients(batch)
        if self.recipe.cram:
            share = CRAM_SPARSITIES[int(torch.randint(len(CRAM_SPARSITIES), (), generator=self.generator))]
            with compressed(self.weights, _sum(gradients), self.recipe.cram, share):
                there = self._gradients(batch)
            gradients = [_sum([a, b]) for a, b in zip(gradients, there, strict=True)]
        count = len(self.weights)
        for optimizer, given in zip(optimizers, gradients, strict=False):
            for parameter, gradient in zip(self.stepped, self._passed_on(given[:count]), strict=True):
                parameter.grad = gradient
            nn.utils.clip_grad_norm_(self.stepped, CLIP)
            optimizer.step()
        if self.inherited:
            self.inherited.merge()
        if self.bits:
            for parameter, gradient in zip(self.bits, _sum(gradients)[count:], strict=True):
                parameter.grad = gradient
            optimizers[-1].step()
            for form, _ in learned(self.model):
                form.width.data.clamp_(0, form.bits)

    def _passed_on(self, gradients: Gradients) -> Gradients:
        """Gradients of the weights as those of what is stepped."""
        return self.inherited.passed_on(gradients) if self.inherited else gradients

    def _optimizers(self, rate: float) -> tuple[list[torch.optim.Optimizer], list[torch.optim.lr_scheduler.OneCycleLR]]:
        """One for the weights, or with ``dot`` one for each gradient; the last is that of learned bits, if there are any.

        The distillation-oriented step is ``v <- (mu +- delta) v + g`` for each gradient, and ``w <- w - rate (v_taught +
        v_labels)``.
        """
        momentum, dot = self.settings.momentum, self.recipe.dot
        optimizers: list[torch.optim.Optimizer] = []
        schedules = []
        for m in (momentum + dot, momentum - dot) if dot else (momentum,):
            decay = 0.0 if optimizers else self.settings.weight_decay
            sgd = torch.optim.SGD(self.stepped, rate, m, weight_decay=decay, nesterov=True)
            span = 0.0 if dot else 0.05
            schedules.append(
                torch.optim.lr_scheduler.OneCycleLR(
                    sgd, rate, self.settings.steps, pct_start=WARM, base_momentum=m - span, max_momentum=m + span
                )
            )
            optimizers.append(sgd)
        if self.bits:
            optimizers.append(torch.optim.Adam(self.bits, BITS_SPAN / self.settings.steps))
        return optimizers, schedules

    def _batch(self) -> Batch:
        train = self.task.train
        assert train is not None
        index = torch.randint(len(train), (self.settings.batch_size,), generator=self.generator)
        inputs, targets = self.task.prepare(train.inputs[index]), train.targets[index]
        if self.task.augment is not None:
            inputs = self.task.augment(inputs, self.generator)
        return images_first(inputs), targets

    def _gradients(self, batch: Batch) -> list[Gradients]:
        """Of the whole loss, or of what the original teaches and of the labels' apart; summed over the parts of a batch."""
        parameters = [*self.weights, *self.bits]
        found: list[Gradients] = []
        for inputs, targets in self._parts(batch):
            taught, labelled = self._terms(inputs, targets)
            apart = self.recipe.dot and taught.requires_grad
            losses = [taught, labelled] if apart else [taught + labelled]
            share = len(inputs) / len(batch[0])
            part: list[Gradients] = [
                list(torch.autograd.grad(x * share, parameters, retain_graph=x is not losses[-1], allow_unused=True))
                for x in losses
            ]
            found = [_sum([a, b]) for a, b in zip(found, part, strict=True)] if found else part
        return found

    def _parts(self, batch: Batch) -> Iterator[Batch]:
        size = -(-len(batch[0]) // self.recipe.accumulate)
        yield from zip(torch.split(batch[0], size), torch.split(batch[1], size), strict=True)

    def _moments(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Second moments of the labels' gradients on training examples drawn anew."""
        train, task = self.task.train, self.task
        assert train is not None
        index = torch.randint(len(train), (FISHER_EXAMPLES,), generator=self.generator)
        batches = task.batches(Split(train.inputs[index], train.targets[index]), self.settings.batch_size)
        return block_moments(self.model, weights, batches, task.loss)

    def _batch_loss(self) -> Tensor:
        taught, labelled = self._terms(*self._batch())
        return taught + labelled

    # ------------------------------------------------------------ the loss

    def _terms(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """What the original teaches, and what the labels say with the price of bits.  # (), ()"""
        recipe, task = self.recipe, self.task
        with torch.autocast("cpu", torch.bfloat16, enabled=recipe.bf16):
            outputs, values, maps = self.student(inputs)
            if recipe.taught and task.fitness != "loss":
                with torch.no_grad():
                    given, their_values, their_maps = self.teacher(inputs)
        outputs = outputs.float()
        labelled = outputs.new_zeros(()) + recipe.bits * mean_bits(self.model)
        weight = 1.0 if task.fitness == "loss" else recipe.labels
        if weight:
            labelled = labelled + weight * task.loss(outputs, targets)
        taught = outputs.new_zeros(())
        if not recipe.taught or task.fitness == "loss":
            return taught, labelled
        if recipe.logits:
            taught = taught + recipe.logits * self._answers(outputs, given.float())
        if recipe.features:
            pairs = _pairs(self.hints, values, their_values)
            taught = taught + recipe.features * _mean([relative_error(*pair) for pair in pairs], taught)
        if recipe.attention and self.maps:
            pairs = _pairs(self.maps, maps, their_maps)
            taught = taught + recipe.attention * _mean([attention_divergence(*pair) for pair in pairs], taught)
        elif recipe.attention:
            pairs = [(values[h.mine], their_values[h.theirs]) for h in self.hints if h.mine in values]
            axes = [h.dim for h in self.hints if h.mine in values]
            errors = [attention_transfer(*pair, dim) for pair, dim in zip(pairs, axes, strict=True)]
            taught = taught + recipe.attention * _mean(errors, taught)
        return taught, labelled

    def _answers(self, outputs: Tensor, given: Tensor) -> Tensor:
        if self.task.fitness == "mse":
            return functional.mse_loss(outputs, given)
        t = self.recipe.temperature
        soft = functional.kl_div(
            functional.log_softmax(logits(self.task, outputs) / t, -1).flatten(0, -2),
            functional.log_softmax(logits(self.task, given) / t, -1).flatten(0, -2),
            reduction="batchmean",  # over all rows of logits
            log_target=True,
        )
        return soft * t * t

    def _tap(self, model: fx.GraphModule, theirs: bool = False) -> Tapped:
        if not self.hints and not self.maps:
            return lambda inputs: (model(inputs), {}, {})
        hints, maps = ([h.theirs if theirs else h.mine for h in part] for part in (self.hints, self.maps))
        return tapped(model, hints, maps)

    # ------------------------------------------------------------ judging

    def _check(self, averaged: AveragedModel | None) -> bool:
        """Whether the weights as they are now, or their average, are the best so far."""
        gained = False
        for candidate in (self.model, averaged.module if averaged else None):
            if candidate is not None:
                made = copy.deepcopy(cast("fx.GraphModule", candidate))
                settle(made)
                found = self._judge(made)
                if found < self.best_loss:
                    self.best, self.best_loss, gained = made, found, True
        return gained

    def _judge(self, model: fx.GraphModule) -> float:
        """The fitness on the search split; with a price on bits that, too, and with ``cram`` the fitness when pruned at once."""
        made = deploy(model.eval())
        value = _fitness(made, self.task, self.reference)
        if self.recipe.bits:
            value += self.recipe.bits * bits_in(made)
        if self.recipe.cram:
            with compressed(list(model.parameters()), [], 0.0, CRAM_SPARSITIES[1]):
                value += _fitness(deploy(model), self.task, self.reference)
        return value if math.isfinite(value) else math.inf


def _fitness(deployed: fx.GraphModule, task: Task, reference: Tensor) -> float:
    with torch.no_grad():
        return fitness(task, forward(deployed, task, task.search), reference, task.search.targets)


def polyak_rate(
    batch_loss: Callable[[], Tensor],
    parameters: Sequence[nn.Parameter],
    passed_on: Callable[[Gradients], Gradients] = lambda gradients: gradients,
) -> float:
    """A learning rate for short training: ``RATE_SHARE * loss / |gradient|^2``, averaged over a few batches.

    The step size of Polyak (1987, section 5.3) for a least loss of about zero, with clipping and momentum on top (Loizou et
    al. 2021). A refitted model is near a minimum, and a rate fit for long training ends worse than it began. ``passed_on``:
    gradients of the parameters as those of what is stepped in their place.
    """
    loss = squared = 0.0
    for _ in range(RATE_BATCHES):
        value = batch_loss()
        gradients = passed_on(list(torch.autograd.grad(value, parameters, allow_unused=True)))
        norm = float(torch.stack([g.norm() for g in gradients if g is not None]).norm())
        loss, squared = loss + float(value.detach()), squared + norm * min(norm, CLIP)
    return min(MAX_RATE, max(MIN_RATE, RATE_SHARE * loss / squared)) if squared > 0 else MIN_RATE


@contextmanager
def compressed(
    parameters: Sequence[nn.Parameter], gradients: Gradients, step: float, sparsity: float
) -> Iterator[None]:
    """Inside, weights are ``C(w + step g)``: ``C`` keeps the largest of all matrices and kernels together, straight-through.

    The compression-aware minimizer takes the gradient there (CrAM; with the plain gradient added to it CrAM+; Peste et al. 2023).
    """
    before = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        for p, g in zip(parameters, gradients, strict=False):
            if g is not None:
                p.add_(g, alpha=step)
        wide = [p for p in parameters if p.ndim > 1 and p.is_floating_point()]
        sizes = torch.cat([p.abs().flatten() for p in wide])
        limit = sizes.kthvalue(max(1, round(sparsity * len(sizes)))).values
        for p in wide:
            p.mul_(p.abs() > limit)
    try:
        yield
    finally:
        with torch.no_grad():
            for p, old in zip(parameters, before, strict=True):
                p.copy_(old)


def relative_error(mine: Tensor, theirs: Tensor) -> Tensor:
    """``|mine - theirs|^2 / |theirs|^2`` over a whole batch.  # ()"""
    mine, theirs = mine.float(), theirs.float()
    return (mine - theirs).square().sum() / theirs.square().sum().clamp_min(1e-12)


def attention_transfer(mine: Tensor, theirs: Tensor, dim: int) -> Tensor:
    """``mean |Q / |Q| - Q' / |Q'||^2`` of the maps ``Q = sum_channels a^2``: widths along ``dim`` may differ.  # ()"""
    maps = [functional.normalize(value.float().square().sum(dim).flatten(1)) for value in (mine, theirs)]
    return (maps[0] - maps[1]).square().sum(1).mean()


def attention_divergence(mine: Tensor, theirs: Tensor) -> Tensor:
    """KL of attention's probabilities in nats, a mean over rows.  # (n, heads, t, t) twice -> ()"""
    p = theirs.exp()
    return (p * (theirs.clamp_min(-1e4) - mine.clamp_min(-1e4))).sum(-1).mean()


def _pairs(hints: Sequence[Hint], mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Values of the live model, and of the original at the channels (of maps: heads) that the live model has."""
    return [
        (mine[h.mine], theirs[h.theirs].index_select(h.dim, h.kept) if len(h.kept) else theirs[h.theirs])
        for h in hints
        if h.mine in mine
    ]


def _mean(values: Sequence[Tensor], like: Tensor) -> Tensor:
    return torch.stack(list(values)).mean() if values else like.new_zeros(())


def _sum(parts: Sequence[Gradients]) -> Gradients:
    """Gradients added up; ``None`` where none of them reaches a parameter."""
    total: Gradients = []
    for given in zip(*parts, strict=True):
        known = [g for g in given if g is not None]
        total.append(sum(known[1:], known[0]) if known else None)
    return total

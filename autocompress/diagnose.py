"""What compression did to a model, where, and by what: made at the end of a job, kept in its result.

* *Compression-identified exemplars* (Hooker et al. 2019, "What do compressed deep neural networks forget?"): examples that most
  of several compressed models answer otherwise than the original does; and classes whose change differs from the mean change.
* The *sensitivity map*: the loss of one level at one site (He et al. 2018 and many others draw one before they prune).
* The *error of each layer's outputs* in the delivered plan, layers before it being compressed, too.
* What *each method contributed*: the delivered plan without it, refitted again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from autocompress.deploy import deploy
from autocompress.errors import Cancelled
from autocompress.evaluate import ModelEvaluator
from autocompress.fitness import images_last
from autocompress.methods import METHODS
from autocompress.methods.pq import pq_index
from autocompress.methods.quantization import PackedWeight
from autocompress.models import Models
from autocompress.pairing import Hint, tapped
from autocompress.prepare import Prepared
from autocompress.results import (
    ClassRow,
    ContributionRow,
    Diagnosis,
    Exemplar,
    LayerRow,
    SensitivityRow,
)
from autocompress.tasks import Split, Task
from autocompress.trained import used_bits
from autocompress.types import Evaluation, Fidelity, Plan, Query, digest

EXAMPLES = 2000
"""Examples of the report split that are answered."""
SHOWN = 60
"""Exemplars that are listed, and classes."""
MODELS = 5
ERROR_EXAMPLES, ERROR_BATCH = 128, 16


@dataclass(frozen=True, eq=False)
class Answers:
    """What one model says to the examples: scores (n,), and labels (n,) where answers are classes."""

    scores: Tensor
    labels: Tensor | None


def diagnose(
    delivered: Evaluation,
    others: Sequence[Evaluation],
    models: Models,
    made: Prepared,
    evaluator: ModelEvaluator,
    known: Sequence[Evaluation],
    limit: int,
    tick: Callable[[int, int | None, str], None] = lambda done, total, message: None,
    cancelled: Callable[[], bool] | None = None,
) -> Diagnosis:
    """The diagnosis of a delivered plan. ``others``: further plans whose answers count; ``known``: evaluations of the search.

    ``limit``: how many one-site plans may be judged beyond those that are known.
    """
    steps = 4

    def at(done: int, message: str) -> None:
        tick(done, steps, message)
        if cancelled and cancelled():
            raise Cancelled("Stopped while diagnosing; the files are written, and the same command continues there.")

    space = made.space
    at(0, "exemplars")
    compared = list(dict.fromkeys([delivered.plan, *(e.plan for e in others)]))[:MODELS]
    rungs: dict[Plan, Fidelity] = {e.plan: e.fidelity for e in [*others, delivered]}
    split = made.task.report.take(EXAMPLES)
    original = answers(made.task, deploy(made.database.stitch(space.dense)), split)
    found = [answers(made.task, models.deployed(plan, rungs[plan]), split) for plan in compared]
    changed, right, listed = exemplars(split, original, found)
    at(1, "layers")
    layers = layer_errors(made, models, delivered)
    at(2, "sensitivity")
    sensitivity = sensitivity_map(made, evaluator, known, limit)
    at(3, "contributions")
    return Diagnosis(
        plan=digest(space.plan_to_json(delivered.plan)),
        rung=delivered.fidelity,
        models=tuple(digest(space.plan_to_json(plan)) for plan in compared),
        examples=len(split),
        changed=changed,
        right=right,
        exemplars=tuple(listed),
        classes=tuple(class_changes(made.task, split, original, found[0])),
        sensitivity=tuple(sensitivity),
        layers=tuple(layers),
        contributions=tuple(contributions(made, evaluator, delivered.plan)),
    )


# ---------------------------------------------------------------- examples and classes


def answers(task: Task, model: nn.Module, split: Split) -> Answers:
    """Scores, and the most likely class of each example where a target is one class."""
    single = task.fitness == "kl" and split.targets.ndim == 1 and not split.targets.is_floating_point()
    scores, labels = [], []
    with torch.inference_mode():
        for inputs, targets in task.batches(split, task.batch_size):
            outputs = model(images_last(inputs))
            scores.append(task.score(outputs, targets).double())
            if single:
                labels.append(outputs.argmax(task.class_axis))
    return Answers(torch.cat(scores), torch.cat(labels) if labels else None)


def exemplars(
    split: Split, original: Answers, compressed: Sequence[Answers]
) -> tuple[int | None, tuple[float, float] | None, list[Exemplar]]:
    """How many there are, how often the original and the others are right on them, and the first: those most agreed on.

    Without classes, the examples with the largest mean drop of the score.
    """
    drops = original.scores - torch.stack([a.scores for a in compressed]).mean(0)
    if original.labels is None:
        worst = torch.argsort(drops, descending=True, stable=True)[:SHOWN]
        rows = [(int(i), None, None, None, 1.0) for i in worst.tolist() if drops[i] > 0]
        return None, None, [_exemplar(row, drops) for row in rows]
    labels = torch.stack([a.labels for a in compressed if a.labels is not None])  # (models, n)
    modal = labels.mode(0).values
    agreement = (labels == modal).double().mean(0)
    where = (modal != original.labels).nonzero().flatten()
    order = sorted(where.tolist(), key=lambda i: (-float(agreement[i]), -float(drops[i]), i))
    targets = split.targets
    listed = [
        _exemplar((i, int(targets[i]), int(original.labels[i]), int(modal[i]), float(agreement[i])), drops)
        for i in order[:SHOWN]
    ]
    if not len(where):
        return 0, None, []
    right = [float((one[where] == targets[where]).double().mean()) for one in (original.labels, modal)]
    return len(where), (right[0], right[1]), listed


def _exemplar(row: tuple[int, int | None, int | None, int | None, float], drops: Tensor) -> Exemplar:
    index, target, original, compressed, agreement = row
    return Exemplar(
        index=index,
        target=target,
        original=original,
        compressed=compressed,
        agreement=agreement,
        drop=float(drops[index]),
    )


def class_changes(task: Task, split: Split, original: Answers, compressed: Answers) -> Iterator[ClassRow]:
    """Classes whose change differs most from that of all examples, at least two examples each."""
    if original.labels is None:
        return
    points = task.points * (1 if task.higher_is_better else -1)
    changes = (compressed.scores - original.scores) * points
    mean, spread = float(changes.mean()), float(changes.std())
    rows = []
    for label in sorted(set(split.targets.tolist())):
        inside = split.targets == label
        n = int(inside.sum())
        if n < 2:
            continue
        change, own = float(changes[inside].mean()), float(changes[inside].std())
        half = 1.96 * max(own, spread) / n**0.5  # a few equal changes are no proof
        rows.append(
            ClassRow(
                label=int(label),
                examples=n,
                original=float(original.scores[inside].mean()),
                compressed=float(compressed.scores[inside].mean()),
                change=change,
                half_width=half,
                relative=change - mean,
                unlike=abs(change - mean) > half,
            )
        )
    yield from sorted(rows, key=lambda row: (row.relative, row.label))[:SHOWN]


# ---------------------------------------------------------------- layers, sites, methods


def layer_errors(made: Prepared, models: Models, delivered: Evaluation) -> list[LayerRow]:
    """``|y - y'|^2 / |y|^2`` of every layer that the plan has, on examples of the search split, in the model's order."""
    database, task, graph = made.database, made.task, made.graph
    plan, keep = delivered.plan, database.keep(delivered.plan)
    live = models.live(plan, delivered.fidelity)
    there = {node.name for node in live.graph.nodes}
    hints = {}
    for layer in graph.layers.values():
        if layer.result in there:
            value = graph.values[layer.result]
            kept = torch.from_numpy(keep[value.ids]).nonzero().flatten()
            hints[layer.name] = Hint(layer.result, layer.result, value.dim, kept)
    mine = tapped(live, [h.mine for h in hints.values()])
    theirs = tapped(graph.module, [h.theirs for h in hints.values()])
    lost, total = dict.fromkeys(hints, 0.0), dict.fromkeys(hints, 0.0)
    with torch.inference_mode():
        for inputs, _ in task.batches(task.search.take(ERROR_EXAMPLES), ERROR_BATCH):
            got, want = mine(inputs)[1], theirs(inputs)[1]
            for name, hint in hints.items():
                target = want[hint.theirs].index_select(hint.dim, hint.kept) if len(hint.kept) else want[hint.theirs]
                lost[name] += float((got[hint.mine] - target).double().square().sum())
                total[name] += float(target.double().square().sum())
    steps = made.space.describe(plan)
    packed = _packed(deploy(live))
    return [
        LayerRow(
            name=name,
            level=steps.get(f"layer:{name}", "dense"),
            width=f"{len(layer.kept_outputs(keep))}/{len(layer.outputs)}",
            error=lost[name] / total[name] if total[name] > 0 else 0.0,
            bits=used_bits(packed[name]) if name in packed else None,
            pq=pq_index(database.folded(name)[0]),
        )
        for name, layer in graph.layers.items()
        if name in hints
    ]


def _packed(deployed: nn.Module) -> dict[str, PackedWeight]:
    parts = deployed.named_modules()
    return {name: p for name, part in parts if isinstance(p := getattr(part, "packed", None), PackedWeight)}


def sensitivity_map(
    made: Prepared, evaluator: ModelEvaluator, known: Sequence[Evaluation], limit: int
) -> list[SensitivityRow]:
    """Losses of one-site plans above the dense model's, on one rung: the one of which the search knows more.

    Up to ``limit`` of what is missing is judged on the slice, first one level of every site, then the next.
    """
    space = made.space
    wanted = [
        (site, level)
        for step in range(1, max(space.n_levels))
        for site, n in enumerate(space.n_levels)
        if (level := n - step) > 0
    ]
    plans = {(s, v): (*space.dense[:s], v, *space.dense[s + 1 :]) for s, v in wanted}
    by_rung: dict[Fidelity, dict[Plan, Evaluation]] = {"slice": {}, "full": {}}
    for evaluation in known:
        if evaluation.fidelity in by_rung and not evaluation.part and sum(map(bool, evaluation.plan)) <= 1:
            by_rung[evaluation.fidelity][evaluation.plan] = evaluation
    rung: Fidelity = "full" if len(by_rung["full"]) > len(by_rung["slice"]) + limit else "slice"
    have = by_rung[rung]
    missing = [plan for plan in plans.values() if plan not in have][:limit]
    found = evaluator([Query(plan, rung) for plan in [space.dense, *missing]])
    losses = {e.plan: e.values["loss"] for e in [*have.values(), *found]}
    dense = losses[space.dense]
    return [
        SensitivityRow(site=space.sites[s].name, level=space.levels[s][v].label, loss=losses[plan] - dense)
        for (s, v), plan in sorted(plans.items())
        if math.isfinite(losses.get(plan, math.inf))
    ]


def contributions(made: Prepared, evaluator: ModelEvaluator, plan: Plan) -> list[ContributionRow]:
    """The plan refitted, and without each of its methods in turn."""
    plans = {"nothing": plan, **without_each(made, plan)}
    found = evaluator([Query(one, "refitted") for one in plans.values()])
    return [
        ContributionRow(
            without=name,
            sites=sum(a != b for a, b in zip(plan, one, strict=True)),
            loss=_finite(evaluation.values["loss"]),
            accuracy_drop=_finite(evaluation.values["accuracy_drop"]),
            costs=dict(evaluation.costs),
        )
        for (name, one), evaluation in zip(plans.items(), found, strict=True)
    ]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def without_each(made: Prepared, plan: Plan) -> dict[str, Plan]:
    """Method -> the plan without its steps: at each site the level that has the others, dense where none is offered."""
    space = made.space
    steps = [level.steps for level in (levels[v] for levels, v in zip(space.levels, plan, strict=True))]
    kinds = dict.fromkeys(type(step) for one in steps for step in one)
    names = {METHODS[name]: name for name in METHODS}
    found = {}
    for kind in kinds:
        left = [tuple(step for step in one if type(step) is not kind) for one in steps]
        offered = [[level.steps for level in levels] for levels in space.levels]
        found[names.get(kind, kind.__name__.lower())] = tuple(
            v if rest == old else (offers.index(rest) if rest in offers else 0)
            for v, rest, old, offers in zip(plan, left, steps, offered, strict=True)
        )
    return found

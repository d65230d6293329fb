"""Weights inherited through compactors: a student's weights as trained mixtures of its teacher's rows and columns.

Weight-inherited distillation (WID, Wu et al. 2023): ``W' = R W C`` with the original's weight ``W`` as it is, a row compactor
``R (k, n)`` and a column compactor ``C (n, k)`` that are trained and in the end multiplied out, so that what is left is a plain
weight of the plan's shape. Compactors belong to streams: all layers that write a group of channels share its ``R``, all that
read it share its ``C``. Here ``R`` starts as the selection of the plan's channels; ``C`` as what gives the plan's refitted
weights best, ``argmin sum |W_refit - R W C|^2 + ridge |C - R^T|^2`` over all readers; and what it cannot give is a rest ``D``
that is added, so that training starts at the refitted weights: ``W' = R W C + D``. Published, channels are chosen while
compactors are trained, by a penalty on their rows; here a plan has chosen them.

Compactors mix folded channels (those behind batch norms, as streams add them up); the norms and biases of the student are
trained as they are. The live model holds the product at every step: gradients of its weights are passed on to the compactors by
the chain rule, so formats, taps and averages need not know of compactors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from autocompress.database import LevelDatabase
from autocompress.deploy import fold_norm
from autocompress.graph import Group, Keep, Layer
from autocompress.methods import Factored
from autocompress.types import Plan

RIDGE = 1e-2
"""Of the mean squared column of the readers."""
TINY = 1e-6

Gradients = list[Tensor | None]


@dataclass(frozen=True, eq=False)
class Stream:
    """A group of ``n`` channels of which ``k`` live, with its compactors; ``columns`` is ``C^T``.  # (k, n) both"""

    group: Group
    kept: npt.NDArray[np.intp]
    rows: nn.Parameter
    columns: nn.Parameter


@dataclass(frozen=True, eq=False)
class Side:
    """A stream on one side of a layer: which of its channels are there, and where before and after pruning.

    ``every (m, copies)``, ``stay (j, copies)``: places of channels, several where a map was flattened or a channel is a head;
    ``into (j,)``, ``out_of (m,)``: rows and columns of the compactor.
    """

    stream: Stream
    into: Tensor
    out_of: Tensor
    every: Tensor
    stay: Tensor

    def mixed(self, values: Tensor, matrix: Tensor) -> Tensor:
        """The channels that stay, mixed from all.  # (n, ...), (k, n) -> (j * copies, ...)"""
        return torch.einsum("kn,n...->k...", matrix[self.into][:, self.out_of], values[self.every]).flatten(0, 1)


@dataclass(frozen=True, eq=False)
class Inherited:
    """One layer's weight ``W' = unit * R W C + rest``; ``raw``: the live model's, as it comes to its formats.

    ``teacher``: the folded original's.  # (n_out, n_in, ...);  ``unit``: one over the factor of the live norm.  # (k_out, 1, ...)
    """

    raw: nn.Parameter
    teacher: Tensor
    unit: Tensor
    kept: tuple[Tensor, Tensor]
    outer: tuple[Side, ...]
    inner: tuple[Side, ...]

    def written(self, values: Tensor) -> Tensor:
        """All rows of the original -> the student's.  # (n_out, ...) -> (k_out, ...)"""
        found = values[self.kept[0]]
        for side in self.outer:
            found = found.index_copy(0, side.stay.flatten(), side.mixed(values, side.stream.rows))
        return found

    def product(self) -> Tensor:
        """``unit * R W C``, with a gradient for the compactors.  # (k_out, k_in, ...)"""
        rows = self.written(self.teacher).transpose(0, 1)
        found = rows[self.kept[1]]
        for side in self.inner:
            found = found.index_copy(0, side.stay.flatten(), side.mixed(rows, side.stream.columns))
        return found.transpose(0, 1) * self.unit


class Inheritance:
    """Compactors of a plan's live model.

    ``parameters``: what is trained in the place of the model's ``weights``: compactors, the rests, all that is not inherited.
    """

    def __init__(self, model: nn.Module, weights: Sequence[nn.Parameter], database: LevelDatabase, plan: Plan) -> None:
        keep, modules = database.keep(plan), dict(model.named_modules(remove_duplicate=False))
        self.weights, self.plan = list(weights), plan
        streams = [_stream(group, keep) for group in database.graph.groups if not keep[group.classes].all()]
        self.layers = self._layers(modules, streams, database, keep)
        for stream in streams:
            self._fit(stream)
        used = {id(s.stream): s.stream for layer in self.layers for s in (*layer.outer, *layer.inner)}.values()
        self.compactors = [matrix for stream in used for matrix in (stream.rows, stream.columns)]
        self.rests = [nn.Parameter(layer.raw.detach() - layer.product().detach()) for layer in self.layers]
        rest = {id(layer.raw): rest for layer, rest in zip(self.layers, self.rests, strict=True)}
        self.parameters = [*self.compactors, *(rest.get(id(p), p) for p in self.weights)]

    def passed_on(self, gradients: Sequence[Tensor | None]) -> Gradients:
        """Gradients of the model's weights -> of the parameters, by the chain rule."""
        given = {id(p): g for p, g in zip(self.weights, gradients, strict=True)}
        pairs = [(layer, g) for layer in self.layers if (g := given[id(layer.raw)]) is not None]
        found: Gradients = [None] * len(self.compactors)
        if pairs:
            with torch.enable_grad():
                products = [layer.product() for layer, _ in pairs]
                found = list(torch.autograd.grad(products, self.compactors, [g for _, g in pairs], allow_unused=True))
        return [*found, *gradients]

    @torch.no_grad()
    def merge(self) -> None:
        """Multiply the compactors into the live model's weights."""
        for layer, rest in zip(self.layers, self.rests, strict=True):
            layer.raw.copy_(layer.product() + rest)

    def _layers(
        self, modules: Mapping[str, nn.Module], streams: Sequence[Stream], database: LevelDatabase, keep: Keep
    ) -> list[Inherited]:
        found: dict[int, Inherited] = {}
        for layer in database.graph.layers.values():
            part = modules.get(layer.name)
            outer = tuple(side for s in streams if (side := _side(s, layer.outputs, keep)) is not None)
            inner = tuple(side for s in streams if (side := _side(s, layer.inputs, keep)) is not None)
            whole = isinstance(part, nn.Conv2d | nn.Linear) and why_not(database, self.plan, layer) is None
            if not whole or not (outer or inner):
                continue
            raw, (teacher, _) = _raw(part), database.folded(layer.name)
            if id(raw) not in found and any(raw is weight for weight in self.weights):
                norm = modules.get(layer.norm) if layer.norm else None
                kept = torch.from_numpy(layer.kept_outputs(keep)), torch.from_numpy(layer.kept_inputs(keep))
                found[id(raw)] = Inherited(raw, teacher, _unit(raw, norm), kept, outer, inner)
        return list(found.values())

    @torch.no_grad()
    def _fit(self, stream: Stream) -> None:
        """The column compactor that gives the readers' weights of the plan best; see the module's docstring."""
        n = len(stream.group.classes)
        gram, cross = (torch.zeros(n, m, dtype=torch.float64) for m in (n, len(stream.kept)))
        for layer in self.layers:
            for side in (side for side in layer.inner if side.stream is stream):
                known = layer.unit != 0
                wanted = torch.where(known, layer.raw / torch.where(known, layer.unit, 1.0), 0.0)
                x = layer.written(layer.teacher).transpose(0, 1)[side.every].flatten(1).double()  # (m, copies * ...)
                y = wanted.transpose(0, 1)[side.stay].flatten(1).double()  # (j, copies * ...)
                gram[side.out_of[:, None], side.out_of] += x @ x.T
                cross[side.out_of[:, None], side.into] += x @ y.T
        ridge = RIDGE * float(gram.diagonal().mean()) + TINY
        start = stream.columns.detach().double().T
        solved = torch.linalg.solve(gram + ridge * torch.eye(n, dtype=torch.float64), cross + ridge * start)
        stream.columns.copy_(solved.T)


def _stream(group: Group, keep: Keep) -> Stream:
    kept = np.flatnonzero(keep[group.classes])
    selection = torch.eye(len(group.classes))[torch.from_numpy(kept)]
    return Stream(group, kept, nn.Parameter(selection), nn.Parameter(selection.clone()))


def _side(stream: Stream, ids: npt.NDArray[np.int64], keep: Keep) -> Side | None:
    """Where a stream is among a layer's channels; ``None`` where it is not, or its channels stand for unequally many."""
    where = [np.flatnonzero(ids == c) for c in stream.group.classes]
    there = [i for i, at in enumerate(where) if len(at)]
    if len({len(where[i]) for i in there}) != 1:
        return None
    place = np.cumsum(keep[ids]) - 1  # a channel that lives -> its place after pruning
    lives = [(j, i) for j, i in enumerate(stream.kept.tolist()) if len(where[i])]
    if not lives:
        return None
    every = torch.from_numpy(np.stack([where[i] for i in there]))
    stay = torch.from_numpy(np.stack([place[where[i]] for _, i in lives]))
    return Side(stream, torch.tensor([j for j, _ in lives]), torch.tensor(there), every, stay)


def why_not(database: LevelDatabase, plan: Plan, layer: Layer) -> str | None:
    """Why a layer's weight in a plan cannot be its teacher's between two compactors; ``None`` where it can."""
    teacher, _ = database.folded(layer.name)
    if layer.depthwise or teacher.shape[1] != len(layer.inputs):
        return "they are grouped convolutions, whose channels do not mix"
    if database.reads(plan, layer.name) is not None:
        return "they choose their inputs alone, and compactors belong to all that read a stream"
    if any(isinstance(step, Factored) for step in database.layer_steps(plan, layer.name)):
        return "they are in factors, of which none has the original's shape"
    return None


def uninherited(database: LevelDatabase, plan: Plan) -> tuple[str, ...]:
    """A sentence for each reason why layers beside removed channels have no compactors."""
    keep, gone = (
        database.keep(plan),
        {n for b in database.graph.blocks if b.name in database.dropped(plan) for n in b.body},
    )
    found: dict[str, list[str]] = {}
    for layer in database.graph.layers.values():
        beside = not (keep[layer.inputs].all() and keep[layer.outputs].all())
        if beside and layer.node not in gone and (reason := why_not(database, plan, layer)):
            found.setdefault(reason, []).append(layer.name)
    return tuple(
        f"Weights of {', '.join(names)} are trained as they are and not inherited, as {reason}."
        for reason, names in found.items()
    )


def _raw(part: Any) -> nn.Parameter:
    """The weight of a layer as it comes to its formats."""
    chained = parametrize.is_parametrized(part, "weight")
    raw: nn.Parameter = part.parametrizations["weight"].original if chained else part.weight
    return raw


def _unit(raw: Tensor, norm: nn.Module | None) -> Tensor:
    """What turns folded rows into those of the live layer; 0 where its norm lets nothing through.  # (k_out, 1, ...)"""
    factor, _ = fold_norm(torch.ones(len(raw), 1), None, norm)
    unit = torch.where(factor.abs() > TINY, 1 / factor, 0.0)
    return unit.reshape(-1, *[1] * (raw.ndim - 1)).detach()

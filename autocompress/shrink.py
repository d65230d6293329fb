"""A plan reached in stages: widths narrow, ranks fall and blocks go a part at a time, with training between.

Prune a little, train a little, repeat (NetAdapt, Yang et al. 2018; progressive shrinking, Cai et al. 2020, where small networks
begin from larger ones): stage ``k`` of ``n`` is the plan with ``round(k / n * level)`` at each group of channels, factors with
the share ``1 - (1 - ratio) k / n`` of their layer's weights, and ``round(k / n * count)`` of its dropped blocks gone, the one
first without which the model *as trained so far* loses least (drop, tune, repeat: TrimLLM, Hu et al. 2024). The last stage is
the plan, with its formats.

From one stage to the next what has been trained is kept: the sequential refit of ``finish.py``, ``W = argmin |W X' - Y|^2``, with
``X'`` the inputs of the narrower model and ``Y`` what the model *as trained* has at that place.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import fx, nn

from autocompress.database import LevelDatabase
from autocompress.deploy import fold_norm, set_submodule
from autocompress.finish import carry_over
from autocompress.graph import Layer, rebuild, tied_to
from autocompress.methods import Factored
from autocompress.methods.factored import composed
from autocompress.methods.inputs import Select, place
from autocompress.search.tables import switch
from autocompress.slicing import slice_channelwise
from autocompress.types import MethodConfig, Plan

Index = npt.NDArray[np.intp]


class Descent:
    """A model on its way from the original to a plan. ``model``: as it is now; ``plan``: its widths and blocks.

    ``loss``: of a live model; decides which of the plan's blocks goes next.
    """

    def __init__(
        self,
        database: LevelDatabase,
        goal: Plan,
        stages: int,
        loss: Callable[[fx.GraphModule], float],
        cancelled: Callable[[], bool] | None = None,
    ) -> None:
        self.database, self.goal, self.stages, self.loss, self.cancelled = database, goal, stages, loss, cancelled
        self.done = 0
        self.plan = database.space.dense
        self.model = database.stitch(self.plan)

    def step(self) -> bool:
        """One stage on, untrained; whether it changed anything."""
        self.done += 1
        share, before, trained = self.done / self.stages, self.plan, self.model
        sites = self.database.space.sites
        drops = [i for i, (s, level) in enumerate(zip(sites, self.goal, strict=True)) if s.kind == "block" and level]
        plan = before
        while sum(plan[i] > 0 for i in drops) < round(share * len(drops)):
            left = [switch(plan, i, self.goal[i]) for i in drops if not plan[i]]
            plan = left[0] if len(left) == 1 else min(left, key=lambda one: self.loss(self._at(one)))
        plan = tuple(
            round(share * level) if s.kind == "channels" else int(s.kind == "block" and now)
            for s, level, now in zip(sites, self.goal, plan, strict=True)
        )
        found = {
            name: steps_at(self.database.layer_steps(self.goal, name), share) for name in self.database.graph.layers
        }
        changed = plan != before or any(found.values())
        self.model = self._at(plan, found)
        self.plan = plan
        if self.done == self.stages:
            self.plan = self.goal
            self.database.place_quantizers(self.model, self.goal)
        if changed:
            carry_over(self.database, self.plan, self.model, trained, before, found.__getitem__, self.cancelled)
        return changed

    def _at(self, plan: Plan, steps: Mapping[str, Sequence[MethodConfig]] | None = None) -> fx.GraphModule:
        return narrowed(self.database, self.model, self.plan, plan, steps or {})


def steps_at(steps: Iterable[MethodConfig], share: float) -> tuple[MethodConfig, ...]:
    """A layer's methods when so much of the way is done: factors fall from all of the weights, the rest comes last."""
    if share >= 1:
        return tuple(steps)
    factors = (step for step in steps if isinstance(step, Factored) and step.ratio < 1)
    return tuple(replace(step, ratio=1 - (1 - step.ratio) * share) for step in factors)


def narrowed(
    database: LevelDatabase,
    model: fx.GraphModule,
    before: Plan,
    after: Plan,
    steps: Mapping[str, Sequence[MethodConfig]],
) -> fx.GraphModule:
    """A trained live model of the plan ``before``, without formats, as one of the narrower plan ``after``; nothing is refitted.

    ``steps``: a layer's name -> the methods it gets. What neither loses channels nor gets methods stays to the bit.
    """
    graph, wide, keep = database.graph, database.keep(before), database.keep(after)
    old = dict(model.named_modules(remove_duplicate=False))
    made: set[str] = set()

    def make(layer: Layer, _: Index, rows: Index) -> dict[str, nn.Module]:
        had, columns = database.inputs(before, layer, wide), database.inputs(after, layer, keep)
        outer = _within(layer.kept_outputs(wide), rows)
        found = _narrow(database, layer, old, had, outer, steps.get(layer.name, ()), columns)
        made.update(found)
        return found

    new = rebuild(graph, keep, database.dropped(after), make)
    place(new, database.selections(after))
    for node in new.graph.nodes:
        name = str(node.target)
        if node.op == "get_attr":
            owner, _, leaf = name.rpartition(".")
            if not tied_to(graph, name):  # a tied weight comes with its embedding
                setattr(new.get_submodule(owner), leaf, copy.deepcopy(getattr(model.get_submodule(owner), leaf)))
        elif node.op == "call_module" and name not in made and not isinstance(new.get_submodule(name), Select):
            ids = graph.channelwise.get(name)
            index = None if ids is None else _within(np.flatnonzero(wide[ids]), np.flatnonzero(keep[ids]))
            part = copy.deepcopy(old[name]) if index is None else slice_channelwise(old[name], index)
            set_submodule(new, name, part)
    return new


def _within(before: Index, after: Index) -> Index:
    """Where the channels that stay are among those there were."""
    return np.flatnonzero(np.isin(before, after))


def _narrow(
    database: LevelDatabase,
    layer: Layer,
    old: Mapping[str, nn.Module],
    had: Index,
    outer: Index,
    steps: Sequence[MethodConfig],
    columns: Index,
) -> dict[str, nn.Module]:
    """A trained layer that ``had`` some of the original's inputs, and its norm, at ``columns`` of them (new ones have zeros) and
    at ``outer`` of its outputs."""
    part, norm = old[layer.name], old[layer.norm] if layer.norm else None
    last: Any = part[-1] if isinstance(part, nn.Sequential) else part
    weight, bias = fold_norm(composed(part), last.bias, norm)
    if not layer.depthwise:
        whole = weight.new_zeros(len(weight), len(layer.inputs), *weight.shape[2:])
        whole[:, torch.from_numpy(had)] = weight
        weight = whole[:, torch.from_numpy(columns)]
    if not steps and len(outer) == len(weight) and np.array_equal(had, columns):
        return {name: copy.deepcopy(old[name]) for name in (layer.name, layer.norm) if name}
    like: Any = database.graph.module.get_submodule(layer.name)
    biased = like.bias is not None or norm is not None or bool(steps) or weight.shape[1] < like.weight.shape[1]
    rows, context = torch.from_numpy(outer), database.context(layer, columns, weight)
    return database.neutral(layer, weight[rows], bias[rows] if biased else None, context, steps)

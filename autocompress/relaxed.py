"""The network between its plans: each layer runs the mixture of its levels, so that probabilities of levels have a gradient.

A plan's channels are gone where the layers that read them have zero columns, so every level is a change of one layer's
effective weight (refitted, factorized, rounded, in the dense layer's shape) or the factor of a residual branch. With ``c`` the
most likely plan, a layer's weight is ``W(c) + sum over options o of p_o (W(c with o) - W(c))``: a channel group mixes the refits
of each layer that reads it, a layer site its formats, a block keeps ``1 - p(drop)`` of its branch; a norm across a hidden width
reads each channel times the probability that it lives. At probabilities of 0 and 1
that is the plan itself. The idea is DiffRate's (Chen et al. 2023), where what is mixed are counts of tokens.

Where it is an approximation: low-rank factors are those for the outputs that the most likely plan keeps, activations are
rounded with straight-through gradients on ranges of the dense model, and values between two int8 factors and biases are not
rounded.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from autocompress.database import LevelDatabase
from autocompress.deploy import deploy_layer
from autocompress.graph import Keep, Layer
from autocompress.methods import InputChannels, StaticInt8
from autocompress.methods.factored import composed
from autocompress.methods.quantization import ActivationQuant
from autocompress.prefix import ByteCache
from autocompress.search.tables import switch
from autocompress.tasks.augment import images_first
from autocompress.types import MethodConfig, Plan, best_levels

CACHE_BYTES = 512 * 2**20
"""Effective weights of levels that are kept."""

FloatArray = npt.NDArray[np.float64]
Affine = tuple[Tensor, Tensor]
"""Weight and bias in the dense layer's shape, norm folded."""
Option = tuple[int, Keep, InputChannels | None, Sequence[MethodConfig]]
"""Number of a (site, level) pair, the channels, the layer's choice of inputs and its methods once it is taken."""


class Relaxed:
    """Loss of mixtures of one database's levels, with its gradient."""

    def __init__(self, database: LevelDatabase) -> None:
        self.database, self.graph, self.space = database, database.graph, database.space
        self.offsets = [0, *itertools.accumulate(self.space.n_levels)]
        site = {site.name: i for i, site in enumerate(self.space.sites)}
        groups = [(site[f"channels:{g.name}"], g) for g in self.graph.groups if f"channels:{g.name}" in site]
        self.own = {layer.name: site.get(f"layer:{layer.name}") for layer in self.graph.layers.values()}
        self.reads = {layer.name: site.get(f"inputs:{layer.name}") for layer in self.graph.layers.values()}
        self.groups = {
            layer.name: [i for i, g in groups if not layer.depthwise and np.isin(layer.inputs, g.classes).any()]
            for layer in self.graph.layers.values()
        }
        self.drops = {
            block.add: (block.skip, self.offsets[site[f"block:{block.name}"]] + 1)
            for block in self.graph.blocks
            if f"block:{block.name}" in site
        }
        norms = [n for n in self.graph.channelwise if isinstance(self.graph.module.get_submodule(n), nn.RMSNorm)]
        self.across = {name: sites for name in norms if (sites := [i for i, g in groups if name in g.carried])}
        self.keeps = {(i, v): self._one(i, v) for i, _ in groups for v in range(self.space.n_levels[i])}
        self.rounding = self._rounding()
        self._grids: dict[str, ActivationQuant] | None = None
        self._made: ByteCache[tuple[object, ...], Affine] = ByteCache(CACHE_BYTES)

    def loss_and_grad(
        self, probabilities: FloatArray, batches: Iterable[tuple[Tensor, Callable[[Tensor], Tensor]]]
    ) -> tuple[float, FloatArray]:
        """The sum of ``loss(outputs)`` over batches of ``(inputs, loss)``, and its gradient.

        ``probabilities``, gradient  # (n_options,). Entries of one site compare with one another: what they have in common
        has no meaning, as probabilities add up to 1. A gradient that is not finite is zero.
        """
        plan = best_levels(probabilities, self.offsets)
        weights = {name: self._mixed(layer, plan, probabilities) for name, layer in self.graph.layers.items()}
        gates = {add: torch.tensor(1 - probabilities[drop]).float() for add, (_, drop) in self.drops.items()}
        shares = {node: torch.tensor(self._share(node, probabilities)).float() for node in self.rounding}
        alive = {name: torch.tensor(self._alive(name, probabilities)).float() for name in self.across}
        leaves = [
            *itertools.chain.from_iterable(weights.values()), *gates.values(), *shares.values(), *alive.values()
        ]  # fmt: skip
        for leaf in leaves:
            leaf.requires_grad_(True)
        walk, total = _Walk(self, weights, gates, shares, self.grids(), alive), 0.0
        for inputs, loss_of in batches:
            loss = loss_of(walk.run(images_first(inputs)))
            torch.autograd.backward(loss, inputs=leaves)
            total += float(loss.detach())
        gradient = np.zeros(len(probabilities))
        for name, (weight, bias) in weights.items():
            self._collect(self.graph.layers[name], plan, weight.grad, bias.grad, gradient)
        for add, (_, drop) in self.drops.items():
            gradient[drop] -= _number(gates[add].grad)
        for name, values in alive.items():
            for option, removed in self._removing(name):
                gradient[option] -= 0.0 if values.grad is None else float(values.grad.double().numpy() @ removed)
        for node in self.rounding:
            slope = _number(shares[node].grad)
            for options in self.rounding[node]:
                others = [o for o in self.rounding[node] if o is not options]
                gradient[options] += slope * np.prod([1 - probabilities[o].sum() for o in others])
        return total, np.where(np.isfinite(gradient), gradient, 0.0)

    # ------------------------------------------------------------ weights

    def _one(self, site: int, level: int) -> Keep:
        """Channels that live when one site is at a level and all others are dense."""
        plan = [0] * len(self.space.sites)
        plan[site] = level
        return self.database.keep(tuple(plan))

    def _options(self, layer: Layer, plan: Plan) -> Iterator[Option]:
        """All ways to switch one site that decides about a layer's weight."""
        keep, reads = self.database.keep(plan), self.database.reads(plan, layer.name)
        steps = self.database.layer_steps(plan, layer.name)
        for site in self.groups[layer.name]:
            for level in range(self.space.n_levels[site]):
                if level != plan[site]:
                    mine = self.keeps[site, self.space.n_levels[site] - 1]  # the sets are nested
                    yield self.offsets[site] + level, (keep | ~mine) & self.keeps[site, level], reads, steps
        inputs, own = self.reads[layer.name], self.own[layer.name]
        if inputs is not None:
            for level in range(self.space.n_levels[inputs]):
                if level != plan[inputs]:
                    other = self.database.reads(switch(plan, inputs, level), layer.name)
                    yield self.offsets[inputs] + level, keep, other, steps
        if own is not None:
            for level, choice in enumerate(self.space.levels[own]):
                if level != plan[own]:
                    yield self.offsets[own] + level, keep, reads, choice.steps

    def _base(self, layer: Layer, plan: Plan) -> Affine:
        database, name = self.database, layer.name
        return self._affine(layer, database.keep(plan), database.reads(plan, name), database.layer_steps(plan, name))

    def _mixed(self, layer: Layer, plan: Plan, probabilities: FloatArray) -> Affine:
        base = self._base(layer, plan)
        weight, bias = base[0].clone(), base[1].clone()
        for option, keep, reads, steps in self._options(layer, plan):
            share = float(probabilities[option])
            if share:
                other = self._affine(layer, keep, reads, steps)
                weight.add_(other[0] - base[0], alpha=share)
                bias.add_(other[1] - base[1], alpha=share)
        return weight, bias

    def _collect(
        self, layer: Layer, plan: Plan, weight: Tensor | None, bias: Tensor | None, gradient: FloatArray
    ) -> None:
        """Add the slope of every option that changes a layer, from the slopes of its weight and bias."""
        if weight is None or bias is None:
            return
        base = self._base(layer, plan)
        for option, keep, reads, steps in self._options(layer, plan):
            other = self._affine(layer, keep, reads, steps)
            gradient[option] += float(((other[0] - base[0]) * weight).sum() + ((other[1] - base[1]) * bias).sum())

    def _affine(self, layer: Layer, keep: Keep, reads: InputChannels | None, steps: Sequence[MethodConfig]) -> Affine:
        """What a plan makes of a layer, with zeros where it has no columns.

        Fitted methods depend on the outputs that are kept; outputs that are not stay as they are without them.
        """
        every = np.arange(len(layer.outputs))
        columns = np.arange(len(layer.inputs)) if layer.depthwise else self.database.columns(layer, keep, reads)
        rows = layer.kept_outputs(keep) if any(step.fitted for step in steps) else every
        key = (layer.name, columns.tobytes(), rows.tobytes(), steps)
        found = self._made.get(key)
        if found is not None:
            return found
        live = self.database.layer_modules(layer, columns, rows, steps)
        part = deploy_layer(live[layer.name], live[layer.norm] if layer.norm else None, None)
        small, shift = _composed(part)
        at = torch.from_numpy(rows)
        if len(rows) < len(every):
            whole = self._affine(layer, keep, reads, ())
            weight, bias = whole[0].clone(), whole[1].clone()
            weight[at] = 0.0
            bias[at] = shift
        else:
            inputs = small.shape[1] if layer.depthwise else len(layer.inputs)
            weight, bias = small.new_zeros(len(every), inputs, *small.shape[2:]), shift
        if layer.depthwise:
            weight[at] = small
        else:
            weight[at[:, None], torch.from_numpy(columns)] = small
        made = weight.detach().contiguous(), bias.detach()
        return self._made.put(key, made, sum(t.nbytes for t in made))

    # ------------------------------------------------------------ norms across hidden widths

    def _removing(self, norm: str) -> Iterator[tuple[int, npt.NDArray[np.bool_]]]:
        """Options that take channels from a norm, and which.  # (channels,)"""
        for site in self.across[norm]:
            for level in range(1, self.space.n_levels[site]):
                yield self.offsets[site] + level, ~self.keeps[site, level][self.graph.channelwise[norm]]

    def _alive(self, norm: str, probabilities: FloatArray) -> FloatArray:
        """Probability that each channel of a norm lives.  # (channels,)"""
        alive = np.ones(len(self.graph.channelwise[norm]))
        for option, removed in self._removing(norm):
            alive -= probabilities[option] * removed
        return alive

    # ------------------------------------------------------------ rounded activations

    def _rounding(self) -> dict[str, list[npt.NDArray[np.int64]]]:
        """Node whose value int8 levels round -> the options of each layer that do."""
        outputs = {s.name for n in self.graph.module.graph.nodes if n.op == "output" for s in n.all_input_nodes}
        found: dict[str, list[npt.NDArray[np.int64]]] = {}
        for layer in self.graph.layers.values():
            own = self.own[layer.name]
            levels = self.space.levels[own] if own is not None else ()
            int8 = [v for v, level in enumerate(levels) if any(isinstance(s, StaticInt8) for s in level.steps)]
            if own is None or not int8:
                continue
            for node in dict.fromkeys((layer.source, layer.result)):
                if node not in outputs:
                    found.setdefault(node, []).append(self.offsets[own] + np.array(int8, np.int64))
        return found

    def _share(self, node: str, probabilities: FloatArray) -> float:
        """Probability that any layer rounds a value."""
        return float(1 - np.prod([1 - probabilities[options].sum() for options in self.rounding[node]]))

    def grids(self) -> Mapping[str, ActivationQuant]:
        """Grids of values on the dense model's ranges."""
        if self._grids is None:
            weights = {n: self._affine(x, self.graph.keep_all(), None, ()) for n, x in self.graph.layers.items()}
            walk = _Walk(self, weights, {}, {}, {})
            walk.ranges = dict.fromkeys(self.rounding, (0.0, 0.0))
            with torch.no_grad():
                for inputs in self.database.range_batches() if self.rounding else ():
                    walk.run(images_first(inputs))
            self._grids = {node: ActivationQuant(*walk.ranges[node]) for node in self.rounding}
        return self._grids


class _Walk(fx.Interpreter):
    """Runs the dense graph with other weights. ``ranges``: smallest and largest values of these nodes, widened by every run."""

    def __init__(
        self,
        owner: Relaxed,
        weights: Mapping[str, Affine],
        gates: Mapping[str, Tensor],
        shares: Mapping[str, Tensor],
        grids: Mapping[str, ActivationQuant],
        alive: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__(owner.graph.module)
        self.alive, self.database = alive or {}, owner.database
        self.weights, self.gates, self.shares, self.grids = weights, gates, shares, grids
        self.norms = {layer.norm for layer in owner.graph.layers.values() if layer.norm}
        self.skips = {add: skip for add, (skip, _) in owner.drops.items()}
        self.ranges: dict[str, tuple[float, float]] = {}

    def run_node(self, node: fx.Node) -> Any:
        value = self._value(node)
        if node.name in self.ranges:
            low, high = self.ranges[node.name]
            self.ranges[node.name] = min(low, float(value.min())), max(high, float(value.max()))
        if node.name in self.shares:
            value = value + self.shares[node.name] * (self.grids[node.name](value) - value).detach()
        return value

    def _value(self, node: fx.Node) -> Any:
        target = str(node.target)
        if node.op == "call_module" and target in self.weights:
            weight, bias = self.weights[target]
            (x,), _ = self.fetch_args_kwargs_from_env(node)
            layer = self.fetch_attr(target)
            return layer._conv_forward(x, weight, bias) if isinstance(layer, nn.Conv2d) else F.linear(x, weight, bias)
        if node.op == "call_module" and target in self.norms:
            return self.env[node.all_input_nodes[0]]
        if node.op == "call_module" and target in self.alive:
            alive = self.alive[target]
            normed: Tensor = self.fetch_attr(target)(self.env[node.all_input_nodes[0]] * alive)
            return normed * self.database.remaining(target, alive)
        if node.name in self.gates:
            skip, branch = node.all_input_nodes
            if skip.name != self.skips[node.name]:
                skip, branch = branch, skip
            return self.env[skip] + self.gates[node.name] * self.env[branch]
        return super().run_node(node)


def _composed(part: nn.Module) -> Affine:
    """Weight and bias of a layer, or of its factors as one layer."""
    weight, bias = composed(part), part[-1].bias if isinstance(part, nn.Sequential) else part.bias
    return weight, bias if isinstance(bias, Tensor) else weight.new_zeros(len(weight))


def _number(slope: Tensor | None) -> float:
    return 0.0 if slope is None else float(slope)

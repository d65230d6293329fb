"""The second rung of refit: layer by layer, on the *compressed* model's inputs towards the *dense* model's values.

Each convolution and linear layer is refitted in the order it runs (He et al. 2017, asymmetric form), and where its output
is added to a residual stream whose other side is already known, towards what the *sum* should be: a layer then also makes
good what earlier removals did to the stream. Where a ReLU follows, only what it lets through is to be reproduced: targets
below zero become whatever the layer makes of them below zero, in a few rounds (Zhang et al. 2016, "Accelerating very deep
convolutional networks", section 3.2). The batch norms get the statistics of the compressed model.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from autocompress.database import RANGE_IMAGES, LevelDatabase
from autocompress.deploy import fold_norm, set_submodule
from autocompress.errors import Cancelled
from autocompress.gram import Moments, output_rows, positions, solve, unfold
from autocompress.graph import Keep, Layer
from autocompress.methods import Factored, LayerContext
from autocompress.methods.quantization import ActivationQuant
from autocompress.methods.ranges import RangeObserver, freeze_ranges
from autocompress.op_kinds import is_relu, relu_ceiling
from autocompress.types import MethodConfig, Plan

FINISH_IMAGES = 1024
ROWS_PER_INPUT = 90
RELU_ROUNDS = 2
REMEMBERED = 2**26
"""Rows of so many numbers (256 MB) are kept for the next pass; gathering windows again takes longer than multiplying them."""


def finish(
    database: LevelDatabase,
    plan: Plan,
    cancelled: Callable[[], bool] | None = None,
    images: int = FINISH_IMAGES,
) -> fx.GraphModule:
    """The live model of a plan with every layer behind a change refitted; the dense plan comes back unchanged."""
    model = database.stitch(plan)
    if plan == database.space.dense:
        return model
    with torch.no_grad():
        _Refit(database, plan, model, images, cancelled).run()
    return model


def carry_over(
    database: LevelDatabase,
    plan: Plan,
    model: fx.GraphModule,
    towards: fx.GraphModule,
    before: Plan,
    steps: Callable[[str], Sequence[MethodConfig]],
    cancelled: Callable[[], bool] | None = None,
) -> None:
    """Refit a plan's live model in its place towards that of a wider plan ``before``, as :func:`finish` does to the original.

    ``steps``: of a layer's name, the methods it has.
    """
    with torch.no_grad():
        refit = _Refit(database, plan, model, FINISH_IMAGES, cancelled)
        refit.wide, refit.steps = database.keep(before), steps
        refit.dense = _Lazy(towards, refit.inputs)
        refit.run()


class _Refit:
    """Runs the dense and the compressed graph side by side, a node at a time, over all calibration inputs at once.

    ``dense`` may be narrower than the original: ``wide`` says what it has.
    """

    def __init__(
        self,
        database: LevelDatabase,
        plan: Plan,
        model: fx.GraphModule,
        images: int,
        cancelled: Callable[[], bool] | None,
    ) -> None:
        self.database, self.plan, self.model, self.cancelled = database, plan, model, cancelled
        self.keep: Keep = database.keep(plan)
        self.wide: Keep = database.graph.keep_all()
        self.steps: Callable[[str], Sequence[MethodConfig]] = lambda name: database.layer_steps(plan, name)
        self.inputs = list(database._batches(images))
        self.images = sum(len(batch) for batch in self.inputs)
        self.range_batches = -(-RANGE_IMAGES // database.batch_size)
        self.dense = _Lazy(database.graph.module, self.inputs)
        self.layers = {layer.node: layer for layer in database.graph.layers.values()}
        self.norms = {layer.norm: layer for layer in database.graph.layers.values() if layer.norm}
        self.env: dict[fx.Node, list[Any]] = {}
        self.generator = torch.Generator().manual_seed(database.seed)
        self.changed: set[fx.Node] = set()

    def run(self) -> None:
        last_use = _last_uses(self.model.graph)
        for node in self.model.graph.nodes:
            if self.cancelled and self.cancelled():
                raise Cancelled("Stopped while refitting; everything evaluated so far is kept.")
            if node.op == "output":
                break
            if node.name in self.layers:
                self._refit_layer(node, self.layers[node.name])
            self.env[node] = self._outputs(node)
            self._scale_for_tied_heads(node)
            if self._reads_a_change(node):
                self.changed.add(node)
            for done in last_use.get(node, ()):
                self.env.pop(done, None)
            self.dense.passed(node.name)

    def _reads_a_change(self, node: fx.Node) -> bool:
        """Whether an input differs from the dense model's: it was changed, or a dropped block stood between."""
        if any(source in self.changed for source in node.all_input_nodes):
            return True
        dense = self.dense.by_name.get(node.name)
        names = {self._unquantized(source).name for source in node.all_input_nodes}
        return dense is not None and names != {source.name for source in dense.all_input_nodes}

    def _is_quantizer(self, node: fx.Node) -> bool:
        return node.op == "call_module" and isinstance(self.model.get_submodule(str(node.target)), ActivationQuant)

    def _unquantized(self, node: fx.Node) -> fx.Node:
        return node.all_input_nodes[0] if self._is_quantizer(node) else node

    def _outputs(self, node: fx.Node) -> list[Any]:
        if self._is_quantizer(node):
            self._recalibrate(node)
        return [run_node(self.model, node, self.env, i, batch) for i, batch in enumerate(self.inputs)]

    def _refit_layer(self, node: fx.Node, layer: Layer) -> None:
        """Replace one layer's weights by the least-squares fit to what the dense model has at its place."""
        steps, removed = self.steps(layer.name), self.keep != self.wide
        kept_in = self.database.inputs(self.plan, layer, self.keep)
        selected = len(kept_in) < len(layer.kept_inputs(self.keep))
        source = node.all_input_nodes[0]
        new_inputs = self._reads_a_change(node) or removed[layer.inputs].any() or selected
        if steps or new_inputs or removed[layer.outputs].any():
            self.changed.add(node)
        gram = self.database.gram(layer.name)
        if gram is None or not (new_inputs or any(isinstance(step, Factored) for step in steps)):
            return  # on the inputs it was trained on, a layer's own weights are the best fit before rounding
        lost = len(kept_in) < len(layer.inputs) or any(isinstance(step, Factored) for step in steps)
        rows = _Rows(self, layer, node, -(-ROWS_PER_INPUT * len(gram) // self.images))
        biased = rows.like.bias is not None or layer.norm is not None or lost  # as the cost tables have it
        moments, solution = self._fit(rows, biased)
        weight, bias = solution[:, :-1].float(), solution[:, -1].float() if biased else None
        kept_out = layer.kept_outputs(self.keep)
        shape = (len(kept_out), len(kept_in), *self.database.folded(layer.name)[0].shape[2:])
        context = self.database.informed(LayerContext(moments.gram), layer, kept_in, kept_out, steps)
        made = self.database.neutral(layer, weight.reshape(shape), bias, context, steps)
        for name, part in made.items():
            self._install(name, part, layer)
        self._calibrate_inside(layer, source)

    def _scale_for_tied_heads(self, node: fx.Node) -> None:
        """Give a narrowed norm that a tied head reads the size that reproduces the original's logits best.

        The head's weight is the embedding's and cannot be refitted. One factor by least squares; logits without their mean
        over the vocabulary, which no probability depends on. A factor a channel is better on the calibration inputs and worse
        on others.
        """
        ids = self.database.graph.channelwise.get(str(node.target))
        heads = [user for user in node.users if user.op == "call_function" and user.target is F.linear]
        if ids is None or not heads or bool((self.keep == self.wide)[ids].all()):
            return
        norm: Any = self.model.get_submodule(str(node.target))
        if not isinstance(norm, nn.RMSNorm):
            return
        target = operator.attrgetter(str(heads[0].all_input_nodes[1].target))
        mine, theirs = (w - w.mean(0) for w in (target(self.model).detach(), target(self.dense.module).detach()))
        own, cross = mine.T @ mine, mine.T @ theirs  # (k, k), (k, n)
        up = down = 0.0
        for i, x in enumerate(self.env[node]):
            z = self.dense.value(node.name, i)
            up += float(((x @ cross) * z).sum())
            down += float(((x @ own) * x).sum())
        if up > 0 and down > 0:
            norm.weight.data *= up / down
            self.env[node] = [x * (up / down) for x in self.env[node]]

    def _fit(self, rows: _Rows, biased: bool) -> tuple[Moments, Tensor]:
        """Least squares up to the ReLU behind; the bias stands last, 0 unless ``biased``.  # moments, (out, in * area + 1)"""
        moments = Moments()
        for x, target, offset in rows:
            moments.add(x, target - offset)
        solution = solve(moments.gram, moments.cross, bias=biased)
        if (ceiling := rows.ceiling) is None:
            return moments, solution
        for _ in range(RELU_ROUNDS):
            cross = torch.zeros_like(solution)
            for x, target, offset in rows:
                made = x @ solution.float().T + offset
                low = torch.where(target < 0, made.clamp_max(0), target)
                wanted = torch.where(target > ceiling, made.clamp_min(ceiling), low)
                cross += ((wanted - offset).T @ x).double()
            solution = solve(moments.gram, cross / moments.rows, bias=biased)
        return moments, solution

    def ceiling(self, layer: Layer, total: str | None) -> float | None:
        """Where the ReLU behind a layer, or behind the sum it goes into, ends; ``None`` without one."""
        module = self.dense.module
        name = layer.activation
        if total is not None:
            users = list(self.dense.by_name[total].users)
            name = users[0].name if len(users) == 1 and is_relu(module, users[0]) else None
        return None if name is None else relu_ceiling(module, self.dense.by_name[name])

    def other_side(self, layer: Layer) -> tuple[fx.Node | None, str | None]:
        """If the layer's result is added to a value already known: that value's node and the addition's name."""
        if layer.activation is not None:
            return None, None
        node = next(n for n in self.model.graph.nodes if n.name == layer.result)
        while len(node.users) == 1 and self._is_quantizer(next(iter(node.users))):
            node = next(iter(node.users))
        if len(node.users) != 1:
            return None, None
        add = next(iter(node.users))
        op = next((op for op in self.database.graph.ops if op.node == add.name and op.kind == "add"), None)
        if op is None or len(add.all_input_nodes) != 2:
            return None, None
        other = next((n for n in add.all_input_nodes if n is not node), None)
        if other is None or other not in self.env:
            return None, None
        values = self.database.graph.values
        if values[self._unquantized(other).name].shape != values[layer.node].shape:
            return None, None  # broadcast
        return other, add.name

    def _recalibrate(self, node: fx.Node) -> None:
        """Ranges of the compressed model as it is now, on as many inputs as at the database's rung."""
        observer = RangeObserver(self.database.ranges)
        for batch in self.env[node.all_input_nodes[0]][: self.range_batches]:
            observer(batch)
        set_submodule(self.model, str(node.target), ActivationQuant(*observer.range()))

    def kept_of(self, node: str) -> Tensor:
        """Where the channels that live are among those of the dense graph's node."""
        ids = self.database.graph.values[node].ids
        return torch.from_numpy(np.flatnonzero(self.keep[ids][self.wide[ids]]))

    def _install(self, name: str, part: nn.Module, layer: Layer) -> None:
        if isinstance(part, nn.Sequential) and layer in self.database.int8_layers(self.plan):
            part = nn.Sequential(part[0], RangeObserver(self.database.ranges), part[1])
        set_submodule(self.model, name, part)

    def _calibrate_inside(self, layer: Layer, source: fx.Node) -> None:
        """Ranges between the two factors of an int8 low-rank layer."""
        module = self.model.get_submodule(layer.name)
        if isinstance(module, nn.Sequential) and any(isinstance(part, RangeObserver) for part in module):
            for batch in self.env[source][: self.range_batches]:
                module(batch)
            freeze_ranges(module)


Rows = tuple[Tensor, Tensor, Tensor]  # (rows, in * area + 1), (rows, out), (rows, out) or (1, 1): one batch


class _Rows:
    """Input rows of one layer, what is to come of them, and what is added to its outputs: the same rows at every pass."""

    def __init__(self, refit: _Refit, layer: Layer, node: fx.Node, per_image: int) -> None:
        self.refit, self.layer = refit, layer
        self.like = refit.database.graph.module.get_submodule(layer.name)
        self.source = node.all_input_nodes[0]
        self.other, total = refit.other_side(layer)
        self.goal = total or layer.node
        self.ceiling = refit.ceiling(layer, total)
        self.kept = refit.kept_of(self.goal)
        self.where = [
            positions(self.like, refit.dense.value(self.goal, i), per_image, refit.generator)
            for i in range(len(refit.inputs))
        ]
        self.memory: list[Rows] = []

    def __iter__(self) -> Iterator[Rows]:
        if self.memory:
            yield from self.memory
            return
        numbers = 0
        for rows in self._gathered():
            numbers += rows[0].numel()
            if numbers <= REMEMBERED:
                self.memory.append(rows)
            yield rows
        if numbers > REMEMBERED:
            self.memory.clear()

    def _gathered(self) -> Iterator[Rows]:
        refit, like = self.refit, self.like
        for i, where in enumerate(self.where):
            target = output_rows(like, refit.dense.value(self.goal, i), where)[:, self.kept]
            offset = target.new_zeros(1, 1)
            if self.other is not None:
                offset = output_rows(like, refit.env[self.other][i], where)
            elif self.layer.norm:
                target = self._normed(target)
            yield unfold(like, refit.env[self.source][i], where), target, offset

    def _normed(self, target: Tensor) -> Tensor:
        """Dense pre-norm outputs -> what the norm makes of them: targets are in folded space."""
        norm: Any = self.refit.dense.module.get_submodule(str(self.layer.norm))
        factor, shift = fold_norm(torch.ones(norm.num_features), None, norm)
        return target * factor[self.kept] + shift[self.kept]


def run_node(model: fx.GraphModule, node: fx.Node, env: dict[fx.Node, list[Any]], i: int, batch: Tensor) -> Any:
    """The value of one node for batch ``i``, from the values its inputs have in ``env``."""
    if node.op == "placeholder":
        return batch
    args = fx.map_arg(node.args, lambda n: env[n][i])
    kwargs = fx.map_arg(node.kwargs, lambda n: env[n][i])
    if node.op == "call_module":
        return model.get_submodule(str(node.target))(*args, **kwargs)
    if node.op == "call_function":
        return node.target(*args, **kwargs)  # type: ignore[operator]
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    value: Any = model
    for part in str(node.target).split("."):
        value = getattr(value, part)
    return value


class _Lazy:
    """Values of the dense graph, advanced only as far as asked, forgotten once the compressed walk has passed their last use."""

    def __init__(self, module: fx.GraphModule, inputs: list[Tensor]) -> None:
        self.module, self.inputs = module, inputs
        self.nodes = list(module.graph.nodes)
        self.at = 0
        self.env: dict[fx.Node, list[Any]] = {}
        self.by_name = {node.name: node for node in self.nodes}
        index = {node: i for i, node in enumerate(self.nodes)}
        self.index = index
        self.last = {node: max((index[user] for user in node.users), default=index[node]) for node in self.nodes}

    def passed(self, name: str) -> None:
        """The compressed walk is beyond this node."""
        if name in self.by_name:
            line = min(self.index[self.by_name[name]], self.at - 1)
            for done in [node for node in self.env if self.last[node] <= line]:
                del self.env[done]

    def value(self, name: str, i: int) -> Tensor:
        want = self.by_name[name]
        while want not in self.env:
            node = self.nodes[self.at]
            self.env[node] = [run_node(self.module, node, self.env, j, b) for j, b in enumerate(self.inputs)]
            self.at += 1
        return self.env[want][i]  # type: ignore[no-any-return]


def _last_uses(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """Node -> nodes whose value nobody needs after it."""
    last: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        for source in node.all_input_nodes:
            last[source] = node
    found: dict[fx.Node, list[fx.Node]] = {}
    for source, node in last.items():
        found.setdefault(node, []).append(source)
    return found

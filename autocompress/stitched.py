"""Stitched plans without building a model for each: layers are made once, and values that plans share are computed once.

``LevelDatabase.stitch`` and ``deploy`` give a whole model, to be trained and exported. A judge only needs outputs: here a
plan becomes a program over the dense graph's nodes, with the layers of all other plans that say the same about them, and
:mod:`~autocompress.prefix` runs what has not been run yet. The outputs are those of ``deploy(database.stitch(plan))``, to the
bit.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, fx, nn

from autocompress.database import LevelDatabase
from autocompress.deploy import deploy_layer
from autocompress.fitness import images_last, weights_last
from autocompress.graph import Keep, Layer, aliases, constant, tied_to
from autocompress.methods.quantization import ActivationQuant
from autocompress.methods.ranges import RangeObserver
from autocompress.prefix import INPUT, Activations, ByteCache, Digest, Program, choose_cuts, find_cuts
from autocompress.tasks import Split
from autocompress.types import MethodConfig, Plan
from autocompress.where import Where

LAYER_BYTES = 256 * 2**20
REFERENCES = 2
"""The kept values of so many plans fit together."""
MEMO = 100_000
BETWEEN = "between the factors of "

Range = tuple[float, float]
Key = tuple[object, ...]


class Stitched:
    """Outputs of stitched plans on splits; see the module's docstring.

    ``few``, ``many``: examples of the smallest and of the largest run; they decide how much of a run can be kept.
    ``limit``: bytes of activations to keep; ``None`` takes :func:`~autocompress.prefix.default_limit`, 0 keeps none. ``where``:
    the device and the precision of what runs; layers are made on the processor and moved there.
    """

    def __init__(
        self, database: LevelDatabase, few: int, many: int, limit: int | None = None, where: Where | None = None
    ) -> None:
        self.database, self.graph, self.few = database, database.graph, few
        self.where = where or Where()
        self.activations = Activations(self.where.room() if limit is None else limit)
        self.dense = dict(self.graph.module.named_modules(remove_duplicate=False))
        self.norms = {layer.norm: layer for layer in self.graph.layers.values() if layer.norm}
        self.worth = self._worth(few, many)
        self._modules: ByteCache[Key, Mapping[str, nn.Module]] = ByteCache(LAYER_BYTES)
        self._ranges: dict[Digest, Range] = {}
        self._fixed: dict[tuple[str, bytes], fx.Node] = {}

    def outputs(self, plan: Plan, split: Split, batch: int, span: range | None = None) -> Iterator[Tensor]:
        """Deployed outputs of a plan on the search split or a span of it, batch by batch.  # (batch, ...)"""
        program, target = self.program(plan)
        self.activations.expect(program, 2 if plan == self.database.space.dense else 1)
        prepare = self.database.task.prepare
        span = span or range(len(split))
        for start in range(span.start, span.stop, batch):
            stop = min(start + batch, span.stop)
            inputs = split.inputs[start:stop]
            with torch.inference_mode():
                (found,) = self.activations.run(
                    program,
                    [target],
                    (start, stop),
                    lambda inputs=inputs: images_last(self.where.put(prepare(inputs))),  # type: ignore[misc]
                    least=1 if len(span) <= self.few else 2,
                )
            yield found

    def _worth(self, few: int, many: int) -> dict[str, int]:
        """Nodes whose values are kept: 1 in small runs only, 2 in all."""
        cuts = find_cuts(self.graph)
        macs = [
            _macs(self.graph.values[layer.node].shape, self.dense[name]) for name, layer in self.graph.layers.items()
        ]
        room = self.activations.kept.limit // REFERENCES
        small, large = (choose_cuts(cuts, macs, room // max(n, 1)) for n in (few, many))
        return {**dict.fromkeys(small, 1), **dict.fromkeys(large, 2)}

    # ------------------------------------------------------------ plan -> program

    def program(self, plan: Plan) -> tuple[Program, Digest]:
        """The deployed model of a plan, and the digest of its output."""
        quantized = frozenset(self.database.quantized_nodes(plan))
        ranges = self._calibrated(plan, quantized) if quantized else {}
        walk = _Deployed(self, plan, quantized, ranges)
        return walk.program, walk.output

    def _calibrated(self, plan: Plan, quantized: frozenset[str]) -> Mapping[str, Range]:
        """Ranges of the quantized values on calibration inputs: by node, and ``BETWEEN`` the factors of layers."""
        live = _Live(self, plan, quantized)
        missing = [digest for digest in dict.fromkeys(live.observed.values()) if digest not in self._ranges]
        if missing:
            self.activations.expect(live.program)
            found = {digest: RangeObserver(self.database.ranges) for digest in missing}
            put = self.where.exact.put
            with torch.inference_mode():
                for place, inputs in enumerate(self.database.range_batches()):
                    values = self.activations.run(live.program, missing, f"ranges {place}", lambda x=inputs: put(x))  # type: ignore[misc]
                    for digest, value in zip(missing, values, strict=True):
                        found[digest](value.cpu())
            self._ranges.update({digest: observer.range() for digest, observer in found.items()})
        ranges = {name: self._ranges[digest] for name, digest in live.observed.items()}
        if len(self._ranges) > MEMO:
            self._ranges.clear()
        return ranges

    # ------------------------------------------------------------ what nodes run

    def live(
        self, layer: Layer, columns: Any, rows: Any, steps: Sequence[MethodConfig]
    ) -> tuple[Key, Mapping[str, nn.Module]]:
        """A layer and its norm before folding, and the key of all that decides them."""
        key = (layer.name, columns.tobytes(), rows.tobytes(), steps)
        return key, self.kept(key, lambda: self.database.layer_modules(layer, columns, rows, steps))

    def placed(self, key: Key, live: Mapping[str, nn.Module]) -> Mapping[str, nn.Module]:
        """Live modules in float32 on the device."""
        if not self.where.gpu:
            return live
        put = self.where.exact.put
        return self.kept(("placed", *key), lambda: {name: put(copy.deepcopy(part)) for name, part in live.items()})

    def kept(self, key: Key, make: Callable[[], Mapping[str, nn.Module]]) -> Mapping[str, nn.Module]:
        """Modules under a key, made once."""
        found = self._modules.get(key)
        if found is not None:
            return found
        made = make()
        size = sum(t.nbytes for part in made.values() for t in [*part.parameters(), *part.buffers()])
        return self._modules.put(key, made, size)

    def fixed(self, node: fx.Node, keep: Keep) -> fx.Node:
        """The node with its constants (paddings, slices, sizes) at these channels; a copy outside the graph if it has any."""
        value = self.graph.values.get(node.name)
        if value is None or value.fix is None:
            return node
        key = (node.name, keep.tobytes())
        if key not in self._fixed:
            if len(self._fixed) > MEMO // 100:
                self._fixed.clear()
            scratch = fx.Graph()
            copied = scratch.node_copy(node, {n: scratch.placeholder(n.name) for n in node.all_input_nodes}.__getitem__)
            value.fix(copied, keep)
            self._fixed[key] = copied
        return self._fixed[key]


class _Walk:
    """Turns the dense graph's nodes into the steps of a plan's program; subclasses know the form of its layers."""

    def __init__(self, owner: Stitched, plan: Plan) -> None:
        self.owner, self.plan, self.program = owner, plan, Program()
        database, graph = owner.database, owner.graph
        self.keep, dropped, self.selections = database.keep(plan), database.dropped(plan), database.selections(plan)
        self.stands_for = aliases(graph, dropped)
        gone = {name for block in graph.blocks if block.name in dropped for name in block.body}
        self.values: dict[str, Digest] = {}
        for node in graph.module.graph.nodes:
            if node.op == "output":
                self.output = self.value(node.args[0].name)
            elif node.name not in gone and node.name not in self.stands_for:
                self.values[node.name] = self.visit(node)

    def value(self, name: str) -> Digest:
        return self.values[self.stands_for.get(name, name)]

    def visit(self, node: fx.Node) -> Digest:
        target, graph = str(node.target), self.owner.graph
        if node.op == "placeholder":
            return INPUT
        if node.op == "call_module" and target in graph.layers:
            layer = graph.layers[target]
            return self.layer(node, layer, *self.made(layer))
        if node.op == "call_module" and target in self.owner.norms:
            return self.norm(node, self.owner.norms[target])
        return self.other(node)

    def made(self, layer: Layer) -> tuple[Key, Mapping[str, nn.Module]]:
        """A live layer as the plan has it."""
        database = self.owner.database
        columns = database.inputs(self.plan, layer, self.keep)
        steps = database.layer_steps(self.plan, layer.name)
        return self.owner.live(layer, columns, layer.kept_outputs(self.keep), steps)

    def layer(self, node: fx.Node, layer: Layer, key: Key, live: Mapping[str, nn.Module]) -> Digest:
        raise NotImplementedError

    def norm(self, node: fx.Node, layer: Layer) -> Digest:
        raise NotImplementedError

    def form(self, tensors: Any) -> Any:
        """How tensors lie in memory."""
        raise NotImplementedError

    def other(self, node: fx.Node) -> Digest:
        """What is no layer: as in the dense model, at the kept channels."""
        new = self.owner.fixed(node, self.keep)
        target = str(new.target)
        what: object = (new.op, target, node.name, new.args, new.kwargs)
        if new.op == "get_attr":
            graph = self.owner.graph
            tensor, owner = self.form(constant(graph, target, self.keep)), tied_to(graph, target)
            return self.program.add(
                (what, self.keep[graph.channelwise[owner]].tobytes() if owner else None), (), lambda: tensor
            )
        if new.op == "call_module":
            ids = self.owner.graph.channelwise.get(target)
            index = None if ids is None else np.flatnonzero(self.keep[ids])
            what = (what, None if index is None else index.tobytes())
            return self.step(node, what, self._module(target, index), new.args, new.kwargs)
        if new.op == "call_method":
            return self.step(node, what, _method(target), new.args, new.kwargs)
        return self.step(node, what, cast(Callable[..., Any], new.target), new.args, new.kwargs)

    def _module(self, target: str, index: Any) -> nn.Module:
        dense, narrow = self.owner.dense[target], self.owner.database.narrow
        key = (type(self).__name__, target, None if index is None else index.tobytes())

        def make() -> Mapping[str, nn.Module]:
            return {target: self.form(copy.deepcopy(dense) if index is None else narrow(target, index))}

        return self.owner.kept(key, make)[target]

    def step(self, node: fx.Node, what: object, call: Callable[..., Any], args: Any, kwargs: Any) -> Digest:
        names: dict[str, None] = {}
        fx.map_arg((args, kwargs), lambda n: names.setdefault(n.name))
        inputs = [self.value(name) for name in names]
        if (selection := self.selections.get(node.name)) is not None:
            what_is_read = ("select", selection.index.tolist())
            inputs = [self.program.add(what_is_read, inputs, self.owner.where.exact.put(selection))]
        if kwargs or len(args) != 1 or not isinstance(args[0], fx.Node):
            call = _with(call, tuple(names), args, kwargs)
        return self.program.add(what, inputs, call, self.owner.worth.get(node.name, 0))


def _method(name: str) -> Callable[..., Any]:
    def call(first: Any, *rest: Any, **more: Any) -> Any:
        return getattr(first, name)(*rest, **more)

    return call


def _with(call: Callable[..., Any], names: Sequence[str], args: Any, kwargs: Any) -> Callable[..., Any]:
    """The call as a function of the values of ``names`` alone."""

    def run(*values: Any) -> Any:
        by_name = dict(zip(names, values, strict=True))
        return call(*fx.map_arg(args, lambda n: by_name[n.name]), **fx.map_arg(kwargs, lambda n: by_name[n.name]))

    return run


class _Live(_Walk):
    """The model before folding and rounding of activations, as ranges are calibrated on it. ``observed``: what has a range."""

    def __init__(self, owner: Stitched, plan: Plan, quantized: frozenset[str]) -> None:
        self.quantized, self.observed = quantized, dict[str, Digest]()
        self.int8 = {layer.name for layer in owner.database.int8_layers(plan)}
        super().__init__(owner, plan)

    def visit(self, node: fx.Node) -> Digest:
        digest = super().visit(node)
        if node.name in self.quantized:
            self.observed[node.name] = digest
        return digest

    def layer(self, node: fx.Node, layer: Layer, key: Key, live: Mapping[str, nn.Module]) -> Digest:
        module = self.owner.placed(key, live)[layer.name]
        if not isinstance(module, nn.Sequential) or layer.name not in self.int8:
            return self.step(node, ("live", node.name, key), module, node.args, node.kwargs)
        middle = self.step(node, ("first", node.name, key), module[0], node.args, node.kwargs)
        self.observed[BETWEEN + layer.name] = middle
        return self.program.add(("second", node.name, key), [middle], module[1])

    def norm(self, node: fx.Node, layer: Layer) -> Digest:
        key, live = self.made(layer)
        module = self.owner.placed(key, live)[str(layer.norm)]
        return self.step(node, ("norm", node.name, key), module, node.args, node.kwargs)

    def form(self, tensors: Any) -> Any:
        return self.owner.where.exact.put(tensors)


class _Deployed(_Walk):
    """Norms folded, weights and quantized values rounded to their grids."""

    def __init__(self, owner: Stitched, plan: Plan, quantized: frozenset[str], ranges: Mapping[str, Range]) -> None:
        self.quantized, self.ranges = quantized, ranges
        self.grids: dict[str, ActivationQuant] = {}
        super().__init__(owner, plan)

    def visit(self, node: fx.Node) -> Digest:
        digest = super().visit(node)
        if node.name not in self.quantized:
            return digest
        grid = self.grids[node.name] = ActivationQuant(*self.ranges[node.name])
        return self.program.add(("grid", grid.scale, grid.zero_point), [digest], grid)

    def layer(self, node: fx.Node, layer: Layer, key: Key, live: Mapping[str, nn.Module]) -> Digest:
        source = node.all_input_nodes[0].name
        grid = self.grids.get(self.stands_for.get(source, source))
        inner = self.ranges.get(BETWEEN + layer.name)
        whole = ("deployed", *key, grid and (grid.scale, grid.zero_point), inner)

        def make() -> Mapping[str, nn.Module]:
            module = live[layer.name]
            if inner is not None:
                module = nn.Sequential(module[0], ActivationQuant(*inner), module[1])  # type: ignore[index]
            norm = live[layer.norm] if layer.norm else None
            return {layer.name: self.form(_apart(deploy_layer(module, norm, grid), live[layer.name]).eval())}

        return self.step(node, (node.name, whole), self.owner.kept(whole, make)[layer.name], node.args, node.kwargs)

    def norm(self, node: fx.Node, layer: Layer) -> Digest:
        return self.value(layer.node)

    def form(self, tensors: Any) -> Any:
        return weights_last(self.owner.where.put(tensors))


def _apart(made: nn.Module, live: nn.Module) -> nn.Module:
    """What was made of a live layer, with copies of the live layer's own modules: they lie otherwise in memory."""
    own = {id(module) for module in live.modules()}
    if isinstance(made, nn.Sequential) and id(made) not in own:
        return nn.Sequential(*(_apart(part, live) for part in made))
    return copy.deepcopy(made) if id(made) in own else made


def _macs(shape: Sequence[int], module: nn.Module) -> float:
    """Multiply-accumulates of one example; for what cuts are worth."""
    weight = getattr(module, "weight", None)
    return (
        float(weight.numel() * np.prod(shape[2:] if weight.ndim == 4 else shape[1:-1])) if weight is not None else 0.0
    )

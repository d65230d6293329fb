"""Sites x levels -> weights. Built once a model: Gram matrices, channel orders; every budget and device is a query.

On disk: one safetensors file a chunk of layers, in a folder named by the content of model, data and settings, so that a
killed build goes on with the next chunk. Weights of a level are made when asked for (prune -> refit -> factorize ->
quantize) and kept in a least-recently-used cache with a byte limit.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, fx, nn

from autocompress.deploy import fold_norm
from autocompress.errors import Cancelled, StoreError, UnsupportedModel
from autocompress.files import write_atomically
from autocompress.fitness import images_last
from autocompress.gram import (
    MAX_INPUTS,
    Moments,
    columns_of,
    output_statistics,
    positions,
    refit,
    unfold,
    unfolded_size,
)
from autocompress.graph import Graph, Group, Keep, Layer, aliases, rebuild, slice_layer
from autocompress.methods import (
    CalibratedInt8,
    ChannelPruning,
    Factored,
    InputChannels,
    LayerContext,
    Sparse,
    StaticInt8,
    UDFCQuant,
    handler_of,
)
from autocompress.methods.datafree import UDFC, compensated, moments_of
from autocompress.methods.expected import Expected, expected_values
from autocompress.methods.fisher import block_moments, damped
from autocompress.methods.importance import GRADIENT_SCORES, WEIGHT_SCORES, random_importance
from autocompress.methods.inputs import Select, chosen, place, readers
from autocompress.methods.pruning import obs_order
from autocompress.methods.quantization import Ranges
from autocompress.methods.ranges import RangeObserver, freeze_ranges
from autocompress.prefix import ByteCache
from autocompress.results import Importance
from autocompress.slicing import make_layer, slice_channelwise
from autocompress.tasks import Task
from autocompress.tasks.augment import images_first
from autocompress.types import MethodConfig, Plan, SearchSpace, digest

VERSION = 4
GRAM_IMAGES = 1024
ROWS_PER_INPUT = 40
"""Rows of statistics per unfolded input: enough for a stable solve, few enough for two cores."""
TAYLOR_IMAGES = 512
FISHER_IMAGES = 1024
RANGE_IMAGES = 64
CHUNK_LAYERS = 12
BATCH = 64
CACHE_BYTES = 512 * 2**20
CONTEXT_BYTES = 512 * 2**20
CONTEXT_SHARE = 16
"""A Gram matrix, and in double precision its Hessian with what methods factorize, in sizes of the Gram matrix."""

Weights = tuple[Tensor, Tensor]


class LevelDatabase:
    """Levels of one model's sites; see the module's docstring.

    ``folder``: where it lives; ``key``: hash of everything that decides its content.
    """

    def __init__(self, graph: Graph, space: SearchSpace, task: Task, root: Path, *, seed: int = 0) -> None:
        self.graph, self.space, self.task, self.seed = graph, space, task, seed
        steps = [step for levels in space.levels for level in levels for step in level.steps]
        pruning = [step for step in steps if isinstance(step, ChannelPruning | InputChannels)]
        self.importance: Importance = pruning[0].importance if pruning else "obs"
        self.ranges: Ranges = next((step.ranges for step in steps if isinstance(step, CalibratedInt8)), "minmax")
        rounded_only = bool(steps) and all(isinstance(step, UDFCQuant) for step in steps)
        self.data_free = rounded_only or any(isinstance(step, UDFC) for step in pruning)
        self.by_gradients = any(_by_gradients(step) for step in steps)
        settings = [VERSION, task.hash, GRAM_IMAGES, ROWS_PER_INPUT, TAYLOR_IMAGES, seed]
        self.folder = root / digest(settings)
        self.key = digest([settings, self.importance, *["data-free"] * self.data_free, *["fisher"] * self.by_gradients])
        self.batch_size = min(BATCH, task.batch_size)
        self._grams: dict[str, Tensor] = {}
        self._fisher: dict[str, Tensor] = {}
        self._orders: dict[str, npt.NDArray[np.int64]] = {}
        self._energy: dict[str, Tensor] = {}
        self._cache: OrderedDict[tuple[object, ...], Weights] = OrderedDict()
        self._cache_bytes = 0
        self._contexts: ByteCache[tuple[object, ...], LayerContext] = ByteCache(CONTEXT_BYTES)
        self._site = {site.name: i for i, site in enumerate(space.sites)}
        chooses = any(name.startswith("inputs:") for name in self._site)
        self._readers = readers(graph) if chooses else {}
        self._folded: dict[str, Weights] = {}
        self._moments: dict[str, Tensor | None] = {}
        self._expected: dict[str, Expected | None] | None = None

    # ------------------------------------------------------------ building

    def build(
        self,
        progress: Callable[[int, int], None] | None = None,
        cancelled: Callable[[], bool] | None = None,
    ) -> None:
        """Make what is not on disk yet; safe to interrupt, continues with the next chunk."""
        layers = [name for name in self.graph.layers if 0 < self._size(name) <= MAX_INPUTS and not self.data_free]
        chunks = [layers[i : i + CHUNK_LAYERS] for i in range(0, len(layers), CHUNK_LAYERS)]
        total = len(chunks) + 1 + self.by_gradients
        for done, names in enumerate(chunks):
            self._checkpoint(progress, cancelled, done, total)
            self._grams |= self.kept(f"gram_{done:03d}", lambda names=names: self._measure_grams(names))  # type: ignore[misc]
        self._checkpoint(progress, cancelled, len(chunks), total)
        stem = f"{self.importance}{'_data_free' * self.data_free}"
        plain = [group for group in self.graph.groups if not group.carried]
        self._orders = self._kept_orders(f"orders_{stem}", plain)
        if widths := [g for g in self.graph.groups if g.carried and f"channels:{g.name}" in self._site]:
            self._orders |= self._kept_orders(f"widths_{stem}", widths)
            self._energy = self.kept("energy", self._measure_energy)
        if self._readers:
            found = self._kept_orders(f"orders_{stem}_inputs", tuple(self._readers.values()))
            self._orders |= {f"inputs:{name}": order for name, order in found.items()}
        if self.by_gradients:
            self._checkpoint(progress, cancelled, total - 1, total)
            self._fisher = self.kept(f"fisher_{FISHER_IMAGES}", self._measure_fisher)
        if progress:
            progress(total, total)

    @staticmethod
    def _checkpoint(
        progress: Callable[[int, int], None] | None, cancelled: Callable[[], bool] | None, done: int, total: int
    ) -> None:
        if progress:
            progress(done, total)
        if cancelled and cancelled():
            raise Cancelled("Stopped while building the level database; the same command continues there.")

    def kept(self, stem: str, measure: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Tensors by name from a file of this database; measured where it is not there yet."""
        path = self.folder / f"{stem}.safetensors"
        if not path.exists():
            self._save(path, measure() or {"none": torch.zeros(0)})  # an empty file would not be one
        return {name: tensor for name, tensor in self._load(path).items() if name != "none" or len(tensor)}

    def _save(self, path: Path, tensors: dict[str, Tensor]) -> None:
        def write(temporary: Path) -> None:
            try:
                save_file(tensors, temporary)
            except SafetensorError as error:  # a full disk, in its words
                raise OSError(str(error)) from error

        write_atomically(path, write)

    def _load(self, path: Path) -> dict[str, Tensor]:
        try:
            return load_file(path)
        except Exception as error:
            raise StoreError(f"{path} cannot be read ({error}); delete it and run the same command again.") from error

    def _size(self, name: str) -> int:
        return unfolded_size(self.graph.module.get_submodule(name))

    def _batches(self, n: int) -> Iterator[Tensor]:
        for inputs, _ in self.task.batches(self.task.calibration.take(n), self.batch_size):
            yield inputs

    def _labelled(self, n: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Calibration examples for gradients."""
        for inputs, targets in self.task.batches(self.task.calibration.take(n), self.batch_size):
            yield images_first(inputs), targets

    def range_batches(self) -> Iterator[Tensor]:
        """Inputs on which quantized activations are calibrated, as plans are judged."""
        return map(images_last, self._batches(RANGE_IMAGES))

    def _measure_grams(self, names: Sequence[str]) -> dict[str, Tensor]:
        moments = {name: Moments() for name in names}
        generator = torch.Generator().manual_seed(self.seed)
        images = min(GRAM_IMAGES, len(self.task.calibration))

        def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
            def run(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
                per_image = -(-ROWS_PER_INPUT * self._size(name) // images)
                moments[name].add(unfold(module, inputs[0], positions(module, output, per_image, generator)))

            return run

        handles = [self.graph.module.get_submodule(name).register_forward_hook(hook(name)) for name in names]
        try:
            with torch.no_grad():
                for inputs in self._batches(images):
                    self.graph.module(inputs)
        finally:
            for handle in handles:
                handle.remove()
        return {name: part.gram.float().contiguous() for name, part in moments.items()}

    def _measure_energy(self) -> dict[str, Tensor]:
        """Each channel's share of the squares that an RMSNorm across a group takes the mean of.

        Of norms that none but refitted layers read: name -> shares  # (channels,)
        """
        module = self.graph.module
        layers = {layer.node for layer in self.graph.layers.values() if self.gram(layer.name) is not None}
        names = [
            str(node.target)
            for node in module.graph.nodes
            if str(node.target) in self.graph.channelwise
            and isinstance(module.get_submodule(str(node.target)), nn.RMSNorm)
            and {user.name for user in node.users} <= layers
        ]
        shares = {name: torch.zeros(len(self.graph.channelwise[name]), dtype=torch.float64) for name in names}

        def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            def run(part: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                squares = inputs[0].double().square().reshape(-1, inputs[0].shape[-1])
                shares[name] += (squares / squares.sum(1, keepdim=True).clamp_min(1e-30)).sum(0)

            return run

        handles = [module.get_submodule(name).register_forward_pre_hook(hook(name)) for name in names]
        try:
            with torch.no_grad():
                for inputs in self._batches(GRAM_IMAGES):
                    module(inputs)
        finally:
            for handle in handles:
                handle.remove()
        return {name: share / share.sum().clamp_min(1e-30) for name, share in shares.items()}

    def _measure_fisher(self) -> dict[str, Tensor]:
        module, batches = self.graph.module, self._labelled(FISHER_IMAGES)
        weights = {name: cast(Tensor, module.get_submodule(name).weight) for name in self.graph.layers}
        return block_moments(module, weights, batches, self.task.loss)

    def _kept_orders(self, stem: str, groups: Sequence[Group]) -> dict[str, npt.NDArray[np.int64]]:
        """Channel positions of each group, most important first; measured where they are not on disk yet."""

        def measure() -> dict[str, Tensor]:
            return {name: torch.from_numpy(order) for name, order in self._measure_orders(groups).items()}

        return {name: order.numpy() for name, order in self.kept(stem, measure).items()}

    def _measure_orders(self, groups: Sequence[Group]) -> dict[str, npt.NDArray[np.int64]]:
        if self.importance == "obs":
            return {group.name: obs_order(self.graph, group, self.folded, self.gram) for group in groups}
        if self.importance in GRADIENT_SCORES:
            batches = self._labelled(TAYLOR_IMAGES)
            scores = GRADIENT_SCORES[self.importance](self.graph, groups, batches, self.task.loss) if groups else {}
        elif self.importance == "random":
            scores = {group.name: random_importance(self.graph, group, self.seed) for group in groups}
        else:
            scores = {group.name: WEIGHT_SCORES[self.importance](self.graph, group) for group in groups}
        return {name: np.argsort(-score, kind="stable").astype(np.int64) for name, score in scores.items()}

    # ------------------------------------------------------------ reading a plan

    def keep(self, plan: Plan) -> Keep:
        """Which channel classes live.  # (n_classes,) bool"""
        keep = self.graph.keep_all()
        for group in self.graph.groups:
            for step in self._steps(plan, f"channels:{group.name}"):
                if isinstance(step, ChannelPruning):
                    keep[group.classes[self._orders[group.name][step.keep :]]] = False
        return keep

    def reads(self, plan: Plan, layer: str) -> InputChannels | None:
        """How many input channels a plan lets one layer read, if it has a choice of its own."""
        return next((s for s in self._steps(plan, f"inputs:{layer}") if isinstance(s, InputChannels)), None)

    def columns(self, layer: Layer, keep: Keep, reads: InputChannels | None) -> npt.NDArray[np.intp]:
        """Input channels that a layer reads, of those that live."""
        live = layer.kept_inputs(keep)
        if reads is None:
            return live
        order = self._orders[f"inputs:{layer.name}"]
        return chosen(layer.inputs, live, self._readers[layer.name].classes[order], reads.keep)

    def inputs(self, plan: Plan, layer: Layer, keep: Keep) -> npt.NDArray[np.intp]:
        """Input channels that a plan lets a layer read, of those that live; ``keep``: the plan's."""
        return self.columns(layer, keep, self.reads(plan, layer.name))

    def selections(self, plan: Plan) -> dict[str, Select]:
        """Nodes of layers that read some of the channels that live -> which."""
        if not self._readers:
            return {}
        found, keep = {}, self.keep(plan)
        for name in self._readers:
            layer = self.graph.layers[name]
            live, columns = layer.kept_inputs(keep), self.inputs(plan, layer, keep)
            if len(columns) < len(live):
                dim = 1 if isinstance(self.graph.module.get_submodule(name), nn.Conv2d) else -1
                found[layer.node] = Select(np.flatnonzero(np.isin(live, columns)), dim)
        return found

    def dropped(self, plan: Plan) -> frozenset[str]:
        """Names of dropped blocks."""
        return frozenset(block.name for block in self.graph.blocks if self._steps(plan, f"block:{block.name}"))

    def _steps(self, plan: Plan, site: str):  # type: ignore[no-untyped-def]
        index = self._site.get(site)
        return self.space.levels[index][plan[index]].steps if index is not None else ()

    def layer_steps(self, plan: Plan, layer: str):  # type: ignore[no-untyped-def]
        """The methods a plan applies to one layer, in order."""
        return self._steps(plan, f"layer:{layer}")

    def int8_layers(self, plan: Plan) -> list[Layer]:
        """Layers that run in int8, those of dropped blocks left out."""
        gone = {name for block in self.graph.blocks if block.name in self.dropped(plan) for name in block.body}
        return [
            layer
            for layer in self.graph.layers.values()
            if layer.node not in gone and any(isinstance(s, StaticInt8) for s in self.layer_steps(plan, layer.name))
        ]

    # ------------------------------------------------------------ weights

    def folded(self, name: str) -> Weights:
        """Dense weight and bias of a layer with its batch norm folded."""
        if name not in self._folded:
            layer = self.graph.layers[name]
            module = self.graph.module.get_submodule(name)
            norm = self.graph.module.get_submodule(layer.norm) if layer.norm else None
            self._folded[name] = fold_norm(module.weight, module.bias, norm)  # type: ignore[arg-type]
        return self._folded[name]

    def gram(self, name: str) -> Tensor | None:
        """Gram matrix of a layer's dense inputs; ``None`` for depthwise and very wide layers."""
        return self._grams.get(name)

    def _second_moments(self, group: Group) -> Tensor | None:
        """What weights alone tell of a group's channels, once a model."""
        if group.name not in self._moments:
            self._moments[group.name] = moments_of(self.graph, group, self.folded)
        return self._moments[group.name]

    def _expected_inputs(self, layer: Layer, columns: npt.NDArray[np.intp]) -> Expected | None:
        """Mean and variance of a layer's unfolded inputs at these channels, once a model.  # (columns * area,) both"""
        if self._expected is None:
            self._expected = expected_values(self.graph, self.folded)
        found, (weight, _) = self._expected[layer.source], self.folded(layer.name)
        if found is None or layer.depthwise or len(found[0]) != len(layer.inputs):
            return None
        mean, variance = (v[torch.from_numpy(columns)].repeat_interleave(weight[0, 0].numel()) for v in found)
        return mean, variance

    def refitted(self, layer: Layer, columns: npt.NDArray[np.intp]) -> Weights:
        """All output rows, refitted behind the kept inputs on *dense* inputs, or without a Gram matrix from weights alone.

        Plan-independent and cached.
        """
        key = (layer.name, columns.tobytes())
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key]
        weight, bias = self.folded(layer.name)
        gram = self.gram(layer.name)
        if gram is None:
            new = compensated(self.graph, layer, weight, columns, self._second_moments), bias
        else:
            new = refit(weight.flatten(1), bias, gram, columns_of(columns, weight[0, 0].numel()))
        result = (new[0].reshape(len(weight), len(columns), *weight.shape[2:]), new[1])
        self._cache[key] = result
        self._cache_bytes += sum(t.nbytes for t in result)
        while self._cache_bytes > CACHE_BYTES:
            _, old = self._cache.popitem(last=False)
            self._cache_bytes -= sum(t.nbytes for t in old)
        return result

    def stitch(self, plan: Plan) -> fx.GraphModule:
        """The live model of a plan at the database's rung of refit (dense inputs)."""

        keep = self.keep(plan)

        def make(layer: Layer, _: npt.NDArray[np.intp], rows: npt.NDArray[np.intp]) -> dict[str, nn.Module]:
            columns = self.inputs(plan, layer, keep)
            return self.layer_modules(layer, columns, rows, self.layer_steps(plan, layer.name))

        model = rebuild(self.graph, keep, self.dropped(plan), make, self.narrow)
        place(model, self.selections(plan))
        self.place_quantizers(model, plan)
        return model

    def narrow(self, name: str, index: npt.NDArray[np.intp]) -> nn.Module:
        """A norm or an embedding at the kept channels.

        An RMSNorm across them divides by less than before, on the mean by the root of the kept share of the squares. Layers are
        refitted on inputs of the original's size, so a norm that they alone read is made that much smaller.
        """
        new = slice_channelwise(self.graph.module.get_submodule(name), index)
        if isinstance(new, nn.RMSNorm) and len(index) < len(self.graph.channelwise[name]):
            alive = torch.zeros(len(self.graph.channelwise[name]))
            alive[torch.from_numpy(index)] = 1.0
            new.weight.data *= self.remaining(name, alive)
        return new

    def remaining(self, name: str, alive: Tensor) -> Tensor:
        """What outputs of a norm shrink to, see :meth:`narrow`, where so much of each channel lives.  # (channels,) -> ()"""
        energy = self._energy.get(name)
        return torch.ones(()) if energy is None else (energy.to(alive.dtype) @ alive).sqrt()

    def layer_modules(
        self, layer: Layer, columns: npt.NDArray[np.intp], rows: npt.NDArray[np.intp], steps: Sequence[MethodConfig]
    ) -> dict[str, nn.Module]:
        """The live layer, and its norm if it has one, at these channels: all that a plan decides about it."""
        pruned = len(columns) < len(layer.inputs) and not layer.depthwise
        reshaped = any(isinstance(step, Factored) for step in steps)
        if not pruned and not any(step.fitted for step in steps):
            return self.sliced(layer, columns, rows, steps)
        weight, bias = self.refitted(layer, columns) if pruned or reshaped else self.folded(layer.name)
        like, index = self.graph.module.get_submodule(layer.name), torch.from_numpy(rows)
        biased = pruned or reshaped or layer.norm is not None or like.bias is not None  # as the cost tables have it
        context = self.informed(self.context(layer, columns, weight), layer, columns, rows, steps)
        return self.neutral(layer, weight[index], bias[index] if biased else None, context, steps)

    def informed(
        self,
        context: LayerContext,
        layer: Layer,
        columns: npt.NDArray[np.intp],
        rows: npt.NDArray[np.intp],
        steps: Sequence[MethodConfig],
    ) -> LayerContext:
        """What is known besides, if a step asks: the loss's curvature in the dense model at a layer's folded weight, and what
        weights tell of its inputs."""
        if any(isinstance(step, UDFCQuant) for step in steps):
            context = replace(context, expected=self._expected_inputs(layer, columns))
        if not any(_by_gradients(step) for step in steps):
            return context
        weight, _ = self.folded(layer.name)
        norm = self.graph.module.get_submodule(layer.norm) if layer.norm else None
        factor, _ = fold_norm(torch.ones(len(weight), 1), None, norm)
        area = weight[0, 0].numel()
        where = torch.arange(weight[0].numel()) if layer.depthwise else columns_of(columns, area)
        found = damped(self._fisher[layer.name], weight)
        return replace(context, fisher=found.select(torch.from_numpy(rows), where, factor[:, 0].double()))

    def context(self, layer: Layer, columns: npt.NDArray[np.intp], weight: Tensor) -> LayerContext:
        """What methods may know of a layer behind the kept inputs; kept, with what they factorize, for all its levels."""
        key = (layer.name, columns.tobytes())
        found = self._contexts.get(key)
        if found is not None:
            return found
        gram = self.gram(layer.name)
        if gram is not None and len(columns) < len(layer.inputs):
            kept = torch.cat([columns_of(columns, weight[0, 0].numel()), torch.tensor([len(gram) - 1])])
            gram = gram[kept][:, kept]
        size = 0 if gram is None else CONTEXT_SHARE * gram.nbytes
        return self._contexts.put(key, LayerContext(gram), size)

    def sliced(
        self, layer: Layer, columns: npt.NDArray[np.intp], rows: npt.NDArray[np.intp], steps: Sequence[MethodConfig]
    ) -> dict[str, nn.Module]:
        """The original layer and norm at the kept channels, with formats applied."""
        made = slice_layer(self.graph, layer, columns, rows)
        made[layer.name] = self._applied(layer, made[layer.name], steps, LayerContext())
        if layer.norm:
            made[layer.norm] = slice_channelwise(self.graph.module.get_submodule(layer.norm), rows)
        return made

    def neutral(
        self, layer: Layer, weight: Tensor, bias: Tensor | None, context: LayerContext, steps: Sequence[MethodConfig]
    ) -> dict[str, nn.Module]:
        """A layer from folded weights; its norm gets the statistics of its new outputs, so it is live and changes nothing.

        ``norm(W x) = W x + b`` with ``gamma = sqrt(var + eps)``, ``beta = mean + b``: training can go on from consistent
        batch statistics, and folding gives back ``W, b``. What a method adds to the layer's bias goes there, too.
        """
        like = self.graph.module.get_submodule(layer.name)
        if layer.norm is None:
            return {layer.name: self._applied(layer, make_layer(like, weight, bias), steps, context)}
        start = torch.zeros(len(weight)) if bias is None else bias
        part = self._applied(layer, make_layer(like, weight, start), steps, context)
        last = part[-1] if isinstance(part, nn.Sequential) else part
        bias, last.bias = cast(Tensor, last.bias).detach(), None  # type: ignore[assignment]
        made: dict[str, nn.Module] = {layer.name: part}
        norm = copy.deepcopy(self.graph.module.get_submodule(layer.norm))
        assert isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d)
        if context.gram is not None:
            mean, variance = output_statistics(weight.flatten(1), context.gram)
        else:
            mean, variance = torch.zeros(len(weight)), torch.ones(len(weight))
        norm.num_features = len(weight)
        norm.running_mean, norm.running_var = mean, variance
        norm.weight = nn.Parameter((variance.double() + norm.eps).sqrt().float(), requires_grad=False)
        norm.bias = nn.Parameter(mean + bias, requires_grad=False)
        made[layer.norm] = norm
        return made

    def _applied(
        self, layer: Layer, module: nn.Module, steps: Sequence[MethodConfig], context: LayerContext
    ) -> nn.Module:
        """:func:`apply_steps`; a refusal names the layer."""
        try:
            return apply_steps(module, steps, context)
        except UnsupportedModel as error:
            raise UnsupportedModel(f"Layer {layer.name!r}: {error}") from error

    # ------------------------------------------------------------ quantized activations

    def quantized_nodes(self, plan: Plan) -> list[str]:
        """Nodes whose values are quantized: inputs and outputs of int8 layers, the model's output left float."""
        stands_for = aliases(self.graph, self.dropped(plan))
        found: dict[str, None] = {}
        for layer in self.int8_layers(plan):
            found[stands_for.get(layer.source, layer.source)] = None
            if not self._is_output(layer.result):
                found[layer.result] = None
        return list(found)

    def _is_output(self, name: str) -> bool:
        return any(
            user.op == "output" for node in self.graph.module.graph.nodes if node.name == name for user in node.users
        )

    def place_quantizers(self, model: fx.GraphModule, plan: Plan) -> None:
        """Insert activation quantizers with ranges taken from the compressed model on calibration inputs."""
        names = self.quantized_nodes(plan)
        if not names:
            return
        for node in list(model.graph.nodes):
            if node.name in names:
                target = f"quant_{node.name}"
                model.add_submodule(target, RangeObserver(self.ranges))
                with model.graph.inserting_after(node):
                    new = model.graph.call_module(target, (node,))
                node.replace_all_uses_with(new, delete_user_cb=lambda user, new=new: user is not new)
        for layer in self.int8_layers(plan):
            module = model.get_submodule(layer.name)
            if isinstance(module, nn.Sequential):
                parent, _, leaf = layer.name.rpartition(".")
                setattr(
                    model.get_submodule(parent), leaf, nn.Sequential(module[0], RangeObserver(self.ranges), module[1])
                )
        model.recompile()
        with torch.no_grad():
            for inputs in self.range_batches():
                model(inputs)
        freeze_ranges(model)


def _by_gradients(step: MethodConfig) -> bool:
    return isinstance(step, Sparse) and step.by == "fisher"


def apply_steps(module: nn.Module, steps: Sequence[MethodConfig], context: LayerContext) -> nn.Module:
    """A plan's layer methods on one layer, in order."""
    for step in steps:
        handler = handler_of(step)
        if handler is not None:
            module = handler.apply(step, module, context)
    return module

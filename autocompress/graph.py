"""Model -> channels that live and die together, residual blocks that can be dropped, and the traced list of ops.

Every channel of every tensor in the traced graph gets a *class*. Two channels that must be kept or removed together (the
two sides of an addition, a channel and its H*W copies after flatten, stream channel c and c + pad behind an option-A
shortcut) are united in one class. A pruned model is then one boolean a class, and each layer's kept indices follow.
Classes that occur on the same layers form a group: one decision point with nested widths.

Rules are per operation (``channel_rules.py``); what has no rule pins its channels, with the layer's name and the reason.
Every group is then proved: physically pruned equals masked on random non-contiguous channels (``prove``).
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from autocompress.blocks import Block, find_blocks
from autocompress.channel_rules import AXIS, Classes, Value, apply_rule
from autocompress.errors import UnsupportedModel
from autocompress.op_kinds import call_target, is_relu, op_kind, op_window
from autocompress.slicing import is_channelwise, make_layer, slice_channelwise, sliced_columns
from autocompress.tracing import Shapes, check_faithful, normalized

Keep = npt.NDArray[np.bool_]
"""One boolean a class.  # (n_classes,)"""


FOLDS = "folds"
"""Key in ``fx.Node.meta`` of the batch norms that belong to the layer before them (``Layer.norm``)."""

IS_OUTPUT = "it is the model's output"
HIDDEN = "hidden_width"
"""Name of the group of channels that an embedding writes."""


@dataclass(frozen=True, eq=False)
class Layer:
    """A convolution or linear layer and where its channels are.

    ``inputs`` / ``outputs``: class of each input / output channel. ``norm``: the batch norm that alone reads its output, if
    any. ``activation``: the ReLU node fused behind it. ``source``: the node whose value it reads; ``result``: the node
    whose value is what runs as one kernel (conv + norm + ReLU).
    """

    name: str
    node: str
    inputs: npt.NDArray[np.int64]
    outputs: npt.NDArray[np.int64]
    depthwise: bool
    norm: str | None
    activation: str | None
    source: str
    result: str

    def kept_inputs(self, keep: Keep) -> npt.NDArray[np.intp]:
        return np.flatnonzero(keep[self.inputs])

    def kept_outputs(self, keep: Keep) -> npt.NDArray[np.intp]:
        return np.flatnonzero(keep[self.outputs])


@dataclass(frozen=True, eq=False)
class Group:
    """Channels with one decision: ``classes`` in the order of the first producer's outputs.

    ``carried``: RMSNorms that run across them and embeddings of which they are columns. A group that has any is a hidden width.
    """

    name: str
    classes: npt.NDArray[np.int64]
    producers: tuple[str, ...]
    consumers: tuple[str, ...]
    carried: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Op:
    """One operator that will run: a node with what is fused into it.

    ``node``: what runs; ``result``: the node whose value it leaves; ``inputs``: nodes it reads (tensors only).
    """

    name: str
    kind: str
    node: str
    result: str
    inputs: tuple[str, ...]
    layer: str | None = None
    fused: str = ""
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)


@dataclass(eq=False)
class Graph:
    """A traced model. ``module`` is a frozen dense copy in eval mode whose weights nobody may change."""

    module: fx.GraphModule
    values: dict[str, Value]
    layers: dict[str, Layer]
    channelwise: dict[str, npt.NDArray[np.int64]]
    groups: tuple[Group, ...]
    blocks: tuple[Block, ...]
    ops: tuple[Op, ...]
    n_classes: int
    refused: dict[str, str] = field(default_factory=dict)
    """Layer -> why its channels cannot be pruned."""

    def keep_all(self) -> Keep:
        return np.ones(self.n_classes, dtype=bool)


def trace(model: nn.Module, example: Tensor, *, proofs: bool = True) -> Graph:
    """Trace a model and find its groups, blocks and ops.

    ``example``: one input batch ``(n, ...)``. Raises :class:`UnsupportedModel` with the reason if the model's control flow
    depends on its input. Groups whose proof fails are refused by name in ``Graph.refused`` and left whole.
    """
    module = normalized(model)
    check_faithful(model, module, example)
    nodes = {node.name: node for node in module.graph.nodes}
    values, classes, channelwise = _propagate(module, example)
    layers = _find_layers(module, values, classes)
    groups, refused = _find_groups(layers, classes)
    groups = _with_carried(module, groups, channelwise, classes)
    refused |= _left_alone(module, layers, {name for group in groups for name in group.carried})
    graph = Graph(
        module=module,
        values={name: value.resolved(classes) for name, value in values.items()},
        layers={name: _resolved(layer, classes) for name, layer in layers.items()},
        channelwise={name: classes.roots(ids) for name, ids in channelwise.items()},
        groups=groups,
        blocks=find_blocks(module, values),
        ops=(),
        n_classes=len(classes),
        refused=refused,
    )
    graph.ops = _find_ops(graph, nodes)
    if proofs:
        _refuse_unproved(graph, example)
    return graph


def _propagate(
    module: fx.GraphModule, example: Tensor
) -> tuple[dict[str, Value], Classes, dict[str, npt.NDArray[np.int64]]]:
    runner = Shapes(module)
    with torch.no_grad():
        runner.run(example)
    classes = Classes()
    values: dict[str, Value] = {}
    channelwise: dict[str, npt.NDArray[np.int64]] = {}
    uses = _module_uses(module)
    for node in module.graph.nodes:
        shape = runner.shapes.get(node.name)
        if node.op == "output":
            for source in node.all_input_nodes:
                values[source.name].pin(classes, IS_OUTPUT)
        elif shape is not None:
            shared = node.op == "call_module" and uses[str(node.target)] > 1
            values[node.name] = apply_rule(module, node, shape, values, classes, channelwise, shared)
    return values, classes, channelwise


def _module_uses(module: fx.GraphModule) -> dict[str, int]:
    """How often each called module runs, counting one module under two names together."""
    modules = dict(module.named_modules(remove_duplicate=False))
    count: dict[int, int] = {}
    called = [str(node.target) for node in module.graph.nodes if node.op == "call_module"]
    for name in called:
        count[id(modules[name])] = count.get(id(modules[name]), 0) + 1
    return {name: count[id(modules[name])] for name in called}


def _find_layers(module: fx.GraphModule, values: Mapping[str, Value], classes: Classes) -> dict[str, Layer]:
    layers = {}
    modules = dict(module.named_modules(remove_duplicate=False))
    uses = _module_uses(module)
    for node in module.graph.nodes:
        part = modules.get(str(node.target)) if node.op == "call_module" else None
        if not isinstance(part, nn.Conv2d | nn.Linear) or uses[str(node.target)] > 1:
            continue
        last, norm, activation = node, None, None
        user = _only_user(last)
        if (
            user is not None
            and uses.get(str(user.target)) == 1
            and _folds(modules[str(user.target)], values[node.name])
        ):
            last, norm = user, str(user.target)
            last.meta[FOLDS] = True
            user = _only_user(last)
        if user is not None and is_relu(module, user):
            last, activation = user, user.name
        source = node.all_input_nodes[0]
        layers[str(node.target)] = Layer(
            name=str(node.target),
            node=node.name,
            inputs=_input_ids(part, values[source.name], classes),
            outputs=values[node.name].ids,
            depthwise=isinstance(part, nn.Conv2d) and part.groups > 1,
            norm=norm,
            activation=activation,
            source=source.name,
            result=last.name,
        )
    return layers


def _left_alone(module: fx.GraphModule, layers: Mapping[str, Layer], carried: Container[str]) -> dict[str, str]:
    """What has weights and no site of its own: nothing is skipped without a word."""
    found = {}
    uses = _module_uses(module)
    for node in module.graph.nodes:
        if node.op == "call_module" and str(node.target) not in layers:
            part = module.get_submodule(str(node.target))
            if any(parameter.ndim > 1 for parameter in part.parameters()):
                shared = "it is used in more than one place" if uses[str(node.target)] > 1 else ""
                kind = type(part).__name__
                article = "an" if kind[0] in "AEIO" else "a"
                if str(node.target) not in carried:
                    found[str(node.target)] = shared or f"{article} {kind} stays as it is"
        elif node.op == "call_function" and node.target in (F.conv2d, F.linear):
            owner = _owner_of_weight(node, {str(n.target) for n in module.graph.nodes if n.op == "call_module"})
            function = "it is a function call, and only modules are compressed"
            found[node.name] = f"its weight is that of {owner}, too" if owner else function
    return found


def _owner_of_weight(node: fx.Node, modules: Iterable[str]) -> str | None:
    """The called module whose parameter a function reads as its weight (a head tied to the embedding)."""
    parents = {str(n.target).rpartition(".")[0] for n in node.all_input_nodes if n.op == "get_attr"}
    return next(iter(sorted(parents & set(modules))), None)


def _input_ids(part: nn.Conv2d | nn.Linear, source: Value, classes: Classes) -> npt.NDArray[np.int64]:
    """Classes along the axis that the layer reads; a linear layer may read one whose channels nobody follows."""
    conv = isinstance(part, nn.Conv2d)
    if source.dim == (1 if conv else len(source.shape) - 1):
        return source.ids
    return classes.fresh_pinned(int(part.in_channels if conv else part.in_features), AXIS)  # type: ignore[arg-type]


def _folds(norm: nn.Module, value: Value) -> bool:
    """Whether a norm is one factor and one shift an output channel of the layer before it."""
    fixed = isinstance(norm, nn.BatchNorm2d | nn.BatchNorm1d) and norm.running_mean is not None
    return fixed and value.dim == 1


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _resolved(layer: Layer, classes: Classes) -> Layer:
    values = {**vars(layer), "inputs": classes.roots(layer.inputs), "outputs": classes.roots(layer.outputs)}
    return Layer(**values)


def _find_groups(layers: Mapping[str, Layer], classes: Classes) -> tuple[tuple[Group, ...], dict[str, str]]:
    """Classes that stand equally often at the same producers and consumers are one group."""
    producers: dict[int, list[str]] = {}
    consumers: dict[int, list[str]] = {}
    for layer in layers.values():
        for side, found in ((layer.outputs, producers), (layer.inputs, consumers)):
            if layer.depthwise and side is layer.inputs:
                continue
            for root in dict.fromkeys(classes.roots(side).tolist()):
                found.setdefault(root, []).append(layer.name)
    members: dict[tuple[object, ...], list[int]] = {}
    copies = _copies(layers, classes)
    refused: dict[str, str] = {}
    for root, makers in producers.items():
        real = [name for name in makers if not layers[name].depthwise]
        reason = classes.pinned(root)
        if reason is None and not (real and root in consumers):
            reason = "no convolution or linear layer reads them" if real else "no layer makes them"
        if reason is not None:
            for name in makers:
                refused.setdefault(name, reason)
            continue
        members.setdefault((tuple(makers), tuple(consumers[root]), copies[root]), []).append(root)
    groups = []
    for roots in members.values():
        makers = producers[roots[0]]
        first = next(name for name in makers if not layers[name].depthwise)
        groups.append(Group(first, np.array(roots, dtype=np.int64), tuple(makers), tuple(consumers[roots[0]])))
    for group in groups:
        for name in group.producers:
            refused.pop(name, None)
    names: dict[str, int] = {}
    for i, group in enumerate(groups):  # one layer's outputs may fall into several groups
        seen = names[group.name] = names.get(group.name, 0) + 1
        if seen > 1:
            groups[i] = Group(f"{group.name}#{seen}", group.classes, group.producers, group.consumers)
    return tuple(groups), refused


def _with_carried(
    module: fx.GraphModule, groups: Sequence[Group], channelwise: Mapping[str, npt.NDArray[np.int64]], classes: Classes
) -> tuple[Group, ...]:
    """The groups with the norms across them and their embeddings; see :class:`Group`. Those of embeddings are named for what
    they are, and not after one of many layers that write them."""
    across = {
        name: classes.roots(ids)
        for name, ids in channelwise.items()
        if isinstance(module.get_submodule(name), nn.RMSNorm | nn.Embedding)
    }
    found: list[Group] = []
    for group in groups:
        carried = tuple(name for name, ids in across.items() if np.isin(ids, group.classes).any())
        named = sum(other.name.startswith(HIDDEN) for other in found)
        if any(isinstance(module.get_submodule(name), nn.Embedding) for name in carried):
            group = replace(group, name=f"{HIDDEN}#{named + 1}" if named else HIDDEN)
        found.append(replace(group, carried=carried))
    return tuple(found)


def _copies(layers: Mapping[str, Layer], classes: Classes) -> dict[int, tuple[int, ...]]:
    """How often each class stands at each layer that has it, in order."""
    found: dict[int, list[int]] = {}
    for layer in layers.values():
        for ids in (layer.outputs, layer.inputs):
            for root, n in zip(
                *(part.tolist() for part in np.unique(classes.roots(ids), return_counts=True)), strict=True
            ):
                found.setdefault(root, []).append(n)
    return {root: tuple(counts) for root, counts in found.items()}


def _find_ops(graph: Graph, nodes: Mapping[str, fx.Node]) -> tuple[Op, ...]:
    """The executed operators, with batch norm folded and ReLU fused into what precedes it."""
    module, ops = graph.module, []
    modules = dict(module.named_modules(remove_duplicate=False))
    by_node = {layer.node: layer for layer in graph.layers.values()}
    swallowed: set[str] = set()
    for node in module.graph.nodes:
        if node.name in swallowed or node.name not in graph.values or node.op in ("placeholder", "get_attr", "output"):
            continue
        inputs = tuple(n.name for n in node.all_input_nodes if n.name in graph.values)
        part = modules.get(str(node.target)) if node.op == "call_module" else None
        if node.name in by_node:
            layer = by_node[node.name]
            last = nodes[layer.result]
            step = last
            while step.name != node.name:
                swallowed.add(step.name)
                step = step.all_input_nodes[0]
            size, stride = op_window(node, part) if isinstance(part, nn.Conv2d) else ((1, 1), (1, 1))
            ops.append(
                Op(
                    layer.name,
                    "conv" if isinstance(part, nn.Conv2d) else "linear",
                    node.name,
                    last.name,
                    inputs,
                    layer.name,
                    "relu" if layer.activation else "",
                    size,
                    stride,
                )
            )
            continue
        kind = op_kind(call_target(module, node), part)
        if kind == "free":
            continue
        if kind == "linear":  # a function call: its weight is no tensor that an operator made
            inputs = inputs[:1]
        last, fused, size, stride = node, "", (1, 1), (1, 1)
        user = _only_user(node)
        if kind in ("add", "batch_norm") and user is not None and is_relu(module, user):
            swallowed.add(user.name)
            last, fused = user, "relu"
        if kind == "pool" and graph.values[node.name].shape[2:] == (1, 1):
            kind = "global_pool"
        if kind in ("pool", "conv"):  # a convolution that is no layer runs in more than one place
            size, stride = op_window(node, part)
        ops.append(Op(node.name, kind, node.name, last.name, inputs, None, fused, size, stride))
    return tuple(ops)


# ---------------------------------------------------------------- building a smaller model

MakeLayer = Callable[[Layer, npt.NDArray[np.intp], npt.NDArray[np.intp]], Mapping[str, nn.Module]]
"""``(layer, kept inputs, kept outputs) -> modules by name``: the layer's replacement and, if it changes, its norm's."""


NarrowPart = Callable[[str, npt.NDArray[np.intp]], nn.Module]
"""``(name, kept channels) -> module``: what is no layer and has something a channel."""


def rebuild(
    graph: Graph,
    keep: Keep,
    dropped: Iterable[str] = (),
    make: MakeLayer | None = None,
    narrow: NarrowPart | None = None,
) -> fx.GraphModule:
    """A new model without the removed channels and dropped blocks; the graph's own weights stay untouched.

    ``make`` gives the modules of each layer, ``narrow`` those of norms and embeddings; by default the dense weights, sliced.
    """
    make = make or (lambda layer, rows, columns: slice_layer(graph, layer, rows, columns))
    narrow = narrow or (lambda name, index: slice_channelwise(old[name], index))
    new_graph = _without_blocks(graph, set(dropped))
    _fix_constants(graph, new_graph, keep)
    old = dict(graph.module.named_modules(remove_duplicate=False))
    parts: dict[str, Any] = {}
    for node in new_graph.nodes:
        name = str(node.target)
        if node.op == "get_attr":
            parts[name] = constant(graph, name, keep)
        elif node.op == "call_module" and name not in parts:
            if name in graph.layers:
                layer = graph.layers[name]
                parts.update(make(layer, layer.kept_inputs(keep), layer.kept_outputs(keep)))
            elif name in graph.channelwise:
                parts[name] = narrow(name, np.flatnonzero(keep[graph.channelwise[name]]))
            else:
                parts[name] = copy.deepcopy(old[name])
    for name in parts:
        if (owner := tied_to(graph, name)) in parts:  # one weight, as in the original
            parts[name] = parts[owner].weight
    return fx.GraphModule(parts, new_graph).eval()


def tied_to(graph: Graph, target: str) -> str:
    """The embedding whose weight a ``get_attr`` node reads; nothing where it reads something else."""
    owner, _, leaf = target.rpartition(".")
    known = leaf == "weight" and owner in graph.channelwise
    return owner if known and isinstance(graph.module.get_submodule(owner), nn.Embedding) else ""


def constant(graph: Graph, target: str, keep: Keep) -> Tensor:
    """What a ``get_attr`` node reads; of an embedding's weight the columns that live."""
    found: Tensor = operator.attrgetter(target)(graph.module)
    alive = keep[graph.channelwise[owner]] if (owner := tied_to(graph, target)) else np.ones(0, dtype=bool)
    return found if alive.all() else sliced_columns(found, np.flatnonzero(alive))


def aliases(graph: Graph, dropped: Iterable[str]) -> dict[str, str]:
    """Nodes that vanish with dropped blocks -> the node whose value stands for theirs.

    The addition becomes its skip side, and a ReLU behind it vanishes too where the skip side has passed one already.
    """
    names = set(dropped)
    found = {block.add: block.skip for block in graph.blocks if block.name in names}
    if not found:
        return found
    rectified: set[str] = set()
    for node in graph.module.graph.nodes:
        if node.name in found:
            found[node.name] = found.get(found[node.name], found[node.name])
        elif is_relu(graph.module, node):
            source = node.all_input_nodes[0].name
            if found.get(source) in rectified:
                found[node.name] = found[source]
            rectified.add(node.name)
    return found


def _without_blocks(graph: Graph, dropped: set[str]) -> fx.Graph:
    if not dropped:
        return copy.deepcopy(graph.module.graph)
    new_graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    stands_for = aliases(graph, dropped)
    gone = {name for block in graph.blocks if block.name in dropped for name in block.body}
    by_name = {node.name: node for node in graph.module.graph.nodes}
    for node in graph.module.graph.nodes:
        if node.name in gone:
            continue
        if node.name in stands_for:
            mapping[node] = mapping[by_name[stands_for[node.name]]]
        else:
            mapping[node] = new_graph.node_copy(node, lambda n: mapping[n])
    return new_graph


def _fix_constants(graph: Graph, new_graph: fx.Graph, keep: Keep) -> None:
    """Channel counts that stand as constants in the graph: paddings, slices and reshapes."""
    for node in new_graph.nodes:
        value = graph.values.get(node.name)
        if value is not None and value.fix is not None:
            value.fix(node, keep)


def slice_layer(
    graph: Graph, layer: Layer, inputs: npt.NDArray[np.intp], outputs: npt.NDArray[np.intp]
) -> dict[str, nn.Module]:
    """The dense layer's weights at the kept rows and columns."""
    old = graph.module.get_submodule(layer.name)
    if not isinstance(old, nn.Conv2d | nn.Linear):
        raise UnsupportedModel(f"Layer {layer.name!r} is a {type(old).__name__}; only Conv2d and Linear can be sliced.")
    rows = torch.from_numpy(outputs)
    weight = old.weight.detach()[rows]
    if not layer.depthwise:
        weight = weight[:, torch.from_numpy(inputs)]
    elif isinstance(old, nn.Conv2d) and not is_channelwise(old):
        weight = old.weight.detach()
    bias = None if old.bias is None else old.bias.detach()[rows]
    return {layer.name: make_layer(old, weight, bias)}


# ---------------------------------------------------------------- proof

TOLERANCE = 1e-4


def prove(graph: Graph, group: Group, example: Tensor, seed: int = 0) -> float:
    """Largest difference between the physically pruned and the masked model, relative to the output's size.

    About half of the group's channels are removed at random, not contiguous. Masked means: the dense model whose
    consumers' weights are zero at the removed input channels. A hidden width is masked where it is written, in the rows of its
    producers and the columns of its embeddings, as the norms across it read it, too.
    """
    rng = np.random.default_rng(seed)
    width = len(group.classes)
    removed = group.classes[np.sort(rng.permutation(width)[: max(1, width // 2)])]
    keep = graph.keep_all()
    keep[removed] = False
    if not keep[group.classes].any():
        return 0.0

    def masked(layer: Layer, inputs: npt.NDArray[np.intp], outputs: npt.NDArray[np.intp]) -> dict[str, nn.Module]:
        made = slice_layer(graph, layer, inputs, outputs)
        if not layer.depthwise:
            gone = torch.from_numpy(np.flatnonzero(~keep[layer.inputs]))
            made[layer.name].weight.data[:, gone] = 0  # type: ignore[operator]
        if group.carried:
            written: Any = made[layer.name]
            for part in (written.weight, written.bias):
                if part is not None:
                    part.data[torch.from_numpy(np.flatnonzero(~keep[layer.outputs]))] = 0
        return made

    def emptied(name: str, index: npt.NDArray[np.intp]) -> nn.Module:
        made: Any = slice_channelwise(graph.module.get_submodule(name), index)
        if isinstance(made, nn.Embedding):
            made.weight.data[:, torch.from_numpy(np.flatnonzero(~keep[graph.channelwise[name]]))] = 0
        return made  # type: ignore[no-any-return]

    with torch.no_grad():
        want = rebuild(graph, graph.keep_all(), make=masked, narrow=emptied)(example)
        got = rebuild(graph, keep)(example)
    if got.shape != want.shape or not bool(torch.isfinite(got).all()):
        return float("inf")
    return float((got - want).abs().max() / want.abs().max().clamp_min(1e-6))


def _refuse_unproved(graph: Graph, example: Tensor) -> None:
    proved = []
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(example.shape, generator=generator)
    batch = torch.cat([example, noise * example.std() + example.mean()]) if example.is_floating_point() else example
    for group in graph.groups:
        try:
            difference = prove(graph, group, batch)
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            graph.refused[group.name] = f"the pruned model does not run ({str(error).splitlines()[0]})"
            continue
        if difference > TOLERANCE:
            graph.refused[group.name] = (
                f"pruned and masked outputs differ by {difference:.1e} (allowed {TOLERANCE:.0e})"
            )
            continue
        proved.append(group)
    graph.groups = tuple(proved)

"""How important a channel is, from weights or from gradients: scores over *all* layers that read or write it, so that coupled
layers agree on one order. Each layer's part is scaled to mean 1 before parts are added, unless they are in the loss's own unit.

From weights alone:

* ``l1``, ``l2``: sum of magnitudes, and of squares (Li et al. 2017; group form of Fang et al. 2023);
* ``fpgm``: sum of distances to the other filters of the layer, ``sum_j ||F_i - F_j||_2``: what lies nearest to the geometric
  median can be stood for by the others (He et al. 2019);
* ``bn``: the magnitude of the factor in the batch norms behind (Liu et al. 2017); a group without norms is ordered by ``l2``;
* ``random``: a baseline.

From gradients of the task's loss on labelled calibration examples:

* ``taylor``: mean over examples of ``(sum_w g w)^2`` at the layers that read it (Molchanov et al. 2019, eq. 8): the squared
  first-order change of the loss when the channel is zeroed;
* ``fisher``: ``sum_w F_ww w^2 / 2`` with ``F_ww`` the mean over examples of ``g^2``, the diagonal of the empirical Fisher
  matrix for that of the Hessian: Optimal Brain Damage (LeCun et al. 1990) of all weights that write or read the channel;
* ``lrp``: relevance for the true class (Yeom et al. 2021, Pruning by Explaining). Layers pass it on by
  ``R_i = sum_j z_ij / (sum_i z_ij) R_j`` over the positive ``z_ij = a_i w_ij``, norms as it is, other operations by
  ``a dR/da`` of their gradient, which for rectifiers, additions and pooling gives all of it to what was added up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from autocompress.graph import Graph, Group, Layer
from autocompress.types import digest

Scores = npt.NDArray[np.float64]
Batches = Iterable[tuple[Tensor, Tensor]]
Loss = Callable[[Tensor, Tensor], Tensor]

TINY = 1e-12


# ---------------------------------------------------------------- from weights


def l1_importance(graph: Graph, group: Group) -> Scores:
    """Sum over members of the magnitudes of a channel's weights, each member scaled to mean 1.  # (len(group.classes),)"""
    return _over_members(graph, group, lambda weight: weight.abs())


def l2_importance(graph: Graph, group: Group) -> Scores:
    """Sum over members of squared channel norms, each member scaled to mean 1.  # (len(group.classes),)"""
    return _over_members(graph, group, lambda weight: weight.square())


def fpgm_importance(graph: Graph, group: Group) -> Scores:
    """Distances between the filters that make the group, each layer scaled to mean 1.  # (len(group.classes),)"""
    total = np.zeros(len(group.classes))
    for layer in _members(graph, group.producers):
        filters = _weight(graph, layer).flatten(1)
        distances = torch.cdist(filters, filters, compute_mode="donot_use_mm_for_euclid_dist").sum(1)
        total += _scaled(_scatter(layer.outputs, distances.numpy(), positions_of(graph, group), len(total)))
    return total


def bn_importance(graph: Graph, group: Group) -> Scores:
    """Magnitudes of the factors of the batch norms on the group, each scaled to mean 1.  # (len(group.classes),)"""
    total = np.zeros(len(group.classes))
    for name, ids in graph.channelwise.items():
        norm = graph.module.get_submodule(name)
        if isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d) and norm.weight is not None:
            factor = norm.weight.detach().abs().double().numpy()
            total += _scaled(_scatter(ids, factor, positions_of(graph, group), len(total)))
    return total if total.any() else l2_importance(graph, group)


def random_importance(graph: Graph, group: Group, seed: int = 0) -> Scores:
    """The same numbers for a seed and a group's name, whatever the weights.  # (len(group.classes),)"""
    return np.random.default_rng(int(digest([seed, group.name]), 16)).random(len(group.classes))


WEIGHT_SCORES: Mapping[str, Callable[[Graph, Group], Scores]] = {
    "l1": l1_importance,
    "l2": l2_importance,
    "fpgm": fpgm_importance,
    "bn": bn_importance,
    "random": random_importance,
}


def _over_members(graph: Graph, group: Group, of: Callable[[Tensor], Tensor]) -> Scores:
    """Sums of a number a weight over each channel's weights in every layer that makes or reads it."""
    total, position = np.zeros(len(group.classes)), positions_of(graph, group)
    for layer in _members(graph, (*group.producers, *group.consumers)):
        for ids, sums in _sides(layer, of(_weight(graph, layer))):
            total += _scaled(_scatter(ids, sums, position, len(total)))
    return total


def _sides(layer: Layer, values: Tensor) -> Iterator[tuple[npt.NDArray[np.int64], Scores]]:
    """A layer's channels with the sums over their weights: those it makes, and those it reads.  # values (out, in, ...)"""
    sums = values.flatten(2).sum(2) if values.ndim > 2 else values
    yield layer.outputs, sums.sum(1).numpy()
    if not layer.depthwise:
        yield layer.inputs, sums.sum(0).numpy()


def _scaled(part: Scores) -> Scores:
    return part / part.mean() if part.any() else part


# ---------------------------------------------------------------- from gradients


def taylor_importance(graph: Graph, groups: Iterable[Group], batches: Batches, loss: Loss) -> dict[str, Scores]:
    """First-order Taylor scores of all groups in one pass over labelled batches.

    A gate of ones multiplies the input channels of every reading layer; ``(dL/dgate)^2`` is accumulated for each example:
    with the loss summed over the batch, ``dL/dgate[n, c] = sum_hw x * dL/dx``.
    """

    def squared(outputs: Tensor, targets: Tensor) -> Tensor:
        return loss(outputs, targets) * len(outputs)

    return _gates(graph, groups, batches, squared, lambda change: change.pow(2))


def lrp_importance(graph: Graph, groups: Iterable[Group], batches: Batches, loss: Loss) -> dict[str, Scores]:
    """Relevance of each channel where it is read, summed over examples; one of 1 for each true class. See the module."""

    def relevance(outputs: Tensor, targets: Tensor) -> Tensor:
        logits = outputs.movedim(1, -1) if outputs.ndim > 2 and targets.shape != outputs.shape[:-1] else outputs
        true = logits.gather(-1, targets.clamp_min(0)[..., None])[..., 0]
        return (true / _away_from_zero(true.detach()) * (targets >= 0)).sum()

    with passing_on_relevance(graph):
        return _gates(graph, groups, batches, relevance, lambda change: change, scaled=True)


def fisher_importance(graph: Graph, groups: Iterable[Group], batches: Batches, loss: Loss) -> dict[str, Scores]:
    """Optimal Brain Damage with the empirical Fisher's diagonal, one backward pass an example."""
    groups, model = list(groups), graph.module
    names = dict.fromkeys(name for group in groups for name in (*group.producers, *group.consumers))
    weights = {name: cast(Tensor, model.get_submodule(name).weight) for name in names}
    fisher = {name: torch.zeros_like(weight, dtype=torch.float64) for name, weight in weights.items()}
    examples = 0
    for gradients in example_gradients(model, weights, batches, loss):
        examples += 1
        for name, gradient in gradients.items():
            fisher[name] += gradient.double().square()
    scores = {}
    for group in groups:
        total, position = np.zeros(len(group.classes)), positions_of(graph, group)
        for layer in _members(graph, (*group.producers, *group.consumers)):
            saliency = _weight(graph, layer).square() * fisher[layer.name] / (2 * max(1, examples))
            for ids, sums in _sides(layer, saliency):
                total += _scatter(ids, sums, position, len(total))
        scores[group.name] = total
    return scores


def example_gradients(
    model: nn.Module, weights: Mapping[str, Tensor], batches: Batches, loss: Loss
) -> Iterator[dict[str, Tensor]]:
    """Gradients of the loss of one labelled example after the other; weights that an example does not reach are left out."""
    needed = {name: weight.requires_grad for name, weight in weights.items()}
    try:
        for weight in weights.values():
            weight.requires_grad_(True)
        for inputs, targets in batches:
            for x, y in zip(torch.split(inputs, 1), torch.split(targets, 1), strict=True):
                with torch.enable_grad():
                    found = torch.autograd.grad(loss(model(x), y), list(weights.values()), allow_unused=True)
                yield {name: g for name, g in zip(weights, found, strict=True) if g is not None}
    finally:
        for name, weight in weights.items():
            weight.requires_grad_(needed[name])


GRADIENT_SCORES: Mapping[str, Callable[[Graph, Iterable[Group], Batches, Loss], dict[str, Scores]]] = {
    "taylor": taylor_importance,
    "fisher": fisher_importance,
    "lrp": lrp_importance,
}


def _gates(
    graph: Graph,
    groups: Iterable[Group],
    batches: Batches,
    objective: Loss,
    note: Callable[[Tensor], Tensor],
    scaled: bool = False,
) -> dict[str, Scores]:
    """Scores from ``d objective / d gate[n, c] = sum_hw x * d objective / dx`` at the inputs of every reading layer.

    ``objective``: a sum over examples; ``note``: what counts of each example's gates; ``scaled``: layers to mean 1.
    """
    model = graph.module
    groups = list(groups)
    readers = {name for group in groups for name in group.consumers if not graph.layers[name].depthwise}
    totals = {name: np.zeros(len(graph.layers[name].inputs)) for name in readers}
    saved: dict[str, Tensor] = {}

    def keep_input(name: str):  # type: ignore[no-untyped-def]
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            x = inputs[0].detach().requires_grad_(True) if not inputs[0].requires_grad else inputs[0]
            x = x * 1.0
            x.retain_grad()
            saved[name] = x
            return (x, *inputs[1:])

        return hook

    handles = [model.get_submodule(name).register_forward_pre_hook(keep_input(name)) for name in readers]
    try:
        with torch.enable_grad():
            for inputs, targets in batches:
                saved.clear()
                inputs = inputs.clone().requires_grad_(inputs.is_floating_point())  # token ids have no gradient
                torch.autograd.backward(objective(model(inputs), targets))
                for name, x in saved.items():
                    assert x.grad is not None
                    gate = (x * x.grad).detach()  # (n, c, h, w) or (n, ..., c)
                    dims = (2, 3) if gate.ndim == 4 else tuple(range(1, gate.ndim - 1))
                    per_example = gate.sum(dims) if dims else gate
                    totals[name] += note(per_example.double()).sum(0).numpy()
    finally:
        for handle in handles:
            handle.remove()
    scores = {}
    for group in groups:
        position, n = positions_of(graph, group), len(group.classes)
        read = [name for name in group.consumers if name in totals]
        parts = [_scatter(graph.layers[name].inputs, totals[name], position, n) for name in read]
        scores[group.name] = np.sum([_scaled(part) for part in parts] if scaled else parts, axis=0)
    return scores


# ---------------------------------------------------------------- relevance


@contextmanager
def passing_on_relevance(graph: Graph) -> Iterator[None]:
    """While it lasts, ``value * gradient`` is a value's relevance: see ``lrp`` in the module's docstring."""
    handles = []
    for layer in graph.layers.values():
        norm = graph.module.get_submodule(layer.norm) if layer.norm else None
        factor = getattr(norm, "weight", None)  # a negative one turns what is positive behind it
        sign = None if factor is None else torch.where(factor.detach() < 0, -1.0, 1.0)
        handles.append(graph.module.get_submodule(layer.name).register_forward_hook(_rule(_positive_part, sign)))
    for part in graph.module.modules():
        if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d | nn.LayerNorm | nn.RMSNorm):
            handles.append(part.register_forward_hook(_rule(_as_it_is, None)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


Backward = Callable[[nn.Module, Tensor, Tensor, "Tensor | None"], Tensor]


def _rule(backward: Backward, sign: Tensor | None) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Any]:
    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Any:
        return _Relevance.apply(inputs[0], output.detach(), module, backward, sign)  # type: ignore[no-untyped-call]

    return hook


class _Relevance(torch.autograd.Function):
    """A module's output whose gradient is what gives its input the relevance that a rule says."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, module: nn.Module, backward: Backward, sign: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, y)
        ctx.module, ctx.rule, ctx.sign = module, backward, sign
        return y.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, y = ctx.saved_tensors
        return ctx.rule(ctx.module, x, y * gradients[0], ctx.sign), None, None, None, None


def _as_it_is(module: nn.Module, x: Tensor, relevance: Tensor, sign: Tensor | None) -> Tensor:
    return relevance / _away_from_zero(x)


def _positive_part(module: nn.Module, x: Tensor, relevance: Tensor, sign: Tensor | None) -> Tensor:
    """``sum_j w_ij^+ R_j / (sum_i a_i w_ij^+)`` for positive inputs, with ``w^-`` for negative ones."""
    weight = cast(Tensor, module.weight).detach()
    if sign is not None:
        weight = weight * sign.reshape(-1, *[1] * (weight.ndim - 1))

    def made(values: Tensor, part: Tensor) -> Tensor:  # not by calling the module: its hook is the rule itself
        if isinstance(module, nn.Conv2d):
            return cast(Tensor, module._conv_forward(values, part, None))
        return nn.functional.linear(values, part)

    with torch.enable_grad():
        high, low = (v.detach().requires_grad_(True) for v in (x.clamp_min(0), x.clamp_max(0)))
        z = made(high, weight.clamp_min(0)) + made(low, weight.clamp_max(0))
        up, down = torch.autograd.grad(z, (high, low), relevance / _away_from_zero(z.detach()))
    return torch.where(x > 0, up, down)


def _away_from_zero(values: Tensor) -> Tensor:
    """The values, with those that are next to nothing moved to where one can divide by them."""
    least = 1e-9 * float(values.abs().max()) + TINY
    return torch.where(values.abs() < least, torch.where(values < 0, -least, least), values)


# ---------------------------------------------------------------- channels of groups


def _members(graph: Graph, names: Iterable[str]) -> Iterator[Layer]:
    for name in dict.fromkeys(names):
        yield graph.layers[name]


def _weight(graph: Graph, layer: Layer) -> Tensor:
    return cast(Tensor, graph.module.get_submodule(layer.name).weight).detach().double()


def positions_of(graph: Graph, group: Group) -> npt.NDArray[np.int64]:
    """Class -> position in the group, -1 elsewhere."""
    position = np.full(graph.n_classes, -1, dtype=np.int64)
    position[group.classes] = np.arange(len(group.classes))
    return position


def _scatter(ids: npt.NDArray[np.int64], values: Scores, position: npt.NDArray[np.int64], n: int) -> Scores:
    where = position[ids]
    return np.asarray(np.bincount(where[where >= 0], weights=values[where >= 0], minlength=n), dtype=np.float64)

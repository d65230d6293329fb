"""Live model -> deployed model: batch norm folded, weights rounded to their grids. What is searched is what is exported.

A *live* model is what ``stitch`` gives and recovery trains: convolutions beside their batch norms, weights behind
straight-through fake quantizers. The *deployed* form computes the same in eval mode, is faster, and carries a
:class:`PackedWeight` on every quantized layer, and the other forms its weight has (``forms``).
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, fx, nn

from autocompress.graph import FOLDS
from autocompress.methods.base import forms_of
from autocompress.methods.inputs import behind
from autocompress.methods.quantization import ActivationQuant, quantizer_of
from autocompress.slicing import make_layer


def fold_norm(weight: Tensor, bias: Tensor | None, norm: nn.Module | None) -> tuple[Tensor, Tensor]:
    """Weight and bias of ``norm(layer(x))`` in eval mode.  # (out, ...), (out,)"""
    shift = torch.zeros(weight.shape[0]) if bias is None else bias.detach()
    weight = weight.detach()
    if not isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d):
        return weight, shift
    assert norm.running_mean is not None and norm.running_var is not None
    factor = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        factor = factor * norm.weight.detach().double()
    offset = norm.bias.detach().double() if norm.bias is not None else torch.zeros_like(factor)
    folded = weight.double() * factor.reshape(-1, *[1] * (weight.ndim - 1))
    return folded.float(), ((shift.double() - norm.running_mean.double()) * factor + offset).float()


def deploy(live: fx.GraphModule) -> fx.GraphModule:
    """The deployed form of a live model, which stays as it is."""
    model = fx.GraphModule(live, copy.deepcopy(live.graph))
    modules = dict(live.named_modules(remove_duplicate=False))
    for node in list(model.graph.nodes):
        layer = modules.get(str(node.target)) if node.op == "call_module" else None
        if layer is None or not isinstance(
            layer[-1] if isinstance(layer, nn.Sequential) else layer, nn.Conv2d | nn.Linear
        ):
            continue
        norm = _norm_behind(node, modules)
        grid = modules.get(str(behind(live, node.all_input_nodes[0]).target))
        set_submodule(model, str(node.target), deploy_layer(layer, norm, grid))
        if norm is not None:
            after = next(iter(node.users))
            after.replace_all_uses_with(node)
            model.graph.erase_node(after)
    model.delete_all_unused_submodules()
    model.recompile()
    return model.eval()


def deploy_layer(layer: nn.Module, norm: nn.Module | None, grid: object) -> nn.Module:
    """One layer or its chain of factors with the norm behind it folded. ``grid``: the quantizer of its input, if it has one."""
    if not isinstance(layer, nn.Sequential):
        return _deployed(layer, norm, grid)
    parts = list(layer)
    grids = [grid, *parts]  # what each part reads
    return nn.Sequential(
        *(_deployed(p, norm if p is parts[-1] else None, g) for p, g in zip(parts, grids, strict=False))
    )


def _norm_behind(node: fx.Node, modules: dict[str, nn.Module]) -> nn.Module | None:
    if len(node.users) != 1:
        return None
    after = next(iter(node.users))
    return modules.get(str(after.target)) if after.meta.get(FOLDS) else None


def _deployed(part: Any, norm: nn.Module | None, grid: object) -> nn.Module:
    """A copy of one layer with its norm folded, its weight and (in int8) its bias rounded; other modules as they are."""
    if not isinstance(part, nn.Conv2d | nn.Linear):
        return part  # type: ignore[no-any-return]
    quantizer, forms = quantizer_of(part), forms_of(part)
    if quantizer is None and norm is None and not forms:
        return part
    # Not a deep copy: copies of a parametrized module share its class, and removing the parametrization breaks both.
    raw = _before(part, quantizer) if quantizer or forms else part.weight
    weight, bias = fold_norm(raw, part.bias, norm)
    packed = quantizer.pack(weight, fold_norm(torch.ones(len(weight)), None, norm)[0]) if quantizer else None
    if packed is not None and packed.activations and isinstance(grid, ActivationQuant):
        bias = _on_grid(bias, torch.tensor(grid.scale) * packed.scale)
    new = make_layer(part, packed.dequantize() if packed else weight, bias if norm or part.bias is not None else None)
    if packed is not None:
        new.packed = packed  # type: ignore[assignment]
    if forms:
        new.forms = forms  # type: ignore[assignment]
    return new


def _before(part: Any, quantizer: nn.Module | None) -> Tensor:
    """The weight as it comes to its quantizer, in all its forms where it has none."""
    chain = part.parametrizations["weight"]
    raw: Tensor = chain.original
    for step in chain:
        if step is quantizer:
            break
        raw = step(raw)
    return raw


def _on_grid(bias: Tensor, scale: Tensor) -> Tensor:
    """The bias as integer arithmetic adds it: int32 steps of ``input scale * weight scale``.  # (out,)"""
    steps = (bias.double() / scale.double()).round()
    return bias if bool((steps.abs() > 2**31 - 1).any()) else steps.float() * scale


def set_submodule(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put a module in another's place."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, new)

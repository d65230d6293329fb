"""A model as a graph of operations without in-place changes, and the shapes in it."""

from __future__ import annotations

import copy
import operator
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, fx, nn

from autocompress.errors import UnsupportedModel


def normalized(model: nn.Module) -> fx.GraphModule:
    """A traced copy in eval mode without in-place operations (they would change values that others still read)."""
    try:
        module = fx.symbolic_trace(_with_plain_norms(copy.deepcopy(model).eval()))
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UnsupportedModel(
            f"The model cannot be traced: {reason.rstrip('.')}. Control flow must not depend on the input's values; "
            "move such branches out of forward()."
        ) from error
    in_place = {operator.iadd: operator.add, operator.imul: operator.mul, operator.isub: operator.sub}
    for node in module.graph.nodes:
        if node.op == "call_function" and node.target in in_place:
            node.target = in_place[node.target]
        if node.op == "call_method" and node.target in ("add_", "mul_", "relu_", "sub_"):
            node.target = node.target[:-1]
        if "inplace" in node.kwargs:
            node.kwargs = {**node.kwargs, "inplace": False}
    for part in module.modules():
        if getattr(part, "inplace", False):
            setattr(part, "inplace", False)  # noqa: B010
    module.graph.eliminate_dead_code()
    module.recompile()
    for parameter in module.parameters():
        parameter.requires_grad_(False)
        parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)  # see tasks.augment.images_first
    return module


def _with_plain_norms(model: nn.Module) -> nn.Module:
    """``model``, which is changed, with torch's own RMSNorm in the place of others' (``LlamaRMSNorm`` of Hugging Face) wherever
    both compute the same: written out, a norm is many operations that no rule follows."""
    plain: dict[nn.Module, nn.RMSNorm] = {}
    for name, part in list(model.named_modules(remove_duplicate=False)):
        if name and type(part).__name__.endswith("RMSNorm") and not isinstance(part, nn.RMSNorm):
            if part not in plain and (found := _plain_norm(part)) is not None:
                plain[part] = found
            if part in plain:
                model.set_submodule(name, plain[part])
    return model


def _plain_norm(part: nn.Module) -> nn.RMSNorm | None:
    """An RMSNorm with the weight and the epsilon of ``part`` if it answers as that does; else ``None``."""
    weight, eps = getattr(part, "weight", None), getattr(part, "variance_epsilon", getattr(part, "eps", None))
    if not isinstance(weight, nn.Parameter) or weight.ndim != 1 or not isinstance(eps, float) or len([*part.buffers()]):
        return None
    found = nn.RMSNorm(len(weight), eps, device="meta").eval()
    found.weight = weight
    generator = torch.Generator(weight.device).manual_seed(0)
    x = torch.randn(2, 4, len(weight), generator=generator, device=weight.device)
    x = torch.cat([x, x * eps**0.5])  # small enough to see epsilon
    with torch.no_grad(), suppress(TypeError, ValueError, RuntimeError):
        if torch.allclose(part(x), found(x), rtol=1e-5, atol=1e-6):
            return found
    return None


def check_faithful(model: nn.Module, module: fx.GraphModule, example: Tensor) -> None:
    """The traced model must compute what the model computes; raises :class:`UnsupportedModel` otherwise."""
    try:
        with torch.no_grad():
            want, got = copy.deepcopy(model).eval()(example.clone()), module(example)
    except Exception as error:
        raise UnsupportedModel(f"The model does not run on its example input: {error}") from error
    if isinstance(want, Tensor) and not torch.allclose(got, want, rtol=1e-4, atol=1e-5, equal_nan=True):
        raise UnsupportedModel(
            "The traced model computes something else than the model: an operation changes a tensor in place that is read "
            "again later; write x = f(x) instead."
        )


class Shapes(fx.Interpreter):
    """Runs the example and keeps the shape of every tensor, by node; a list of them for tuples."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.shapes: dict[str, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            self.shapes[n.name] = tuple(result.shape)
        elif isinstance(result, tuple | list) and result and all(isinstance(part, Tensor) for part in result):
            self.shapes[n.name] = [tuple(part.shape) for part in result]
        return result

"""How methods plug in: a frozen config, and one handler registered for its type.

A handler turns a dense layer into what the plan asks for, in three views that must agree: the *kernels* that will run
(``lower``), the *module* that is searched and exported (``apply``), and the ``shares`` of nodes the certificate counts.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Protocol

from torch import Tensor, nn
from torch.nn.utils import parametrize

from autocompress.methods.fisher import BlockFisher
from autocompress.methods.hessian import Hessian, parts_of
from autocompress.registry import Registry
from autocompress.types import Kernel, MethodConfig


@dataclass(frozen=True, eq=False)
class LayerContext:
    """What a layer method may use: the Gram matrix of the layer's input, if one was calibrated, and the loss's curvature.

    ``gram``: ``X X^T / rows`` over the unfolded inputs with a last row of ones.  # (in * kh * kw + 1, same)
    ``fisher``: of the layer's weight, for levels that ask for it. ``expected``: mean and variance of the unfolded inputs as
    weights alone tell them, for levels without data.  # (in * kh * kw,) both
    """

    gram: Tensor | None = None
    fisher: BlockFisher | None = None
    expected: tuple[Tensor, Tensor] | None = None
    _hessians: dict[bool, Hessian] = field(default_factory=dict)

    def hessian(self, part: nn.Module, gram: Tensor | None) -> Hessian | None:
        """The curvature of a layer's output error; the layer's own is kept for all its levels, a factor's is not."""
        if gram is None:
            return None
        biased = getattr(part, "bias", None) is not None
        if gram is not self.gram:
            return Hessian(gram, biased)
        if biased not in self._hessians:
            self._hessians[biased] = Hessian(gram, biased)
        return self._hessians[biased]


class LayerMethod(Protocol):
    """A method that acts on one convolution or linear layer."""

    def lower(self, config: MethodConfig, kernel: Kernel) -> tuple[Kernel, ...]:
        """The kernels that run instead of ``kernel``."""
        ...

    def apply(self, config: MethodConfig, layer: nn.Module, context: LayerContext) -> nn.Module:
        """A new module that replaces ``layer``; raises ``UnsupportedModel`` with the reason where it cannot."""
        ...


class WeightForm(nn.Module):
    """A parametrization that keeps a weight in a form while it is trained; a deployed layer carries its forms in ``forms``.

    ``family``: what the certificate counts it under.
    """

    family: ClassVar[str]

    def forward(self, weight: Tensor) -> Tensor:
        """The weight in this form."""
        raise NotImplementedError

    def holds(self, weight: Tensor) -> bool:
        """Whether a weight has the form, up to a factor for each output channel."""
        raise NotImplementedError


def forms_of(layer: nn.Module) -> tuple[WeightForm, ...]:
    """The forms on a layer's weight, in order."""
    if not parametrize.is_parametrized(layer, "weight"):
        return ()
    return tuple(step for step in layer.parametrizations["weight"] if isinstance(step, WeightForm))  # type: ignore[index]


def set_weight(part: nn.Conv2d | nn.Linear, weight: Tensor, hessian: Hessian | None) -> None:
    """New raw weights ``(out, n)``; a bias takes up what they change in the mean of the outputs, where inputs are known."""
    if hessian is not None and part.bias is not None:
        lost = (part.weight.detach().flatten(1).double() - weight.flatten(1).double()) @ hessian.mean  # (out,)
        part.bias = nn.Parameter((part.bias.detach().double() + lost).to(part.bias.dtype), requires_grad=False)
    shaped = weight.reshape(part.weight.shape).to(part.weight.dtype)
    new = nn.Parameter(shaped.contiguous(), requires_grad=False)
    if parametrize.is_parametrized(part, "weight"):
        part.parametrizations["weight"].original = new  # type: ignore[index,union-attr]
    else:
        part.weight = new


class FormHandler:
    """A handler under which a layer, or each of its factors, stays one kernel whose fitted weight is then kept in a form."""

    def lower(self, config: MethodConfig, kernel: Kernel) -> tuple[Kernel, ...]:
        return (kernel,)

    def fit(self, config: MethodConfig, weight: Tensor, hessian: Hessian | None) -> tuple[Tensor, WeightForm]:
        """New weights, which the form leaves as they are, and the form.  # weight (rows, n), double"""
        raise NotImplementedError

    def apply(self, config: MethodConfig, layer: nn.Module, context: LayerContext) -> nn.Module:
        for part, gram in list(parts_of(layer, context.gram)):
            hessian = context.hessian(part, gram)
            new, form = self.fit(config, part.weight.detach().flatten(1).double(), hessian)
            set_weight(part, new, hessian)
            parametrize.register_parametrization(part, "weight", form)
        return layer


_HANDLERS: dict[type[MethodConfig], LayerMethod] = {}
METHODS: Registry[type[MethodConfig]] = Registry("method")


def handles(config_type: type[MethodConfig], name: str):  # type: ignore[no-untyped-def]
    """Class decorator: an instance of the class handles ``config_type``, known to users as ``name``."""

    def keep(handler: type) -> type:
        METHODS.register(name)(config_type)
        _HANDLERS[config_type] = handler()
        return handler

    return keep


def handler_of(config: MethodConfig) -> LayerMethod | None:
    """The layer handler of a config, or ``None`` for methods that act on groups and blocks."""
    return _HANDLERS.get(type(config))

"""How methods plug in: a frozen config, and one handler registered for its type.

A handler turns a dense layer into what the plan asks for, in three views that must agree: the *kernels* that will run
(``lower``), the *module* that is searched and exported (``apply``), and the ``shares`` of nodes the certificate counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from autocompress.registry import Registry
from autocompress.types import Kernel, MethodConfig


@dataclass(frozen=True, eq=False)
class LayerContext:
    """What a layer method may use: the Gram matrix of the layer's input, if one was calibrated.

    ``gram``: ``X X^T / rows`` over the unfolded inputs with a last row of ones.  # (in * kh * kw + 1, same)
    """

    gram: Tensor | None = None


class LayerMethod(Protocol):
    """A method that acts on one convolution or linear layer."""

    def lower(self, config: MethodConfig, kernel: Kernel) -> tuple[Kernel, ...]:
        """The kernels that run instead of ``kernel``."""
        ...

    def apply(self, config: MethodConfig, layer: nn.Module, context: LayerContext) -> nn.Module:
        """A new module that replaces ``layer``; raises ``UnsupportedModel`` with the reason where it cannot."""
        ...


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

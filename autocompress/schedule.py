"""What changes while recovery trains: masks that grow to a plan's sparse levels, and how many blocks are a plan's own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

from torch import nn

from autocompress.methods import Sparse
from autocompress.methods.sparsity import WeightMask, prune
from autocompress.recipe import Recipe

UPDATES = 20
"""How often masks change on their way."""
REPLACED = 0.6
"""Share of the steps after which every block is the plan's own."""


class Schedule:
    """Of ``steps`` steps on ``model``, whose sparse layers it makes dense where the recipe is gradual.

    ``sparse``: a layer's name -> its level, and what it and its norm begin as.
    """

    def __init__(
        self, model: nn.Module, recipe: Recipe, steps: int, sparse: Mapping[str, tuple[Sparse, Mapping[str, nn.Module]]]
    ) -> None:
        self.recipe, self.steps = recipe, steps
        self.grown = min(steps - 1, round(recipe.gradual * steps)) if sparse else 0
        self.every = max(1, self.grown // UPDATES)
        self.layers: list[tuple[Any, WeightMask, Sparse]] = []
        for name, (level, begin) in sparse.items() if self.grown else ():
            part: Any = model.get_submodule(name)
            chain = part.parametrizations["weight"]
            mask = next(step for step in chain if isinstance(step, WeightMask))
            for other, dense in cast("Mapping[str, Any]", begin).items():
                if other != name:
                    model.get_submodule(other).load_state_dict(dense.state_dict())
                    continue
                chain.original.data.copy_(dense.weight)
                if part.bias is not None:
                    part.bias.data.copy_(dense.bias)
            self.layers.append((part, mask, level))

    def own(self, step: int) -> float:
        """The share of blocks that are the plan's own: linear from the recipe's to 1."""
        done = min(1.0, step / max(1, round(REPLACED * self.steps)))
        return self.recipe.theseus + (1 - self.recipe.theseus) * done

    def final(self, step: int) -> bool:
        """Whether the masks of this step are those of the levels."""
        return step >= self.grown

    def mask(self, step: int) -> None:
        """The masks of this step: ``s_t = s (1 - (1 - t / T)^3)`` (Zhu & Gupta 2017), the largest weights stay."""
        if step > self.grown or (step % self.every and step != self.grown):
            return
        share = 1 - (1 - step / self.grown) ** 3 if self.grown else 1.0
        for part, mask, level in self.layers:
            raw = part.parametrizations["weight"].original.detach()
            flat, area = raw.flatten(1), raw[0, 0].numel()
            mask.mask = prune(flat, at(level, share), None, area)[1].reshape(raw.shape)


def at(level: Sparse, share: float) -> Sparse:
    """The level when so much of its way is done: of N:M levels, N comes down."""
    if level.of:
        return replace(level, keep=level.of - round((level.of - level.keep) * share), by="magnitude")
    return replace(level, sparsity=level.sparsity * share, by="magnitude")

"""What changes while recovery trains: masks that grow to a plan's sparse levels, and how many blocks are a plan's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, cast

from torch import Tensor, nn

from autocompress.methods import Sparse
from autocompress.methods.fisher import damped
from autocompress.methods.sparsity import By, WeightMask, prune
from autocompress.recipe import Recipe

UPDATES, BY_FISHER = 20, 8
"""How often masks change on their way; fewer where each time the Fisher matrix is measured anew."""
REPLACED = 0.6
"""Share of the steps after which every block is the plan's own."""


Moments = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]


class Schedule:
    """Of ``steps`` steps on ``model``, whose sparse layers it makes dense where the recipe is gradual.

    ``sparse``: a layer's name -> its level, and what it and its norm begin as. ``moments``: second moments of the gradients of
    these weights of the model as it is, as :func:`~autocompress.methods.fisher.block_moments` has them.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        steps: int,
        sparse: Mapping[str, tuple[Sparse, Mapping[str, nn.Module]]],
        moments: Moments,
    ) -> None:
        self.recipe, self.steps, self.moments = recipe, steps, moments
        self.grown = min(steps - 1, round(recipe.gradual * steps)) if sparse else 0
        fisher = any(level.by == "fisher" for level, _ in sparse.values())
        self.every = max(1, self.grown // (BY_FISHER if fisher else UPDATES))
        self.layers: list[tuple[str, Any, WeightMask, Sparse]] = []
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
            self.layers.append((name, part, mask, level))

    def own(self, step: int) -> float:
        """The share of blocks that are the plan's own: linear from the recipe's to 1."""
        done = min(1.0, step / max(1, round(REPLACED * self.steps)))
        return self.recipe.theseus + (1 - self.recipe.theseus) * done

    def final(self, step: int) -> bool:
        """Whether the masks of this step are those of the levels."""
        return step >= self.grown

    def mask(self, step: int) -> None:
        """The masks of this step: ``s_t = s (1 - (1 - t / T)^3)`` (Zhu & Gupta 2017).

        The largest weights stay. Of levels by the Fisher matrix those stay that the loss feels most *now*, the others in their
        block make good what goes, and what is gone does not come back (oBERT, Kurtic et al. 2022).
        """
        if step > self.grown or (step % self.every and step != self.grown):
            return
        share = 1 - (1 - step / self.grown) ** 3 if self.grown else 1.0
        asked = {name: _raw(part) for name, part, _, level in self.layers if share and level.by == "fisher"}
        moments = self.moments(asked) if asked else {}
        for name, part, mask, level in self.layers:
            weight = _raw(part).detach()
            flat, area, fisher = weight.flatten(1), weight[0, 0].numel(), None
            if name in moments:
                flat, fisher = (flat * mask.mask.flatten(1)).double(), damped(moments[name], weight)
            new, live = prune(flat, at(level, share, "fisher" if fisher else "magnitude"), None, area, fisher)
            mask.mask = live.reshape(weight.shape)
            if fisher:
                weight.copy_(new.reshape(weight.shape))


def _raw(part: Any) -> Tensor:
    """The weight that is trained, before its mask."""
    return cast(Tensor, part.parametrizations["weight"].original)


def at(level: Sparse, share: float, by: By = "magnitude") -> Sparse:
    """The level when so much of its way is done: of N:M levels, N comes down."""
    if level.of:
        return replace(level, keep=level.of - round((level.of - level.keep) * share), by=by)
    return replace(level, sparsity=level.sparsity * share, by=by)

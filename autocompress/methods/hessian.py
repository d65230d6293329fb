"""The curvature of a layer's output error: what all methods that make good their errors share, factorized once a layer.

The output error of changed weights is ``sum over rows of dw H dw^T`` with ``H = X X^T / rows`` over the layer's unfolded inputs.
Where the layer has a bias, that bias may move along, and what is left is the error around the mean: ``H`` is then
``E[x x^T] - E[x] E[x]^T``, and the bias takes up ``-dw E[x]``.

:func:`sweep` is the rule of Optimal Brain Surgeon for one column after the other (Frantar & Alistarh 2023, SparseGPT; Frantar et
al. 2023, GPTQ): what a column loses, those on its right make good, with the rows of ``U`` where ``H^-1 = U^T U``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from autocompress.errors import UnsupportedModel

T = TypeVar("T")

DAMPING = 0.01
"""Of the mean of the diagonal (GPTQ's ``percdamp``)."""
ROUNDING = 1e-5
"""Of the mean of the second moments: what differences of them in single precision may be off, in all."""
NOTHING = 1e-12
REMEMBERED = 6
"""Derived matrices: roots in three orders, and removals of three patterns."""
BLOCK = 128
"""Columns whose errors are passed on together."""


class Hessian:
    """``gram``: second moments of the inputs with a last row of ones; ``biased``: a bias moves along.  # (n + 1, n + 1)"""

    def __init__(self, gram: Tensor, biased: bool) -> None:
        g = gram.detach().double()
        usable = bool(torch.isfinite(g).all())
        self.mean = g[:-1, -1] if biased and usable else torch.zeros(len(g) - 1, dtype=g.dtype)  # (n,)
        eye = torch.eye(len(self.mean), dtype=g.dtype)
        h = g[:-1, :-1] - torch.outer(self.mean, self.mean) if usable else eye
        level, scale = float(h.diagonal().mean()), float(g[:-1, :-1].diagonal().mean()) if usable else 1.0
        damping = DAMPING * level + ROUNDING * scale
        # without an input that says something, all weights count the same
        self.raw = h if damping > NOTHING else eye
        self.matrix = self.raw + max(damping, NOTHING) * eye  # (n, n)
        self._kept: dict[object, object] = {}

    def memo(self, key: object, make: Callable[[], T]) -> T:
        """What is derived from this Hessian, made once for all levels of the layer; the last few are kept."""
        if key not in self._kept:
            while len(self._kept) >= REMEMBERED:
                del self._kept[next(iter(self._kept))]
            self._kept[key] = make()
        return cast(T, self._kept[key])

    def inverse_root(self, order: Tensor) -> Tensor:
        """Upper ``U`` with ``H^-1 = U^T U``, the columns in this order.  # (n, n)"""

        def make() -> Tensor:
            inverse = torch.cholesky_inverse(cholesky(self.matrix[order][:, order]))
            return cholesky(inverse).T.contiguous()

        return self.memo(("root", order.numpy().tobytes()), make)

    def falling(self) -> Tensor:
        """Columns in the order of falling ``H_jj``: those that matter most while many can still make good.  # (n,)"""
        return torch.argsort(self.matrix.diagonal(), descending=True, stable=True)

    def error(self, change: Tensor) -> Tensor:
        """Mean squared output error of each row of a change of weights.  # (rows, n) -> (rows,)"""
        d = change.double()
        return ((d @ self.raw) * d).sum(1)


def cholesky(h: Tensor) -> Tensor:
    """Lower factor, damped as much as a singular matrix needs."""
    factor, info = torch.linalg.cholesky_ex(h)
    ridge = 1e-10 * float(h.diagonal().mean())
    while int(info) != 0:
        ridge *= 10
        factor, info = torch.linalg.cholesky_ex(h + ridge * torch.eye(len(h), dtype=h.dtype))
    return cast(Tensor, factor)


def back_solve(weight: Tensor, alive: Tensor, h: Tensor) -> Tensor:
    """The weights that live at their optimum behind those that do not: ``w_S = (h w)_S h_SS^-1`` in each row, zeros elsewhere.

    # weight (rows, n), alive (rows, n) bool, h (n, n) -> (rows, n)
    """
    new = torch.zeros_like(weight)
    for row, mask in enumerate(alive):
        live = torch.nonzero(mask).flatten()
        if len(live):
            new[row, live] = torch.linalg.solve(h[live][:, live], h[live] @ weight[row])
    return new


def sweep(
    weight: Tensor, root: Tensor, settle: Callable[[int, Tensor], Tensor], edges: Sequence[int] | None = None
) -> Tensor:
    """Settle all columns from left to right and make good what each loses.

    ``settle(column, ahead)`` gives the final values of a column from what it and those on its right in the same block hold by
    now, ``ahead (rows, columns)``. ``edges``: where blocks begin, and the end.  # weight (rows, n) -> (rows, n)
    """
    w, n = weight.double().clone(), weight.shape[1]
    for start, stop in pairwise(edges or [*range(0, n, BLOCK), n]):
        part, inner = w[:, start:stop], root[start:stop, start:stop]
        errors = torch.empty_like(part)
        for j in range(stop - start):
            final = settle(start + j, part[:, j:])
            errors[:, j] = (part[:, j] - final) / inner[j, j]
            part[:, j + 1 :] -= errors[:, j, None] * inner[j, j + 1 :]
            part[:, j] = final
        w[:, stop:] -= errors @ root[start:stop, stop:]
    return w


def row_unit(values: Tensor) -> Tensor:
    """The largest magnitude of each row, 1 where there is none.  # (rows, n) -> (rows, 1)"""
    unit = values.abs().amax(1, keepdim=True).float()
    return torch.where(unit > 0, unit, torch.ones_like(unit))


def halves(values: Tensor, unit: Tensor) -> Tensor:
    """16-bit floats times a factor a row."""
    return (values / unit).half().float() * unit


def by_position(channels: int, area: int) -> Tensor:
    """Unfolded columns in the order (kernel position, input channel): neighbours are channels at one position.  # (n,)"""
    return torch.arange(channels * area).reshape(channels, area).T.reshape(-1)


def parts_of(layer: nn.Module, gram: Tensor | None) -> Iterator[tuple[nn.Conv2d | nn.Linear, Tensor | None]]:
    """A layer, or the two factors that stand for it, each with the second moments of its inputs where they are known.

    Those of a second factor on single positions are ``A G A^T`` with ``A`` the first factor as a map of patches.
    """
    if isinstance(layer, nn.Conv2d | nn.Linear):
        yield layer, gram
        return
    if not isinstance(layer, nn.Sequential) or not all(isinstance(part, nn.Conv2d | nn.Linear) for part in layer):
        raise UnsupportedModel(
            f"Only convolutions and linear layers have weights to be stored otherwise, got {type(layer).__name__}."
        )
    first, second = cast("tuple[nn.Conv2d | nn.Linear, nn.Conv2d | nn.Linear]", tuple(layer))
    yield first, gram
    whole = isinstance(second, nn.Linear) or second.kernel_size == (1, 1)
    if gram is None or not whole:
        yield second, None
        return
    weight = first.weight.detach().flatten(1).double()
    a = nn.functional.pad(weight, (0, 1, 0, 1))
    a[-1, -1] = 1.0
    yield second, a @ gram.double() @ a.T

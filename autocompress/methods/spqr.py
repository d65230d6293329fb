"""Outliers isolated, the others rounded in tiny groups: SpQR (Dettmers et al. 2024). Simulated.

``W = Q + S``: ``S`` keeps the share of weights without which their group's grid gains most, as 16-bit floats; ``Q`` goes through
GPTQ's columns on ``(q - z) s`` with ``q`` in ``0 .. 2^bits - 1`` and ``s, z`` of every ``group`` unfolded inputs of a row.
These are themselves integers of 3 bits on grids that :data:`SECOND` groups of the row share: 6 bits a group and not 64. An error
of rounding counts ``(w - q(w))^2 / [H^-1]_jj``, what Optimal Brain Surgeon says it costs; without a Gram matrix all are alike.

The published threshold on what an outlier gains is set so that exactly ``outliers`` of a layer's weights pass it: costs are known
before weights are.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import ClassVar, Literal

import torch
from torch import Tensor

from autocompress.methods.base import FormHandler, WeightForm, handles
from autocompress.methods.hessian import Hessian, halves, row_unit, sweep
from autocompress.types import Kernel, MethodConfig, Storage

SHARES = torch.linspace(1.0, 0.2, 17).tolist()
"""Of a group's range: where its grid may end."""
SECOND = 16
"""Groups that share the two grids of their scales and zeros."""
STATISTIC_BITS = 3
TOLERANCE = 1e-2
"""Of a step: what folding a norm in single precision may move."""


@dataclass(frozen=True)
class SpQR(MethodConfig):
    """``bits`` in groups of ``group`` unfolded inputs; ``outliers``: the share of weights that are kept."""

    exports: ClassVar[Literal["onnx", "simulated"]] = "simulated"

    bits: Literal[2, 3, 4] = 3
    group: int = 16
    outliers: float = 0.01

    def describe(self) -> str:
        return f"SpQR {self.bits} bits"

    @property
    def fitted(self) -> bool:
        return True

    def store(self, kernel: Kernel, before: Storage) -> Storage:
        """Codes; a group's scale and zero; four halves for each two second grids; a row's factor and where its outliers begin; an
        outlier's half and its column."""
        rows, n = kernel.out_shape[0], kernel.weights // kernel.out_shape[0]
        groups = -(-n // self.group)
        statistics = 2 * STATISTIC_BITS * groups + 4 * 16 * -(-groups // SECOND) + 32 + 32
        outliers = 32 * round(self.outliers * kernel.weights)
        return Storage(before.values, self.bits, before.extra + rows * statistics + outliers)


class WeightGroups(WeightForm):
    """Parametrization ``w -> the nearest step of its group's grid``, straight-through; outliers stay.

    ``scale``, ``zero``  # (rows, groups); ``outliers``  # (rows, n) bool
    """

    family = "spqr"
    scale: Tensor
    zero: Tensor
    outliers: Tensor

    def __init__(self, bits: int, group: int, scale: Tensor, zero: Tensor, outliers: Tensor) -> None:
        super().__init__()
        self.top, self.group = 2**bits - 1, group
        self.register_buffer("scale", scale)
        self.register_buffer("zero", zero)
        self.register_buffer("outliers", outliers)

    def rounded(self, values: Tensor, columns: Tensor | slice = slice(None)) -> Tensor:
        """The nearest steps of some columns, outliers too.  # (rows, len(columns))"""
        scale, zero = (
            s.repeat_interleave(self.group, 1)[:, : self.outliers.shape[1]][:, columns] for s in (self.scale, self.zero)
        )
        return on_grid(values, scale, zero, self.top)

    def forward(self, weight: Tensor) -> Tensor:
        step = self.rounded(weight.detach().flatten(1).float()).reshape(weight.shape).to(weight.dtype)
        return torch.where(self.outliers.reshape(weight.shape), weight, weight + (step - weight).detach())

    def holds(self, weight: Tensor) -> bool:
        """Within each group differences are so many steps; a row's factor is the one that its least difference has."""
        values, live = (in_groups(v, self.group) for v in (weight.flatten(1).double(), ~self.outliers))
        return all(self._row_holds(*row) for row in zip(values, live, self.scale.double(), strict=True))

    def _row_holds(self, values: Tensor, live: Tensor, scale: Tensor) -> bool:
        first = values.gather(1, live.double().argmax(1, keepdim=True))
        steps = ((values - first) / scale[:, None]).abs()[live]  # so many times the row's factor
        least = steps[steps > 0]
        if not len(least):
            return True
        for times in range(1, self.top + 1):
            units = steps * (times / least.min())
            if units.max() < self.top + 0.5 and bool(((units - units.round()).abs() < TOLERANCE).all()):
                return True
        return False


@handles(SpQR, "spqr")
class _SpQRHandler(FormHandler):
    def fit(self, config: MethodConfig, weight: Tensor, hessian: Hessian | None) -> tuple[Tensor, WeightForm]:
        assert isinstance(config, SpQR)
        return isolate(weight, config, hessian)


def isolate(weight: Tensor, config: SpQR, hessian: Hessian | None) -> tuple[Tensor, WeightGroups]:
    """New weights and the grids and outliers that they lie on.  # weight (rows, n) -> (rows, n)"""
    cost = torch.ones(weight.shape[1], dtype=weight.dtype)
    if hessian is not None:
        cost = 1 / torch.cholesky_inverse(torch.linalg.cholesky(hessian.matrix)).diagonal()
    outliers = _outliers(weight, cost, config)
    scale, zero = _grids(weight, cost, outliers, config)
    form = WeightGroups(config.bits, config.group, scale.float(), zero.float(), outliers)
    unit = row_unit(weight)
    if hessian is None:
        kept = halves(weight, unit).to(weight.dtype)
        return torch.where(outliers, kept, form.rounded(weight.float()).to(weight.dtype)), form
    order = hessian.falling()
    places = order.tolist()

    def settle(column: int, ahead: Tensor) -> Tensor:
        now, place = ahead[:, :1], slice(places[column], places[column] + 1)
        step = form.rounded(now.float(), place).to(now.dtype)
        return torch.where(outliers[:, place], halves(now, unit).to(now.dtype), step)[:, 0]

    settled = sweep(weight[:, order], hessian.inverse_root(order), settle)
    return settled[:, torch.argsort(order)], form


def on_grid(values: Tensor, scale: Tensor, zero: Tensor, top: int) -> Tensor:
    """``(clip(round(w / s + z), 0, top) - z) s``."""
    return ((values / scale + zero).round().clamp(0, top) - zero) * scale


def in_groups(values: Tensor, group: int) -> Tensor:
    """Consecutive columns together, the last ones filled up with zeros.  # (rows, n) -> (rows, groups, group)"""
    padded = torch.nn.functional.pad(values, (0, -values.shape[1] % group))
    return torch.unflatten(padded, 1, (-1, group))


def _extent(values: Tensor, live: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Scale and zero of the grid over the values that live, zero among them.  # (..., group) -> (..., 1), (..., 1)"""
    taken = values * live
    low, high = taken.amin(-1, keepdim=True).clamp_max(0), taken.amax(-1, keepdim=True).clamp_min(0)
    scale = torch.where(high > low, (high - low) / top, torch.ones_like(low))
    return scale, -low / scale


def _outliers(weight: Tensor, cost: Tensor, config: SpQR) -> Tensor:
    """The weights whose absence from their group's grid lowers what rounding the group costs most.  # (rows, n) bool"""
    top, n = 2**config.bits - 1, weight.shape[1]
    values, costs = in_groups(weight, config.group), in_groups(cost[None], config.group)

    def error(live: Tensor) -> Tensor:
        scale, zero = _extent(values, live, top)
        return ((on_grid(values, scale, zero, top) - values).square() * costs * live).sum(-1)

    everyone = torch.ones(config.group, dtype=torch.bool)
    whole = error(everyone)
    gains = torch.empty_like(values)
    for j in range(config.group):
        gains[..., j] = whole - error(everyone & (torch.arange(config.group) != j))
    flat = gains.flatten(1)[:, :n].flatten()
    found = torch.zeros(weight.numel(), dtype=torch.bool)
    found[flat.topk(round(config.outliers * weight.numel())).indices] = True
    return found.reshape(weight.shape)


def _grids(weight: Tensor, cost: Tensor, outliers: Tensor, config: SpQR) -> tuple[Tensor, Tensor]:
    """Each group's scale and zero: those of its second grids that cost least.  # (rows, groups), (rows, groups)"""
    top = 2**config.bits - 1
    values, live = (in_groups(v, config.group) for v in (weight, ~outliers))
    costs = in_groups(cost[None], config.group) * live

    def error(scale: Tensor, zero: Tensor) -> Tensor:
        return ((on_grid(values, scale, zero, top) - values).square() * costs).sum(-1, keepdim=True)

    def best(options: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        found, least = options[0], error(*options[0])
        for option in options[1:]:
            now = error(*option)
            better = now < least
            found = (torch.where(better, option[0], found[0]), torch.where(better, option[1], found[1]))
            least = torch.minimum(now, least)
        return found

    widest, zero = _extent(values, live, top)
    scales, zeros = (_second(v[..., 0]) for v in best([(widest * share, zero) for share in SHARES]))
    scale, zero = best([(s[..., None], z[..., None]) for s, z in product(scales, zeros)])
    return scale[..., 0], zero[..., 0]


def _second(values: Tensor) -> list[Tensor]:
    """The ``2^STATISTIC_BITS`` even steps from the least to the largest of every SECOND groups.  # (rows, groups) each"""
    padded = torch.nn.functional.pad(values[None], (0, -values.shape[1] % SECOND), mode="replicate")[0]
    groups = torch.unflatten(padded, 1, (-1, SECOND))
    low, high = (v.repeat_interleave(SECOND, 1)[:, : values.shape[1]] for v in (groups.amin(-1), groups.amax(-1)))
    # as the file would hold them: halves times the row's factor
    unit = row_unit(values)
    low, high = (halves(v, unit).to(values.dtype) for v in (low, high))
    return [low + (high - low) * step for step in torch.linspace(0, 1, 2**STATISTIC_BITS).tolist()]

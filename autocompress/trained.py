"""Formats that are trained: what recovery puts in the place of fixed grids and tables, and takes out again when it is done.

Every weight passes its format straight-through while recovery trains (quantized distillation, Polino et al. 2018): integers of a
plan's levels are trained as they will be exported. On top of that a recipe may train

* ``scales``: the steps of grids (LSQ, Esser et al. 2020) and the entries of tables (differentiable quantization, Polino et al.
  2018): ``w' = s round(clip(w / s, low, top))``, so ``dw'/ds`` is ``round(w / s) - w / s`` inside and ``low`` or ``top``
  outside. Exported as any grid;
* ``bits``: ``w' = s round(clip(w / s, low, top))``, ``top = 2^(b-1) - 1``, with ``b`` and ``r = s top`` of every scale
  learned, and ``price * bits / weights`` in the loss (Self-compressing neural networks, Cséfalvay & Imber 2023). ``b`` starts
  at the level's bits and never exceeds them, so the file is right and as large as the level's: fewer bits are simulated, but
  for what packing gains;
* ``clusters``: tables whose weights belong to all entries, ``A = softmax(-|w - c| / tau)``, ``c = A^T w / A^T 1``, ``w' = A c``
  (DKM, Cho et al. 2022). A is not kept for the backward pass but made again (eDKM, Cho et al. 2023, shares it between equal
  16-bit weights, of which a table a row has not enough). In the end each weight takes its nearest entry. Simulated, as tables
  are.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from autocompress.methods.grids import Grid, codes, per_scale, searched_scale, spread, weight_scale
from autocompress.methods.lookup import WeightLookup, nearest
from autocompress.methods.quantization import PackedWeight, WeightFakeQuant, folded_scale
from autocompress.recipe import Recipe

SMALLEST = 1e-8


class LearnedGrid(WeightFakeQuant):
    """A grid whose steps are trained."""

    scale: Tensor

    def __init__(self, fixed: WeightFakeQuant, weight: Tensor) -> None:
        super().__init__(fixed.bits, fixed.group, fixed.activations, grid=fixed.grid)
        del self.scale
        start = _scale_of(fixed, weight)
        self.scale = nn.Parameter(start.clone())
        self.damping = (weight.numel() / start.numel() * (2 ** (fixed.bits - 1) - 1)) ** -0.5
        """LSQ's share of the gradient that a step gets: one over the root of weights times levels."""

    def forward(self, weight: Tensor) -> Tensor:
        scale = self.scale * self.damping + (self.scale * (1 - self.damping)).detach()
        low, top = codes(self.bits, self.grid)
        return _on_grid(weight, spread(_apart(scale, self.grid), weight.shape, self.group), low, top)

    def settled(self, weight: Tensor) -> tuple[WeightFakeQuant, Tensor]:
        """The fixed grid, and the weight that goes into it."""
        scale = _apart(self.scale.detach(), self.grid)
        return WeightFakeQuant(self.bits, self.group, self.activations, scale, self.grid), weight


class LearnedBits(WeightFakeQuant):
    """A grid whose bits and range are trained.  ``width``, ``reach`` (log2 of the range): # (out,) or (out, blocks, *kernel)

    Published with an exponent ``e = log2 s`` in the range's place; there a bit less also halves the range, so a price on bits
    fights the clipping of the largest weights and hardly moves.
    """

    def __init__(self, fixed: WeightFakeQuant, weight: Tensor) -> None:
        super().__init__(fixed.bits, fixed.group, fixed.activations, grid=fixed.grid)
        start = _scale_of(fixed, weight)
        self.sides: Tensor
        self.register_buffer("sides", start.sign())  # stay as they are
        self.reach = nn.Parameter((start.abs() * (2 ** (fixed.bits - 1) - 1)).log2())
        self.width = nn.Parameter(torch.full_like(start, float(fixed.bits)))

    def forward(self, weight: Tensor) -> Tensor:
        scale = spread(self._scale(), weight.shape, self.group)
        low, top = (spread(end, weight.shape, self.group) for end in self._ends())
        return _on_grid(weight, scale, low, top)

    def bits_of(self, weight: Tensor) -> Tensor:
        """Bits of all its weights together, with a gradient.  # ()"""
        return spread(self.width.clamp(0, self.bits), weight.shape, self.group).expand(weight.shape).sum()

    def pack(self, weight: Tensor, factor: Tensor) -> PackedWeight:
        scale = _apart(folded_scale(self._scale().detach(), factor, self.grid), self.grid)
        low, top = (spread(end.detach(), weight.shape, self.group) for end in self._ends())
        ratio = weight.detach().float() / spread(scale, weight.shape, self.group)
        integers = ratio.clamp(low, top).round().to(torch.int8)
        return PackedWeight(integers, scale, self.bits, self.group, self.activations)

    def settled(self, weight: Tensor) -> tuple[WeightFakeQuant, Tensor]:
        """The level's grid at the learned scales, and the weight on the integers that were learned."""
        scale = self._scale().detach()
        return WeightFakeQuant(self.bits, self.group, self.activations, scale, self.grid), self(weight).detach()

    def _scale(self) -> Tensor:
        """A step; below half a step either way everything rounds to zero."""
        return self.sides * torch.exp2(self.reach) / self._ends()[1].clamp_min(0.5)

    def _ends(self) -> tuple[Tensor, Tensor]:
        """The lowest and the highest code. Below one bit the lowest of a full grid goes from -1 to 0, as ``2^b - 1`` steps do."""
        width = self.width.clamp(0, self.bits)
        top = (torch.exp2(width - 1) - 1).clamp_min(0)
        return (-top if self.grid == "narrow" else top + 1 - torch.exp2(width)), top


def _scale_of(fixed: WeightFakeQuant, weight: Tensor) -> Tensor:
    """The scales of a grid that stays, or of the one that follows this weight."""
    if fixed.scale is not None:
        return fixed.scale
    if fixed.grid == "full":
        return searched_scale(weight, fixed.bits, fixed.group, fixed.grid)
    return weight_scale(weight, fixed.bits, fixed.group)


class LearnedTable(WeightLookup):
    """A table whose entries are trained; a weight's entry is the nearest one, and passes its gradient on to the weight, too."""

    def __init__(self, fixed: WeightLookup) -> None:
        super().__init__(fixed.table, fixed.outliers)
        del self.table
        self.table = nn.Parameter(fixed.table.clone())
        self.damping = (fixed.outliers.numel() / fixed.table.numel()) ** -0.5
        """The share of the gradient that an entry gets: one over the root of its weights, as a grid's step does."""

    def forward(self, weight: Tensor) -> Tensor:
        table = (self.table * self.damping + (self.table * (1 - self.damping)).detach()).sort(dim=1).values
        entry = nearest(table, weight.detach().flatten(1).float()).reshape(weight.shape)
        return torch.where(self.outliers.reshape(weight.shape), weight, entry + weight - weight.detach())

    def settled(self, weight: Tensor) -> tuple[WeightLookup, Tensor]:
        return WeightLookup(_halves(self.table.detach()).sort(dim=1).values, self.outliers), weight


class SoftTable(WeightLookup):
    """Clusters: every weight is a mean of its row's entries, mostly of the near ones."""

    def __init__(self, fixed: WeightLookup, softness: float) -> None:
        super().__init__(fixed.table.clone(), fixed.outliers)
        self.softness = softness

    def forward(self, weight: Tensor) -> Tensor:
        rows = weight.flatten(1)
        if not torch.is_grad_enabled():
            made, _ = self._soft(rows, self.table)
        else:
            made, table = cast(
                "tuple[Tensor, Tensor]", checkpoint(self._soft, rows, self.table.clone(), use_reentrant=False)
            )
            self.table = table.detach()
        return torch.where(self.outliers.reshape(weight.shape), weight, made.reshape(weight.shape))

    def _soft(self, rows: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        """Rows as means of their entries, and the entries as means of their rows.  # (rows, n), (rows, k)"""
        gaps = (table[:, -1:] - table[:, :1]) / (table.shape[1] - 1)
        share = self._shares(rows, table, gaps)  # (rows, n, k)
        share = share * ~self.outliers[:, :, None]
        mass = share.sum(1)
        table = torch.where(mass > SMALLEST, (share * rows[:, :, None]).sum(1) / mass.clamp_min(SMALLEST), table)
        made = (self._shares(rows, table, gaps) * table[:, None]).sum(2)
        return made, table

    def _shares(self, rows: Tensor, table: Tensor, gaps: Tensor) -> Tensor:
        distance = (rows[:, :, None] - table[:, None]).abs() / _positive(self.softness * gaps)[:, :, None]
        return torch.softmax(-distance, dim=2)

    def settled(self, weight: Tensor) -> tuple[WeightLookup, Tensor]:
        return WeightLookup(_halves(self.table).sort(dim=1).values, self.outliers), weight


Learned = LearnedGrid | LearnedBits | LearnedTable | SoftTable


def learn(model: nn.Module, recipe: Recipe) -> None:
    """Put trained formats in the place of fixed ones, as the recipe says; the model computes the same, soft tables nearly."""
    for chain in _chains(model):
        weight = chain.original.detach()
        for i, step in enumerate(list(chain)):
            new: nn.Module | None = None
            if type(step) is WeightFakeQuant and recipe.bits:
                new = LearnedBits(step, weight)
            elif type(step) is WeightFakeQuant and recipe.scales:
                new = LearnedGrid(step, weight)
            elif type(step) is WeightLookup and recipe.scales:
                new = LearnedTable(step)
            elif type(step) is WeightLookup and recipe.clusters:
                new = SoftTable(step, recipe.clusters)
            if new is not None:
                chain[i] = new
            weight = step(weight).detach()


def settle(model: nn.Module) -> None:
    """Put fixed formats back, at what was learned: what is judged and exported. Weights with a table lie on its entries."""
    for chain in _chains(model):
        if not any(isinstance(step, Learned | WeightLookup) for step in chain):
            continue
        with torch.no_grad():
            weight = chain.original.detach()
            for i, step in enumerate(list(chain)):
                if isinstance(step, Learned):
                    chain[i], weight = step.settled(weight)
                    chain.original.data = weight
                if isinstance(chain[i], WeightLookup):
                    chain.original.data = _stored(chain[i], weight)
                weight = chain[i](chain.original.detach())


def learned(model: nn.Module) -> list[tuple[LearnedBits, Tensor]]:
    """The formats whose bits are trained, each with its weight."""
    return [(step, chain.original) for chain in _chains(model) for step in chain if isinstance(step, LearnedBits)]


def _chains(model: nn.Module) -> Iterator[Any]:
    """The parametrizations of each weight that has some, in their order, with what comes to them as ``original``."""
    for part in model.modules():
        if parametrize.is_parametrized(part, "weight"):
            yield part.parametrizations["weight"]  # type: ignore[index]


def mean_bits(model: nn.Module) -> Tensor:
    """Bits a weight over all formats that are trained, with a gradient; 0 without any.  # ()"""
    pairs = learned(model)
    if not pairs:
        return torch.zeros(())
    return torch.stack([step.bits_of(weight) for step, weight in pairs]).sum() / sum(w.numel() for _, w in pairs)


def bits_in(deployed: nn.Module) -> float:
    """Bits a weight that the integers of a deployed model need, over its quantized weights; 0 without any."""
    found = [p for part in deployed.modules() if isinstance(p := getattr(part, "packed", None), PackedWeight)]
    weights = sum(p.integers.numel() for p in found)
    return sum(used_bits(p) * p.integers.numel() for p in found) / max(1, weights)


def used_bits(packed: PackedWeight) -> float:
    """Bits a weight that the integers of a packed weight need, each channel or block by its furthest, in two's complement."""
    grouped = per_scale(packed.integers.long(), packed.group)
    reach = torch.where(grouped < 0, -1 - grouped, grouped).amax(-1)  # -2^(b-1) .. 2^(b-1) - 1 fit into b bits
    magnitude = torch.where(reach > 0, torch.floor(torch.log2(reach.clamp_min(1).double())) + 1, 0.0)
    bits = torch.where((grouped != 0).any(-1), magnitude + 1, 0.0)
    return float(bits.mean())


def _on_grid(weight: Tensor, scale: Tensor, low: Tensor | float, top: Tensor | float) -> Tensor:
    """``s round(clip(w / s, low, top))``, straight-through where it rounds."""
    lowest, highest = (torch.as_tensor(end, dtype=weight.dtype) for end in (low, top))
    clipped = torch.minimum(torch.maximum(weight / scale, lowest), highest)
    return (clipped + (clipped.round() - clipped).detach()) * scale


def _apart(scale: Tensor, grid: Grid) -> Tensor:
    """Scales that are far enough from zero; only those of a full grid may be negative."""
    if grid == "narrow":
        return _positive(scale)
    return torch.where(scale < 0, scale.clamp_max(-SMALLEST), scale.clamp_min(SMALLEST))


def _positive(scale: Tensor) -> Tensor:
    return scale.abs().clamp_min(SMALLEST)


def _stored(form: WeightLookup, weight: Tensor) -> Tensor:
    """The entries of a weight's table, and outliers as 16-bit floats times a factor a row."""
    rows = weight.flatten(1).float()
    return torch.where(form.outliers, _halves(rows), nearest(form.table, rows)).reshape(weight.shape)


def _halves(rows: Tensor) -> Tensor:
    """16-bit floats times a factor a row, as tables and outliers are stored."""
    unit = rows.abs().amax(1, keepdim=True)
    unit = torch.where(unit > 0, unit, torch.ones_like(unit))
    return (rows / unit).half().float() * unit

"""Even grids of weights: which integers they have, where their scales lie, and the best scales for a weight or for its integers.

Two grids, ``w' = s q``:

* ``narrow``: ``q`` in ``-(2^(b-1) - 1) .. 2^(b-1) - 1``. What integer kernels multiply without overflow at 8 bits;
* ``full``: ``q`` in ``-2^(b-1) .. 2^(b-1) - 1``, all codes. A *negative* scale puts the code without a partner on the other
  side, so each channel or block has it where its weights reach further; the sign is the float's and costs no bits.

A scale belongs to an output channel (``group = 0``) or to a block of ``group`` input channels at one kernel position. Knows
nothing of methods and layers.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Grid = Literal["narrow", "full"]

SHARES = torch.linspace(1.0, 0.2, 33).tolist()
"""Of the widest scale. Among them is ``top / 2^(b-1)`` of 2, 3 and 4 bits, where the lowest code meets the largest weight: so
what lies on a full grid is found to lie on one."""
SQUARES = 2.0
NORM = 2.4
"""Of the rounding error where columns make good for each other (GPTQ's published code): large errors are made good worse."""
SMALLEST_SHARE = 0.1
SOLVED_AT_ONCE = 2**22
"""Numbers in the matrices of the scales that are solved together: 32 MB."""


def codes(bits: int, grid: Grid) -> tuple[int, int]:
    """The lowest and the highest integer of a grid."""
    top = 2 ** (bits - 1) - 1
    return (-top if grid == "narrow" else -top - 1), top


def spread(scale: Tensor, shape: torch.Size, group: int) -> Tensor:
    """Scales broadcast to the weight's shape."""
    if group == 0:
        return scale.reshape(-1, *[1] * (len(shape) - 1))
    return scale.repeat_interleave(group, dim=1)[:, : shape[1]]


def per_scale(values: Tensor, group: int) -> Tensor:
    """What shares a scale, along a last axis; a shorter last block is filled with zeros.  # (*scale's shape, shared)"""
    if group == 0:
        return values.flatten(1)
    pad = -values.shape[1] % group
    padded = torch.cat([values, values.new_zeros(values.shape[0], pad, *values.shape[2:])], dim=1)
    return torch.unflatten(padded, 1, (-1, group)).movedim(2, -1)


def weight_scale(weight: Tensor, bits: int, group: int = 0) -> Tensor:
    """The widest scales, by the largest magnitude; a channel or block of zeros gets scale 1.

    # (out,) when ``group == 0``, else (out, ceil(in / group), *kernel)
    """
    top = 2 ** (bits - 1) - 1
    largest = per_scale(weight.detach().abs(), group).amax(dim=-1)
    return torch.where(largest > 0, largest / top, torch.ones_like(largest)).to(torch.float32)


def searched_scale(weight: Tensor, bits: int, group: int, grid: Grid, norm: float = SQUARES) -> Tensor:
    """Of shares of the widest scales, on a full grid with either sign, those with the least ``sum |w' - w|^norm``.

    So a full grid is never worse than the narrow one by this measure.  # as :func:`weight_scale`
    """
    low, top = codes(bits, grid)
    w, widest = weight.detach().float(), weight_scale(weight, bits, group)
    if grid == "full":  # first the side that reaches further: of equal errors mirrored weights then have mirrored grids
        ends = per_scale(w, group)
        widest = torch.where(ends.amax(-1) > -ends.amin(-1), -widest, widest)
    best, least = widest, torch.full(widest.shape, torch.inf)
    for share in SHARES:
        for scale in (widest * share, widest * -share)[: 2 if grid == "full" else 1]:
            steps = spread(scale, w.shape, group)
            error = per_scale(((w / steps).round().clamp(low, top) * steps - w).abs().pow(norm), group).sum(-1)
            best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    return best


def refitted_scale(integers: Tensor, scale: Tensor, weight: Tensor, matrix: Tensor, group: int) -> Tensor:
    """The scales at which these integers have the least output error: of each row the optimum over all its scales together.

    ``min (w - A^T s) H (w - A^T s)^T`` with the integers of scale ``k`` in row ``k`` of ``A``. A row in which a scale would all
    but vanish or change its sign keeps what it has. ``matrix``: ``H``, positive definite.

    # integers, weight (out, in, *kernel), matrix (n, n) -> as ``scale``
    """
    q, w, rows = integers.flatten(1).double(), weight.detach().flatten(1).double(), len(weight)
    old = scale.reshape(rows, -1).double()  # (rows, scales)
    count = old.shape[1]
    numbers = torch.arange(count).reshape(1, *scale.shape[1:])
    member = spread(numbers, integers.shape, group).expand(1, *integers.shape[1:]).flatten()  # (n,) column -> scale
    places = [torch.nonzero(member == k).flatten() for k in range(count)]
    new = torch.empty_like(old)
    for chunk in torch.split(torch.arange(rows), max(1, SOLVED_AT_ONCE // count**2)):
        a, b = q.new_zeros(len(chunk), count, count), q.new_zeros(len(chunk), count)
        for k, columns in enumerate(places):
            felt = q[chunk][:, columns] @ matrix[columns].double()  # (chunk, n)
            a[:, k].index_add_(1, member, felt * q[chunk])
            b[:, k] = (felt * w[chunk]).sum(1)
        idle = a.diagonal(dim1=1, dim2=2) <= 0  # only zeros: any scale will do
        a.diagonal(dim1=1, dim2=2)[idle], b[idle] = 1.0, old[chunk][idle]
        found, _ = torch.linalg.solve_ex(a, b)
        new[chunk] = found
    kept = ((new / old >= SMALLEST_SHARE) & torch.isfinite(new)).all(1, keepdim=True)
    return torch.where(kept, new, old).reshape(scale.shape).float()

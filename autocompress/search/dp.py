"""Dynamic programming over cost buckets, for one budget and costs that add up over sites.

Two directions of one recursion: the least loss within a cost (OBC, Frantar & Alistarh 2022a; SPDY, 2022b) and the least cost
within an error (L-GreCo, Alimohammadi et al. 2023). The least common error level within a cost (ALDS, Liebenwein et al. 2021)
needs no recursion. Whatever is bucketed is rounded up, so a limit always holds. The price is the *bucket error*: a
solution is at least as good as the optimum for a limit that is lower by ``n_sites`` buckets, and it is the optimum itself
when every weight is a multiple of the bucket (integer costs with no more room than there are buckets, for one).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from autocompress.search.tables import FloatArray
from autocompress.types import IntArray

BUCKETS = 10_000
"""As in SPDY."""


def min_loss(
    losses: Sequence[FloatArray], costs: Sequence[IntArray], limit: int, buckets: int = BUCKETS
) -> tuple[int, ...] | None:
    """The levels with the least sum of losses whose costs sum to at most ``limit``; ``None`` when no levels do.

    ``losses``, ``costs``: one array ``(n_levels,)`` a site. A bucket is ``ceil(room / buckets)``, where the room is the limit
    (or the largest cost, if that is less) minus the least possible cost.
    """
    least, most = (sum(int(f(cost)) for cost in costs) for f in (np.min, np.max))
    if least > limit:
        return None
    bucket = max(1, -(-(min(int(limit), most) - least) // buckets))
    return _least(losses, [-(-(cost - cost.min()) // bucket) for cost in costs], (int(limit) - least) // bucket)


def min_cost(
    costs: Sequence[IntArray], errors: Sequence[FloatArray], budget: float, buckets: int = BUCKETS
) -> tuple[int, ...] | None:
    """The levels with the least sum of costs whose errors sum to at most ``budget``; ``None`` when no levels do.

    ``costs``, ``errors``: one array ``(n_levels,)`` a site. A bucket is ``room / buckets``, the room
    being the budget (or the largest error, if that is less) minus the least possible error.
    """
    lows, highs = ([float(f(error)) for error in errors] for f in (np.min, np.max))
    if sum(lows) > budget:
        return None
    bucket = (min(budget, sum(highs)) - sum(lows)) / buckets or 1.0
    capacity = math.floor(min((budget - sum(lows)) / bucket + 1e-9, 1e9))
    with np.errstate(over="ignore"):  # a tiny bucket: what does not fit may be any large number
        steps = [np.ceil((error - low) / bucket - 1e-9) for error, low in zip(errors, lows, strict=True)]
    weights = [np.minimum(step, capacity + 1).astype(np.int64) for step in steps]
    return _least([cost.astype(float) for cost in costs], weights, capacity)


def min_largest(losses: Sequence[FloatArray], costs: Sequence[IntArray], limit: int) -> float | None:
    """The smallest level ``t`` such that levels of loss at most ``t`` fit the limit; ``None`` when nothing fits. Exact."""
    marks = np.unique(np.concatenate(losses)) if losses else np.zeros(1)
    low, high = int(np.searchsorted(marks, max((loss.min() for loss in losses), default=0.0))), len(marks) - 1
    if _cheapest(losses, costs, marks[high]) > limit:
        return None
    while low < high:
        middle = (low + high) // 2
        if _cheapest(losses, costs, marks[middle]) <= limit:
            high = middle
        else:
            low = middle + 1
    return float(marks[high])


def _cheapest(losses: Sequence[FloatArray], costs: Sequence[IntArray], level: float) -> int:
    return sum(int(cost[loss <= level].min()) for loss, cost in zip(losses, costs, strict=True))


def _least(values: Sequence[FloatArray], weights: Sequence[IntArray], capacity: int) -> tuple[int, ...] | None:
    """Minimise a sum of values under a sum of weights: ``best[w]`` is the least value of weight at most ``w``."""
    capacity = min(capacity, sum(int(weight.max()) for weight in weights))
    best = np.zeros(capacity + 1)
    choices: list[IntArray] = []
    for value, weight in zip(values, weights, strict=True):
        after, choice = np.full(capacity + 1, np.inf), np.zeros(capacity + 1, np.int64)
        for level in np.argsort(weight, kind="stable").tolist():
            step = int(weight[level])
            if step > capacity:
                break
            found = best[: capacity + 1 - step] + value[level]
            better = np.flatnonzero(found < after[step:])
            after[step + better] = found[better]
            choice[step + better] = level
        best = after
        choices.append(choice)
    if not np.isfinite(best[capacity]):
        return None
    levels, left = [], capacity
    for choice, weight in zip(reversed(choices), reversed(weights), strict=True):
        levels.append(int(choice[left]))
        left -= int(weight[levels[-1]])
    return tuple(reversed(levels))

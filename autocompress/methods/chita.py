"""CHITA: which weights live is one combinatorial problem over the whole layer (Benbaki et al. 2023, "Fast as CHITA").

``min tr((W - W0) H (W - W0)^T)`` with at most ``k`` weights, over a curvature: here that of the layer's outputs, in the paper the
loss's. Three steps alternate until nothing is won any more:

* *iterative hard thresholding* with a line search: ``W <- P(W - t (W - W0) H)``, where ``P`` keeps the largest, in coordinates
  in which every input has curvature 1 (``u_j = w_j sqrt(H_jj)``: a step is as good for large inputs as for small ones);
* the *exact back-solve* on what lives then: ``W_S = W0 H_{:,S} H_SS^-1``, row by row;
* only supports that are better after it are taken, and the first is the better of ``|w|`` and ``|w| sqrt(H_jj)``: so the error is
  at most that of pruning by magnitude.

The paper's active set saves products with gradients; here one product with ``H`` has them all. Where the paper takes fresh
gradients along a schedule, the sequential refit has fresh inputs for each layer.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from autocompress.methods.hessian import back_solve

ROUNDS = 4
"""Of thresholding and back-solve."""
STEPS = 30
TRIED = (0.5, 1.0, 2.0)
"""Of the last step's length."""
SHORTEST = 2.0**-6
"""Of the first step's length: no support differs any more."""
WON = 1e-5
"""Less of the error is nothing."""

Project = Callable[[Tensor], Tensor]


def chita(weight: Tensor, h: Tensor, project: Project) -> tuple[Tensor, Tensor]:
    """New weights and which of them live.  # (rows, n), (n, n) -> (rows, n), (rows, n)

    ``project``: magnitudes -> the mask of those that may live.  # (rows, n) -> (rows, n) bool
    """
    unit = h.diagonal().sqrt()  # (n,)
    u, curvature = weight * unit, h / unit / unit[:, None]

    def solved(mask: Tensor) -> tuple[float, Tensor, Tensor]:
        new = back_solve(weight, mask, h)
        return _error(weight - new, h), new, mask

    best = min((solved(project(values.abs())) for values in (weight, u)), key=lambda found: found[0])
    for _ in range(ROUNDS):
        found = solved(threshold(u, best[1] * unit, curvature, project))
        if found[0] >= best[0] * (1 - WON):
            break
        best = found
    return best[1], best[2]


def threshold(target: Tensor, start: Tensor, h: Tensor, project: Project) -> Tensor:
    """The support at which hard-thresholded gradient steps towards ``target`` arrive from ``start``.  # (rows, n) bool"""
    x, mask, error = start, start != 0, _error(start - target, h)
    first = step = 0.0
    for _ in range(STEPS):
        gradient = (x - target) @ h
        if step == 0.0:  # the best length without a constraint
            steepness = float((gradient @ h * gradient).sum())
            if steepness <= 0.0:
                break
            first = step = float(gradient.square().sum()) / steepness
        trials = []
        for length in (step * factor for factor in TRIED):
            moved = x - length * gradient
            alive = project(moved.abs())
            moved = moved * alive
            trials.append((_error(moved - target, h), length, moved, alive))
        best = min(trials, key=lambda trial: trial[0])
        if best[0] < error * (1 - WON):
            error, step, x, mask = best
        elif step < first * SHORTEST:
            break
        else:
            step /= 4
    return mask


def _error(change: Tensor, h: Tensor) -> float:
    return float((change @ h * change).sum())

"""What plans lose, learned from what others lost: a Gaussian process over plans (Rasmussen & Williams 2006, chapter 2).

It learns from single slices of the search split, each loss divided by how hard its slice is, so that plans which were judged on
different examples tell of each other. All of it happens in roots of losses: to second order a divergence is a squared length.

The kernel is a squared exponential over levels coded as thermometers: two levels of one method are as far apart as there are
levels between them, levels of different methods as far as both are from dense. How much of each level all layers have together
counts, too: what a format costs in one layer tells of the others. Its length scale and its noise are the likeliest.

Where output errors of levels are known, half of a squared distance is in their roots: levels that do little are near each other.
And the mean is then a line in the root of a plan's summed errors, by generalized least squares; where a process of another rung
is known, in its roots as well (autoregressive cokriging; Kennedy & O'Hagan 2000).
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from scipy.linalg import cho_solve, solve_triangular

from autocompress.search.tables import FloatArray
from autocompress.types import LevelErrors, Plan, SearchSpace

SCALES = (0.5, 1.0, 1.5, 2.5, 4.0, 6.5)
"""Length scales that are tried; a site's most compressed level is 1 from dense."""
NOISES = (0.01, 0.05, 0.2)
"""Variance of a root on one slice that no plan explains, as a share of its variance over plans."""
RIDGE = 1e-3
"""On the mean, so that two alike columns are no trouble."""
MEMORY = 400
"""Plans kept: the ones of least loss, for they are near where the search is."""

Observations = Sequence[Mapping[Plan, float]]
"""The losses above dense's of the plans that were judged on each slice."""


class Process:
    """``orders``: levels of each site from the costliest to the most saving; ``errors``: output errors of levels.

    ``below``: the process of what plans lose at a cheaper rung.
    """

    def __init__(
        self,
        space: SearchSpace,
        orders: Sequence[Sequence[int]],
        errors: LevelErrors | None = None,
        below: Process | None = None,
    ) -> None:
        self.below = below
        scales = [_scales(space, site, order) for site, order in enumerate(orders)]
        self.codes = [_thermometer(n, found) for n, found in zip(space.n_levels, scales, strict=True)]
        self.common = _common(space, scales, self.codes)
        self.errors = {site: np.array(row, float) for site, row in (errors or {}).items()}
        typical = np.sqrt(np.mean([row.max() for row in self.errors.values()] or [1.0]) or 1.0)
        for site, row in self.errors.items():
            self.codes[site] = np.column_stack([self.codes[site], np.sqrt(row) / typical]) * np.sqrt(0.5)
        self.coded: FloatArray | None = None

    def fit(self, observed: Observations) -> None:
        """Learn from finite losses."""
        known = mean_roots(observed)
        if not known:
            return
        plans = sorted(known, key=lambda p: (known[p][0], p))[:MEMORY]
        roots, times = np.array([known[p] for p in plans], float).T
        self.coded, basis = self._coded(plans), self._basis(plans)
        distances, ridge = _distances(self.coded, self.coded), RIDGE * np.eye(basis.shape[1])
        best = -np.inf
        for scale, noise in itertools.product(SCALES, NOISES):
            lower = np.linalg.cholesky(np.exp(-distances / (2 * scale**2)) + np.diag(noise / times))
            whitened = cho_solve((lower, True), basis)
            line = np.linalg.solve(basis.T @ whitened + ridge, whitened.T @ roots)
            line[1:] = np.maximum(line[1:], 0)
            rest = roots - basis @ line
            weights = cho_solve((lower, True), rest)
            variance = max(float(rest @ weights) / len(rest), 1e-12)
            likelihood = -0.5 * len(rest) * np.log(variance) - np.log(lower.diagonal()).sum()
            if likelihood > best:
                best, self.scale, self.variance, self.lower = likelihood, scale, variance, lower
                self.weights, self.line = weights, line

    def predict(self, plans: Sequence[Plan]) -> tuple[FloatArray, FloatArray]:
        """The loss of plans, and the loss if what is not known of them were in their favour: a standard deviation below.

        # (n_plans,), (n_plans,); zeros while nothing is known.
        """
        if self.coded is None:
            return np.zeros(len(plans)), np.zeros(len(plans))
        across = np.exp(-_distances(self._coded(plans), self.coded) / (2 * self.scale**2))
        explained = solve_triangular(self.lower, across.T, lower=True)
        spread = np.sqrt(self.variance * np.maximum(1 - (explained**2).sum(axis=0), 0))
        root = self._basis(plans) @ self.line + across @ self.weights
        return _square(root), _square(root - spread)

    def _basis(self, plans: Sequence[Plan]) -> FloatArray:
        """What the mean is made of: one, and what is known of the roots of a plan's errors and of its loss at the rung below.

        # (n_plans, 1 to 3)
        """
        columns = [np.ones(len(plans))]
        if self.errors:
            chosen = np.asarray(plans, np.int64).reshape(len(plans), -1)
            columns.append(np.sqrt(np.sum([row[chosen[:, site]] for site, row in self.errors.items()], axis=0)))
        if self.below is not None:
            columns.append(np.sqrt(np.maximum(self.below.predict(plans)[0], 0)))
        return np.column_stack(columns)

    def _coded(self, plans: Sequence[Plan]) -> FloatArray:
        chosen = np.asarray(plans, np.int64).reshape(len(plans), -1)
        own = [code[chosen[:, site]] for site, code in enumerate(self.codes)]
        common: list[FloatArray] = [code[chosen[:, site]] for site, code in self.common.items()]
        return np.concatenate([*own, np.sum(common, axis=0)] if common else own, axis=1)


def mean_roots(observed: Observations) -> dict[Plan, tuple[float, int]]:
    """Root of the loss of each plan, and the number of slices it was judged on.

    A slice is as hard as its roots are against the mean over all slices, of the plans that were judged on all of them.
    """
    roots = [{plan: _root(loss) for plan, loss in one.items()} for one in observed]
    everywhere = sorted(set(roots[0]).intersection(*roots[1:]))
    total = np.array([sum(one[plan] for plan in everywhere) for one in roots])
    hard = total / total.mean() if total.min() > 0 else np.ones(len(roots))
    found: dict[Plan, list[float]] = {}
    for one, factor in zip(roots, hard.tolist(), strict=True):
        for plan, root in one.items():
            found.setdefault(plan, []).append(root / factor)
    return {plan: (sum(values) / len(values), len(values)) for plan, values in found.items()}


def _root(loss: float) -> float:
    return float(np.sign(loss) * np.sqrt(abs(loss)))


def _square(roots: FloatArray) -> FloatArray:
    squares: FloatArray = np.sign(roots) * roots**2
    return squares


def _scales(space: SearchSpace, site: int, order: Sequence[int]) -> list[list[int]]:
    """Levels by method, in the order of saving; dense has none."""
    scales: dict[tuple[str, ...], list[int]] = {}
    for level in order:
        steps = space.levels[site][level].steps
        if steps:
            scales.setdefault(tuple(type(step).__name__ for step in steps), []).append(level)
    return list(scales.values())


def _thermometer(n_levels: int, scales: Sequence[Sequence[int]]) -> FloatArray:
    """Digits of each level: those of one method count up in the order of saving.  # (n_levels, n_digits)"""
    code = np.zeros((n_levels, sum(map(len, scales))))
    start = 0
    for levels in scales:
        for i, level in enumerate(levels):
            code[level, start : start + i + 1] = len(levels) ** -0.5
        start += len(levels)
    return code


def _common(
    space: SearchSpace, scales: Sequence[Sequence[Sequence[int]]], codes: Sequence[FloatArray]
) -> dict[int, FloatArray]:
    """Digits to be added up over layers, one for each level that any of them offers: all layers at it are 1 from none.

    # site -> (n_levels, n_common)
    """
    layers = [s for s, site in enumerate(space.sites) if site.kind == "layer"]
    names = {s: [space.levels[s][level].hash for levels in scales[s] for level in levels] for s in layers}
    counts = Counter(name for found in names.values() for name in found)
    columns = {name: i for i, name in enumerate(counts)}
    common = {}
    for s in layers:
        select = np.zeros((len(names[s]), len(columns)))
        for digit, name in enumerate(names[s]):
            select[digit, columns[name]] = counts[name] ** -0.5
        common[s] = codes[s] @ select
    return common


def _distances(one: FloatArray, two: FloatArray) -> FloatArray:
    """Squared Euclidean distances.  # (n, d), (m, d) -> (n, m)"""
    squares: FloatArray = (one**2).sum(axis=1)[:, None] + (two**2).sum(axis=1) - 2 * one @ two.T
    return np.maximum(squares, 0)

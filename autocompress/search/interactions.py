"""What whole plans lose, learned from those that were judged: the table model as prior, and how sites act together.

To second order a divergence is a squared length, ``|sum of the sites' shifts of the outputs|^2``: a site alone adds the square
``a_s^2`` of its own shift, which the sweep measures, and two together ``2 r_st a_s a_t`` with the cosine ``r_st`` of their
shifts. So the table model is the mean of a Gaussian process over plans, and its kernel says what may be off: a site's losses by a
common factor, an option's by its own, each pair by its cosine, and all cosines by their mean. A kernel is a few matrix products
(Rasmussen & Williams 2006, chapter 2); amplitudes are chosen by the marginal likelihood.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.linalg import cho_solve, solve_triangular

from autocompress.search.tables import CostTables, FloatArray
from autocompress.types import IntArray, Plan

MEMORY = 400
"""Observations kept: the ones of least loss, for they are near where the search is."""
FACTORS = (0.15, 0.5)
"""Standard deviations that a site's common factor may have."""
COSINES = (0.03, 0.1, 0.3)
"""Standard deviations of the cosine of one pair."""
MEAN_COSINE = 0.3
OPTION = 0.3
"""Standard deviation of an option's own factor: as losses between measured levels are interpolated."""
NOISE = 0.02
"""What no kernel explains, as a share of a loss."""


class _Parts(NamedTuple):
    """Summands of a covariance.  # each (n_one, n_two)"""

    squares: FloatArray
    options: FloatArray
    pairs: FloatArray
    mean: FloatArray

    def kernel(self, factor: float, cosine: float) -> FloatArray:
        """The covariance at the amplitudes of a site's common factor and of a pair's cosine."""
        total: FloatArray = factor**2 * self.squares + self.options + 2 * cosine**2 * self.pairs + self.mean
        return total


class Interactions:
    """A Gaussian process over plans; ``losses``: the table model above dense  # (n_options,)."""

    def __init__(self, tables: CostTables, losses: FloatArray) -> None:
        self.tables = tables
        above = losses - losses[tables.offsets[:-1]][tables.site_of]
        least = 1e-3 * float(np.median(above[above > 0])) if (above > 0).any() else 1e-9
        self.table = np.where(tables.level_of > 0, np.maximum(above, least), 0.0)
        self._known: IntArray | None = None

    def fit(self, plans: Sequence[Plan], observed: FloatArray) -> None:
        """``observed``: finite losses of ``plans`` above the dense one's.  # (n_plans,)"""
        keep = np.argsort(observed, kind="stable")[:MEMORY]
        options = self._options([plans[i] for i in keep])
        y = observed[keep]
        rest = y - self.table[options].sum(axis=1)
        near = max(float(np.quantile(np.abs(y), 0.1)), 1e-12)
        noise = (NOISE * np.abs(y) + 0.1 * np.maximum(np.abs(y) - 4 * near, 0) + 1e-6 * near) ** 2
        best = None
        parts = self._parts(options, options)
        for factor, cosine in itertools.product(FACTORS, COSINES):
            covariance = parts.kernel(factor, cosine) + np.diag(noise)
            lower = np.linalg.cholesky(covariance + 1e-10 * np.trace(covariance) / len(y) * np.eye(len(y)))
            weights = cho_solve((lower, True), rest)
            likelihood = -0.5 * float(rest @ weights) - float(np.log(lower.diagonal()).sum())
            if best is None or likelihood > best[0]:
                best = likelihood, factor, cosine, lower, weights
        assert best is not None  # the grid is not empty
        _, self._factor, self._cosine, self._lower, self._weights = best
        self._known = options

    def predict(self, plans: Sequence[Plan]) -> tuple[FloatArray, FloatArray]:
        """Mean and standard deviation of the loss above dense.  # (n_plans,), (n_plans,)"""
        options = self._options(plans)
        mean = self.table[options].sum(axis=1)
        if self._known is None:
            return mean, OPTION * mean
        across = self._parts(options, self._known).kernel(self._factor, self._cosine)
        own = self._variance(options)
        explained = solve_triangular(self._lower, across.T, lower=True)
        variance = np.maximum(own - (explained**2).sum(axis=0), 0.0)
        return mean + across @ self._weights, np.sqrt(variance)

    def _options(self, plans: Sequence[Plan]) -> IntArray:
        return self.tables.offsets[:-1] + np.asarray(plans, np.int64).reshape(len(plans), -1)

    def _parts(self, one: IntArray, two: IntArray) -> _Parts:
        """The covariance of the losses of plans, given by their options, before its amplitudes are chosen."""
        z, w = self.table[one], self.table[two]
        a, b = np.sqrt(z), np.sqrt(w)
        squares = z @ w.T
        options = OPTION**2 * (self._one_hot(one) @ self._one_hot(two).T)
        pairs = np.maximum((a @ b.T) ** 2 - squares, 0)
        return _Parts(squares, options, pairs, MEAN_COSINE**2 * np.outer(_pairs(a), _pairs(b)))

    def _variance(self, options: IntArray) -> FloatArray:
        z = self.table[options]
        squares = (z**2).sum(axis=1)
        pairs = 2 * self._cosine**2 * (z.sum(axis=1) ** 2 - squares)
        variance: FloatArray = (
            (self._factor**2 + OPTION**2) * squares + pairs + MEAN_COSINE**2 * _pairs(np.sqrt(z)) ** 2
        )
        return variance

    def _one_hot(self, options: IntArray) -> FloatArray:
        """Losses of the table at the options taken, zero at all others.  # (n, n_options)"""
        out = np.zeros((len(options), self.tables.n_options))
        rows = np.arange(len(options))[:, None]
        out[rows, options] = self.table[options]
        return out


def _pairs(a: FloatArray) -> FloatArray:
    """Twice the sum over pairs of sites of ``a_s a_t``.  # (n, n_sites) -> (n,)"""
    total: FloatArray = a.sum(axis=1) ** 2 - (a**2).sum(axis=1)
    return total

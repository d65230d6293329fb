"""What each operator's kernel sees under a plan, as numbers that are sums over sites.

A width is a constant and what each group keeps, an operator is gone when one of its blocks is dropped, a tensor is quantized when
one of the layers on it is. So all of them come from one sparse matrix (options x features), for a batch of plans by one product
and for all switches of one site by differences. What an operator costs depends on its own features alone; they are hashed to
one number an operator, under which the cost is kept.

Knows nothing of models, kernels and devices.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_array

from autocompress.types import IntArray, Plan

Reading = Literal["sum", "none", "any"]
"""How a feature follows from its sum: the sum itself, 1 where it is zero, 1 where it is not."""


@dataclass(frozen=True, eq=False)
class Feature:
    """``constant`` plus, for each of ``sites``, the entry of its table at the plan's level."""

    constant: int
    sites: tuple[int, ...] = ()
    tables: tuple[IntArray, ...] = ()
    reading: Reading = "sum"


class Features:
    """Features of all operators; the first of each operator says whether it runs (``reading="none"`` of its drops).

    An operator that does not run has zeros only. ``alike``: for each operator the first that has the same rows at the same
    features. Rows of ``compute(operator, features)`` are kept by their hash (64 bits with fixed multipliers: of a million
    different rows, two share one with a probability of 3e-8).
    """

    def __init__(
        self,
        operators: Sequence[Sequence[Feature]],
        n_levels: Sequence[int],
        compute: Callable[[Sequence[tuple[int, tuple[int, ...]]]], IntArray],
        alike: Sequence[int] | None = None,
    ) -> None:
        self._compute = compute
        self.offsets = np.concatenate([[0], np.cumsum(n_levels)]).astype(np.int64)
        features = [feature for found in operators for feature in found]
        self.starts = np.cumsum([0, *(len(found) for found in operators)])[:-1].astype(np.int64)
        self.counts = np.array([len(found) for found in operators], np.int64)
        self._operator = np.repeat(np.arange(len(operators)), self.counts)  # (n_features,)
        self._constant = np.array([f.constant for f in features], np.int64)
        readings = np.array([f.reading for f in features])
        self._none, self._any = readings == "none", readings == "any"  # (n_features,)
        place = np.arange(len(features)) - np.repeat(self.starts, self.counts)
        self._factor = np.random.default_rng(0).integers(0, 2**63, int(self.counts.max()), np.uint64)[place] * 2 + 1
        kinds = np.arange(len(operators)) if alike is None else np.array(alike)
        self._salt = (kinds + 1).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        self._site_of = np.repeat(np.arange(len(n_levels)), n_levels)  # (n_options,)
        self._gain = self._sum_up(features)
        self._sparse_gain = csr_array(self._gain)
        self._codes = np.zeros(0, np.uint64)
        self._rows: IntArray | None = None
        self._touch()

    def _sum_up(self, features: Sequence[Feature]) -> IntArray:
        """What each option adds to each sum.  # (n_options, n_features)"""
        gain = np.zeros((int(self.offsets[-1]), len(features)), np.int64)
        for column, feature in enumerate(features):
            for site, table in zip(feature.sites, feature.tables, strict=True):
                gain[self.offsets[site] : self.offsets[site + 1], column] += table
        return gain

    def _touch(self) -> None:
        """Pairs of an option and an operator it has a say in, by option; the features of all pairs, one after the other."""
        touched = np.zeros((len(self.offsets) - 1, len(self.starts)), bool)  # (n_sites, n_operators)
        options, features = self._gain.nonzero()
        touched[self._site_of[options], self._operator[features]] = True
        self._pair_option, self._pair_operator = touched[self._site_of].nonzero()
        sizes = self.counts[self._pair_operator]
        self._pair_start = np.cumsum(sizes) - sizes
        pair = np.repeat(np.arange(len(sizes)), sizes)
        self._pair = pair  # of each of the features below
        self._feature = self.starts[self._pair_operator][pair] + np.arange(len(pair)) - self._pair_start[pair]
        self._site = self._site_of[self._pair_option][pair]
        self._added = self._gain[self._pair_option[pair], self._feature]
        self._read_none, self._read_any = self._none[self._feature], self._any[self._feature]

    # ------------------------------------------------------------ batches of plans

    def values(self, plans: IntArray) -> IntArray:
        """Features of plans ``(n, n_sites)``.  # (n, n_features)"""
        n, sites = plans.shape
        options = (plans + self.offsets[:-1]).reshape(-1)
        chosen = csr_array(
            (np.ones(len(options), np.int64), options, np.arange(0, len(options) + 1, max(sites, 1))[: n + 1]),
            shape=(n, int(self.offsets[-1])),
        )
        total: IntArray = (chosen @ self._sparse_gain).toarray() + self._constant
        total = self._read(total, self._none, self._any)
        total *= total[:, self.starts][:, self._operator]
        return total

    @staticmethod
    def _read(sums: IntArray, none: npt.NDArray[np.bool_], some: npt.NDArray[np.bool_]) -> IntArray:
        """Features from sums."""
        found: IntArray = np.where(none, sums == 0, np.where(some, sums > 0, sums)).astype(np.int64)
        return found

    def rows(self, values: IntArray) -> IntArray:
        """The kept rows of every operator at given features ``(n, n_features)``.  # (n, n_operators, n_keys)"""
        codes = np.add.reduceat(values.astype(np.uint64) * self._factor, self.starts, axis=1) + self._salt
        operators = np.broadcast_to(np.arange(len(self.starts)), codes.shape)

        def of(i: int) -> tuple[int, ...]:
            plan, operator = divmod(i, len(self.starts))
            return self.of_operator(values[plan], operator)

        return self._look_up(codes.reshape(-1), operators.reshape(-1), of).reshape(*codes.shape, -1)

    def of_operator(self, values: IntArray, operator: int) -> tuple[int, ...]:
        """One operator's part of a row of features."""
        return tuple(values[self._mine(operator)].tolist())

    def _mine(self, operator: int) -> slice:
        """Columns of one operator's features."""
        return slice(self.starts[operator], self.starts[operator] + self.counts[operator])

    def classes(self, operator: int, site: int) -> tuple[IntArray, IntArray]:
        """Levels of a site that an operator cannot tell apart: the first of each class, the class of each level."""
        mine = self._mine(operator)
        own = self._gain[self.offsets[site] : self.offsets[site + 1], mine]
        _, first, of = np.unique(own, axis=0, return_index=True, return_inverse=True)
        return first.astype(np.int64), of.reshape(-1).astype(np.int64)

    def one_operator(self, operator: int, sites: Sequence[int], levels: IntArray) -> IntArray:
        """Rows of one operator at levels of the sites that have a say in it  # (n, len(sites)) -> (n, n_keys)"""
        mine = self._mine(operator)
        values = np.tile(self._constant[mine], (len(levels), 1))
        for column, site in enumerate(sites):
            values += self._gain[self.offsets[site] + levels[:, column], mine]
        values = self._read(values, self._none[mine], self._any[mine])
        values *= values[:, :1]
        codes = (values.astype(np.uint64) * self._factor[mine]).sum(axis=1) + self._salt[operator]
        return self._look_up(codes, np.full(len(levels), operator), lambda i: tuple(values[i].tolist()))

    # ------------------------------------------------------------ switches of one plan

    def deltas(self, plan: Plan) -> IntArray:
        """Change of the sum of rows when one site switches to one level.  # (n_options, n_keys)"""
        current = self.offsets[:-1] + np.asarray(plan, np.int64)  # (n_sites,)
        sums = self._constant + self._gain[current].sum(axis=0)
        values = sums[self._feature] + self._added - self._gain[current[self._site], self._feature]
        values = self._read(values, self._read_none, self._read_any)
        values *= values[self._pair_start][self._pair]
        codes = values.astype(np.uint64) * self._factor[self._feature]
        codes = np.add.reduceat(codes, self._pair_start) + self._salt[self._pair_operator]

        def of(i: int) -> tuple[int, ...]:
            start = self._pair_start[i]
            return tuple(values[start : start + self.counts[self._pair_operator[i]]].tolist())

        rows = self._look_up(codes, self._pair_operator, of)  # (n_pairs, n_keys)
        first = np.flatnonzero(np.diff(self._pair_option, prepend=-1))
        total = np.zeros((len(self._site_of), rows.shape[-1]), np.int64)
        total[self._pair_option[first]] = np.add.reduceat(rows, first, axis=0)
        delta: IntArray = total - total[current[self._site_of]]
        return delta

    # ------------------------------------------------------------ what is kept

    def _look_up(
        self, codes: npt.NDArray[np.uint64], operators: IntArray, features: Callable[[int], tuple[int, ...]]
    ) -> IntArray:
        """Rows by code; missing ones are computed together.  # (n_codes, n_keys)"""
        at = np.minimum(np.searchsorted(self._codes, codes), max(len(self._codes) - 1, 0))
        missing = np.flatnonzero(self._codes[at] != codes) if len(self._codes) else np.arange(len(codes))
        if len(missing):
            fresh, first = np.unique(codes[missing], return_index=True)
            asked = [(int(operators[i]), features(int(i))) for i in missing[first]]
            rows = self._compute(asked)
            codes_now = np.concatenate([self._codes, fresh])
            rows_now = rows if self._rows is None else np.concatenate([self._rows, rows])
            order = np.argsort(codes_now, kind="stable")
            self._codes, self._rows = codes_now[order], rows_now[order]
            at = np.searchsorted(self._codes, codes)
        assert self._rows is not None  # something was asked
        return self._rows[at]

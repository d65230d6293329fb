"""Costs of thousands of plans at once: each operator's rows stand in a table, which is indexed for all plans together.

An operator's features (``features.py``) take few values each: a width those that its groups leave, a flag two. Numbered, and read
as the digits of one number, they give a place in the operator's table. A place is filled when a plan first comes to it, from
the same rows as :meth:`Features.rows`, so the two agree to the last bit.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from autocompress.features import Feature, Features
from autocompress.types import IntArray

LARGEST = 1 << 18
"""Places of an operator's table; where there would be more, its rows are looked up one by one."""
EMPTY = -1
Places = npt.NDArray[np.intp]


class _Digit:
    """A feature's value as a number from 0 to ``count - 1``."""

    def __init__(self, feature: Feature) -> None:
        self.sites, self.tables, self.constant = feature.sites, feature.tables, feature.constant
        sums = {feature.constant}
        for table in feature.tables:
            sums = {a + b for a in sums for b in set(table.tolist())}
        self._low = min(sums)
        possible = np.array(sorted(sums), np.int64)
        read = {"sum": possible, "none": possible == 0, "any": possible > 0}[feature.reading]
        values, number = np.unique(read, return_inverse=True)
        self.count = len(values)
        self._number = np.zeros(int(possible[-1]) - self._low + 1, np.intp)
        self._number[possible - self._low] = number.reshape(-1)
        self._of_level = (
            self._number[feature.tables[0] + feature.constant - self._low] if len(self.sites) == 1 else None
        )

    def of(self, levels: IntArray) -> Places:
        """``(n_sites, n) -> (n,)``"""
        if self._of_level is not None:
            alone: Places = self._of_level[levels[self.sites[0]]]
            return alone
        total = np.full(levels.shape[1], self.constant - self._low, np.int64)
        for site, table in zip(self.sites, self.tables, strict=True):
            total += table[levels[site]]
        found: Places = self._number[total]
        return found


class _Operator:
    """One operator: which digits, at which place values, and the rows that are filled."""

    def __init__(
        self, sites: Sequence[int], runs: int, digits: Sequence[int], counts: Sequence[int], width: int
    ) -> None:
        self.sites = list(sites)
        self.runs = runs if counts[runs] > 1 else None  # it may always run
        self.digits = [digit for digit in digits if counts[digit] > 1]
        self.weights = np.cumprod([1, *(counts[digit] for digit in self.digits)], dtype=np.float64)
        self.size = self.weights[-1] + 1  # the first place is that of an operator that does not run
        self.row_at = np.full(int(self.size) if self.size <= LARGEST else 0, EMPTY, np.int32)
        self.rows = np.zeros((0, width), np.int64)

    def places(self, numbers: Sequence[Places]) -> Places:
        """Places of plans, from the digits' numbers.  # (n,)"""
        place = np.ones(len(numbers[0]), np.intp)
        for digit, weight in zip(self.digits, self.weights.astype(np.intp), strict=False):
            place += numbers[digit] * weight
        if self.runs is not None:
            place *= numbers[self.runs]
        return place


class PlanTables:
    """Sums of all operators' rows, and the most bytes that are alive at once, for many plans.

    ``features``: where rows come from, each with the bytes of the operator's result in its last column; ``operators``: what each
    one sees, the first of it whether it runs; ``until``: the last operator that reads each
    result; ``n_sums``: columns that add up.
    """

    def __init__(
        self, features: Features, operators: Sequence[Sequence[Feature]], until: Sequence[int], n_sums: int
    ) -> None:
        self._features, self._n_keys = features, n_sums + 1
        self._ends = [[i for i, last in enumerate(until) if last == step] for step in range(len(until))]
        self._digits: list[_Digit] = []
        known: dict[object, int] = {}
        self._operators = []
        for found in operators:
            mine = [self._digit(feature, known) for feature in found]
            sites = sorted({site for feature in found for site in feature.sites})
            counts = [digit.count for digit in self._digits]
            self._operators.append(_Operator(sites, mine[0], mine[1:], counts, self._n_keys))

    def _digit(self, feature: Feature, known: dict[object, int]) -> int:
        """Operators that read the same tensor share its digit."""
        key = (feature.constant, feature.sites, feature.reading, *(table.tobytes() for table in feature.tables))
        if key not in known:
            known[key] = len(self._digits)
            self._digits.append(_Digit(feature))
        return known[key]

    def cost(self, plans: IntArray) -> IntArray:
        """Sums over operators, and the peak of live bytes in the last column.  # (n, n_sites) -> (n, n_keys)"""
        levels = np.ascontiguousarray(plans.T)
        numbers = [digit.of(levels) for digit in self._digits]
        total = np.zeros((len(plans), self._n_keys), np.int64)
        alive, peak = np.zeros(len(plans), np.int64), np.zeros(len(plans), np.int64)
        held: list[IntArray] = []
        for step, operator in enumerate(self._operators):
            rows = self._rows(step, operator, numbers, levels)
            total += rows
            held.append(rows[:, -1].copy())  # a view would keep all columns
            alive += held[step]
            np.maximum(peak, alive, out=peak)
            for gone in self._ends[step]:
                alive -= held[gone]
        total[:, -1] = peak
        return total

    def _rows(self, index: int, operator: _Operator, numbers: Sequence[Places], levels: IntArray) -> IntArray:
        """One operator's rows.  # (n, n_keys)"""
        if not len(operator.row_at):
            return self._features.one_operator(index, operator.sites, levels[operator.sites].T)
        places = operator.places(numbers)
        rows = operator.row_at.take(places)
        if rows.min(initial=0) == EMPTY:
            empty = np.flatnonzero(rows == EMPTY)
            fresh, first = np.unique(places[empty], return_index=True)
            asked = levels[:, empty[first]][operator.sites].T
            operator.row_at[fresh] = len(operator.rows) + np.arange(len(fresh), dtype=np.int32)
            operator.rows = np.concatenate([operator.rows, self._features.one_operator(index, operator.sites, asked)])
            rows = operator.row_at.take(places)
        return operator.rows.take(rows, axis=0)

"""The corrected table model predicts plans that it has not seen better than the table does."""

from __future__ import annotations

import random

import numpy as np
from toys import separable, space_of

from autocompress.search.surrogate import refine
from autocompress.search.tables import CostTables


def test_correction_explains_what_was_seen_and_predicts_what_was_not() -> None:
    space = space_of(*[4] * 10)
    tables, rng = CostTables(space, separable(space.n_levels), [0]), random.Random(0)
    truth = np.array([0.0 if v == 0 else v * rng.uniform(0.5, 1.5) for v in tables.level_of])
    table = truth * np.array([rng.uniform(0.6, 1.4) for _ in truth])
    plans = [space.sample(rng) for _ in range(120)]
    loss = np.array([truth[tables.current(p)].sum() for p in plans])
    base = plans[0]
    refined = refine(tables, table + 0.3, base, plans[1:80], loss[1:80] - loss[0])

    def error(losses: np.ndarray) -> float:
        predicted = np.array([losses[tables.current(p)].sum() - losses[tables.current(base)].sum() for p in plans[80:]])
        return float(np.abs(predicted - (loss[80:] - loss[0])).mean())

    assert error(refined) < 0.5 * error(table)


def test_nothing_seen_changes_nothing() -> None:
    space = space_of(3, 3)
    tables = CostTables(space, separable(space.n_levels), [0])
    losses = np.arange(6.0)
    assert refine(tables, losses, space.dense, [], np.zeros(0)) is losses

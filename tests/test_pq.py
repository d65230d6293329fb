"""The PQ index: its range, what it does not depend on, and the bound that it is for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from autocompress.errors import UsageError
from autocompress.methods.pq import pq_index

numbers = st.lists(st.floats(-100, 100).map(lambda v: round(v, 3)), min_size=1, max_size=40)
exponents = st.tuples(st.floats(0.1, 2.0), st.floats(0.1, 2.0)).map(lambda pair: (pair[0], pair[0] + pair[1]))


@given(values=numbers, pq=exponents)
def test_in_range_and_by_the_formula(values: list[float], pq: tuple[float, float]) -> None:
    w, (p, q) = torch.tensor(values, dtype=torch.float64), pq
    index = pq_index(w, p, q)
    assert 0 <= index < 1
    if w.any():
        norms = [float(w.abs().pow(r).sum()) ** (1 / r) for r in (p, q)]
        assert index == pytest.approx(1 - len(w) ** (1 / q - 1 / p) * norms[0] / norms[1], abs=1e-9)


@given(values=numbers, scale=st.sampled_from([1e-30, -1e-3, 3.0, 1e30]))
def test_scale_sign_order_and_shape_do_not_matter(values: list[float], scale: float) -> None:
    w = torch.tensor(values, dtype=torch.float64)
    for same in (w * scale, -w, w.flip(0), w.reshape(-1, 1, 1), torch.cat([w, w])):  # a copy changes no share either
        assert pq_index(same) == pytest.approx(pq_index(w), abs=1e-9)


@given(n=st.integers(1, 50), value=st.floats(1e-6, 1e6), pq=exponents)
def test_equal_magnitudes_are_zero_and_few_that_hold_all_near_one(
    n: int, value: float, pq: tuple[float, float]
) -> None:
    signs = torch.where(torch.arange(n) % 2 == 0, 1.0, -1.0)
    assert pq_index(value * signs, *pq) == pytest.approx(0, abs=1e-12)
    one = torch.zeros(n)
    one[0] = value
    p, q = pq
    assert pq_index(one, p, q) == pytest.approx(1 - n ** (1 / q - 1 / p), abs=1e-9)


@given(values=numbers, kept=st.integers(1, 40), pq=exponents)
def test_saps_bound(values: list[float], kept: int, pq: tuple[float, float]) -> None:
    """So many stay at least, when those that go hold ``eta`` times what those that stay do."""
    (p, q), magnitudes = pq, torch.tensor(values, dtype=torch.float64).abs().sort(descending=True).values
    if not magnitudes.any():
        return
    kept, parts = min(kept, len(magnitudes)), magnitudes.pow(p)
    eta = float(parts[kept:].sum() / parts[:kept].sum())
    least = (1 + eta) ** (-q / (q - p)) * (1 - pq_index(magnitudes, p, q)) ** (p * q / (q - p))
    assert kept >= len(magnitudes) * least * (1 - 1e-6)


def test_it_rises_when_small_weights_go_and_heavier_tails_have_more() -> None:
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(4000, generator=generator)
    cut: Tensor = normal * (normal.abs() > normal.abs().quantile(0.5))
    assert 0 < pq_index(torch.rand(4000, generator=generator)) < pq_index(normal) < pq_index(cut)
    assert pq_index(normal) < pq_index(normal**3)


def test_nothing_is_zero_and_exponents_have_an_order() -> None:
    assert pq_index(torch.zeros(5)) == pq_index(torch.zeros(0)) == 0
    with pytest.raises(UsageError, match="0 < p < q, got p = 1"):
        pq_index(torch.ones(3), 1.0, 0.5)

"""Refit from Gram matrices equals least squares on the raw rows, and survives what real layers bring."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from autocompress.gram import Moments, columns_of, output_rows, positions, refit, solve, unfold, unfolded_size


def rows_of(seed: int, n: int = 400, channels: int = 6, area: int = 4) -> Tensor:
    """Correlated rows with a last column of ones.  # (n, channels * area + 1)"""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, 5, generator=generator)
    x = hidden @ torch.randn(5, channels * area, generator=generator)
    x = x + 0.5 * torch.randn(n, channels * area, generator=generator) + 0.7
    return torch.cat([x, torch.ones(n, 1)], 1)


def gram_of(rows: Tensor) -> Tensor:
    moments = Moments()
    for part in rows.split(150):  # in pieces, as it is collected
        moments.add(part)
    return moments.gram


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10**6))
def test_refit_equals_least_squares_on_raw_rows(seed: int) -> None:
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    x = rows_of(seed)
    weight, bias = torch.randn(3, 24), torch.randn(3)
    kept = columns_of(np.sort(rng.permutation(6)[: rng.integers(1, 6)]), 4)
    new_weight, new_bias = refit(weight, bias, gram_of(x), kept)
    y = (x[:, :-1] @ weight.T + bias).double()
    a = torch.cat([x[:, kept], x[:, -1:]], 1).double()
    best = torch.linalg.lstsq(a, y).solution
    mine = torch.cat([new_weight, new_bias[:, None]], 1).double().T
    error, least = ((a @ mine - y).pow(2).sum(), (a @ best - y).pow(2).sum())
    assert float(least) <= float(error) * (1 + 1e-9)
    assert float(error) <= float(least) * 1.001 + 1e-9
    torch.testing.assert_close(mine, best, rtol=0.02, atol=0.02)


def test_everything_kept_is_the_layer() -> None:
    weight, bias = torch.randn(3, 24), torch.randn(3)
    new_weight, new_bias = refit(weight, bias, gram_of(rows_of(1)), torch.arange(24))
    torch.testing.assert_close(new_weight, weight, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(new_bias, bias, rtol=1e-2, atol=5e-2)


def test_refit_beats_cutting_and_mends_the_bias() -> None:
    x, weight, bias = rows_of(2), torch.randn(3, 24), torch.zeros(3)
    kept = torch.arange(8)
    new_weight, new_bias = refit(weight, bias, gram_of(x), kept)
    y = x[:, :-1] @ weight.T
    refitted = x[:, kept] @ new_weight.T + new_bias
    assert float((refitted - y).pow(2).mean()) < 0.5 * float((x[:, kept] @ weight[:, kept].T - y).pow(2).mean())
    torch.testing.assert_close(refitted.mean(0), y.mean(0), rtol=1e-2, atol=1e-2)  # no shift is left


@pytest.mark.parametrize("n", [3, 10])
def test_a_singular_gram_gives_finite_weights_that_reproduce_the_rows(n: int) -> None:
    x = rows_of(3, n)
    weight, bias = torch.randn(3, 24), torch.randn(3)
    new_weight, new_bias = refit(weight, bias, gram_of(x).float(), torch.arange(12))
    assert torch.isfinite(new_weight).all() and torch.isfinite(new_bias).all()
    y = x[:, :-1] @ weight.T + bias
    torch.testing.assert_close(x[:, :12] @ new_weight.T + new_bias, y, rtol=0.05, atol=0.2)


def test_dead_channels_and_zero_weights() -> None:
    x = rows_of(4)
    x[:, 4:12] = 0
    weight = torch.randn(3, 24)
    new_weight, _new_bias = refit(weight, torch.ones(3), gram_of(x), torch.arange(16))
    assert torch.isfinite(new_weight).all()
    assert float(new_weight[:, 4:12].abs().max()) < 1e-6
    zero_weight, zero_bias = refit(torch.zeros(3, 24), torch.ones(3), gram_of(x), torch.arange(8))
    torch.testing.assert_close(zero_weight, torch.zeros(3, 8), atol=1e-6, rtol=0)
    torch.testing.assert_close(zero_bias, torch.ones(3), atol=1e-5, rtol=0)
    nothing, bias = refit(
        weight, torch.ones(3), gram_of(torch.cat([torch.zeros(9, 24), torch.ones(9, 1)], 1)), torch.arange(4)
    )
    assert torch.isfinite(nothing).all() and torch.isfinite(bias).all()


def test_one_kept_channel() -> None:
    x = rows_of(5, area=1, channels=24)
    weight, bias = torch.randn(2, 24), torch.randn(2)
    new_weight, new_bias = refit(weight, bias, gram_of(x), torch.tensor([7]))
    y, a = (x[:, :-1] @ weight.T + bias).double(), x[:, 7].double()
    slope = ((a - a.mean())[:, None] * (y - y.mean(0))).mean(0) / a.var(correction=0)
    torch.testing.assert_close(new_weight[:, 0].double(), slope, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(new_bias.double(), y.mean(0) - slope * a.mean(), rtol=1e-2, atol=1e-2)


def test_solve_falls_back_where_cholesky_cannot_go() -> None:
    gram = torch.ones(4, 4, dtype=torch.float64)
    gram[0, 0] = -1e-3  # rounding can leave a matrix a little indefinite
    assert torch.isfinite(solve(gram, torch.ones(2, 4, dtype=torch.float64))).all()


@pytest.mark.parametrize(
    "layer",
    [nn.Conv2d(4, 5, 3, stride=2, padding=1), nn.Conv2d(4, 5, (3, 1), dilation=2, bias=False), nn.Linear(8, 5)],
    ids=["conv", "dilated", "linear"],
)
def test_unfolded_rows_times_weights_are_the_outputs(layer: nn.Module) -> None:
    x = torch.randn(3, 4, 7, 8)
    y = layer(x)
    rows = unfold(layer, x)
    weight = layer.weight.flatten(1)  # type: ignore[union-attr,operator]
    assert rows.shape[1] == unfolded_size(layer) + 1
    got = rows[:, :-1] @ weight.T + (0 if layer.bias is None else layer.bias)
    torch.testing.assert_close(got, output_rows(layer, y), rtol=1e-4, atol=1e-5)
    where = positions(layer, y, 5, torch.Generator().manual_seed(0))
    assert where is not None and len(where) == 5
    assert len(unfold(layer, x, where)) == len(output_rows(layer, y, where)) == 15
    picked = unfold(layer, x, where)[:, :-1] @ weight.T + (0 if layer.bias is None else layer.bias)
    torch.testing.assert_close(picked, output_rows(layer, y, where), rtol=1e-4, atol=1e-5)


def test_layers_without_a_least_squares_form_say_so() -> None:
    for layer in (
        nn.Conv2d(4, 4, 3, groups=4),
        nn.Conv2d(4, 4, 3, padding="same"),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
        nn.BatchNorm2d(4),
    ):
        assert unfolded_size(layer) == 0


@settings(deadline=None, max_examples=25)
@given(
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 4)),
    stride=st.tuples(st.integers(1, 2), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 1)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    seed=st.integers(0, 10**6),
)
def test_windows_at_some_positions_are_those_of_the_whole_unfolding(kernel, stride, padding, dilation, seed) -> None:
    layer = nn.Conv2d(3, 5, kernel, stride, padding, dilation)
    x = torch.randn(2, 3, 9, 11, generator=torch.Generator().manual_seed(seed))
    n = layer(x)[0, 0].numel()
    where = torch.randperm(n, generator=torch.Generator().manual_seed(seed))[: max(1, n // 3)]
    everything = unfold(layer, x).reshape(2, n, -1)
    assert torch.equal(unfold(layer, x, where), everything[:, where].reshape(2 * len(where), -1))

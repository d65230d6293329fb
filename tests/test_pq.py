"""The PQ index: its range, what it does not depend on, and the bound that it is for."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from autocompress.errors import UsageError
from autocompress.graph import trace
from autocompress.methods import Sparse
from autocompress.methods.pq import pq_index, sap_sparsities
from autocompress.space import SAP_ROUNDS, make_space
from tests import networks

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


@given(values=numbers, rounds=st.integers(1, 8))
def test_saps_rounds_one_by_one(values: list[float], rounds: int) -> None:
    w = torch.tensor(values, dtype=torch.float64)
    kept = w.abs().sort(descending=True).values
    for _ in range(rounds if w.any() else 0):
        left = len(kept) * (1 - pq_index(kept))
        kept = kept[: max(1, math.ceil(left - 1e-6))]
    assert sap_sparsities(w, (rounds,)) == (pytest.approx(1 - len(kept) / len(w)),)


def test_unequal_layers_are_offered_more_and_rounds_only_add() -> None:
    normal = torch.randn(20_000, generator=torch.Generator().manual_seed(0))
    few, many = sap_sparsities(normal, SAP_ROUNDS), sap_sparsities(normal**3, SAP_ROUNDS)
    assert list(few) == sorted(few) and all(a < b for a, b in zip(few, many, strict=True))
    assert few == pytest.approx((0.44, 0.57, 0.70, 0.81, 0.90), abs=0.01)
    assert sap_sparsities(torch.ones(30), (1, 9)) == sap_sparsities(torch.zeros(30), (1, 9)) == (0.0, 0.0)


def test_each_layer_is_offered_what_its_index_says() -> None:
    """Levels differ between layers, one that ``sparse`` offers, too, is there once, and equal weights have none."""
    task = networks.task("resnet-b", n=8)
    graph = trace(task.model, task.example_inputs)
    with torch.no_grad():
        graph.module.get_submodule("layer1.0.conv1").weight.fill_(0.1)  # type: ignore[operator]
        graph.module.get_submodule("layer1.0.conv2").weight.pow_(5)  # type: ignore[operator]
    space = make_space(graph, ("sparse-pq",))
    found = {site.name: levels for site, levels in zip(space.sites, space.levels, strict=True)}
    assert "layer:layer1.0.conv1" not in found
    steps = {name: [level.steps[0] for level in levels[1:]] for name, levels in found.items()}
    assert all(isinstance(step, Sparse) and step.by == "sparsegpt" for each in steps.values() for step in each)
    assert steps["layer:layer1.0.conv2"][0].sparsity > steps["layer:layer2.0.conv1"][0].sparsity  # type: ignore[attr-defined]
    both = make_space(graph, ("sparse", "sparse-pq"))
    assert all(len(set(levels)) == len(levels) for levels in both.levels)

"""CHITA: supports that are least-squares optima, never behind magnitude, and near the best of all where that is known."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from autocompress.methods import Sparse, sparsity
from autocompress.methods.chita import chita, threshold
from autocompress.methods.hessian import Hessian, back_solve
from autocompress.methods.sparsity import prune
from tests.test_methods import MethodContract, layers
from tests.test_sparsity import case


def problem(rows: int, n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Weights, and the curvature of correlated inputs of unequal size.  # (rows, n), (n, n)"""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3 * n, n, generator=generator, dtype=torch.float64)
    x = (x @ torch.randn(n, n, generator=generator, dtype=torch.float64)) * torch.linspace(0.1, 3, n)
    h = x.T @ x / len(x) + 1e-3 * torch.eye(n)
    return torch.randn(rows, n, generator=generator, dtype=torch.float64), h


def error(change: Tensor, h: Tensor) -> float:
    return float((change @ h * change).sum())


def best_of(scores: Tensor, count: int) -> Tensor:
    mask = torch.zeros(scores.numel(), dtype=torch.bool)
    mask[torch.argsort(scores.flatten(), descending=True, stable=True)[:count]] = True
    return mask.reshape(scores.shape)


class TestChita(MethodContract):
    configs = (Sparse(0.5, by="chita"), Sparse(0.9, by="chita"), Sparse(0.5, 2, 4, "chita"))

    @pytest.mark.parametrize("config", [Sparse(s, by="chita") for s in (0.5, 0.7, 0.9)] + [Sparse(0.5, 2, 4, "chita")])
    def test_far_below_sparsegpt_and_near_exact_removal(self, layer: nn.Module, config: Sparse) -> None:
        weight, hessian, area = case(layer)
        errors = {}
        for by in ("magnitude", "sparsegpt", "obc", "chita"):
            new, _ = prune(weight, Sparse(config.sparsity, config.keep, config.of, by), hessian, area)  # type: ignore[arg-type]
            errors[by] = error(weight - new, hessian.matrix)
        assert errors["chita"] < 0.75 * errors["sparsegpt"] and errors["chita"] < 0.5 * errors["magnitude"]
        assert errors["chita"] < 3 * errors["obc"]

    def test_what_lives_is_the_least_squares_optimum(self, layer: nn.Module) -> None:
        """No gradient is left on the support; and the normal equations against a regression on rows of a root of ``H``."""
        weight, hessian, area = case(layer)
        h = hessian.matrix
        for config in self.configs:
            assert isinstance(config, Sparse)
            new, mask = prune(weight, config, hessian, area)
            left = ((new - weight) @ h)[mask]
            assert float(left.abs().max()) < 1e-9 * float((weight @ h).abs().max())
            root = torch.linalg.cholesky(h).T
            for row in range(0, len(weight), 5):
                want = torch.linalg.lstsq(root[:, mask[row]], (root @ weight[row])[:, None]).solution[:, 0]
                torch.testing.assert_close(new[row, mask[row]], want, rtol=1e-6, atol=1e-9)


@settings(deadline=None, max_examples=30)
@given(rows=st.integers(1, 5), n=st.integers(1, 12), share=st.floats(0, 1), seed=st.integers(0, 10**6))
def test_never_behind_magnitude_also_after_its_own_back_solve(rows: int, n: int, share: float, seed: int) -> None:
    weight, h = problem(rows, n, seed)
    count = round(share * rows * n)
    new, mask = chita(weight, h, lambda scores: best_of(scores, count))
    assert int(mask.sum()) == count and not bool(new[~mask].any())
    torch.testing.assert_close(new, back_solve(weight, mask, h))
    largest = best_of(weight.abs(), count)
    solved = error(weight - back_solve(weight, largest, h), h)
    assert solved <= error(weight - weight * largest, h) * (1 + 1e-9) + 1e-12
    assert error(weight - new, h) <= solved * (1 + 1e-9) + 1e-12


def test_mostly_within_a_fifth_of_the_best_of_all_supports() -> None:
    """Eight weights in two rows, four live: all 70 supports of each problem."""
    near, ratios = 0, []
    for seed in range(20):
        weight, h = problem(2, 4, seed)
        errors = []
        for live in itertools.combinations(range(8), 4):
            mask = torch.zeros(8, dtype=torch.bool)
            mask[list(live)] = True
            errors.append(error(weight - back_solve(weight, mask.reshape(2, 4), h), h))
        new, _ = chita(weight, h, lambda scores: best_of(scores, 4))
        ratios.append(error(weight - new, h) / min(errors))
        near += ratios[-1] < 1.2
        assert ratios[-1] > 1 - 1e-9
    assert near >= 14, ratios


def test_thresholding_lowers_the_error_of_its_start() -> None:
    weight, h = problem(6, 20, 1)
    unit = h.diagonal().sqrt()
    start = weight * unit * best_of(weight.abs(), 24)
    mask = threshold(weight * unit, start, h / unit / unit[:, None], lambda scores: best_of(scores, 24))
    before, after = (error(weight - back_solve(weight, m, h), h) for m in (start != 0, mask))
    assert int(mask.sum()) == 24 and after < 0.7 * before


def test_the_units_of_inputs_do_not_matter_to_the_search() -> None:
    """Inputs twice as large with weights half as large: thresholding arrives at the same support."""
    weight, h = problem(4, 10, 2)
    units = 2.0 ** torch.arange(-5, 5).double()
    masks = []
    for w, curvature in ((weight, h), (weight / units, h * units * units[:, None])):
        unit = curvature.diagonal().sqrt()
        start = w * unit * best_of((w * unit).abs(), 15)
        masks.append(threshold(w * unit, start, curvature / unit / unit[:, None], lambda scores: best_of(scores, 15)))
    assert torch.equal(*masks)


def test_too_large_layers_go_by_sparsegpt(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, hessian, area = case(layers()["conv"])
    monkeypatch.setattr(sparsity, "CHITA_WORK", 1.0)
    for a, b in zip(*(prune(weight, Sparse(0.5, by=by), hessian, area) for by in ("chita", "sparsegpt")), strict=True):  # type: ignore[arg-type]
        assert torch.equal(a, b)


def test_curvature_that_says_nothing_is_magnitude() -> None:
    weight, _ = problem(5, 9, 3)
    new, mask = prune(weight, Sparse(0.6, by="chita"), Hessian(torch.zeros(10, 10), False))
    assert torch.equal(mask, best_of(weight.abs(), 18))
    torch.testing.assert_close(new, weight * mask)

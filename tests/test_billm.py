"""Two signs a weight: far better than one sign and a mean, blocks, bad input. Plans and files: ``test_spqr.py``."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from autocompress.methods import BiLLM, LayerContext, WeightQuant, handler_of
from autocompress.methods.base import forms_of
from autocompress.methods.billm import BREAKS, binarize, blocks, residual, split, two_signs
from autocompress.methods.gptq import gptq
from tests.test_methods import MethodContract, correlated, gram_of, layers
from tests.test_spqr import bits, case, trained


def sign_mean(weight: Tensor) -> Tensor:
    """The best single sign and magnitude of each row (Rastegari et al. 2016)."""
    return weight.sign() * weight.abs().mean(1, keepdim=True)


class TestBiLLM(MethodContract):
    configs = (BiLLM(), BiLLM(16))

    def test_far_better_than_sign_and_mean(self, layer: nn.Module) -> None:
        weight, hessian = case(layer)
        plain = float(hessian.error(weight - sign_mean(weight)).sum())
        for config in self.configs:
            assert float(hessian.error(weight - binarize(weight, config, hessian)[0]).sum()) < 0.15 * plain

    @torch.no_grad()
    def test_the_module_is_what_was_fitted(self, layer: nn.Module) -> None:
        x, config = correlated(layer), BiLLM(16)
        weight, hessian = case(layer)
        want, form = binarize(weight, config, hessian)
        made = handler_of(config).apply(config, copy.deepcopy(layer), LayerContext(gram_of(layer, x)))  # type: ignore[union-attr]
        torch.testing.assert_close(made.weight.flatten(1), want.float(), rtol=1e-6, atol=0)  # type: ignore[operator,union-attr]
        (kept,) = forms_of(made)
        scaled = made.weight * torch.linspace(-1, 2, len(weight)).reshape(-1, *[1] * (made.weight.ndim - 1))  # type: ignore[operator,union-attr,arg-type]
        assert kept.holds(made.weight) and kept.holds(scaled) and not kept.holds(layer.weight.detach())  # type: ignore[arg-type,operator,union-attr]
        for row in want.float():  # four values in each block and kind of column
            assert all(len(row[form.kind == kind].unique()) <= 4 for kind in form.kind.unique())
        change = (made(x) - layer(x)).transpose(0, 1).flatten(1).double().pow(2).mean(1)
        torch.testing.assert_close(change, hessian.error(weight - want), rtol=2e-3, atol=1e-6)


def test_each_part_of_it_lowers_the_error() -> None:
    """Sign and mean > the two signs of the residual > those of the split, weighted > with salient columns and GPTQ's steps."""
    _, weight, hessian = trained()
    cost = hessian.inverse_root(torch.arange(256)).diagonal() ** -2

    def felt(new: Tensor) -> float:
        return float(((weight - new).square() * cost).sum())

    made = []
    for fit in (residual, split):
        a, b = fit(weight, cost)
        made.append(two_signs(weight, a[:, None], b[:, None]))
    errors = [felt(w) for w in (sign_mean(weight), *made)]
    assert errors[2] < 0.95 * errors[1] and errors[1] < 0.6 * errors[0]
    new, form = binarize(weight, BiLLM(), hessian)
    outputs = [float(hessian.error(weight - w).sum()) for w in (sign_mean(weight), made[1], new)]
    assert outputs[2] < 0.6 * outputs[1] and outputs[1] < 0.6 * outputs[0]
    assert 0 < int((form.kind % 2).sum()) <= 0.2 * 256 + 1


def test_the_split_is_the_best_of_all_breaks() -> None:
    weight = torch.randn(5, 40, generator=torch.Generator().manual_seed(2)).double()
    a, b = split(weight, torch.ones(40).double())
    for row, low, high in zip(weight.abs(), a - b, a + b, strict=True):
        best = min(
            float((inner - inner.mean()).square().sum() + (outer - outer.mean()).square().sum())
            for share in BREAKS
            if len(inner := row[row <= share * row.max()]) and len(outer := row[row > share * row.max()])
        )
        found = torch.minimum((row - low).square(), (row - high).square()).sum()
        assert float(found) <= best + 1e-9


def test_all_its_bits_are_counted() -> None:
    """Two bits a weight, four halves a row and block, a factor a row, and a bit a column."""
    assert bits(BiLLM(), 96, 256) == pytest.approx(2 + 4 * 16 * 2 / 256 + 32 / 256 + 1 / 96)
    assert bits(BiLLM(), 96, 256) < bits(WeightQuant(2, 32), 96, 256)
    assert [len(b) for b in blocks(300, 128)] == [100, 100, 100] and [len(b) for b in blocks(9, 128)] == [9]
    layer, weight, hessian = trained()
    rounded = gptq(layer.weight.detach(), 2, 32, hessian).dequantize().double()
    new = binarize(weight, BiLLM(), hessian)[0]
    assert float(hessian.error(weight - new).sum()) < 0.8 * float(hessian.error(weight - rounded).sum())


@pytest.mark.parametrize("kind", ["none", "zero", "nan", "one row", "zero weights", "one input"])
def test_bad_input(kind: str) -> None:
    layer = nn.Linear(1, 4) if kind == "one input" else layers()["linear"]
    if kind == "zero weights":
        nn.init.zeros_(layer.weight)  # type: ignore[arg-type]
    x = correlated(layer, 1 if kind == "one row" else 40)
    gram = gram_of(layer, x) * {"zero": 0.0, "nan": float("nan")}.get(kind, 1.0)
    made = handler_of(BiLLM(8)).apply(BiLLM(8), layer, LayerContext(None if kind == "none" else gram))  # type: ignore[union-attr]
    assert torch.isfinite(made(x)).all() and forms_of(made)[0].holds(made.weight.detach())  # type: ignore[operator,union-attr]
    assert kind != "zero weights" or not bool(made.weight.any())  # type: ignore[operator,union-attr]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_straight_through(dtype: torch.dtype) -> None:
    layer = layers()["linear"].to(dtype)
    layer.weight = nn.Parameter(layer.weight.detach().T.contiguous().T)
    gram = gram_of(layer, correlated(layers()["linear"]))
    made = handler_of(BiLLM()).apply(BiLLM(), layer, LayerContext(gram))  # type: ignore[union-attr]
    assert made.weight.dtype == dtype and torch.isfinite(made.weight).all()  # type: ignore[arg-type,union-attr]
    raw = made.parametrizations["weight"].original  # type: ignore[index,union-attr]
    raw.requires_grad_(True)
    made(torch.ones(2, 20, dtype=dtype)).sum().backward()
    assert torch.equal(raw.grad, torch.full((14, 20), 2.0, dtype=dtype))

"""Numbers from outputs: exact where classes are few, a bound from below where they are many, the same in any batches."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from autocompress.fitness import BATCH, Soft, Teacher, TopK, batch_of, fitness, images_last, slice_of, weights_last
from autocompress.tasks import Split
from tests import networks


def logits(seed: int, *shape: int, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), k=st.integers(1, 39), scale=st.floats(0.1, 8))
def test_top_k_is_short_of_the_truth_by_what_happens_in_the_rest(seed: int, k: int, scale: float) -> None:
    p, q = logits(seed, 4, 40, 3, scale=scale), logits(seed + 1, 4, 40, 3, scale=scale)
    exact, found = Soft.of(p).kl(q), TopK.of(p, k).kl(q)
    log_p, log_q = p.double().log_softmax(1), q.double().log_softmax(1)
    rest = torch.ones_like(log_p).scatter(1, p.topk(k, 1).indices, 0.0)
    mass_p, mass_q = (log_p.exp() * rest).sum(1), (log_q.exp() * rest).sum(1)
    inside = (log_p.exp() * rest * (log_p - log_q)).sum(1) - mass_p * (
        mass_p / mass_q
    ).log()  # p_rest KL(p|rest || q|rest)
    torch.testing.assert_close(exact - found, inside, rtol=1e-3, atol=1e-4)
    assert bool((found <= exact + 1e-4).all()) and bool((found >= -1e-4).all())


def test_an_equal_model_loses_nothing_over_a_large_vocabulary() -> None:
    p = logits(0, 2, 5000, 4)
    assert float(TopK.of(p).kl(p).abs().max()) < 1e-9
    assert TopK.of(p).log_p.shape == (2, 512, 4)


@pytest.mark.parametrize("kind", ["kl", "mse", "loss"])
def test_batches_do_not_change_the_numbers(kind: str) -> None:
    task = replace(networks.task("resnet-a", n=4), fitness=kind)  # type: ignore[arg-type]
    n = 2 * BATCH + 9
    split = Split(torch.zeros(n, 3, 8, 8), torch.arange(n) % 4)
    reference, outputs = logits(0, n, 4), logits(1, n, 4)
    teacher = Teacher(task, split, reference.split(BATCH))
    for m in (n, 2 * BATCH):
        loss, metric, original = teacher.judge(outputs[:m].split(BATCH))
        assert loss == fitness(task, outputs[:m], reference[:m], split.targets[:m])
        assert metric == task.metric(outputs[:m], split.targets[:m])
        assert original == task.metric(reference[:m], split.targets[:m])


def test_sequences_go_in_batches_of_tokens() -> None:
    images = networks.task("resnet-a", n=4)
    assert (batch_of(images), slice_of(images)) == (128, 256)
    tokens = Split(torch.zeros(4, 512, dtype=torch.int64), torch.zeros(4, 512, dtype=torch.int64))
    assert batch_of(replace(images, calibration=tokens)) == 4
    long = Split(torch.zeros(4, 5000, dtype=torch.int64), torch.zeros(4, 5000, dtype=torch.int64))
    assert batch_of(replace(images, calibration=long)) == 1


def test_the_layout_moves_no_value() -> None:
    x = torch.randn(2, 3, 4, 4)
    assert torch.equal(images_last(x), x) and images_last(x).is_contiguous(memory_format=torch.channels_last)
    assert images_last(x[0]).is_contiguous(), "only images"
    model = networks.network("resnet-a")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert weights_last(model) is model
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert model.conv1.weight.is_contiguous(memory_format=torch.channels_last)  # type: ignore[union-attr]

"""Numbers from outputs: exact where classes are few, a bound from below where they are many, the same in any batches."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from autocompress.fitness import Soft, Teacher, TopK, fitness, images_last, slice_of, weights_last
from autocompress.tasks import Split
from tests import networks


def logits(seed: int, *shape: int, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), k=st.integers(1, 39), scale=st.floats(0.1, 8))
def test_top_k_is_short_of_the_truth_by_what_happens_in_the_rest(seed: int, k: int, scale: float) -> None:
    p, q = logits(seed, 4, 3, 40, scale=scale), logits(seed + 1, 4, 3, 40, scale=scale)
    exact, found = Soft.of(p).kl(q), TopK.of(p, k).kl(q)
    log_p, log_q = p.double().log_softmax(-1), q.double().log_softmax(-1)
    rest = torch.ones_like(log_p).scatter(-1, p.topk(k, -1).indices, 0.0)
    mass_p, mass_q = (log_p.exp() * rest).sum(-1), (log_q.exp() * rest).sum(-1)
    inside = (log_p.exp() * rest * (log_p - log_q)).sum(-1) - mass_p * (
        mass_p / mass_q
    ).log()  # p_rest KL(p|rest || q|rest)
    torch.testing.assert_close(exact - found, inside, rtol=1e-3, atol=1e-4)
    assert bool((found <= exact + 1e-4).all()) and bool((found >= -1e-4).all())


def test_an_equal_model_loses_nothing_over_a_large_vocabulary() -> None:
    p = logits(0, 2, 4, 5000)
    assert float(TopK.of(p).kl(p).abs().max()) < 1e-9
    assert TopK.of(p).log_p.shape == (2, 4, 512)


@pytest.mark.parametrize("kind", ["kl", "mse", "loss"])
def test_batches_do_not_change_the_numbers(kind: str) -> None:
    batch = 64
    task = replace(networks.task("resnet-a", n=4), fitness=kind, batch_size=batch)  # type: ignore[arg-type]
    n = 2 * batch + 9
    split = Split(torch.zeros(n, 3, 8, 8), torch.arange(n) % 4)
    reference, outputs = logits(0, n, 4), logits(1, n, 4)
    teacher = Teacher(task, split, reference.split(batch))
    for m in (n, 2 * batch):
        loss, metric, original, _ = teacher.judge(outputs[:m].split(batch))
        assert loss == fitness(task, outputs[:m], reference[:m], split.targets[:m])
        assert metric == task.metric(outputs[:m], split.targets[:m])
        assert original == task.metric(reference[:m], split.targets[:m])


def test_classes_may_lie_along_another_axis() -> None:
    """A logit vector a token, or one a pixel: the same KL, exact and by the top k."""
    task = replace(networks.task("resnet-a", n=4), batch_size=2)
    p, q = logits(0, 5, 3, 2500), logits(1, 5, 3, 2500)
    want = float(Soft.of(p).kl(q).mean())
    last = replace(task, class_axis=-1)
    assert fitness(last, q, p, torch.zeros(5)) == pytest.approx(want, rel=1e-12)
    assert fitness(task, q.movedim(-1, 1), p.movedim(-1, 1), torch.zeros(5)) == pytest.approx(want, rel=1e-12)
    scored = replace(last, score=lambda outputs, targets: outputs.mean((1, 2)))
    teacher = Teacher(scored, Split(torch.zeros(5, 3), torch.zeros(5)), p.split(2))
    loss, score, original, _ = teacher.judge(q.split(2))
    assert loss == pytest.approx(float(TopK.of(p).kl(q).mean()), rel=1e-12) and 0.3 * want < loss < want
    assert score == pytest.approx(float(q.mean()), abs=1e-6) and original == pytest.approx(float(p.mean()), abs=1e-6)


def test_a_slice_is_made_of_whole_batches() -> None:
    task = networks.task("resnet-a", n=4)
    assert slice_of(task) == 256
    assert slice_of(replace(task, batch_size=100)) == 300
    assert slice_of(replace(task, batch_size=8, slice_size=4)) == 8


def test_the_layout_moves_no_value() -> None:
    x = torch.randn(2, 3, 4, 4)
    assert torch.equal(images_last(x), x) and images_last(x).is_contiguous(memory_format=torch.channels_last)
    assert images_last(x[0]).is_contiguous(), "only images"
    model = networks.network("resnet-a")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert weights_last(model) is model
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert model.conv1.weight.is_contiguous(memory_format=torch.channels_last)  # type: ignore[union-attr]

"""Scores of channels against their definitions; ``l2`` and ``taylor`` are in ``test_methods.py``, torch-pruning's in its file."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from autocompress.graph import Graph, trace
from autocompress.methods.importance import (
    GRADIENT_SCORES,
    WEIGHT_SCORES,
    bn_importance,
    fisher_importance,
    fpgm_importance,
    l1_importance,
    l2_importance,
    lrp_importance,
    passing_on_relevance,
    random_importance,
)
from tests import networks
from tests.test_methods import small

LOSS = nn.CrossEntropyLoss()


def labelled(graph: Graph, n: int) -> list[tuple[Tensor, Tensor]]:
    x = networks.images(n, 5)
    return [(x, graph.module(x).argmax(1).detach())]


def test_l1_and_the_geometric_median_by_hand() -> None:
    graph, group = small()
    first, second = (graph.module.get_submodule(name).weight.detach().double() for name in ("0", "2"))
    made, read = first.abs().sum((1, 2, 3)), second.abs().sum((0, 2, 3))
    np.testing.assert_allclose(l1_importance(graph, group), made / made.mean() + read / read.mean(), rtol=1e-6)
    flat = first.flatten(1)
    distances = torch.tensor([[float((a - b).square().sum().sqrt()) for b in flat] for a in flat]).sum(1)
    np.testing.assert_allclose(fpgm_importance(graph, group), distances / distances.mean(), rtol=1e-5)


def test_a_filter_that_others_can_stand_for_goes_first_however_large() -> None:
    """The point of the geometric median: the norm would keep what lies amid the others."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.ReLU(), nn.Conv2d(5, 4, 3, padding=1), nn.Flatten())
    with torch.no_grad():
        far = 10 + torch.randn(4, 3, 3, 3)
        model[0].weight[:4], model[0].weight[4] = far, far.mean(0)
    graph = trace(model, networks.images(1))
    assert fpgm_importance(graph, graph.groups[0]).argmin() == 4
    model[0].weight.data[4] *= 1.5  # the largest, and now far from the others
    graph = trace(model, networks.images(1))
    assert fpgm_importance(graph, graph.groups[0]).argmax() == 4


def test_factors_of_norms_and_l2_where_there_are_none() -> None:
    graph = trace(networks.network("resnet-b"), networks.images(1))
    group = next(g for g in graph.groups if g.producers == ("layer1.0.conv1",))
    factor = graph.module.get_submodule("layer1.0.bn1").weight.detach().abs().double()  # type: ignore[union-attr,operator]
    np.testing.assert_allclose(bn_importance(graph, group), factor / factor.mean(), rtol=1e-6)
    graph, group = small()
    np.testing.assert_array_equal(bn_importance(graph, group), l2_importance(graph, group))


def test_random_repeats_by_seed_and_differs_by_group() -> None:
    graph = trace(networks.network("resnet-b"), networks.images(1))
    same = [g for g in graph.groups if len(g.classes) == 12]
    assert len(same) > 1
    first = random_importance(graph, same[0], 3)
    np.testing.assert_array_equal(first, random_importance(graph, same[0], 3))
    assert not np.array_equal(first, random_importance(graph, same[0], 4))
    assert not np.array_equal(first, random_importance(graph, same[1], 3))


def test_fisher_is_the_quadratic_form_of_each_examples_gradient() -> None:
    graph, group = small()
    x, y = networks.images(3, 5), torch.tensor([0, 7, 100])
    scores = fisher_importance(graph, [group], [(x[:2], y[:2]), (x[2:], y[2:])], LOSS)[group.name]
    model = copy.deepcopy(graph.module)
    want = np.zeros(5)
    for i in range(3):
        weights = [model.get_submodule(name).weight.requires_grad_(True) for name in ("0", "2")]
        grads = torch.autograd.grad(LOSS(model(x[i : i + 1]), y[i : i + 1]), weights)
        both = [(0.5 * (w * g).square()).detach() for w, g in zip(weights, grads, strict=True)]
        want += (both[0].sum((1, 2, 3)) + both[1].sum((0, 2, 3))).numpy() / 3
    order = np.argsort(group.classes)
    np.testing.assert_allclose(scores[order], want[np.argsort(graph.layers["0"].outputs)], rtol=1e-4)
    assert not any(p.requires_grad for p in graph.module.parameters())


def test_relevance_is_neither_made_nor_lost() -> None:
    """One for each true class goes in at the output and, behind norms with negative factors and pooling, as much at the input."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 6, 3, padding=1, bias=False),
        nn.BatchNorm2d(6), nn.ReLU(), nn.AvgPool2d(4), nn.Flatten(), nn.Linear(6, 10, bias=False),
    )  # fmt: skip
    nn.init.normal_(model[4].weight)
    graph = trace(model.eval(), networks.images(1))
    ((x, y),) = labelled(graph, 32)
    with passing_on_relevance(graph), torch.enable_grad():
        true = graph.module(x.requires_grad_(True)).gather(1, y[:, None])
        (true / true.detach()).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close((x * x.grad).sum((1, 2, 3)), torch.ones(32), rtol=1e-3, atol=1e-3)


def test_relevance_by_hand() -> None:
    """``R_i = a_i w_ij^+ / sum_i a_i w_ij^+`` for one linear layer on positive inputs, a norm with a negative factor between."""
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Linear(24, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 4)
    ).eval()
    nn.init.normal_(model[1].weight)
    x, y = torch.rand(20, 24), torch.randint(0, 4, (20,))
    graph = trace(model, x)
    scores = lrp_importance(graph, graph.groups, [(x[:9], y[:9]), (x[9:], y[9:])], LOSS)
    first = next(g for g in graph.groups if "0" in g.producers)
    second = next(g for g in graph.groups if "3" in g.producers)
    hidden = model[:3](x)
    late = model[3:5](hidden)

    def passed(a: Tensor, weight: Tensor, relevance: Tensor) -> Tensor:
        z = a[:, None, :] * weight.clamp_min(0)  # (n, out, in)
        total = z.sum(2, keepdim=True)
        return torch.where(total > 0, z / total.clamp_min(1e-30), 0.0).mul(relevance[:, :, None]).sum(1)

    at_late = passed(late, model[5].weight, nn.functional.one_hot(y, 4).float())
    at_hidden = passed(hidden, model[3].weight, at_late * (model[3](hidden) > 0))
    for group, want, layer in ((second, at_late, "5"), (first, at_hidden, "3")):
        total = want.sum(0).detach()
        place = {int(c): i for i, c in enumerate(graph.layers[layer].inputs)}
        mine = scores[group.name][[list(group.classes).index(c) for c in sorted(place, key=place.__getitem__)]]
        np.testing.assert_allclose(mine, (total / total.mean()).numpy(), rtol=1e-4)


def test_relevance_knows_which_channels_a_class_needs() -> None:
    """Two halves of a net, one for each class: with examples of one class alone the other half's channels count nothing."""
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 2))
    with torch.no_grad():
        model[2].weight[0, 4:], model[2].weight[1, :4] = 0.0, 0.0
        model[2].weight.abs_()
    graph = trace(model, torch.rand(2, 10))
    x = torch.randn(30, 10)
    (group,) = graph.groups
    scores = lrp_importance(graph, [group], [(x, torch.zeros(30).long())], LOSS)[group.name]
    needed = np.isin(group.classes, graph.layers["2"].inputs[:4])
    assert scores[needed].sum() > 0 and not scores[~needed].any()


@pytest.mark.parametrize("name", sorted(networks.BUILDERS))
def test_every_network_is_scored_finitely_and_repeatably(name: str) -> None:
    graph = trace(networks.network(name), networks.images(1))
    before = copy.deepcopy(graph.module.state_dict())
    for of_weights in WEIGHT_SCORES.values():
        for group in graph.groups:
            scores = of_weights(graph, group)
            assert scores.shape == (len(group.classes),) and np.isfinite(scores).all() and scores.any()
    for of_gradients in GRADIENT_SCORES.values():
        found, again = (of_gradients(graph, graph.groups, labelled(graph, 6), LOSS) for _ in range(2))
        for group in graph.groups:
            assert np.isfinite(found[group.name]).all() and found[group.name].any()
            np.testing.assert_array_equal(found[group.name], again[group.name])
    assert all(torch.equal(v, before[k]) for k, v in graph.module.state_dict().items())
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in graph.module.modules())

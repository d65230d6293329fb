"""Sparse weights by the loss's curvature: blocks against examples' gradients, saliencies and updates against brute force."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from autocompress.database import LevelDatabase
from autocompress.deploy import deploy
from autocompress.evaluate import Measurer
from autocompress.finish import finish
from autocompress.graph import Graph, trace
from autocompress.methods import LayerContext, LowRank, Sparse, fisher, handler_of
from autocompress.methods.base import forms_of
from autocompress.methods.fisher import BlockFisher, block_moments, damped
from autocompress.space import make_space
from tests import networks
from tests.test_methods import MethodContract, correlated, gram_of, layers
from tests.test_sparsity import plan_of

LOSS = nn.CrossEntropyLoss()


def weights_of(graph: Graph) -> dict[str, Tensor]:
    return {name: graph.module.get_submodule(name).weight for name in graph.layers}  # type: ignore[misc]


def largest(count: int):  # type: ignore[no-untyped-def]
    def project(scores: Tensor) -> Tensor:
        mask = torch.zeros(scores.numel(), dtype=torch.bool)
        mask[scores.flatten().argsort(descending=True)[:count]] = True
        return mask.reshape(scores.shape)

    return project


def curvature(rows: int, count: int, size: int, n: int, seed: int = 0) -> BlockFisher:
    generator = torch.Generator().manual_seed(seed)
    g = torch.randn(rows, count * size, 80, generator=generator, dtype=torch.float64)
    g[:, n:] = 0  # what pads the last block has no gradient
    g = g.reshape(rows, count, size, 80)
    mixed = torch.randn(size, size, generator=generator, dtype=torch.float64)
    live = torch.arange(count * size).reshape(count, size, 1) < n
    g = (mixed @ g) * live
    return damped(g @ g.transpose(2, 3) / 80, torch.zeros(rows, n))


class TestBlockFisher(MethodContract):
    configs = (Sparse(0.5, by="fisher"), Sparse(0.5, 2, 4, "fisher"))

    def test_as_many_live_as_the_cost_tables_say(self, layer: nn.Module) -> None:
        weight = layer.weight.detach()  # type: ignore[union-attr]
        rows, n = len(weight), weight[0].numel()
        count = -(-n // 7)
        context = LayerContext(gram_of(layer, correlated(layer)), curvature(rows, count, 7, n))
        for config in (*self.configs, Sparse(0.9, by="fisher")):
            assert isinstance(config, Sparse)
            made = handler_of(config).apply(config, layers_like(layer), context)  # type: ignore[union-attr]
            (form,) = forms_of(made)
            want = config.kept(rows, weight.shape[1], weight[0, 0].numel())
            assert int(form.mask.sum()) == want and torch.isfinite(made.weight).all()  # type: ignore[operator,arg-type]


def layers_like(layer: nn.Module) -> nn.Module:
    return next(made for made in layers().values() if repr(made) == repr(layer))


def test_the_first_to_go_costs_least_and_the_rest_moves_to_the_optimum() -> None:
    """``w^2 / (2 [F^-1]_ii)`` is the loss of removing one weight with the best update of the others; then all but a few go."""
    known, w = curvature(2, 2, 4, 7), torch.randn(2, 7, dtype=torch.float64)
    whole = [torch.block_diag(*row)[:7, :7] for row in known.blocks]

    def fitted(mask: Tensor) -> Tensor:
        new = torch.zeros_like(w)
        for row, f in enumerate(whole):
            live = mask[row].nonzero().flatten()
            new[row, live] = torch.linalg.solve(f[live][:, live], (f @ w[row])[live])
        return new

    def cost(new: Tensor) -> float:
        return sum(float((w[i] - new[i]) @ f @ (w[i] - new[i])) / 2 for i, f in enumerate(whole))

    costs = {}
    for i, j in itertools.product(range(2), range(7)):
        mask = torch.ones(2, 7, dtype=torch.bool)
        mask[i, j] = False
        costs[i, j] = cost(fitted(mask))
    seen: list[Tensor] = []
    new, mask = known.prune(w, lambda scores: (seen.append(scores), largest(13)(scores))[1])
    assert tuple((~mask).nonzero()[0].tolist()) == min(costs, key=lambda at: costs[at])
    for at, value in costs.items():
        assert float(seen[0][at]) == pytest.approx(value, rel=1e-8)
    new, mask = known.prune(w, largest(6))
    torch.testing.assert_close(new, fitted(mask))


def test_kept_channels_read_the_same_entries() -> None:
    """Columns that are gone count as if they had never been; a row's factor divides its gradients."""
    known, w = curvature(3, 2, 4, 8), torch.randn(3, 8, dtype=torch.float64)
    rows, columns, factor = torch.tensor([0, 2]), torch.tensor([0, 1, 3, 6]), torch.tensor([2.0, 1.0, 0.5])
    part = known.select(rows, columns, factor.double())
    seen: list[Tensor] = []
    part.prune(w[rows][:, columns], lambda scores: (seen.append(scores), largest(5)(scores))[1])
    for i, row in enumerate(rows.tolist()):
        f = torch.block_diag(*known.blocks[row])[columns][:, columns] / factor[row] ** 2
        want = w[row, columns].square() / (2 * torch.linalg.inv(f).diagonal())
        torch.testing.assert_close(seen[0][i], want)
    scaled = known.select(torch.arange(3), torch.arange(8), factor.double())
    new, mask = scaled.prune(w * factor[:, None], largest(11))  # a folded norm changes neither mask nor weights
    plain, same = known.prune(w, largest(11))
    assert torch.equal(mask, same)
    torch.testing.assert_close(new, plain * factor[:, None])


def test_blocks_are_of_each_examples_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    task = networks.task("resnet-b", n=5)
    graph = trace(task.model, task.example_inputs)
    monkeypatch.setattr(fisher, "TOGETHER", 2)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        yield from task.batches(task.calibration.take(5), 3)

    name = "layer1.0.conv1"
    found = block_moments(graph.module, weights_of(graph), batches(), task.loss)
    weight = graph.module.get_submodule(name).weight
    blocks = found[name]
    count, size = blocks.shape[1:3]
    n = weight[0].numel()  # type: ignore[index]
    assert size <= fisher.FISHER_BLOCK and count == -(-n // 50)
    want = torch.zeros_like(blocks)
    for x, y in batches():
        for i in range(len(x)):
            weight.requires_grad_(True)  # type: ignore[operator]
            (g,) = torch.autograd.grad(task.loss(graph.module(x[i : i + 1]), y[i : i + 1]), [weight])  # type: ignore[list-item]
            wide = nn.functional.pad(g.flatten(1), (0, count * size - n)).reshape(-1, count, size)
            want += wide[..., None] * wide[..., None, :] / 5
    torch.testing.assert_close(blocks, want, rtol=1e-3, atol=1e-6 * float(want.abs().max()))


def test_large_models_get_smaller_blocks_at_last_the_diagonal(monkeypatch: pytest.MonkeyPatch) -> None:
    task = networks.task("resnet-b", n=2)
    graph = trace(task.model, task.example_inputs)
    monkeypatch.setattr(fisher, "FISHER_BYTES", 1)
    found = block_moments(graph.module, weights_of(graph), task.batches(task.calibration.take(2), 2), task.loss)
    assert {blocks.shape[-1] for blocks in found.values()} == {1}


@pytest.mark.parametrize("kind", ["zero", "nan"])
def test_gradients_that_say_nothing_are_magnitude(kind: str) -> None:
    w = torch.randn(4, 10, dtype=torch.float64)
    second = torch.zeros(4, 2, 5, 5) if kind == "zero" else torch.full((4, 2, 5, 5), torch.nan)
    new, mask = damped(second, w).prune(w, largest(20))
    assert torch.equal(mask, largest(20)(w.abs()))
    torch.testing.assert_close(new, w * mask)


def test_a_block_that_dwarfs_all_others_may_be_off_by_rounding() -> None:
    """Of rank 2, with eigenvalues as far below zero as sums in single precision bring them."""
    g, w = torch.randn(20_000, 1, 8, 2), torch.randn(20_000, 8, dtype=torch.float64)
    second = g @ g.transpose(2, 3)
    second[0] = 1e12 * second[0] - 2e6 * float(second[0].diagonal(dim1=1, dim2=2).mean()) * torch.eye(8)
    assert float(torch.linalg.eigvalsh(second[0].double()).min()) < 0
    new, mask = damped(second, w).prune(w, largest(80_000))
    assert torch.isfinite(new).all() and int(mask.sum()) == 80_000


def test_factors_have_no_gradients_of_their_own() -> None:
    layer = layers()["linear"]
    gram = gram_of(layer, correlated(layer))
    made = handler_of(LowRank(0.5)).apply(LowRank(0.5), layer, LayerContext(gram))  # type: ignore[union-attr]
    sparse = handler_of(Sparse()).apply(Sparse(by="fisher"), made, LayerContext(gram, curvature(14, 4, 5, 20)))  # type: ignore[union-attr]
    assert all(len(forms_of(part)) == 1 for part in sparse)  # type: ignore[union-attr]


# ---------------------------------------------------------------- in plans


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> LevelDatabase:
    return opened("mobilenet", tmp_path_factory.mktemp("fisher"), ("channels", "blocks", "sparse-fisher"))


def opened(name: str, folder: Path, families: tuple[str, ...]) -> LevelDatabase:
    task = networks.task(name, n=48)
    graph = trace(task.model, task.example_inputs)
    made = LevelDatabase(graph, make_space(graph, families), task, folder)
    made.build()
    return made


def test_gradients_only_where_they_are_asked_for(database: LevelDatabase, tmp_path: Path) -> None:
    assert list(database.folder.glob("fisher_*"))
    other = opened("mobilenet", tmp_path, ("channels", "sparse"))
    assert not list(other.folder.glob("fisher_*")) and other.key != database.key


@pytest.mark.parametrize("widths", [0, 2])
def test_all_rungs_and_judges_agree(database: LevelDatabase, widths: int) -> None:
    """Depthwise layers and pruned channels among them: stitched to the bit without a model, finished with zeros in place."""
    plan = plan_of(database, "70% sparse by fisher", widths)
    assert sum(map(bool, plan)) >= len(database.graph.layers)
    fast, plain = Measurer(database), Measurer(database, plain=True)
    assert {**fast(plan, "full"), "seconds": 0} == {**plain(plan, "full"), "seconds": 0}
    model = deploy(finish(database, plan))
    found = [form.holds(part.weight.detach()) for part in model.modules() for form in getattr(part, "forms", ())]  # type: ignore[union-attr,operator]
    assert len(found) == len(database.graph.layers) and all(found)


def test_depthwise_layers_are_not_pruned_by_magnitude(database: LevelDatabase) -> None:
    layer = next(layer for layer in database.graph.layers.values() if layer.depthwise)
    every = np.arange(len(layer.outputs))
    masks = []
    for step in (Sparse(0.5, by="fisher"), Sparse(0.5, by="magnitude")):
        (form,) = forms_of(database.layer_modules(layer, every, every, (step,))[layer.name])
        masks.append(form.mask)
    assert masks[0].sum() == masks[1].sum() and not torch.equal(*masks)  # type: ignore[operator,arg-type]

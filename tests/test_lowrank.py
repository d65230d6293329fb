"""Forms of factorization: what each promises, alone and in plans, and that files hold it as smaller compute."""

from __future__ import annotations

import copy
import math
import random
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from autocompress.costs import CostModel
from autocompress.database import LevelDatabase
from autocompress.deploy import deploy
from autocompress.errors import UnsupportedModel, UsageError
from autocompress.export import export_onnx
from autocompress.finish import finish
from autocompress.graph import trace
from autocompress.methods import (
    CUR,
    Factored,
    GroupedSVD,
    LayerContext,
    LowRank,
    OutputFeatures,
    TensorTrain,
    Tucker2,
    handler_of,
)
from autocompress.methods.cur import cur, deim
from autocompress.methods.factored import composed
from autocompress.methods.grouped import best_split, error_bound, grouped_factors
from autocompress.methods.lowrank import factors
from autocompress.methods.mpo import full_bonds, near_equal, train_weights
from autocompress.methods.tucker import tucker2
from autocompress.recover import Recovery, recover
from autocompress.space import make_space, saves
from autocompress.types import Kernel, Plan
from tests import networks
from tests.test_costs import counted_macs
from tests.test_methods import MethodContract, correlated, gram_of, kernel_of, layers

CONVOLUTIONS = [name for name in layers() if name != "linear"]
WIDE = [name for name in CONVOLUTIONS if name != "pointwise"]

FORMS = ("lord", "cur", "tucker", "grouped", "mpo")


def made(config: Factored, layer: nn.Module, gram: Tensor | None) -> nn.Module:
    handler = handler_of(config)
    assert handler is not None
    return handler.apply(config, copy.deepcopy(layer), LayerContext(gram))


def output_error(config: Factored, layer: nn.Module, gram: Tensor | None, x: Tensor) -> float:
    """Squared error of the outputs over their squared size."""
    with torch.no_grad():
        y = layer(x)
        return float((made(config, layer, gram)(x) - y).pow(2).sum() / y.pow(2).sum())


class FactoredContract(MethodContract):
    """What every form keeps besides; ``configs`` are of one class."""

    @torch.no_grad()
    def test_full_rank_is_the_layer(self, layer: nn.Module) -> None:
        x = correlated(layer)
        full = type(self.configs[0])(99.0)  # type: ignore[call-arg]
        for gram in (None, gram_of(layer, x).float()):
            assert output_error(full, layer, gram, x) < 1e-7  # type: ignore[arg-type]

    def test_the_composed_weight_is_what_the_chain_computes(self, layer: nn.Module) -> None:
        x = correlated(layer, 4)
        for config in self.configs:
            assert isinstance(config, Factored)
            parts = made(config, layer, None)
            one = copy.deepcopy(layer)
            one.weight = nn.Parameter(composed(parts))
            torch.testing.assert_close(one(x), parts(x), rtol=1e-4, atol=1e-4)

    def test_bad_weights_and_types(self, layer: nn.Module) -> None:
        """Zeros, dead inputs with a singular Gram matrix, fp16, and tensors that are not contiguous."""
        x = correlated(layer, 3)
        x[:, 1:] = 0
        gram = gram_of(layer, x).float()
        for config in self.configs:
            assert isinstance(config, Factored)
            assert bool(torch.isfinite(made(config, layer, gram)(x)).all())
            zero = copy.deepcopy(layer)
            nn.init.zeros_(zero.weight)  # type: ignore[arg-type]
            torch.testing.assert_close(made(config, zero, gram)(x), zero(x), rtol=1e-5, atol=1e-5)
            turned = copy.deepcopy(layer)
            turned.weight = nn.Parameter(layer.weight.detach().flip(0).transpose(0, 1).contiguous().transpose(0, 1))  # type: ignore
            assert not turned.weight.is_contiguous() or turned.weight.shape[1] == 1
            assert bool(torch.isfinite(made(config, turned, gram)(x)).all())
            half = made(config, copy.deepcopy(layer).half(), None)
            assert {p.dtype for p in half.parameters()} == {torch.float16}
            with torch.no_grad():
                reference, found = made(config, copy.deepcopy(layer).half().float(), None)(x), half(x.half()).float()
            assert float((found - reference).abs().max()) < 0.02 * float(reference.abs().max())

    def test_shares_that_are_no_shares_are_refused(self) -> None:
        for ratio in (0.0, -1.0, math.nan, math.inf):
            with pytest.raises(UsageError, match="above 0, got"):
                type(self.configs[0])(ratio)  # type: ignore[call-arg]

    def test_the_weights_keep_to_the_ratio(self) -> None:
        for n_out, n_in, size in [(64, 32, (3, 3)), (40, 60, (1, 1)), (16, 24, (5, 3))]:
            conv = Kernel("conv", (n_in, 8, 8), (n_out, 8, 8), size)
            linear = Kernel("linear", (n_in,), (n_out,))
            for config in self.configs:
                assert isinstance(config, Factored)
                handler = handler_of(config)
                assert handler is not None
                kernel = linear if isinstance(config, TensorTrain) else conv
                parts = handler.lower(config, kernel)
                assert sum(part.weights for part in parts) <= config.ratio * kernel.weights + 1e-6


class TestLowRankForms(FactoredContract):
    configs = (LowRank(0.5), LowRank(0.25, "spatial"))

    @pytest.fixture(params=CONVOLUTIONS)
    def layer(self, request: pytest.FixtureRequest) -> nn.Module:
        return layers()[request.param]


class TestOutputFeatures(FactoredContract):
    configs = (OutputFeatures(0.5), OutputFeatures(0.25))

    @pytest.mark.parametrize("ratio", [0.2, 0.5, 0.8])
    def test_under_the_whitened_svd_under_the_plain_one(self, layer: nn.Module, ratio: float) -> None:
        x = correlated(layer)
        gram = gram_of(layer, x)
        plain = output_error(LowRank(ratio), layer, None, x)
        whitened = output_error(LowRank(ratio), layer, gram, x)
        features = output_error(OutputFeatures(ratio), layer, gram, x)
        assert features <= whitened * 1.001 and whitened <= plain * 1.001

    def test_without_the_mean_it_is_the_whitened_svd(self, layer: nn.Module) -> None:
        x = correlated(layer)
        gram = gram_of(layer, x).clone()
        gram[:-1, -1] = gram[-1, :-1] = 0.0
        first, second = (made(form(0.5), layer, gram) for form in (OutputFeatures, LowRank))
        torch.testing.assert_close(first(x), second(x), rtol=1e-2, atol=1e-3)

    def test_a_mean_that_has_no_rank_goes_into_the_bias(self) -> None:
        """Inputs that hardly move around a large mean: the mean costs no rank."""
        layer = nn.Linear(16, 12, bias=False)
        x = 10 + 0.1 * torch.randn(500, 16) @ torch.randn(16, 16)
        gram = gram_of(layer, x)
        found = made(OutputFeatures(0.5), layer, gram)
        assert found[-1].bias is not None  # type: ignore[index]
        assert output_error(OutputFeatures(0.5), layer, gram, x) < 0.9 * output_error(LowRank(0.5), layer, gram, x)


class TestCUR(FactoredContract):
    configs = (CUR(0.5), CUR(0.25), CUR(0.5, columns=False))

    @pytest.mark.parametrize("ratio", [0.25, 0.5])
    def test_a_free_mixture_is_no_worse_than_one_of_columns(self, layer: nn.Module, ratio: float) -> None:
        x = correlated(layer)
        for gram in (None, gram_of(layer, x)):
            free, own = (made(CUR(ratio, columns), layer, gram) for columns in (False, True))
            errors = []
            for parts in (free, own):
                gap = (composed(parts) - layer.weight).detach().flatten(1).double()  # type: ignore[operator]
                metric = torch.eye(gap.shape[1]).double() if gram is None else gram[:-1, :-1].double()
                errors.append(float(((gap @ metric) * gap).sum()))
            assert errors[0] <= errors[1] * 1.001

    def test_its_first_factor_are_rows_of_the_weight_and_its_columns_are_the_weights_own(self) -> None:
        matrix = torch.randn(30, 50, generator=torch.Generator().manual_seed(0)).double()
        rows, columns, u = cur(matrix, 12, None)
        assert len(set(rows.tolist())) == len(set(columns.tolist())) == 12
        layer = nn.Linear(50, 30)
        layer.weight = nn.Parameter(matrix.float())
        parts = made(CUR(0.5), layer, None)
        own = {tuple(row) for row in layer.weight.tolist()}
        assert all(tuple(row) in own for row in parts[0].weight.tolist())  # type: ignore[index]
        best = torch.linalg.pinv(matrix[:, columns]) @ matrix @ torch.linalg.pinv(matrix[rows])
        torch.testing.assert_close(u, best, rtol=1e-6, atol=1e-8)

    def test_a_matrix_of_its_rank_is_exact_and_error_is_near_that_of_svd(self) -> None:
        generator = torch.Generator().manual_seed(0)
        low = (torch.randn(40, 6, generator=generator) @ torch.randn(6, 50, generator=generator)).double()
        decaying = torch.linalg.svd(torch.randn(40, 50, generator=generator).double(), full_matrices=False)
        trained = decaying.U * (0.8 ** torch.arange(40).double()) @ decaying.Vh
        for matrix, rank, bound in [(low, 6, 1e-6), (trained, 12, math.inf)]:
            rows, columns, u = cur(matrix, rank, None)
            error = float((matrix - matrix[:, columns] @ u @ matrix[rows]).norm() / matrix.norm())
            assert error < bound
        svd = float(torch.linalg.svdvals(trained)[12:].norm() / trained.norm())
        assert error < 3 * svd

    def test_deim_picks_where_a_basis_differs(self) -> None:
        assert deim(torch.eye(5)[:, [3, 0, 4]]).tolist() == [3, 0, 4]
        assert len(set(deim(torch.ones(4, 3) / 2).tolist())) == 3  # dependent vectors: still distinct rows
        basis = torch.linalg.qr(torch.randn(40, 12, generator=torch.Generator().manual_seed(0)).double()).Q
        chosen = [int(basis[:, 0].abs().argmax())]
        for j in range(1, 12):  # by the definition
            weights = torch.linalg.solve(basis[chosen, :j], basis[chosen, j])
            chosen.append(int((basis[:, j] - basis[:, :j] @ weights).abs().argmax()))
        assert deim(basis).tolist() == chosen


class TestTucker2(FactoredContract):
    configs = (Tucker2(0.5), Tucker2(0.3))

    @pytest.fixture(params=WIDE)
    def layer(self, request: pytest.FixtureRequest) -> nn.Module:
        return layers()[request.param]

    def test_a_weight_of_its_ranks_is_exact_and_iteration_helps(self) -> None:
        generator = torch.Generator().manual_seed(0)
        core = torch.randn(4, 3, 3, 3, generator=generator).double()
        u, v = torch.randn(20, 4, generator=generator).double(), torch.randn(16, 3, generator=generator).double()
        weight = torch.einsum("op,pqhw,iq->oihw", u, core, v)
        a, g, b = tucker2(weight, (4, 3), None)
        torch.testing.assert_close(torch.einsum("op,pqhw,iq->oihw", a, g, b), weight)

    def test_data_helps(self, layer: nn.Module) -> None:
        x = correlated(layer)
        assert output_error(Tucker2(0.5), layer, gram_of(layer, x), x) < output_error(Tucker2(0.5), layer, None, x)

    def test_layers_without_such_a_form_are_refused(self) -> None:
        for layer in (nn.Linear(8, 8), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, groups=8)):
            with pytest.raises(UnsupportedModel, match="Tucker form"):
                made(Tucker2(0.5), layer, None)


class TestGroupedSVD(FactoredContract):
    configs = (GroupedSVD(0.5), GroupedSVD(0.25, 4))

    @pytest.fixture(params=CONVOLUTIONS)
    def layer(self, request: pytest.FixtureRequest) -> nn.Module:
        return layers()[request.param]

    def test_channels_that_groups_do_not_divide(self) -> None:
        layer = nn.Conv2d(10, 12, 3, padding=1)
        assert made(GroupedSVD(0.5, 4), layer, None)[0].groups == 2  # type: ignore[index]
        assert made(GroupedSVD(0.5, 4), nn.Conv2d(9, 12, 3), None)[0].groups == 1  # type: ignore[index]

    @settings(deadline=None, max_examples=30)
    @given(seed=st.integers(0, 999), groups=st.sampled_from([1, 2, 4]), ratio=st.floats(0.1, 0.9))
    def test_the_bound_bounds_the_error(self, seed: int, groups: int, ratio: float) -> None:
        weight = torch.randn(12, 8, 3, 3, generator=torch.Generator().manual_seed(seed))
        config = GroupedSVD(ratio, groups)
        _, rank = config.shape(12, 8, 9)
        u, v = grouped_factors(weight.double().flatten(1), rank, groups, None)
        wide = torch.block_diag(*v.chunk(groups))
        matrix = weight.double().flatten(1)
        error = torch.linalg.svdvals(matrix - u @ wide)[0] / torch.linalg.svdvals(matrix)[0]
        assert float(error) <= error_bound(weight, ratio, groups) * (1 + 1e-9)

    def test_more_groups_are_chosen_where_they_are_better(self) -> None:
        """Slices with subspaces of their own: two groups are chosen, and beat one at equal weights."""
        generator = torch.Generator().manual_seed(0)
        slices = [torch.randn(32, 4, generator=generator) @ torch.randn(4, 72, generator=generator) for _ in range(2)]
        weight = torch.cat(slices, dim=1).reshape(32, 16, 3, 3)
        ratio = 8 * (144 + 32) / (32 * 144) * 0.8  # less than one group needs
        groups = best_split(weight, ratio)
        assert groups > 1
        layer = nn.Conv2d(16, 32, 3, padding=1)
        layer.weight = nn.Parameter(weight)
        x = torch.randn(20, 16, 8, 8, generator=generator)
        assert output_error(GroupedSVD(ratio, groups), layer, None, x) < output_error(LowRank(ratio), layer, None, x)

    @pytest.mark.parametrize("ratio", [0.5, 0.25])
    def test_slices_are_not_charged_for_their_number(self, ratio: float) -> None:
        """With the bound's root a layer is cut less, and errs more; of random weights at 75 % the rule cuts too much."""
        generator = torch.Generator().manual_seed(0)
        layer = nn.Conv2d(32, 32, 3, padding=1)
        layer.weight = nn.Parameter(torch.randn(32, 32, 3, 3, generator=generator))
        whole = min((1, 2, 4, 8), key=lambda k: error_bound(layer.weight, ratio, k))
        groups = best_split(layer.weight, ratio)
        x = torch.randn(20, 32, 8, 8, generator=generator)
        assert whole < groups
        error = output_error(GroupedSVD(ratio, groups), layer, None, x)
        assert error < output_error(GroupedSVD(ratio, whole), layer, None, x)


class TestTensorTrain(FactoredContract):
    configs = (TensorTrain(0.5), TensorTrain(0.25), TensorTrain(0.5, 3))

    @pytest.fixture(params=["linear", "wide", "prime"])
    def layer(self, request: pytest.FixtureRequest) -> nn.Module:
        torch.manual_seed(0)
        return {"linear": nn.Linear(20, 14), "wide": nn.Linear(24, 36, bias=False), "prime": nn.Linear(7, 16)}[
            request.param
        ]

    def test_the_kernels_are_those_of_the_module(self, layer: nn.Module) -> None:
        """Weights and multiplications of every core, on a sequence; between the cores values are transposed."""
        x = torch.randn(2, 5, layer.in_features)  # type: ignore[arg-type]
        kernel = Kernel("linear", (x.shape[2], 5), (layer.out_features, 5))  # type: ignore[arg-type]
        for config in self.configs:
            handler = handler_of(config)
            assert handler is not None
            parts, kernels = (
                handler.apply(config, copy.deepcopy(layer), LayerContext(None)),
                handler.lower(config, kernel),
            )
            assert [k.kind for k in kernels[1::2]] == ["transpose"] * (len(kernels) // 2)
            ran: list[tuple[int, int]] = []
            for part in [p for p in parts.modules() if isinstance(p, nn.Linear)]:
                part.register_forward_hook(
                    lambda m, i, y: ran.append((m.weight.numel(), y[0].numel() * m.weight.shape[1]))  # noqa: B023
                )
            parts(x)
            assert ran == [(k.weights, k.macs) for k in kernels if k.kind == "linear"]

    def test_a_kronecker_product_is_exact_at_bond_1(self) -> None:
        layer = nn.Linear(24, 36, bias=False)
        layer.weight = nn.Parameter(torch.kron(torch.randn(6, 4), torch.randn(6, 6)))
        outs, ins = near_equal(36, 2), near_equal(24, 2)
        layer.weight = nn.Parameter(torch.kron(torch.randn(outs[0], ins[0]), torch.randn(outs[1], ins[1])))
        found = made(TensorTrain(train_weights(outs, ins, (1, 1, 1)) / 864), layer, None)
        torch.testing.assert_close(composed(found), layer.weight, rtol=1e-4, atol=1e-5)

    @given(n=st.integers(1, 2000), parts=st.integers(2, 4))
    def test_factors_multiply_to_the_size(self, n: int, parts: int) -> None:
        assert math.prod(near_equal(n, parts)) == n and len(near_equal(n, parts)) == parts
        bonds = full_bonds(near_equal(n, parts), near_equal(n, parts))
        assert bonds[0] == bonds[-1] == 1

    def test_short_healing_helps_far_more(self, tmp_path: Path) -> None:
        torch.manual_seed(0)
        task = networks.task("tokens", n=128)
        graph = trace(task.model, task.example_inputs)
        space = make_space(graph, ("mpo",), minimum=64)
        database = LevelDatabase(graph, space, task, tmp_path)
        database.build()
        plan = tuple(len(own) - 1 for own in space.levels)
        live = database.stitch(plan)
        assert sum(isinstance(m, nn.Linear) for m in live.modules()) > sum(
            isinstance(m, nn.Linear) for m in task.model.modules()
        )
        with torch.no_grad():
            reference = task.model(task.inputs(task.search))
            before = float((live(task.inputs(task.search)) - reference).pow(2).mean())
        healed = recover(live, graph.module, task, Recovery(steps=60, batch_size=32, learning_rate=3e-3), reference)
        with torch.no_grad():
            after = float((healed(task.inputs(task.search)) - reference).pow(2).mean())
        assert after < 0.5 * before

    def test_convolutions_are_refused(self) -> None:
        with pytest.raises(UnsupportedModel, match="matrix product form"):
            made(TensorTrain(0.5), nn.Conv2d(8, 8, 1), None)


# ---------------------------------------------------------------- ranks and levels


@pytest.mark.parametrize("rank", [0, 13, 100])
def test_ranks_that_a_matrix_cannot_have_are_refused(rank: int) -> None:
    matrix = torch.randn(12, 90).double()
    for attempt in (lambda: factors(matrix, rank, None), lambda: cur(matrix, rank, None)):
        with pytest.raises(UsageError, match=f"12 x 90 has a rank of 1 to 12, got {rank}"):
            attempt()


def test_a_level_is_offered_only_where_it_saves_weights_or_multiplications() -> None:
    wide = Kernel("conv", (64, 8, 8), (64, 8, 8), (3, 3))
    assert saves(Tucker2(0.5), wide) and not saves(Tucker2(4.0), wide)
    assert not saves(TensorTrain(0.5), Kernel("linear", (31,), (37,)))  # primes: one core has it all
    for name in ("resnet-b", "mobilenet", "tokens"):
        task = networks.task(name, n=8)
        graph = trace(task.model, task.example_inputs)
        space = make_space(graph, ("channels", "lowrank", *FORMS))
        costs = CostModel(graph, space, {})
        dense = costs.in_units(space.dense)
        for site, own in enumerate(space.levels):
            for level, choice in enumerate(own):
                if any(isinstance(s, Factored) and not isinstance(s, LowRank) for s in choice.steps):
                    row = costs.in_units((*space.dense[:site], level, *space.dense[site + 1 :]))
                    assert row["macs"] < dense["macs"] or row["params"] < dense["params"], choice.label


# ---------------------------------------------------------------- in plans


@pytest.fixture(scope="module", params=["resnet-b", "tokens", "mobilenet"])
def database(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LevelDatabase:
    task = networks.task(request.param, n=64)
    graph = trace(task.model, task.example_inputs)
    space = make_space(graph, ("channels", "blocks", "w8", *FORMS), minimum=64)
    found = LevelDatabase(graph, space, task, tmp_path_factory.mktemp(request.param))
    found.build()
    return found


def some_plans(database: LevelDatabase, n: int, seed: int = 0) -> list[Plan]:
    rng = random.Random(seed)
    return [tuple(rng.randrange(k) if rng.random() < 0.6 else 0 for k in database.space.n_levels) for _ in range(n)]


def test_costs_are_those_of_the_stitched_model(database: LevelDatabase) -> None:
    """Behind pruned channels too: ranks follow from what is left."""
    costs = CostModel(database.graph, database.space, {})
    for plan in some_plans(database, 12):
        model = deploy(database.stitch(plan))
        row = costs.in_units(plan)
        assert row["macs"] == counted_macs(model, networks.images(2)), database.space.describe(plan)
        weights = sum(p.numel() for name, p in model.named_parameters() if not name.endswith("bias"))
        biases = sum(p.numel() for name, p in model.named_parameters() if name.endswith("bias"))
        assert row["params"] == weights + biases, database.space.describe(plan)


@pytest.mark.slow
def test_refitting_comes_closer_with_every_form(database: LevelDatabase) -> None:
    """Mean squared error of the outputs, one layer changed at a time: less after the sequential refit, summed over layers."""
    x = database.task.inputs(database.task.search)
    errors: dict[str, list[tuple[float, float]]] = {}
    with torch.no_grad():
        want = database.graph.module(x)
        for site, own in enumerate(database.space.levels):
            for level, choice in enumerate(own):
                if any(isinstance(step, Factored) for step in choice.steps):
                    plan = (*database.space.dense[:site], level, *database.space.dense[site + 1 :])
                    pair = [
                        float((deploy(m)(x) - want).pow(2).mean())
                        for m in (database.stitch(plan), finish(database, plan))
                    ]
                    errors.setdefault(type(choice.steps[0]).__name__, []).append((pair[0], pair[1]))
    for form, pairs in errors.items():
        before, after = np.sum(pairs, axis=0)
        assert after < 1.05 * before, form
    assert {"OutputFeatures", "CUR"} <= set(errors) and errors.keys() & {"Tucker2", "TensorTrain"}


# ---------------------------------------------------------------- in files


class Block(nn.Module):
    """A convolution and a linear layer on tokens, each as ``form`` makes it."""

    def __init__(self, conv: nn.Module, linear: nn.Module) -> None:
        super().__init__()
        self.conv, self.linear, self.head = conv, linear, nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.conv(x).relu().flatten(2).transpose(1, 2)
        return self.head(self.linear(tokens).relu().mean(1))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("config", "convolutions", "products"),
    [
        (LowRank(0.25), 2, 2), (LowRank(0.25, "spatial"), 2, 1), (OutputFeatures(0.25), 2, 2), (CUR(0.25), 2, 2),
        (Tucker2(0.25), 3, 1), (GroupedSVD(0.25, 4), 2, 1), (TensorTrain(0.25), 1, 2), (TensorTrain(0.25, 3), 1, 3),
    ],
)  # fmt: skip
@pytest.mark.parametrize("exporter", ["legacy", pytest.param("dynamo", marks=pytest.mark.slow)])
def test_the_file_has_the_factors_as_layers_and_fewer_bytes(
    config: Factored, convolutions: int, products: int, exporter: str, tmp_path: Path
) -> None:
    """Nodes and bytes of the file; that ONNX Runtime computes the same, ``export_onnx`` proves itself."""
    torch.manual_seed(0)
    conv, linear = nn.Conv2d(32, 64, 3, padding=1), nn.Linear(64, 64)
    x = torch.randn(4, 32, 6, 6)
    sizes = []
    for name, parts in (
        ("dense", (conv, linear)),
        (
            "factored",
            (
                conv if convolutions == 1 else made(config, conv, gram_of(conv, x)),
                linear if products == 1 else made(config, linear, gram_of(linear, torch.randn(99, 64))),
            ),
        ),
    ):
        model = Block(*parts).eval()
        export_onnx(model, x, tmp_path / f"{name}.onnx", exporters=[exporter])  # type: ignore[list-item]
        sizes.append((tmp_path / f"{name}.onnx").stat().st_size)
    graph = onnx.load(tmp_path / "factored.onnx").graph
    nodes = Counter(node.op_type for node in graph.node)
    assert nodes["Conv"] == convolutions
    assert nodes["MatMul"] + nodes["Gemm"] == products + 1  # and the head
    if isinstance(config, GroupedSVD):
        assert any(a.name == "group" and a.i == 4 for node in graph.node for a in node.attribute)
    dense = {"conv": 4 * conv.weight.numel(), "linear": 4 * linear.weight.numel()}
    saved = 0.72 * ((convolutions > 1) * dense["conv"] + (products > 1) * dense["linear"])
    assert sizes[0] - sizes[1] > saved - 4500  # names of more nodes
    held = sum(4 * int(np.prod(t.dims)) for t in graph.initializer if len(t.dims) > 1)
    assert held <= 0.26 * ((convolutions > 1) * dense["conv"] + (products > 1) * dense["linear"]) + 4 * 64 * 4 + (
        (convolutions == 1) * dense["conv"] + (products == 1) * dense["linear"]
    )


def test_kernel_shapes_are_those_that_the_space_uses() -> None:
    layer = layers()["strided"]
    x = correlated(layer, 2)
    kernel = kernel_of(layer, x, layer(x))
    assert saves(OutputFeatures(0.5), kernel)

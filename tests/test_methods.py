"""Layer methods: the contract that each must keep, and what each promises besides."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from autocompress.deploy import deploy_layer, fold_norm
from autocompress.errors import UnsupportedModel
from autocompress.gram import Moments, output_statistics, unfold
from autocompress.graph import Graph, Group, trace
from autocompress.methods import (
    METHODS,
    ChannelPruning,
    LayerContext,
    LowRank,
    RateDistortion,
    StaticInt8,
    WeightQuant,
    handler_of,
)
from autocompress.methods.coding import Form, coded_bytes
from autocompress.methods.grids import weight_scale
from autocompress.methods.importance import l2_importance, taylor_importance
from autocompress.methods.pruning import obs_order, width_levels
from autocompress.methods.quantization import ActivationQuant, PackedWeight, pack_weight, quantizer_of
from autocompress.methods.rate import cheap_integers
from autocompress.results import ALL_FAMILIES
from autocompress.tasks import load_task
from autocompress.types import Kernel, MethodConfig
from tests import networks


def test_every_family_is_on_the_page_of_methods() -> None:
    page = (Path(__file__).parents[1] / "docs" / "methods.md").read_text(encoding="utf-8")
    assert [family for family in ALL_FAMILIES if f"`{family}`" not in page] == []


def correlated(layer: nn.Module, n: int = 40, seed: int = 0) -> Tensor:
    """Inputs whose channels depend on each other, as those of trained nets do."""
    generator = torch.Generator().manual_seed(seed)
    channels = layer.in_channels if isinstance(layer, nn.Conv2d) else layer.in_features
    hidden = torch.randn(n, 3, 6, 6, generator=generator).relu()
    mixed = torch.einsum("nkhw,ck->nchw", hidden, torch.randn(channels, 3, generator=generator))
    mixed = mixed + 0.1 * torch.randn(n, channels, 6, 6, generator=generator)
    return mixed if isinstance(layer, nn.Conv2d) else mixed.mean((2, 3)) + 0.3


def gram_of(layer: nn.Module, x: Tensor) -> Tensor:
    moments = Moments()
    moments.add(unfold(layer, x))
    return moments.gram


def layers() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {
        "linear": nn.Linear(20, 14),
        "conv": nn.Conv2d(10, 12, 3, padding=1),
        "strided": nn.Conv2d(10, 12, 3, stride=2, padding=1, bias=False),
        "wide": nn.Conv2d(6, 8, (5, 3), padding=(2, 1), dilation=(1, 1)),
        "dilated": nn.Conv2d(10, 8, 3, padding=2, dilation=2),
        "pointwise": nn.Conv2d(16, 12, 1),
    }


def kernel_of(layer: nn.Module, x: Tensor, y: Tensor) -> Kernel:
    if isinstance(layer, nn.Conv2d):
        size, stride = (layer.kernel_size[0], layer.kernel_size[1]), (layer.stride[0], layer.stride[1])
        return Kernel("conv", tuple(x.shape[1:]), tuple(y.shape[1:]), size, stride, layer.groups)
    return Kernel("linear", tuple(x.shape[1:]), tuple(y.shape[1:]))


class MethodContract:
    """What every layer method keeps; a new method inherits the class and names its config."""

    configs: tuple[MethodConfig, ...] = ()

    @pytest.fixture(params=list(layers()))
    def layer(self, request: pytest.FixtureRequest) -> nn.Module:
        return layers()[request.param]

    def test_is_registered_and_frozen(self) -> None:
        for config in self.configs:
            assert type(config) in [METHODS[name] for name in METHODS]
            assert config.describe() and config.exports in ("onnx", "simulated")
            assert config.to_json()["method"] == type(config).__name__
            assert hash(config) == hash(copy.deepcopy(config))

    def test_the_kernels_are_those_of_the_module(self, layer: nn.Module) -> None:
        """``lower`` against what really runs in ``apply``'s module: shapes and MACs, kernel by kernel."""
        x = correlated(layer, 2)
        for config in self.configs:
            handler = handler_of(config)
            assert handler is not None
            made = handler.apply(config, copy.deepcopy(layer), LayerContext(gram_of(layer, correlated(layer))))
            kernels = handler.lower(config, kernel_of(layer, x, layer(x)))
            ran: list[tuple[tuple[int, ...], tuple[int, ...], int]] = []

            def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
                macs = output[0].numel() * module.weight[0].numel()
                ran.append((tuple(inputs[0].shape[1:]), tuple(output.shape[1:]), macs))  # noqa: B023

            parts = [part for part in made.modules() if isinstance(part, nn.Conv2d | nn.Linear)]
            for part in parts:
                part.register_forward_hook(note)
            made(x)
            assert ran == [(k.in_shape, k.out_shape, k.macs) for k in kernels]
            assert sum(p.weight.numel() for p in parts) == sum(k.weights for k in kernels)

    def test_shape_bias_and_the_original_stay(self, layer: nn.Module) -> None:
        before = copy.deepcopy(layer.state_dict())
        for config in self.configs:
            made = handler_of(config).apply(config, copy.deepcopy(layer), LayerContext(None))  # type: ignore[union-attr]
            x = correlated(layer, 3)
            assert made(x).shape == layer(x).shape
            last = list(made)[-1] if isinstance(made, nn.Sequential) else made
            assert (last.bias is None) == (layer.bias is None)
        for name, tensor in layer.state_dict().items():
            assert torch.equal(tensor, before[name])

    def test_other_modules_are_refused(self) -> None:
        for config in self.configs:
            with pytest.raises(UnsupportedModel):
                handler_of(config).apply(config, nn.BatchNorm2d(4), LayerContext(None))  # type: ignore[union-attr]


class TestLowRank(MethodContract):
    configs = (LowRank(0.5), LowRank(0.25))

    @torch.no_grad()
    def test_full_rank_is_the_layer(self, layer: nn.Module) -> None:
        x = correlated(layer)
        for gram in (None, gram_of(layer, x)):
            for split in ("channel", "spatial") if isinstance(layer, nn.Conv2d) else ("channel",):
                made = handler_of(LowRank(99.0)).apply(LowRank(99.0, split), layer, LayerContext(gram))  # type: ignore
                difference = float((made(x) - layer(x)).abs().max() / layer(x).abs().max())
                assert difference < 2e-4, (split, gram is not None)

    @pytest.mark.parametrize("split", ["channel", "spatial"])
    def test_the_data_aware_factors_are_never_worse_on_the_data(self, layer: nn.Module, split: str) -> None:
        """Output error with the Gram matrix <= plain SVD's, on the inputs that the Gram matrix is of."""
        if split == "spatial" and not isinstance(layer, nn.Conv2d):
            pytest.skip("linear layers have no spatial split")
        x = correlated(layer)
        gram = gram_of(layer, x)
        for ratio in (0.2, 0.4, 0.7):
            config = LowRank(ratio, split)  # type: ignore[arg-type]
            errors = [
                float((handler_of(config).apply(config, layer, LayerContext(g))(x) - layer(x)).pow(2).sum().detach())  # type: ignore
                for g in (gram, None)
            ]
            assert errors[0] <= errors[1] * (1 + 1e-3)

    def test_a_singular_gram_is_no_obstacle(self, layer: nn.Module) -> None:
        x = correlated(layer, 2)
        x[:, 1:] = 0  # dead channels, fewer rows than columns
        gram = gram_of(layer, x).float()  # as it is read from disk
        config = LowRank(0.5)
        errors = []
        for g in (gram, None):
            made = handler_of(config).apply(config, layer, LayerContext(g))  # type: ignore[union-attr]
            assert torch.isfinite(made(x)).all()
            errors.append(float((made(x) - layer(x)).pow(2).sum().detach()))
        assert errors[0] <= 0.7 * errors[1]  # what is alive is what the factors are for

    def test_zero_weights(self) -> None:
        layer = nn.Linear(8, 6)
        nn.init.zeros_(layer.weight)
        x = correlated(layer)
        made = handler_of(LowRank(0.5)).apply(LowRank(0.5), layer, LayerContext(gram_of(layer, x)))  # type: ignore
        torch.testing.assert_close(made(x), layer(x))

    @given(
        ratio=st.floats(0.01, 2.0), n_out=st.integers(1, 300), n_in=st.integers(1, 300),
        size=st.tuples(st.integers(1, 7), st.integers(1, 7)), split=st.sampled_from(["channel", "spatial"]),
    )  # fmt: skip
    def test_the_rank_keeps_to_the_ratio(
        self, ratio: float, n_out: int, n_in: int, size: tuple[int, int], split: str
    ) -> None:
        rank = LowRank(ratio, split).rank(n_out, n_in, size)  # type: ignore[arg-type]
        kh, kw = size
        rows, columns = (n_in * kh, n_out * kw) if split == "spatial" else (n_in * kh * kw, n_out)
        assert 1 <= rank <= min(rows, columns)
        allowed = ratio * n_out * n_in * kh * kw
        assert rank == 1 or rank * (rows + columns) <= allowed + 1e-6
        assert rank == min(rows, columns) or (rank + 1) * (rows + columns) > allowed - 1e-6

    def test_grouped_convolutions_are_refused(self) -> None:
        with pytest.raises(UnsupportedModel, match="low-rank form"):
            handler_of(LowRank(0.5)).apply(LowRank(0.5), nn.Conv2d(8, 8, 3, groups=8), LayerContext(None))  # type: ignore
        with pytest.raises(UnsupportedModel, match="'same'.*pixels"):
            handler_of(LowRank(0.5)).apply(LowRank(0.5), nn.Conv2d(8, 8, 3, padding="same"), LayerContext(None))  # type: ignore


class TestWeightQuant(MethodContract):
    configs = (WeightQuant(8), WeightQuant(4), WeightQuant(4, 4), WeightQuant(4, 32))

    @settings(deadline=None)
    @given(
        seed=st.integers(0, 10**6), bits=st.sampled_from([4, 8]), group=st.sampled_from([0, 3, 4, 32]),
        conv=st.booleans(), magnitude=st.floats(1e-6, 1e6),
    )  # fmt: skip
    def test_rounding_is_idempotent_and_within_half_a_step(
        self, seed: int, bits: int, group: int, conv: bool, magnitude: float
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        weight = magnitude * torch.randn((5, 10, 3, 3) if conv else (5, 10), generator=generator)
        packed = pack_weight(weight, bits, group)
        once = packed.dequantize()
        again = pack_weight(once, bits, group)
        assert torch.equal(again.integers, packed.integers)
        torch.testing.assert_close(again.dequantize(), once, rtol=1e-6, atol=0)
        step = (PackedWeight(torch.ones_like(packed.integers), packed.scale, bits, group)).dequantize()
        assert bool(((once - weight).abs() <= step * 0.5001).all())
        assert int(packed.integers.abs().max()) <= 2 ** (bits - 1) - 1

    @pytest.mark.parametrize("bits", [4, 8])
    def test_scales_commute_with_folding_a_norm(self, bits: int) -> None:
        """Rounding the live weight and folding equals folding and rounding, also with negative factors."""
        torch.manual_seed(0)
        conv, norm = nn.Conv2d(6, 8, 3, bias=False), nn.BatchNorm2d(8).eval()
        nn.init.normal_(norm.weight)
        nn.init.uniform_(norm.running_var, 0.1, 3.0)
        folded, _ = fold_norm(conv.weight, None, norm)
        rounded, _ = fold_norm(pack_weight(conv.weight, bits).dequantize(), None, norm)
        torch.testing.assert_close(pack_weight(folded, bits).dequantize(), rounded, rtol=1e-4, atol=1e-6)

    def test_zero_channels_and_blocks(self) -> None:
        weight = torch.zeros(3, 8)
        weight[0, 0] = 2.0
        for group in (0, 4):
            scale = weight_scale(weight, 4, group)
            assert torch.isfinite(scale).all() and bool((scale > 0).all())
            assert torch.equal(pack_weight(weight, 4, group).dequantize(), weight)

    def test_the_gradient_goes_straight_through(self) -> None:
        layer = handler_of(WeightQuant(4)).apply(WeightQuant(4), nn.Linear(4, 3), LayerContext(None))  # type: ignore
        layer(torch.ones(2, 4)).sum().backward()
        raw = layer.parametrizations["weight"].original  # type: ignore[index,union-attr]
        assert torch.equal(raw.grad, torch.full((3, 4), 2.0))
        assert quantizer_of(layer).bits == 4 and quantizer_of(nn.Linear(2, 2)) is None  # type: ignore[union-attr]


class TestRateDistortion(MethodContract):
    configs = (RateDistortion(15), RateDistortion(3, 0.3))

    def test_no_slope_is_rounding_to_nearest(self, layer: nn.Module) -> None:
        weight = layer.weight.detach()  # type: ignore[union-attr]
        scale = weight.flatten(1).abs().amax(1, keepdim=True) / 7
        assert torch.equal(cheap_integers(weight, 7, 0.0), (weight.flatten(1) / scale).round().to(torch.int8))

    def test_zeros_channels_of_zeros_and_the_largest_stay(self) -> None:
        weight = torch.randn(9, 20).half().T.contiguous().T  # neither float nor contiguous
        weight[3] = 0
        found = cheap_integers(weight, 7, 5.0)
        assert bool((found[3] == 0).all())
        largest = weight.abs().argmax(1)
        assert all(abs(int(found[i, j])) == 7 for i, j in enumerate(largest.tolist()) if i != 3)

    def test_inputs_that_matter_keep_their_weights(self) -> None:
        weight, importance = torch.randn(40, 60), torch.full((60,), 1e-3)
        importance[::2] = 1.0
        kept = (cheap_integers(weight, 3, 0.5, importance) != 0).float().mean(0)
        assert kept[::2].mean() > kept[1::2].mean() + 0.1

    def test_it_takes_fewer_bits_than_rounding_and_zstd_at_equal_error(self) -> None:
        """Trained weights: below the line through rounding to 5 and to 7 values, and below zstd on the same integers."""
        weights = [t for t in load_task("digits").model.state_dict().values() if t.ndim == 4 and len(t) > 8]

        def measured(steps: int, slope: float) -> tuple[float, float, float]:
            """Bits a weight, those of zstd, and the logarithm of the squared error."""
            bits = zstd = error = numbers = 0.0
            for weight in weights:
                scale = weight.flatten(1).abs().amax(1, keepdim=True) / steps
                q = cheap_integers(weight, steps, slope)
                data = q.numpy().tobytes()
                bits += 8 * coded_bytes(data, Form("integer", 1, tuple(q.shape)))
                zstd += 8 * len(zstandard.ZstdCompressor(level=19).compress(data))
                error += float((q * scale - weight.flatten(1)).pow(2).sum())
                numbers += q.numel()
            return bits / numbers, zstd / numbers, float(np.log(error))

        (low, _, worse), (high, _, better) = measured(2, 0.0), measured(3, 0.0)
        bits, zstd, error = measured(3, 0.15)
        at_equal_error = low + (high - low) * (worse - error) / (worse - better)
        assert better < error < worse
        assert bits < at_equal_error - 0.02 and bits < 0.97 * zstd

    def test_what_is_deployed_is_what_is_live_and_training_keeps_it_cheap(self) -> None:
        layer = layers()["conv"]
        handler_of(RateDistortion(3)).apply(RateDistortion(3), layer, LayerContext(None))  # type: ignore[union-attr]
        handler_of(WeightQuant(8)).apply(WeightQuant(8), layer, LayerContext(None))  # type: ignore[union-attr]
        norm = nn.BatchNorm2d(12).eval()
        nn.init.uniform_(norm.running_var, 0.1, 3.0)  # type: ignore[arg-type]
        nn.init.normal_(norm.weight)
        x = correlated(layer, 3)
        for _ in range(3):  # a step of training between
            made = deploy_layer(layer, norm, None)
            torch.testing.assert_close(made(x), norm(layer(x)), rtol=1e-4, atol=1e-5)
            assert all(len(row.unique()) <= 7 for row in made.packed.integers)  # type: ignore[union-attr]
            raw = layer.parametrizations["weight"].original  # type: ignore[index,union-attr]
            layer(x).pow(2).sum().backward()
            with torch.no_grad():
                raw.sub_(1e-4 * raw.grad)
            raw.grad = None


class TestStaticInt8(MethodContract):
    configs = (StaticInt8(),)

    @given(low=st.floats(-1e4, 0), high=st.floats(0, 1e4))
    def test_activation_grids_hold_zero_and_the_range(self, low: float, high: float) -> None:
        grid = ActivationQuant(low, high)
        x = torch.linspace(low, high, 101)
        y = grid(x)
        assert float(grid(torch.zeros(1))) == 0.0
        assert torch.equal(grid(y), y)
        assert float((y - x).abs().max()) <= grid.scale * 1.01

    def test_composes_with_low_rank(self) -> None:
        layer = layers()["conv"]
        made = handler_of(LowRank(0.5)).apply(LowRank(0.5), layer, LayerContext(None))  # type: ignore[union-attr]
        made = handler_of(StaticInt8()).apply(StaticInt8(), made, LayerContext(None))  # type: ignore[union-attr]
        assert isinstance(made, nn.Sequential)
        assert all(quantizer_of(part).activations for part in made)  # type: ignore[union-attr]


# ---------------------------------------------------------------- channel pruning


@given(width=st.integers(1, 600))
def test_widths_are_nested_and_never_empty(width: int) -> None:
    levels = width_levels(width, "l2")
    keeps = [step.keep for level in levels for step in level.steps if isinstance(step, ChannelPruning)]
    assert levels[0].steps == () and all(0 < keep < width for keep in keeps)
    assert keeps == sorted(set(keeps), reverse=True)
    assert all(keep % 4 == 0 for keep in keeps if width >= 4)


def small() -> tuple[Graph, Group]:
    """Conv (3 -> 5), ReLU, conv (5 -> 4)."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.ReLU(), nn.Conv2d(5, 4, 3, padding=1), nn.Flatten())
    graph = trace(model, networks.images(1))
    (group,) = graph.groups
    return graph, group


def test_l2_is_the_scaled_sum_of_norms_by_hand() -> None:
    graph, group = small()
    first, second = (graph.module.get_submodule(name).weight.double() for name in ("0", "2"))
    made = first.pow(2).sum((1, 2, 3))
    read = second.pow(2).sum((0, 2, 3))
    want = made / made.mean() + read / read.mean()
    np.testing.assert_allclose(l2_importance(graph, group), want.detach().numpy(), rtol=1e-6)


def test_obs_removes_what_brute_force_removes() -> None:
    """At each step the channel whose removal, with the best refit of all others, costs the least output error."""
    graph, group = small()
    x = networks.images(64, 3)
    with torch.no_grad():
        inputs = graph.module.get_submodule("0")(x).relu()
    conv = graph.module.get_submodule("2")
    rows = unfold(conv, inputs).double()
    target = rows @ torch.cat([conv.weight.flatten(1), conv.bias[:, None]], 1).double().T  # type: ignore[operator,index]

    def error(kept: list[int]) -> float:
        columns = [c * 9 + k for c in kept for k in range(9)] + [45]
        a = rows[:, columns]
        return float((a @ torch.linalg.lstsq(a, target, driver="gelsd").solution - target).pow(2).sum())

    alive, removed = list(range(5)), []
    while len(alive) > 1:
        worst = min(alive, key=lambda c: error([a for a in alive if a != c]))
        alive.remove(worst)
        removed.append(worst)
    gram = gram_of(conv, inputs)
    order = obs_order(graph, group, lambda n: (conv.weight, conv.bias), lambda n: gram, ridge=1e-9)  # type: ignore
    assert order.tolist() == alive + removed[::-1]


def test_obs_without_grams_is_l2() -> None:
    graph, group = small()
    order = obs_order(graph, group, lambda n: (torch.zeros(1), torch.zeros(1)), lambda n: None)
    assert order.tolist() == np.argsort(-l2_importance(graph, group), kind="stable").tolist()


def test_taylor_is_the_squared_first_order_change() -> None:
    """Against finite differences of a gate at the reading layer's input, one example at a time."""
    graph, group = small()
    x, targets = networks.images(3, 5), torch.tensor([0, 7, 100])
    loss = nn.CrossEntropyLoss()
    scores = taylor_importance(graph, [group], [(x, targets)], loss)[group.name]
    model = copy.deepcopy(graph.module).double()
    second = model.get_submodule("2")
    want = np.zeros(5)
    for i, channel in itertools.product(range(3), range(5)):
        values = []
        for gate in (1 + 1e-4, 1 - 1e-4):

            def scale(_: nn.Module, inputs: tuple[Tensor, ...], gate: float = gate, c: int = channel) -> tuple[Tensor]:
                scaled = inputs[0].clone()
                scaled[:, c] *= gate
                return (scaled,)

            handle = second.register_forward_pre_hook(scale)
            with torch.no_grad():
                values.append(float(loss(model(x[i : i + 1].double()), targets[i : i + 1])))
            handle.remove()
        want[channel] += ((values[0] - values[1]) / 2e-4) ** 2
    position = {int(c): k for k, c in enumerate(group.classes)}
    mine = [want[j] for j in sorted(range(5), key=lambda j: position[int(graph.layers["2"].inputs[j])])]
    np.testing.assert_allclose(scores, mine, rtol=1e-3)


def test_output_statistics_are_those_of_the_outputs() -> None:
    layer = layers()["conv"]
    x = correlated(layer)
    mean, variance = output_statistics(layer.weight.flatten(1), gram_of(layer, x))
    y = layer(x) - layer.bias[:, None, None]  # type: ignore[index]
    torch.testing.assert_close(mean, y.mean((0, 2, 3)), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(variance, y.var((0, 2, 3), correction=0), rtol=1e-3, atol=1e-3)

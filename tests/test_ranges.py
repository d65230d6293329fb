"""Ranges of quantized tensors: each choice against what it minimizes, and one range from the search to the file."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor

from autocompress.database import LevelDatabase
from autocompress.deploy import deploy
from autocompress.errors import UsageError
from autocompress.export import export_onnx
from autocompress.finish import finish
from autocompress.graph import trace
from autocompress.methods import CalibratedInt8, StaticInt8
from autocompress.methods.quantization import ActivationQuant, Ranges
from autocompress.methods.ranges import BINS, LEVELS, SHARES, RangeObserver, least_divergence, least_squares
from autocompress.space import make_space
from autocompress.stitched import Stitched
from tests import networks
from tests.test_methods import MethodContract

CHOSEN: tuple[Ranges, ...] = ("percentile", "mse", "entropy")


class TestCalibratedInt8(MethodContract):
    configs = tuple(CalibratedInt8(by) for by in CHOSEN)


def tailed(n: int = 20_000) -> Tensor:
    """A bell with a few values far outside, as activations have them."""
    x = torch.randn(n, generator=torch.Generator().manual_seed(0))
    x[:1], x[1:2] = 40.0, -25.0
    return x


def observed(by: Ranges, *batches: Tensor) -> tuple[float, float]:
    observer = RangeObserver(by)
    for batch in batches:
        assert observer(batch) is batch
    return observer.range()


def rounding_error(x: Tensor, ends: tuple[float, float]) -> float:
    return float((ActivationQuant(*ends)(x) - x).square().sum())


def test_extremes_are_exact_and_the_others_lie_within() -> None:
    x = tailed()
    assert observed("minmax", x[:9000], x[9000:]) == (-25.0, 40.0)
    for by in CHOSEN:
        low, high = observed(by, x[:9000], x[9000:])
        assert -25.0 <= low < 0 < high <= 40.0
        assert by != "percentile" or (low > -25.0 and high < 40.0)
        assert observed(by, x[:9000], x[9000:]) == (low, high)


def test_the_percentile_leaves_out_one_in_ten_thousand() -> None:
    values = torch.linspace(-1, 3, 16_001)
    low, high = observed("percentile", values)
    assert low == pytest.approx(-1 + 4e-4, abs=1e-5) and high == pytest.approx(3 - 4e-4, abs=1e-5)
    assert observed("percentile", torch.rand(1000) + 1.0)[0] == 0.0  # zero stays on the grid


def test_the_least_squares_are_the_least_of_all_shares() -> None:
    x = tailed()
    ends = observed("mse", x)
    sample = x[:: -(-len(x) // 2**14) | 1]
    errors = [rounding_error(sample, (-25.0 * share, 40.0 * share)) for share in SHARES]
    assert rounding_error(sample, ends) == pytest.approx(min(errors), rel=1e-6)
    flat = torch.linspace(-1, 1, 5001)
    assert observed("mse", flat) == (-1.0, 1.0)  # nothing is gained by clipping what is even
    many = torch.randn(2_000_000, generator=torch.Generator().manual_seed(1)).double().numpy()
    assert least_squares(many, -25.0, 40.0)[1] < 20.0


def test_entropy_clips_a_tail_and_keeps_what_is_even() -> None:
    values = tailed(200_000).double().numpy()
    low, high = least_divergence(values, -25.0, 40.0)
    assert high <= 0.5 * 40 and low == pytest.approx(-25 * high / 40)
    even = np.linspace(-1, 1, 200_001)
    assert least_divergence(even, -1.0, 1.0) == (-1.0, 1.0)
    assert BINS % LEVELS == 0


@pytest.mark.parametrize("by", get_args(Ranges))
def test_bad_input(by: Ranges) -> None:
    assert observed(by, torch.zeros(3, 4)) == (0.0, 0.0)
    assert observed(by) == (0.0, 0.0)
    low, high = observed(by, torch.full((1,), 5.0))
    assert low == 0.0 and 0 < high <= 5.0
    low, high = observed(by, torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last))
    assert low < 0 < high


@pytest.mark.slow
@pytest.mark.parametrize("family", ["int8", "int8-percentile", "int8-mse", "int8-entropy"])
def test_the_searched_range_is_the_files(family: str, tmp_path: Path) -> None:
    """Stitched model, the evaluator's programs, the refitted model and the file agree on every range."""
    task = networks.task("resnet-b", n=64)
    graph = trace(task.model, task.example_inputs)
    space = make_space(graph, ("channels", family))
    database = LevelDatabase(graph, space, task, tmp_path / "db")
    database.build()
    plan = tuple(1 for _ in space.sites)
    live = database.stitch(plan)
    grids = {n: part for n, part in live.named_modules() if isinstance(part, ActivationQuant)}
    nodes = database.quantized_nodes(plan)
    assert len(grids) == len(nodes) > 5
    ranges = Stitched(database, 8, 64)._calibrated(plan, frozenset(nodes))
    for node in nodes:
        again, grid = ActivationQuant(*ranges[node]), grids[f"quant_{node}"]
        assert again.scale == pytest.approx(grid.scale, rel=1e-4) and abs(again.zero_point - grid.zero_point) <= 1
    model = deploy(finish(database, plan))
    export_onnx(model, networks.images(8), tmp_path / "model.onnx", exporters=["legacy"])
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(str(tmp_path / "model.onnx")).graph.initializer}
    found = {n: part for n, part in model.named_modules() if isinstance(part, ActivationQuant)}
    for name, grid in found.items():
        assert stored[f"{name}.scale"] == np.float32(grid.scale)


def test_one_choice_a_search_and_all_are_int8() -> None:
    graph = trace(networks.network("resnet-b"), networks.images(1))
    with pytest.raises(UsageError, match="name one of int8, int8-mse"):
        make_space(graph, ("int8", "int8-mse"))
    assert all(isinstance(config, StaticInt8) for config in TestCalibratedInt8.configs)
    assert len({config.describe() for config in (*TestCalibratedInt8.configs, StaticInt8())}) == 4

"""Grids of weights: never worse with all codes, fixed points of rounding, exported to the number, told apart by their levels."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from autocompress.errors import UsageError
from autocompress.export import export_onnx
from autocompress.graph import trace
from autocompress.methods import LayerContext, WeightQuant, handler_of
from autocompress.methods.gptq import gptq
from autocompress.methods.grids import codes, weight_scale
from autocompress.methods.hessian import Hessian
from autocompress.methods.quantization import PackedWeight, pack_weight, quantizer_of
from autocompress.onnx_quant import stored_bits
from autocompress.recipe import Recipe
from autocompress.space import ROUNDED
from autocompress.trained import learn, settle, used_bits
from autocompress.types import Kernel, Level, Storage, digest
from tests.test_export import operators
from tests.test_gptq import error

CASES = given(
    seed=st.integers(0, 10**6), bits=st.sampled_from([2, 3, 4]), group=st.sampled_from([0, 3, 8, 32]),
    conv=st.booleans(), tail=st.booleans(), magnitude=st.floats(1e-6, 1e6),
)  # fmt: skip


def weight_of(seed: int, conv: bool, tail: bool, magnitude: float) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn((5, 10, 3, 3) if conv else (5, 40), generator=generator)
    return magnitude * (weight**3 if tail else weight + 0.3)


def squared(weight: Tensor, packed: PackedWeight) -> float:
    return float((weight.double() - packed.dequantize().double()).square().sum())


@settings(deadline=None, max_examples=50)
@CASES
def test_all_codes_are_never_worse_in_weights(
    seed: int, bits: int, group: int, conv: bool, tail: bool, magnitude: float
) -> None:
    weight = weight_of(seed, conv, tail, magnitude)
    narrow, full = pack_weight(weight, bits, group), pack_weight(weight, bits, group, grid="full")
    assert squared(weight, full) <= squared(weight, narrow) * (1 + 1e-5)
    searched = gptq(weight, bits, group)  # the narrow grid at its best
    assert squared(weight, full) <= squared(weight, searched) * (1 + 1e-5)
    low, top = codes(bits, "full")
    assert low <= int(full.integers.min()) and int(full.integers.max()) <= top
    assert full.scale.shape == weight_scale(weight, bits, group).shape


@settings(deadline=None, max_examples=50)
@CASES
def test_what_lies_on_a_full_grid_stays(
    seed: int, bits: int, group: int, conv: bool, tail: bool, magnitude: float
) -> None:
    """Also when its scales are searched again."""
    once = pack_weight(weight_of(seed, conv, tail, magnitude), bits, group, grid="full")
    same = pack_weight(once.dequantize(), bits, group, scale=once.scale, grid="full")
    assert torch.equal(same.integers, once.integers)
    again = pack_weight(once.dequantize(), bits, group, grid="full")
    torch.testing.assert_close(again.dequantize(), once.dequantize(), rtol=1e-5, atol=0)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10**6), bits=st.sampled_from([2, 3, 4]), group=st.sampled_from([0, 3, 8]))
def test_gptq_is_never_behind_the_nearest_step_in_outputs(seed: int, bits: int, group: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(200, 24, generator=generator) @ torch.randn(24, 24, generator=generator)
    x = torch.cat([x, torch.ones(200, 1)], 1).double()
    hessian, weight = Hessian(x.T @ x / 200, biased=False), torch.randn(6, 24, generator=generator)
    found = gptq(weight, bits, group, hessian, grid="full")
    nearest = error(hessian, weight, pack_weight(weight, bits, group, grid="full"))
    assert error(hessian, weight, found) <= nearest * (1 + 1e-9)
    low, top = codes(bits, "full")
    assert low <= int(found.integers.min()) and int(found.integers.max()) <= top
    assert torch.equal(
        pack_weight(found.dequantize(), bits, group, scale=found.scale, grid="full").integers, found.integers
    )


def test_the_lone_code_goes_where_weights_reach_further() -> None:
    weight = torch.tensor([[-2.0, -1.0, 0.0, 1.0], [2.0, 1.0, 0.0, -1.0], [0.0, 0.0, 0.0, 0.0]])
    packed = pack_weight(weight, 2, grid="full")
    torch.testing.assert_close(packed.dequantize(), weight)
    assert packed.scale[:2].sign().tolist() == [1.0, -1.0]
    assert packed.integers[:2].tolist() == [[-2, -1, 0, 1]] * 2
    assert used_bits(packed) == pytest.approx(2 * 2 / 3)  # the row of zeros needs none


def test_a_levels_hash_says_its_grid() -> None:
    """What was kept of levels with a grid of other codes is never found under theirs."""
    names = ("bits", "group", "by", "grid")
    assert tuple(field.name for field in fields(WeightQuant)) == names
    for steps in ROUNDED.values():
        for step in steps:
            before = {key: value for key, value in step.to_json().items() if key != "grid"}
            assert Level((step,)).hash != digest([before])
            assert step.grid == ("narrow" if step.bits == 8 else "full")
            if step.bits < 8:
                other = WeightQuant(step.bits, step.group, step.by)
                assert Level((step,)).hash != Level((other,)).hash and step.describe() != other.describe()
                kernel, dense = Kernel("linear", (64, 1), (32, 1)), Storage(64 * 32)
                assert step.store(kernel, dense) == other.store(kernel, dense)  # a sign takes no bits


def test_8_bits_have_no_full_grid() -> None:
    with pytest.raises(UsageError, match=r"-127\.\.127.*grid='narrow'"):
        WeightQuant(8, grid="full")


@pytest.mark.parametrize("words", ["scales", "bits"])
@pytest.mark.parametrize("group", [0, 4])
def test_a_trained_full_grid_begins_as_the_fixed_one_and_keeps_all_codes(words: str, group: int) -> None:
    torch.manual_seed(0)
    config = WeightQuant(2, group, grid="full")  # type: ignore[arg-type]
    layer = handler_of(config).apply(config, nn.Conv2d(6, 8, 3), LayerContext())  # type: ignore[union-attr]
    before = layer.weight.detach().clone()  # type: ignore[operator]
    learn(layer, Recipe.parse(words))
    torch.testing.assert_close(layer.weight, before, rtol=1e-5, atol=1e-6)
    raw, factor = layer.parametrizations["weight"].original, torch.linspace(-1, 2, 8)  # type: ignore[index,union-attr]
    during = quantizer_of(layer).pack(raw.detach() * factor.reshape(-1, 1, 1, 1), factor)  # type: ignore[operator,union-attr]
    settle(layer)
    step = quantizer_of(layer)
    assert step is not None and step.grid == "full"
    raw = layer.parametrizations["weight"].original  # type: ignore[index,union-attr]
    after = step.pack(raw.detach() * factor.reshape(-1, 1, 1, 1), factor)  # type: ignore[operator]
    assert int(after.integers.min()) == -2 and bool((after.scale < 0).any()) and bool((after.scale > 0).any())
    for packed in (during, after):
        folded = before * factor.reshape(-1, 1, 1, 1)
        torch.testing.assert_close(packed.dequantize(), folded, rtol=1e-5, atol=1e-6)


class Mixed(nn.Module):
    def __init__(self, bits: int, group: int) -> None:
        super().__init__()
        self.conv, self.wide, self.head = nn.Conv2d(3, 32, 3), nn.Linear(32 * 9, 48), nn.Linear(48, 10)
        for layer in (self.conv, self.wide, self.head):
            packed = pack_weight(layer.weight * 3, bits, group, grid="full")
            layer.packed, layer.weight.data = packed, packed.dequantize()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.wide(torch.relu(self.conv(x)).flatten(1))))


@pytest.mark.parametrize("group", [0, 32])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_file_computes_what_is_searched(bits: int, group: int, tmp_path: Path) -> None:
    """Signed scales and the lowest code: the same numbers in ONNX Runtime as DequantizeLinear and as MatMulNBits."""
    torch.manual_seed(bits)
    model, path = Mixed(bits, group).eval(), tmp_path / "m.onnx"
    x = torch.randn(32, 3, 5, 5)
    artifact = export_onnx(trace(model, x).module, x, path, exporters=["legacy"])
    assert artifact.coverage[f"w{bits}"] == {"expected": 3, "found": 3} and not artifact.missing
    assert operators(path)["MatMulNBits"] == 2
    tensors = {t.name: t for t in onnx.load(path).graph.initializer}
    for name in ("conv", "wide", "head"):
        packed = model.get_submodule(name).packed
        assert stored_bits(packed) == 4 and int(packed.integers.min()) == -(2 ** (bits - 1))  # type: ignore[arg-type,union-attr]
        scale = onnx.numpy_helper.to_array(tensors[f"{name}.weight_scale"])
        assert (scale < 0).any() and (scale > 0).any()
    with torch.no_grad():
        want = model(x).numpy()
    for level in (ort.GraphOptimizationLevel.ORT_DISABLE_ALL, ort.GraphOptimizationLevel.ORT_ENABLE_ALL):
        options = ort.SessionOptions()
        options.graph_optimization_level, options.intra_op_num_threads = level, 1
        # as floats: by default the kernel rounds activations to 8 bits, which has nothing to do with the grid
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
        session = ort.InferenceSession(path.read_bytes(), options, ["CPUExecutionProvider"])
        np.testing.assert_allclose(
            session.run(None, {"input": x.numpy()})[0], want, rtol=1e-4, atol=1e-5 * np.ptp(want)
        )

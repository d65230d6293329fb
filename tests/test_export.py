"""Export: what is written computes, stores and runs what the deployed torch model says."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, numpy_helper
from torch import Tensor, nn

from autocompress import export
from autocompress.errors import UnknownName, UnsupportedModel, UsageError, VerificationError
from autocompress.export import export_onnx
from autocompress.hwprofiles import exact_int8
from autocompress.methods.quantization import ActivationQuant, pack_weight
from autocompress.onnx_file import open_session, parity, sha256_of
from autocompress.onnx_quant import INTEGER_KERNELS, integer_tensor
from tests.deployed import LAYERS, deployed, examples, trace

MIXED = {"a": "int8", "b": "int8", "factors.0": "w4", "head": "w8"}
KINDS = ["float", "int8", "w8", "w4", "w4 by channel", MIXED]


def optimized(path: Path) -> onnx.ModelProto:
    open_session(path, optimization="fused", save=path.with_suffix(".opt.onnx"))
    return onnx.load(path.with_suffix(".opt.onnx"))


def operators(path: Path) -> Counter[str]:
    """Operators of the graph that ONNX Runtime really runs."""
    return Counter(node.op_type for node in optimized(path).graph.node)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_legacy_export_stores_and_runs_each_format(kind, tmp_path):
    path = tmp_path / "model.onnx"
    model = deployed(kind)
    artifact = export_onnx(model, examples(), path, exporters=["legacy"])
    wanted = Counter(dict.fromkeys(LAYERS, kind).values() if isinstance(kind, str) else kind.values())
    for family in ("int8", "w8", "w4"):
        n = wanted[family] + (wanted["w4 by channel"] if family == "w4" else 0)
        assert artifact.coverage.get(family, {"expected": 0, "found": 0}) == {"expected": n, "found": n}
    assert artifact.coverage["lowrank"] == {"expected": 1, "found": 1}
    assert list(artifact.missing) == (
        ["head"] if kind == "w4" else []
    )  # its blocks of 4 inputs are too small for the kernel
    assert artifact.sha256 == sha256_of(path)
    assert artifact.bytes == path.stat().st_size
    found = parity(model, path, examples(32, seed=3))
    assert found.on.relative <= found.tolerance
    assert found.off.relative <= found.tolerance


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["int8", "w4"])
def test_dynamo_export_is_quiet_and_the_first_choice(kind, tmp_path, capfd, recwarn):
    artifact = export_onnx(deployed(kind), examples(), tmp_path / "model.onnx")
    assert (artifact.exporter, artifact.fallback_reason) == ("dynamo", None)
    assert artifact.coverage[kind] == {"expected": 7, "found": 7}
    assert capfd.readouterr() == ("", "")
    assert not recwarn.list
    text = (tmp_path / "model.onnx").read_bytes()
    assert str(Path(__file__).parent).encode() not in text  # no stack traces of whoever exported


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_both_exporters_agree(kind, tmp_path):
    x = examples(16)
    outputs = []
    for exporter in ("dynamo", "legacy"):
        artifact = export_onnx(deployed(kind), x, tmp_path / f"{exporter}.onnx", exporters=[exporter])
        assert list(artifact.missing) == (["head"] if kind == "w4" else [])  # see above
        outputs.append(open_session(artifact.path).run(None, {"input": x.numpy()})[0])
    np.testing.assert_allclose(outputs[0], outputs[1], atol=1e-2 * np.ptp(outputs[0]))


def test_every_int8_layer_runs_on_integers_including_the_head(tmp_path):
    path = tmp_path / "model.onnx"
    export_onnx(deployed("int8"), examples(), path, exporters=["legacy"])
    found = operators(path)
    assert found["QLinearConv"] == 6
    assert found["QGemm"] == 1
    assert found["QLinearAdd"] == 1  # the residual sum, its ReLU folded into the grid
    assert not found["Conv"] + found["Gemm"] + found["Add"] + found["Relu"]


def test_float_layers_between_quantized_tensors_stay_float(tmp_path):
    """ONNX Runtime quantizes such a layer by itself, with one scale for the whole weight: the export prevents it."""
    path = tmp_path / "model.onnx"
    model = deployed({"stem": "int8", "b": "int8", "factors.0": "int8"})  # between them: a, with ReLU, and depthwise
    artifact = export_onnx(model, examples(), path, exporters=["legacy"])
    assert artifact.coverage["int8"] == {"expected": 3, "found": 3}
    assert artifact.missing == {}
    assert sum(operators(path)[op] for op in INTEGER_KERNELS) == 3
    # Without the shield it does happen: this test would notice if the runtime stopped doing it.
    proto = onnx.load(path)
    for node in [n for n in proto.graph.node if n.op_type == "LeakyRelu"]:
        for reader in proto.graph.node:
            for i, name in enumerate(reader.input):
                if name == node.output[0]:
                    reader.input[i] = node.input[0]
        proto.graph.node.remove(node)
    onnx.save(proto, path)
    assert sum(operators(path)[op] for op in INTEGER_KERNELS) > 3


@pytest.mark.parametrize("middle", ["int8", "w8", "float"])
def test_grids_travel_through_pooling_and_relu6(middle, tmp_path):
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q0, self.q1 = ActivationQuant(-3, 3), ActivationQuant(0, 3)
            self.q2, self.q3 = ActivationQuant(0, 2), ActivationQuant(0, 2)
            self.first, self.middle, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 10)
            self.relu6, self.pool = nn.ReLU6(), nn.MaxPool2d(2)
            for layer, bits in ((self.first, True), (self.middle, middle == "int8"), (self.last, True)):
                if layer is not self.middle or middle != "float":
                    layer.packed = pack_weight(layer.weight, 8, 0, activations=bits)
                    layer.weight.data = layer.packed.dequantize()

        def forward(self, x: Tensor) -> Tensor:
            x = self.pool(self.q1(self.relu6(self.first(self.q0(x)))))
            x = self.q2(self.relu6(self.middle(x)))
            return self.last(self.q3(torch.flatten(nn.functional.max_pool2d(x, 3), 1)))

    torch.manual_seed(0)
    path = tmp_path / "model.onnx"
    artifact = export_onnx(trace(Pooled()), examples(16), path, exporters=["legacy"])
    assert artifact.missing == {}
    assert artifact.coverage["int8"] == {"expected": 2 + (middle == "int8"), "found": 2 + (middle == "int8")}
    # An 8-bit weight between quantized tensors runs on integers by itself, on the grids that were searched.
    assert sum(operators(path)[op] for op in INTEGER_KERNELS) == (2 if middle == "float" else 3)


def test_files_shrink_with_their_weights(tmp_path):
    def size(kind):
        return export_onnx(deployed(kind), examples(), tmp_path / "model.onnx", exporters=["legacy"]).bytes

    weights = sum(p.numel() for n, p in deployed("float").named_parameters() if n.endswith("weight"))
    dense, w8, w4 = size("float"), size("w8"), size("w4 by channel")
    scales = 4 * 16 * len(LAYERS)
    assert dense - w8 == pytest.approx(3 * weights, abs=scales + 2500)  # names
    assert w8 - w4 == pytest.approx(weights / 2, abs=1500)


def test_all_forms_of_int8_mean_the_same(tmp_path):
    """Without optimizations any host computes them; those that this host computes exactly are exported and verified."""
    model, x = deployed("int8"), examples(32)
    outputs = {}
    for form in exact_int8():
        artifact = export_onnx(model, x, tmp_path / f"{form}.onnx", int8_format=form, exporters=["legacy"])
        outputs[form] = open_session(artifact.path, optimization="off").run(None, {"input": x.numpy()})[0]
        tensors = onnx.load(artifact.path).graph.initializer
        activations = {t.data_type for t in tensors if t.name.endswith(".zero_point")}
        weights = {t.data_type for t in tensors if t.name.endswith(("weight_int8", "weight_zero_point"))}
        types = {"u": {TensorProto.UINT8}, "s": {TensorProto.INT8}}
        assert (activations, weights) == (types[form[0]], types[form[2]])
        assert form == "s8s8" or not artifact.missing
    for found in outputs.values():
        np.testing.assert_allclose(found, outputs["u8u8"], atol=1e-2 * np.ptp(found))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["int8", "w8"])
def test_a_form_that_this_host_computes_wrong_is_never_handed_out(kind, tmp_path):
    """Large weights behind large activations saturate 16-bit sums where the processor lacks VNNI."""
    layer = nn.Conv2d(64, 8, 3, padding=1)
    with torch.no_grad():
        layer.weight.copy_(torch.where(layer.weight > 0, 1.0, -1.0))
        layer.weight[:, :32], layer.bias[:] = 1.0, 0.0
    layer.packed = pack_weight(layer.weight, 8, 0, kind == "int8")
    layer.weight = nn.Parameter(layer.packed.dequantize(), requires_grad=False)
    model = nn.Sequential(ActivationQuant(0.0, 1.0), layer, ActivationQuant(0.0, 400.0)).eval()
    x = torch.rand(8, 64, 6, 6, generator=torch.Generator().manual_seed(0)) * 0.2 + 0.8
    x *= torch.linspace(0.2, 1.0, 8)[:, None, None, None]
    for form in ("u8s8", "s8s8", "u8u8"):
        path = tmp_path / f"{form}.onnx"
        if form in exact_int8():
            assert export_onnx(model, x, path, int8_format=form).sha256 == sha256_of(path)
        else:
            with pytest.raises(VerificationError, match="differs from torch"):
                export_onnx(model, x, path, int8_format=form)
            assert not path.exists()


def test_batch_is_dynamic_and_one_example_suffices(tmp_path):
    artifact = export_onnx(deployed("int8"), examples(1), tmp_path / "model.onnx", exporters=["legacy"])
    session = open_session(artifact.path)
    for n in (1, 5):
        assert session.run(None, {"input": examples(n).numpy()})[0].shape == (n, 10)


def test_int4_packing_is_the_one_of_onnx():
    integers = np.arange(-7, 8, dtype=np.int8).reshape(3, 5)
    np.testing.assert_array_equal(numpy_helper.to_array(integer_tensor("w", integers, 4)).astype(np.int8), integers)


class Tokens(nn.Module):
    """A linear layer on (N, tokens, features): exporters write MatMul with a transposed weight."""

    def __init__(self, bits: int, group: int, activations: bool) -> None:
        super().__init__()
        self.quant = ActivationQuant(-3, 3) if activations else nn.Identity()
        self.linear = nn.Linear(32, 24)
        packed = pack_weight(self.linear.weight, bits, group, activations)
        self.linear.packed = packed
        self.linear.weight.data = packed.dequantize()

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.quant(x)).mean(1)


@pytest.mark.parametrize(
    ("settings", "operator"),
    [((8, 0, True), "MatMulIntegerToFloat"), ((4, 16, False), "MatMulNBits"), ((8, 0, False), "MatMulNBits")],
)
def test_linear_layers_on_tokens(settings, operator, tmp_path):
    torch.manual_seed(0)
    x = torch.randn(4, 7, 32).clamp(-3, 3)
    artifact = export_onnx(trace(Tokens(*settings)), x, tmp_path / "model.onnx", exporters=["legacy"])
    assert all(c["expected"] == c["found"] == 1 for c in artifact.coverage.values())
    assert operators(tmp_path / "model.onnx")[operator] == 1


def test_a_4_bit_linear_layer_runs_on_4_bits(tmp_path):
    torch.manual_seed(0)
    layer = nn.Linear(64, 24)
    layer.packed = pack_weight(layer.weight, 4, 32)
    layer.weight.data = layer.packed.dequantize()
    artifact = export_onnx(nn.Sequential(layer).eval(), torch.randn(16, 64), tmp_path / "m.onnx", exporters=["legacy"])
    assert artifact.opset == 21
    assert operators(tmp_path / "m.onnx")["MatMulNBits"] == 1


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("group", [0, 32, 128, 24])
def test_linear_weights_are_multiplied_as_they_are_stored(bits, group, tmp_path):
    """MatMulNBits for each layer, the integers' bytes in the file, and the reason where a layer is dequantized instead."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(96, 80), nn.ReLU(), nn.Linear(80, 48, bias=False), nn.ReLU(), nn.Linear(48, 10)
    ).eval()
    weights = scales = 0
    for layer in (model[0], model[2], model[4]):
        layer.packed = pack_weight(layer.weight, bits, group)
        layer.weight.data = layer.packed.dequantize()
        weights, scales = weights + layer.weight.numel(), scales + layer.packed.scale.numel()
    path, x = tmp_path / "m.onnx", torch.randn(16, 96)
    artifact = export_onnx(model, x, path, exporters=["legacy"])
    assert artifact.coverage[f"w{bits}"] == {"expected": 3, "found": 3}
    found = operators(path)
    if group == 24:
        assert found["MatMulNBits"] == 0 and found["DequantizeLinear"] == 3
        assert list(artifact.missing) == ["0", "2", "4"]
        assert "dequantized in every run; blocks are 16, 32" in artifact.missing["4"]
    else:
        assert found["MatMulNBits"] == 3 and not found["DequantizeLinear"] + found["Gemm"] + found["MatMul"]
        assert artifact.missing == {}
    stored = sum(len(t.raw_data) for t in onnx.load(path).graph.initializer if "weight_int" in t.name)
    assert stored == weights * bits // 8
    overhead = artifact.bytes - stored - 4 * scales - (scales if bits == 8 else 0) - 4 * 90
    assert 0 < overhead < 3000


@pytest.mark.parametrize("settings", [(8, 0), (4, 32)])
def test_a_linear_layer_that_runs_twice_is_right_and_says_that_it_is_dequantized(settings, tmp_path):
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(32, 32)
            self.linear.packed = pack_weight(self.linear.weight, *settings)
            self.linear.weight.data = self.linear.packed.dequantize()

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(torch.relu(self.linear(x)))

    torch.manual_seed(0)
    artifact = export_onnx(trace(Twice()), torch.randn(16, 32), tmp_path / "m.onnx", exporters=["legacy"])
    assert operators(tmp_path / "m.onnx")["Gemm"] + operators(tmp_path / "m.onnx")["FusedGemm"] == 2
    assert list(artifact.missing) == ["linear"] and artifact.coverage[f"w{settings[0]}"]["found"] == 1


def test_stored_weights_between_grids_run_on_integers(tmp_path):
    """There a Gemm is one integer kernel; taken apart it would not be."""

    class Between(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q1, self.q2, self.linear = ActivationQuant(-3, 3), ActivationQuant(-2, 2), nn.Linear(32, 32)
            self.linear.packed = pack_weight(self.linear.weight, 8)
            self.linear.weight.data = self.linear.packed.dequantize()

        def forward(self, x: Tensor) -> Tensor:
            return self.q2(self.linear(self.q1(x)))

    torch.manual_seed(0)
    artifact = export_onnx(trace(Between()), torch.randn(16, 32), tmp_path / "m.onnx", exporters=["legacy"])
    assert operators(tmp_path / "m.onnx")["QGemm"] == 1 and artifact.missing == {}


def test_one_layer_called_twice_keeps_one_weight_and_two_biases(tmp_path):
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q1, self.q2, self.q3 = ActivationQuant(-3, 3), ActivationQuant(0, 2.5), ActivationQuant(0, 1.5)
            self.conv = nn.Conv2d(3, 3, 3, padding=1)
            self.conv.packed = pack_weight(self.conv.weight, 8, 0, activations=True)
            self.conv.weight.data = self.conv.packed.dequantize()

        def forward(self, x: Tensor) -> Tensor:
            x = self.q2(torch.relu(self.conv(self.q1(x))))
            return self.q3(torch.relu(self.conv(x))).flatten(1)

    torch.manual_seed(0)
    export_onnx(trace(Twice()), examples(), tmp_path / "model.onnx", exporters=["legacy"])
    names = Counter(t.data_type for t in onnx.load(tmp_path / "model.onnx").graph.initializer)
    assert names[TensorProto.INT32] == 2  # two biases
    assert operators(tmp_path / "model.onnx")["QLinearConv"] == 2


def test_an_int8_convolution_without_quantized_output_is_reported_with_its_reason(tmp_path):
    model = deployed("int8")
    model.set_submodule("q_factors", nn.Identity())
    artifact = export_onnx(model, examples(), tmp_path / "model.onnx", exporters=["legacy"])
    assert artifact.coverage["int8"] == {"expected": 7, "found": 6}
    assert list(artifact.missing) == ["factors.1"]
    assert "output is not quantized" in artifact.missing["factors.1"]


def test_a_perturbed_graph_is_refused_and_nothing_is_written(tmp_path, monkeypatch):
    """The exporter's graph is damaged on its way: one weight's scales are a little off."""
    real = export.insert_quantization

    def damaged(proto, grids, int8_format):
        real(proto, grids, int8_format)
        for tensor in proto.graph.initializer:
            if tensor.name == "b.weight_scale":
                tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(1.01), tensor.name))

    monkeypatch.setattr(export, "insert_quantization", damaged)
    with pytest.raises(VerificationError, match="b.weight_scale .* not the one that was searched"):
        export_onnx(deployed("int8"), examples(), tmp_path / "model.onnx", exporters=["legacy"])
    assert not list(tmp_path.iterdir())


def test_weights_that_were_not_stored_as_integers_are_an_error(tmp_path, monkeypatch):
    real = export.insert_quantization

    def folded(proto, grids, int8_format):
        """What constant folding would do: the dequantized weight back in the file."""
        real(proto, grids, int8_format)
        node = next(n for n in proto.graph.node if n.name == "b.weight_dequantize")
        floats = grids.weights["b"].dequantize().numpy()
        proto.graph.initializer.append(numpy_helper.from_array(floats, node.output[0]))
        proto.graph.node.remove(node)
        for name in node.input:
            proto.graph.initializer.remove(next(t for t in proto.graph.initializer if t.name == name))

    monkeypatch.setattr(export, "insert_quantization", folded)
    with pytest.raises(VerificationError, match="not stored as integers: b;"):
        export_onnx(deployed("w8"), examples(), tmp_path / "model.onnx", exporters=["legacy"])


def test_legacy_is_the_recorded_fall_back(tmp_path, monkeypatch):
    def broken(model, inputs, opset):
        raise RuntimeError("no such operator")

    monkeypatch.setattr(export, "_dynamo", broken)
    artifact = export_onnx(deployed("float"), examples(), tmp_path / "model.onnx")
    assert artifact.exporter == "legacy"
    assert "no such operator" in artifact.fallback_reason


def test_a_graph_with_its_batch_written_into_it_is_refused(tmp_path):
    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.reshape(int(x.shape[0]), -1)[:, :4]

    with pytest.raises(VerificationError, match="batch size"):
        export_onnx(Fixed().eval(), examples(8), tmp_path / "model.onnx", exporters=["legacy"])
    assert not list(tmp_path.iterdir())


def test_when_both_exporters_fail_both_reasons_are_told(tmp_path):
    class Branches(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1) if float(x.sum()) > 0 else torch.linalg.matrix_exp(x[:, 0])

    with pytest.raises(UnsupportedModel, match="dynamo exporter cannot write .* legacy exporter cannot write"):
        export_onnx(Branches().eval(), -examples(8).abs(), tmp_path / "model.onnx")


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (lambda m: m.train(), UsageError, "eval mode"),
        (lambda m: m.get_submodule("a").weight.data.mul_(1.01), VerificationError, "pack it again"),
    ],
)
def test_models_that_are_not_deployed_are_refused(change, error, text, tmp_path):
    model = deployed("w8")
    change(model)
    with pytest.raises(error, match=text):
        export_onnx(model, examples(), tmp_path / "model.onnx")


def test_wrong_arguments_get_one_sentence(tmp_path):
    path = tmp_path / "model.onnx"
    with pytest.raises(UsageError, match="at least one example"):
        export_onnx(deployed(), examples()[:0], path)
    with pytest.raises(UsageError, match="opset 21, got 17"):
        export_onnx(deployed("w4"), examples(), path, opset=17)
    with pytest.raises(UnknownName, match="lowrank"):
        export_onnx(deployed(), examples(), path, expected={"low_rank": 1}, exporters=["legacy"])


def test_what_the_plan_expects_and_the_file_lacks_is_shown(tmp_path):
    artifact = export_onnx(
        deployed("float"), examples(), tmp_path / "m.onnx", expected={"lowrank": 3, "w8": 1}, exporters=["legacy"]
    )
    assert artifact.coverage["lowrank"] == {"expected": 3, "found": 1}
    assert artifact.coverage["w8"] == {"expected": 1, "found": 0}


def test_the_same_model_gives_the_same_bytes(tmp_path):
    hashes = {
        export_onnx(deployed("int8"), examples(), tmp_path / f"{i}.onnx", exporters=["legacy"]).sha256 for i in (0, 1)
    }
    assert len(hashes) == 1


def test_the_runtime_here_is_recent_enough():
    assert tuple(map(int, onnxruntime.__version__.split(".")[:2])) >= (1, 20)

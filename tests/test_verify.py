"""Verification: parity, intervals, budgets and the certificate, on real files in ONNX Runtime."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from autocompress.errors import UsageError, VerificationError
from autocompress.export import export_onnx
from autocompress.hwprofiles.bench import Comparison, compare
from autocompress.onnx_cost import count_macs, count_params, file_costs
from autocompress.onnx_file import difference, load_model
from autocompress.tasks.base import Split, Task
from autocompress.types import Budget
from autocompress.verify import (
    certify,
    check_budgets,
    check_model,
    mean_interval,
    ort_outputs,
    paired_interval,
    parity,
    quality,
    speed_statement,
    task_scores,
)
from tests.deployed import deployed, examples


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """The float and the int8 model, exported."""
    folder = tmp_path_factory.mktemp("files")
    for kind in ("float", "int8"):
        export_onnx(deployed(kind), examples(16), folder / f"{kind}.onnx", exporters=["legacy"])
    return {kind: folder / f"{kind}.onnx" for kind in ("float", "int8")}


@pytest.fixture(scope="module")
def task() -> Task:
    """The float model is asked to say what it says on clean images, on images with noise."""
    model = deployed("float")
    images = examples(300, seed=5)
    with torch.no_grad():
        targets = model(images).argmax(1)
    noisy = images + 0.3 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    split = Split(noisy, targets)
    return Task("noisy", model, calibration=split, search=split, report=split)


# ---------------------------------------------------------------- parity


def damaged(path: Path, folder: Path, name: str, factor: float) -> Path:
    """A copy of a file whose initializer ``name`` is multiplied by ``factor``."""
    model = onnx.load(path)
    for tensor in model.graph.initializer:
        if tensor.name == name:
            values = numpy_helper.to_array(tensor)
            tensor.CopyFrom(numpy_helper.from_array((values * factor).astype(values.dtype), name))
            onnx.save(model, folder / "damaged.onnx")
            return folder / "damaged.onnx"
    raise KeyError(name)


@pytest.mark.parametrize("kind", ["float", "int8"])
def test_parity_of_a_good_export(files, kind):
    found = parity(deployed(kind), files[kind], examples(32, seed=9))
    assert found.examples == 32
    assert min(found.on.agreement, found.off.agreement) > 0.9
    assert found.tolerance == 1e-4 if kind == "float" else found.tolerance >= 2e-2
    assert json.dumps(found.to_json())


@pytest.mark.parametrize(
    ("kind", "name", "factor"),
    [
        ("float", "a.weight", 1.01),
        ("float", "head.bias", 1.2),
        ("int8", "a.weight_scale", 1.001),
        ("int8", "q_a.scale", 1.001),
        ("int8", "factors.1.weight_int8", 0.9),
    ],
)
def test_a_damaged_file_is_found(files, tmp_path, kind, name, factor):
    text = r"differs from torch by .* allowed are" if kind == "float" else f"{name} .*not the one that was searched"
    with pytest.raises(VerificationError, match=text):
        parity(deployed(kind), damaged(files[kind], tmp_path, name, factor), examples(32))


def test_a_damaged_integer_bias_is_found_by_itself(files, tmp_path):
    with pytest.raises(VerificationError, match="bias of 'a' is more than half a step"):
        parity(deployed("int8"), damaged(files["int8"], tmp_path, "a.bias_int32", 1.01), examples(32))


def test_a_lost_quantization_is_found_in_the_outputs(files, tmp_path):
    """Nothing in the file is wrong, but one int8 layer is fed past its grid."""
    model = onnx.load(files["int8"])
    producer = {o: n for n in model.graph.node for o in n.output}
    conv = next(n for n in model.graph.node if n.name == "a")
    conv.input[0] = producer[producer[producer[conv.input[0]].input[0]].input[0]].input[0]  # before ReLU and its grid
    onnx.save(model, tmp_path / "past.onnx")
    with pytest.raises(VerificationError, match=r"differs from torch by .* allowed are"):
        parity(deployed("int8"), tmp_path / "past.onnx", examples(32))


def test_difference_by_hand():
    # less the column means (2, 1.5) torch's outputs are -2, .5, 2, -.5: a range of 4
    found = difference(np.array([[0.0, 2.0], [4.0, 1.0]]), np.array([[0.0, 2.5], [4.0, 5.0]]))
    assert (found.max_abs, found.relative, found.agreement) == (4.0, 1.0, 0.5)
    assert found.mean_relative == pytest.approx((0.5 + 4) / 4 / 4)
    assert math.isinf(difference(np.ones((1, 2)), np.array([[np.nan, 1.0]])).max_abs)


def test_a_model_that_answers_nan_is_refused(files):
    model = deployed("float")
    model.get_submodule("head").bias.data[0] = float("nan")
    with pytest.raises(VerificationError, match="differs"):
        parity(model, files["float"], examples(4))


# ---------------------------------------------------------------- intervals


def test_paired_interval_agrees_with_the_closed_form():
    rng = np.random.default_rng(0)
    original = rng.random(4000)
    compressed = original - 0.02 + 0.1 * rng.standard_normal(4000)
    drop, low, high = paired_interval(original, compressed, seed=1)
    gap = 100 * (original - compressed)
    half = 1.96 * gap.std() / math.sqrt(4000)
    assert drop == pytest.approx(gap.mean())
    assert low == pytest.approx(drop - half, abs=0.1 * half)
    assert high == pytest.approx(drop + half, abs=0.1 * half)


def test_pairing_is_what_makes_the_interval_narrow():
    hard = (np.random.default_rng(0).random(2000) < 0.3).astype(float)
    worse = hard.copy()
    worse[:10] = 1 - worse[:10]
    _, low, high = paired_interval(hard, worse)
    _, own_low, own_high = mean_interval(100 * hard)
    assert high - low < (own_high - own_low) / 3


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.floats(-10, 10), st.floats(-10, 10)), min_size=1, max_size=40),
    st.integers(0, 2**31),
    st.floats(0.5, 0.99),
)
def test_paired_interval_properties(pairs, seed, level):
    first, second = np.array(pairs).T
    drop, low, high = paired_interval(first, second, seed=seed, level=level)
    gap = 100 * (first - second)
    assert low <= high
    assert gap.min() - 1e-6 <= low
    assert high <= gap.max() + 1e-6
    assert drop == pytest.approx(gap.mean())
    assert paired_interval(first, second, seed=seed, level=level) == (drop, low, high)
    swapped = paired_interval(second, first, seed=seed, level=level)
    assert swapped == pytest.approx((-drop, -high, -low), abs=1e-6)
    wider = paired_interval(first, second, seed=seed, level=0.995)
    assert wider[1] <= low + 1e-9
    assert high <= wider[2] + 1e-9


@pytest.mark.parametrize(
    ("first", "second", "text"),
    [([1.0], [1.0, 2.0], "same examples"), ([], [], "at least one"), ([np.nan], [1.0], "finite")],
)
def test_intervals_refuse_what_makes_no_sense(first, second, text):
    with pytest.raises(UsageError, match=text):
        paired_interval(first, second)


# ---------------------------------------------------------------- accuracy and cost of files


def test_scores_of_a_file_are_those_of_its_model(files, task):
    with torch.no_grad():
        expected = task.score(task.model(task.inputs(task.report)), task.report.targets)
    np.testing.assert_array_equal(task_scores(files["float"], task), expected.numpy())


def test_quality_compares_pair_by_pair(files, task):
    found = quality(files["float"], files["int8"], task)
    assert found.examples == 300
    assert 0.3 < found.original[0] < 1  # noise makes it err: there is something to compare
    assert found.drop[0] == pytest.approx(100 * (found.original[0] - found.compressed[0]))
    assert found.drop[1] <= found.drop[0] <= found.drop[2]
    assert quality(None, files["int8"], task) == found
    lower = quality(files["float"], files["int8"], replace(task, higher_is_better=False, points=1.0))
    assert lower.drop[0] == pytest.approx(-found.drop[0] / 100)


def test_outputs_of_several_batches_are_stacked(files):
    x = examples(10).numpy()
    whole = ort_outputs(files["float"], [(x,)])
    np.testing.assert_allclose(ort_outputs(files["float"], [(x[:4],), (x[4:],)]), whole, atol=1e-6)
    with pytest.raises(UsageError, match="no batches"):
        ort_outputs(files["float"], [])


def reference_costs(model: nn.Module, x: Tensor) -> tuple[int, int]:
    """Multiply-accumulates of one example by hooks, and parameters."""
    macs = 0

    def count(layer: nn.Module, _: object, output: Tensor) -> None:
        nonlocal macs
        macs += output[0].numel() * layer.weight[0].numel()

    handles = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    model(x[:1])
    for handle in handles:
        handle.remove()
    return macs, sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("kind", ["float", "int8", "w4", "w8"])
def test_macs_and_params_are_counted_on_the_file(kind, tmp_path):
    model = deployed(kind)
    export_onnx(model, examples(), tmp_path / "model.onnx", exporters=["legacy"])
    macs, params = reference_costs(model, examples())
    costs = file_costs(tmp_path / "model.onnx")
    assert (costs["macs"], costs["params"]) == (macs, params)
    assert costs["size_mb"] == (tmp_path / "model.onnx").stat().st_size / 1e6


def test_costs_of_matrix_products():
    weight = numpy_helper.from_array(np.zeros((6, 5), np.float32), "w")
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"], "product")]
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", 7, k]) for n, k in (("x", 6), ("y", 5))]
    model = helper.make_model(helper.make_graph(nodes, "g", values[:1], values[1:], [weight]))
    assert (count_macs(model), count_params(model)) == (7 * 6 * 5, 30)


# ---------------------------------------------------------------- budgets


def budgets(*texts: str) -> list[Budget]:
    return [Budget.parse(text) for text in texts]


def test_budgets_are_held_against_measurements():
    checks = check_budgets(
        budgets("size_mb<=50%", "macs<=10", "latency_ms<=3@pixel3", "accuracy_drop<=1"),
        {"size_mb": 0.6, "macs": 9.0, "accuracy_drop": 1.5},
        {"size_mb": 1.0, "macs": 20.0},
    )
    assert [c.holds for c in checks] == [False, True, None, False]
    assert checks[0].limit == 0.5
    assert checks[0].sentence == "size_mb<=50% does not hold: 0.6 against a limit of 0.5 MB."
    assert "predicted" in checks[2].sentence


def test_check_model_measures_everything(files, task):
    asked = budgets(
        "size_mb<=60%", "latency_ms<=1000", "latency_ms<=1000%", "params<=1", "macs<=1G", "accuracy_drop<=50"
    )
    checks = check_model(files["int8"], asked, task=task, against=files["float"], seconds=0.2)
    assert [c.holds for c in checks] == [True, True, True, False, True, True]
    assert checks[1].measured > 0
    assert checks[0].measured == files["int8"].stat().st_size / 1e6


@pytest.mark.parametrize(
    ("budget", "text"),
    [
        ("size_mb<=50%", "relative and needs the original"),
        ("accuracy_drop<=1", "--task"),
        ("peak_mb<=1", "cannot be measured"),
        ("latency_ms<=1@pixel3", "cannot be measured"),
        ("weight_bits<=3", "no file stores all of it"),
    ],
)
def test_check_model_says_what_it_lacks(files, budget, text):
    with pytest.raises(UsageError, match=text):
        check_model(files["int8"], budgets(budget))


def test_files_that_are_not_onnx_get_one_sentence(files, tmp_path):
    whole = files["int8"].read_bytes()
    contents = {"missing": None, "empty": b"", "text": b"hello, I am a text", "cut": whole[: len(whole) // 2]}
    for name, content in contents.items():
        path = tmp_path / f"{name}.onnx"
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(UsageError, match=name) as caught:
            check_model(path, budgets("size_mb<=1"))
        assert "\n" not in str(caught.value)


def test_foreign_files_that_cannot_run_get_one_sentence(files, task, tmp_path):
    model = load_model(files["float"])
    model.graph.node[0].domain = "acme"
    model.opset_import.append(helper.make_opsetid("acme", 1))
    onnx.save(model, tmp_path / "foreign.onnx")
    with pytest.raises(UsageError, match="cannot load .*foreign"):
        check_model(tmp_path / "foreign.onnx", budgets("accuracy_drop<=1"), task=task)
    with pytest.raises(UsageError, match="cannot run the model on inputs"):
        ort_outputs(files["float"], [(np.zeros((1, 5), np.float32),)])
    with pytest.raises(UsageError, match="takes 1 inputs"):
        ort_outputs(files["float"], [(np.zeros((1, 5), np.float32),) * 2])


# ---------------------------------------------------------------- certificate


def test_the_certificate_says_what_was_measured(files, task, tmp_path):
    model = deployed("int8")
    artifact = export_onnx(model, examples(16), tmp_path / "model.onnx", exporters=["legacy"])
    speed = compare(tmp_path / "model.onnx", files["float"], seconds=0.2)
    certificate = certify(
        artifact,
        files["float"],
        parity=parity(model, artifact.path, examples(16)),
        quality=quality(files["float"], artifact.path, task),
        speed=speed,
        budgets=budgets("size_mb<=60%", "size_mb<=1%", "latency_ms<=1@pixel3"),
        hashes={"plan": "abc", "task": task.hash},
        replay="autocompress compress digits --budget 'size_mb<=60%'",
    )
    stored = json.loads((tmp_path / "certificate.json").read_text())
    assert stored == json.loads(json.dumps(certificate.to_json()))
    assert [b["holds"] for b in stored["budgets"]] == [True, False, None]
    assert not certificate.holds
    assert stored["holds"] is False
    assert stored["artifact"]["sha256"] == artifact.sha256
    assert stored["artifact"]["coverage"]["int8"] == {"expected": 7, "found": 7}
    assert stored["hashes"]["task"] == task.hash
    assert stored["replay"].startswith("autocompress compress")
    assert stored["environment"]["versions"]["torch"] == torch.__version__
    assert stored["quality"]["drop"] == list(certificate.quality.drop)
    assert stored["speed"]["ratio"] == speed.ratio
    assert stored["costs"]["original"]["params"] == stored["costs"]["compressed"]["params"]
    assert any(speed.verdict in sentence for sentence in stored["statements"])
    assert any("size_mb<=1% does not hold" in sentence for sentence in stored["statements"])
    Path(artifact.path).write_bytes(b"something else")
    with pytest.raises(UsageError, match="changed since it was exported"):
        certify(
            artifact, files["float"], parity=certificate.parity, quality=certificate.quality, speed=speed, budgets=[],
            hashes={}, replay="",
        )  # fmt: skip


def test_no_gain_in_speed_is_said_in_words():
    speed = Comparison(
        ratio=1.0, ratio_interval=(0.97, 1.03), noise=(0.98, 1.01), verdict="not measurably faster",
        candidate_p50_ms=2.0, candidate_p90_ms=2.1, baseline_p50_ms=2.0, baseline_p90_ms=2.1,
        rounds=10, threads=1, batch=1, seconds=1.0, seed=0,
    )  # fmt: skip
    assert speed_statement(speed) == (
        "The compressed model is 1.00x the original's speed (95% interval 0.97x to 1.03x, noise floor 2.0%): "
        "not measurably faster."
    )

"""Packing is lossless bit for bit, smaller than zstd, readable tensor by tensor, and says so when a file is damaged."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import zstandard
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save, save_file
from torch import Tensor
from typer.testing import CliRunner

from autocompress.cli import app
from autocompress.errors import AutoCompressError, UnknownName, UsageError
from autocompress.methods.coding import Form, Packed, coded_bytes, entropy, pack, pack_file, unpack, unpack_file
from autocompress.methods.coding.planes import code, decode
from autocompress.tasks import load_task

FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def raw(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def plain_zstd(data: bytes) -> int:
    return len(zstandard.ZstdCompressor(level=3).compress(data))


def trained(dtype: torch.dtype) -> dict[str, Tensor]:
    """Weights of the digits network, which the project trains itself."""
    state = load_task("digits").model.state_dict()
    return {name: t.to(dtype) for name, t in state.items() if t.is_floating_point()}


# ---------------------------------------------------------------- the entropy coder


@settings(deadline=None)
@given(
    n=st.integers(0, 3000), alphabet=st.sampled_from([2, 16, 256]), spread=st.floats(0.05, 60), seed=st.integers(0, 99)
)
def test_what_is_encoded_is_decoded(n: int, alphabet: int, spread: float, seed: int) -> None:
    values = np.abs(np.random.default_rng(seed).normal(0, spread, n)).astype(np.int64) % alphabet
    symbols = values.astype(np.uint8)
    assert np.array_equal(entropy.decode(entropy.encode(symbols, alphabet), n, alphabet), symbols)


@settings(deadline=None, max_examples=30)
@given(rows=st.integers(1, 40), columns=st.integers(1, 40), zeros=st.floats(0, 1), seed=st.integers(0, 99))
def test_matrices_by_their_neighbours(rows: int, columns: int, zeros: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = np.where(rng.random((rows, columns)) < zeros, 0, rng.integers(0, 256, (rows, columns))).astype(np.uint8)
    assert np.array_equal(entropy.decode_matrix(entropy.encode_matrix(values, 256), (rows, columns), 256), values)


def test_the_coder_is_near_the_entropy_and_neighbours_help_where_zeros_cluster() -> None:
    rng = np.random.default_rng(0)
    weights = np.round(rng.normal(size=(256, 512)) * 1.5).astype(np.int8).view(np.uint8)
    shares = np.bincount(weights.reshape(-1)) / weights.size
    bound = float(-(shares[shares > 0] * np.log2(shares[shares > 0])).sum()) * weights.size / 8
    assert bound < len(entropy.encode(weights, 256)) < 1.01 * bound
    clustered = weights * (rng.random((256, 1)) < 0.3)  # whole rows are zero
    assert len(entropy.encode_matrix(clustered, 256)) < 0.85 * len(entropy.encode(clustered, 256))


# ---------------------------------------------------------------- one tensor


@pytest.mark.parametrize("name", FLOATS)
def test_every_bit_pattern_of_a_float_survives(name: str) -> None:
    dtype = FLOATS[name]
    size = dtype.itemsize
    data = np.random.default_rng(0).integers(0, 256, size * 5000, np.uint8).tobytes()  # NaNs, infinities, subnormals
    special = raw(torch.tensor([0.0, -0.0, float("inf"), float("-inf"), float("nan"), 1e-40, -2.5], dtype=dtype))
    for bits in (data, special, b""):
        form = Form("float", size, (len(bits) // size,))
        assert decode(code(bits, form), form, len(bits)) == bits


@settings(deadline=None, max_examples=60)
@given(
    number=st.sampled_from(["float", "integer", "bytes"]), size=st.sampled_from([1, 2, 4, 8]),
    shape=st.lists(st.integers(0, 12), max_size=4), seed=st.integers(0, 9), top=st.sampled_from([0, 3, 255]),
)  # fmt: skip
@example(number="integer", size=1, shape=[9, 9], seed=0, top=3)
def test_any_tensor_survives(number: str, size: int, shape: list[int], seed: int, top: int) -> None:
    form = Form(number, size, tuple(shape))  # type: ignore[arg-type]
    n = int(np.prod(shape)) * size
    data = np.random.default_rng(seed).integers(0, top + 1, n, np.uint8).tobytes()
    assert decode(code(data, form), form, n) == data


@pytest.mark.parametrize("shape", [(16, 16), (9, 11), (5,)])
def test_nibbles_and_bytes_that_are_no_nibbles(shape: tuple[int, ...]) -> None:
    n = int(np.prod(shape))
    values = np.random.default_rng(0).integers(0, 4, n + n % 2).astype(np.uint8)
    values[n:] = 0
    packed = (values[0::2] | (values[1::2] << 4)).tobytes()
    form = Form("nibbles", 1, shape)
    assert decode(code(packed, form), form, len(packed)) == packed
    odd = packed[:-1] + bytes([255])  # bits where padding should be
    assert decode(code(odd, form), form, len(odd)) == odd
    if n > 200:
        assert coded_bytes(packed, form) < 0.6 * len(packed)  # 2 of 4 bits, less what counts cost


@pytest.mark.slow
@pytest.mark.parametrize("zeros", [0.0, 0.8])
def test_quantized_integers_are_smaller_than_by_zstd_and_by_bits(zeros: float) -> None:
    """4-bit integers of trained weights: below zstd on bytes, zstd on packed nibbles, and 4 bits each."""
    weight = max(trained(torch.float32).values(), key=Tensor.numel).flatten(1)
    weight = torch.where(weight.abs() < weight.abs().quantile(zeros), 0, weight)
    integers = (weight / weight.abs().amax(1, keepdim=True) * 7).round().to(torch.int8)
    plain = integers.numpy().tobytes()
    nibbles = ((integers[:, 0::2] & 15) | ((integers[:, 1::2] & 15) << 4)).to(torch.uint8).numpy().tobytes()
    found = coded_bytes(plain, Form("integer", 1, tuple(integers.shape)))
    assert found < (1.0 if zeros == 0 else 0.95) * min(plain_zstd(plain), plain_zstd(nibbles)) < len(nibbles)
    assert abs(found - coded_bytes(nibbles, Form("nibbles", 1, tuple(integers.shape)))) < 0.01 * found


# ---------------------------------------------------------------- trained weights


def shrunk(state: dict[str, Tensor]) -> tuple[float, float]:
    """Packed over plain zstd's bytes, and packed over the original's."""
    data = save(state)
    packed = pack(data, ".safetensors")
    assert unpack(packed) == data
    return len(packed) / plain_zstd(data), len(packed) / len(data)


def test_trained_weights_are_smaller_than_by_plain_zstd() -> None:
    """Measured: bf16 −15.1 % against zstd, fp32 −10.2 %: what is left is sign and mantissa, which are as good as random."""
    against, whole = shrunk(trained(torch.bfloat16))
    assert against < 0.86 and whole < 0.67
    against, whole = shrunk(trained(torch.float32))
    assert against < 0.91 and whole < 0.84
    wide, _ = shrunk({k: t.float() for k, t in trained(torch.bfloat16).items()})  # bf16 kept as fp32: half is zeros
    assert wide < 0.88


@pytest.mark.assets
def test_a_decoder_is_smaller_than_by_plain_zstd() -> None:
    """Measured on ``python_llama``: bf16 −16.1 % against zstd and −34 % in all, fp32 −10.7 % and −17.1 %.

    The bound by the entropy of each byte plane is −16.2 % and −10.9 %: 17 % less than zstd is not there to be had.
    """
    folder = next(f for f in os.environ["AUTOCOMPRESS_DATA"].split(":") if (Path(f) / "python_llama").is_dir())
    state = load_file(Path(folder) / "python_llama" / "model.safetensors")
    against, whole = shrunk({name: t.to(torch.bfloat16) for name, t in state.items()})
    assert against < 0.845 and whole < 0.665
    against, whole = shrunk(state)
    assert against < 0.9 and whole < 0.83


# ---------------------------------------------------------------- files


def onnx_bytes() -> bytes:
    """A small model with float, int8, int4, empty and scalar initializers, and a constant."""
    rng = np.random.default_rng(0)
    helper, kinds = onnx.helper, onnx.TensorProto
    nibbles = rng.integers(-3, 4, 256) & 15
    initializers = [
        onnx.numpy_helper.from_array(rng.normal(size=(64, 32)).astype(np.float32), "w"),
        onnx.numpy_helper.from_array(rng.integers(-4, 5, (32, 32)).astype(np.int8), "q"),
        helper.make_tensor(
            "q4", kinds.INT4, (16, 16), (nibbles[::2] | nibbles[1::2] << 4).astype(np.uint8).tobytes(), raw=True
        ),
        onnx.numpy_helper.from_array(np.float32(0.1), "scalar"),
        onnx.numpy_helper.from_array(np.zeros((64, 32), np.float32), "zeros"),
        helper.make_tensor("listed", kinds.FLOAT, (40,), rng.normal(size=40)),  # not as raw bytes
    ]
    constant = helper.make_node(
        "Constant", [], ["c"], value=onnx.numpy_helper.from_array(rng.normal(size=(64, 32)).astype(np.float32))
    )
    nodes = [constant, helper.make_node("Add", ["x", "w"], ["a"]), helper.make_node("Mul", ["a", "c"], ["y"])]
    ends = [helper.make_tensor_value_info(name, kinds.FLOAT, (64, 32)) for name in "xy"]
    model = helper.make_model(helper.make_graph(nodes, "g", ends[:1], ends[1:], initializers))
    return bytes(model.SerializeToString())


def test_an_onnx_file_comes_back_byte_for_byte(tmp_path: Path) -> None:
    source, packed, back = tmp_path / "m.onnx", tmp_path / "m.acpack", tmp_path / "back.onnx"
    source.write_bytes(onnx_bytes())
    done = pack_file(source, packed)
    assert done.packed_bytes == packed.stat().st_size < done.original_bytes == len(onnx_bytes())
    assert unpack_file(packed, back).sha256 == done.sha256
    assert back.read_bytes() == source.read_bytes()
    with Packed(packed) as opened:
        assert {"w", "q", "q4", "zeros", "c"} <= set(opened.names) and opened.kind == ".onnx"


def test_one_tensor_is_read_without_the_others(tmp_path: Path) -> None:
    state = {
        "first": torch.randn(200, 100),
        "second": torch.randn(50, 7).half(),
        "ids": torch.arange(9),
        "none": torch.zeros(0, 3),
    }
    save_file(state, tmp_path / "m.safetensors")
    pack_file(tmp_path / "m.safetensors", tmp_path / "m.acpack")
    data = bytearray((tmp_path / "m.acpack").read_bytes())
    with Packed(tmp_path / "m.acpack") as opened:
        for name, tensor in state.items():
            assert opened.tensor(name) == raw(tensor)
        assert opened.form("second") == ("F16", (50, 7))
        with pytest.raises(UnknownName, match="Did you mean 'first'"):
            opened.tensor("frist")
        at = next(e["at"] for e in opened._entries if e["name"] == "first")
    data[at + 5] ^= 1
    (tmp_path / "hurt.acpack").write_bytes(data)
    with Packed(tmp_path / "hurt.acpack") as opened:
        assert opened.tensor("second") == raw(state["second"])  # the damage lies elsewhere
        with pytest.raises(UsageError, match=r"damaged \(tensor 'first'"):
            opened.tensor("first")


@settings(deadline=None, max_examples=200)
@given(place=st.integers(0, 10**6), bit=st.integers(0, 7))
def test_no_flipped_bit_goes_unnoticed(place: int, bit: int) -> None:
    packed = bytearray(PACKED)
    packed[place % len(packed)] ^= 1 << bit
    with pytest.raises(AutoCompressError):
        unpack(bytes(packed))


PACKED = pack(onnx_bytes(), ".onnx")


@given(length=st.integers(0, len(PACKED) - 1))
def test_no_cut_goes_unnoticed(length: int) -> None:
    with pytest.raises(AutoCompressError):
        unpack(PACKED[:length])


# ---------------------------------------------------------------- the command line


def call(*args: object) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, [str(a) for a in args], prog_name="autocompress")
    return done.exit_code, done.stdout, done.stderr


def test_pack_and_unpack_verbs(tmp_path: Path) -> None:
    model = tmp_path / "model.onnx"
    model.write_bytes(onnx_bytes())
    code, stdout, stderr = call("pack", model, "--json")
    assert code == 0, stderr
    assert json.loads(stdout)["path"] == str(model) + ".acpack"
    code, stdout, _ = call("unpack", str(model) + ".acpack", "-o", tmp_path / "again.onnx")
    assert code == 0 and "SHA-256" in stdout
    assert (tmp_path / "again.onnx").read_bytes() == model.read_bytes()
    model.unlink()
    assert call("unpack", str(model) + ".acpack")[0] == 0 and model.read_bytes() == onnx_bytes()


def test_what_cannot_be_packed_is_refused_in_one_sentence(tmp_path: Path) -> None:
    model, packed, text = tmp_path / "m.onnx", tmp_path / "m.acpack", tmp_path / "notes.txt"
    model.write_bytes(onnx_bytes())
    text.write_text("no model")
    (tmp_path / "bad.onnx").write_bytes(b"no model")
    (tmp_path / "bad.safetensors").write_bytes(b"\xff" * 40)
    assert call("pack", model, "-o", packed)[0] == 0
    (tmp_path / "hurt.acpack").write_bytes(packed.read_bytes()[:-40])
    (tmp_path / "newer.acpack").write_bytes(packed.read_bytes()[:7] + b"\x09" + packed.read_bytes()[8:])
    out = tmp_path / "out"
    for args, words in [
        (("pack", model, "-o", packed), "exists already"),
        (("unpack", packed, "-o", model), "exists already"),
        (("pack", tmp_path / "nowhere.onnx"), "There is no file"),
        (("pack", text), "Only .onnx and .safetensors"),
        (("pack", tmp_path / "bad.onnx"), "not a valid ONNX"),
        (("pack", tmp_path / "bad.safetensors"), "not a valid safetensors"),
        (("unpack", model, "-o", out), "is no packed model"),
        (("unpack", tmp_path / "hurt.acpack", "-o", out), "is damaged"),
        (("unpack", tmp_path / "newer.acpack", "-o", out), "version 9"),
        (("unpack", text), "give one with -o"),
    ]:
        before = sorted(tmp_path.iterdir())
        code, stdout, stderr = call(*args)
        assert code == 2 and words in stderr and stdout == "" and len(stderr.strip().splitlines()) == 1, (args, stderr)
        assert sorted(tmp_path.iterdir()) == before


def test_weights_in_another_file_are_refused(tmp_path: Path) -> None:
    model = onnx.load_model_from_string(onnx_bytes())
    onnx.save_model(model, tmp_path / "m.onnx", save_as_external_data=True, size_threshold=0, location="m.bin")
    with pytest.raises(UsageError, match="lie in another; save it as one file"):
        pack_file(tmp_path / "m.onnx", tmp_path / "m.acpack")


def test_without_the_range_coder_zstd_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entropy, "stream", None)
    packed = pack(onnx_bytes(), ".onnx")
    assert unpack(packed) == onnx_bytes()
    with pytest.raises(UsageError, match="pip install constriction"):
        unpack(PACKED)

"""Profiles: real measurements of a few kernels, files that come back as they were, and predictions that keep order."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autocompress.errors import UnknownName, UsageError
from autocompress.hwprofiles import (
    Entry,
    HardwareProfile,
    Layout,
    compare,
    default_grid,
    exact_int8,
    fastest_int8,
    known_profiles,
    load_profile,
    measure_local,
    measure_ms,
    node_profile,
    noise_floor,
    save_profile,
)
from autocompress.hwprofiles.measure import measuring_order
from autocompress.hwprofiles.predict import Roofline
from autocompress.hwprofiles.probes import build_probe
from autocompress.hwprofiles.references import residual_network
from autocompress.types import Format, Kernel, LatencyModel


def conv(c_in: int, c_out: int, size: int = 8, **fields: Any) -> Kernel:
    return Kernel("conv", (c_in, size, size), (c_out, size, size), (3, 3), **fields)


def profile_of(entries: dict[Kernel, float], layout: Layout | None = None, **fields: Any) -> HardwareProfile:
    return HardwareProfile(
        name="made",
        device="a machine",
        runtime="onnxruntime",
        runtime_version="1",
        threads=1,
        batch=1,
        measured_at="2026-01-01T00:00:00+00:00",
        entries=tuple(Entry(k, ns, 0.01) for k, ns in entries.items()),
        layout=layout or Layout(),
        **fields,
    )


def roofline_entries(widths: tuple[int, ...] = (8, 16, 32, 64), size: int = 8) -> dict[Kernel, float]:
    """A device without cliffs: 2 µs and 0.02 ns a MAC."""
    return {conv(a, b, size): 2000 + 0.02 * conv(a, b, size).macs for a in widths for b in widths}


@pytest.fixture(scope="module")
def measured() -> HardwareProfile:
    kernels = [
        conv(16, 16, 16, fused="relu"),
        conv(32, 32, 16, fused="relu"),
        conv(64, 64, 16),
        conv(32, 32, 16, format="int8"),
        Kernel("add", (32, 16, 16), (32, 16, 16), format="int8", fused="relu", n_inputs=2),
        Kernel("add", (32, 16, 16), (32, 16, 16), fused="relu", n_inputs=2),
        Kernel("global_pool", (32, 16, 16), (32, 1, 1)),
        Kernel("linear", (64,), (10,)),
        Kernel("linear", (256,), (256,), format="w4"),
        Kernel("quantize", (3, 16, 16), (3, 16, 16)),
    ]
    seen: list[tuple[int, int]] = []
    profile = measure_local(kernels, seconds=3, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (len(kernels), len(kernels))
    return profile


class TestMeasured:
    def test_is_a_latency_model(self, measured: HardwareProfile) -> None:
        model: LatencyModel = measured
        assert model.name == "local"
        assert model.predict_ns([conv(16, 16, 16)]).dtype == np.int64

    def test_more_work_takes_longer(self, measured: HardwareProfile) -> None:
        small, large = measured.predict_ns([conv(16, 16, 16), conv(64, 64, 16)])
        assert 0 < 2 * small < large  # 16 times the MACs

    def test_every_kernel_asked_is_exact(self, measured: HardwareProfile) -> None:
        for entry in measured.entries:
            assert measured.predict_ns([entry.kernel])[0] == round(entry.ns)

    def test_a_relu_is_part_of_the_convolution(self, measured: HardwareProfile) -> None:
        plain, with_relu = measured.predict_ns([conv(32, 32, 16), conv(32, 32, 16, fused="relu")])
        assert plain == with_relu

    def test_says_how_it_was_measured(self, measured: HardwareProfile) -> None:
        assert measured.provenance == "measured"
        assert measured.runtime_version == ort.__version__
        assert measured.how["kernels_measured"] == len(measured.entries)
        assert measured.overhead_ns > 0 and measured.noise_floor >= 0
        assert set(measured.int8_evidence) == {"u8s8_ms", "s8s8_ms", "u8u8_ms", "float_ms"}
        assert measured.host["cpu"] and measured.layout.block in (1, 8, 16)

    def test_file_gives_the_same_profile(self, measured: HardwareProfile, tmp_path: Path) -> None:
        measured.save(tmp_path / "p.json")
        again = HardwareProfile.load(tmp_path / "p.json")
        assert again == measured and again.hash == measured.hash

    def test_names_what_it_never_saw(self, measured: HardwareProfile) -> None:
        unseen = Kernel("concat", (8, 4, 4), (16, 4, 4), n_inputs=2)
        assert measured.explains([unseen, conv(32, 32, 16)]) == {"concat float"}
        assert measured.predict_ns([unseen])[0] > 0

    def test_network_is_the_sum_of_its_kernels(self) -> None:
        """Coarse on purpose (a factor of two): a forgotten or doubled part would show, a busy host must not."""
        model, kernels = residual_network([(16, 16), (32, 32)], size=16)
        profile = measure_local(kernels, seconds=2)
        reference, _ = residual_network([(16, 16)], size=16)
        timing = measure_ms([model], reference, seconds=1)[0]
        predicted = (profile.predict_ns(kernels).sum() + profile.overhead_ns) / 1e6
        assert 0.5 < predicted / timing.ms < 2


@pytest.mark.parametrize("form", ["float", "int8"])
def test_probes_run_the_kernel_they_mean(form: Format) -> None:
    """int8 kernels must have been fused: a QuantizeLinear beside a float convolution would be timed instead."""
    kernels = [conv(32, 16, format=form), Kernel("linear", (32,), (16,), format=form)]
    probes = [build_probe(k) for k in kernels]
    ops = [[op for name, op, _ in node_profile(p.model, runs=3) if name.startswith("k")] for p in probes if p]
    wanted = {"float": ({"Conv"}, {"Gemm"}), "int8": ({"QLinearConv"}, {"QGemm"})}[form]
    assert [set(o) for o in ops] == list(wanted)


@pytest.mark.slow
def test_every_kernel_of_the_default_grid_has_a_probe_that_runs() -> None:
    grid = default_grid()
    one_of_each = {Layout(16, 4).family(k): k for k in grid if k.macs < 1e6 and np.prod(k.out_shape) < 20_000}
    assert {k.kind for k in one_of_each.values()} == {k.kind for k in grid}
    for kernel in one_of_each.values():
        probe = build_probe(kernel)
        assert probe is not None
        assert any(name.startswith("k") for name, _, _ in node_profile(probe.model, runs=3)), kernel


@pytest.mark.parametrize(
    "kernel",
    [
        Kernel("slice", (16, 16, 16), (16, 8, 8)),
        Kernel("pad", (16, 8, 8), (32, 8, 8)),
        Kernel("mul", (16, 8, 8), (16, 8, 8), n_inputs=2),
        Kernel("batch_norm", (16, 8, 8), (16, 8, 8)),
        Kernel("relu", (16, 8, 8), (16, 8, 8)),
        Kernel("activation", (16, 8, 8), (16, 8, 8), fused="silu"),
        Kernel("activation", (16,), (16,), fused="gelu"),
        Kernel("add", (16,), (16,), n_inputs=2),
        Kernel("concat", (8, 8, 8), (24, 8, 8), n_inputs=3),
        Kernel("dequantize", (16,), (16,)),
        Kernel("linear", (16, 5), (24, 5), format="w8"),
        Kernel("conv", (16, 8, 8), (16, 4, 4), (3, 3), (2, 2), 4),
        Kernel("conv", (16, 9, 9), (20, 5, 5), (5, 5), (2, 2), format="w4"),
    ],
)
def test_odd_kernels_have_probes_too(kernel: Kernel) -> None:
    probe = build_probe(kernel)
    assert probe is not None
    assert any(name.startswith("k") for name, _, _ in node_profile(probe.model, runs=3))


class TestPrediction:
    def test_exact_where_measured(self) -> None:
        entries = roofline_entries()
        assert profile_of(entries).predict_ns(list(entries)).tolist() == [round(ns) for ns in entries.values()]

    @given(a=st.integers(1, 100), b=st.integers(1, 100), step=st.integers(1, 40), first=st.booleans())
    def test_never_falls_with_width(self, a: int, b: int, step: int, first: bool) -> None:
        profile = profile_of(roofline_entries())
        wider = conv(a + step, b) if first else conv(a, b + step)
        low, high = profile.predict_ns([conv(a, b), wider])
        assert low <= high

    @given(factor=st.lists(st.floats(0.5, 2), min_size=16, max_size=16), a=st.integers(9, 60), b=st.integers(9, 60))
    def test_noise_is_smoothed_between_measured_widths(self, factor: list[float], a: int, b: int) -> None:
        noisy = {k: ns * f for (k, ns), f in zip(roofline_entries().items(), factor, strict=True)}
        profile = profile_of(noisy)
        inside = [k for k in (conv(a, b), conv(a + 1, b), conv(a, b + 1), conv(a + 1, b + 1)) if k not in noisy]
        ns = dict(zip(inside, profile.predict_ns(inside), strict=True))
        assert all(
            ns[x] <= ns[y]
            for x in inside
            for y in inside
            if x.in_shape[0] <= y.in_shape[0] and x.out_shape[0] <= y.out_shape[0]
        )

    def test_a_depthwise_convolution_of_other_widths_stays_one(self) -> None:
        def depthwise(c: int) -> Kernel:
            return Kernel("conv", (c, 16, 16), (c, 16, 16), (3, 3), groups=c)

        profile = profile_of({depthwise(c): 1000.0 + 50 * c for c in (16, 64, 128)})
        small, large = profile.predict_ns([depthwise(32), depthwise(512)])
        assert small == pytest.approx(2600, rel=0.05) and large == pytest.approx(26_600, rel=0.15)

    def test_depthwise_widths_off_the_granule_leave_the_blocked_layout(self) -> None:
        layout = Layout(8, 4)
        found = {c: layout.regime(Kernel("conv", (c, 8, 8), (c, 8, 8), (3, 3), groups=c)) for c in (12, 90, 96)}
        assert found == {12: "blocked", 90: "plain", 96: "blocked"}

    def test_without_blocks_no_addition_runs_apart(self) -> None:
        alone = Kernel("add", (16, 8, 8), (16, 8, 8), fused="apart relu", n_inputs=2)
        usual = Kernel("add", (16, 8, 8), (16, 8, 8), fused="relu", n_inputs=2)
        assert Layout().canonical(alone) == Layout().canonical(usual)
        assert Layout().family(alone) == Layout().family(usual) != Layout(8, 4).family(alone)

    def test_interpolates_what_is_linear(self) -> None:
        guess = profile_of(roofline_entries()).predict_ns([conv(24, 40)])[0]
        assert guess == pytest.approx(2000 + 0.02 * conv(24, 40).macs, rel=0.02)

    def test_gaps_in_the_grid_follow_the_roofline(self) -> None:
        entries = roofline_entries()
        left_out = conv(16, 64)
        truth = entries.pop(left_out)
        assert profile_of(entries).predict_ns([left_out])[0] == pytest.approx(truth, rel=0.1)

    @pytest.mark.parametrize("size", [4, 16])
    def test_other_image_sizes_scale(self, size: int) -> None:
        entries = roofline_entries() | {conv(32, 32, 32): 2000 + 0.02 * conv(32, 32, 32).macs}
        guess = profile_of(entries).predict_ns([conv(32, 32, size)])[0]
        assert guess == pytest.approx(2000 + 0.02 * conv(32, 32, size).macs, rel=0.25)

    def test_widths_round_up_to_the_block(self) -> None:
        profile = profile_of(roofline_entries((16, 32, 48)), Layout(16, 4))
        ns = profile.predict_ns([conv(20, 28), conv(32, 32), conv(36, 32), conv(48, 32)]).tolist()
        assert ns[0] == ns[1] < ns[2] == ns[3]

    def test_widths_off_the_granule_are_another_family(self) -> None:
        layout = Layout(16, 4)
        assert layout.family(conv(31, 32)) != layout.family(conv(32, 32))
        assert profile_of(roofline_entries(), layout).explains([conv(31, 32)]) == {
            "conv float 3x3 stride 1 dense plain"
        }

    def test_thousands_are_deterministic(self) -> None:
        kernels = [conv(a, b, s) for a in range(1, 40) for b in range(1, 40) for s in (4, 8)]
        first, second = (profile_of(roofline_entries()).predict_ns(kernels) for _ in range(2))
        assert np.array_equal(first, second)

    def test_roofline_is_never_negative(self) -> None:
        kernels = list(roofline_entries())
        falling = [1e6 / (1 + i) for i in range(len(kernels))]
        assert (Roofline(kernels, falling).coefficients >= 0).all()

    def test_order_of_measuring_starts_at_the_corners(self) -> None:
        grid = [conv(a, b) for a in (16, 32, 48, 64) for b in (16, 32, 48, 64)]
        order = measuring_order([*grid, *grid, conv(31, 64, format="int8")], Layout(16, 4))
        widths = [(k.in_shape[0], k.out_shape[0]) for k in order if k.format == "float"]
        assert len(order) == 17 and order[1].format == "int8"
        assert widths[0] == (64, 64) and widths[1] == (16, 16) and set(widths[2:4]) == {(16, 64), (64, 16)}

    def test_a_profile_without_kernels_says_so(self) -> None:
        with pytest.raises(UsageError, match="has none"):
            profile_of({}).predict_ns([conv(8, 8)])


kernels = st.builds(
    Kernel,
    kind=st.sampled_from(["conv", "linear", "add"]),
    in_shape=st.tuples(st.integers(1, 512), st.integers(1, 64), st.integers(1, 64)),
    out_shape=st.tuples(st.integers(1, 512), st.integers(1, 64), st.integers(1, 64)),
    kernel=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    format=st.sampled_from(["float", "int8", "w8", "w4"]),
    fused=st.sampled_from(["", "relu"]),
)


class TestFiles:
    @settings(max_examples=20)
    @given(
        entries=st.dictionaries(kernels, st.floats(1, 1e12), max_size=5),
        noise=st.floats(0, 1),
        text=st.text(max_size=10),
    )
    def test_json_comes_back(self, entries: dict[Kernel, float], noise: float, text: str) -> None:
        profile = profile_of(
            entries, Layout(8, 4), noise_floor=noise, host={"cpu": text}, int8_evidence={"u8s8_ms": 0.5}
        )
        again = HardwareProfile.from_json(json.loads(json.dumps(profile.to_json())))
        assert again == profile and again.hash == profile.hash

    @pytest.mark.parametrize(
        ("change", "says"),
        [
            ({"schema": 99}, "has schema 1"),
            ({"threads": 0}, "threads is a number of at least 1, got 0"),
            ({"threads": 1.5}, "threads is a whole number"),
            ({"noise_floor": -0.1}, "noise_floor is a number of at least 0"),
            ({"overhead_ns": "fast"}, "overhead_ns is a number"),
            ({"overhead_ns": float("nan")}, "overhead_ns is a number"),
            ({"int8_format": "u4u4"}, "int8_format is one of u8s8, s8s8, u8u8"),
            ({"device": None}, "device is a text"),
            ({"layout": []}, "one is not"),
            ({"entries": [1]}, "one is not"),
        ],
    )
    def test_bad_values_are_named(self, change: dict[str, Any], says: str) -> None:
        with pytest.raises(UsageError, match=says):
            HardwareProfile.from_json(profile_of(roofline_entries()).to_json() | change)

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("ns", -1.0),
            ("ns", 0),
            ("in_shape", []),
            ("kernel", [3]),
            ("stride", [0, 1]),
            ("format", "fp4"),
            ("kind", 3),
        ],
    )
    def test_bad_entries_are_named(self, field: str, value: object) -> None:
        data = profile_of(roofline_entries()).to_json()
        data["entries"][0][field] = value
        with pytest.raises(UsageError, match=r"one is not"):
            HardwareProfile.from_json(data)

    @pytest.mark.parametrize("gone", ["entries", "threads", "layout", "int8_format", "measured_at"])
    def test_missing_fields_are_named(self, gone: str) -> None:
        data = profile_of(roofline_entries()).to_json()
        del data[gone]
        with pytest.raises(UsageError, match=f"needs the field '{gone}'"):
            HardwareProfile.from_json(data, "p.json")

    def test_no_json_and_no_file(self, tmp_path: Path) -> None:
        (tmp_path / "bad.json").write_text("{")
        (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
        for name in ("bad.json", "binary.json"):
            with pytest.raises(UsageError, match="is a JSON file"):
                HardwareProfile.load(tmp_path / name)
        with pytest.raises(UsageError, match="Cannot read"):
            HardwareProfile.load(tmp_path / "absent.json")
        with pytest.raises(UsageError, match="has None"):
            HardwareProfile.from_json([])

    def test_saved_profiles_are_found_by_name(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("AUTOCOMPRESS_HOME", str(tmp_path))
        profile = profile_of(roofline_entries())
        path = save_profile(profile)
        assert path == tmp_path / "profiles" / "made.json" == known_profiles()["made"]
        assert load_profile("made") == load_profile(path) == load_profile(str(path)) == profile
        with pytest.raises(UnknownName, match="Did you mean 'made'"):
            load_profile("mad")

    def test_names_cannot_leave_the_folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("AUTOCOMPRESS_HOME", str(tmp_path))
        with pytest.raises(UsageError, match="becomes a file's name"):
            save_profile(_named("../evil"))


def _named(name: str) -> HardwareProfile:
    return HardwareProfile.from_json(profile_of(roofline_entries()).to_json() | {"name": name})


class TestBench:
    def test_a_model_is_not_faster_than_itself(self) -> None:
        model, _ = residual_network([(16, 16)], size=16)
        found = compare(model, model, seconds=1)
        assert found.verdict == "not measurably faster" and found.rounds >= 10
        assert found.ratio_interval[0] <= found.ratio <= found.ratio_interval[1]
        assert json.loads(json.dumps(found.to_json()))["verdict"] == found.verdict

    def test_ten_times_the_work_is_slower_and_the_reverse_faster(self, tmp_path: Path) -> None:
        small, _ = residual_network([(16, 16)], size=16)
        large, _ = residual_network([(16, 16)] * 12, size=16)
        path = tmp_path / "small.onnx"
        path.write_bytes(small)
        slower, faster = compare(large, path, seconds=0.7), compare(path, large, seconds=0.7)
        assert (slower.verdict, faster.verdict) == ("slower", "faster")
        assert "slower" in slower.sentence and faster.ratio < 0.5

    def test_several_models_against_one_reference(self) -> None:
        nets = [residual_network([(16, 16)] * n, size=16)[0] for n in (1, 6)]
        small, large = measure_ms(nets, nets[0], seconds=1)
        assert small.ms < large.ms and small.reference_ms == large.reference_ms
        assert large.interval_ms[0] <= large.ms <= large.interval_ms[1]

    def test_nodes_come_in_order_with_their_operators(self) -> None:
        model, _ = residual_network([(16, 16)], form="int8", size=16)
        ops = [op for _, op, us in node_profile(model, runs=3) if us >= 0]
        assert ops[0] == "QuantizeLinear" and ops[-1] == "Gemm" and ops.count("QLinearConv") == 3

    def test_inputs_are_checked(self) -> None:
        model, _ = residual_network([(16, 16)], size=16)
        with pytest.raises(UsageError, match="x is missing"):
            compare(model, model, inputs={"y": np.zeros(1, np.float32)}, seconds=0.1)
        with pytest.raises(UsageError, match="cannot be run"):
            compare(model, model, inputs={"x": np.zeros((1, 3, 4, 4), np.float32)}, seconds=0.1)
        with pytest.raises(UsageError, match="refuses the model"):
            compare(b"no model", model, seconds=0.1)
        with pytest.raises(UsageError, match="threads=0"):
            compare(model, model, threads=0)


def test_noise_and_int8_form_of_this_host() -> None:
    assert 0 <= noise_floor(seconds=0.3) < 2
    form, evidence = fastest_int8(seconds=0.5)
    assert "u8u8" in exact_int8()
    assert evidence[f"{form}_ms"] == min(evidence[f"{exact}_ms"] for exact in exact_int8())


def test_nothing_to_measure_is_an_error() -> None:
    with pytest.raises(UsageError, match="got 0 kernels"):
        measure_local([])
    with pytest.raises(UsageError, match="None of the kernels"):
        measure_local([Kernel("other", (4,), (4,))], seconds=0.5)

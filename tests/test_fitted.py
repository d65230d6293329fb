"""Fitted profiles: coefficients that are known come back, shipped ones load and keep order, and ``fitted`` is said."""

from __future__ import annotations

import importlib
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import spearmanr
from typer.testing import CliRunner

from autocompress.api import read_result
from autocompress.cli import app
from autocompress.dashboard.front import axis_of
from autocompress.dashboard.tables import latency_rows
from autocompress.errors import UsageError
from autocompress.hwprofiles import HardwareProfile, load_profile
from autocompress.hwprofiles.fitted import Law, Laws, error, fit_laws, lineage, predict_networks
from autocompress.hwprofiles.profiles import SHIPPED
from autocompress.types import Kernel

ROOT = Path(__file__).parents[1]
MEASURED = sorted(SHIPPED.glob("h200*.json"))
SERVER = SHIPPED / "epyc-avx2.json"
DATA = sorted(set(SHIPPED.glob("*.json")) - {*MEASURED, SERVER})


def conv(c_in: int, c_out: int, size: int = 8, window: int = 3, **fields: Any) -> Kernel:
    return Kernel("conv", (c_in, size, size), (c_out, size, size), (window, window), **fields)


KERNELS = tuple(
    kernel
    for width in (8, 16, 32, 64)
    for kernel in (
        conv(width, width),
        conv(width, 2 * width, window=1),
        conv(width, width, groups=width),
        Kernel("add", (width, 8, 8), (width, 8, 8), n_inputs=2),
    )
)
"""Four families at four widths."""


def true_ns(kernel: Kernel) -> float:
    """A device whose depthwise convolutions are four times slower a MAC than its dense ones."""
    if kernel.kind == "add":
        return 2000.0
    return 5000 + kernel.macs * (0.4 if kernel.groups > 1 else 0.1)


@pytest.fixture(scope="module")
def networks() -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Counts of 400 random networks, and their latency with an overhead of 0.1 ms."""
    counts = np.random.default_rng(0).integers(0, 6, (400, len(KERNELS))).astype(float)
    return counts, counts @ np.array([true_ns(kernel) for kernel in KERNELS]) + 1e5


class TestFit:
    def test_known_coefficients_come_back(self, networks: Any) -> None:
        counts, ns = networks
        laws, overhead = fit_laws(KERNELS, counts, ns, ridge=1e-9)
        assert overhead == pytest.approx(1e5, rel=0.1)
        for kernel in KERNELS:
            assert laws(kernel) == pytest.approx(true_ns(kernel), rel=0.1)

    def test_networks_that_were_not_fitted(self, networks: Any) -> None:
        counts, ns = networks
        fitted = fit_laws(KERNELS, counts[:300], ns[:300])
        found = error(predict_networks(*fitted, KERNELS, counts[300:]), ns[300:])
        assert found["mape"] < 0.01 and found["spearman"] > 0.999

    def test_a_family_that_was_not_fitted_takes_the_one_above(self, networks: Any) -> None:
        laws, _ = fit_laws(KERNELS, *networks)
        unseen = conv(16, 16, window=5)
        assert laws.knows(conv(24, 24)) and not laws.knows(unseen)
        assert laws(unseen) > laws(conv(16, 16))  # 25 MACs a weight in place of 9

    def test_donors_tell_what_the_networks_do_not(self, networks: Any) -> None:
        counts, ns = networks
        donor = fit_laws(KERNELS, counts, 3 * ns)  # a device three times slower
        dense = [i for i, kernel in enumerate(KERNELS) if kernel.groups == 1]
        some = [KERNELS[i] for i in dense]
        own = counts[:, dense] @ np.array([true_ns(kernel) for kernel in some]) + 1e5
        laws, _ = fit_laws(some, counts[:, dense], own, donors=[donor])
        unseen = conv(32, 32, groups=32)
        assert laws(unseen) == pytest.approx(true_ns(unseen), rel=0.25)

    def test_single_blocks_have_no_overhead_of_a_network(self, networks: Any) -> None:
        assert fit_laws(KERNELS, *networks, whole=False)[1] == 0

    def test_what_cannot_be_fitted_is_a_sentence(self, networks: Any) -> None:
        counts, ns = networks
        with pytest.raises(UsageError, match="latencies above 0, got 400 of which 400 are not"):
            fit_laws(KERNELS, counts, 0 * ns)
        with pytest.raises(UsageError, match="one of all kernels"):
            Laws((Law(("conv",), (1, 0, 0, 0, 0)),))

    def test_lineage(self) -> None:
        assert lineage(conv(8, 8, 15, groups=8))[-1] == ("conv", "depthwise", "3x3", "float", "16 px")
        assert lineage(Kernel("linear", (8,), (8,), format="int8")) == [(), ("linear",), ("linear", "int8")]


@pytest.mark.parametrize("path", DATA, ids=lambda path: path.stem)
class TestShipped:
    def test_loads_and_states_where_it_comes_from(self, path: Path) -> None:
        profile = load_profile(path.stem)
        assert profile.name == path.stem and profile.fitted and profile.provenance.startswith("fitted")
        assert profile.source["citation"] and profile.source["licence"] == "MIT"
        assert 0 < profile.expected_error < 1 and set(profile.fit_error) == set(profile.limits["spaces"])
        assert HardwareProfile.from_json(profile.to_json()) == profile
        assert path.stat().st_size < 300_000

    def test_never_falls_when_a_width_grows(self, path: Path) -> None:
        profile = load_profile(path.stem)
        for size in (4, 8, 32, 56):
            for window in (1, 3, 5):
                for grow in (lambda w: (w, 32), lambda w: (32, w)):
                    ns = profile.predict_ns([conv(*grow(w), size, window) for w in range(4, 200, 7)])
                    assert np.all(np.diff(ns) >= 0) and ns[0] > 0

    def test_names_what_it_never_saw_and_widens_the_interval(self, path: Path) -> None:
        profile = load_profile(path.stem)
        pixels, tokens = conv(16, 16, 32, 1), Kernel("attention", (4, 64, 16), (4, 64, 16), n_inputs=3)
        known, unseen = (tokens, pixels) if "tokens" in profile.limits else (pixels, tokens)
        names = {pixels: "conv dense 1x1", tokens: "attention"}
        assert profile.explains([known]) == set()
        assert profile.relative_error([known]) == pytest.approx(profile.expected_error)
        int8 = replace(known, format="int8")
        assert profile.explains([known, unseen, int8]) == {f"{names[unseen]} float", f"{names[known]} int8"}
        assert profile.relative_error([known, unseen]) > profile.expected_error
        assert profile.predict_ns([int8])[0] == profile.predict_ns([known])[0]  # no speed-up is promised


def test_a_measured_server_core_says_how_good_it_is() -> None:
    profile = load_profile(SERVER.stem)
    assert profile.name == SERVER.stem and not profile.fitted and "CPUExecutionProvider" in profile.runtime
    assert profile.how["checked"]["networks"] >= 12 and 0 < profile.expected_error < 0.15
    assert HardwareProfile.from_json(profile.to_json()) == profile
    attention = Kernel("attention", (8, 128, 32), (8, 128, 32))
    assert profile.explains([*KERNELS, conv(16, 16, format="int8"), conv(90, 90, groups=90), attention]) == set()


@pytest.mark.parametrize("path", MEASURED, ids=lambda path: path.stem)
def test_a_measured_gpu_says_how_good_it_is(path: Path) -> None:
    profile = load_profile(path.stem)
    assert profile.name == path.stem and not profile.fitted and profile.device == "NVIDIA H200"
    assert profile.how["precision"] in profile.runtime and profile.how["accuracy"]["networks"] == 30
    assert 0 < profile.expected_error < 0.3
    assert HardwareProfile.from_json(profile.to_json()) == profile
    assert path.stat().st_size < 300_000
    narrow, wide = profile.predict_ns([conv(16, 16, 8, 3), conv(256, 256, 56, 3)])
    assert 1000 < narrow < wide
    assert profile.explains([conv(16, 16, 32, 3), Kernel("conv", (8, 8, 8), (8, 8, 8), format="int8")]) == {
        next(iter(profile.explains([Kernel("conv", (8, 8, 8), (8, 8, 8), format="int8")])))
    }


def test_every_device_that_has_data_is_shipped() -> None:
    names = {path.stem for path in DATA}
    assert {"pixel2", "pixel3", "samsung_a50", "essential_ph_1", "note10", "raspi4"} <= names
    assert {"1080ti", "2080ti", "titanx", "titanxp"} <= names
    assert {"xeon_gold_6130", "raspi4-transformer", "xeon_e5_2640-transformer", "titanxp-transformer"} <= names


class TestFiles:
    def test_profiles_of_the_first_schema_are_read(self, tmp_path: Path) -> None:
        data = load_profile("pixel3").to_json()
        newer = ("laws", "source", "fit_error", "limits", "expected_error")
        entry = {"kind": "linear", "in_shape": [8], "out_shape": [8], "kernel": [1, 1], "stride": [1, 1], "groups": 1}
        entry |= {"format": "float", "fused": "", "n_inputs": 1, "ns": 1000.0, "interval": 0.0}
        old = {key: value for key, value in data.items() if key not in newer}
        old |= {"schema": 1, "provenance": "measured", "entries": [entry]}
        (tmp_path / "old.json").write_text(json.dumps(old))
        profile = HardwareProfile.load(tmp_path / "old.json")
        assert not profile.fitted and profile.predict_ns([Kernel("linear", (8,), (8,))])[0] == 1000

    @pytest.mark.parametrize(
        ("change", "sentence"),
        [
            ({"laws": [{"family": [], "overhead": -1, "macs": 1}]}, "overhead is a number of at least 0, got -1"),
            ({"laws": [{"family": []}]}, r"needs the field 'laws\[0\].overhead'"),
            ({"laws": [{"family": "conv"}]}, r"laws\[0\].family is a list, got 'conv'"),
            ({"laws": []}, "needs measured kernels or fitted laws"),
            ({"expected_error": -0.1}, "expected_error is a number of at least 0"),
            ({"schema": 3}, "schema 1 or 2"),
        ],
    )
    def test_what_is_wrong_is_named(self, tmp_path: Path, change: dict[str, Any], sentence: str) -> None:
        path = tmp_path / "bad.json"
        path.write_text(json.dumps({**load_profile("pixel3").to_json(), **change}))
        run = CliRunner().invoke(app, ["profile", "validate", str(path)])
        assert run.exit_code and isinstance(run.exception, UsageError | SystemExit)
        with pytest.raises(UsageError, match=sentence.replace("(", "\\(")):
            HardwareProfile.load(path).predict_ns([])


def said(*args: str) -> str:
    run = CliRunner().invoke(app, list(args))
    assert run.exit_code == 0, run.output
    return run.output


class TestCommandLine:
    def test_list_and_show_say_fitted(self) -> None:
        assert "pixel3: Google Pixel 3 (phone), fitted from published measurements" in said("profile", "list")
        shown = said("profile", "show", "pixel3")
        assert "fitted from published measurements" in shown and "HW-NAS-Bench" in shown

    def test_compare(self) -> None:
        rows = json.loads(said("profile", "compare", "pixel3", "raspi4", "--json"))["kernels"]
        assert all(row["ratio"] > 0 for row in rows)
        assert [row["kernel"] for row in rows if row["guessed"]] == ["conv 1x1, 64 channels, 16 px, int8"]

    def test_validate(self) -> None:
        assert "is a valid profile" in said("profile", "validate", str(SHIPPED / "raspi4.json"))


# ---------------------------------------------------------------- a whole job


@pytest.mark.slow
def test_a_job_on_two_fitted_devices_says_so(tmp_path: Path) -> None:
    budgets = ("--budget", "latency_ms<=60%@pixel3", "--budget", "latency_ms<=65%@raspi4")
    short = ("--evaluations", "40", "--recover-minutes", "0", "--threads", "1", "--out", str(tmp_path / "run"))
    output = said("compress", "digits", *budgets, *short)
    assert "@pixel3, fitted" in output and "@raspi4, fitted" in output
    notes = " ".join(output.split())
    assert "Latency on pixel3 is predicted by a fitted profile" in notes and "HW-NAS-Bench" in notes
    assert "The profile of raspi4 has never seen" in notes  # int8
    result = read_result(tmp_path / "run")
    assert result.devices["pixel3"]["provenance"].startswith("fitted")
    assert result.best is not None
    best = result.point(result.best)
    for key, limit in (("latency_ms@pixel3", 0.6), ("latency_ms@raspi4", 0.65)):
        assert best.costs[key] <= limit * result.original.costs[key] * (1 + 1e-9)
        assert result.original.intervals[key] > 0
    assert {row["device"] for row in latency_rows(result, best)} >= {"pixel3, fitted", "raspi4, fitted"}
    assert axis_of(result, "latency_ms@pixel3").title == "latency on pixel3, fitted (ms)"


# ---------------------------------------------------------------- the published measurements


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module of the folder ``benchmarks`` by its name."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module


def hat_row(**given: float) -> dict[str, float]:
    """A transformer of HAT as its files have it, 512 wide, with one layer in the decoder."""
    row = {"encoder_embed_dim": 512.0, "encoder_layer_num": 6.0, "encoder_ffn_embed_dim_avg": 1877.3333333333333}
    row |= {"encoder_self_attention_heads_avg": 4.0, "decoder_embed_dim": 640.0, "decoder_layer_num": 1.0}
    row |= {"decoder_ffn_embed_dim_avg": 1024.0, "decoder_self_attention_heads_avg": 8.0}
    return row | {"decoder_ende_attention_heads_avg": 2.0, "decoder_arbitrary_ende_attn_avg": 2.0} | given


class TestHat:
    def test_an_encoder_has_the_sum_of_its_layers_widths(self, benchmark: Any) -> None:
        kernels = benchmark("published_hat")._encoder(hat_row(), "wmt14ende")
        macs = sum(kernel.macs * n for kernel, n in kernels.items() if kernel.kind == "linear")
        assert macs == 30 * 512 * (6 * 4 * 512 + 2 * 22 * 512)  # 22 times 512 neurons in six layers
        assert sum(n for kernel, n in kernels.items() if kernel.kind == "norm") == 12

    def test_a_decoder_writes_a_token_at_a_time(self, benchmark: Any) -> None:
        kernels = benchmark("published_hat")._decoder(hat_row(), "iwslt14deen")
        assert kernels[Kernel("linear", (640, 5), (1024, 5))] == 23
        assert kernels[Kernel("linear", (512, 5 * 23 * 2), (512, 5 * 23 * 2))] == 2  # keys and values, once
        assert {n for kernel, n in kernels.items() if kernel.kind == "attention"} == {23}

    def test_rows_timed_while_the_machine_was_slow_are_found(self, benchmark: Any) -> None:
        ms = np.random.default_rng(0).uniform(0.9, 1.1, 400) * np.repeat([1, 3], 200)
        layers = np.repeat([1.0, 3.0], 200)
        drifts = benchmark("published_hat")._drifts
        assert not drifts(ms, layers).any()
        ms[100:150] *= 1.5
        found = np.flatnonzero(drifts(ms, layers))
        assert set(range(105, 145)) <= set(found) <= set(range(85, 165))


class TestTfNas:
    def test_blocks_are_rebuilt(self, benchmark: Any) -> None:
        module = benchmark("published_tfnas")
        block = module._block(module._parsed("MBInvertedResBlock_28_40_80_40_k5_s1_swish"), 96)
        assert [k.kind for k in block].count("conv") == 5 and block[-1].kind == "add"
        assert [k.kind for k in block].count("activation") == 4  # two of the block, swish and sigmoid of the excitation
        assert block[2] == replace(conv(96, 96, 28, 5, groups=96), fused="relu")
        with pytest.raises(UsageError, match="got 'skip'"):
            module._parsed("skip")

    def test_rows_up_to_the_width_of_the_input_were_not_measured(self, benchmark: Any, tmp_path: Path) -> None:
        table = {str(width): width / 10 - 2 if width <= 24 else 1 + width / 20 for width in range(8, 80, 8)}
        table = {"base": 9.4, "MBInvertedResBlock_56_24_0_24_k3_s1_relu": table}  # type: ignore[dict-item]
        (tmp_path / "tfnas_latency_cpu.json").write_text(json.dumps(table))
        measured = benchmark("published_tfnas").blocks(tmp_path)
        assert measured.dropped == {"on a straight line up to the width of the input": 3}
        assert measured.ns.min() > 0 and not measured.whole
        assert [list(group) for group in measured.also.values()] == [[0, 0, 1, 1, 2, 2]]


@pytest.mark.assets
@pytest.mark.parametrize(
    ("space", "column", "least"),
    [
        ("FBNet", "pixel3", 0.9),
        ("NAS-Bench-201", "pixel3", 0.85),
        ("Once-for-all blocks", "", 0.9),
        ("HAT encoder", "cpu_raspberrypi", 0.85),
        ("HAT decoder", "cpu_raspberrypi", 0.95),
        ("TF-NAS blocks", "", 0.7),
    ],
)
def test_networks_are_rebuilt_as_they_ran(space: str, column: str, least: float, benchmark: Any) -> None:
    """MACs of the rebuilt networks against their latency on devices that MACs decide."""
    folder = benchmark("published").find(os.environ["AUTOCOMPRESS_DATA"].split(":"))
    measured = benchmark("fit_profiles").SPACES[space](folder, column)
    assert spearmanr(measured.networks.macs, measured.ns).statistic > least
    assert measured.networks.counts.shape == (len(measured.ns), len(measured.networks.kernels))

"""Why isn't it faster: networks with one planted defect each, and the finding that must name it."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest

from autocompress.hwprofiles import Finding, exact_int8, explain
from autocompress.hwprofiles.builder import GraphBuilder
from autocompress.hwprofiles.device import local_device
from autocompress.hwprofiles.findings import channel_block
from autocompress.hwprofiles.references import residual_network
from autocompress.types import Int8Format

Built = tuple[bytes, bytes]
"""A model and its original."""


def chain(widths: list[int], form: str = "float", int8: Int8Format = "u8u8") -> bytes:
    """3x3 convolutions and ReLUs one behind another."""
    graph = GraphBuilder((1, widths[0], 16, 16), int8)
    x = graph.quantize("x", "in") if form == "int8" else "x"
    for i, (a, b) in enumerate(pairwise(widths)):
        x = graph.activation(graph.conv(x, f"conv{i}", (a, b), (3, 3), form=form), f"conv{i}", "relu")
        x = graph.quantize(x, f"conv{i}q") if form == "int8" else x
    graph.output(graph.node("GlobalAveragePool", [x], "pool"))
    return graph.build()


def pointwise(between: str) -> bytes:
    """1x1 convolutions of much data and little work, ``between`` them an activation."""
    graph = GraphBuilder((1, 32, 48, 48))
    x = "x"
    for i in range(4):
        x = graph.node(between, [graph.conv(x, f"conv{i}", (32, 32))], f"act{i}")
    graph.output(graph.node("GlobalAveragePool", [x], "pool"))
    return graph.build()


def without_zero_point() -> bytes:
    """Int8 layers whose weights lack a zero point: ONNX Runtime leaves them in float."""
    graph = GraphBuilder((1, 256))
    x = graph.quantize("x", "in")
    for i in range(3):
        weight = graph.constant(f"w{i}_q", np.ones((256, 256), np.int8))
        scale = graph.constant(f"w{i}_s", np.full(256, 0.01, np.float32))
        w = graph.node("DequantizeLinear", [weight, scale], f"w{i}_dq", axis=0)
        bias = graph.bias(f"b{i}", 256, "int8")
        x = graph.quantize(graph.node("Gemm", [x, w, bias], f"gemm{i}", transB=1), f"gemm{i}q")
    graph.output(x)
    return graph.build()


def linear(form: str) -> bytes:
    graph = GraphBuilder((1, 256))
    x = graph.quantize("x", "in") if form == "int8" else "x"
    for i in range(3):
        x = graph.linear(x, f"gemm{i}", (256, 256), 1, form)
        x = graph.quantize(x, f"gemm{i}q") if form == "int8" else x
    graph.output(x)
    return graph.build()


def tiny() -> bytes:
    graph = GraphBuilder((1, 8))
    x = "x"
    for i in range(60):
        x = graph.node(("Sigmoid", "Neg", "Tanh")[i % 3], [x], f"small{i}")
    graph.output(x)
    return graph.build()


def found(kind: str, built: Built) -> Finding:
    findings = {f.kind: f for f in explain(*built, seconds=0.1, runs=12).findings}
    assert kind in findings, f"found {sorted(findings)}"
    return findings[kind]


def test_misaligned_widths_are_named() -> None:
    if channel_block(local_device().host) == 1:
        pytest.skip("this processor computes channels one by one: no width is misaligned")
    finding = found("misaligned widths", (chain([16, 31, 33, 16]), chain([16, 32, 32, 16])))
    assert any(name.startswith("conv1 (31 to 33") for name in finding.nodes)
    assert finding.us > 0 and "budget" in finding.fix


def test_unfused_int8_is_named() -> None:
    finding = found("unfused Q/DQ", (without_zero_point(), linear("float")))
    assert {"gemm0", "gemm1", "gemm2"} <= set(finding.nodes) and "zero point" in finding.fix


def test_slow_form_of_int8_is_named() -> None:
    if exact_int8() == ("s8s8",):
        pytest.skip("s8s8 is the only form of int8 here")
    finding = found("slow int8 format", (chain([16, 32, 32, 16], "int8", int8="s8s8"), chain([16, 32, 32, 16])))
    assert "conv1" in finding.nodes and "s8s8" in finding.why


@pytest.mark.parametrize("form", ["w8", "w4"])
def test_weights_dequantized_at_every_run_are_named(form: str) -> None:
    finding = found("weights dequantized at every run", (chain([16, 32, 32, 16], form), chain([16, 32, 32, 16])))
    assert set(finding.nodes) == {"conv0", "conv1", "conv2"} and finding.us > 0


def test_reorders_are_named() -> None:
    if channel_block(local_device().host) == 1:
        pytest.skip("this processor has one layout: nothing is reordered")
    finding = found("reorders", (pointwise("Neg"), pointwise("Relu")))  # Neg knows no blocked layout
    assert any("act1" in name for name in finding.nodes) and "layout" in finding.why


def test_small_ops_are_named() -> None:
    finding = found("overhead-bound small ops", (tiny(), chain([16, 16])))
    assert "small7" in finding.nodes and "blocks" in finding.fix


@pytest.mark.parametrize("make", [lambda: chain([16, 32, 32, 16]), lambda: residual_network([(32, 32)], "int8")[0]])
def test_nothing_is_made_up(make: Callable[[], bytes]) -> None:
    """Aligned widths, fused int8 in the exact form: only what depends on the clock may be said."""
    model = make()
    explained = explain(model, model, seconds=0.1, runs=12)
    kinds = {f.kind for f in explained.findings}
    assert kinds <= {"overhead-bound small ops", "slow int8 format"}
    assert explained.to_json()["ops"] and explained.speed.rounds >= 10

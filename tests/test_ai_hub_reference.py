"""AI Hub's published figures: rows of the CSV become milliseconds a model and ratios of int8 to float."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

from autocompress.errors import UsageError

ROOT = Path(__file__).parents[1]
HEAD = "model,component,precision,device,runtime,inference_ms,compute_unit"


@pytest.fixture
def reference(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("ai_hub_reference")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twelve models that int8 halves on one phone, one that falls back to the processor, and one without int8."""
    lines = [HEAD, "resnet18,ResNet18,float,Phone,tflite,1,NPU", "resnet18,ResNet18,w8a8,Phone,tflite,9.5,CPU"]
    for i in range(12):
        lines += [f"m{i},M,float,Phone,tflite,{i + 1},NPU", f"m{i},M,w8a8,Phone,tflite,{(i + 1) / 2},NPU"]
    (tmp_path / "latency").mkdir()
    lines.append("mobilenet_v2,M,float,Phone,onnx,0.5234,NPU")
    (tmp_path / "latency" / "qai_hub_measured.csv").write_text("\n".join(lines) + "\n")
    return tmp_path


def test_ratios_are_of_the_same_model_device_and_runtime(reference: Any, folder: Path) -> None:
    rows = reference.ratios(reference.read([str(folder)]))
    assert set(rows) == {"w8a8 Phone tflite NPU", "w8a8 all devices tflite NPU"}  # one fallback alone tells no spread
    row = rows["w8a8 Phone tflite NPU"]
    assert (row["pairs"], row["median"], row["spread"], row["not faster"]) == (12, "0.50", "0.50 to 0.50", "0%")


def test_times_say_where_a_model_ran(reference: Any, folder: Path) -> None:
    rows = reference.times(reference.read([str(folder)]))
    assert list(rows) == ["mobilenet_v2 Phone", "resnet18 Phone"]
    assert rows["mobilenet_v2 Phone"]["float onnx"] == "0.523"
    assert rows["resnet18 Phone"]["w8a8 tflite"] == "9.5 (CPU)"


def test_a_folder_without_the_figures_is_a_sentence(reference: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="name its folder with --data"):
        reference.read([str(tmp_path)])

"""What Qualcomm AI Hub publishes of whole models on phones and boards, for reference: no profile is made of it.

Milliseconds of a few well-known models, and how long int8 takes against float, over all models that have both.
Most ran on an NPU, and no fitted profile is of such a device: the figures stand beside them, not behind them. Reads
``latency/qai_hub_measured.csv`` (Qualcomm AI Hub Models, BSD-3-Clause).
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from common import folders, save

from autocompress.errors import UsageError

COMMAND = "python benchmarks/ai_hub_reference.py --data DIR"
SOURCE = "Qualcomm AI Hub Models, BSD-3-Clause"
MODELS = ("mobilenet_v2", "mobilenet_v3_large", "efficientnet_b0", "resnet18", "resnet50", "vit")
RUNTIMES = ("tflite", "qnn_dlc", "onnx")
FLOAT, PRECISIONS = "float", ("w8a8", "w8a16")
FEWEST = 10
"""Fewer pairs tell no spread."""
EVERY = "all devices"
TWIN = "SA7255P ADP"
"""All of its rows are jobs that stand under QCS8275 (Proxy), too: among all devices they count once."""
Row = dict[str, str]


def read(data: Sequence[str]) -> list[Row]:
    """All published rows."""
    for folder in data:
        path = Path(folder) / "latency" / "qai_hub_measured.csv"
        if path.exists():
            with open(path, newline="") as file:
                return list(csv.DictReader(file))
    raise UsageError(
        f"AI Hub's figures are latency/qai_hub_measured.csv; none lies in {data}; name its folder with --data."
    )


def times(rows: Iterable[Row]) -> dict[str, Any]:
    """Milliseconds of the well-known models: a row a model and device, a column a precision and runtime."""
    found: dict[str, Any] = {}
    for row in rows:
        if row["model"] in MODELS and row["runtime"] in RUNTIMES:
            line = found.setdefault(f"{row['model']} {row['device']}", {"model": row["model"], "device": row["device"]})
            where = "" if row["compute_unit"] == "NPU" else f" ({row['compute_unit']})"
            line[f"{row['precision']} {row['runtime']}"] = f"{float(row['inference_ms']):.3g}{where}"
    order = {name: i for i, name in enumerate(MODELS)}
    return dict(sorted(found.items(), key=lambda item: (order[item[1]["model"]], item[1]["device"])))


def ratios(rows: Iterable[Row]) -> dict[str, Any]:
    """How long quantized models take against the same model in float, on the same device and in the same runtime."""
    found = {(r["precision"], r["device"], r["runtime"], r["model"], r["component"]): r for r in rows}
    pairs: dict[tuple[str, ...], list[float]] = {}
    for (precision, device, *rest), row in found.items():
        dense = found.get((FLOAT, device, *rest))
        if precision in PRECISIONS and dense:
            before, after = dense["compute_unit"], row["compute_unit"]
            unit = after if before == after else f"{after}, float on {before}"
            ratio = float(row["inference_ms"]) / float(dense["inference_ms"])
            for name in (device,) if device == TWIN else (device, EVERY):
                pairs.setdefault((precision, name, row["runtime"], unit), []).append(ratio)
    kept = sorted((_place(key), key) for key, times in pairs.items() if len(times) >= FEWEST)
    return {" ".join(key): _in_words(key, np.array(pairs[key])) for _, key in kept}


def _place(key: tuple[str, ...]) -> tuple[Any, ...]:
    precision, device, runtime, unit = key
    return PRECISIONS.index(precision), device != EVERY, device, runtime, unit


def _in_words(key: tuple[str, ...], found: np.ndarray[Any, Any]) -> Mapping[str, Any]:
    low, median, high = np.quantile(found, [0.1, 0.5, 0.9])
    named = dict(zip(("precision", "device", "runtime", "unit"), key, strict=True))
    return {
        **named,
        "pairs": len(found),
        "median": f"{median:.2f}",
        "spread": f"{low:.2f} to {high:.2f}",
        "not faster": f"{np.mean(found >= 1):.0%}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    folders(parser)
    rows = read(parser.parse_args().data)
    columns = [("model", "model"), ("device", "device")]
    columns += [(f"{p} {runtime}", f"{p}, {runtime}") for p in (FLOAT, *PRECISIONS) for runtime in RUNTIMES]
    title = f"Published milliseconds of whole models, batch 1, on the NPU unless said ({SOURCE}); no fitted profile is comparable"
    save("ai_hub_reference", times(rows), columns, title, COMMAND)
    columns = [(name, name) for name in ("precision", "device", "runtime", "unit", "pairs")]
    columns += [("median", "time against float: median"), ("spread", "one in ten below, nine in ten below")]
    columns += [("not faster", "no faster than float")]
    save("ai_hub_int8", ratios(rows), columns, f"How long quantized models take against float ({SOURCE})", COMMAND)


if __name__ == "__main__":
    main()

"""How small trained weights get, beside plain zstd: floats of three types, and integers with and without zeros.

Run: python benchmarks/coding.py --data ASSETS
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zstandard
from common import folders, opened, quality, save
from safetensors.torch import load_file
from safetensors.torch import save as as_bytes
from torch import Tensor

from autocompress.deploy import deploy
from autocompress.export import export_onnx
from autocompress.graph import trace
from autocompress.methods.coding import Form, entropy, pack, unpack
from autocompress.methods.coding.planes import _planes
from autocompress.methods.quantization import pack_weight
from autocompress.space import make_space
from autocompress.tasks import load_task

FLOATS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
FILES = {"python_llama": "python_llama/model.safetensors", "resnet56": "cifar10_resnets/resnet56.safetensors"}


def networks(data: list[str]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Name and float weights of each network."""
    for name, file in FILES.items():
        path = next(Path(folder) / file for folder in data if (Path(folder) / file).exists())
        yield name, {k: t for k, t in load_file(path).items() if t.is_floating_point()}
    yield "digits", {k: t for k, t in load_task("digits").model.state_dict().items() if t.is_floating_point()}


def zstd(data: bytes, level: int = 3) -> int:
    return len(zstandard.ZstdCompressor(level=level).compress(data))


def bits(counts: Any) -> float:
    """Entropy of a histogram, summed over its entries."""
    shares = counts[counts > 0] / max(1, counts.sum())
    return float(-(shares * np.log2(shares)).sum() * counts.sum())


def floats(state: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Any]:
    """One row: a safetensors file of these weights."""
    state = {k: t.to(dtype) for k, t in state.items()}
    data = as_bytes(state)
    plain = zstd(data)
    start = time.process_time()
    packed = pack(data, ".safetensors")
    middle = time.process_time()
    assert unpack(packed) == data
    end = time.process_time()
    bound = 0.0
    for tensor in state.values():
        raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        planes = _planes(raw, Form("float", dtype.itemsize, tuple(tensor.shape)))
        bound += sum(bits(np.bincount(plane, minlength=256)) for plane in planes) / 8
    return {
        "zstd": f"{plain / len(data):.1%}",
        "packed": f"{len(packed) / len(data):.1%}",
        "less": f"{1 - len(packed) / plain:.1%}",
        "bound": f"{bound / len(data):.1%}",
        "speed": f"{len(data) / 1e6 / (middle - start):.0f} / {len(data) / 1e6 / (end - middle):.0f}",
    }


def integers(state: dict[str, Tensor], width: int, zeros: float) -> dict[str, Any]:
    """One row: bits a weight of all matrices, rounded to nearest by output channel."""
    total: dict[str, int] = {"zstd": 0, "range": 0, "neighbours": 0, "packed": 0}
    n = 0
    for weight in (t for t in state.values() if t.ndim >= 2 and min(len(t), t[0].numel()) >= entropy.NARROWEST):
        order = weight.abs().reshape(-1).sort().values
        kept = torch.where(weight.abs() < order[int(zeros * len(order))], 0, weight)
        q = pack_weight(kept, width).integers.flatten(1).numpy()
        nibbles = q.reshape(-1)[: q.size // 2 * 2].reshape(-1, 2) & 15
        halves = (nibbles[:, 0] | (nibbles[:, 1] << 4)).astype(np.uint8).tobytes()
        total["zstd"] += min(zstd(q.tobytes(), 19), zstd(halves, 19) if width == 4 else math.inf)  # type: ignore[call-overload]
        total["range"] += (flat := len(entropy.encode(q.view(np.uint8), 256)))
        total["neighbours"] += (near := len(entropy.encode_matrix(q.view(np.uint8), 256)))
        total["packed"] += min(flat, near)
        n += q.size
    return {name: f"{8 * size / n:.3f}" for name, size in total.items()}


def levels(data: list[str], images: int = 4000) -> Iterator[dict[str, Any]]:
    """Rows: ResNet-20 with one level in every layer, on test images; what its file has, and has when packed."""
    task = load_task("cifar10:resnet20", data)
    graph = trace(task.model, task.example_inputs)
    space = make_space(graph, ("int8", "w8", "w4", "rate"))
    database = opened(graph, space, task)
    report = task.report.take(images)
    for label in dict.fromkeys(level.label for own in space.levels for level in own):
        plan = tuple(max((i for i, v in enumerate(own) if v.label == label), default=0) for own in space.levels)
        model = deploy(database.stitch(plan))
        with tempfile.TemporaryDirectory() as folder:
            artifact = export_onnx(model, task.inputs(task.calibration.take(8)), Path(folder) / "m.onnx")
            packed = len(pack(Path(artifact.path).read_bytes(), ".onnx"))
        yield {
            "level": label,
            "top1": f"{quality(task, model, report):.2%}",
            "size": f"{artifact.bytes / 1e6:.4f}",
            "packed": f"{packed / 1e6:.4f}",
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    folders(parser)
    data = parser.parse_args().data
    torch.set_num_threads(1)
    of_floats, of_integers = {}, {}
    for name, state in networks(data):
        for word, dtype in FLOATS.items():
            of_floats[f"{name}, {word}"] = {"weights": f"{name}, {word}", **floats(state, dtype)}
        for width, zeros in ((8, 0.0), (4, 0.0), (8, 0.8), (4, 0.8), (4, 0.9)):
            words = f"{name}, {width} bits" + (f", {zeros:.0%} zeros" if zeros else "")
            of_integers[words] = {"weights": words, **integers(state, width, zeros)}
    columns = [("weights", "weights"), ("zstd", "zstd -3"), ("packed", "packed"), ("less", "less than zstd")]
    more = [("bound", "entropy of the byte planes"), ("speed", "MB/s packed / unpacked")]
    command = "python benchmarks/coding.py --data ASSETS"
    save("coding_floats", of_floats, columns + more, "Packed floats: share of the file as it is", command)
    heads = [("zstd", "zstd -19"), ("range", "range coder"), ("neighbours", "by neighbours"), ("packed", "the smaller")]
    of_levels = {row["level"]: row for row in levels(data)}
    keys = [("level", "every layer"), ("top1", "top-1"), ("size", "size_mb"), ("packed", "packed_mb")]
    save("coding_levels", of_levels, keys, "ResNet-20: levels by what they take when packed", command)
    save("coding_integers", of_integers, [columns[0], *heads], "Packed integers: bits a weight", command)


if __name__ == "__main__":
    main()

"""An NVIDIA GPU's profiles, and how well they predict networks that were not used in making them.

python benchmarks/gpu_profile.py [--name h200] [--seconds 45] [--out DIR] [--precisions float16 …] [--batches 1 128]; needs a GPU.
Writes DIR/<name>-<precision>[-b<batch>].json and benchmarks/results/gpu_profile.json. Networks are residual ones of random widths
and transformer-like stacks; each is captured as a CUDA graph and timed by the host, from an idle GPU to an idle GPU.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).parent))
from common import load, save

from autocompress.hwprofiles.cuda import (
    TOKENS,
    Bench,
    GpuPrecision,
    activated,
    cuda_grid,
    measure_cuda,
    pointwise,
    wall_ns,
)
from autocompress.types import Kernel

TITLE = "A GPU's profile against networks it was not made from: CUDA graphs, timed by the host"
COLUMNS = [
    ("gpu", "GPU"),
    ("precision", "precision"),
    ("batch", "batch"),
    ("kernels", "kernels measured"),
    ("seconds", "seconds"),
    ("overhead_us", "overhead us"),
    ("noise", "noise floor"),
    ("networks", "networks"),
    ("within_10", "within 10 %"),
    ("mape", "MAPE"),
    ("spearman", "Spearman"),
    ("compiled", "torch.compile / graph"),
]
SHORT = {"float32": "fp32", "tf32": "tf32", "float16": "fp16", "bfloat16": "bf16"}


class Residual:
    """A CIFAR-like residual network of random widths: what it runs, and its kernels."""

    def __init__(self, bench: Bench, rng: random.Random) -> None:
        self.kernels: list[Kernel] = []
        self.bench, self.size = bench, rng.choice((32, 32, 56))
        self.steps: list[Callable[[Any], Any]] = []
        stream = rng.choice((16, 32, 64))
        self.x = bench.image((3, self.size, self.size))
        self.conv(3, stream, 1, "relu")
        for stage in range(3):
            for _ in range(rng.randint(1, 5)):
                self.block(stream, rng.randrange(8, 2 * stream + 1, 8), stream)
            if stage < 2:
                wide = min(256, 2 * stream)
                self.conv(stream, wide, 2, "relu")
                stream = wide
        self.head(stream)

    def conv(self, c_in: int, c_out: int, stride: int, fused: str, record: bool = True) -> Callable[[Any], Any]:
        small = self.size // stride
        w, b = self.bench.weight(c_out, c_in, 3, 3), self.bench.weight(1, c_out, 1, 1)
        self.kernels.append(
            Kernel("conv", (c_in, self.size, self.size), (c_out, small, small), (3, 3), (stride, stride), fused=fused)
        )
        then = pointwise(activated("x + b", fused), "x b")

        def run(x: Any) -> Any:
            return then(functional.conv2d(x, w, None, stride, 1), b)

        self.size = small
        if record:
            self.steps.append(run)
        return run

    def block(self, stream: int, inner: int, out: int) -> None:
        first = self.conv(stream, inner, 1, "relu", record=False)
        w, b = self.bench.weight(out, inner, 3, 3), self.bench.weight(1, out, 1, 1)
        shape = (out, self.size, self.size)
        self.kernels.append(Kernel("conv", (inner, *shape[1:]), shape, (3, 3)))
        self.kernels.append(Kernel("add", shape, shape, fused="relu", n_inputs=2))
        then = pointwise(activated("x + b + y", "relu"), "x b y")

        def run(x: Any) -> Any:
            return then(functional.conv2d(first(x), w, None, 1, 1), b, x)

        self.steps.append(run)

    def head(self, stream: int) -> None:
        w, b = self.bench.weight(10, stream), self.bench.weight(10)
        self.kernels += [
            Kernel("global_pool", (stream, self.size, self.size), (stream, 1, 1)),
            Kernel("linear", (stream,), (10,)),
        ]
        self.steps.append(lambda x: functional.linear(x.mean((2, 3)), w, b))

    def __call__(self) -> Tensor:
        x = self.x
        for step in self.steps:
            x = step(x)
        return x


class Decoder:
    """Blocks of a transformer of random widths: attention between linear layers, and a gated MLP."""

    def __init__(self, bench: Bench, rng: random.Random) -> None:
        self.bench, self.kernels = bench, list[Kernel]()
        self.t, self.c = rng.choice(TOKENS), rng.choice((128, 256, 512))
        self.blocks = [
            self.block(rng.choice((2, 4, 8)), rng.randrange(128, 1025, 64)) for _ in range(rng.randint(2, 8))
        ]
        self.x = bench.tensor(self.t, self.c)

    def linear(self, a: int, b: int) -> Callable[[Tensor], Tensor]:
        w, bias = self.bench.weight(b, a), self.bench.weight(b)
        self.kernels.append(Kernel("linear", (a, self.t), (b, self.t)))
        return lambda x: functional.linear(x, w, bias)

    def block(self, heads: int, wide: int) -> Callable[[Tensor], Tensor]:
        c, t, inner = self.c, self.t, heads * 32
        scale = self.bench.weight(c)
        q, k, v, o = (self.linear(*pair) for pair in ((c, inner), (c, inner), (c, inner), (inner, c)))
        up, gate, down = self.linear(c, wide), self.linear(c, wide), self.linear(wide, c)
        self.kernels += [Kernel("norm", (c, t), (c, t))] * 2 + [Kernel("add", (c, t), (c, t), n_inputs=2)] * 2
        self.kernels += [Kernel("attention", (heads, t, 32), (heads, t, 32))]
        self.kernels += [
            Kernel("activation", (wide, t), (wide, t), fused="silu"),
            Kernel("mul", (wide, t), (wide, t), n_inputs=2),
        ]
        add, silu, mul = pointwise("x + y", "x y"), pointwise(activated("x", "silu"), "x"), pointwise("x * y", "x y")

        def run(x: Tensor) -> Tensor:
            y = functional.rms_norm(x, (c,), scale)
            heads_of = [m(y).unflatten(-1, (heads, 32)).transpose(1, 2) for m in (q, k, v)]
            y = functional.scaled_dot_product_attention(*heads_of, is_causal=True).transpose(1, 2).flatten(2)
            x = add(x, o(y))
            y = functional.rms_norm(x, (c,), scale)
            return add(x, down(mul(silu(gate(y)), up(y))))

        return run

    def __call__(self) -> Tensor:
        x = self.x
        for block in self.blocks:
            x = block(x)
        return x


def networks(bench: Bench, n: int) -> Iterator[Residual | Decoder]:
    rng = random.Random(0)
    for i in range(n):
        yield Residual(bench, rng) if i % 3 else Decoder(bench, rng)


def compiled_ratio(network: Residual) -> float:
    """The same convolutions behind ``torch.compile`` with CUDA graphs, against our graph."""
    convs = [k for k in network.kernels if k.kind == "conv"]
    module = torch.nn.Sequential(
        *(
            torch.nn.Sequential(torch.nn.Conv2d(k.in_shape[0], k.out_shape[0], 3, k.stride, 1), torch.nn.ReLU())
            for k in convs
        )
    )
    same = module.to(network.bench.device, network.bench.dtype, memory_format=torch.channels_last).eval()
    made = torch.compile(same, mode="reduce-overhead")
    with torch.inference_mode():
        for _ in range(5):
            made(network.x)
        there = wall_ns(lambda: made(network.x))
        mine = network.bench.graph(lambda: chain(same, network.x), copies=1)
    return there / wall_ns(mine.graph.replay)


def chain(module: torch.nn.Sequential, x: Any) -> Any:
    """Convolutions as a profile's kernels have them."""
    then = pointwise(activated("x + b", "relu"), "x b")
    for part in module:
        conv = cast("torch.nn.Conv2d", part[0])  # type: ignore[index]
        x = then(functional.conv2d(x, conv.weight, None, conv.stride, 1), conv.bias.reshape(1, -1, 1, 1))  # type: ignore[union-attr]
    return x


def one(precision: GpuPrecision, batch: int, args: argparse.Namespace) -> dict[str, Any]:
    start = time.perf_counter()
    name = f"{args.name}-{SHORT[precision]}" + (f"-b{batch}" if batch > 1 else "")
    profile = measure_cuda(cuda_grid(), precision=precision, batch=batch, seconds=args.seconds, name=name)
    seconds = time.perf_counter() - start
    bench = Bench("cuda", precision, batch)
    rows = []
    for network in networks(bench, args.networks):
        measured = wall_ns(bench.graph(network, copies=1).graph.replay)
        rows.append((measured, profile.overhead_ns + int(profile.predict_ns(network.kernels).sum())))
    measured_, predicted = np.array(rows).T
    off = np.abs(predicted / measured_ - 1)
    row: dict[str, Any] = {
        "gpu": profile.device,
        "precision": precision,
        "batch": batch,
        "kernels": len(profile.entries),
        "seconds": round(seconds, 1),
        "overhead_us": round(profile.overhead_ns / 1e3, 2),
        "noise": round(profile.noise_floor, 4),
        "networks": len(rows),
        "within_10": f"{np.mean(off <= 0.1):.0%}",
        "mape": f"{off.mean():.1%}",
        "spearman": round(float(spearmanr(measured_, predicted).statistic), 3),
        "pairs": [[round(float(a) / 1e3, 2), round(float(b) / 1e3, 2)] for a, b in rows],
        "layout": vars(profile.layout),
        "runtime": profile.runtime_version,
    }
    accuracy = {key: row[key] for key in ("networks", "within_10", "mape", "spearman")}
    how, error = {**profile.how, "accuracy": accuracy}, round(float(np.quantile(off, 0.9)), 3)
    replace(profile, how=how, expected_error=error).save(args.out / f"{name}.json")
    if args.compile:
        network = next(n for n in networks(bench, 3) if isinstance(n, Residual))
        row["compiled"] = f"{compiled_ratio(network):.2f}"
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--name", default="h200")
    parser.add_argument("--seconds", type=float, default=45)
    parser.add_argument("--networks", type=int, default=30)
    parser.add_argument("--out", type=Path, default=Path("autocompress/hwprofiles/data"))
    parser.add_argument("--precisions", nargs="*", default=list(SHORT))
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 128])
    parser.add_argument("--compile", action="store_true", help="also torch.compile of one network")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for batch in args.batches:
        for precision in args.precisions:
            row = one(precision, batch, args)
            print(row, flush=True)
            key = f"{row['gpu']} {precision} {batch}"
            save("gpu_profile", {**load("gpu_profile"), key: row}, COLUMNS, TITLE, "python benchmarks/gpu_profile.py")


if __name__ == "__main__":
    main()

"""Predicted against measured latency on this machine: sixty compressed variants that no profile was made from.

python benchmarks/latency_accuracy.py [--data DIR] [--minutes 10] [--variants 15] [--only resnet20 …]; one pinned thread. Variants
(channels, ranks, int8, all of them together, and weights alone in 8 or 4 bits) of ResNet-20 and -56, a MobileNetV2 of random
weights at 224 pixels and a small Llama are exported as a job exports them and timed interleaved with their original. They are
predicted by a profile of ``autocompress profile measure --minutes 10`` (ten minutes), by the profile that a job measures for its
own model (job), and by that one corrected by other plans of the model that were timed (corrected). Each prediction is scaled by
what it is off on the original; the raw error is reported too.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
from common import RESULTS, folders, load, opened, save

from autocompress.costs import CostModel
from autocompress.database import LevelDatabase
from autocompress.deploy import deploy
from autocompress.export import export_onnx
from autocompress.files import cache_dir
from autocompress.graph import trace
from autocompress.hwprofiles import (
    HardwareProfile,
    exact_int8,
    load_profile,
    measure_default,
    measure_local,
    measure_ms,
    recalibrated,
)
from autocompress.prepare import LOCAL_SECONDS, kernels_of, offered
from autocompress.results import METHOD_FAMILIES, Request
from autocompress.space import make_space
from autocompress.tasks import Split, Task, load_task
from autocompress.types import Int8Format, Plan, SearchSpace, digest

TITLE = "Predicted against measured latency of compressed variants, on a CPU with one thread"
COMMAND = "python benchmarks/latency_accuracy.py"
COLUMNS = [
    ("network", "network"),
    ("profile", "profile"),
    ("variants", "variants"),
    ("within_10", "within 10 %"),
    ("mape", "MAPE"),
    ("raw_within_10", "raw within 10 %"),
    ("raw_mape", "raw MAPE"),
    ("spearman", "Spearman"),
    ("faster", "faster of two"),
    ("noise", "noise floor"),
]
KINDS: tuple[tuple[str, ...], ...] = (
    ("channels", "blocks"),
    ("lowrank",),
    ("int8",),
    ("channels", "blocks", "lowrank", "int8"),
)
FORMATS = ("w8", "w4")
ASKED = "all, channels, ranks and int8 alone"
SECONDS_A_VARIANT = 3.0
CORRECTING = 8
"""Plans that correct a profile, none of them a variant."""


class Inverted(nn.Module):
    """Inverted residual (Sandler et al., CVPR 2018)."""

    def __init__(self, c_in: int, c_out: int, stride: int, expand: int) -> None:
        super().__init__()
        wide = c_in * expand
        widen = [*_unit(c_in, wide, 1, 1, 1)] if expand > 1 else []
        self.body = nn.Sequential(
            *widen, *_unit(wide, wide, 3, stride, wide), nn.Conv2d(wide, c_out, 1, bias=False), nn.BatchNorm2d(c_out)
        )
        self.skip = stride == 1 and c_in == c_out

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.skip else self.body(x)


def _unit(c_in: int, c_out: int, kernel: int, stride: int, groups: int) -> list[nn.Module]:
    conv = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(c_out), nn.ReLU6()]


def mobilenet_v2() -> nn.Module:
    """MobileNetV2 1.0 for 1,000 classes."""
    rows = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
    layers, width = _unit(3, 32, 3, 2, 1), 32
    for expand, c, n, stride in rows:
        for i in range(n):
            layers.append(Inverted(width, c, stride if i == 0 else 1, expand))
            width = c
    layers += [*_unit(width, 1280, 1, 1, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1280, 1000)]
    return nn.Sequential(*layers)


def mobilenet_task(data: Sequence[str]) -> Task:
    """On noise: how long a plan takes does not depend on what it sees."""
    torch.manual_seed(0)
    images = torch.randn(24, 3, 224, 224)
    splits = [Split(images[i : i + 8], torch.zeros(8, dtype=torch.long)) for i in (0, 8, 16)]
    return Task("mobilenet_v2", mobilenet_v2(), *splits, batch_size=8, slice_size=8)


def named(spec: str) -> Callable[[Sequence[str]], Task]:
    def make(data: Sequence[str]) -> Task:
        task = load_task(spec, data)
        few = 16 if spec.startswith("lm:") else 64  # enough for shapes and ranges
        return replace(task, calibration=task.calibration.take(few), search=task.search.take(few))

    return make


NETWORKS: dict[str, Callable[[Sequence[str]], Task]] = {
    "resnet20": named("cifar10:resnet20"),
    "resnet56": named("cifar10:resnet56"),
    "mobilenet_v2": mobilenet_task,
    "python_llama": named("lm:python_llama"),
}


def variants(space: SearchSpace, n: int, seed: int = 0) -> list[tuple[str, Plan]]:
    """Random plans, by turns of one kind of level and of all of them; each site is compressed with one probability a plan."""
    rng, found = random.Random(seed), dict[Plan, str]()
    kinds = [kind for kind in (*KINDS, FORMATS) if any(_options(space, s, kind) for s in range(len(space.sites)))]
    while len(found) < n:
        kind = kinds[len(found) % len(kinds)]
        share = rng.uniform(0.2, 1.0)
        plan = []
        for site in range(len(space.sites)):
            options = _options(space, site, kind)
            block = space.sites[site].kind == "block"
            touched = options and rng.random() < (0.2 if block else share)
            plan.append(rng.choice(options) if touched else 0)
        found.setdefault(space.effective(tuple(plan)), "+".join(kind))
    return [(kind, plan) for plan, kind in found.items()]


def _options(space: SearchSpace, site: int, families: tuple[str, ...]) -> list[int]:
    """Levels of a site whose every step is of one of the families."""
    return [
        i
        for i, level in enumerate(space.levels[site])
        if i and {family_of(type(step).__name__, getattr(step, "bits", 0)) for step in level.steps} <= set(families)
    ]


def family_of(step: str, bits: int) -> str:
    names = {"ChannelPruning": "channels", "BlockDrop": "blocks", "LowRank": "lowrank", "StaticInt8": "int8"}
    return names.get(step, f"w{bits}")


def ten_minutes(minutes: float) -> HardwareProfile:
    """The profile for any network, measured once a machine."""
    path = cache_dir() / "benchmarks" / f"latency-accuracy-{minutes:g}.json"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        measure_default(minutes=minutes).save(path)
    return load_profile(path)


def exported(task: Task, database: LevelDatabase, plans: Sequence[Plan], folder: Path, int8: Int8Format) -> list[Path]:
    """ONNX files of plans, as a job writes them."""
    folder.mkdir(parents=True, exist_ok=True)
    examples = task.inputs(task.calibration.take(3))
    paths = []
    for plan in plans:
        path = folder / f"{digest([int8, database.key, database.space.plan_to_json(plan)])}.onnx"
        if not path.exists():
            export_onnx(deploy(database.stitch(plan)), examples, path, int8_format=int8, exporters=("legacy", "dynamo"))
        paths.append(path)
    return paths


def measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Predictions and measurements of one network's variants, in milliseconds."""
    task = NETWORKS[name](args.data)
    graph = trace(task.model, task.example_inputs)
    space = make_space(graph, offered(task, Request(task=name, budgets=("macs<=50%",), methods=METHOD_FAMILIES)))
    database = opened(graph, space, task)
    general = ten_minutes(args.minutes)
    int8 = general.int8_format if general.int8_format in exact_int8() else "u8u8"
    chosen = variants(space, args.variants)
    plans = [space.dense, *(plan for _, plan in chosen)]
    paths = exported(task, database, plans, cache_dir() / "benchmarks" / "latency-accuracy" / name, int8)
    start = time.perf_counter()
    own = measure_local(kernels_of(graph, space), seconds=LOCAL_SECONDS)
    own_seconds = time.perf_counter() - start
    timings = measure_ms(paths, paths[0], seconds=SECONDS_A_VARIANT * len(paths))
    others = [plan for _, plan in variants(space, CORRECTING, seed=1) if plan not in plans]
    files = exported(task, database, others, paths[0].parent, int8)
    known = measure_ms(files, paths[0], seconds=SECONDS_A_VARIANT * len(files))
    costs = CostModel(graph, space, {"local": own})
    flat = [costs.executed(plan) for plan in (space.dense, *others)]
    times = [1e6 * known[0].reference_ms, *(1e6 * timing.ms for timing in known)]
    corrected = recalibrated(own, list(zip(flat, times, strict=True)))
    predicted = {}
    for label, profile in (("ten minutes", general), ("job", own), ("corrected", corrected)):
        costs = CostModel(graph, space, {"local": profile})
        predicted[label] = [costs.in_units(plan)["latency_ms@local"] for plan in plans]
    return {
        "kinds": ["original", *(kind for kind, _ in chosen)],
        "measured": [timing.ms for timing in timings],
        "predicted": predicted,
        "noise": max(max(timing.ratio_interval) / timing.ratio - 1 for timing in timings),
        "floor": general.noise_floor,
        "job_seconds": round(own_seconds, 1),
        "factors": corrected.how["corrected_by_networks"],
        "expected_error": general.expected_error,
        "checked": general.how.get("checked"),
        "kernels": len(general.entries),
        "int8": int8,
        "unseen": sorted(general.explains(kernels_of(graph, space, samples=0))),
    }


def row(name: str, label: str, found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Accuracy over the variants of some networks; pairs of variants are of one network."""
    scaled, raw, right, total, ranks = [], [], 0, 0, []
    for one in found:
        kept = [i for i, kind in enumerate(one["kinds"]) if kind != "+".join(FORMATS) or name != ASKED]
        measured, predicted = np.array(one["measured"])[kept], np.array(one["predicted"][label])[kept]
        raw += (predicted[1:] / measured[1:] - 1).tolist()
        fitted = predicted * measured[0] / predicted[0]
        scaled += (fitted[1:] / measured[1:] - 1).tolist()
        ranks.append(float(spearmanr(measured[1:], fitted[1:]).statistic))
        for a, b in combinations(range(1, len(measured)), 2):
            if abs(measured[a] / measured[b] - 1) > max(one["floor"], one["noise"]):
                total += 1
                right += (measured[a] < measured[b]) == (fitted[a] < fitted[b])
    off, raw_off = np.abs(scaled), np.abs(raw)
    return {
        "network": name,
        "profile": label,
        "variants": len(off),
        "within_10": f"{np.mean(off <= 0.1):.0%}",
        "mape": f"{off.mean():.1%}",
        "raw_within_10": f"{np.mean(raw_off <= 0.1):.0%}",
        "raw_mape": f"{raw_off.mean():.1%}",
        "spearman": f"{min(ranks):.3f}",
        "faster": f"{right / max(total, 1):.1%} of {total}",
        "noise": f"{max(max(o['floor'], o['noise']) for o in found):.1%}",
    }


def plot(found: dict[str, dict[str, Any]], path: Path) -> None:
    """Predicted against measured, both axes logarithmic, with the band of ±10 %."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 5), dpi=120)
    every = [ms for one in found.values() for ms in one["measured"]]
    ends = np.array([0.7 * min(every), 1.4 * max(every)])
    axes.plot(ends, ends, color="#888", linewidth=1)
    axes.fill_between(ends, 0.9 * ends, 1.1 * ends, color="#ddd", label="±10 %")
    for name, one in found.items():
        measured, predicted = np.array(one["measured"]), np.array(one["predicted"]["ten minutes"])
        axes.scatter(measured, predicted * measured[0] / predicted[0], s=14, label=name)
    axes.set(xscale="log", yscale="log", xlabel="measured (ms)", ylabel="predicted, ten-minute profile (ms)")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    folders(parser)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--variants", type=int, default=15)
    parser.add_argument("--only", nargs="*", choices=list(NETWORKS), default=list(NETWORKS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = load("latency_accuracy")
    for name in args.only:
        found = measure(name, args)
        for label in found["predicted"]:
            rows[f"{name} {label}"] = {**row(name, label, [found]), "data": found}
            print(rows[f"{name} {label}"] | {"data": None}, flush=True)
        save("latency_accuracy", rows, COLUMNS, TITLE, COMMAND)
    measured = {name: rows[f"{name} job"]["data"] for name in NETWORKS if f"{name} job" in rows}
    for label in ("ten minutes", "job", "corrected"):
        rows[f"all {label}"] = row("all", label, list(measured.values()))
        rows[f"asked {label}"] = row(ASKED, label, list(measured.values()))
    save("latency_accuracy", rows, COLUMNS, TITLE, COMMAND)
    plot(measured, RESULTS / "latency_accuracy.png")


if __name__ == "__main__":
    main()

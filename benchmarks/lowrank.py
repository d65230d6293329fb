"""Forms of factorization: quality against ratio, in every layer that has the form, on ResNet-20 and on a small Llama.

Run: python benchmarks/lowrank.py --data ASSETS; resumable row by row. One thread. Quality on test images or held-out text at two
rungs: factors from dense inputs (database), and after the sequential refit. Speed is that of the file against the original's,
timed in turns.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
from common import folders, load, quality, save

from autocompress.costs import CostModel
from autocompress.database import LevelDatabase
from autocompress.deploy import deploy
from autocompress.export import export_onnx
from autocompress.files import cache_dir
from autocompress.finish import finish
from autocompress.graph import Graph, Layer, trace
from autocompress.hwprofiles import compare
from autocompress.methods import CUR, Factored, GroupedSVD, LowRank, OutputFeatures, TensorTrain, Tucker2
from autocompress.methods.grouped import best_split
from autocompress.space import MIN_FACTORED, _kernel, _weight, saves
from autocompress.tasks import Task, load_task
from autocompress.types import Level, SearchSpace, Site

RATIOS = (0.75, 0.5, 0.25)
JUDGED = {"cifar10:resnet20": 4000, "lm:python_llama": 60}
"""Test images, windows of text."""
REFITTED = ("cifar10:resnet20",)
"""Where the sequential refit takes a minute and not ten."""
SECONDS = 4.0

Form = Callable[[nn.Module, Tensor, float], Factored | None]


def grouped(module: nn.Module, weight: Tensor, ratio: float) -> Factored | None:
    """Each layer with the number of groups that its bound says."""
    if not isinstance(module, nn.Conv2d):
        return None
    groups = best_split(weight, ratio)
    return GroupedSVD(ratio, groups) if groups > 1 else LowRank(ratio)


def tucker(module: nn.Module, weight: Tensor, ratio: float) -> Factored | None:
    return Tucker2(ratio) if isinstance(module, nn.Conv2d) and max(module.kernel_size) > 1 else None


def spatial(module: nn.Module, weight: Tensor, ratio: float) -> Factored | None:
    return LowRank(ratio, "spatial") if isinstance(module, nn.Conv2d) and min(module.kernel_size) > 1 else None


FORMS: dict[str, Form] = {
    "plain SVD": lambda module, weight, ratio: LowRank(ratio),
    "whitened SVD": lambda module, weight, ratio: LowRank(ratio),
    "output features (LORD)": lambda module, weight, ratio: OutputFeatures(ratio),
    "CUR": lambda module, weight, ratio: CUR(ratio),
    "own filters (cur)": lambda module, weight, ratio: CUR(ratio, columns=False),
    "spatial": spatial,
    "Tucker-2": tucker,
    "grouped (ALDS)": grouped,
    "2 cores (MPO)": lambda module, weight, ratio: TensorTrain(ratio) if isinstance(module, nn.Linear) else None,
}


class Plain(LevelDatabase):
    """A database that knows nothing of the data."""

    def gram(self, name: str) -> Tensor | None:
        return None


def space_of(graph: Graph, form: Form, ratio: float) -> SearchSpace:
    """One level beside dense in every layer that has the form and saves by it."""
    found: list[tuple[Site, tuple[Level, ...]]] = []
    for layer in graph.layers.values():
        method = method_of(graph, layer, form, ratio)
        if method is not None:
            site = Site(f"layer:{layer.name}", "layer", (layer.name,), 1, tuple(_weight(graph, layer).shape))
            found.append((site, (Level(), Level((method,)))))
    return SearchSpace(tuple(site for site, _ in found), tuple(levels for _, levels in found))


def method_of(graph: Graph, layer: Layer, form: Form, ratio: float) -> Factored | None:
    weight, module = _weight(graph, layer), graph.module.get_submodule(layer.name)
    if layer.depthwise or weight.numel() < MIN_FACTORED:
        return None
    method = form(module, weight, ratio)
    return method if method is not None and saves(method, _kernel(graph, layer)) else None


def row(task: Task, graph: Graph, original: Path, name: str, ratio: float) -> dict[str, Any]:
    space = space_of(graph, FORMS[name], ratio)
    if not space.sites:
        return {}
    kind = Plain if name == "plain SVD" else LevelDatabase
    database = kind(graph, space, task, cache_dir() / "databases")
    database.build()
    costs, plan = CostModel(graph, space, {}), (1,) * len(space.sites)
    start = time.process_time()
    live = database.stitch(plan)
    seconds = time.process_time() - start
    split = task.report.take(JUDGED[task.name])
    model = deploy(live)
    found = {"quality": quality(task, model, split)}
    if kind is LevelDatabase and task.name in REFITTED:
        model = deploy(finish(database, plan))
        found["refitted"] = quality(task, model, split)
    dense, cost = costs.in_units(space.dense), costs.in_units(plan)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        artifact = export_onnx(model, task.inputs(task.calibration.take(4)), path, exporters=("legacy", "dynamo"))
        speed = compare(path, original, batch=1, threads=1, seconds=SECONDS)
    low, high = speed.ratio_interval
    return {
        "form": name,
        "ratio": f"{ratio:.0%}",
        "layers": f"{len(space.sites)} of {len(graph.layers)}",
        "params": f"{cost['params'] / dense['params']:.1%}",
        "macs": f"{cost['macs'] / dense['macs']:.1%}",
        "mb": f"{artifact.bytes / 1e6:.3f}",
        "speed": f"{1 / speed.ratio:.2f} ({1 / high:.2f}–{1 / low:.2f})",
        "seconds": f"{seconds:.2f}",
        **{key: f"{value:.2%}" if task.higher_is_better else f"{value:.2f}" for key, value in found.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    folders(parser)
    parser.add_argument("--only", choices=list(JUDGED), nargs="*", default=list(JUDGED))
    given = parser.parse_args()
    data = given.data
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # the legacy exporter announces its end
    for spec in given.only:
        at = next((str(Path(f) / "python_llama") for f in data if (Path(f) / "python_llama").is_dir()), "")
        task = load_task(spec.replace("python_llama", at), data)
        graph = trace(task.model, task.example_inputs)
        name = "lowrank_" + spec.partition(":")[2]
        rows = load(name)
        dense = quality(task, graph.module, task.report.take(JUDGED.setdefault(task.name, JUDGED[spec])))
        original = Path(tempfile.mkdtemp()) / "original.onnx"
        export_onnx(
            deploy(graph.module), task.inputs(task.calibration.take(4)), original, exporters=("legacy", "dynamo")
        )
        shown = f"{dense:.2%}" if task.higher_is_better else f"{dense:.2f}"
        columns = [
            ("form", "form"), ("ratio", "share asked"), ("layers", "layers"), ("params", "parameters"), ("macs", "MACs"),
            ("mb", "MB"), ("quality", f"{task.metric_name} (original {shown})"), ("refitted", "refitted"),
            ("speed", "speed (95 %)"), ("seconds", "s to factorize"),
        ]  # fmt: skip
        for form in FORMS:
            for ratio in RATIOS:
                key = f"{form} {ratio}"
                if key not in rows and (made := row(task, graph, original, form, ratio)):
                    rows[key] = made
                    save(
                        name,
                        rows,
                        columns,
                        f"Factorization of {spec}: {task.metric_name}",
                        "python benchmarks/lowrank.py --data ASSETS",
                    )
                    print(key, rows[key], flush=True)


if __name__ == "__main__":
    main()

"""Unconstrained against constrained pruning of shared tensors, at equal parameters, on CIFAR-10's ResNets and a DenseNet.

Run: python benchmarks/unconstrained.py --data ASSETS; resumable row by row. One thread, no training. ``streams`` removes channels
of shared tensors for all that write and read them; ``inputs`` removes channels for each reader alone, in ResNets twice the share,
as writers keep theirs. Accuracy on test images as the database makes levels, and after the sequential refit. Latency over
the original's, in turns with it: of the file with channels as they were (gathers where readers do not read neighbours), and
reordered.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import fx

sys.path.insert(0, str(Path(__file__).parent))
from common import folders, load, opened, quality, save
from densenet import densenet_task

from autocompress.costs import CostModel
from autocompress.deploy import deploy
from autocompress.export import export_onnx
from autocompress.finish import finish
from autocompress.graph import Graph, trace
from autocompress.hwprofiles import measure_ms
from autocompress.methods.inputs import Select
from autocompress.reorder import reordered, slices
from autocompress.space import make_space
from autocompress.tasks import Task, load_task
from autocompress.types import Plan, SearchSpace

TASKS = ("cifar10:resnet20", "cifar10:resnet56", "cifar10:densenet")
JUDGED = 2000
SHARES = {"streams": (0.875, 0.75, 0.625), "inputs": (0.75, 0.5, 0.25)}
"""Of channels, where writers lose theirs and where they keep them."""
DENSENET = {"streams": (0.75, 0.5, 0.25), "inputs": (0.625, 0.34, 0.15)}
"""There all tensors are shared, and a group's layers lose on both sides."""
BATCHES, SECONDS = (1, 32), 8.0
COLUMNS = [
    ("net", "net"), ("pruned", "pruned"), ("width", "width"), ("params", "parameters"), ("macs", "MACs"),
    ("stitched", "accuracy, stitched"), ("refitted", "refitted"), ("slices", "slices of selections: as it was, reordered"),
    *((f"gather_{b}", f"latency at batch {b}: as it was") for b in BATCHES),
    *((f"reordered_{b}", f"at batch {b}: reordered") for b in BATCHES),
]  # fmt: skip


def streams(graph: Graph) -> SearchSpace:
    """Widths of the groups that several layers read."""
    space, groups = make_space(graph, ("channels",)), {f"channels:{g.name}": g for g in graph.groups}
    shared = [
        i for i, s in enumerate(space.sites) if sum(not graph.layers[n].depthwise for n in groups[s.name].consumers) > 1
    ]
    return SearchSpace(tuple(space.sites[i] for i in shared), tuple(space.levels[i] for i in shared))


def plan_of(space: SearchSpace, share: float) -> Plan:
    """Every site at the level that is nearest to a share of its width."""
    return tuple(
        min(range(len(levels)), key=lambda i: abs((levels[i].steps[0].keep if i else site.width) - share * site.width))  # type: ignore[attr-defined]
        for site, levels in zip(space.sites, space.levels, strict=True)
    )


def latencies(task: Task, original: fx.GraphModule, models: dict[str, fx.GraphModule]) -> dict[str, str]:
    """Latency over the original's of each model's file, and half of its interval."""
    examples, found = task.inputs(task.calibration.take(3)), {}
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: Path(folder) / f"{name}.onnx" for name in ("original", *models)}
        for name, model in {"original": original, **models}.items():
            export_onnx(model, examples, paths[name])
        for batch in BATCHES:
            timings = measure_ms(
                [paths[name] for name in models], paths["original"], batch=batch, seconds=SECONDS * len(models)
            )
            for name, timing in zip(models, timings, strict=True):
                half = (timing.ratio_interval[1] - timing.ratio_interval[0]) / 2
                found[f"{name}_{batch}"] = f"{timing.ratio:.2f} ± {half:.2f}"
    return found


def rows(task: Task, graph: Graph, known: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    split, net = task.report.take(JUDGED), task.name.partition(":")[2]
    spaces = {"streams": streams(graph), "inputs": make_space(graph, ("inputs",))}
    shares = DENSENET if net == "densenet" else SHARES
    for i in range(len(shares["inputs"])):
        for pruned, space in spaces.items():
            width = shares[pruned][i]
            key = f"{net} {pruned} {width:.1%}"
            if key in known:
                continue
            database, costs, plan = opened(graph, space, task), CostModel(graph, space, {}), plan_of(space, width)
            dense, cost = costs.in_units(space.dense), costs.in_units(plan)
            stitched, refitted = deploy(database.stitch(plan)), deploy(finish(database, plan))
            accuracies = [quality(task, model, split) for model in (stitched, refitted)]
            models = {"gather": refitted, "reordered": reordered(database, plan, refitted)}
            if not any(isinstance(part, Select) for part in refitted.modules()):
                del models["reordered"]
            count = sum(isinstance(part, Select) for part in refitted.modules())
            before, after = slices(refitted), slices(models.get("reordered", refitted))
            yield (
                key,
                {
                    "net": net,
                    "pruned": pruned,
                    "width": f"{width:.1%}",
                    **{metric: f"{cost[metric] / dense[metric]:.1%}" for metric in ("params", "macs")},
                    "stitched": f"{accuracies[0]:.1%}",
                    "refitted": f"{accuracies[1]:.1%}",
                    "slices": f"{before}, {after} of {count}" if count else "–",
                    **latencies(task, deploy(database.stitch(space.dense)), models),
                },
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    folders(parser)
    parser.add_argument("--only", choices=TASKS, nargs="*", default=list(TASKS))
    given = parser.parse_args()
    torch.set_num_threads(1)
    known = load("unconstrained")
    for spec in given.only:
        task = densenet_task(given.data) if spec == "cifar10:densenet" else load_task(spec, given.data)
        graph = trace(task.model, task.example_inputs)
        for key, row in rows(task, graph, known):
            known[key] = row
            title = "Constrained and unconstrained pruning of shared tensors"
            save("unconstrained", known, COLUMNS, title, "python benchmarks/unconstrained.py --data ASSETS")
            print(key, row, flush=True)


if __name__ == "__main__":
    main()

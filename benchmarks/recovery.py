"""Recipes of recovery on ResNet-20: divergence on the search split and accuracy on test images, after equally many steps.

Run: python benchmarks/recovery.py --data ASSETS; resumable row by row. One thread. Every layer (or group) at the same level, no
search; each recipe begins from the refitted model and takes as many steps of 128 images at the rate that the loss says.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, fx

sys.path.insert(0, str(Path(__file__).parent))
from common import folders, load, opened, quality, save

from autocompress.database import LevelDatabase
from autocompress.deploy import deploy
from autocompress.finish import finish
from autocompress.fitness import fitness, forward
from autocompress.graph import trace
from autocompress.pairing import pair
from autocompress.recipe import Recipe
from autocompress.recover import Recovery, recover
from autocompress.space import make_space
from autocompress.tasks import Task, load_task
from autocompress.trained import bits_in
from autocompress.types import Plan

STEPS, JUDGED = 100, 2000
PLANS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    # name: (family, level, recipes)
    "inner channels, half": (
        "channels",
        "inner",
        ("logits", "labels,logits=0", "labels", "labels,dot", "features", "attention", "theseus", "shrink", "wid"),
    ),
    "90% sparse by magnitude": ("sparse-magnitude", "90% sparse by magnitude", ("logits", "gradual")),
    "90% sparse by fisher": ("sparse-fisher", "90% sparse by fisher", ("logits", "gradual")),
    "2-bit weights, nearest": (
        "w2-nearest",
        "2-bit weights in groups of 64",
        ("logits", "labels,logits=0", "scales", "scales,features"),
    ),
    "2-bit weights by GPTQ": ("w2", "2-bit weights in groups of 64 by GPTQ", ("logits", "scales")),
    "8-bit weights": ("w8", "8-bit weights", ("bits=0.02", "bits=0.1")),
    "2-bit tables": ("lut", "2-bit tables", ("logits", "scales", "clusters")),
}


def plan_of(database: LevelDatabase, level: str) -> Plan:
    """The level at every layer that has it; ``inner``: half of the channels inside each block."""
    plan = []
    for site, levels in zip(database.space.sites, database.space.levels, strict=True):
        inner = level == "inner" and site.name.endswith(".conv1")
        wanted = f"keep {site.width // 2}/{site.width}" if inner else level
        labels = [one.label for one in levels]
        plan.append(labels.index(wanted) if wanted in labels else 0)
    return tuple(plan)


def found(task: Task, reference: Tensor, model: fx.GraphModule) -> dict[str, str]:
    deployed = deploy(model)
    loss = fitness(task, forward(deployed, task, task.search), reference, task.search.targets)
    bits, accuracy = bits_in(deployed), quality(task, deployed, task.report.take(JUDGED))
    return {"loss": f"{loss:.3f}", "accuracy": f"{accuracy:.1%}", "bits": f"{bits:.2f}" if bits else "–"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    folders(parser)
    data = parser.parse_args().data
    torch.set_num_threads(1)
    task = load_task("cifar10:resnet20", data)
    graph = trace(task.model, task.example_inputs)
    judged = replace(task, search=task.search.take(1000))
    reference = forward(graph.module, judged, judged.search)
    rows = load("recovery")
    for name, (family, level, recipes) in PLANS.items():
        database = opened(graph, make_space(graph, (family,)), task)
        plan = plan_of(database, level)
        assert any(plan), database.space.levels
        start = None
        for words in recipes:
            key = f"{name}: {words}"
            if key in rows:
                continue
            start = start or finish(database, plan)

            settings = Recovery(steps=STEPS, batch_size=128, recipe=Recipe.parse(words))
            before, begin = found(judged, reference, start), time.process_time()
            after = recover(start, graph.module, judged, settings, reference, pairing=pair(database, plan))
            seconds = time.process_time() - begin
            rows[key] = {
                "plan": name,
                "recipe": words,
                **{f"{k} before": v for k, v in before.items()},
                **found(judged, reference, after),
                "seconds": f"{seconds:.0f}",
            }
            columns = [
                ("plan", "level"),
                ("recipe", "recipe"),
                ("loss before", "KL before"),
                ("loss", "after"),
                ("accuracy before", "top-1 before"),
                ("accuracy", "after"),
                ("bits", "bits used"),
                ("seconds", "CPU s"),
            ]
            title = f"Recovery of ResNet-20: {STEPS} steps of 128 images"
            save("recovery", rows, columns, title, "python benchmarks/recovery.py --data ASSETS")
            print(key, rows[key], flush=True)


if __name__ == "__main__":
    main()

"""Methods without a search: quality against size with every layer at the same level, on five networks.

Run: python benchmarks/methods.py --data ASSETS --families spqr billm; resumable row by row. One thread. Two rungs: levels as
the database makes them from dense inputs (``stitched``), and after the sequential refit. ``channels:IMPORTANCE`` prunes every
group to 7/8, to three quarters and to half of its width by that importance. ``width:IMPORTANCE`` does so to a decoder's hidden
width, and times the refitted models' files in ONNX Runtime against the original's, one window at a time.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import fx

sys.path.insert(0, str(Path(__file__).parent))
from common import folders, load, opened, quality, save
from imagenet_nets import network_task

from autocompress.costs import CostModel
from autocompress.deploy import deploy
from autocompress.export import export_onnx
from autocompress.finish import finish
from autocompress.graph import Graph, trace
from autocompress.hwprofiles import compare
from autocompress.onnx_file import open_session
from autocompress.results import Importance
from autocompress.space import SAP_ROUNDS, make_space
from autocompress.tasks import Task
from autocompress.types import Plan, SearchSpace

JUDGED = {"cifar10:resnet20": 2000, "cifar10:resnet56": 2000, "mcunet": 500, "mobilenet_v2": 500, "lm:python_llama": 96}
"""Test images, windows of text."""
WIDTHS = (0.875, 0.75, 0.5)
TIMED = "width"
SECONDS = 20
"""Of timing a pair of files."""
COSTS = ("weight_bits", "params", "macs")


def plans(space: SearchSpace, family: str) -> Iterator[tuple[str, Plan]]:
    """Each label that layers have, at all that have it; widths at the level that is nearest to a share."""
    if all(site.kind == "channels" for site in space.sites):
        for share in WIDTHS:
            nearest = [
                min(range(len(levels)), key=lambda i: abs((levels[i].steps[0].keep if i else site.width) - share * site.width))  # type: ignore[attr-defined]
                for site, levels in zip(space.sites, space.levels, strict=True)
            ]  # fmt: skip
            yield f"{100 * share:g}% of the width", tuple(nearest)
        return
    if family == "sparse-pq":  # a layer has fewer levels where its rounds end alike
        for i, rounds in enumerate(SAP_ROUNDS, 1):
            yield f"{rounds} rounds of SAP", tuple(min(i, n - 1) for n in space.n_levels)
        return
    labels = dict.fromkeys(level.label for levels in space.levels for level in levels[1:])
    for label in labels:
        places = [[level.label for level in levels] for levels in space.levels]
        yield label, tuple(found.index(label) if label in found else 0 for found in places)


def speedup(task: Task, dense: fx.GraphModule, model: fx.GraphModule) -> str:
    """How many times as fast the file of ``model`` is as that of ``dense``, on one thread, with its 95 % interval."""
    examples = task.inputs(task.calibration.take(2))
    with tempfile.TemporaryDirectory() as folder:
        before, after = Path(folder) / "before.onnx", Path(folder) / "after.onnx"
        export_onnx(dense, examples, before)
        export_onnx(model, examples, after)
        name = open_session(after).get_inputs()[0].name
        found = compare(after, before, inputs={name: examples[:1].numpy()}, seconds=SECONDS)
    low, high = (1 / ratio for ratio in reversed(found.ratio_interval))
    return f"{1 / found.ratio:.2f}x ({low:.2f} to {high:.2f})"


def rows(task: Task, graph: Graph, family: str, known: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    name, _, importance = family.partition(":")
    space = make_space(graph, (name,), cast(Importance, importance or "obs"))
    database, costs, split = (
        opened(graph, space, task),
        CostModel(graph, space, {}),
        task.report.take(JUDGED[task.name]),
    )
    dense = costs.in_units(space.dense)
    for label, plan in plans(space, name):
        key = f"{family} {label}"
        if key in known:
            continue
        start = time.process_time()
        found = {"stitched": quality(task, deploy(database.stitch(plan)), split)}
        seconds = time.process_time() - start
        model = deploy(finish(database, plan))
        found["refitted"] = quality(task, model, split)
        faster = {"speed": speedup(task, deploy(database.stitch(space.dense)), model)} if name == TIMED else {}
        cost = costs.in_units(plan)
        yield (
            key,
            {
                "family": family,
                "level": label,
                "weight_bits": f"{cost['weight_bits']:.2f}",
                **{metric: f"{cost[metric] / dense[metric]:.1%}" for metric in COSTS[1:]},
                **{rung: f"{value:.1%}" if task.higher_is_better else f"{value:.2f}" for rung, value in found.items()},
                "seconds": f"{seconds:.1f}",
                **faster,
            },
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    folders(parser)
    parser.add_argument("--families", nargs="*", default=["spqr", "billm"])
    parser.add_argument("--only", choices=list(JUDGED), nargs="*", default=list(JUDGED))
    given = parser.parse_args()
    torch.set_num_threads(1)
    for spec in given.only:
        task = network_task(spec, given.data)
        graph, name = trace(task.model, task.example_inputs), "methods_" + spec.rpartition(":")[2]
        JUDGED.setdefault(task.name, JUDGED[spec])
        original, known = quality(task, graph.module, task.report.take(JUDGED[task.name])), load(name)
        shown = f"{original:.1%}" if task.higher_is_better else f"{original:.2f}"
        columns = [
            ("family", "family"), ("level", "level"), ("weight_bits", "bits a weight"), ("params", "parameters"),
            ("macs", "MACs"), ("stitched", f"{task.metric_name}, stitched (original {shown})"), ("refitted", "refitted"),
            ("seconds", "s"), ("speed", "speed"),
        ]  # fmt: skip
        for family in given.families:
            for key, row in rows(task, graph, family, known):
                known[key] = row
                save(name, known, columns, f"Methods on {spec}", "python benchmarks/methods.py --data ASSETS")
                print(key, row, flush=True)


if __name__ == "__main__":
    main()

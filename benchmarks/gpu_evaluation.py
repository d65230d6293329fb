"""Plans judged on a GPU against the processor: plans a second, and how far their losses are apart.

python benchmarks/gpu_evaluation.py [--data DIR] [--tasks cifar10:resnet56 lm:python_llama] [--plans 48] [--workers 1 4]; needs
a GPU. Every row judges the same random plans from an empty cache after one plan to warm up; ``together`` are plans that are
launched before the first answer is waited for, ``workers`` are processes that share the GPU. Wall-clock time.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from common import folders, load, opened, save
from fast_evaluation import mutations

from autocompress.database import LevelDatabase
from autocompress.evaluate import Measured, Measurer
from autocompress.graph import trace
from autocompress.precision import allowed, deviation
from autocompress.prepare import offered
from autocompress.results import Request
from autocompress.space import make_space
from autocompress.tasks import load_task
from autocompress.types import Fidelity, Plan, Query
from autocompress.where import PRECISIONS, Where
from autocompress.workers import LocalWorkers, Opening

FAMILIES = ("channels", "blocks")
TITLE = "Plans judged on a GPU: plans a second, empty caches"
COLUMNS = [
    ("task", "task"),
    ("rung", "rung"),
    ("where", "where"),
    ("together", "together"),
    ("workers", "workers"),
    ("rate", "plans / s"),
    ("speedup", "against one processor thread"),
    ("off", "losses off by, at most"),
]


def judged(measurer: Measurer, queries: Sequence[Query], together: int) -> tuple[float, list[Measured]]:
    """Seconds, and values in order."""
    start, found = time.perf_counter(), list[Measured]()
    for at in range(0, len(queries), together):
        found += measurer.many(queries[at : at + together])
    return time.perf_counter() - start, found


def fresh(database: LevelDatabase, where: Where) -> Measurer:
    """Warm: the original's answers are there."""
    own = opened(database.graph, database.space, database.task)
    measurer = Measurer(own, where=where)
    measurer(database.space.dense, "slice")
    return measurer


def rows_of(name: str, args: argparse.Namespace) -> dict[str, Any]:
    request = Request(task=name, data=tuple(args.data), methods=FAMILIES, budgets=("macs<=50%",))
    task = load_task(name, args.data)
    graph = trace(task.model, task.example_inputs)
    database = opened(graph, make_space(graph, offered(task, request)), task)
    plans = list(mutations(database.space, random.Random(0), args.plans))
    gpu = torch.cuda.get_device_name()
    rows: dict[str, Any] = {}
    for rung in ("slice", "full"):
        queries = [Query(plan, rung) for plan in plans]  # type: ignore[arg-type]
        few = queries[: args.few]
        found = [("cpu float32", 1, 1, len(few), *judged(fresh(database, Where()), few, 1))]
        for precision in PRECISIONS:
            for together in (1, 16):
                measurer = fresh(database, Where("cuda", precision))
                found.append((f"{gpu} {precision}", together, 1, args.plans, *judged(measurer, queries, together)))
        for n in (n for n in args.workers if n > 1):
            spent, there = shared(database, request, plans, rung, n)  # type: ignore[arg-type]
            found.append((f"{gpu} tf32", 1, n, args.plans, spent, there))
        for row in compared(found):
            rows[f"{name} {rung} {row['where']} {row['together']} {row['workers']}"] = {
                "task": name,
                "rung": rung,
                **row,
            }
    print(allowed(database, "cuda", "auto"))
    return rows


def compared(found: Sequence[tuple[str, int, int, int, float, list[Measured]]]) -> Iterator[dict[str, Any]]:
    """Each against the first: how fast, and how far off."""
    base, truth = found[0][3] / found[0][4], [0.0, *losses(found[0][5])]
    for where, together, workers, n, seconds, there in found:
        off, _ = deviation(truth, [0.0, *losses(there)[: len(truth) - 1]])
        row = {"where": where, "together": together, "workers": workers, "rate": round(n / seconds, 2)}
        yield {**row, "speedup": f"{n / seconds / base:.1f}x", "off": f"{off:.2%}"}
        print(row, f"{off:.2%}", flush=True)


def shared(
    database: LevelDatabase, request: Request, plans: Sequence[Plan], rung: Fidelity, n: int
) -> tuple[float, list[Measured]]:
    """The same by processes that share the GPU; they have judged one plan each before."""
    with tempfile.TemporaryDirectory() as folder:
        opening = Opening.of(database, request, Path(folder) / "models", 1, Where("cuda", "tf32"))
        workers = LocalWorkers(opening, n)
        try:
            list(workers.measure([Query(database.space.dense, "slice")] * n))
            start = time.perf_counter()
            found = dict(workers.measure([Query(plan, rung) for plan in plans]))
            return time.perf_counter() - start, [found[i] for i in range(len(plans))]
        finally:
            workers.close()


def losses(found: Sequence[Measured]) -> list[float]:
    return [float("inf") if values["loss"] is None else float(values["loss"]) for values in found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    folders(parser)
    parser.add_argument("--tasks", nargs="*", default=["cifar10:resnet56", "lm:python_llama"])
    parser.add_argument("--plans", type=int, default=48)
    parser.add_argument("--few", type=int, default=6, help="of these plans, so many are judged on the processor")
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 4])
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name in args.tasks:
        rows = {**load("gpu_evaluation"), **rows_of(name, args)}
        save("gpu_evaluation", rows, COLUMNS, TITLE, "python benchmarks/gpu_evaluation.py")


if __name__ == "__main__":
    main()

"""What a level database takes: Gram matrices, orders and every level of every site once, from nothing.

python benchmarks/level_database.py [--data DIR] [--only NETWORK]; one thread, a process a network, for the families that a search
has by default. Layer errors and one-site losses are the search's.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from common import folders, load, save
from imagenet_nets import network_task

from autocompress.database import LevelDatabase
from autocompress.graph import trace
from autocompress.results import METHOD_FAMILIES
from autocompress.search.tables import switch
from autocompress.space import make_space

NETWORKS = ("cifar10:resnet20", "cifar10:resnet56", "lm:python_llama")
COLUMNS = [
    ("network", "network"),
    ("sites", "sites"),
    ("levels", "levels"),
    ("build", "Gram matrices and orders, s"),
    ("made", "every level once, s"),
    ("megabytes", "on disk, MB"),
    ("memory", "most memory, MB"),
    ("before", "of which model and data, MB"),
]


def peak() -> int:
    """The most memory this process had so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def one(network: str, data: list[str]) -> dict[str, Any]:
    torch.set_num_threads(1)
    task = network_task(network, data)
    graph = trace(task.model, task.example_inputs)
    space, before = make_space(graph, METHOD_FAMILIES), peak()
    with tempfile.TemporaryDirectory() as folder:
        start = time.process_time()
        database = LevelDatabase(graph, space, task, Path(folder))
        database.build()
        built = time.process_time()
        for site, count in enumerate(space.n_levels):
            for level in range(1, count):
                database.stitch(switch(space.dense, site, level))
        made = time.process_time()
        size = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
    return {
        "network": network,
        "sites": len(space.sites),
        "levels": sum(space.n_levels) - len(space.sites),
        "build": round(built - start, 1),
        "made": round(made - built, 1),
        "megabytes": round(size / 1e6, 1),
        "memory": peak(),
        "before": before,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    folders(parser)
    parser.add_argument("--only", choices=NETWORKS, nargs="*", default=list(NETWORKS))
    given = parser.parse_args()
    for network in given.only:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            row = pool.apply(one, (network, given.data))
        print(row, flush=True)
        title = "Level databases from nothing: CPU-seconds of one thread"
        rows = {**load("level_database"), network: row}
        save("level_database", rows, COLUMNS, title, "python benchmarks/level_database.py")


if __name__ == "__main__":
    main()

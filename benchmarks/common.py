"""What every benchmark shares: results as JSON with versions and machine, and the table rendered from them."""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from autocompress.database import LevelDatabase
from autocompress.files import cache_dir, write_json, write_text
from autocompress.graph import Graph
from autocompress.hwprofiles import describe_host
from autocompress.tasks import Split, Task
from autocompress.types import SearchSpace
from autocompress.verify import environment

RESULTS = Path(__file__).parent / "results"


def folders(parser: argparse.ArgumentParser) -> None:
    """``--data``: folders with the assets, by default those of AUTOCOMPRESS_DATA."""
    default = [folder for folder in os.environ.get("AUTOCOMPRESS_DATA", "").split(":") if folder]
    parser.add_argument("--data", nargs="*", default=default)


def opened(graph: Graph, space: SearchSpace, task: Task) -> LevelDatabase:
    """A database of its own for each who measures, so that nobody finds refits that another one paid for."""
    database = LevelDatabase(graph, space, task, cache_dir() / "databases")
    database.build()
    return database


def quality(task: Task, model: nn.Module, split: Split) -> float:
    """The task's metric on a split."""
    with torch.no_grad():
        scores = torch.cat([task.score(model(x), y) for x, y in task.batches(split, task.batch_size)])
    return task.metric_of(float(scores.double().mean()))


def load(name: str) -> dict[str, Any]:
    """Rows by key of an earlier, perhaps unfinished run."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text())["rows"] if path.exists() else {}


def give_back() -> None:
    """Memory that the C library keeps for itself goes back to the system: gigabytes once an evaluator is gone."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def save(name: str, rows: Mapping[str, Any], columns: Sequence[tuple[str, str]], title: str, command: str) -> None:
    """Write ``results/<name>.json`` and ``results/<name>.md``; ``columns``: (key of a row, heading)."""
    RESULTS.mkdir(exist_ok=True)
    versions = environment()["versions"]
    write_json(
        RESULTS / f"{name}.json", {"command": command, "versions": versions, "machine": describe_host(), "rows": rows}
    )
    head = "| " + " | ".join(heading for _, heading in columns) + " |\n|" + " --- |" * len(columns)
    body = "\n".join("| " + " | ".join(str(row.get(key, "–")) for key, _ in columns) + " |" for row in rows.values())
    write_text(RESULTS / f"{name}.md", f"# {title}\n\n{head}\n{body}\n\nRenewed by `{command}`.\n")

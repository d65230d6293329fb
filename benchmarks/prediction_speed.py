"""Plans a second whose costs are predicted in one call, for ResNet-20 and -56 on CIFAR-10 (random weights: costs do not ask).

python benchmarks/prediction_speed.py [--plans N]; seconds of one processor, the median of five calls. Plans are drawn uniformly:
few of them have an operator at the same features as another plan's, which is the hardest case for tables.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))
from common import save

from autocompress.costs import MANY, CostModel
from autocompress.graph import Graph, trace
from autocompress.hwprofiles import HardwareProfile, load_profile
from autocompress.space import make_space
from autocompress.tasks.resnet import PadBlock, ResNet
from autocompress.types import IntArray, SearchSpace

NETWORKS = {"ResNet-20": 3, "ResNet-56": 9}
FAMILIES = ("channels", "lowrank", "int8", "w8", "w4")
PROFILES = ("pixel3", "h200-fp16")
CALLS = 5
FEW = 1000
COLUMNS = [
    ("network", "network"),
    ("devices", "devices"),
    ("sites", "sites"),
    ("levels", "levels"),
    ("columns", "costs"),
    ("first", f"first {FEW:,} plans, a second"),
    ("fresh", "plans never seen, a second"),
    ("again", "known operators, a second"),
    ("one_by_one", f"calls of {MANY - 1}, a second"),
    ("rows", "operators computed"),
]


def plans_of(space: SearchSpace, n: int, seed: int) -> IntArray:
    rng = np.random.default_rng(seed)
    return np.stack([rng.integers(0, count, n) for count in space.n_levels], axis=1)


def rate(costs: CostModel, plans: IntArray, calls: int = 1, size: int | None = None) -> float:
    """Plans a processor second."""
    times = []
    for _ in range(calls):
        start = time.process_time()
        for i in range(0, len(plans), size or len(plans)):
            costs.cost(plans[i : i + (size or len(plans))])
        times.append(time.process_time() - start)
    return len(plans) / statistics.median(times)


def row_of(name: str, graph: Graph, profiles: dict[str, HardwareProfile], n: int) -> dict[str, Any]:
    space = make_space(graph, FAMILIES)
    costs = CostModel(graph, space, profiles)
    first = rate(costs, plans_of(space, FEW, 0))
    known = plans_of(space, n, 1)
    costs.cost(known)
    fresh = rate(costs, plans_of(space, n, 2))
    again = rate(costs, known, CALLS)
    small = rate(costs, known[: 20 * (MANY - 1)], CALLS, MANY - 1)
    return {
        "network": name,
        "devices": ", ".join(profiles),
        "sites": len(space.sites),
        "levels": sum(space.n_levels),
        "columns": len(costs.keys),
        **{key: f"{value:,.0f}" for key, value in {"first": first, "fresh": fresh, "again": again}.items()},
        "one_by_one": f"{small:,.0f}",
        "rows": f"{len(costs._features._codes):,}",
        "plans": n,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plans", type=int, default=16384)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = {}
    for name, blocks in NETWORKS.items():
        graph = trace(ResNet(PadBlock, blocks).eval(), torch.randn(1, 3, 32, 32))
        for devices in (PROFILES[:1], PROFILES[1:], PROFILES):
            profiles = {device: load_profile(device) for device in devices}
            rows[f"{name} {' '.join(devices)}"] = row_of(name, graph, profiles, arguments.plans)
            save("prediction_speed", rows, COLUMNS, "Predicted plans a second", "python benchmarks/prediction_speed.py")
    print((Path(__file__).parent / "results" / "prediction_speed.md").read_text())


if __name__ == "__main__":
    main()

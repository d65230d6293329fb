"""The main job on CIFAR-10 ResNets at MACs budgets: accuracy on the report split by rung, speed, size, time by stage.

python benchmarks/main_job.py [--data DIR] [--only resnet20:50] [--evaluations N]; resumable row by row.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from common import folders, load, save

from autocompress.errors import BudgetUnmet
from autocompress.evaluate import forward
from autocompress.files import cache_dir
from autocompress.opened import Opened, open_run
from autocompress.pipeline import compress
from autocompress.results import METHOD_FAMILIES, JobResult, Request
from autocompress.service.store import JobStore
from autocompress.stages import Stages

CHANNELS = ("channels", "blocks")
PROBLEMS = {  # key -> network, budget, methods
    "resnet20:50": ("resnet20", "macs<=50%", CHANNELS),
    "resnet20:30": ("resnet20", "macs<=30%", CHANNELS),
    "resnet56:50": ("resnet56", "macs<=50%", CHANNELS),
    "resnet56:30": ("resnet56", "macs<=30%", CHANNELS),
    "resnet20:latency": ("resnet20", "latency_ms<=50%@local", METHOD_FAMILIES),
}
LOCAL = "latency_ms@local"
COLUMNS = [
    ("network", "network"),
    ("budget", "budget"),
    ("original", "original %"),
    ("full", "full %"),
    ("refitted", "refitted %"),
    ("recovered", "recovered %"),
    ("macs", "MACs"),
    ("size", "size"),
    ("speed", "measured speed"),
    ("predicted", "predicted speed"),
    ("seconds", "seconds by stage"),
    ("cpu_minutes", "CPU min (recovery)"),
]


def accuracy(run: Opened, plan: tuple[int, ...], rung: str) -> float:
    """Top-1 in percent on the report split."""
    task = run.made.task
    model = run.models.deployed(plan, rung)  # type: ignore[arg-type]
    return 100 * task.metric(forward(model, task, task.report), task.report.targets)


def one(key: str, args: argparse.Namespace) -> dict[str, object]:
    net, budget, methods = PROBLEMS[key]
    request = Request(
        task=f"cifar10:{net}",
        data=tuple(args.data),
        budgets=(budget,),
        evaluations=args.evaluations,
        methods=methods,
        recover_minutes=args.recover_minutes,
        seed=args.seed,
        threads=1,
    )
    same = request.hash  # the steps do not name the folder: a run with other steps reuses every other evaluation
    request = request.model_copy(update={"recover_steps": args.recover_steps})
    out = cache_dir() / "benchmarks" / f"main_job_{key.replace(':', '_')}_{same}"
    cpu, start = time.process_time(), time.time()

    def tick(p: object) -> None:
        print(f"  [{time.time() - start:6.0f} s] {p.stage} {p.done}/{p.total} {p.message}", flush=True)  # type: ignore[attr-defined]

    out.mkdir(parents=True, exist_ok=True)
    with JobStore(out / "ledger.sqlite") as store:
        try:
            result = compress(request, out, ledger=store.ledger(same), progress=tick)
        except BudgetUnmet as error:
            print(error)
            result = JobResult.model_validate_json((out / "result.json").read_text())
    cpu = time.process_time() - cpu
    torch.set_num_threads(1)
    run = open_run(request, out, None, Stages(None))
    certificate = json.loads((out / "certificate.json").read_text())
    points = [p for p in result.points if p.id == (result.best or result.points[0].id)]
    plan = run.made.space.plan_from_json(points[0].levels)
    rungs = {rung: f"{accuracy(run, plan, rung):.2f}" for rung in ("full", "refitted", "recovered")}
    speed = certificate["speed"]
    original = run.made.task
    dense = forward(run.models.deployed(run.made.space.dense, "full"), original, original.report)
    costs = run.made.costs.in_units(plan)
    recover = result.seconds.get("recover", 0.0)
    return {
        "network": net,
        "budget": budget,
        "original": f"{100 * original.metric(dense, original.report.targets):.2f}",
        **rungs,
        "macs": f"{costs['macs'] / run.made.dense_costs['macs']:.1%}",
        "size": f"{certificate['artifact']['bytes'] / certificate['original']['bytes']:.1%}",
        "speed": f"{1 / speed['ratio']:.2f}x ({1 / speed['ratio_interval'][1]:.2f}-{1 / speed['ratio_interval'][0]:.2f})",
        "noise": speed["noise"],
        "predicted": f"{run.made.dense_costs[LOCAL] / costs[LOCAL]:.2f}x" if LOCAL in costs else "–",
        "seconds": ", ".join(f"{k} {v:.0f}" for k, v in result.seconds.items()),
        "cpu_minutes": f"{cpu / 60:.1f} ({recover / 60:.1f})",
        "evaluations": result.evaluations,
        "seed": args.seed,
        "steps": run.request.recover_steps,
        "plan": points[0].plan,
        "certificate": {key: certificate[key] for key in ("statements", "quality", "speed", "parity", "costs")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    folders(parser)
    parser.add_argument("--only", help="one problem, such as resnet20:50")
    parser.add_argument("--evaluations", type=int, default=400)
    parser.add_argument("--recover-minutes", type=float, default=4.0)
    parser.add_argument("--recover-steps", type=int, help="steps a plan, instead of minutes")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rows = load("main_job")
    for key in PROBLEMS:
        if (args.only and key != args.only) or (not args.only and key in rows):
            continue
        print(key)
        row = one(key, args)
        rows = {**load("main_job"), key: row}  # another process may have finished a row meanwhile
        rows = {k: rows[k] for k in PROBLEMS if k in rows}
        title = "The main job: CIFAR-10 ResNets under one budget"
        save("main_job", rows, COLUMNS, title, "python benchmarks/main_job.py")


if __name__ == "__main__":
    main()

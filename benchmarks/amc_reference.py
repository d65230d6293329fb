"""AMC's own code beside our searches: same network, images and CPU time, at the MACs that AMC's best network has.

python benchmarks/amc_reference.py --amc DIR [--data DIR] [--seeds 0 1 2] [--seconds 180] [--preserve 0.5]; resumable row by
row. DIR is a checkout of https://github.com/mit-han-lab/amc (measured with 65363c8), of which nothing is copied or changed:
``amc_search.py`` runs in a process of its own behind ``amc_runner.py``, first to search, then with ``--job export`` to write
the best network. What is pruned is ``mobilenet.py``, as the release handles no other kind of network.

What stands between the script and its old surroundings (all of it in ``amc_runner.py``):

- ``cuda()`` of tensors, losses and networks does nothing, so that all runs on the CPU, in one thread;
- ``np.float`` is back; ``Tensor.view`` copies what is not contiguous; the environment gets its action as a number and not as
  an array of one; ``stty size`` is answered without a terminal;
- ``lib.data`` (needs torchvision, and reads CIFAR-100 for CIFAR-10) gives our calibration images to take features from and
  our search split to validate on; ``models.mobilenet`` gives our network; TensorBoard's writer draws nothing;
- lines of output are stamped with CPU-seconds, and the first episode that ends after the time given is the last.

Options that differ from the release's: top-1 for top-5, 25 random episodes for 100 (as in our ``amc``), 5 points of 2,000 images
for 10 of 3,000 (10,000 rows a layer). The clock starts when images, features and Gram matrices are there, on either side.
"""

from __future__ import annotations

import argparse
import ast
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from common import folders, load, opened, quality, save
from mobilenet import WIDTHS, MobileNet, mobilenet_task
from problems import Setting, one

from autocompress.costs import CostModel
from autocompress.deploy import deploy
from autocompress.errors import UsageError
from autocompress.finish import finish
from autocompress.fitness import Soft
from autocompress.graph import Graph, trace
from autocompress.methods import ChannelPruning
from autocompress.space import make_space
from autocompress.tasks import Task
from autocompress.types import Budget, Level, Plan, SearchSpace

NAME = "amc_reference"
SECONDS = 180.0
PRESERVE = 0.5
"""Share of the MACs that the release is told to keep at most."""
N_SEARCH, N_TEST = 1000, 5000
"""Images that candidates are judged on, and test images that winners are judged on."""
BATCH = 50
SEARCHES = ("amc", "auto", "uniform")
OPTIONS = "--model mobilenet --dataset imagenet --acc_metric acc1 --n_worker 0 --warmup 25 --n_points_per_layer 5"
TITLE = "AMC's own code and our searches: same network, images, MACs and CPU time"
COLUMNS = [
    ("search", "search"),
    ("seed", "seed"),
    ("macs", "MACs"),
    ("share", "of the original"),
    ("accuracy", "test accuracy"),
    ("kl", "KL, test images"),
    ("refitted", "refitted: test accuracy"),
    ("refitted_kl", "refitted: KL"),
    ("answers", "plans judged"),
    ("seconds", "CPU-seconds"),
    ("widths", "widths"),
]


@dataclass(frozen=True)
class Problem:
    """The network and its images, made ready once; ``answers``: the original's to the test images, batch by batch."""

    task: Task
    graph: Graph
    answers: Sequence[Soft]

    @staticmethod
    def of(data: Sequence[str]) -> Problem:
        task = mobilenet_task(data)
        task = replace(task, search=task.search.take(N_SEARCH), report=task.report.take(N_TEST))
        graph = trace(task.model, task.example_inputs)
        return Problem(task, graph, [Soft.of(outputs) for outputs in outputs_of(task, task.model)])

    def judged(self, model: nn.Module) -> dict[str, Any]:
        """Accuracy and mean KL to the original's answers on the test images."""
        outputs = list(outputs_of(self.task, model))
        kls = torch.cat([soft.kl(found) for soft, found in zip(self.answers, outputs, strict=True)])
        accuracy = self.task.metric(torch.cat(outputs), self.task.report.targets)
        return {"accuracy": f"{accuracy:.2%}", "kl": round(float(kls.mean()), 4)}

    def setting(self, space: SearchSpace, limit: float) -> Setting:
        database = opened(self.graph, space, self.task)
        return Setting(self.task, database, CostModel(self.graph, space, {}), [Budget("macs", limit)])


def outputs_of(task: Task, model: nn.Module) -> list[torch.Tensor]:
    """Logits on the test images, batch by batch."""
    with torch.inference_mode():
        return [model(inputs) for inputs, _ in task.batches(task.report, task.batch_size)]


def macs_of(model: nn.Module, task: Task) -> float:
    """What our counter says of a whole network."""
    graph = trace(model, task.example_inputs)
    space = make_space(graph, ["channels"])
    return CostModel(graph, space, {}).in_units(space.dense)["macs"]


# ---------------------------------------------------------------- the release


def reference(problem: Problem, args: argparse.Namespace, seed: int) -> tuple[dict[str, Any], nn.Module]:
    """Search with AMC's code, then let it write its best network; that network."""
    checkout, seconds = args.amc.resolve(), args.seconds
    task = problem.task
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        splits = {"calibration": task.calibration, "search": task.search}
        torch.save({name: list(task.batches(split, BATCH)) for name, split in splits.items()}, folder / "loaders.pt")
        torch.save(task.model.state_dict(), folder / "network.pth")
        command = f"""{OPTIONS} --ckpt_path {folder / "network.pth"} --data_bsize {BATCH} --seed {seed}
            --n_calibration_batches {len(task.calibration) // BATCH}"""
        lines = run(checkout, folder, seconds, f"{command} --preserve_ratio {args.preserve} --output {folder}")
        channels = [
            ast.literal_eval(line.split("primes: ")[1].split("]")[0] + "]") for line in lines if "primes" in line
        ]
        exported = folder / "pruned.pth"
        run(
            checkout,
            folder,
            seconds,
            f"{command} --job export --export_path {exported} --channels {listed(channels[-1])}",
        )
        model = MobileNet(channels[-1][1:])
        model.load_state_dict(torch.load(exported))
    model.eval()
    episodes = [line for line in lines if " #" in line and "episode_reward" in line]
    best = [line for line in lines if "New best reward" in line][-1]
    row = {
        "answers": len(episodes),
        "seconds": round(float(episodes[-1].split()[0]), 1),
        "reported": float(best.split("acc: ")[1].split(",")[0]),
        "search": "released AMC",
        "search_accuracy": round(100 * quality(task, model, task.search), 2),
        "widths": channels[-1][1:],
    }
    return row, model


def listed(channels: Sequence[int]) -> str:
    return ",".join(map(str, channels))


def run(checkout: Path, folder: Path, seconds: float, options: str) -> list[str]:
    """The lines that ``amc_search.py`` prints, each behind its CPU-seconds."""
    runner = Path(__file__).with_name("amc_runner.py")
    done = subprocess.run(
        [sys.executable, runner, str(seconds), folder, "amc_search.py", *options.split()],
        cwd=checkout,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"AMC's code failed:\n{done.stdout[-500:]}\n{done.stderr[-3000:]}")
    return done.stdout.splitlines()


# ---------------------------------------------------------------- ours


def ours(problem: Problem, search: str, seed: int, seconds: float, limit: float) -> dict[str, Any]:
    """One of our searches from an empty ledger, within ``limit`` MACs."""
    setting = problem.setting(make_space(problem.graph, ["channels"]), limit)
    found, plan = one(setting, search, seed, seconds)
    if plan is None:
        raise RuntimeError(f"{search} found no plan within {limit:g} MACs.")
    kept = {key: found[key] for key in ("seconds", "answers", "ended", "loss", "path")}
    return {"search": search, **kept, **both(problem, setting, plan)}


def their_widths(problem: Problem, widths: Sequence[int], limit: float) -> dict[str, Any]:
    """The release's widths with our choice of channels and our refits: what is left is the difference of the searches."""
    sites = make_space(problem.graph, ["channels"]).sites
    pruned = [(site, keep) for site, keep in zip(sites, widths, strict=True) if keep < site.width]
    levels = tuple((Level(), Level((ChannelPruning(keep, site.width),))) for site, keep in pruned)
    setting = problem.setting(SearchSpace(tuple(site for site, _ in pruned), levels), limit)
    return {"search": "its widths, our refits", **both(problem, setting, (1,) * len(pruned))}


def both(problem: Problem, setting: Setting, plan: Plan) -> dict[str, Any]:
    """A plan stitched (the rung ``full``) and refitted (``finish``)."""
    database = setting.database
    refitted = problem.judged(deploy(finish(database, plan)))
    kept = {site.name: level.steps for site, level in zip(database.space.sites, levels_of(setting, plan), strict=True)}
    widths = list(WIDTHS)
    for i, site in enumerate(make_space(problem.graph, ["channels"]).sites):
        for step in kept.get(site.name, ()):
            assert isinstance(step, ChannelPruning)
            widths[i] = step.keep
    return {
        "macs": round(setting.costs.in_units(plan)["macs"]),
        **problem.judged(deploy(database.stitch(plan))),
        **{"refitted" if key == "accuracy" else "refitted_kl": value for key, value in refitted.items()},
        "widths": widths,
    }


def levels_of(setting: Setting, plan: Plan) -> list[Level]:
    return [levels[index] for levels, index in zip(setting.database.space.levels, plan, strict=True)]


# ---------------------------------------------------------------- all rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    folders(parser)
    parser.add_argument("--amc", type=Path, required=True, help="a checkout of mit-han-lab/amc")
    parser.add_argument("--searches", nargs="*", choices=SEARCHES, default=SEARCHES)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0])
    parser.add_argument("--seconds", type=float, default=SECONDS)
    parser.add_argument("--preserve", type=float, default=PRESERVE, help="share of the MACs the release may keep")
    args = parser.parse_args()
    if not (args.amc / "amc_search.py").is_file():
        raise UsageError(
            f"AMC's code is not in {args.amc}; 'git clone https://github.com/mit-han-lab/amc DIR' and give --amc DIR."
        )
    torch.set_num_threads(1)
    rows(args, Problem.of(args.data))


def rows(args: argparse.Namespace, problem: Problem) -> None:
    dense = macs_of(problem.task.model, problem.task)
    keep("original", {"search": "original", "macs": round(dense), **problem.judged(problem.task.model)}, dense)
    limit = "" if args.preserve == PRESERVE else f", {args.preserve:.0%}"
    for seed in args.seeds:
        key = f"released {seed}{limit}"
        if key not in load(NAME):
            row, model = reference(problem, args, seed)
            macs = round(macs_of(model, problem.task))
            keep(key, {**row, "seed": seed, "macs": macs, **problem.judged(model)}, dense)
        released = load(NAME)[key]
        if (key := f"widths {seed}{limit}") not in load(NAME):
            keep(key, {"seed": seed, **their_widths(problem, released["widths"], released["macs"])}, dense)
        for search in args.searches:
            if (key := f"{search} {seed}{limit}") not in load(NAME):
                row = ours(problem, search, seed, args.seconds, released["macs"])
                keep(key, {"seed": seed, **row}, dense)


def keep(key: str, row: dict[str, Any], dense: float) -> None:
    row = {**row, "share": f"{row['macs'] / dense:.1%}"}
    print(key, {k: v for k, v in row.items() if k != "path"}, flush=True)
    save(NAME, {**load(NAME), key: row}, COLUMNS, TITLE, "python benchmarks/amc_reference.py --amc DIR")


if __name__ == "__main__":
    main()

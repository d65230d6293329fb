"""EvoPress's own code beside our searches: same model, layers, levels, tokens and CPU time; one judge for all winners.

python benchmarks/evopress_reference.py --reference DIR [--data DIR] [--only LADDER] [--searches NAMES] [--seeds 0 1];
resumable row by row. DIR is a checkout of https://github.com/IST-DASLab/EvoPress (measured with 50888a0), of which nothing is
copied here: ``evo_prune_search.py`` runs unchanged in a process of its own, behind :data:`RUNNER`. It needs ``transformers``.

Levels come as two ladders. ``steps`` is EvoPress's own: neighbouring levels are a fixed number of *weights* apart, so that a
switch down and a switch up of any two layers cancel out. ``shares`` has the levels of ``llama:sparse70``, which are shares of a
layer; there a sum of levels of zero promises nothing, and what the reference finds may be over the budget.
"""

from __future__ import annotations

import argparse
import ast
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from common import folders, load, save
from problems import PROBLEMS, Setting, make, one

from autocompress.costs import CostModel
from autocompress.database import LevelDatabase
from autocompress.deploy import deploy
from autocompress.evaluate import Measurer, ModelEvaluator
from autocompress.files import cache_dir
from autocompress.methods import Sparse
from autocompress.tasks.folders import data_folders
from autocompress.types import Budget, Level, Plan, Query, SearchSpace, Site

PROBLEM = "llama:sparse70"
SPARSITY = 0.7
STEP, N_LEVELS = 4096, 8
"""Weights between two levels, and levels either way: a sixteenth of a square layer, as ``run_sparse_gpt.sh`` has it."""
HELD_OUT = 128
"""Windows that winners are judged on."""
SHARES = {-2: 0.5, -1: 0.6, 0: 0.7, 1: 0.8, 2: 0.9}

RUNNER = """
import builtins, importlib.machinery, runpy, sys, time, types
import torch

seconds, script, sys.argv = float(sys.argv[1]), sys.argv[2], sys.argv[2:]
torch.set_num_threads(1)
datasets = types.ModuleType("datasets")  # only named data sets need it
datasets.__spec__, datasets.load_dataset = importlib.machinery.ModuleSpec("datasets", None), None
sys.modules["datasets"] = datasets
move, embed, say = torch.Tensor.to, torch.nn.Embedding.forward, builtins.print
torch.Tensor.to = lambda self, *to, **rest: move(self, *("cpu" if t == "cuda" else t for t in to if t is not None), **rest)
tokens, start = 0, None


def counted(self, ids):
    global tokens
    tokens += ids.numel()
    return embed(self, ids)


def stamped(*values, **rest):  # CPU-seconds and tokens since the first plan was drawn
    global start, tokens
    text, now = " ".join(map(str, values)), time.process_time()
    if text.startswith("ppl_train") and start is None:
        start, tokens = now, 0
    say(f"{now - start:.2f}" if start is not None else "0", tokens if start is not None else 0, text, flush=True)
    if text.startswith("Train fitness:") and start is not None and now - start >= seconds:
        sys.exit(0)


torch.nn.Embedding.forward, builtins.print = counted, stamped
runpy.run_path(script, run_name="__main__")
"""
"""The script on a CPU, one thread, until its time is up; what it would save then is the search point it just printed."""

SECONDS = 90.0
TITLE = "EvoPress's own code and our searches: same levels, tokens and CPU time"
COLUMNS = [
    ("ladder", "levels"),
    ("search", "search"),
    ("seed", "seed"),
    ("loss", "KL, search split"),
    ("held_out", "KL, held out"),
    ("error", "standard error"),
    ("perplexity", "perplexity, held out"),
    ("sparsity", "zeros in the layers"),
    ("within", "within budget"),
    ("tokens", "tokens judged"),
    ("seconds", "CPU-seconds"),
]


@dataclass(frozen=True)
class Selection:
    """What a generation of the reference costs: offspring, then survivors and tokens of each stage."""

    offspring: int
    survivors: tuple[int, ...]
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Places:
    """Folders: the reference's code, the model, and levels by ladder, written once."""

    checkout: Path
    model: Path
    levels: Path


REFERENCES = {
    "reference": Selection(64, (8, 2, 1), (256, 2048, 8192)),
    "reference-fast": Selection(16, (1, 1), (512, 8192)),
}
"""As published, tokens scaled to the 8,192 of our search split (ratios 1 : 8 : 32); and the paper's "super-fast" variant
(16 offspring, 512 then 8,192 tokens; one survivor by our reading), unscaled."""
SEARCHES = ("uniform", *REFERENCES, "evopress", "auto")
Ladder = dict[int, Level]


def ladder(name: str, site: Site) -> Ladder:
    """EvoPress's level numbers -> levels of one layer; 0 is uniform, more is sparser."""
    if name == "shares":
        return {number: Level((Sparse(share),)) for number, share in SHARES.items()}
    left = {number: round((1 - SPARSITY) * site.params) - number * STEP for number in range(-N_LEVELS, N_LEVELS + 1)}
    return {number: Level((Sparse(1 - n / site.params),)) for number, n in left.items() if 0 < n < site.params}


def ready(name: str, data: list[str]) -> Setting:
    """Our side of a ladder: ``llama:sparse70`` as it is, or with EvoPress's steps and exactly the uniform plan's weights."""
    setting = replace(make(PROBLEMS[PROBLEM], data), n_held_out=HELD_OUT)
    if name == "shares":
        return setting
    graph, sites = setting.database.graph, setting.database.space.sites
    space = SearchSpace(sites, tuple((Level(), *ladder(name, site).values()) for site in sites))
    database = LevelDatabase(graph, space, setting.task, cache_dir() / "databases")
    database.build()
    costs = CostModel(graph, space, {})
    limit = costs.in_units(plan_of(space, name, {}))["nonzeros"]
    return replace(setting, database=database, costs=costs, budgets=[Budget("nonzeros", limit)])


def plan_of(space: SearchSpace, name: str, numbers: Mapping[str, int]) -> Plan:
    """EvoPress's configuration as a plan; layers without a number are at 0."""
    chosen = [ladder(name, site)[numbers.get(site.members[0], 0)] for site in space.sites]
    return tuple(levels.index(level) for levels, level in zip(space.levels, chosen, strict=True))


def write_levels(setting: Setting, name: str, folder: Path) -> None:
    """``LAYER/LEVEL.pth`` as ``prune.py`` leaves them: weights of each level, refitted on dense inputs."""
    space = setting.database.space
    ladders = [ladder(name, site) for site in space.sites]
    for number in sorted({number for levels in ladders for number in levels}):
        has = [number in levels for levels in ladders]
        plan = plan_of(space, name, {s.members[0]: number for s, there in zip(space.sites, has, strict=True) if there})
        plan = tuple(level if there else 0 for level, there in zip(plan, has, strict=True))
        model = deploy(setting.database.stitch(plan))
        for site, there in zip(space.sites, has, strict=True):
            if there:
                path = folder / site.members[0] / f"{number}.pth"
                path.parent.mkdir(parents=True, exist_ok=True)
                weight = model.get_submodule(site.members[0]).weight
                assert isinstance(weight, torch.Tensor)
                torch.save(weight.detach().clone().contiguous(), path)


def reference(
    setting: Setting, name: str, selection: Selection, places: Places, seed: int, seconds: float
) -> tuple[dict[str, Any], Plan]:
    """Run the reference on our levels and our search split; what it would save when the time is up."""
    levels, began = places.levels / name, time.process_time()
    if not levels.exists():
        write_levels(setting, name, levels)
        (levels / "seconds.txt").write_text(f"{time.process_time() - began:.1f}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        windows = setting.task.prepare(setting.task.search.inputs)
        torch.save([window[None].clone() for window in windows], folder / "tokens.pt")
        (folder / "runner.py").write_text(RUNNER)
        length, total = windows.shape[1], windows.numel()
        command = f"""--model_name_or_path {places.model} --sparse_weights_path {levels} --memory_efficient --dtype float32
            --use_fast_tokenizer --calibration_data {folder / "tokens.pt"} --calibration_tokens {total}
            --calibration_sequence_length {length} --eval_datasets {folder / "tokens.pt"} --eval_tokens {length}
            --eval_sequence_length {length} --eval_every 1000000 --generations 1000000 --fitness_fn kl --seed {seed}
            --offspring {selection.offspring} --survivors_per_selection {" ".join(map(str, selection.survivors))}
            --tokens_per_selection {" ".join(map(str, selection.tokens))}"""
        done = subprocess.run(
            [sys.executable, folder / "runner.py", str(seconds), "evo_prune_search.py", *command.split()],
            cwd=places.checkout,
            env={**os.environ, "PYTHONPATH": str(places.checkout), "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise RuntimeError(f"The reference failed:\n{done.stdout[-500:]}\n{done.stderr[-3000:]}")
    lines = [line.split(" ", 2) for line in done.stdout.splitlines() if line.count(" ") >= 2]
    points = [ast.literal_eval(text.split(": ")[1]) for _, _, text in lines if text.startswith("Current search point")]
    fitness = [(float(s), float(text.split(": ")[1])) for s, _, text in lines if text.startswith("Train fitness:")]
    layers = sorted(path.name for path in levels.iterdir() if path.is_dir())
    numbers = dict(zip(layers, points[-1], strict=True))
    row = {
        "tokens": int(lines[-1][1]),
        "seconds": round(float(lines[-1][0]), 1),
        "generations": len(points) - 1,
        "levels_seconds": float((levels / "seconds.txt").read_text()),
        "reported": fitness[-1][1],
        "path": fitness[1:],  # the first is infinite: nothing was judged yet
        "configuration": numbers,
    }
    return row, plan_of(setting.database.space, name, numbers)


def ours(setting: Setting, controller: str, seed: int, seconds: float) -> tuple[dict[str, Any], Plan]:
    """One of our searches from an empty ledger; making the levels counts as its time."""
    found, plan = one(setting, controller, seed, seconds)
    if plan is None:
        raise RuntimeError(f"{controller} found no plan within the budget.")
    length = setting.task.search.inputs.shape[1]
    kept = {key: found[key] for key in ("seconds", "answers", "ended", "path")}
    return {**kept, "tokens": found["examples"] * length}, plan


def judged(setting: Setting, plan: Plan) -> dict[str, Any]:
    """What a winner is worth: loss on the search split, KL and perplexity held out, and whether it holds the budget."""
    database, space = setting.database, setting.database.space
    evaluator = ModelEvaluator(database, setting.costs, setting.budgets, measurer=Measurer(database))
    [found] = evaluator([Query(plan, "full")])
    kls, scores = [], []
    batches = setting.task.batches(setting.held_out, setting.task.batch_size)
    for soft, outputs, (_, targets) in zip(setting.answers, setting.outputs(plan), batches, strict=True):
        kls.append(soft.kl(outputs).mean(1))
        scores.append(setting.task.score(outputs, targets).double())
    values = torch.cat(kls)
    nonzeros, dense = (setting.costs.in_units(p)["nonzeros"] for p in (plan, space.dense))
    return {
        "loss": round(found.values["loss"], 5),
        "held_out": round(float(values.mean()), 5),
        "error": round(float(values.std()) / len(values) ** 0.5, 5),
        "perplexity": round(setting.task.metric_of(float(torch.cat(scores).mean())), 3),
        "sparsity": round((dense - nonzeros) / sum(site.params for site in space.sites), 5),
        "within": found.feasible,
        "nonzeros": round(nonzeros),
        "dense_layers": plan.count(0),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    folders(parser)
    parser.add_argument("--reference", type=Path, required=True, help="a checkout of IST-DASLab/EvoPress")
    parser.add_argument("--only", nargs="*", choices=("steps", "shares"), default=["steps", "shares"])
    parser.add_argument("--searches", nargs="*", choices=SEARCHES, default=SEARCHES)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1])
    parser.add_argument("--seconds", type=float, default=SECONDS)
    parser.add_argument("--name", default="evopress_reference", help="name of the files with the results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    folder = PROBLEMS[PROBLEM].task.partition(":")[2]
    model = next(f / folder for f in data_folders(args.data) if (f / folder).is_dir())
    with tempfile.TemporaryDirectory() as temporary:
        rows(args, Places(args.reference.resolve(), model, Path(temporary)))


def rows(args: argparse.Namespace, places: Places) -> None:
    for name in args.only:
        setting: Setting | None = None
        for seed in args.seeds:
            for search in args.searches:
                key = f"{name} {search} {seed}" + ("" if args.seconds == SECONDS else f", {args.seconds:g} seconds")
                if key in load(args.name) or (search == "uniform" and seed != args.seeds[0]):
                    continue
                setting = setting or ready(name, args.data)
                if search in REFERENCES:
                    row, plan = reference(setting, name, REFERENCES[search], places, seed, args.seconds)
                elif search == "uniform":
                    row, plan = {}, plan_of(setting.database.space, name, {})
                else:
                    row, plan = ours(setting, search, seed, args.seconds)
                row = {"ladder": name, "search": search, "seed": seed, **row, **judged(setting, plan)}
                print(key, {k: v for k, v in row.items() if k not in ("path", "configuration")}, flush=True)
                command = "python benchmarks/evopress_reference.py --reference DIR"
                save(args.name, {**load(args.name), key: row}, COLUMNS, TITLE, command)


if __name__ == "__main__":
    main()

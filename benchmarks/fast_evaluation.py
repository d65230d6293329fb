"""What an evaluation costs beside its forward pass, and what starting where plans differ saves, on CIFAR-10's ResNet-56.

python benchmarks/fast_evaluation.py [--data DIR] [--only sweep:channels] [--plans N]; resumable row by row. CPU-seconds of one
thread; every plan is judged at the rung ``slice`` by whole models (plain), without kept values (fresh) and with them (reuse), and
the losses must be equal. A row takes some CPU-minutes; the level database is made once and takes two more.

``racing`` rows: of a generation of children the two best, found by judging all of them on the whole search split with whole
models (the plain loop), and by a race: all on the slice, the best eighth on the whole split.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from common import folders, load, opened, save

from autocompress.costs import CostModel
from autocompress.deploy import deploy
from autocompress.evaluate import Measurer, forward
from autocompress.fitness import weights_last
from autocompress.graph import trace
from autocompress.results import METHOD_FAMILIES
from autocompress.search.evopress import EvoPress
from autocompress.space import make_space
from autocompress.tasks import Split, Task, load_task
from autocompress.types import Budget, Fidelity, Plan, SearchSpace

NETWORK = "cifar10:resnet56"
CHANNELS = ("channels", "blocks")
Found = TypeVar("Found")
COLUMNS = [
    ("plans", "n"),
    ("bare", "bare forward s"),
    ("plain", "plain s"),
    ("plain_overhead", "overhead"),
    ("fresh", "fresh s"),
    ("fresh_overhead", "overhead"),
    ("reuse", "reuse s"),
    ("prefix", "fresh / reuse"),
    ("speedup", "plain / reuse"),
    ("layout", "channels-first / -last"),
]


def sweep(space: SearchSpace, rng: random.Random, n: int) -> Iterator[Plan]:
    """One site changed, all others dense: what the table model is made of."""
    for _ in range(n):
        site = rng.randrange(len(space.sites))
        level = rng.randrange(1, space.n_levels[site])
        yield (*space.dense[:site], level, *space.dense[site + 1 :])


def mutations(space: SearchSpace, rng: random.Random, n: int) -> Iterator[Plan]:
    """Random parents with eight children each, by EvoPress' number of switches: min(U{1..3}, U{1..3}) down and as many up."""
    parent = space.dense
    for i in range(n):
        if i % 8 == 0:
            parent = tuple(rng.randrange(count) if rng.random() < 0.5 else 0 for count in space.n_levels)
        child = list(parent)
        for site in rng.sample(range(len(child)), 2 * min(rng.randint(1, 3), rng.randint(1, 3))):
            child[site] = rng.randrange(space.n_levels[site])
        yield tuple(child)


PROBLEMS: dict[str, tuple[tuple[str, ...], Callable[[SearchSpace, random.Random, int], Iterator[Plan]]]] = {
    "sweep:channels": (CHANNELS, sweep),
    "mutations:channels": (CHANNELS, mutations),
    "sweep:all": (METHOD_FAMILIES, sweep),
    "mutations:all": (METHOD_FAMILIES, mutations),
}


GENERATIONS, CHILDREN, FINALISTS, SURVIVORS = 3, 32, 4, 2
RACES = {"racing:channels": CHANNELS, "racing:all": METHOD_FAMILIES}
RACE_COLUMNS = [
    ("problem", "children"),
    ("plain", "plain s"),
    ("raced", "raced s"),
    ("speedup", "plain / raced"),
    ("same", "same survivors"),
    ("lost", "loss of the best, raced / plain"),
]


def race(key: str, args: argparse.Namespace) -> dict[str, object]:
    """Generations of EvoPress' children under half of the MACs; the plain loop's winner is the next parent."""
    task = load_task(NETWORK, args.data)
    graph = trace(task.model, task.example_inputs)
    space = make_space(graph, RACES[key])
    whole, stitched = (opened(graph, space, task) for _ in range(2))
    plain, raced = Measurer(whole, plain=True), Measurer(stitched)
    plain._teacher = raced._original()
    costs = CostModel(graph, space, {})
    limits = [Budget.parse("macs<=50%").absolute(costs.in_units(space.dense))]
    controller = EvoPress(space, costs, limits, args.seed)
    [first] = controller.ask(1)
    parent, controller.offspring = first.plan, CHILDREN
    seconds: dict[str, list[float]] = {"plain": [], "raced": []}
    same, lost = [], []
    known: dict[Plan, float] = {}

    def best(measurer: Measurer, plans: list[Plan], rung: Fidelity, n: int) -> list[Plan]:
        losses = {plan: measurer(plan, rung)["loss"] for plan in plans}
        known.update(losses if rung == "full" else {})
        return sorted(plans, key=losses.__getitem__)[:n]

    def staged(plans: list[Plan]) -> list[Plan]:
        return best(raced, best(raced, plans, "slice", FINALISTS), "full", SURVIVORS)

    for _ in range(GENERATIONS):
        children = controller._children(parent)
        spent, slow = cpu(partial(best, plain, children, "full", SURVIVORS))
        seconds["plain"].append(spent)
        spent, fast = cpu(partial(staged, children))
        seconds["raced"].append(spent)
        same.append(len({*slow} & {*fast}))
        lost.append(known[fast[0]] / known[slow[0]])
        parent = slow[0]
        print(
            "  ",
            len(children),
            {name: round(values[-1], 1) for name, values in seconds.items()},
            same,
            lost,
            flush=True,
        )
    return {
        "plain": round(sum(seconds["plain"]), 1),
        "raced": round(sum(seconds["raced"]), 1),
        "speedup": f"{sum(seconds['plain']) / sum(seconds['raced']):.1f}x",
        "same": f"{sum(same)} of {SURVIVORS * GENERATIONS}",
        "lost": ", ".join(f"{ratio:.3f}" for ratio in lost),
        "seed": args.seed,
        "seconds": seconds,
    }


def cpu(call: Callable[[], Found]) -> tuple[float, Found]:
    start = time.process_time()
    found = call()
    return time.process_time() - start, found


def one(key: str, args: argparse.Namespace) -> dict[str, object]:
    families, make = PROBLEMS[key]
    task = load_task(NETWORK, args.data)
    graph = trace(task.model, task.example_inputs)
    space = make_space(graph, families)
    database, *own = (opened(graph, space, task) for _ in range(4))
    plain, fresh, reuse = Measurer(own[0], plain=True), Measurer(own[1], limit=0), Measurer(own[2])
    plain._teacher = fresh._teacher = reuse._original()
    split = task.search.take(reuse.slice)
    seconds: dict[str, list[float]] = {name: [] for name in ("first", "last", "bare", "plain", "fresh", "reuse")}
    for i, plan in enumerate(make(space, random.Random(args.seed), args.plans)):
        model = deploy(database.stitch(plan))
        if i % 4 == 0:  # the layout's own effect, on some plans
            seconds["first"].append(cpu(partial(channels_first, model, task, split))[0])
            seconds["last"].append(cpu(partial(forward, weights_last(model), task, split))[0])
        seconds["bare"].append(cpu(partial(forward, weights_last(model), task, split))[0])
        losses = []
        for name, measurer in (("plain", plain), ("fresh", fresh), ("reuse", reuse)):
            spent, found = cpu(partial(measurer, plan, "slice"))
            seconds[name].append(spent)
            losses.append(found["loss"])  # type: ignore[index]
        if len(set(losses)) != 1:
            raise RuntimeError(f"Losses of plan {plan} differ: {losses}.")
        print(
            f"  {i + 1}/{args.plans}",
            {name: round(values[-1], 2) for name, values in seconds.items() if values},
            flush=True,
        )
    total = {name: sum(values) for name, values in seconds.items()}
    return {
        "plans": args.plans,
        **{name: round(total[name] / args.plans, 3) for name in ("bare", "plain", "fresh", "reuse")},
        "plain_overhead": f"{total['plain'] / total['bare'] - 1:.0%}",
        "fresh_overhead": f"{total['fresh'] / total['bare'] - 1:.0%}",
        "prefix": f"{total['fresh'] / total['reuse']:.2f}x",
        "speedup": f"{total['plain'] / total['reuse']:.2f}x",
        "layout": f"{statistics.median(a / b for a, b in zip(seconds['first'], seconds['last'], strict=True)):.2f}x",
        "seed": args.seed,
        "seconds": {name: [round(value, 4) for value in values] for name, values in seconds.items()},
    }


def channels_first(model: nn.Module, task: Task, split: Split) -> None:
    """The same forward pass with images as they lie on disk."""
    with torch.inference_mode():
        for inputs, _ in task.batches(split, task.batch_size):
            model(inputs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    folders(parser)
    parser.add_argument("--only", choices=[*PROBLEMS, *RACES])
    parser.add_argument("--plans", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    title = "Evaluations of ResNet-56 at the rung slice: CPU-seconds a plan, one thread"
    table("fast_evaluation", PROBLEMS, one, [("problem", "plans"), *COLUMNS], title, args)
    title = "Generations of ResNet-56 at half of its MACs: CPU-seconds, one thread"
    table("fast_evaluation_race", RACES, race, RACE_COLUMNS, title, args)


def table(
    name: str,
    keys: Iterable[str],
    measure: Callable[[str, argparse.Namespace], dict[str, object]],
    columns: list[tuple[str, str]],
    title: str,
    args: argparse.Namespace,
) -> None:
    """The rows that are missing, or the one that is asked for."""
    rows = load(name)
    for key in keys:
        if (args.only and key != args.only) or (not args.only and key in rows):
            continue
        print(key)
        rows[key] = {"problem": key, **measure(key, args)}
        rows = {k: rows[k] for k in keys if k in rows}
        save(name, rows, columns, title, "python benchmarks/fast_evaluation.py")


if __name__ == "__main__":
    main()

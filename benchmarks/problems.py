"""What controllers are compared on, and one search with all that it spends written down; see ``search.py``."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from common import opened

from autocompress.costs import CostModel
from autocompress.database import LevelDatabase
from autocompress.deploy import deploy
from autocompress.evaluate import Measurer, ModelEvaluator
from autocompress.files import cache_dir
from autocompress.fitness import Soft, logits
from autocompress.graph import trace
from autocompress.hwprofiles import HardwareProfile, load_profile, measure_local
from autocompress.level_errors import level_errors
from autocompress.prepare import kernels_of, offered
from autocompress.results import METHOD_FAMILIES, Request
from autocompress.search import CONTROLLERS, ParetoFront, run
from autocompress.space import make_space
from autocompress.tasks import Split, Task, load_task
from autocompress.types import Budget, Evaluation, Objective, Plan, Query

HELD_OUT = 2000
"""Examples (windows of a language model, all there are if fewer) that winners are judged on."""


@dataclass(frozen=True)
class Problem:
    """``families``: methods that make the space; ``budgets``: relative to the original."""

    task: str
    families: tuple[str, ...]
    budgets: tuple[str, ...]


PRUNING = ("channels", "blocks")
PROBLEMS = {
    "resnet20:macs50": Problem("cifar10:resnet20", PRUNING, ("macs<=50%",)),
    "resnet20:macs30": Problem("cifar10:resnet20", PRUNING, ("macs<=30%",)),
    "resnet56:macs50": Problem("cifar10:resnet56", PRUNING, ("macs<=50%",)),
    "resnet56:macs30": Problem("cifar10:resnet56", PRUNING, ("macs<=30%",)),
    "llama:sparse70": Problem("lm:python_llama", ("sparse",), ("nonzeros<=41%",)),
    "llama:bits2.5": Problem("lm:python_llama", ("w4", "w3", "w2"), ("weight_bits<=2.5",)),
    "llama:blocks75": Problem("lm:python_llama", ("blocks",), ("macs<=80%",)),
    "llama:joint": Problem("lm:python_llama", ("channels", "blocks", "lowrank", "w8", "w4"), ("size_mb<=35%",)),
    "resnet56:joint": Problem("cifar10:resnet56", METHOD_FAMILIES, ("latency_ms<=60%@local", "size_mb<=30%")),
}


@dataclass(frozen=True, eq=False)
class Setting:
    """A problem made ready once for all its rows."""

    task: Task
    database: LevelDatabase
    costs: CostModel
    budgets: list[Budget]
    n_held_out: int = HELD_OUT

    @cached_property
    def held_out(self) -> Split:
        """Examples that no search saw."""
        return self.task.report.take(min(self.n_held_out, len(self.task.report)))

    @cached_property
    def answers(self) -> list[Soft]:
        """The original's answers to them, batch by batch."""
        return [Soft.of(outputs) for outputs in self.outputs(self.database.space.dense)]

    def outputs(self, plan: Plan) -> Iterator[torch.Tensor]:
        """A plan's logits on the held-out examples, batch by batch."""
        model = deploy(self.database.stitch(plan))
        for inputs, _ in self.task.batches(self.held_out, self.task.batch_size):
            with torch.inference_mode():
                outputs = logits(self.task, model(inputs))
            yield outputs


def make(problem: Problem, data: Sequence[str]) -> Setting:
    task = load_task(problem.task, data)
    graph = trace(task.model, task.example_inputs)
    request = Request(task=problem.task, methods=problem.families, budgets=problem.budgets)
    space = make_space(graph, offered(task, request))
    database = opened(graph, space, task)
    profiles = {"local": local(problem, graph, space)} if any("@local" in b for b in problem.budgets) else {}
    costs = CostModel(graph, space, profiles)
    dense = costs.in_units(space.dense)
    return Setting(task, database, costs, [Budget.parse(b).absolute(dense) for b in problem.budgets])


def local(problem: Problem, graph: Any, space: Any) -> HardwareProfile:
    """This machine's times of the problem's kernels, measured once for all rows."""
    path = cache_dir() / "benchmarks" / f"search-{problem.task.replace(':', '-')}.json"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        measure_local(kernels_of(graph, space), seconds=60).save(path)
    return load_profile(path)


class Recorder:
    """An evaluator that writes down, for every best plan so far, what had been spent: examples, CPU-seconds, answers."""

    def __init__(self, evaluator: ModelEvaluator) -> None:
        self.evaluator, self.start = evaluator, time.process_time()
        self.examples = self.answers = 0
        self.best: Evaluation | None = None
        self.path: list[tuple[int, int, float, float]] = []  # answers, examples, CPU-seconds, loss
        measurer = evaluator.measurer
        self.size = {"slice": measurer.slice, "full": len(measurer.task.search)}

    def __call__(self, queries: Sequence[Query]) -> list[Evaluation]:
        found = []
        for query in queries:
            [answer] = self.evaluator([query])
            found.append(answer)
            self.answers += 1
            self.examples += 0 if answer.cached else self.size.get(query.fidelity, 0)
            better = self.best is None or answer.values["loss"] < self.best.values["loss"]
            if query.fidelity == "full" and answer.feasible and better:
                self.best = answer
                spent = time.process_time() - self.start
                self.path.append((self.answers, self.examples, round(spent, 2), answer.values["loss"]))
        return found


def one(setting: Setting, controller: str, seed: int, seconds: float) -> tuple[dict[str, Any], Plan | None]:
    space, costs = setting.database.space, setting.costs
    database = opened(setting.database.graph, space, setting.task)  # nothing is shared between rows
    evaluator = ModelEvaluator(database, costs, setting.budgets, measurer=Measurer(database))
    evaluator([Query(space.dense, "full")])  # the original's answers are nobody's
    recorder = Recorder(evaluator)
    front = ParetoFront([Objective("loss"), Objective(setting.budgets[0].key)])
    search = CONTROLLERS[controller](space, costs, setting.budgets, seed)
    search.learn((), level_errors(database))
    outcome = run(search, recorder, front, minutes=seconds / 60, batch=4, clock=time.process_time)
    row: dict[str, Any] = {
        "controller": controller,
        "seed": seed,
        "answers": outcome.n,
        "examples": recorder.examples,
        "seconds": round(time.process_time() - recorder.start, 1),
        "ended": outcome.finished,
        "path": recorder.path,
        "loss": recorder.best.values["loss"] if recorder.best else None,
        "drop": recorder.best.values["accuracy_drop"] if recorder.best else None,
    }
    return row, recorder.best.plan if recorder.best else None

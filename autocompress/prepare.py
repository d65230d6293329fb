"""What a run stands on before it searches: task, graph, space, database, the original's ONNX file, profiles, costs."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from autocompress.costs import CostModel
from autocompress.database import LevelDatabase
from autocompress.deploy import deploy
from autocompress.errors import Cancelled, UnknownName, UsageError
from autocompress.export import export_onnx
from autocompress.files import cache_dir, write_json
from autocompress.graph import IS_OUTPUT, Graph, trace
from autocompress.hwprofiles import (
    HardwareProfile,
    exact_int8,
    known_profiles,
    load_profile,
    measure_local,
    measure_ms,
    scaled,
)
from autocompress.onnx_file import Artifact, sha256_of
from autocompress.packed import packed_levels
from autocompress.pairing import pair
from autocompress.recipe import Recipe
from autocompress.recover import Recovery, recover
from autocompress.results import Request
from autocompress.search import check_feasible
from autocompress.space import make_space
from autocompress.tasks import Task, check, load_task
from autocompress.types import METRICS, Budget, Int8Format, Kernel, Plan, SearchSpace

COUNTED = ("macs", "params", "nonzeros", "weight_bits")
"""Costs that need no device and no file."""
LOCAL_SECONDS = 45
"""Time to measure this model's shapes when ``local`` has no profile yet."""
SCALE_SECONDS = 3
EXAMPLES = 32


class Ticker(Protocol):
    """What stages of a run look like from here."""

    def at(self, stage: Any, message: str = "") -> Any: ...

    def tick(self, done: int, total: int | None, message: str = "") -> None: ...


@dataclass(frozen=True, eq=False)
class Prepared:
    """Everything a search needs; ``original`` is the uncompressed model's ONNX file, exported the same way."""

    task: Task
    graph: Graph
    space: SearchSpace
    database: LevelDatabase
    costs: CostModel
    original: Artifact
    profiles: Mapping[str, HardwareProfile]
    dense_costs: Mapping[str, float]
    notes: tuple[str, ...]

    @property
    def int8_format(self) -> Int8Format:
        """The int8 form that is fast on the first device; one that is exact everywhere without a device, and where this host,
        which verifies the file, computes that form wrong."""
        fast: Int8Format = next((p.int8_format for p in self.profiles.values()), "u8u8")
        return fast if fast in exact_int8() else "u8u8"

    def with_profile(self, device: str, profile: HardwareProfile) -> Prepared:
        """The same with another profile of a device, and the costs that it predicts."""
        profiles = {**self.profiles, device: profile}
        costs = CostModel(self.graph, self.space, profiles, self.original.bytes, self.costs.packing)
        return replace(self, profiles=profiles, costs=costs)


def prepare(
    request: Request, out: Path, given: Task | None, stages: Ticker, cancelled: Callable[[], bool] | None
) -> Prepared:
    """All of it, from the caches where it was made before."""
    budgets = [Budget.parse(text) for text in request.budgets]
    with stages.at("task", request.task):
        task = given or load_task(request.task, request.data, request.seed)
        if given is not None:
            check(task)
    with stages.at("graph"):
        graph = trace(task.model, task.example_inputs)
        space = make_space(graph, offered(task, request), request.importance)
        _refuse_impossible(graph, space, budgets)
    with stages.at("database"):
        database = LevelDatabase(graph, space, task, cache_dir() / "databases", seed=request.seed)
        database.build(lambda done, total: stages.tick(done, total), cancelled)
    with stages.at("export", "the original"):
        original = _original(database, out)
    devices = list(dict.fromkeys(d for b in budgets if (d := b.device) is not None))
    if all(METRICS[b.metric].quality for b in budgets):
        devices = ["local"]  # only quality is limited: what is wanted is the fastest plan, and that is measured
    profiles = {}
    for device in devices:
        with stages.at("profile", device):
            profiles[device] = _profile(device, request, graph, space, out, Path(original.path), stages)
    if cancelled and cancelled():
        raise Cancelled("Stopped before the search; what was prepared is kept.")
    packing = None
    if any(b.metric == "packed_mb" for b in budgets):
        with stages.at("database", "packed sizes"):
            packing = packed_levels(database, Path(original.path))
    costs = CostModel(graph, space, profiles, original.bytes, packing)
    dense = costs.in_units(space.dense)
    notes = (*_notes(graph, space, task, request), *notes_of_profiles(profiles, kernels_of(graph, space, samples=0)))
    return Prepared(task, graph, space, database, costs, original, profiles, dense, notes)


def _refuse_impossible(graph: Graph, space: SearchSpace, budgets: Sequence[Budget]) -> None:
    """Budgets on what needs no device and no file are judged before anything long begins."""
    costs = CostModel(graph, space, {})
    dense = costs.in_units(space.dense)
    check_feasible(space, costs, [b.absolute(dense) for b in budgets if b.metric in COUNTED])


def offered(task: Task, request: Request) -> list[str]:
    """The families asked for, less those that the task withholds."""
    found = [family for family in request.methods if family not in task.withheld]
    if not found:
        why = "; ".join(f"{family}: {task.withheld[family]}" for family in request.methods)
        raise UsageError(f"Task {task.name!r} offers none of the methods asked for ({why}); allow more of them.")
    return found


def _notes(graph: Graph, space: SearchSpace, task: Task, request: Request) -> tuple[str, ...]:
    withheld = [
        f"{name} is not offered on this task: {task.withheld[name]}."
        for name in request.methods
        if name in task.withheld
    ]
    return (*withheld, *_simulated(space), *_unpruned(graph, request))


def _simulated(space: SearchSpace) -> tuple[str, ...]:
    """What levels are judged exactly, but gain nothing in the file that is written."""
    steps = {step for levels in space.levels for level in levels for step in level.steps}
    names = sorted({type(step).__name__.lower() for step in steps if step.exports == "simulated"})
    return tuple(
        f"Levels of '{name}' are simulated: the file has their weights as floats, and is no smaller and no faster for them."
        for name in names
    )


def notes_of_profiles(profiles: Mapping[str, HardwareProfile], kernels: Sequence[Kernel]) -> tuple[str, ...]:
    """Which latencies were never measured on their device, and which operators their profiles have never seen."""
    notes = [
        f"Latency on {name} is predicted by a fitted profile ({profile.provenance}: "
        f"{profile.source.get('citation', 'no source')}), not measured on a device; expect ±{profile.expected_error:.0%}."
        for name, profile in profiles.items()
        if profile.fitted
    ]
    unseen = {name: sorted(profile.explains(kernels)) for name, profile in profiles.items()}
    notes += [
        f"The profile of {name} has never seen {', '.join(families)}: where a plan runs them, their time is a guess, which may "
        "be off by as much as itself, and the plan's interval is that much wider."
        for name, families in unseen.items()
        if families
    ]
    return tuple(notes)


def _unpruned(graph: Graph, request: Request) -> tuple[str, ...]:
    if not {"channels", "udfc", "width"} & set(request.methods):
        return ()
    refused = {name: why for name, why in graph.refused.items() if why != IS_OUTPUT}  # that one goes without saying
    if "width" not in request.methods:
        whole = "they are a hidden width, which is narrowed where --methods names 'width'"
        refused |= {name: whole for group in graph.groups for name in group.producers if group.carried}
    alike: dict[str, list[str]] = {}
    for name, why in refused.items():
        alike.setdefault(why, []).append(name)
    return tuple(f"Channels of {_enumerated(names)} are not pruned: {why}." for why, names in alike.items())


def _enumerated(names: Sequence[str]) -> str:
    """The first names and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _original(database: LevelDatabase, out: Path) -> Artifact:
    """The uncompressed model as ONNX, made once a folder."""
    path, record = out / "original.onnx", out / "original.json"
    with suppress(OSError, ValueError, KeyError, TypeError):  # what is missing or damaged is made again
        stored = json.loads(record.read_text())
        if stored["task"] == database.task.hash and stored["artifact"]["sha256"] == sha256_of(path):
            return Artifact(**{**stored["artifact"], "path": str(path)})
    task = database.task
    examples = task.inputs(task.calibration.take(EXAMPLES))
    artifact = export_onnx(deploy(database.stitch(database.space.dense)), examples, path)
    write_json(record, {"task": task.hash, "artifact": vars(artifact)})
    return artifact


def _profile(
    device: str, request: Request, graph: Graph, space: SearchSpace, out: Path, original: Path, stages: Ticker
) -> HardwareProfile:
    """The named file or a stored profile; for ``local`` without one, this model's shapes measured now."""
    if device in request.profiles:
        return load_profile(request.profiles[device])
    mine = out / f"profile_{device}.json"
    if mine.exists():
        found = load_profile(mine)
        if found.how.get("original") == sha256_of(original):  # not that of another model in the same folder
            return found
    if device != "local":
        if device not in known_profiles():
            raise UnknownName("profile", device, [*known_profiles(), "local"])
        return load_profile(device)
    kept = load_profile(device) if device in known_profiles() else None  # 'autocompress profile measure'
    if kept is not None and kept.batch == request.batch:
        measured = kept
    else:
        measured = measure_local(
            kernels_of(graph, space),
            batch=request.batch,
            seconds=LOCAL_SECONDS,
            progress=lambda done, total: stages.tick(done, total, device),
        )
    measured = _scaled(measured, original, graph, space)
    measured.save(mine)
    return measured


def kernels_of(graph: Graph, space: SearchSpace, samples: int = 200, seed: int = 0) -> list[Kernel]:
    """Kernels of this model that a search is likely to ask for: every one-site plan, and random plans."""
    model = CostModel(graph, space, {})
    rng = random.Random(seed)
    plans: list[Plan] = [space.dense]
    for site, levels in enumerate(space.levels):
        plans += [(*space.dense[:site], level, *space.dense[site + 1 :]) for level in range(1, len(levels))]
    plans += [space.sample(rng) for _ in range(samples)]
    return model.all_kernels(plans)


def _scaled(profile: HardwareProfile, original: Path, graph: Graph, space: SearchSpace) -> HardwareProfile:
    """The profile with all times brought to what the whole original model takes on this machine."""
    timing = measure_ms([original], original, batch=profile.batch, threads=profile.threads, seconds=SCALE_SECONDS)[0]
    predicted = CostModel(graph, space, {"local": profile}).in_units(space.dense)["latency_ms@local"]
    factor = timing.reference_ms / predicted
    how = {**profile.how, "scaled_to_original": round(factor, 4), "original": sha256_of(original)}
    return replace(scaled(profile, factor), how=how)


def recovery_of(request: Request, made: Prepared, out: Path) -> Recovery | None:
    """How plans are distilled: the steps that fit into the minutes asked for on this machine, decided once a folder."""
    if made.task.train is None or (request.recover_minutes <= 0 and not request.recover_steps):
        return None
    if request.recover_steps == 0:
        return None
    steps, record, recipe = request.recover_steps, out / "recovery.json", Recipe.parse(request.recovery)
    if steps is None:
        with suppress(OSError, ValueError, KeyError, TypeError):
            stored = json.loads(record.read_text())
            same = (stored["minutes"], stored["recipe"]) == (request.recover_minutes, str(recipe))
            steps = int(stored["steps"]) if same else None
    if steps is None:
        per_step = _seconds_per_step(made, request.seed, recipe)
        steps = max(20, int(60 * request.recover_minutes / per_step) // 10 * 10)
        chosen = {"steps": steps, "seconds_per_step": per_step, "minutes": request.recover_minutes}
        write_json(record, {**chosen, "recipe": str(recipe)})
    return Recovery(steps=steps, batch_size=made.task.batch_size, seed=request.seed, recipe=recipe)


def _seconds_per_step(made: Prepared, seed: int, recipe: Recipe) -> float:
    """How long one step of distillation takes on the original model: no plan is slower."""
    small = replace(made.task, search=made.task.search.take(1))
    with torch.no_grad():
        reference = made.graph.module(small.inputs(small.search))
    live = made.database.stitch(made.space.dense)
    size = made.task.batch_size
    trial = Recovery(steps=6, batch_size=size, learning_rate=1e-4, checks=1, seed=seed, recipe=recipe)
    pairing = pair(made.database, made.space.dense)
    start = time.process_time()  # not the wall clock: another process must not shorten the training
    recover(live, made.graph.module, small, trial, reference, pairing=pairing)
    return (time.process_time() - start) / torch.get_num_threads() / trial.steps

"""Judges a request before anything heavy is loaded: every name, number, file and folder in it, one sentence for the first
that cannot be used. The command line and the Python facade both ask here.
"""

from __future__ import annotations

import difflib
import importlib.util
import math
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib.machinery import PathFinder
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from pydantic import ValidationError

from autocompress.errors import UnknownName, UsageError
from autocompress.ledger import Start
from autocompress.recipe import Recipe
from autocompress.results import ALL_FAMILIES, Request
from autocompress.types import METRICS, Budget

if TYPE_CHECKING:
    from autocompress.hwprofiles import HardwareProfile


def make_request(fields: Mapping[str, Any]) -> Request:
    """A :class:`Request` from its fields, with budgets in their normal form and absolute paths.

    Raises ``UsageError`` (``UnknownName`` with the nearest spelling) in one sentence.
    """
    for name in fields:
        if name not in Request.model_fields:
            raise UnknownName("option", name, Request.model_fields)
    try:
        request = Request.model_validate(dict(fields))
    except ValidationError as error:
        raise UsageError(_sentence(error)) from None
    budgets = budgets_of(request.budgets)
    _numbers(request)
    _names(request)
    _place(request)
    folders = folders_of(request.data)
    profiles = _profiles(request.profiles, budgets, request.batch)
    _devices(budgets, profiles, request.batch)
    start = _start(request)
    texts = tuple(str(budget) for budget in budgets)
    update = {
        "controller": "".join(request.controller.split()),
        "budgets": texts,
        "data": folders,
        "profiles": profiles,
        "workers": workers_of(request.workers),
        "warm_from": start,
        "recovery": str(Recipe.parse(request.recovery)),
    }
    return request.model_copy(update={"task": _task(request.task), **update})


def _sentence(error: ValidationError) -> str:
    first = error.errors()[0]
    name = ".".join(str(part) for part in first["loc"])
    if name == "importance":
        known = get_args(Request.model_fields[name].annotation)
        return str(UnknownName(name, str(first["input"]), known))
    return f"{name}: {first['msg'].lower()}, got {first['input']!r}."


def budgets_of(texts: Iterable[str]) -> list[Budget]:
    budgets = [Budget.parse(text) for text in texts]
    if not budgets:
        raise UsageError("A search needs at least one budget, for example --budget 'latency_ms<=50%@local' (quoted).")
    keys = [budget.key for budget in budgets]
    for key in keys:
        if keys.count(key) > 1:
            raise UsageError(f"One limit for each quantity: {key} has {keys.count(key)}; keep the stricter one.")
    return budgets


def _numbers(request: Request) -> None:
    if request.evaluations is not None and request.minutes is not None:
        raise UsageError("A search stops by --evaluations or by --minutes, not by both; leave one out.")
    lower = {"evaluations": 1, "batch": 1, "threads": 0, "recover_minutes": 0, "recover_steps": 0, "seed": 0}
    for name, least in lower.items():
        value = getattr(request, name)
        if value is not None and not (math.isfinite(value) and value >= least):
            raise UsageError(f"--{name.replace('_', '-')} is {least} or more, got {value:g}.")
    if request.minutes is not None and not (math.isfinite(request.minutes) and request.minutes > 0):
        raise UsageError(f"--minutes is more than 0, got {request.minutes:g}.")


def _start(request: Request) -> str | None:
    """The absolute path of the ledger to start from; a damaged one raises."""
    if request.warm_from is None:
        return None
    if request.warm:
        raise UsageError("A search starts from one ledger: --warm or --warm-from, not both; leave one out.")
    if not Path(request.warm_from).is_file():
        raise UsageError(f"--warm-from takes the ledger_start.json of a job with --warm, got {request.warm_from!r}.")
    Start.load(Path(request.warm_from))
    return str(Path(request.warm_from).resolve())


def _place(request: Request) -> None:
    """Where plans are judged; whether a GPU is there is asked when torch is loaded."""
    if not re.fullmatch(r"cpu|cuda(:\d+)?", request.device):
        raise UsageError(f"--device is cpu, cuda or cuda:N, got {request.device!r}.")
    if request.device == "cpu" and request.precision == "tf32":
        raise UsageError("--precision tf32 is of GPUs; leave it out, or add --device cuda.")
    if request.device != "cpu" and isinstance(workers_of(request.workers), str):
        raise UsageError("--workers ray judges plans on processors; use --workers N with a GPU, or --device cpu.")


def workers_of(given: str | int | None) -> str | int | None:
    """A number of processes, ``ray`` or an address, in its normal form."""
    if given is None:
        return None
    text = str(given)
    number = int(text) if text.lstrip("-").isdecimal() else None
    if number is not None and number >= 1:
        return number
    if number is None and (text == "ray" or re.fullmatch(r"(ray://)?[\w.-]+:\d+", text)):
        if importlib.util.find_spec("ray") is None:
            raise UsageError("--workers ray needs Ray; install it with 'pip install autocompress[ray]'.")
        return text
    raise UsageError(f"--workers is 1 or more processes, 'ray' or an address like ray://host:10001, got {text!r}.")


def _names(request: Request) -> None:
    from autocompress.search import racers

    field = racers(request.controller, request.race)
    if field[0].evaluations is not None and (request.evaluations or request.minutes):
        raise UsageError(
            f"Each controller of {request.controller!r} has its own number of evaluations; leave out --evaluations and --minutes."
        )
    if not request.methods:
        raise UsageError(f"--methods names at least one family out of {', '.join(ALL_FAMILIES)}.")
    for name in request.methods:
        if name not in ALL_FAMILIES:
            raise UnknownName("method family", name, ALL_FAMILIES)


def _task(spec: str) -> str:
    """A factory's file gets its absolute path, so that a worker elsewhere finds it; other names must be known."""
    place, colon, name = spec.rpartition(":")
    if place == "lm":  # a folder's path becomes absolute, for the same reason; a name is looked up in the data folders
        folder = Path(name).expanduser()
        return f"lm:{folder.resolve()}" if name and folder.is_dir() else spec
    path = Path(place or spec).expanduser()
    if path.suffix == ".py":
        if not path.is_file():
            raise UsageError(f"A task file must exist, got {str(path)!r}.")
        if not colon or not name.isidentifier():
            raise UsageError(f"A task file is named with its factory, got {spec!r}; write '{path}:factory'.")
        return f"{path.resolve()}:{name}"
    from autocompress.tasks import known_tasks  # torch: that is why this is judged last

    top = place.partition(".")[0]
    if spec not in known_tasks() and not (top.isidentifier() and PathFinder.find_spec(top, [os.getcwd(), *sys.path])):
        hint = "Your own task is written 'path/to/file.py:factory' or 'package.module:factory'."
        raise UnknownName("task", spec, known_tasks(), hint)
    return spec


def folders_of(folders: Iterable[str]) -> tuple[str, ...]:
    for folder in folders:
        if not Path(folder).is_dir():
            raise UsageError(f"--data takes a folder that exists, got {folder!r}.")
    return tuple(str(Path(folder).resolve()) for folder in folders)


def _devices(budgets: Sequence[Budget], profiles: Mapping[str, str], batch: int) -> None:
    """Every device has a profile: given, shipped or measured; this machine's is measured on demand."""
    wanted = {budget.device for budget in budgets if budget.device} - {"local", *profiles}
    if wanted:
        from autocompress.hwprofiles import known_profiles, load_profile

        known = known_profiles()
        for device in sorted(wanted):
            if device not in known:
                hint = "'local' is this machine; measure another with 'autocompress profile measure --name NAME' there."
                raise UnknownName("profile", device, {"local", *profiles, *known}, hint)
            same_batch(device, load_profile(device), batch)  # a damaged one raises


def _profiles(profiles: Mapping[str, str], budgets: Sequence[Budget], batch: int) -> dict[str, str]:
    """Device -> absolute path. A profile that no budget asks for is refused: it would be forgotten in silence."""
    devices = {budget.device for budget in budgets if budget.device}
    if all(METRICS[budget.metric].quality for budget in budgets):
        devices = {"local"}  # what is wanted then is the fastest plan here
    if profiles:
        from autocompress.hwprofiles import HardwareProfile
    for name, path in profiles.items():
        if name not in devices:
            near = difflib.get_close_matches(name, devices, n=1)
            way = f"did you mean {near[0]!r}?" if near else f"add for example --budget 'latency_ms<=50%@{name}'."
            raise UsageError(f"No budget asks for device {name!r} of --profile {name}={path}; {way}")
        if not Path(path).is_file():
            raise UsageError(f"--profile {name} takes a file that exists, got {path!r}; 'profile measure' writes one.")
        same_batch(name, HardwareProfile.load(path), batch)  # a damaged one raises
    return {name: str(Path(path).resolve()) for name, path in profiles.items()}


def same_batch(device: str, profile: HardwareProfile, batch: int) -> None:
    """Latencies of other batches do not compare with a request's. Raises ``UsageError``."""
    if profile.batch != batch:
        raise UsageError(
            f"The profile of {device!r} was measured with batches of {profile.batch}, the request has --batch {batch}; "
            "choose the same, or measure the device again."
        )

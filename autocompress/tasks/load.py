"""From what stands on the command line to a checked ``Task``: built-in names and the user's own factories."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from autocompress.errors import AutoCompressError, TaskError, UnknownName, UsageError
from autocompress.tasks.base import Task
from autocompress.tasks.check import check
from autocompress.tasks.cifar10 import NETWORKS, cifar10
from autocompress.tasks.digits import digits
from autocompress.tasks.lm import PREFIX, language_model
from autocompress.types import digest

_BUILT_IN: dict[str, Callable[[Sequence[str], int], Task]] = {
    "digits": lambda data, seed: digits(seed),
    **{f"cifar10:{network}": partial(cifar10, network) for network in NETWORKS},
}
LM = "lm:FOLDER"
_OWN = "Your own task is written 'path/to/file.py:factory' or 'package.module:factory'."


def known_tasks() -> list[str]:
    """Names of the built-in tasks; ``lm:FOLDER`` stands for all folders."""
    return sorted([*_BUILT_IN, LM])


def load_task(spec: str, data: Sequence[str] = (), seed: int = 0) -> Task:
    """Load and check a task.

    ``spec`` is a built-in name, ``lm:FOLDER``, ``path/to/file.py:factory`` or ``package.module:factory``; a factory of the user's
    returns a ``Task`` and is given ``data`` (folders) and ``seed`` where it has parameters of these names.
    Raises ``UnknownName`` or ``UsageError`` for what cannot be found, ``TaskError`` for what cannot be used.
    """
    if spec in _BUILT_IN:
        task = _BUILT_IN[spec](data, seed)
    else:
        task = language_model(spec, data, seed) if spec.startswith(PREFIX) else _load_own(spec, data, seed)
    check(task)
    return task


def _load_own(spec: str, data: Sequence[str], seed: int) -> Task:
    place, _, name = spec.rpartition(":")
    path = Path(place or spec).expanduser()
    is_file = path.suffix == ".py"
    if is_file and not path.is_file():
        raise UsageError(f"A task file must exist, got {str(path)!r}.")
    if is_file and not (place and name):
        raise UsageError(f"A task file is named with its factory, got {spec!r}; write '{path}:factory'.")
    with _importable(path.resolve().parent if is_file else Path.cwd()), _blaming(spec, path if is_file else None):
        if is_file:
            module = _import_file(path)
        elif name and _is_module(place):
            module = importlib.import_module(place)
        else:
            raise UnknownName("task", spec, known_tasks(), _OWN)
        factory = getattr(module, name, None)
        if not callable(factory):
            raise UnknownName(f"factory in {place}", name, _callables(module))
        task = factory(**_arguments(factory, data, seed))
    if not isinstance(task, Task):
        raise TaskError(
            f"A task factory must return an autocompress.tasks.Task, {spec} returned {type(task).__name__}."
        )
    return task


def _arguments(factory: Callable[..., object], data: Sequence[str], seed: int) -> dict[str, Any]:
    try:
        wanted = inspect.signature(factory).parameters
    except ValueError:  # some built-in callables have no signature
        return {}
    return {name: value for name, value in {"data": tuple(data), "seed": seed}.items() if name in wanted}


def _callables(module: ModuleType) -> list[str]:
    """What the module itself defines and could be a factory."""
    functions = inspect.getmembers(module, inspect.isfunction)
    return [name for name, function in functions if function.__module__ == module.__name__ and not name.startswith("_")]


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Let the task's neighbours be imported, as when its file is run by hand."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        if str(folder) in sys.path:
            sys.path.remove(str(folder))


def _is_module(name: str) -> bool:
    """Whether Python would import ``name`` from a file; a mere folder, such as one with data, does not count."""
    if not all(part.isidentifier() for part in name.split(".")):
        return False
    try:
        spec = importlib.util.find_spec(name)
    except ModuleNotFoundError as error:
        if error.name and not f"{name}.".startswith(f"{error.name}."):
            raise  # a parent package is there, but lacks something it imports
        return False
    return spec is not None and spec.origin is not None


def _import_file(path: Path) -> ModuleType:
    name = f"autocompress_task_{digest(str(path.resolve()))}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UsageError(f"Python cannot import {str(path)!r}.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and inspect look their module up there
    spec.loader.exec_module(module)
    return module


@contextmanager
def _blaming(spec: str, path: Path | None) -> Iterator[None]:
    """Whatever the user's code raises becomes one sentence with the line; our own errors pass."""
    try:
        yield
    except AutoCompressError:
        raise
    except (Exception, SystemExit) as error:
        message = error.msg if isinstance(error, SyntaxError) else str(error).strip()
        reason = (message or "no message").splitlines()[0]
        raise TaskError(f"Task {spec!r} raised {type(error).__name__}: {reason} ({_line(error, path)}).") from error


def _line(error: BaseException, path: Path | None) -> str:
    """``file, line n``: the last line in the task's own file, else where it was raised."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}, line {error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if path is not None and Path(frame.filename).resolve() == path.resolve()]
    frame = (own or frames)[-1]
    return f"{frame.filename}, line {frame.lineno}"

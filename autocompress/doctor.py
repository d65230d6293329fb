"""What is installed, which devices and extras are usable, and where data and results may lie: for ``autocompress doctor``."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
import tomllib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement

from autocompress.errors import AutoCompressError
from autocompress.files import cache_dir, write_text

State = Literal["ok", "absent", "broken"]

IMPORT_NAMES = {
    "scikit-learn": "sklearn",
    "pillow": "PIL",
    "SQLAlchemy": "sqlalchemy",
}
LEAST_FREE_GB = 1.0


@dataclass(frozen=True)
class Finding:
    """One line of the report. ``absent`` is something optional; ``broken`` hinders work and makes the exit code 2."""

    area: Literal["packages", "devices", "extras", "folders", "data"]
    name: str
    state: State
    detail: str


def examine() -> list[Finding]:
    """Look at everything; imports the packages to see that they really work (some seconds)."""
    return [*_python(), *_packages(), *_devices(), *_extras(), *_folders(), *_data()]


def _python() -> Iterator[Finding]:
    fine = sys.version_info >= (3, 11)
    detail = platform.python_version() + ("" if fine else ", needs 3.11 or newer")
    yield Finding("packages", "python", "ok" if fine else "broken", detail)


def requirements() -> list[Requirement]:
    """What the package asks for: from its metadata, or from ``pyproject.toml`` when it is run from its source."""
    try:
        texts = importlib.metadata.requires("autocompress") or []
    except importlib.metadata.PackageNotFoundError:
        source = Path(__file__).parents[1] / "pyproject.toml"
        texts = tomllib.loads(source.read_text())["project"]["dependencies"] if source.is_file() else []
    found = [Requirement(text) for text in texts]
    return [r for r in found if r.marker is None or r.marker.evaluate({"extra": ""})]


def _packages() -> Iterator[Finding]:
    for requirement in sorted(requirements(), key=lambda r: r.name.lower()):
        yield _package(requirement)


def _package(requirement: Requirement) -> Finding:
    name = requirement.name
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Finding("packages", name, "broken", f"is not installed; pip install '{requirement}'")
    if not requirement.specifier.contains(version, prereleases=True):
        return Finding(
            "packages", name, "broken", f"{version} is outside {requirement.specifier}; pip install '{requirement}'"
        )
    problem = _import_problem(IMPORT_NAMES.get(name, name.replace("-", "_")))
    if problem:
        return Finding("packages", name, "broken", f"{version} is installed, but its import fails: {problem}")
    return Finding("packages", name, "ok", version)


def _import_problem(module: str) -> str | None:
    """Why a module cannot be imported, in one line; ``None`` when it can."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module(module)
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


def _devices() -> Iterator[Finding]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Finding("devices", "cpu", "ok", f"{_cpu_name()}, {cores} cores for this process")
    if _import_problem("torch") is None:
        import torch

        if torch.cuda.is_available():
            names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
            yield Finding("devices", "cuda", "ok", ", ".join(names))
        else:
            yield Finding("devices", "cuda", "absent", f"torch {torch.__version__} sees no GPU; the CPU is used")
    if _import_problem("onnxruntime") is None:
        import onnxruntime

        yield Finding("devices", "onnxruntime", "ok", ", ".join(onnxruntime.get_available_providers()))


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _extras() -> Iterator[Finding]:
    for module, use in (
        ("PIL", "decodes CIFAR-10 mosaics; pip install 'autocompress[images]'"),
        ("torchvision", "only for tasks of your own that use it"),
    ):
        if importlib.util.find_spec(module) is None:
            yield Finding("extras", module, "absent", use)
            continue
        problem = _import_problem(module)
        version = getattr(sys.modules.get(module), "__version__", "")
        yield Finding(
            "extras", module, "absent" if problem else "ok", f"import fails: {problem} ({use})" if problem else version
        )
    browser = next((b for b in ("chromium", "chromium-browser", "google-chrome") if shutil.which(b)), None)
    yield Finding("extras", "browser", "ok" if browser else "absent", browser or "only the dashboard's tests need it")


def _folders() -> Iterator[Finding]:
    try:
        folder = cache_dir()
        probe = folder / f".doctor-{os.getpid()}"
        write_text(probe, "ok")
        probe.unlink()
    except (AutoCompressError, OSError) as error:
        yield Finding("folders", "cache", "broken", str(error))
        return
    yield Finding("folders", "cache", "ok", f"{folder} can be written")
    free = shutil.disk_usage(folder).free / 1e9
    low = free < LEAST_FREE_GB
    more = f", at least {LEAST_FREE_GB:g} GB is needed; set AUTOCOMPRESS_HOME to a folder with room" if low else ""
    yield Finding("folders", "disk", "broken" if low else "ok", f"{free:.1f} GB free{more}")


def _data() -> Iterator[Finding]:
    named = [text for text in os.environ.get("AUTOCOMPRESS_DATA", "").split(os.pathsep) if text]
    if not named:
        yield Finding(
            "data", "AUTOCOMPRESS_DATA", "absent", "is not set; digits needs no data, cifar10 does (or --data)"
        )
    for text in named:
        folder = Path(text).expanduser()
        if not folder.is_dir():
            yield Finding("data", text, "broken", "AUTOCOMPRESS_DATA names this folder, and it does not exist")
            continue
        inside = sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))
        shown = ", ".join(inside[:8]) + (f" and {len(inside) - 8} more" if len(inside) > 8 else "")
        yield Finding("data", text, "ok", shown or "is empty")

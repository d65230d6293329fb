"""The rooms at the top level, the lean import, and that the package says of itself what the files say."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import autocompress

ROOT = Path(__file__).parents[1]
ROOMS = ("search", "methods", "hwprofiles", "dashboard")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.mark.parametrize("room", ROOMS)
def test_each_link_points_at_its_room(room: str) -> None:
    link = ROOT / room
    assert link.is_symlink()
    assert os.readlink(link) == f"autocompress/{room}"
    assert (link / "__init__.py").is_file()


def test_nothing_imports_through_a_link() -> None:
    pattern = re.compile(rf"^\s*(?:from|import) (?:{'|'.join(ROOMS)})\b", re.MULTILINE)
    files = [p for folder in ("autocompress", "tests", "examples", "benchmarks") for p in (ROOT / folder).rglob("*.py")]
    assert len(files) > 20
    assert [str(p) for p in files if pattern.search(p.read_text())] == []


HEAVY = ("torch", "onnx", "onnxruntime", "scipy", "sklearn", "matplotlib", "streamlit", "plotly", "sqlalchemy")


@pytest.mark.parametrize(
    "statement",
    ["import autocompress", "import autocompress.cli", "from autocompress import Budget, Request, JobResult"],
)
def test_import_is_lean(statement: str) -> None:
    code = f"import sys\n{statement}\nprint([m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("room", ["search", "dashboard.front", "service.store"])
def test_rooms_without_torch(room: str) -> None:
    code = f"import sys, autocompress.{room}\nprint('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("name", autocompress.__all__)
def test_facade_has_what_it_names(name: str) -> None:
    assert getattr(autocompress, name) is not None
    assert name in dir(autocompress)


def test_facade_refuses_other_names() -> None:
    with pytest.raises(AttributeError, match="compresss.*it has.*load_task"):
        _ = autocompress.compresss  # type: ignore[attr-defined]


def test_version_is_the_changelogs() -> None:
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None
    assert newest[1] == autocompress.__version__


def test_every_dependency_names_a_file_that_imports_it() -> None:
    lines = (ROOT / "pyproject.toml").read_text().split("dependencies = [")[1].split("\n]")[0].splitlines()
    modules = {"scikit-learn": "sklearn"}
    by_others = {"onnxscript", "cmaes"}  # torch.onnx.export and Optuna import them, not we
    for line in filter(str.strip, lines):
        entry = re.fullmatch(r'\s*"([\w-]+)>=[\d.]+(?:; [^"]+)?",\s+# (.+?): .+', line)
        assert entry is not None, f"a dependency needs a comment that names its file: {line}"
        name = entry[1]
        for place in entry[2].split(", "):
            path = ROOT / place
            assert path.exists(), f"{name}: {place} does not exist"
            texts = [p.read_text() for p in (path.rglob("*.py") if path.is_dir() else [path])]
            module = modules.get(name, name).lower()
            used = re.compile(rf"^\s*(?:import|from) {module}\b", re.MULTILINE)
            assert name in by_others or any(map(used.search, texts)), f"{place} does not import {name}"


def test_every_dependency_is_pinned() -> None:
    pins = dict(
        line.split("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    )
    project = PROJECT["project"]
    wanted = [*project["dependencies"], *(d for extra in project["optional-dependencies"].values() for d in extra)]
    names = {re.split(r"[><=\[ ]", text)[0].lower().replace("_", "-") for text in wanted}
    assert names - set(pins) == set()
    assert all("+" not in version for version in pins.values()), "a local version exists on one machine only"


def test_licence() -> None:
    assert PROJECT["project"]["license"] == "Apache-2.0"
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text
    assert "END OF TERMS AND CONDITIONS" in text

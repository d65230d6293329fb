"""What every test shares: one thread, no window, a cache of its own, and data only where AUTOCOMPRESS_DATA names it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.quick import shorten

# Before torch is imported: test processes share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

ROOT = Path(__file__).parents[1]


def pytest_configure(config: pytest.Config) -> None:
    """What can be made again (the trained digits network, for example) is kept between runs, apart from the user's."""
    os.environ.setdefault("AUTOCOMPRESS_HOME", str(config.rootpath / ".pytest_cache" / "autocompress"))


LONGEST = (
    *("demo", "pipeline", "warm", "bayes", "resumed", "policy_controllers", "race", "workers", "lm", "tasks", "fitted"),
    "controllers",
)
"""Files that take minutes: they begin, or one process is left alone with them at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    names = [f"test_{name}.py" for name in LONGEST]
    items.sort(key=lambda item: names.index(item.path.name) if item.path.name in names else len(names))
    if os.environ.get("AUTOCOMPRESS_DATA"):
        return
    skip = pytest.mark.skip(reason="needs the folders named by AUTOCOMPRESS_DATA")
    for item in items:
        if "assets" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _own_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test can touch the user's jobs."""
    monkeypatch.setenv("AUTOCOMPRESS_STORE", str(tmp_path / "jobs.sqlite"))


@pytest.fixture(scope="session", autouse=True)
def _short_runs() -> Iterator[None]:
    """Whole runs take seconds, also those that fixtures of a module make."""
    with pytest.MonkeyPatch.context() as patch:
        shorten(patch)
        yield

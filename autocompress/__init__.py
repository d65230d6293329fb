"""Automated model compression search.

A trained model, a task and budgets go in; a Pareto front and ONNX files whose accuracy and latency were measured come
out. This module is a facade that imports nothing heavy until a name is used (PEP 562).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from autocompress.api import Result, compress
    from autocompress.errors import AutoCompressError
    from autocompress.results import JobResult, Point, Progress, Request
    from autocompress.tasks import Split, Task, load_task
    from autocompress.types import Budget, Plan, SearchSpace

_HOME = {
    "compress": "api",
    "Result": "api",
    "Task": "tasks",
    "Split": "tasks",
    "load_task": "tasks",
    "Budget": "types",
    "Plan": "types",
    "SearchSpace": "types",
    "JobResult": "results",
    "Point": "results",
    "Progress": "results",
    "Request": "results",
    "AutoCompressError": "errors",
}

__all__ = [
    "__version__",
    "compress",
    "Result",
    "Task",
    "Split",
    "load_task",
    "Budget",
    "Plan",
    "SearchSpace",
    "JobResult",
    "Point",
    "Progress",
    "Request",
    "AutoCompressError",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'autocompress' has no attribute {name!r}; it has: {', '.join(__all__)}.")
    value = getattr(importlib.import_module(f"autocompress.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

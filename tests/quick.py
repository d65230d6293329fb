"""Whole runs in less time: files from the quick exporter, seconds of timing, few plans refitted. All of it stays real.

Tests of exporters and of timing name what they test, and child processes with a command line run as users run them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import pytest

SECONDS = 0.5
"""The most that one comparison of files takes; no test asks what the clock says."""


def shorten(patch: pytest.MonkeyPatch, exporter: str = "legacy") -> None:
    """Patch what the stages of a run call; ``exporter``: the first choice for files that are handed out."""
    from autocompress import deliver, pipeline, prepare

    order = [exporter, *({"legacy", "dynamo"} - {exporter})]
    for stage in (deliver, prepare):
        patch.setattr(stage, "export_onnx", partial(stage.export_onnx, exporters=order))
        patch.setattr(stage, "measure_ms", _brief(stage.measure_ms))
    patch.setattr(deliver, "compare", _brief(deliver.compare))
    patch.setattr(prepare, "LOCAL_SECONDS", 10)
    patch.setattr(pipeline, "REFITTED", 4)
    patch.setattr(pipeline, "RECOVERED", 2)


def _brief(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def timed(*args: Any, seconds: float, **settings: Any) -> Any:
        return function(*args, seconds=min(seconds, SECONDS), **settings)

    return timed

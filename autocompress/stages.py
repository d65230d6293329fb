"""Where a run is, told to whoever watches, and how long each stage took, also before an interruption."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from autocompress.files import write_json
from autocompress.results import Progress, Stage


class Stages:
    """Progress ticks and wall time by stage; ``path``: where it is kept, so that the time before an interruption counts."""

    def __init__(self, progress: Callable[[Progress], None] | None, path: Path | None = None) -> None:
        self.progress, self.path = progress, path
        self.seconds: dict[str, float] = {}
        if path is not None:
            with suppress(OSError, ValueError, TypeError, AttributeError):
                self.seconds = {str(k): float(v) for k, v in json.loads(path.read_bytes()).items()}
        self.stage: Stage = "task"
        self.inner = 0.0  # seconds that stages inside the current one took

    @contextmanager
    def at(self, stage: Stage, message: str = "") -> Iterator[None]:
        outer, inner, start = self.stage, self.inner, time.perf_counter()
        self.stage, self.inner = stage, 0.0
        self.tick(0, None, message)
        try:
            yield
        finally:
            spent = time.perf_counter() - start
            self.seconds[stage] = self.seconds.get(stage, 0.0) + spent - self.inner
            self.stage, self.inner = outer, inner + spent
            if self.path is not None:
                write_json(self.path, self.seconds)

    def tick(self, done: int, total: int | None, message: str = "") -> None:
        if self.progress:
            self.progress(Progress(stage=self.stage, done=done, total=total, message=message))

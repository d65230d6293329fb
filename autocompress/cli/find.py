"""A run by whatever name a person gives it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from autocompress.cli.options import open_store
from autocompress.errors import UsageError
from autocompress.results import JobResult

if TYPE_CHECKING:
    from autocompress.service.store import Job


@dataclass(frozen=True)
class Found:
    """A run by whatever name: a job of the store, or the folder of a foreground run (then ``job`` is None)."""

    name: str
    folder: Path
    result: JobResult | None
    job: Job | None = None

    def need_result(self) -> JobResult:
        """Its result; an unfinished or failed job is refused with the way out."""
        if self.result is not None:
            return self.result
        state = self.job.state if self.job else "unfinished"
        reason = f" ({self.job.error})" if self.job and self.job.error else ""
        way = {"queued": "start 'autocompress worker'", "running": "wait for it"}.get(state, "submit it again")
        raise UsageError(f"{self.name} has no front yet, it is {state}{reason}; {way}.")


def find(name: str, store: str | None) -> Found:
    """The run that ``name`` means: a folder with results, else a job of the store by the start of its id."""
    from autocompress.api import read_result

    folder = Path(name)
    if (folder / "result.json").is_file():
        return Found(name, folder, read_result(folder))
    if folder.is_dir() and (folder / "request.json").is_file():
        return Found(f"Run {name}", folder, None)
    with open_store(store) as jobs:
        job = jobs.get(name)
        result = jobs.result(job.id)
    if result is None and (job.folder / "result.json").is_file():  # it failed after having written what it had
        result = read_result(job.folder)
    return Found(f"Job {job.id}", job.folder, result, job)

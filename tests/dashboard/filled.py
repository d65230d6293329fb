"""A store as it looks after an afternoon: jobs in every state, one with a realistic result."""

from __future__ import annotations

from pathlib import Path

from autocompress.results import Progress, Request
from autocompress.service.store import Job, JobStore
from tests.dashboard import sample


def fill(path: Path) -> tuple[JobStore, Job]:
    """The store and its finished job."""
    store = JobStore(path)
    done = store.submit("compress", sample.request())
    finished = store.claim()
    assert finished is not None
    store.finish(finished, sample.result())
    store.submit("compress", Request(task="digits", budgets=("size_mb<=0.1",)))
    failed = store.claim()
    assert failed is not None
    store.fail(failed, "No plan can meet size_mb<=0.1: the smallest has 0.14 MB, held by conv1.", 3)
    running = store.submit("compress", Request(task="digits", budgets=("macs<=50%", "accuracy_drop<=1")))
    claimed = store.claim()
    assert claimed is not None and claimed.id == running.id
    store.progress(claimed, Progress(stage="search", done=120, total=400, message="generation 6"))
    cancelled = store.submit("compress", Request(task="digits", budgets=("macs<=40%",), controller="exact"))
    store.cancel(cancelled.id)
    return store, store.get(done.id)

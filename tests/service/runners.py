"""Small real tasks for workers: module-level functions, because they run in another process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from autocompress.errors import BudgetUnmet, Cancelled
from autocompress.results import Progress
from autocompress.service.store import Job, JobStore
from tests.dashboard import sample

Tick = Callable[[Progress], None]
Stop = Callable[[], bool]


def count_to_twenty(store: JobStore, job: Job, progress: Tick, cancelled: Stop) -> dict[str, Any]:
    """Adds 20 numbers, each kept in the ledger, and says how many it had to compute itself."""
    ledger, computed = store.ledger(job.id), 0
    for i in range(20):
        if cancelled():
            raise Cancelled("Stopped.")
        if ledger.get(str(i)) is None:
            time.sleep(0.05)
            ledger.put(str(i), {"square": i * i})
            computed += 1
        progress(Progress(stage="search", done=i + 1, total=20))
    total = sum(value["square"] for i in range(20) if (value := ledger.get(str(i))) is not None)
    return {"total": total, "computed": computed}


def miss_a_budget(store: JobStore, job: Job, progress: Tick, cancelled: Stop) -> dict[str, Any]:
    raise BudgetUnmet("The plan takes 7 ms and the budget is 5 ms.")


def miss_a_budget_with_a_front(store: JobStore, job: Job, progress: Tick, cancelled: Stop) -> dict[str, Any]:
    (job.folder / "result.json").write_text(sample.result().model_dump_json())
    return miss_a_budget(store, job, progress, cancelled)


def divide_by_zero(store: JobStore, job: Job, progress: Tick, cancelled: Stop) -> dict[str, Any]:
    return {"value": 1 / (job.attempts - 1)}


def die(store: JobStore, job: Job, progress: Tick, cancelled: Stop) -> dict[str, Any]:
    os.kill(os.getpid(), signal.SIGKILL)
    return {}


def never_ask(store: JobStore, job: Job, progress: Tick, cancelled: Stop) -> dict[str, Any]:
    """Ignores ``cancelled`` and has a process of its own, whose id it leaves in the job's folder."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    (job.folder / "child").write_text(str(child.pid))
    progress(Progress(stage="database", done=1, total=2))
    time.sleep(60)
    return {}

"""A worker as its own process: ``python -m tests.service.worker_main STORE RUNNER [seconds until lost]``."""

from __future__ import annotations

import sys

from autocompress.service.store import JobStore
from autocompress.service.worker import work
from tests.service import runners

if __name__ == "__main__":
    with JobStore(sys.argv[1]) as store:
        work(
            store,
            once=True,
            poll_seconds=0.05,
            grace_seconds=5.0,
            runner=getattr(runners, sys.argv[2]),
            on_event=lambda job: print(job.id, job.state, flush=True),
        )

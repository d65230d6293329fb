"""``autocompress predict``: one more device for a job that is over."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from autocompress.api import best_under
from autocompress.cli import options as o
from autocompress.cli.console import out, print_json, quiet_stdout
from autocompress.cli.find import Found, find
from autocompress.cli.tables import front_json, print_front
from autocompress.errors import UsageError
from autocompress.results import JobResult, Point
from autocompress.types import METRICS, Budget

if TYPE_CHECKING:
    from autocompress.service.store import JobStore


def predict(
    job: o.JobName,
    profile: Annotated[str, typer.Argument(help="A profile's name or its file, see 'autocompress profile list'.")],
    name: Annotated[
        str | None, typer.Option("--name", help="What budgets call the device; default: the profile's name.")
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option("--budget", metavar="TEXT", help="A limit there, to see the best plan: 'latency_ms<=5'."),
    ] = None,
    store: o.Store = None,
    as_json: o.Json = False,
) -> None:
    """Predict the latency of a finished job's plans on another device.

    In seconds: nothing is searched or judged again, and the device stays in the job's result. 'front --device' then shows the
    front there, and 'export --pick' takes limits on it. Exit code 3: no plan holds the limit.

    \\b
    Example:
      autocompress predict 3f2a pixel2 --budget 'latency_ms<=5'
      autocompress predict 3f2a phone.json --name phone
    """
    found = find(job, store)
    if found.job is not None and not found.job.over:
        raise UsageError(f"{found.name} is {found.job.state}; a device can be added once it is over.")
    result = found.need_result()
    with quiet_stdout():
        from autocompress import devices
        from autocompress.hwprofiles import load_profile

        device = load_profile(profile)
        called = name or device.name
        limit = _limit(budget, called)
        prediction = devices.predict(result, device, called)
        result = _write(found, store, prediction.added_to)
    key = result.device_key(called)
    if as_json:
        best = best_under(result, str(limit)).id if limit else None
        row = {"device": called, "key": key, **result.devices[called], "best": best}
        print_json({**row, "notes": list(prediction.notes), "front": front_json(result, key)})
        return
    print_front(result, key)
    for note in prediction.notes:
        out.print(f"• {note}", markup=False)
    if limit is not None:
        out.print(_sentence(result, best_under(result, str(limit)), key, str(limit)), markup=False)
    pick = str(limit) if limit else f"latency_ms<=50%@{called}"
    out.print(f"Export with: autocompress export {job} --pick '{pick}'", markup=False)


def _limit(budget: str | None, device: str) -> Budget | None:
    """The limit on this device; the device need not be said."""
    if budget is None:
        return None
    limit = Budget.parse(budget if "@" in budget else f"{budget}@{device}")
    if limit.device != device:
        raise UsageError(f"--budget limits the latency on {device!r}, got {budget!r}; write 'latency_ms<=5'.")
    return limit


def _write(found: Found, store: str | None, change: Callable[[JobResult], JobResult]) -> JobResult:
    """Into the job's result in the store and the file in its folder, or into the file of a foreground run."""
    from autocompress.api import amend

    with o.open_store(store) as jobs:
        job_id = found.job.id if found.job else _job_in(found.folder, jobs)
        if job_id is not None and jobs.result(job_id) is not None:
            return jobs.amend(job_id, change)
    return amend(found.folder, change)


def _job_in(folder: Path, jobs: JobStore) -> str | None:
    """The job whose folder was named in its place."""
    same = (job.id for job in jobs.list(kind="compress") if job.folder.resolve() == folder.resolve())
    return next(same, None)


def _sentence(result: JobResult, best: Point, key: str, limit: str) -> str:
    value: Any = best.costs[key]
    within = f" ± {best.intervals[key]:.0%}" if key in best.intervals else ""
    drop = best.values.get("accuracy_drop")
    lost = "" if drop is None else f", accuracy drop {drop:.2f} points"
    over = "" if best.feasible else f"; it misses the job's own budgets by {best.violation:.0%}"
    unit = METRICS["latency_ms"].unit
    return f"Best under {limit}: plan {best.id[:8]}, predicted {value:.4g} {unit}{within} ({result.key_label(key)}){lost}{over}."

"""Options that several verbs share, and the request that ``compress`` and ``submit`` make of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from autocompress.errors import UsageError
from autocompress.results import METHOD_FAMILIES, RESEARCH_FAMILIES, Request

if TYPE_CHECKING:
    from autocompress.service.store import JobStore

IMPORTANCES = get_args(Request.model_fields["importance"].annotation)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output.")]
Store = Annotated[
    str | None,
    typer.Option("--store", metavar="FILE", help="The job store; default: AUTOCOMPRESS_STORE, else the user's own."),
]
TaskSpec = Annotated[
    str,
    typer.Argument(help="digits, cifar10:resnet20, lm:FOLDER, path/to/file.py:factory or package.module:factory."),
]
Target = Annotated[
    str,
    typer.Option(
        "--target", metavar="DEVICE", help="local, ssh://user@host[:port], adb://serial; profiles also cuda, cuda:N."
    ),
]
Python = Annotated[
    str, typer.Option("--python", metavar="PATH", help="The interpreter on another machine; default: python3.")
]
RunThreads = Annotated[int, typer.Option("--threads", min=1, help="Threads of one run.")]
RunBatch = Annotated[int, typer.Option("--batch", min=1, help="Examples of one run.")]
JobName = Annotated[str, typer.Argument(help="A job's id or the start of it, or the folder of a run.")]
Budgets = Annotated[
    list[str],
    typer.Option("--budget", metavar="TEXT", help="A limit such as 'latency_ms<=50%@local'; repeat for several."),
]
Data = Annotated[
    list[str] | None,
    typer.Option("--data", metavar="DIR", help="A folder with data sets, beside AUTOCOMPRESS_DATA; repeatable."),
]
Controller = Annotated[
    str,
    typer.Option(
        "--controller",
        help="The search algorithm: auto, evolution, evopress, exact, amc, bayes, random …; with --race several.",
    ),
]
Race = Annotated[
    bool,
    typer.Option(
        "--race", help="Let the controllers a,b,c search one after the other, each with as much, and compare."
    ),
]
Evaluations = Annotated[
    int | None, typer.Option("--evaluations", help="Stop the search after so many evaluations; repeats exactly.")
]
Minutes = Annotated[float | None, typer.Option("--minutes", help="Stop the search after so many minutes.")]
Warm = Annotated[
    bool,
    typer.Option("--warm", help="Start from what earlier jobs have judged on the same model; nothing is paid twice."),
]
WarmFrom = Annotated[
    str | None,
    typer.Option("--warm-from", metavar="FILE", help="Start from another job's ledger_start.json; repeats exactly."),
]
Seed = Annotated[int, typer.Option("--seed", help="Same seed, same front.")]
Methods = Annotated[
    str,
    typer.Option(
        "--methods", help=f"Families to search, joined by commas; to be named: {', '.join(RESEARCH_FAMILIES)}."
    ),
]
Importance = Annotated[str, typer.Option("--importance", help=f"How channels are ranked: {', '.join(IMPORTANCES)}.")]
Profiles = Annotated[
    list[str] | None,
    typer.Option("--profile", metavar="NAME=PATH", help="Profile file of a device that a budget names; repeatable."),
]
RecoverMinutes = Annotated[
    float, typer.Option("--recover-minutes", help="Distillation of each plan near a budget; 0 turns it off.")
]
RecoverSteps = Annotated[
    int | None, typer.Option("--recover-steps", help="The same in steps, instead of minutes; repeats exactly.")
]
RecoveryRecipe = Annotated[
    str,
    typer.Option(
        "--recovery",
        help="What it learns from and how it steps: logits, features, dot, theseus …; see docs/recovery.md.",
    ),
]
Batch = Annotated[int, typer.Option("--batch", help="Batch size at which latency is predicted and measured.")]
Threads = Annotated[int, typer.Option("--threads", help="Threads for evaluation; 0 takes all cores.")]
Device = Annotated[str, typer.Option("--device", help="Where plans are judged: cpu, cuda or cuda:N.")]
Precision = Annotated[
    str,
    typer.Option(
        "--precision",
        help="Of the search on a GPU: float32, tf32, bfloat16; auto tries which one the fitness allows.",
    ),
]
Workers = Annotated[
    str | None,
    typer.Option(
        "--workers",
        metavar="N|ray|URL",
        help="Judge plans in N processes or on a Ray cluster (ray, ray://host:port); same front.",
    ),
]

ALL_METHODS = ",".join(METHOD_FAMILIES)
DEFAULT_IMPORTANCE: str = Request.model_fields["importance"].default


def request_of(options: dict[str, Any]) -> Request:
    """The request of a verb's ``locals()``; raises ``UsageError`` before anything heavy is loaded."""
    from autocompress.validate import make_request

    fields = {name: value for name, value in options.items() if name in Request.model_fields}
    fields["budgets"] = options["budget"]
    fields["data"] = options["data"] or []
    fields["methods"] = [name.strip() for name in options["methods"].split(",") if name.strip()]
    fields["profiles"] = dict(map(_pair, options["profile"] or []))
    return make_request(fields)


def _pair(text: str) -> tuple[str, str]:
    name, equals, path = text.partition("=")
    if not equals or not name or not path:
        raise UsageError(f"A profile reads NAME=PATH, got {text!r}; write for example --profile pixel3=pixel3.json.")
    return name, path


def open_store(path: str | None) -> JobStore:
    """The job store; imported late because SQLAlchemy is slow to load."""
    from autocompress.service.store import JobStore

    return JobStore(path)

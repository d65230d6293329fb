"""The command line: one verb a function, grouped in files by what they are about."""

from __future__ import annotations

from typing import Annotated

import typer

from autocompress import __version__
from autocompress.cli import jobs, packing, predict, profiles, run, timing, tools
from autocompress.cli.console import Group
from autocompress.cli.demo import demo

__all__ = ["app", "main"]

app = typer.Typer(
    cls=Group,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"autocompress {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show where an error comes from; may stand anywhere on the line.")
    ] = False,
) -> None:
    """Automated model compression search: a model and budgets in, a Pareto front and verified ONNX files out.

    Exit codes: 0 success, 1 a check does not hold, 2 a request cannot be used, 3 a budget cannot be met, 4 an exported
    file is wrong, 130 interrupted.

    \b
    Example:
      autocompress demo
    """


app.command()(demo)
app.command()(run.compress)
app.command()(jobs.submit)
app.command()(jobs.worker)
app.add_typer(jobs.jobs_app, name="jobs")
app.command()(jobs.show)
app.command()(jobs.front)
app.command()(predict.predict)
app.command()(run.diagnose)
app.command()(jobs.cancel)
app.command()(run.export)
app.command()(tools.check)
app.command()(timing.bench)
app.command()(timing.explain)
app.command()(packing.pack)
app.command()(packing.unpack)
app.add_typer(profiles.profile_app, name="profile")
app.command()(tools.dashboard)
app.command()(tools.doctor)


def main() -> None:
    """The console script ``autocompress``."""
    app(prog_name="autocompress")

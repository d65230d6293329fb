"""What every verb shares: two streams, one sentence for an error, and the exit code that belongs to it.

Standard output carries the answer (one JSON document with ``--json``); everything else goes to standard error.
"""

from __future__ import annotations

import contextlib
import errno
import json
import sys
import traceback
from collections.abc import Iterator
from typing import Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from autocompress.errors import AutoCompressError

out = Console(soft_wrap=True, highlight=False)
err = Console(stderr=True, soft_wrap=True, highlight=False)

INTERNAL = 70
"""Exit code of a bug (``EX_SOFTWARE`` of sysexits.h): never that of a refused request or of a failed check."""

_INTERRUPTED = "Stopped; what was done is kept, and the same command continues where it stopped."


def say(text: str) -> None:
    """A line for people, on standard error; brackets in it are not markup."""
    err.print(text, markup=False)


def print_json(value: Any) -> None:
    """The one JSON document of a verb, on standard output."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))


@contextlib.contextmanager
def quiet_stdout() -> Iterator[None]:
    """Send what libraries print to standard error, so that standard output holds the answer alone."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


def explain(error: BaseException) -> tuple[int, str]:
    """Exit code and one sentence for any exception."""
    if isinstance(error, AutoCompressError):
        return error.exit_code, str(error)
    if isinstance(error, KeyboardInterrupt):
        return 130, _INTERRUPTED
    if isinstance(error, OSError):
        if error.errno == errno.ENOSPC:
            return 2, "The disk is full; free some space, and the same command continues where it stopped."
        name = f" {error.filename}" if error.filename else ""
        return 2, f"The system refuses{name}: {error.strerror or error}."
    if hasattr(error, "format_message"):  # the command line's own: a missing option, an unknown verb
        context = getattr(error, "ctx", None)
        pointer = f" See '{context.command_path} --help'." if context else ""
        return int(getattr(error, "exit_code", 2)), f"{error.format_message()}{pointer}"
    kind = f"{type(error).__name__}: {error}".strip().splitlines()[0]
    return (
        INTERNAL,
        f"This is a bug in AutoCompress ({kind}); run the command again with --debug and report what it prints.",
    )


class Group(TyperGroup):
    """The root command: takes ``--debug`` anywhere, and turns every exception into its sentence and exit code."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.meta["debug"] = "--debug" in args
        ctx.meta["json"] = "--json" in args
        return super().parse_args(ctx, [a for a in args if a != "--debug"])

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (typer.Exit, BrokenPipeError):
            raise
        except (Exception, KeyboardInterrupt) as error:
            code, sentence = explain(error)
            if ctx.meta["debug"]:
                traceback.print_exception(error, file=sys.stderr)
            if ctx.meta["json"]:
                print_json({"error": sentence, "exit_code": code})
            say(sentence)
            raise typer.Exit(code) from None

"""Writes docs/cli.md from the command line's own help: ``python -m autocompress.cli.docs docs/cli.md``."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from autocompress.cli import app
from autocompress.files import write_text

WIDTH = 110

_INTRODUCTION = """\
# The command line

This page is written by `make docs` from the help texts themselves; a test fails when it lags behind.

- `--json` prints one JSON document on standard output; progress and messages go to standard error.
- Exit codes: 0 success; 1 a check does not hold; 2 a request cannot be used; 3 a budget cannot be met, or does not hold
  when measured; 4 an exported file does not compute what was searched; 70 a bug in AutoCompress; 130 interrupted.
- An error is one sentence on standard error; `--debug`, anywhere on the line, shows where it comes from.
- Interrupted by Ctrl-C or `kill -9`, the same command continues where it stopped.
- Budgets are quoted, because `<` is the shell's: `--budget 'latency_ms<=50%@local'`.
"""


def verbs(command: Any, path: tuple[str, ...] = ("autocompress",)) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Each command with its words, groups before what they hold."""
    yield path, command
    for name, child in getattr(command, "commands", {}).items():
        yield from verbs(child, (*path, name))


def help_text(path: tuple[str, ...], commands: dict[tuple[str, ...], Any]) -> str:
    """What ``--help`` prints, at a fixed width so that it is the same in every terminal."""
    context = None
    for depth, word in enumerate(path, start=1):
        command = commands[path[:depth]]
        context = command.context_class(
            command, info_name=word, parent=context, terminal_width=WIDTH, help_option_names=["-h", "--help"]
        )
    return "\n".join(line.rstrip() for line in command.get_help(context).strip().splitlines())


def render() -> str:
    """The whole page."""
    commands = dict(verbs(typer.main.get_command(app)))
    parts = [_INTRODUCTION]
    for path in commands:
        parts.append(f"\n## {' '.join(path)}\n\n```text\n{help_text(path, commands)}\n```\n")
    return "".join(parts)


if __name__ == "__main__":
    write_text(Path(sys.argv[1]), render())

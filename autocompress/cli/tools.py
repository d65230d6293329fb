"""The verbs beside the way through: check, doctor and dashboard."""

from __future__ import annotations

import socket
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from autocompress.cli import options as o
from autocompress.cli.console import out, print_json, quiet_stdout, say
from autocompress.errors import AutoCompressError, UsageError

MARKS = {"ok": "[green]ok[/]", "absent": "[yellow]absent[/]", "broken": "[red]broken[/]"}


def doctor(as_json: o.Json = False) -> None:
    """Say what is installed and what is usable.

    Exit code 2: something that is needed is broken.

    \b
    Example:
      autocompress doctor
    """
    with quiet_stdout():
        from autocompress.doctor import examine

        findings = examine()
    broken = [finding.name for finding in findings if finding.state == "broken"]
    if as_json:
        print_json({"ok": not broken, "broken": broken, "findings": [asdict(finding) for finding in findings]})
    else:
        table = Table(show_header=False, box=None, pad_edge=False)
        area = ""
        for finding in findings:
            table.add_row(
                "" if finding.area == area else f"[bold]{finding.area}[/]",
                finding.name,
                MARKS[finding.state],
                finding.detail,
            )
            area = finding.area
        out.print(table)
    if broken:
        say(f"Not ready: {', '.join(broken)}; see the lines marked broken.")
        raise typer.Exit(2)
    if not as_json:
        out.print("Ready.")


def dashboard(
    port: Annotated[int, typer.Option("--port", min=1, max=65535, help="Where the page is served.")] = 8501,
    headless: Annotated[bool, typer.Option("--headless", help="Open no browser.")] = False,
    store: o.Store = None,
    as_json: o.Json = False,
) -> None:
    """Serve the Pareto explorer of the job store.

    On this machine only; Ctrl-C stops it.

    \b
    Example:
      autocompress dashboard --port 8501
    """
    from autocompress.dashboard.launch import launch

    with o.open_store(store) as jobs:
        path = jobs.path
    _need_free(port)
    url = f"http://localhost:{port}"
    say(f"The jobs of {path} on {url}; Ctrl-C stops.")
    if as_json:
        print_json({"url": url, "store": str(path)})
    code = subprocess.run(launch(path, port, headless), check=False, stdout=sys.stderr).returncode
    if code:
        raise AutoCompressError(f"The dashboard ended with code {code}; see what Streamlit says above.")


def _need_free(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("localhost", port))
        except OSError:
            raise UsageError(f"Port {port} is taken; choose another with --port.") from None


def check(
    model: Annotated[Path, typer.Argument(help="The ONNX file.")],
    budget: o.Budgets,
    task: Annotated[str | None, typer.Option("--task", help="Judge accuracy_drop on this task's report split.")] = None,
    against: Annotated[
        Path | None, typer.Option("--against", metavar="FILE", help="The original's ONNX file, for relative budgets.")
    ] = None,
    data: o.Data = None,
    as_json: o.Json = False,
) -> None:
    """Check that an ONNX file holds its budgets.

    A gate for CI: everything is measured on this machine. Exit code 1 and one sentence when it does not.

    \b
    Example:
      autocompress check model.onnx --budget 'size_mb<=0.3' --budget 'accuracy_drop<=1.0' --task digits
    """
    from autocompress.validate import budgets_of, folders_of

    budgets = budgets_of(budget)
    folders = folders_of(data or [])
    for path in (model, against):
        if path is not None and not path.is_file():
            raise UsageError(f"The ONNX file must exist, got {str(path)!r}.")
    with quiet_stdout():
        from autocompress.verify import check_model

        checks = check_model(model, budgets, task=task, against=against, data=folders)
    failed = [c for c in checks if not c.holds]
    if as_json:
        print_json({"holds": not failed, "checks": [asdict(c) for c in checks]})
    else:
        for c in checks:
            if c.holds:
                out.print(c.sentence, markup=False)
    if failed:
        say(f"{model}: {' '.join(c.sentence for c in failed)}")
        raise typer.Exit(1)

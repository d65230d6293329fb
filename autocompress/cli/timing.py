"""The verbs that time ONNX files: bench and explain."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from autocompress.cli import options as o
from autocompress.cli.console import out, print_json, quiet_stdout
from autocompress.errors import UsageError

if TYPE_CHECKING:
    from autocompress.hwprofiles import Comparison, Explanation, Latency

ModelFile = Annotated[Path, typer.Argument(help="The ONNX file.")]
Seconds = Annotated[float, typer.Option("--seconds", help="How long the rounds may take.")]
SHOWN = 8
"""Nodes of a finding, and rows of a table, that are printed; ``--json`` has them all."""


def bench(
    model: ModelFile,
    against: Annotated[Path | None, typer.Option("--against", metavar="FILE", help="The file to compare with.")] = None,
    target: o.Target = "local",
    python: o.Python = "",
    seconds: Seconds = 10.0,
    threads: o.RunThreads = 1,
    batch: o.RunBatch = 1,
    as_json: o.Json = False,
) -> None:
    """Say how fast an ONNX file is, and whether it is faster than another.

    Warmed up, in interleaved rounds, with pinned threads and random inputs; beside the numbers stand their intervals and
    the host's own noise, and a difference that does not stand out from it is not called one.

    \b
    Example:
      autocompress bench small.onnx --against original.onnx --target ssh://pi@raspberry
    """
    _need_files(model, against)
    with quiet_stdout():
        from autocompress.hwprofiles import compare, measure_one, open_target

        found: Comparison | Latency
        with open_target(target, python) as device:
            if against is not None:
                found = compare(model, against, batch=batch, threads=threads, seconds=seconds, device=device)
            else:
                found = measure_one(model, batch=batch, threads=threads, seconds=seconds, device=device)
            where = {"target": target, "device": device.host["cpu"], "onnxruntime": device.hello["onnxruntime"]}
    if as_json:
        print_json({**where, "model": str(model), "against": str(against) if against else None, **found.to_json()})
        return
    out.print(f"{model}: {found.sentence}.", markup=False)
    low, high = found.noise
    out.print(
        f"Two sessions of the same file differ by {low - 1:+.1%} to {high - 1:+.1%} here (95 % interval): the noise floor.",
        markup=False,
    )
    out.print(
        f"{where['device']}, ONNX Runtime {where['onnxruntime']}, {threads} thread(s), batch {batch}, {found.seconds:g} s",
        markup=False,
    )


def explain(
    model: ModelFile,
    against: Annotated[Path, typer.Option("--against", metavar="FILE", help="The original's ONNX file.")],
    target: o.Target = "local",
    python: o.Python = "",
    seconds: Seconds = 5.0,
    threads: o.RunThreads = 1,
    batch: o.RunBatch = 1,
    as_json: o.Json = False,
) -> None:
    """Say why an ONNX file is not faster than its original.

    Both are profiled node by node. Each finding says how many microseconds of a run are at stake, which nodes they are
    in, and what the search can do about it.

    \b
    Example:
      autocompress explain small.onnx --against original.onnx
    """
    _need_files(model, against)
    with quiet_stdout():
        from autocompress.hwprofiles import explain as explain_models
        from autocompress.hwprofiles import open_target

        with open_target(target, python) as device:
            found = explain_models(model, against, batch=batch, threads=threads, seconds=seconds, device=device)
    if as_json:
        print_json({"target": target, "model": str(model), "against": str(against), **found.to_json()})
        return
    _print(found)


def _print(found: Explanation) -> None:
    out.print(f"{found.speed.sentence}.", markup=False)
    table = Table(box=None, pad_edge=False)
    for title in ("operator", "original nodes", "nodes", "original µs", "µs"):
        table.add_column(title, justify="left" if title == "operator" else "right")
    for row in found.ops[:SHOWN]:
        table.add_row(row.op, str(row.original_nodes), str(row.nodes), f"{row.original_us:.0f}", f"{row.us:.0f}")
    out.print(table)
    if not found.findings:
        out.print("None of the known reasons was found.")
    for finding in found.findings:
        more = f" and {len(finding.nodes) - SHOWN} more" if len(finding.nodes) > SHOWN else ""
        out.print(f"\n{finding.kind}: up to {finding.us:.0f} µs of a run", style="bold", markup=False)
        out.print(f"  {finding.why}", markup=False)
        out.print(f"  Nodes: {', '.join(finding.nodes[:SHOWN])}{more}", markup=False)
        out.print(f"  {finding.fix}", markup=False)


def _need_files(*paths: Path | None) -> None:
    for path in paths:
        if path is not None and not path.is_file():
            raise UsageError(f"The ONNX file must exist, got {str(path)!r}.")

"""What every benchmark shares: results as JSON with versions and machine, and the table rendered from them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from autocompress.files import write_json, write_text
from autocompress.hwprofiles import describe_host
from autocompress.verify import environment

RESULTS = Path(__file__).parent / "results"


def load(name: str) -> dict[str, Any]:
    """Rows by key of an earlier, perhaps unfinished run."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text())["rows"] if path.exists() else {}


def save(name: str, rows: Mapping[str, Any], columns: Sequence[tuple[str, str]], title: str, command: str) -> None:
    """Write ``results/<name>.json`` and ``results/<name>.md``; ``columns``: (key of a row, heading)."""
    RESULTS.mkdir(exist_ok=True)
    versions = environment()["versions"]
    write_json(
        RESULTS / f"{name}.json", {"command": command, "versions": versions, "machine": describe_host(), "rows": rows}
    )
    head = "| " + " | ".join(heading for _, heading in columns) + " |\n|" + " --- |" * len(columns)
    body = "\n".join("| " + " | ".join(str(row.get(key, "–")) for key, _ in columns) + " |" for row in rows.values())
    write_text(RESULTS / f"{name}.md", f"# {title}\n\n{head}\n{body}\n\nRenewed by `{command}`.\n")

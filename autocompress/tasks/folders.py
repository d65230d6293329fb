"""The user's own data folders: ``--data`` and ``AUTOCOMPRESS_DATA``."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from autocompress.errors import UsageError


def data_folders(data: Sequence[str] = ()) -> list[Path]:
    """The folders in ``data``, then those in ``AUTOCOMPRESS_DATA`` (separated as in ``PATH``); each must exist."""
    folders = [*data, *os.environ.get("AUTOCOMPRESS_DATA", "").split(os.pathsep)]
    paths = [Path(folder).expanduser() for folder in folders if folder]
    for path in paths:
        if not path.is_dir():
            raise UsageError(f"A data folder must exist, got {str(path)!r} (from --data or AUTOCOMPRESS_DATA).")
    return paths

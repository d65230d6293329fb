"""Files that are whole or absent, written beside their place and renamed; and the folder for what can be made again."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

from autocompress.errors import StoreError


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a temporary file in the folder of ``path`` (made on demand), then rename it to ``path``.

    The temporary name keeps the suffix of ``path``. Whatever goes wrong, ``path`` is the old file or the new one and
    no temporary file stays. Raises ``StoreError`` when the disk refuses.
    """
    temporary = path.with_name(f".{path.stem}.{os.getpid()}-{secrets.token_hex(4)}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write(temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        reason = error.strerror or error
        raise StoreError(f"Cannot write {path} ({reason}); free some space or choose another folder.") from error


def write_bytes(path: Path, data: bytes) -> None:
    """Write ``data`` atomically."""
    write_atomically(path, lambda temporary: temporary.write_bytes(data))


def write_text(path: Path, text: str) -> None:
    """Write ``text`` atomically, as UTF-8."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write a JSON value atomically, indented, keys in the order given."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def cache_dir() -> Path:
    """The folder for what can be made again: ``AUTOCOMPRESS_HOME``, else ``autocompress`` in the user's cache folder.

    Created on demand; raises ``StoreError`` when it cannot be.
    """
    home = os.environ.get("AUTOCOMPRESS_HOME")
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(home).expanduser() if home else Path(base) / "autocompress"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(
            f"Cannot make the cache folder {folder} ({error.strerror}); set AUTOCOMPRESS_HOME to a writable folder."
        ) from error
    return folder


def make_folder(path: Path) -> None:
    """Make a folder with its parents; raises ``StoreError`` when that cannot be."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(f"Cannot make the folder {path} ({error.strerror}); choose another one.") from error

"""What was judged before: a ledger in memory, the one a job starts from, and a job's own on top of it.

An entry holds what was measured, the plan and its rung, so that a ledger can be listed. Knows nothing of models and stores.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from autocompress.errors import StoreError, UsageError
from autocompress.files import write_text
from autocompress.types import Fidelity, Ledger, digest

VERSION = 1
COPIED: tuple[Fidelity, ...] = ("slice", "full", "refitted")
Shared = Callable[[str], AbstractContextManager[Ledger]]
"""A model's key -> the ledger that all its jobs share, to be opened and closed."""


class NoLedger:
    """Remembers nothing beyond this process."""

    def __init__(self) -> None:
        self._kept: dict[str, dict[str, Any]] = {}

    def get(self, key: str) -> dict[str, Any] | None:
        return self._kept.get(key)

    def put(self, key: str, value: Mapping[str, Any]) -> None:
        self._kept[key] = dict(value)

    def items(self) -> Iterator[tuple[str, dict[str, Any]]]:
        yield from self._kept.items()


@dataclass(frozen=True)
class Start:
    """The ledger a job starts from: empty, or a copy of what earlier jobs on the same model have judged.

    ``model``: the key of all that decides an evaluation but the plan and its rung.
    """

    model: str = ""
    entries: Mapping[str, dict[str, Any]] = field(default_factory=dict)

    @cached_property
    def hash(self) -> str:
        """Of the model's key and the entries; every empty ledger has the same."""
        return digest([self.model, self.entries] if self.entries else [])

    @property
    def sentence(self) -> str:
        """What a person reads of it."""
        if not self.entries:
            return "Nothing is known of this model from earlier jobs, so the search started from an empty ledger."
        return f"The search started from {len(self.entries)} evaluations of earlier jobs (ledger {self.hash})."

    def save(self, path: Path) -> None:
        """Write the entries with their hash, atomically; raises ``StoreError`` when the disk refuses."""
        content = {"version": VERSION, "model": self.model, "hash": self.hash, "entries": self.entries}
        write_text(path, json.dumps(content, allow_nan=False))

    @classmethod
    def load(cls, path: Path) -> Start:
        """Read what :meth:`save` wrote; raises ``StoreError`` in one sentence where that is not what lies there."""
        try:
            content = json.loads(path.read_bytes())
            found = cls(str(content["model"]), {str(k): dict(v) for k, v in content["entries"].items()})
            whole = content["version"] == VERSION and content["hash"] == found.hash
        except OSError as error:
            raise StoreError(f"The ledger {path} cannot be read ({error.strerror or error}).") from error
        except (ValueError, KeyError, TypeError, AttributeError):
            whole = False
        if not whole:
            raise StoreError(
                f"{path} is damaged, or is no ledger that a job started from; take the ledger_start.json of a job with --warm."
            )
        return found


def started(path: Path, model: str, given: Path | None, shared: Ledger | None) -> Start:
    """The start kept at ``path``; at first ``given``, or else a copy of ``shared``.

    What was distilled is left out of the copy: those models lie in other jobs' folders, and would have to be made again.
    Raises ``UsageError`` when it is not of this model, ``StoreError`` when it is damaged.
    """
    kept = path if path.exists() else given
    if kept is None:
        items = shared.items() if shared is not None else ()
        found = Start(model, {k: v for k, v in items if v.get("fidelity") in COPIED})
    else:
        found = Start.load(kept)
        if found.entries and found.model != model:
            raise UsageError(
                f"{kept} holds evaluations of another model, other data or another number of threads; start from a ledger "
                "of this model."
            )
    if kept != path:
        found.save(path)
    return found


class JobLedger:
    """A job's own ledger on top of the one it started from; what is put also goes to the model's shared one.

    The shared one is never asked. If it refuses, the job goes on without it, and ``refusal`` says why.
    """

    def __init__(self, own: Ledger, start: Start, shared: Ledger | None) -> None:
        self._own, self._start, self._shared = own, start, shared
        self.refusal = ""

    def get(self, key: str) -> dict[str, Any] | None:
        found = self._own.get(key)
        return found if found is not None else self._start.entries.get(key)

    def put(self, key: str, value: Mapping[str, Any]) -> None:
        self._own.put(key, value)
        if self._shared is not None:
            try:
                self._shared.put(key, value)
            except StoreError as error:
                self._shared, self.refusal = None, str(error)

    def items(self) -> Iterator[tuple[str, dict[str, Any]]]:
        own = dict(self._own.items())
        yield from {**self._start.entries, **own}.items()

"""The store's file: its tables, how it is opened, and what SQLite's refusals mean in one sentence.

Knows nothing of jobs' meaning; :mod:`autocompress.service.store` gives the rows their sense.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import (
    JSON,
    Boolean,
    Column,
    Connection,
    Engine,
    Float,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    create_engine,
    event,
    inspect,
    select,
)
from sqlalchemy.dialects.sqlite import insert
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, DBAPIError

from autocompress.errors import StoreError, UsageError
from autocompress.files import cache_dir

SCHEMA_VERSION = 1
BUSY_SECONDS = 30.0

_metadata = MetaData()
_Json = JSON(none_as_null=True)

meta = Table("meta", _metadata, Column("key", String, primary_key=True), Column("value", String, nullable=False))

jobs = Table(
    "jobs",
    _metadata,
    Column("seq", Integer, primary_key=True),  # order of submission
    Column("id", String, unique=True, nullable=False),
    Column("kind", String, nullable=False),
    Column("state", String, nullable=False, index=True),
    Column("request", _Json, nullable=False),
    Column("folder", String, nullable=False),  # relative to the store's folder unless the user chose it
    Column("created", Float, nullable=False),  # seconds since 1970, like all times here
    Column("started", Float),
    Column("finished", Float),
    Column("claim", String),  # fences off a worker that was thought dead
    Column("pid", Integer),
    Column("host", String),
    Column("heartbeat", Float),
    Column("attempts", Integer, nullable=False, default=0),
    Column("progress", _Json),
    Column("cancel_requested", Boolean, nullable=False, default=False),
    Column("error", Text),
    Column("exit_code", Integer),
    Column("result", _Json),
)

ledger = Table(
    "ledger",
    _metadata,
    Column("namespace", String, primary_key=True),
    Column("key", String, primary_key=True),
    Column("value", _Json, nullable=False),
    Column("created", Float, nullable=False),
)


def default_path() -> Path:
    """``AUTOCOMPRESS_STORE``, or ``jobs.sqlite`` in ``AUTOCOMPRESS_HOME`` or the user's cache folder."""
    chosen = os.environ.get("AUTOCOMPRESS_STORE")
    return file_of(chosen) if chosen else cache_dir() / "jobs.sqlite"


def file_of(path_or_url: str | Path) -> Path:
    """The SQLite file named by a path or a ``sqlite:///`` URL; other databases are refused."""
    text = os.fspath(path_or_url)
    if "://" not in text:
        return Path(text).expanduser().absolute()
    try:
        url = make_url(text)
    except ArgumentError:
        raise UsageError(f"A store is a file or a sqlite:///FILE address, got {text!r}.") from None
    if url.get_backend_name() != "sqlite" or not url.database or url.database == ":memory:":
        raise UsageError(f"A store is an SQLite file that several processes share, got {text!r}; give a path.")
    return Path(url.database).expanduser().absolute()


@contextmanager
def clear_errors(path: Path) -> Iterator[None]:
    """Turns what SQLite and the file system refuse into a :class:`StoreError` of one sentence."""
    try:
        yield
    except DBAPIError as error:
        raise StoreError(_sentence(path, str(error.orig))) from error
    except OSError as error:
        raise StoreError(f"The job store {path} cannot be used: {error.strerror or error}.") from error


_MEANINGS = (
    ("disk is full", "has no room left on its disk; free some and start again, nothing that was stored is lost"),
    ("locked", f"was kept locked by another process for {BUSY_SECONDS:g} s; look for a stuck worker or a backup"),
    ("readonly", "cannot be written by this user; change its permissions or choose another with --store"),
    ("not a database", "is not an SQLite file; choose another with --store"),
    ("unable to open", "cannot be opened; its folder must exist and be writable, or choose another with --store"),
    ("malformed", "is damaged; restore it from a copy or choose another with --store"),
    ("no such table", "is an SQLite file of another program; choose another with --store"),
    ("no such column", "is an SQLite file of another program; choose another with --store"),
)


def _sentence(path: Path, reason: str) -> str:
    for key, meaning in _MEANINGS:
        if key in reason:
            return f"The job store {path} {meaning} ({reason})."
    return f"The job store {path} refuses: {reason}."


def open_engine(path: Path) -> Engine:
    """An engine on the file, made with its folder and tables where they are missing; safe for several processes."""
    with clear_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    engine = create_engine(f"sqlite:///{path}", connect_args={"timeout": BUSY_SECONDS})
    event.listen(engine, "connect", _configure)
    try:
        with clear_errors(path), engine.begin() as connection:
            _prepare(connection, path)
    except BaseException:
        engine.dispose()
        raise
    return engine


def _configure(connection: Any, _record: object) -> None:
    """WAL: readers beside one writer; NORMAL: kill -9 costs nothing, a power cut may cost the last rows."""
    cursor = connection.cursor()
    try:
        cursor.execute("PRAGMA foreign_keys=ON")
        cursor.execute("PRAGMA synchronous=NORMAL")
        if cursor.execute("PRAGMA journal_mode").fetchone()[0] != "wal":
            _switch_to_wal(cursor)
    finally:
        cursor.close()


def _switch_to_wal(cursor: Any) -> None:
    """SQLite does not wait here when two processes open a new file at once, so this does."""
    deadline = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            cursor.execute("PRAGMA journal_mode=WAL")
            return
        except Exception as error:  # the driver's OperationalError
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.02)


def _prepare(connection: Connection, path: Path) -> None:
    """Makes the tables in one transaction where they are missing, so that no other process sees half of them."""
    if not inspect(connection).has_table("meta"):
        connection.exec_driver_sql("BEGIN IMMEDIATE")
        names = inspect(connection).get_table_names()  # another process may have been faster
        if names and "meta" not in names:
            raise StoreError(f"The file {path} is an SQLite file of another program; choose another with --store.")
        _metadata.create_all(connection)
        version_row = insert(meta).values(key="schema_version", value=str(SCHEMA_VERSION))
        connection.execute(version_row.on_conflict_do_nothing())
    version = connection.execute(select(meta.c.value).where(meta.c.key == "schema_version")).scalar()
    if version is None or not version.isdigit():
        raise StoreError(f"The file {path} is not a job store of AutoCompress; choose another with --store.")
    if int(version) > SCHEMA_VERSION:
        raise StoreError(
            f"The job store {path} has schema {version} and this AutoCompress reads up to {SCHEMA_VERSION};"
            " upgrade AutoCompress or choose another with --store."
        )

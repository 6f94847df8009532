"""The catalogue's file before the service starts: is it sound, and its schema known? If so, its backup is made anew."""

from __future__ import annotations

import contextlib
import errno
import re
import sqlite3
from pathlib import Path

from service.store.revisions import QUERY, TABLE, require_known

_BLOB = re.compile(r"[0-9a-f]{64}")
_FULL = ("SQLITE_FULL", "SQLITE_IOERR_WRITE", "SQLITE_IOERR_SHMSIZE")


class Damaged(Exception):  # noqa: N818 - these names say what was found
    """The file is no sound database. str(): one line that names it."""


class Missing(Exception):  # noqa: N818
    """There are adapters but no catalogue of them. str(): one line that names both."""


def backup_path(catalogue: Path) -> Path:
    return catalogue.with_name(f"{catalogue.name}.backup")


def check_and_copy(catalogue: Path, blobs: Path) -> bool:
    """Whether a backup was made; for a service that holds the data folder and has not started yet.

    No catalogue and no blobs: a first start. Without a catalogue every blob would be swept as unused, hence Missing.
    Raises Damaged, Missing, CatalogueTooNew, OSError. A disk too full for a backup is no failure."""
    if not catalogue.exists():
        if any(_BLOB.fullmatch(entry.name) for entry in blobs.glob("??/*")):
            raise Missing(f"{blobs} holds adapters, but {catalogue} is gone")
        return False
    try:
        with contextlib.closing(sqlite3.connect(catalogue, timeout=10.0)) as source:
            problems = [row[0] for row in source.execute("PRAGMA quick_check(3)")]
            if problems != ["ok"]:
                raise Damaged(f"{catalogue} is damaged: {' '.join(problems[0].split())}")
            require_known(_revision(source))
            return _copy(source, backup_path(catalogue))
    except sqlite3.Error as error:
        name = getattr(error, "sqlite_errorname", "")
        if name.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB")):
            raise Damaged(f"{catalogue} is damaged: {error}") from None
        code = errno.ENOSPC if name in _FULL else errno.EROFS if name.startswith("SQLITE_READONLY") else errno.EIO
        raise OSError(code, str(error), str(catalogue)) from error


def _revision(source: sqlite3.Connection) -> str | None:
    there = source.execute("SELECT 1 FROM sqlite_schema WHERE type = 'table' AND name = ?", (TABLE,)).fetchone()
    found = source.execute(QUERY).fetchone() if there else None
    return found[0] if found else None


def _copy(source: sqlite3.Connection, target: Path) -> bool:
    unfinished = target.with_name(f"{target.name}.new")
    try:
        unfinished.unlink(missing_ok=True)
        with contextlib.closing(sqlite3.connect(unfinished)) as copy:
            copy.execute("PRAGMA synchronous = FULL")
            source.backup(copy)
        unfinished.replace(target)
    except (OSError, sqlite3.OperationalError):
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)
        return False
    return True

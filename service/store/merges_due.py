"""Whether there is a merge to do, asked of a SQLite catalogue without SQLAlchemy: the supervisor starts the merger for
the first one."""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path
from urllib.parse import quote

QUERY = "SELECT 1 FROM merges WHERE state IN ('queued', 'running') LIMIT 1"
"""Running: it was when the service ended. Answered from the index of states."""


def merges_due(catalogue: Path) -> bool:
    """False also where the catalogue cannot be asked now: it is asked again. Takes 0.5 ms, most of it to open the file:
    each time, so that no connection outlives the API processes' own and keeps the write-ahead log from being emptied.
    """
    try:
        url = f"file:{quote(str(catalogue))}?mode=rw"  # reads, but rw: the log's index may have to be made
        with contextlib.closing(sqlite3.connect(url, uri=True, timeout=0.0)) as connection:
            return connection.execute(QUERY).fetchone() is not None
    except sqlite3.Error:
        return False

"""Whether anything has been committed to a SQLite database since one last looked, in microseconds.

Every request with an adapter asks the catalogue what its name means. Through the pool that takes 1 to 2 ms (a thread's
turn for each of connect, execute, rollback), so answers are kept for as long as no other connection, of this process
or another, commits anything: `PRAGMA data_version` says so from the header of the write-ahead log's index, and is asked
on a connection of its own, right here in the event loop, since it reads no page of a file.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Hashable
from typing import Generic, TypeVar
from urllib.parse import quote

Answer = TypeVar("Answer")

MOST_KEPT = 10_000


class KeptAnswers(Generic[Answer]):
    """Answers to questions about one state of the database. `path` None: a database that cannot be asked whether it has
    changed (PostgreSQL), of which nothing is kept."""

    def __init__(self, path: str | None) -> None:
        self._path = path
        self._connection: sqlite3.Connection | None = None
        self._state: int | None = None
        self._answers: dict[Hashable, Answer] = {}

    def state(self) -> int | None:
        """Another number after every commit; None: not known. To be asked before what is then `keep`t is read."""
        if self._path is None:
            return None
        try:
            if self._connection is None:
                # Of its own accord sqlite3 would wait for a lock, here for everybody.
                uri = f"file:{quote(self._path)}?mode=ro"
                self._connection = sqlite3.connect(uri, uri=True, timeout=0.0, isolation_level=None)
            row = self._connection.execute("PRAGMA data_version").fetchone()
        except sqlite3.Error:  # whoever reads in earnest finds out what is wrong, and says it
            self.close()
            return None
        return int(row[0])

    def get(self, question: Hashable, state: int | None) -> Answer | None:
        """What is kept of this state."""
        if state is None:
            return None
        if state != self._state:
            self._answers.clear()
            self._state = state
        return self._answers.get(question)

    def keep(self, question: Hashable, answer: Answer, state: int | None) -> None:
        """`answer` was read after `state` had been asked for."""
        if state is not None and state == self._state and len(self._answers) < MOST_KEPT:
            self._answers[question] = answer

    def close(self) -> None:
        """Nothing is kept afterwards, until it is asked again."""
        self._answers.clear()
        self._state = None
        if self._connection is not None:
            self._connection.close()
            self._connection = None

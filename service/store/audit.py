"""The audit log: every management action, who asked for it, on what, and what came of it.

An action is entered before it is begun (status BEGUN) and completed afterwards, each time in a transaction of its own.
So nothing is ever done that is not in the log, whenever the service is killed: what such an end leaves is an entry that
says that the action was begun, and that nobody knows whether it was done. Entries that come at the same time share a
transaction, so that a caller who is refused a thousand times a second does not keep the database from others.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from service.store.database import Database
from service.store.records import Page
from service.store.tables import audit

log = logging.getLogger(__name__)

BEGUN = 0
"""The status of what was begun and not completed."""
DAY_S = 24 * 3600
MAX_TARGET = 400
"""Characters."""
_MOST_LATE = 10_000

_Write = Callable[[AsyncConnection], Awaitable[Any]]


@dataclass(frozen=True, slots=True)
class Action:
    """A line of the audit log. `status`: of the answer, over HTTP; BEGUN: there was none, or it is still to come."""

    number: int
    at: int
    actor: str
    tenant: str
    action: str
    target: str
    status: int
    request_id: str


class AuditLog:
    """The log in one database. Lines older than `days` are deleted, once a day."""

    def __init__(self, database: Database, days: int) -> None:
        self._database = database
        self._days = days
        self._pruned = -1
        self._waiting: list[tuple[_Write, asyncio.Future[Any]]] = []
        self._writer: asyncio.Task[None] | None = None
        self._late: dict[int, dict[str, Any]] = {}

    async def record(
        self, actor: str, tenant: str, action: str, target: str, status: int = BEGUN, request_id: str = ""
    ) -> int:
        """Enters an action; the number to complete it by. Raises CatalogueUnavailable: then it must not be begun."""
        values = {"actor": actor, "tenant": tenant, "action": action, "target": printable(target), "status": status}
        statement = sa.insert(audit).values(**values, request_id=request_id, at=int(time.time()))
        number: int = await self._in_turn(lambda connection: connection.scalar(statement.returning(audit.c.number)))
        return number

    async def about(self, number: int, target: str) -> None:
        """On what, where that is known only later. Raises CatalogueUnavailable."""
        await self._in_turn(lambda connection: _change(connection, number, {"target": printable(target)}))

    async def complete(self, number: int, target: str, status: int) -> None:
        """What came of it. Does not fail, since what is done is done: without the database the entry stays as it was
        begun until there is one again."""
        values = {"target": printable(target), "status": status}
        try:
            await self._in_turn(lambda connection: _change(connection, number, values))
        except Exception as error:
            log.warning("the end of action %d (%s) cannot be entered in the audit log now: %s", number, values, error)
            if len(self._late) < _MOST_LATE:
                self._late[number] = values

    async def list_actions(self, limit: int, before: int | None, tenant: str | None) -> Page[Action]:
        """The newest first, those older than the number `before`."""
        statement = sa.select(audit).order_by(audit.c.number.desc()).limit(limit + 1)
        if before is not None:
            statement = statement.where(audit.c.number < before)
        if tenant is not None:
            statement = statement.where(audit.c.tenant == tenant)
        async with self._database.read() as connection:
            rows = (await connection.execute(statement)).all()
        return Page([Action(**row._mapping) for row in rows[:limit]], len(rows) > limit)

    async def _in_turn(self, write: _Write) -> Any:
        done: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._waiting.append((write, done))
        if self._writer is None or self._writer.done():
            self._writer = asyncio.create_task(self._write())
        # The transaction is everybody's: one who leaves does not break it off.
        return await asyncio.shield(done)

    async def _write(self) -> None:
        while self._waiting:
            batch, self._waiting = self._waiting, []
            late, self._late = self._late, {}
            try:
                async with self._database.write() as connection:
                    results = [await write(connection) for write, _ in batch]
                    for number, values in late.items():
                        await _change(connection, number, values)
                    today = await self._prune(connection)
            except Exception as error:
                self._late = late | self._late
                for _, done in batch:
                    done.set_exception(error)
                    done.exception()  # has been seen, also where whoever waited for it has left
            else:
                self._pruned = today
                for (_, done), result in zip(batch, results, strict=True):
                    done.set_result(result)

    async def _prune(self, connection: AsyncConnection) -> int:
        now = int(time.time())
        if now // DAY_S != self._pruned:
            await connection.execute(sa.delete(audit).where(audit.c.at < now - self._days * DAY_S))
        return now // DAY_S


async def _change(connection: AsyncConnection, number: int, values: dict[str, Any]) -> None:
    await connection.execute(sa.update(audit).where(audit.c.number == number).values(**values))


def printable(text: str) -> str:
    """As any database and any terminal can hold it: what is refused may be called anything."""
    escaped = "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)
    return escaped if len(escaped) <= MAX_TARGET else f"{escaped[:MAX_TARGET]}..."

"""What was used: one row per hour, tenant, key and adapter, to which every process of the service adds.

Only sums are kept, so the table grows with what is in use, not with traffic. Rows go by the tenant's number and outlive
it: what is billed later is the deleted tenant's, never that of a new one with its name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy.dialects import sqlite
from sqlalchemy.ext.asyncio import AsyncConnection

from service.store.database import Database
from service.store.tables import tenants, usage

HOUR_S = 3600
DAY_S = 24 * HOUR_S

GROUPS = ("hour", "day", "tenant", "key", "adapter")
"""What sums may be grouped by."""


@dataclass(slots=True)
class Counts:
    """Sums. `first_token_ms`: of the times to the `first_tokens` first tokens that were sent. `loads`: to the device;
    `byte_hours`: bytes on the device times hours there."""

    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    first_tokens: int = 0
    first_token_ms: float = 0.0
    loads: int = 0
    byte_hours: float = 0.0

    def add(self, other: Counts) -> None:
        for name in COUNTS:
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def __bool__(self) -> bool:
        return any(getattr(self, name) for name in COUNTS)


COUNTS = tuple(field.name for field in fields(Counts))


class Owner(NamedTuple):
    """Whose use, or change, it is. The number says which tenant, and is never given again; the name is what that one
    was called."""

    number: int
    name: str


NOBODY = Owner(0, "")

Key = tuple[int, Owner, str, str]
"""(hour, owner, key, adapter)"""


async def add(connection: AsyncConnection, counts: Mapping[Key, Counts]) -> None:
    """Adds to the rows, inside the caller's write transaction."""
    if not counts:
        return
    # The same words in both dialects, but each has its own construct for them.
    insert: Any
    if connection.dialect.name == "sqlite":
        insert = sqlite.insert(usage)
    else:
        from sqlalchemy.dialects import postgresql

        insert = postgresql.insert(usage)
    statement = insert.on_conflict_do_update(
        index_elements=list(usage.primary_key.columns),
        set_={name: usage.c[name] + insert.excluded[name] for name in COUNTS},
    )
    rows = [
        {"hour": hour, "tenant_number": owner.number, "tenant": owner.name, "key": key, "adapter": adapter}
        | {name: getattr(each, name) for name in COUNTS}
        for (hour, owner, key, adapter), each in sorted(counts.items())
    ]
    await connection.execute(statement, rows)


async def read(
    connection: AsyncConnection,
    *,
    start: int,
    end: int,
    tenant: int | None,
    group_by: Sequence[str],
    limit: int,
    offset: int = 0,
) -> list[dict[str, Any]]:
    """Sums over the hours in [start, end), grouped, in the groups' order. `tenant`: a number; None: of all tenants.
    Grouped by tenant, rows also have `tenant_number` and `tenant_deleted`."""
    columns = {
        "hour": usage.c.hour.label("hour"),
        "day": (usage.c.hour - usage.c.hour % DAY_S).label("day"),
        "tenant": usage.c.tenant,
        "tenant_number": usage.c.tenant_number,
        "key": usage.c.key,
        "adapter": usage.c.adapter,
    }
    by = [part for name in group_by for part in ((name, "tenant_number") if name == "tenant" else (name,))]
    groups = [columns[name] for name in by]
    sums = [sa.func.coalesce(sa.func.sum(usage.c[name]), 0).label(name) for name in COUNTS]
    statement = sa.select(*groups, *sums).where(usage.c.hour >= start, usage.c.hour < end)
    if tenant is not None:
        statement = statement.where(usage.c.tenant_number == tenant)
    if groups:
        names = [sa.literal_column(name) for name in by] if "day" in group_by else groups
        statement = statement.group_by(*names).order_by(*names).limit(limit).offset(offset)
    rows = [_plain(row._asdict()) for row in (await connection.execute(statement)).all()]
    if "tenant" in group_by:
        numbers = {row["tenant_number"] for row in rows}
        alive = set(await connection.scalars(sa.select(tenants.c.number).where(tenants.c.number.in_(numbers))))
        rows = [{**row, "tenant_deleted": row["tenant_number"] not in alive} for row in rows]
    return rows


def _plain(row: Mapping[str, Any]) -> dict[str, Any]:
    """PostgreSQL sums BIGINT as NUMERIC, which Python reads as Decimal."""
    exact = {name: float(row[name]) for name in ("first_token_ms", "byte_hours")}
    whole = {name: int(row[name]) for name in COUNTS if name not in exact}
    return {**row, **whole, **exact}


async def forget(connection: AsyncConnection, before: int) -> int:
    """Deletes the rows of the hours before that time; returns how many."""
    return (await connection.execute(sa.delete(usage).where(usage.c.hour < before))).rowcount


def total(rows: Iterable[Mapping[str, Any]]) -> Counts:
    """The sum of rows that `read` gave."""
    result = Counts()
    for row in rows:
        result.add(Counts(**{name: row[name] for name in COUNTS}))
    return result


class UsageTable:
    """The table in one database. Hours older than `keep_days` are deleted, once a day."""

    def __init__(self, database: Database, keep_days: int) -> None:
        self._database = database
        self._keep_s = keep_days * DAY_S
        self._pruned = -1

    async def write(self, counts: Mapping[Key, Counts]) -> None:
        """Adds, in one transaction."""
        today = max(counts)[0] // DAY_S
        async with self._database.write() as connection:
            await add(connection, counts)
            if today != self._pruned:
                await forget(connection, today * DAY_S - self._keep_s)
        self._pruned = today

    async def read(self, **query: Any) -> list[dict[str, Any]]:
        """As `read` does."""
        async with self._database.read() as connection:
            return await read(connection, **query)

"""What each service holds of tenants' limits where several share a database (service/leases.py). Rows that are not
renewed end."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from service.store.blob_book import BlobBook
from service.store.tables import limit_leases


@dataclass(frozen=True, slots=True)
class Lease:
    """`held`: nobody else may use it for another `seconds`. `wanted`: what the service would use now."""

    tenant: int
    name: str
    held: int
    wanted: int
    seconds: int = 0


async def others(connection: AsyncConnection, instance: str) -> dict[tuple[int, str], dict[str, Lease]]:
    """What other services hold: (tenant, limit) -> service -> lease."""
    table, found = limit_leases.c, dict[tuple[int, str], dict[str, Lease]]()
    where = sa.and_(table.instance != instance, table.until > BlobBook(connection).now)
    for row in await connection.execute(sa.select(limit_leases).where(where)):
        lease = Lease(row.tenant_number, row.name, row.held, row.wanted)
        found.setdefault((row.tenant_number, row.name), {})[row.instance] = lease
    return found


async def enter(connection: AsyncConnection, instance: str, leases: Iterable[Lease]) -> None:
    """These are all leases of this service, from now on. Also deletes what has ended."""
    table, now = limit_leases.c, BlobBook(connection).now
    await connection.execute(sa.delete(limit_leases).where(sa.or_(table.instance == instance, table.until <= now)))
    rows = [
        {
            "tenant_number": each.tenant, "name": each.name, "held": each.held, "wanted": each.wanted,
            "seconds": each.seconds,
        }
        for each in leases
    ]  # fmt: skip
    if rows:
        until = now + sa.bindparam("seconds", type_=sa.BigInteger)
        await connection.execute(sa.insert(limit_leases).values(instance=instance, until=until), rows)

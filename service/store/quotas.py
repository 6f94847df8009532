"""What a tenant may keep: checked where it is entered, in the same transaction, so that no two uploads together exceed
what each would not; merges publish through the same door. And before a body is read (`upload_room`), since what cannot
be kept should not have to be received."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from service.store.errors import QuotaReached
from service.store.records import NewVersion
from service.store.tables import adapters, merges, tenants, versions


@dataclass(frozen=True, slots=True)
class Room:
    """How many bytes the files of an upload may have; None: no limit. `limit` is called `name`, `detail` says how much
    of it is used."""

    bytes: int | None = None
    name: str = "stored_bytes"
    limit: int = 0
    detail: str = ""

    def require(self, nbytes: int, slack: int = 0) -> None:
        """Raises QuotaReached if so many are too many; `slack`: of these, what need not be of files."""
        if self.bytes is not None and (self.bytes == 0 or nbytes > self.bytes + slack):
            raise QuotaReached(self.name, self.limit, self.detail)


UNLIMITED = Room()


async def upload_room(connection: AsyncConnection, tenant: str, name: str | None) -> Room:
    """For an upload of the adapter `name`; None: of one that the body will name. Content that a version has already is
    never refused, as it takes no room: so an upload may always be as large as the largest that it could repeat."""
    limits = await _limits(connection, tenant)
    others_most, bytes_most = limits.get("adapters"), limits.get("stored_bytes")
    if others_most is None and bytes_most is None:
        return UNLIMITED
    mine = sa.and_(versions.c.adapter_id == adapters.c.id, adapters.c.tenant == tenant)
    if name is not None:
        mine = sa.and_(mine, adapters.c.name == name)
    repeated = int(await connection.scalar(sa.select(sa.func.max(versions.c.bytes)).where(mine)) or 0)
    only_again = name is None or not repeated
    if only_again and others_most is not None and await _others(connection, tenant, name) + 1 > others_most:
        return Room(repeated, "adapters", others_most, "delete one first")
    if bytes_most is None:
        return UNLIMITED
    held = await stored_bytes(connection, tenant)
    return Room(max(bytes_most - held, repeated, 0), "stored_bytes", bytes_most, f"{held} are stored, this has more")


async def require_room(connection: AsyncConnection, tenant: str, name: str, new: NewVersion) -> None:
    """Raises QuotaReached if one more version of the adapter `name` would exceed a limit of its tenant: max_rank,
    adapters, stored_bytes."""
    await require_adapter(connection, tenant, name, new.bytes, new.max_rank)


async def require_adapter(connection: AsyncConnection, tenant: str, name: str, nbytes: int, rank: int) -> None:
    """The same for a version of so many bytes and of that rank."""
    limits = await _limits(connection, tenant)
    most = limits.get("max_rank")
    if most is not None and rank > most:
        raise QuotaReached("max_rank", most, f"the adapter has rank {rank}")
    most = limits.get("adapters")
    if most is not None and await _others(connection, tenant, name) + 1 > most:
        raise QuotaReached("adapters", most, "delete one first")
    await require_bytes(connection, tenant, nbytes)


async def require_bytes(connection: AsyncConnection, tenant: str, nbytes: int, instead_of: int = 0) -> None:
    """Raises QuotaReached if the tenant may not keep so many bytes more; `instead_of`: of those it has, what they
    replace."""
    most = (await _limits(connection, tenant)).get("stored_bytes")
    if most is not None:
        held = await stored_bytes(connection, tenant) - instead_of
        if held + nbytes > most:
            raise QuotaReached("stored_bytes", most, f"{held} are stored, and this has {nbytes}")


async def stored_bytes(connection: AsyncConnection, tenant: str) -> int:
    """What counts against the tenant's limit of that name: versions (those that share files each with all of them), and
    checkpoints, which are counted from the moment they are queued until they are deleted, or have come to nothing."""
    statement = (
        sa.select(sa.func.coalesce(sa.func.sum(versions.c.bytes), 0))
        .join_from(versions, adapters, versions.c.adapter_id == adapters.c.id)
        .where(adapters.c.tenant == tenant)
    )
    of_merges = sa.select(sa.func.coalesce(sa.func.sum(merges.c.bytes), 0)).where(
        merges.c.tenant == tenant, merges.c.state.in_(("queued", "running", "succeeded"))
    )
    return int(await connection.scalar(statement) or 0) + int(await connection.scalar(of_merges) or 0)


async def _limits(connection: AsyncConnection, tenant: str) -> Mapping[str, Any]:
    return await connection.scalar(sa.select(tenants.c.limits).where(tenants.c.id == tenant)) or {}


async def _others(connection: AsyncConnection, tenant: str, name: str | None) -> int:
    """How many adapters the tenant has, but for that one."""
    others = sa.select(sa.func.count()).select_from(adapters).where(adapters.c.tenant == tenant)
    if name is not None:
        others = others.where(adapters.c.name != name)
    return int(await connection.scalar(others) or 0)

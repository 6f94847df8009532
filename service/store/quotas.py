"""What a tenant may keep: checked where it is entered, in the same transaction, so that no two uploads together exceed
what each would not. Merges publish through the same door."""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from service.store.errors import QuotaReached
from service.store.records import NewVersion
from service.store.tables import adapters, tenants, versions


async def require_room(connection: AsyncConnection, tenant: str, name: str, new: NewVersion) -> None:
    """Raises QuotaReached if one more version of the adapter `name` would exceed a limit of its tenant: max_rank,
    adapters, stored_bytes (the sum over all versions, whether or not they share files)."""
    limits = await connection.scalar(sa.select(tenants.c.limits).where(tenants.c.id == tenant))
    if not limits:
        return
    most = limits.get("max_rank")
    if most is not None and new.max_rank > most:
        raise QuotaReached("max_rank", most, f"the adapter has rank {new.max_rank}")
    most = limits.get("adapters")
    if most is not None:
        others = sa.select(sa.func.count()).where(adapters.c.tenant == tenant, adapters.c.name != name)
        if (await connection.scalar(others) or 0) + 1 > most:
            raise QuotaReached("adapters", most, "delete one first")
    most = limits.get("stored_bytes")
    if most is not None:
        stored = (
            sa.select(sa.func.coalesce(sa.func.sum(versions.c.bytes), 0))
            .join_from(versions, adapters, versions.c.adapter_id == adapters.c.id)
            .where(adapters.c.tenant == tenant)
        )
        held = int(await connection.scalar(stored) or 0)
        if held + new.bytes > most:
            raise QuotaReached("stored_bytes", most, f"{held} are stored, and this has {new.bytes}")

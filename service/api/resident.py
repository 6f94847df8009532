"""The limit resident_bytes: what of a tenant's adapters lies on the device.

The engine counts no tenants. So before a request that names adapters, the tenant's other resident ones are asked to
leave, the largest first, until there is room. One that requests still use leaves when they have ended; until then the
limit is exceeded by it. Sizes are those of the stored files. Only tenants with this limit pay for it: one statement and
one question to the engine for each of their requests.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Collection

from service.api.auth import Caller, limit_error
from service.engine.client import EngineClient
from service.engine.errors import EngineError
from service.store.catalogue import Catalogue

UNLOAD_TIMEOUT_S = 600.0
ASK_TIMEOUT_S = 2.0

_leaving: set[asyncio.Task[None]] = set()


async def make_room(caller: Caller, catalogue: Catalogue, engine: EngineClient, wanted: Collection[str]) -> None:
    """Raises ApiError 413 if the adapters of these digests alone are too large for the caller's tenant."""
    most = caller.limits.resident_bytes
    if most is None or not wanted:
        return
    sizes = await catalogue.digest_sizes(caller.tenant)
    needed = sum(sizes.get(digest, 0) for digest in wanted)
    if needed > most:
        raise limit_error(413, caller, "resident_bytes", most, f"; the adapters of the request have {needed} bytes")
    others = tuple(digest for digest in sizes if digest not in wanted)
    if not others:
        return
    try:
        places = await engine.residency(others, timeout_s=ASK_TIMEOUT_S)
    except EngineError:
        return  # the request itself will be told
    resident = sorted((d for d in others if places.get(d) in ("device", "loading")), key=lambda d: -sizes[d])
    held = sum(sizes[digest] for digest in resident)
    for digest in resident:
        if held + needed <= most:
            break
        held -= sizes[digest]
        task = asyncio.create_task(_unload(engine, digest))
        _leaving.add(task)
        task.add_done_callback(_leaving.discard)


async def _unload(engine: EngineClient, digest: str) -> None:
    with contextlib.suppress(EngineError):
        await engine.unload(digest, timeout_s=UNLOAD_TIMEOUT_S)

"""Shares tenants' limits among the services on one database.

A tenant's requests and tokens per minute and its concurrent requests hold over all services together, though each
request is admitted by the service that it reaches (service/limits.py), without asking anybody. For that, each service
holds a share of each such limit, a lease, and the leases of all services together never exceed the limit. Once a second
each says what it has used and would use, and takes or gives back: who wants more than an equal share gets what the
others do not want. A share never becomes smaller than what has been used of it within the window, and a service uses
less before others are told that they may use more. Hence no 60 seconds see more than the limit, except:

- A service that has been lent nothing yet (its first second with a tenant, START_S after its own start, or when the
  database has not answered for LENT_S) admits `limits.unlent`: an eighth of the limit among all services, but at least
  one request each. That is the overshoot: with k services at most max(k, limit / 8) a minute, and as many at once. With
  two services: 675 where 600 requests a minute are the limit, 6 where it is 4 at once. Tokens, and the answers of one
  request: an eighth of the limit, or what one request in each service may use.
- Requests that run in a service that is cut off from the database go on; others count them LENT_S longer.
- A limit that is lowered holds for each service once it has read it, within a second.

A service that dies is missed after LENT_S; its share of a minute's limit returns when that minute is over too. Tokens
that requests have reserved are of their service's share like those that were used. A request that needs more than an
equal share of a limit waits until the other services want less.

One service alone (always so with SQLite) holds everything and keeps no leases; on PostgreSQL it looks once a second
whether it still is alone. One that starts takes no share for START_S: by then every other knows of it, or has not heard
of the database for so long that it no longer takes itself to be alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO

from service.limits import WINDOW, Limiter, Need
from service.store import limit_leases
from service.store.blob_book import BlobBook
from service.store.database import Database
from service.store.errors import CatalogueUnavailable
from service.store.limit_leases import Lease

log = logging.getLogger(__name__)

TURN_S = 1.0
LENT_S = 6
"""A share, and the knowledge of being alone, is good for so long after it was last confirmed."""
START_S = LENT_S + 1
FADING = 0.7
"""Of what a service wanted beyond what it used, so much is wanted a second later yet."""


def shares(limit: int, wanted: Mapping[str, int]) -> dict[str, int]:
    """Of every service, together the limit: as much as it wants of an equal share, what is left to those that want more
    than that, and the rest equally."""
    given, left = {}, limit
    for place, name in enumerate(sorted(wanted, key=lambda each: (wanted[each], each))):
        given[name] = min(wanted[name], left // (len(wanted) - place))
        left -= given[name]
    for place, name in enumerate(sorted(given)):
        part = left // (len(given) - place)
        given[name] += part
        left -= part
    return given


class Leases:
    """The leases of one service: one of its processes, the one that has the lock in `folder`, sees to them."""

    def __init__(
        self, database: Database, limiter: Limiter, instance: str, folder: Path, clock: Callable[[], float] = time.time
    ) -> None:
        self._clock = clock
        self._database = database
        self._limiter = limiter
        self._instance = instance
        self._folder = folder
        self._lock: BinaryIO | None = None
        self._eager: dict[tuple[int, str], int] = {}
        self._entered = False
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Returns once it is known whether there are other services, unless another process sees to that."""
        if self._is_mine():
            await self.turn()
        self._task = asyncio.create_task(self._run())

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        if self._lock is not None:
            self._lock.close()

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(TURN_S)
            try:
                if self._is_mine():
                    await self.turn()
            except CatalogueUnavailable as error:
                log.warning("limits cannot be shared with other services now: %s", error)
            except Exception:
                log.exception("limits were not shared with other services")

    def _is_mine(self) -> bool:
        if self._lock is None:
            lock = (self._folder / "leases.lock").open("ab")
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.close()
                return False
            self._lock = lock
        return True

    async def turn(self) -> None:
        """Raises CatalogueUnavailable."""
        until = self._clock() + LENT_S  # from before anything is asked
        async with self._database.read() as connection:
            services = len(await BlobBook(connection).alive() | {self._instance})
        if services > 1:
            await self._share(list(self._limiter.needs()), until)
        self._limiter.know(services, until)

    async def _share(self, needs: list[Need], until: float) -> None:
        """One transaction among all services'; none if there is nothing to say."""
        if not needs and not self._entered:
            return
        starting = self._limiter.known_for() < START_S
        leases: list[Lease] = []
        async with self._database.write() as connection:
            others = await limit_leases.others(connection, self._instance)
            self._eager = {(need.tenant, need.name): self._eagerness(need) for need in needs}
            for need in needs:
                rivals = others.get((need.tenant, need.name), {})
                wanted = min(need.used + self._eager[need.tenant, need.name], max(need.used, need.limit))
                claims = {name: each.wanted for name, each in rivals.items()} | {self._instance: wanted}
                fair = shares(need.limit, claims)[self._instance]
                free = 0 if starting else need.limit - sum(each.held for each in rivals.values())
                held = self._limiter.give_back(need.tenant, need.name, max(0, min(fair, free)))
                seconds = LENT_S if need.name == "concurrent_requests" else LENT_S + WINDOW
                leases.append(Lease(need.tenant, need.name, held, wanted, seconds))
            await limit_leases.enter(connection, self._instance, leases)
        self._entered = bool(leases)
        if not starting:
            lent: dict[int, dict[str, int]] = {}
            for lease in leases:
                lent.setdefault(lease.tenant, {})[lease.name] = lease.held
            for tenant, held_by_name in lent.items():
                self._limiter.lend(tenant, held_by_name, until)

    def _eagerness(self, need: Need) -> int:
        """What it would use beyond what it has used: as much as just came, and more if requests were refused."""
        more = need.recent + (max(need.refused, need.limit // 8) if need.refused else 0)
        return max(more, int(self._eager.get((need.tenant, need.name), 0) * FADING))

"""Counts what requests use, as they use it, and writes the sums to the database twice a second.

A request that still streams is counted too: each write takes what has come since the last. So a process that is killed
loses at most what one interval and the write that was under way hold, well under a second unless the database is away;
then the sums wait here and are added later.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from service.engine.client import EngineClient
from service.engine.errors import EngineError
from service.store.catalogue import Catalogue
from service.store.errors import CatalogueError
from service.store.usage import HOUR_S, NOBODY, Counts, Key, Owner

log = logging.getLogger(__name__)

INTERVAL_S = 0.5


class Tokens(Protocol):
    """What a request has used so far; the recorder looks again at each write."""

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int


@dataclass(slots=True, eq=False)
class Meter:
    """One request, counted from its first token on: one that was refused, or left before, used nothing. `tokens` may be
    set when it is known."""

    owner: Owner
    key: str
    adapter: str
    tokens: Tokens | None = None
    _new: Counts = field(default_factory=Counts)
    _begun: bool = False
    _taken: tuple[int, int, int] = (0, 0, 0)

    def first_token(self, seconds: float) -> None:
        """Of one of its answers."""
        self._new.requests += not self._begun
        self._begun = True
        self._new.first_tokens += 1
        self._new.first_token_ms += seconds * 1000

    def take(self) -> Counts:
        """What has come since the last call."""
        new, self._new = self._new, Counts()
        if self.tokens is not None:
            now = (self.tokens.prompt_tokens, self.tokens.cached_tokens, self.tokens.completion_tokens)
            new.prompt_tokens, new.cached_tokens, new.completion_tokens = (
                after - before for after, before in zip(now, self._taken, strict=True)
            )
            self._taken = now
        return new


class UsageRecorder:
    """The meters of one process. `write` adds sums to the database; `collect` adds (`add`) what no request stands for,
    and is called before each write; `clock` gives seconds since 1970."""

    def __init__(
        self,
        write: Callable[[Mapping[Key, Counts]], Awaitable[None]],
        collect: Callable[[UsageRecorder], Awaitable[None]] | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._write = write
        self._collect = collect
        self._clock = clock
        self._open: set[Meter] = set()
        self._sums: dict[Key, Counts] = {}
        self._task: asyncio.Task[None] | None = None
        self._closing = asyncio.Event()
        self._failing = False

    def start(self) -> None:
        self._task = asyncio.create_task(self._run())

    async def close(self) -> None:
        """Writes what is left."""
        self._closing.set()
        if self._task is not None:
            await self._task
        await self.flush()

    def open(self, owner: Owner, key: str, adapter: str) -> Meter:
        """For a request that begins; `close_meter` when it ends, however it ends."""
        meter = Meter(owner, key, adapter)
        self._open.add(meter)
        return meter

    def close_meter(self, meter: Meter) -> None:
        self._open.discard(meter)
        self.add(meter.owner, meter.key, meter.adapter, meter.take())

    def add(self, owner: Owner, key: str, adapter: str, counts: Counts) -> None:
        """What no request stands for (loads of adapters)."""
        hour = int(self._clock()) // HOUR_S * HOUR_S
        self._keep((hour, owner, key, adapter), counts)

    async def flush(self) -> None:
        """Writes everything counted until now; keeps it for the next time if that fails."""
        for meter in self._open:
            self.add(meter.owner, meter.key, meter.adapter, meter.take())
        sums, self._sums = self._sums, {}
        if not sums:
            return
        try:
            await self._write(sums)
        except Exception as error:
            for key, counts in sums.items():
                self._keep(key, counts)
            if not self._failing:
                log.warning("usage cannot be written now, it is kept in memory: %s", error)
            self._failing = True
        else:
            self._failing = False

    def _keep(self, key: Key, counts: Counts) -> None:
        if counts:
            self._sums.setdefault(key, Counts()).add(counts)

    async def _run(self) -> None:
        # Never cancelled: a write that is broken off may or may not have been committed.
        while not self._closing.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._closing.wait(), INTERVAL_S)
            if self._collect is not None:
                await self._collect(self)
            await self.flush()


DELETED = "(deleted)"
"""For an adapter that is no longer in the catalogue; no tenant's, if its owner is not there either."""


async def collect_occupancy(recorder: UsageRecorder, engine: EngineClient, catalogue: Catalogue) -> None:
    """Adds what the engine counted of loads and of device memory, under the adapters' owners. Whichever process asks
    first gets a figure; without an engine, or a database, it waits for the next time or is lost with them."""
    with contextlib.suppress(EngineError, CatalogueError):
        taken = await engine.take_occupancy()
        owners = await catalogue.owners(taken) if taken else {}
        for key, (loads, byte_seconds) in taken.items():
            owner, name = owners.get(key, (NOBODY, None))
            recorder.add(owner, "", name or DELETED, Counts(loads=loads, byte_hours=byte_seconds / HOUR_S))

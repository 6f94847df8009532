"""Deletes the files that no adapter needs any more, once nobody's request needs them either.

Every instance (one data folder with its engine and API processes) has one janitor at a time: the process that holds the
lock in the data folder. It says that the instance lives, gives up uploads whose process has died, releases garbage that
its own engine no longer needs, and deletes what every living instance has released. service/store/blob_book.py has the
rules that make this safe beside uploads and beside other instances.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import time
from collections.abc import Awaitable, Collection
from pathlib import Path
from typing import BinaryIO

from adapters.blobs import SWEEP_GRACE_SECONDS, Blobs, BlobStore
from adapters.block_files import delete_blocks, sweep_blocks
from adapters.errors import StoreUnavailable
from service.engine.client import EngineClient
from service.engine.errors import EngineCallTimedOut, EngineError
from service.store.blob_book import LEASE_S, BlobBook
from service.store.catalogue import Catalogue
from service.store.errors import CatalogueUnavailable
from service.store.instances import instance_id
from service.uploads import Spool

log = logging.getLogger(__name__)

TICK_S = 1.0
BEAT_S = LEASE_S / 12
"""So often the instance says that it lives, where others listen."""
FAILURE_PAUSE_S = 10.0
ENGINE_WAIT_S = 60.0  # for an engine that is being started, before it is asked what it needs
UNLOAD_TIMEOUT_S = 3600.0  # the longest a release waits for running requests in one go


class FilesApart(Exception):  # noqa: N818 - it says what is wrong
    """Services on one database need one place for the files of adapters."""

    def __init__(self) -> None:
        super().__init__("another service uses this database, and its files lie elsewhere")


class Janitor:
    """One per API process; `run` works while this process holds the instance's lock. `delay_s`: so much later than a
    deletion the engine is asked, since requests that had looked the name up before it are with the engine by then."""

    def __init__(
        self, catalogue: Catalogue, blobs: Blobs, spool: Spool, engine: EngineClient, cache_dir: Path, delay_s: float
    ) -> None:
        self.instance = instance_id(spool.root)
        self._catalogue = catalogue
        self._blobs = blobs
        self._spool = spool
        self._engine = engine
        self._cache_dir = cache_dir
        self._delay_s = delay_s
        self._lock: BinaryIO | None = None
        self._wake = asyncio.Event()
        self._next_beat = 0.0
        self._releasing: dict[str, asyncio.Task[None]] = {}

    def wake(self) -> None:
        """Something was deleted: do not wait for the next tick."""
        self._wake.set()

    async def recover(self) -> None:
        """At start: sweeps what killed processes of this instance have left. Without another process that serves no
        request can need anything deleted, so everything goes at once."""
        async with self._catalogue.write() as edits:
            alone = self._spool.alone()  # as a writer: who begins to serve later deletes nothing before this is done
            book = edits.blobs
            if self._catalogue.shared and await book.apart(self.instance, self._blobs.shared_at):
                raise FilesApart  # the supervisor has looked before, but several may have started at once
            await book.here(self.instance, self._blobs.shared_at)
            await self._give_up_the_dead(book)
            if alone:
                await book.release(self.instance, await book.unreleased(self.instance))
            garbage = await book.garbage()
            needed = await edits.referenced() | await book.claimed()
            await asyncio.to_thread(self._sweep, needed, garbage, alone)
        try:
            await self._collect()
        except StoreUnavailable as error:
            log.warning("unused files are left for later: %s", error)

    def _sweep(self, needed: set[str], garbage: set[str], alone: bool) -> None:
        self._blobs.sweep_unfinished()
        if not alone:
            return
        blocks = sweep_blocks(self._cache_dir, needed)
        files = freed = 0
        if isinstance(self._blobs, BlobStore):
            # A folder may be shared too, and another instance may run an older version: there, age is spared.
            grace = SWEEP_GRACE_SECONDS if self._catalogue.shared else 0.0
            files, freed = self._blobs.sweep(needed | garbage, grace)
        if files or blocks:
            log.info("swept %d files (%d bytes) that no adapter needs, and %d blocks", files, freed, blocks)

    async def run(self) -> None:
        """Until cancelled."""
        try:
            while True:
                pause = TICK_S
                try:
                    if self._is_mine():
                        await self._tick()
                except (CatalogueUnavailable, StoreUnavailable) as error:
                    log.warning("unused files are left for later: %s", error)
                    pause = FAILURE_PAUSE_S
                except Exception:
                    log.exception("looking for unused files failed")
                    pause = FAILURE_PAUSE_S
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._wake.wait(), pause)
                self._wake.clear()
        finally:
            tasks = set(self._releasing.values())
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            if self._lock is not None:
                self._lock.close()

    def _is_mine(self) -> bool:
        """Whether this process is the instance's janitor; it becomes so when there is none."""
        if self._lock is None:
            self._cache_dir.mkdir(parents=True, exist_ok=True)
            lock = (self._cache_dir / "janitor.lock").open("ab")
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.close()
                return False
            self._lock = lock
        return True

    async def _tick(self) -> None:
        if time.monotonic() >= self._next_beat:
            if self._catalogue.shared:
                async with self._catalogue.write() as edits:
                    await edits.blobs.here(self.instance, self._blobs.shared_at)
            self._next_beat = time.monotonic() + BEAT_S
        async with self._catalogue.blob_book() as book:
            dead = await self._dead(book)
            garbage = await book.unreleased(self.instance)
            collectable = await book.collectable(await book.alive())
        if dead:
            async with self._catalogue.write() as edits:
                await self._give_up_the_dead(edits.blobs)
            self._wake.set()
        if fresh := {sha: is_record for sha, is_record in garbage.items() if sha not in self._releasing}:
            before = set(self._releasing.values())
            task = asyncio.create_task(self._release(fresh, before))
            self._releasing |= dict.fromkeys(fresh, task)
            task.add_done_callback(lambda _: self._released(fresh))
        if collectable:
            await self._collect()

    # ------------------------------------------------------------ uploads that will not be completed

    async def _dead(self, book: BlobBook) -> set[str]:
        """Uploads whose process is gone: by its lock where that can be asked, else with its whole instance."""
        claims, alive = await book.claims(), await book.alive()
        return {
            upload
            for upload, instance, process in claims
            if (instance not in alive if instance != self.instance else not self._spool.lives(process))
        }

    async def _give_up_the_dead(self, book: BlobBook) -> None:
        await book.abandon(await self._dead(book))

    # ------------------------------------------------------------ garbage

    async def _release(self, garbage: dict[str, bool], before: Collection[Awaitable[None]]) -> None:
        """Waits until no accepted request of this instance's engine names an adapter of this garbage, whoever's it was,
        nor one whose deletion came before (they may share files)."""
        await asyncio.sleep(self._delay_s)
        with contextlib.suppress(EngineError):
            await self._engine.wait_ready(ENGINE_WAIT_S)
        for digest in [sha for sha, is_record in garbage.items() if is_record]:
            try:
                await self._engine.unload(digest, forget=True, timeout_s=UNLOAD_TIMEOUT_S)
            except EngineCallTimedOut:
                log.warning("the engine still uses a deleted adapter; its files stay")
                return
            except EngineError as error:
                # Without an engine there are no running requests either.
                log.info("a deleted adapter was not unloaded: %s", error)
        await asyncio.gather(*before, return_exceptions=True)
        async with self._catalogue.write() as edits:
            # Again: the same content may have been uploaded in the meantime, and then it is no garbage.
            still = garbage.keys() & (await edits.blobs.unreleased(self.instance)).keys()
            await asyncio.to_thread(self._forget, still)
            await edits.blobs.release(self.instance, still)
        self.wake()

    def _forget(self, names: Collection[str]) -> None:
        for sha in names:
            delete_blocks(self._cache_dir, sha)
            self._blobs.forget(sha)

    def _released(self, garbage: Collection[str]) -> None:
        for sha in garbage:
            task = self._releasing.pop(sha, None)
            if task is not None and task.done() and not task.cancelled() and (error := task.exception()) is not None:
                log.warning("a deleted adapter's files are left for later: %s", error)

    async def _collect(self) -> None:
        """Deletes what all living instances have released. As a writer: whoever wants to store one of these blobs
        claims it before or after this, not in between."""
        async with self._catalogue.write() as edits:
            book = edits.blobs
            names = await book.collectable(await book.alive())
            unneeded = await book.unneeded(names)
            await asyncio.to_thread(self._blobs.discard, unneeded)
            await asyncio.to_thread(self._forget, unneeded)
            await book.forget(names)

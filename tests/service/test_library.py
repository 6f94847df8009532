"""What is stored and what the catalogue knows of it, where a process is told to stop in between."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest

from adapters.blobs import BlobStore
from adapters.peft_config import CONFIG_NAME
from service.engine.client import EngineClient
from service.engine.messages import Limits, Ready
from service.jobs import Workers
from service.library import WEIGHTS, Library
from service.store.catalogue import Catalogue
from service.store.database import sqlite_url
from service.uploads import Spool
from tests.adapters.stored_adapters import make_manifest, store_adapter


class HeldStore(BlobStore):
    """Stores nothing before it may, as one that is far away and slow."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.asked = threading.Event()
        self.may = threading.Event()

    def put(self, path: Path, sha: str, *, move: bool = False) -> None:
        self.asked.set()
        assert self.may.wait(60)
        super().put(path, sha, move=move)


async def test_what_is_stored_stays_claimed_when_its_upload_is_cancelled(tmp_path: Path) -> None:
    """A thread cannot be broken off: what it stores after the claim was given up, nobody would ever delete."""
    manifest = make_manifest()
    store_adapter(BlobStore(tmp_path / "elsewhere"), manifest, tmp_path, 1)
    upload = tmp_path / "upload1"
    engine = EngineClient(f"ipc://{tmp_path}/engine.ipc")
    engine.last_ready = Ready("engine", manifest, Limits(64, 8, 16, 16, 100, 8, 512, 1 << 20), "cpu", {})
    catalogue = await Catalogue.open(sqlite_url(tmp_path / "catalogue.sqlite3"))
    blobs, workers, spool = HeldStore(tmp_path / "blobs"), Workers(1), Spool(tmp_path / "uploads", 1 << 20)
    library = Library(catalogue, blobs, spool, workers, engine, "base", tmp_path / "cache")

    async def claimed() -> set[str]:
        async with catalogue.blob_book() as book:
            return await book.claimed()

    try:
        work = asyncio.create_task(library.publish("law", upload / CONFIG_NAME, {WEIGHTS: upload / WEIGHTS}, None))
        assert await asyncio.to_thread(blobs.asked.wait, 60)
        for _ in range(2):
            work.cancel()
            ended, _ = await asyncio.wait([work], timeout=0.5)
            assert not ended
        assert len(await claimed()) == 3
        blobs.may.set()
        with pytest.raises(asyncio.CancelledError):
            await work
        async with asyncio.timeout(30):
            while await claimed():  # noqa: ASYNC110 - rows tell nobody that they are gone
                await asyncio.sleep(0.05)
        assert list(blobs) == []
    finally:
        blobs.may.set()
        await library.close()
        await workers.close()
        spool.close()
        await catalogue.close()

"""What a service is called on its database, and what its supervisor asks about others there, before anything of its own
service has started."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import sqlalchemy as sa

from service.store.blob_book import LEASE_S, BlobBook
from service.store.database import Database
from service.store.tables import instances


def instance_id(folder: Path) -> str:
    """Of the service on this data folder: the same in all its processes, another one on every other machine or folder,
    and after a restart of the machine."""
    status = folder.stat()
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        boot = os.uname().nodename
    return hashlib.sha256(f"{boot}:{status.st_dev}:{status.st_ino}".encode()).hexdigest()[:32]


async def apart(url: str, instance: str, files_at: str) -> bool:
    """Whether some living service has its files where this one would not find them, or the other way round. Changes
    nothing. Raises CatalogueUnavailable."""
    database = Database.unmigrated(url)
    try:
        async with database.snapshot() as connection:
            columns = await connection.run_sync(_columns)
            if "files_at" in columns:
                return bool(await BlobBook(connection).apart(instance, files_at))
            # Of a version that does not say where its files lie: local ones are in nobody else's reach in any case.
            if not columns or files_at:
                return False
            living = instances.c.seen_at >= BlobBook(connection).now - LEASE_S
            found = await connection.execute(sa.select(instances.c.id).where(instances.c.id != instance, living))
            return found.first() is not None
    finally:
        await database.close()


async def leave(url: str, instance: str) -> None:
    """The service has ended. Raises CatalogueUnavailable."""
    database = Database.unmigrated(url)
    try:
        async with database.write() as connection:
            if "files_at" in await connection.run_sync(_columns):
                await BlobBook(connection).gone(instance)
    finally:
        await database.close()


def _columns(connection: sa.Connection) -> set[str]:
    """Of the table of instances; empty if there is none."""
    inspector = sa.inspect(connection)
    return (
        {column["name"] for column in inspector.get_columns("instances")} if inspector.has_table("instances") else set()
    )

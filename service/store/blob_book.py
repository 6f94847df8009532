"""The book of blobs: what is being stored, what is no longer needed, who has let go of it.

Blobs lie outside the database, perhaps where several services store theirs, so no transaction covers both. Two rules
keep them together:

- Before the first byte of an upload is stored, its blobs are claimed here; the commit of the version takes the claims
  away. What a writer that died has stored is therefore known by name, and no store is ever searched for it.
- What a deletion leaves unused is garbage. Every instance releases it once none of its engine's requests needs it; what
  all living instances have released, and nobody has claimed or referenced again, may be deleted, under the writers'
  lock, so that no claim can come between the question and the deletion.

An instance is one data folder with its engine and processes. It lives while it is heard of within LEASE_S, by the
database's clock; a SQLite database belongs to one instance alone, and no clock is asked.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from service.store.errors import ClaimLost
from service.store.tables import blob_claims, blob_garbage, blob_releases, files, instances, merge_files, versions

LEASE_S = 60
"""An instance that has not been heard of for so long is gone: what it claimed is void, its release is not waited for.
It says that it lives every few seconds (service/janitor.py)."""
BATCH = 500
"""Names in one statement: databases limit its parameters."""


class BlobBook:
    """One connection's view; changes need Database.write."""

    def __init__(self, connection: AsyncConnection) -> None:
        self._run = connection.execute
        self._scalars = connection.scalars
        self._shared = connection.dialect.name != "sqlite"

    # ------------------------------------------------------------ uploads

    async def claim(self, upload: str, names: Mapping[str, bool], instance: str, process: str) -> None:
        """Enters `names` (blob -> whether it is a record) as being stored by this upload."""
        await self.forget(names)  # wanted again: those who released it may have to do so again one day
        rows = [
            {"upload": upload, "sha256": sha, "is_record": is_record, "instance": instance, "process": process}
            for sha, is_record in names.items()
        ]
        await self._run(sa.insert(blob_claims), rows)

    async def complete(self, upload: str, count: int) -> None:
        """The rows that name the blobs are in this transaction. Raises ClaimLost if this instance was taken for gone
        meanwhile: the blobs may be deleted by now."""
        result = await self._run(sa.delete(blob_claims).where(blob_claims.c.upload == upload))
        if result.rowcount != count:
            raise ClaimLost

    async def abandon(self, uploads: Collection[str]) -> None:
        """The uploads will not be completed: what they may have stored is garbage."""
        for part in _parts(uploads):
            which = blob_claims.c.upload.in_(part)
            rows = (await self._run(sa.select(blob_claims.c.sha256, blob_claims.c.is_record).where(which))).all()
            await self._run(sa.delete(blob_claims).where(which))
            await self.discard({row.sha256: row.is_record for row in rows})

    async def claims(self) -> set[tuple[str, str, str]]:
        """(upload, instance, process) of all uploads that are storing."""
        columns = blob_claims.c.upload, blob_claims.c.instance, blob_claims.c.process
        return {(row.upload, row.instance, row.process) for row in await self._run(sa.select(*columns).distinct())}

    async def claimed(self) -> set[str]:
        """Every blob that is being stored."""
        return set(await self._scalars(sa.select(blob_claims.c.sha256)))

    # ------------------------------------------------------------ garbage

    async def discard(self, names: Mapping[str, bool]) -> None:
        """Enters those of `names` (blob -> whether it is a record) that nobody needs as garbage."""
        unused = await self.unneeded(names)
        known: set[str] = set()
        for part in _parts(unused):
            known |= set(await self._scalars(sa.select(blob_garbage.c.sha256).where(blob_garbage.c.sha256.in_(part))))
        if fresh := unused - known:
            rows = [{"sha256": sha, "is_record": names[sha]} for sha in sorted(fresh)]
            await self._run(sa.insert(blob_garbage), rows)

    async def unneeded(self, blobs: Iterable[str], but: str = "") -> set[str]:
        """Those of the blobs that no version needs (as its record or as a file), no checkpoint, and no upload, but
        `but`, claims."""
        names = set(blobs)
        for part in _parts(names):
            needed = (
                sa.select(versions.c.digest).where(versions.c.digest.in_(part)),
                sa.select(files.c.sha256).where(files.c.sha256.in_(part)),
                sa.select(merge_files.c.sha256).where(merge_files.c.sha256.in_(part)),
                sa.select(blob_claims.c.sha256).where(blob_claims.c.sha256.in_(part), blob_claims.c.upload != but),
            )
            for statement in needed:
                names -= set(await self._scalars(statement))
        return names

    async def unreleased(self, instance: str) -> dict[str, bool]:
        """Garbage that this instance has not released: blob -> whether it is a record."""
        mine = sa.select(blob_releases.c.sha256).where(blob_releases.c.instance == instance)
        rows = await self._run(
            sa.select(blob_garbage.c.sha256, blob_garbage.c.is_record).where(blob_garbage.c.sha256.not_in(mine))
        )
        return {row.sha256: row.is_record for row in rows}

    async def release(self, instance: str, names: Collection[str]) -> None:
        """No request of this instance needs these any more; they must be among what `unreleased` says now."""
        if names:
            await self._run(sa.insert(blob_releases), [{"sha256": sha, "instance": instance} for sha in sorted(names)])

    async def collectable(self, alive: Collection[str]) -> set[str]:
        """Garbage that every one of the instances `alive` has released."""
        waiting = (
            sa.select(blob_garbage.c.sha256)
            .join_from(blob_garbage, instances, instances.c.id.in_(alive))
            .outerjoin(
                blob_releases,
                sa.and_(blob_releases.c.sha256 == blob_garbage.c.sha256, blob_releases.c.instance == instances.c.id),
            )
            .where(blob_releases.c.sha256.is_(None))
        )
        return set(await self._scalars(sa.select(blob_garbage.c.sha256).where(blob_garbage.c.sha256.not_in(waiting))))

    async def garbage(self) -> set[str]:
        return set(await self._scalars(sa.select(blob_garbage.c.sha256)))

    async def forget(self, names: Iterable[str]) -> None:
        """These are no garbage (any more)."""
        for part in _parts(names):
            await self._run(sa.delete(blob_releases).where(blob_releases.c.sha256.in_(part)))
            await self._run(sa.delete(blob_garbage).where(blob_garbage.c.sha256.in_(part)))

    # ------------------------------------------------------------ instances

    async def here(self, instance: str, files_at: str = "") -> None:
        """This instance lives; `files_at`: where others find its files (Blobs.shared_at), empty: nowhere."""
        seen: dict[str, Any] = {"seen_at": self.now, "files_at": files_at}
        if (await self._run(sa.update(instances).where(instances.c.id == instance).values(seen))).rowcount == 0:
            await self._run(sa.insert(instances).values(id=instance, **seen))
        if not self._shared:
            await self._run(sa.delete(instances).where(instances.c.id != instance))

    async def alive(self) -> set[str]:
        """Instances that were heard of within LEASE_S."""
        statement = sa.select(instances.c.id)
        if self._shared:
            statement = statement.where(instances.c.seen_at >= self.now - LEASE_S)
        return set(await self._scalars(statement))

    async def gone(self, instance: str) -> None:
        """This instance has ended, and nobody has to wait until it counts as such."""
        await self._run(sa.delete(instances).where(instances.c.id == instance))

    async def apart(self, instance: str, files_at: str) -> list[str]:
        """Living instances whose files this one would not find, or that would not find its own."""
        where = sa.or_(
            instances.c.files_at != files_at, instances.c.files_at == "", sa.true() if not files_at else sa.false()
        )
        statement = sa.select(instances.c.id).where(instances.c.id != instance, where)
        return list(await self._scalars(statement.where(instances.c.seen_at >= self.now - LEASE_S)))

    @property
    def now(self) -> sa.ColumnElement[int]:
        """Seconds since 1970 by the database's clock; nothing depends on it where there is one instance."""
        if not self._shared:
            return sa.cast(sa.func.strftime("%s", "now"), sa.BigInteger)
        return sa.cast(sa.func.extract("epoch", sa.func.clock_timestamp()), sa.BigInteger)


def _parts(names: Iterable[str]) -> Iterable[list[str]]:
    ordered = sorted(names)
    return (ordered[start : start + BATCH] for start in range(0, len(ordered), BATCH))

"""Changes to the catalogue, inside one write transaction (Catalogue.write). Exceptions roll the transaction back."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from service.store import quotas
from service.store.blob_book import BlobBook
from service.store.errors import AdapterNotFound, AliasNotFound, PreconditionFailed, VersionInUse, VersionNotFound
from service.store.merges import MergeTable, require_no_merge
from service.store.records import File, NewVersion, Removed, etag_of
from service.store.tables import (
    DEFAULT_TENANT,
    adapter_grants,
    adapters,
    aliases,
    counters,
    files,
    labels,
    merge_files,
    tenants,
    versions,
)
from service.store.visibility import PRIVATE, PUBLIC, SHARED

Condition = Callable[[str | None], bool]
"""Told the adapter's ETag (None: there is no such adapter); False refuses the change."""


def always(_etag: str | None) -> bool:
    """The condition of a request without If-Match and If-None-Match."""
    return True


class Edits:
    """Every method sees the effect of those before it."""

    def __init__(self, connection: AsyncConnection) -> None:
        self._connection = connection
        self.merges = MergeTable(connection)
        self.blobs = BlobBook(connection)

    async def _adapter(self, name: str, tenant: str) -> sa.Row[Any] | None:
        statement = sa.select(adapters).where(adapters.c.tenant == tenant, adapters.c.name == name)
        return (await self._connection.execute(statement)).one_or_none()

    async def _existing(self, name: str, tenant: str, condition: Condition = always) -> sa.Row[Any]:
        row = await self._adapter(name, tenant)
        if row is None:
            raise AdapterNotFound(name)
        _require(condition, row, name)
        return row

    async def find_content(
        self, name: str, digest: str, tenant: str = DEFAULT_TENANT, condition: Condition = always
    ) -> tuple[bool, int | None]:
        """(whether the adapter exists, the number of its version with this content or None)."""
        row = await self._adapter(name, tenant)
        _require(condition, row, name)
        if row is None:
            return False, None
        statement = sa.select(versions.c.number).where(versions.c.adapter_id == row.id, versions.c.digest == digest)
        return True, await self._connection.scalar(statement)

    async def require_room(self, name: str, new: NewVersion, tenant: str = DEFAULT_TENANT) -> None:
        """Raises QuotaReached if the tenant may not keep this as one more version of the adapter."""
        await quotas.require_room(self._connection, tenant, name, new)

    async def publish(self, name: str, new: NewVersion, *, default: bool, tenant: str = DEFAULT_TENANT) -> int:
        """Adds a version, and the adapter with it if there is none; returns its number.

        The first version of an adapter is its default whatever `default` says. The blobs must be in the store already.
        """
        now = int(time.time())
        number = await self._next_number(name, tenant)
        row = await self._adapter(name, tenant)
        if row is None:
            result = await self._connection.execute(
                sa.insert(adapters)
                .values(
                    tenant=tenant,
                    name=name,
                    description="",
                    pinned=False,
                    default_version=number,
                    revision=0,
                    created_at=now,
                    updated_at=now,
                )
                .returning(adapters.c.id)
            )
            adapter_id: int = result.scalar_one()
        else:
            adapter_id = row.id
        result = await self._connection.execute(
            sa.insert(versions)
            .values(
                adapter_id=adapter_id,
                number=number,
                digest=new.digest,
                fingerprint=new.fingerprint,
                bytes=new.bytes,
                max_rank=new.max_rank,
                spec=new.spec,
                created_at=now,
            )
            .returning(versions.c.id)
        )
        version_id: int = result.scalar_one()
        await self._connection.execute(
            sa.insert(files),
            [
                {"version_id": version_id, "filename": f.filename, "sha256": f.sha256, "bytes": f.bytes}
                for f in new.files
            ],
        )
        await self._touch(adapter_id, **({"default_version": number} if default else {}))
        return number

    async def revalidate(self, name: str, number: int, new: NewVersion, tenant: str = DEFAULT_TENANT) -> None:
        """Notes that this content, unchanged, has been found to fit the base of `new` (the base was replaced)."""
        row = await self._existing(name, tenant)
        version = await self._require_version(row, number)
        if version.fingerprint != new.fingerprint:
            await self._connection.execute(
                sa.update(versions)
                .where(versions.c.id == version.id)
                .values(fingerprint=new.fingerprint, max_rank=new.max_rank, spec=new.spec)
            )
            await self._touch(row.id)

    async def _next_number(self, name: str, tenant: str) -> int:
        here = sa.and_(counters.c.tenant == tenant, counters.c.name == name)
        last = await self._connection.scalar(
            sa.update(counters).where(here).values(last=counters.c.last + 1).returning(counters.c.last)
        )
        if last is not None:
            return int(last)
        await self._connection.execute(sa.insert(counters).values(tenant=tenant, name=name, last=1))
        return 1

    async def _touch(self, adapter_id: int, **values: Any) -> None:
        now = int(time.time())
        later = sa.case((adapters.c.updated_at > now, adapters.c.updated_at), else_=now)  # the clock may go backwards
        await self._connection.execute(
            sa.update(adapters)
            .where(adapters.c.id == adapter_id)
            .values(revision=adapters.c.revision + 1, updated_at=later, **values)
        )

    async def change(
        self,
        name: str,
        *,
        description: str | None = None,
        new_labels: dict[str, str] | None = None,
        default_version: int | None = None,
        pinned: bool | None = None,
        visibility: str | Iterable[str] | None = None,
        tenant: str = DEFAULT_TENANT,
        condition: Condition = always,
    ) -> None:
        """Sets what is not None; `new_labels` replaces all labels. `visibility`: PRIVATE, PUBLIC, or the tenants that
        it is shared with. Raises AdapterNotFound, VersionNotFound."""
        row = await self._existing(name, tenant, condition)
        values: dict[str, Any] = {"description": description, "default_version": default_version, "pinned": pinned}
        values = {key: value for key, value in values.items() if value is not None}
        if default_version is not None:
            await self._require_version(row, default_version)
        if new_labels is not None:
            await self._connection.execute(sa.delete(labels).where(labels.c.adapter_id == row.id))
            if new_labels:
                await self._connection.execute(
                    sa.insert(labels),
                    [{"adapter_id": row.id, "key": key, "value": value} for key, value in new_labels.items()],
                )
        if visibility is not None:
            values["visibility"] = await self._share(row.id, visibility)
        if values or new_labels is not None:
            await self._touch(row.id, **values)

    async def _share(self, adapter_id: int, visibility: str | Iterable[str]) -> str:
        """Enters who may see it; the value of the adapter's column."""
        await self._connection.execute(sa.delete(adapter_grants).where(adapter_grants.c.adapter_id == adapter_id))
        if isinstance(visibility, str):
            return PUBLIC if visibility == PUBLIC else PRIVATE
        rows = [{"adapter_id": adapter_id, "tenant": tenant} for tenant in sorted(set(visibility))]
        if not rows:
            return PRIVATE
        await self._connection.execute(sa.insert(adapter_grants), rows)
        return SHARED

    async def _require_version(self, adapter: sa.Row[Any], number: int) -> sa.Row[Any]:
        statement = sa.select(versions).where(versions.c.adapter_id == adapter.id, versions.c.number == number)
        row = (await self._connection.execute(statement)).one_or_none()
        if row is None:
            raise VersionNotFound(adapter.name, number)
        return row

    async def set_alias(
        self, name: str, alias: str, number: int, tenant: str = DEFAULT_TENANT, condition: Condition = always
    ) -> bool:
        """Points the alias to a version; True when it is new. Raises AdapterNotFound, VersionNotFound."""
        row = await self._existing(name, tenant, condition)
        await self._require_version(row, number)
        here = sa.and_(aliases.c.adapter_id == row.id, aliases.c.alias == alias)
        changed = await self._connection.execute(sa.update(aliases).where(here).values(version=number))
        if changed.rowcount == 0:
            await self._connection.execute(sa.insert(aliases).values(adapter_id=row.id, alias=alias, version=number))
        await self._touch(row.id)
        return changed.rowcount == 0

    async def remove_alias(
        self, name: str, alias: str, tenant: str = DEFAULT_TENANT, condition: Condition = always
    ) -> None:
        """Raises AdapterNotFound, AliasNotFound."""
        row = await self._existing(name, tenant, condition)
        here = sa.and_(aliases.c.adapter_id == row.id, aliases.c.alias == alias)
        if (await self._connection.execute(sa.delete(aliases).where(here))).rowcount == 0:
            raise AliasNotFound(name, alias)
        await self._touch(row.id)

    async def remove_adapter(self, name: str, tenant: str = DEFAULT_TENANT, condition: Condition = always) -> Removed:
        """Deletes the adapter with all its versions. Raises AdapterNotFound, VersionInUse (by a merge)."""
        row = await self._existing(name, tenant, condition)
        await require_no_merge(self._connection, tenant, name)
        removed = await self._remove_versions(versions.c.adapter_id == row.id, aliases.c.adapter_id == row.id, tenant)
        await self._connection.execute(sa.delete(labels).where(labels.c.adapter_id == row.id))
        await self._connection.execute(sa.delete(adapter_grants).where(adapter_grants.c.adapter_id == row.id))
        await self._connection.execute(sa.delete(adapters).where(adapters.c.id == row.id))
        return replace(removed, adapter_gone=True)

    async def remove_version(
        self, name: str, number: int, tenant: str = DEFAULT_TENANT, condition: Condition = always
    ) -> Removed:
        """Deletes one version; the adapter goes with its last one.

        Raises AdapterNotFound, VersionNotFound, VersionInUse.
        """
        row = await self._existing(name, tenant, condition)
        version = await self._require_version(row, number)
        await require_no_merge(self._connection, tenant, name, number)
        pointing = await self._connection.scalars(
            sa.select(aliases.c.alias)
            .where(aliases.c.adapter_id == row.id, aliases.c.version == number)
            .order_by(aliases.c.alias)
        )
        if used := pointing.all():
            raise VersionInUse(f"Version {number} of adapter {name!r} has aliases: {', '.join(used)}. Move them first.")
        count = await self._connection.scalar(
            sa.select(sa.func.count()).select_from(versions).where(versions.c.adapter_id == row.id)
        )
        if count == 1:
            return await self.remove_adapter(name, tenant)
        if row.default_version == number:
            raise VersionInUse(
                f"Version {number} is the default of adapter {name!r}, which has others. Change the default first."
            )
        removed = await self._remove_versions(versions.c.id == version.id, sa.false(), tenant)
        await self._touch(row.id)
        return removed

    async def _remove_versions(
        self, which: sa.ColumnElement[bool], which_aliases: sa.ColumnElement[bool], tenant: str
    ) -> Removed:
        run = self._connection.execute
        gone = (await run(sa.select(versions.c.number, versions.c.digest).where(which))).all()
        ids = sa.select(versions.c.id).where(which)
        stored = (
            await run(sa.select(files.c.filename, files.c.sha256, files.c.bytes).where(files.c.version_id.in_(ids)))
        ).all()
        await run(sa.delete(aliases).where(which_aliases))
        await run(sa.delete(files).where(files.c.version_id.in_(ids)))
        await run(sa.delete(versions).where(which))
        digests = {row.number: row.digest for row in gone}
        unique = {row.sha256: File(*row) for row in stored}
        names = {**dict.fromkeys(unique, False), **dict.fromkeys(digests.values(), True)}
        free = await self.blobs.unneeded(names)
        await self.blobs.discard({sha: names[sha] for sha in free})
        # Told by the tenant's own files alone: or it could find out what another one has uploaded.
        kept = set(await self._connection.scalars(_files_of(tenant).where(files.c.sha256.in_(unique))))
        return Removed(
            digests=digests,
            unused=frozenset(free),
            freed_files=sum(sha not in kept for sha in unique),
            freed_bytes=sum(file.bytes for sha, file in unique.items() if sha not in kept),
            owner=await self._connection.scalar(sa.select(tenants.c.number).where(tenants.c.id == tenant)),
        )

    async def referenced(self) -> set[str]:
        """Every blob that some version or checkpoint needs."""
        records = await self._connection.scalars(sa.select(versions.c.digest))
        contents = await self._connection.scalars(sa.select(files.c.sha256))
        checkpoints = await self._connection.scalars(sa.select(merge_files.c.sha256))
        return set(records) | set(contents) | set(checkpoints)


def _files_of(tenant: str) -> sa.Select[tuple[str]]:
    return (
        sa.select(files.c.sha256)
        .join_from(files, versions, files.c.version_id == versions.c.id)
        .join(adapters, versions.c.adapter_id == adapters.c.id)
        .where(adapters.c.tenant == tenant)
    )


def _require(condition: Condition, row: sa.Row[Any] | None, name: str) -> None:
    if not condition(None if row is None else etag_of(row.id, row.revision)):
        raise PreconditionFailed(f"Adapter {name!r} is not in the state that the request's condition asks for.")

"""Reads of the catalogue: which adapters there are, and what a model string means.

Nothing is cached: every call sees the newest committed rows, so several API processes agree at once.
Writes are in service/store/edits.py.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from adapters.keys import account_of, digest_of
from service.store import quotas
from service.store.blob_book import BlobBook
from service.store.database import Database
from service.store.edits import Edits
from service.store.errors import AdapterNotFound, TenantNotFound, VersionNotFound
from service.store.merges import MergeTable
from service.store.names import Selector, parse_selector, split_model, split_owner, valid_name
from service.store.records import Adapter, File, Page, Resolved, Version, engine_key
from service.store.tables import DEFAULT_TENANT, adapter_grants, adapters, aliases, files, labels, tenants, versions
from service.store.usage import Owner
from service.store.visibility import SHARED, VISIBLE, visible_to

_RESOLVED = (
    adapters.c.name,
    versions.c.number,
    versions.c.digest,
    versions.c.fingerprint,
    versions.c.max_rank,
    versions.c.bytes,
    versions.c.created_at,
    tenants.c.number.label("owner"),
    tenants.c.limits,
)
_owner = adapters.c.tenant == tenants.c.id
_named = sa.and_(adapters.c.tenant == sa.bindparam("tenant"), adapters.c.name == sa.bindparam("name"))
_of_adapter = versions.c.adapter_id == adapters.c.id

# On the path of every request: one statement over unique indices, compiled once.
_RESOLVE_DEFAULT = (
    sa.select(*_RESOLVED)
    .join_from(adapters, versions, sa.and_(_of_adapter, versions.c.number == adapters.c.default_version))
    .outerjoin(tenants, _owner)
    .where(_named)
)
_RESOLVE_NUMBER = (
    sa.select(*_RESOLVED)
    .join_from(adapters, versions, sa.and_(_of_adapter, versions.c.number == sa.bindparam("selector")))
    .outerjoin(tenants, _owner)
    .where(_named)
)
_RESOLVE_ALIAS = (
    sa.select(*_RESOLVED)
    .join_from(
        adapters,
        aliases,
        sa.and_(aliases.c.adapter_id == adapters.c.id, aliases.c.alias == sa.bindparam("selector")),
    )
    .join(versions, sa.and_(_of_adapter, versions.c.number == aliases.c.version))
    .outerjoin(tenants, _owner)
    .where(_named)
)
_EXISTS = sa.select(adapters.c.id).where(_named)
_OWN = (_RESOLVE_DEFAULT, _RESOLVE_NUMBER, _RESOLVE_ALIAS, _EXISTS)
_OTHERS = tuple(statement.where(VISIBLE) for statement in _OWN)
"""The same for somebody else's adapters."""

_ADAPTER = (
    sa.select(
        adapters,
        *(column.label(f"v_{column.name}") for column in versions.c),
        tenants.c.number.label("owner"),
    )
    .join_from(adapters, versions, sa.and_(_of_adapter, versions.c.number == adapters.c.default_version))
    .outerjoin(tenants, _owner)
)


MAX_NUMBER = 2**31 - 1


class Catalogue:
    """The adapters of every tenant. Open one per process; safe to use from many tasks at once."""

    def __init__(self, database: Database, *, with_tenants: bool = False) -> None:
        """`with_tenants`: adapters have owners; without, everything is the only user's."""
        self._database = database
        self.with_tenants = with_tenants

    @classmethod
    async def open(cls, url: str, *, with_tenants: bool = False) -> Catalogue:
        """Connects to `url` (service/store/database.py says which forms it may have) and migrates the schema."""
        return cls(await Database.open(url), with_tenants=with_tenants)

    async def close(self) -> None:
        await self._database.close()

    @property
    def shared(self) -> bool:
        """Whether other services may use the same database: any but SQLite."""
        return not self._database.is_sqlite

    @asynccontextmanager
    async def blob_book(self) -> AsyncIterator[BlobBook]:
        """The book of blobs, to read; each of its statements sees the newest committed rows."""
        async with self._database.read() as connection:
            yield BlobBook(connection)

    @asynccontextmanager
    async def merges(self) -> AsyncIterator[MergeTable]:
        """The jobs of /v1/merges, to read; all reads see the same state."""
        async with self._database.snapshot() as connection:
            yield MergeTable(connection)

    @asynccontextmanager
    async def write(self, owner: Owner | None = None) -> AsyncIterator[Edits]:
        """Changes that are committed together when the block ends; an exception rolls all of them back. owner: who must
        be there still, as the request may have begun before a tenant of that name was deleted, and another was given
        the name. Raises TenantNotFound."""
        async with self._database.write() as connection:
            if owner is not None:
                here = sa.and_(tenants.c.number == owner.number, tenants.c.id == owner.name)
                if await connection.scalar(sa.select(tenants.c.number).where(here)) is None:
                    raise TenantNotFound(owner.name)
            yield Edits(connection)

    @property
    def database(self) -> Database:
        return self._database

    async def resolve(self, model: str, tenant: str = DEFAULT_TENANT, viewer: str | None = "") -> Resolved:
        """What `adapter`, `adapter@3`, `adapter@alias` or `owner/adapter...` means now to `viewer` (empty: to `tenant`;
        None: to one who sees everything); a plain name is `tenant`'s. Raises AdapterNotFound, VersionNotFound."""
        viewer = tenant if viewer == "" else viewer
        given, text = split_model(model)
        tenant, name = split_owner(given, tenant)
        if not valid_name(name) or not valid_name(tenant):
            raise AdapterNotFound(given)
        try:
            selector = None if text is None else parse_selector(text)
        except ValueError:
            selector = ""  # matches no alias; which of the two errors it is, the database knows
        try:
            return await self.find_version(name, selector, tenant, viewer)
        except AdapterNotFound:
            raise AdapterNotFound(given) from None
        except VersionNotFound:
            raise VersionNotFound(given, selector or text or "") from None

    async def find_version(
        self, name: str, selector: Selector = None, tenant: str = DEFAULT_TENANT, viewer: str | None = None
    ) -> Resolved:
        """The version that a number or an alias means; None: the default one. Raises as `resolve` does."""
        values: dict[str, Any] = {"tenant": tenant, "name": name}
        if viewer is None or viewer == tenant:
            by_default, by_number, by_alias, exists = _OWN
        else:
            by_default, by_number, by_alias, exists = _OTHERS
            values["viewer"] = viewer
        if selector is None:
            statement = by_default
        else:
            statement = by_number if isinstance(selector, int) else by_alias
            # PostgreSQL refuses a number that no column could hold, rather than not to find it.
            values["selector"] = -1 if isinstance(selector, int) and selector > MAX_NUMBER else selector
        row = await self._database.ask(statement, values)
        if row is not None:
            return self._resolved(tenant, row)
        if selector is None or await self._database.ask(exists, values) is None:
            raise AdapterNotFound(name)
        raise VersionNotFound(name, selector)

    def _resolved(self, tenant: str, row: Sequence[Any]) -> Resolved:
        *values, owner, limits = row
        found = Resolved(tenant, *values)
        if not self.with_tenants:
            return found
        return replace(found, owner=owner, resident_limit=(limits or {}).get("resident_bytes"))

    async def get_adapter(self, name: str, tenant: str = DEFAULT_TENANT, viewer: str | None = None) -> Adapter:
        """Raises AdapterNotFound."""
        async with self._database.snapshot() as connection:
            here = sa.and_(adapters.c.tenant == tenant, adapters.c.name == name)
            statement = _ADAPTER.where(here, visible_to(viewer))
            found = await _assemble(connection, (await connection.execute(statement)).all(), self.with_tenants)
        if not found:
            raise AdapterNotFound(name)
        return found[0]

    async def list_adapters(
        self,
        limit: int = 20,
        after: str | None = None,
        *,
        label: str | None = None,
        fingerprints: Sequence[str] | None = None,
        other_base: bool = False,
        tenant: str = DEFAULT_TENANT,
        others: bool = False,
        viewer: str | None = None,
        owner: str | None = None,
    ) -> Page[Adapter]:
        """Adapters by name, those behind the name `after`. With `others`, all that `viewer` may see (None: everything):
        `tenant`'s first, then others' by their owners, for which `after` is `owner/name`; or those of `owner` alone.

        `label`: `key` or `key=value`. `fingerprints`: only adapters whose default version was made for the base known
        by them, or, with `other_base`, for any other.
        """
        statement = _ADAPTER.limit(limit + 1)
        if not others:
            statement = statement.where(adapters.c.tenant == tenant).order_by(adapters.c.name)
            if after is not None:
                statement = statement.where(adapters.c.name > after)
        else:
            foreign = adapters.c.tenant != tenant
            statement = statement.where(visible_to(viewer)).order_by(foreign, adapters.c.tenant, adapters.c.name)
            if after is not None:
                last_owner, last = split_owner(after, tenant)
                behind = sa.and_(adapters.c.tenant == last_owner, adapters.c.name > last)
                beyond = foreign if last_owner == tenant else sa.and_(foreign, adapters.c.tenant > last_owner)
                statement = statement.where(sa.or_(behind, beyond))
            if owner is not None:
                statement = statement.where(adapters.c.tenant == owner)
        if label is not None:
            key, equals, value = label.partition("=")
            wanted = sa.select(labels.c.adapter_id).where(labels.c.key == key)
            statement = statement.where(adapters.c.id.in_(wanted.where(labels.c.value == value) if equals else wanted))
        if fingerprints is not None:
            same = versions.c.fingerprint.in_(fingerprints)
            statement = statement.where(sa.not_(same) if other_base else same)
        async with self._database.snapshot() as connection:
            rows = (await connection.execute(statement)).all()
            return Page(await _assemble(connection, rows[:limit], self.with_tenants), len(rows) > limit)

    async def list_versions(
        self,
        name: str,
        limit: int = 20,
        after: int = 0,
        tenant: str = DEFAULT_TENANT,
        viewer: str | None = None,
    ) -> Page[Version]:
        """Versions with their files, by number, those behind `after`. Raises AdapterNotFound."""
        async with self._database.snapshot() as connection:
            here = sa.and_(adapters.c.tenant == tenant, adapters.c.name == name)
            found = sa.select(adapters.c.id, tenants.c.number).outerjoin_from(adapters, tenants, _owner)
            adapter = (await connection.execute(found.where(here, visible_to(viewer)))).one_or_none()
            if adapter is None:
                raise AdapterNotFound(name)
            adapter_id, owner = adapter
            statement = (
                sa.select(versions)
                .where(versions.c.adapter_id == adapter_id, versions.c.number > after)
                .order_by(versions.c.number)
                .limit(limit + 1)
            )
            rows = (await connection.execute(statement)).all()
            return Page(
                await _with_files(connection, adapter_id, rows[:limit], owner if self.with_tenants else None),
                len(rows) > limit,
            )

    async def get_version(
        self, name: str, selector: Selector, tenant: str = DEFAULT_TENANT, viewer: str | None = None
    ) -> Version:
        """One version with its files. Raises AdapterNotFound, VersionNotFound."""
        found = await self.find_version(name, selector, tenant, viewer)
        page = await self.list_versions(name, 1, found.version - 1, tenant, viewer)
        if not page.items or page.items[0].number != found.version:
            raise VersionNotFound(name, found.version)  # deleted between the two reads
        return page.items[0]

    async def totals(self, tenant: str) -> tuple[int, int]:
        """(adapters of the tenant, bytes of all their versions and of its checkpoints)."""
        mine = sa.select(sa.func.count()).select_from(adapters).where(adapters.c.tenant == tenant)
        async with self._database.snapshot() as connection:
            return int(await connection.scalar(mine) or 0), await quotas.stored_bytes(connection, tenant)

    async def upload_room(self, tenant: str, name: str | None) -> quotas.Room:
        """What an upload of the tenant's may have (service/store/quotas.py)."""
        async with self._database.read() as connection:
            return await quotas.upload_room(connection, tenant, name)

    async def owners(self, keys: Iterable[str]) -> dict[str, tuple[Owner, str | None]]:
        """(owner, name) of the adapter with each key; of several of one tenant with the same content, the oldest. The
        name is None for one that is gone whose tenant is still there; those of which nothing is there are left out."""
        wanted = set(keys)
        content = (
            sa.select(versions.c.digest, tenants.c.number, adapters.c.tenant, adapters.c.name)
            .join_from(versions, adapters, _of_adapter)
            .outerjoin(tenants, _owner)
            .where(versions.c.digest.in_({digest_of(key) for key in wanted}))
            .order_by(adapters.c.id.desc())
        )
        numbers = {int(account) for key in wanted if (account := account_of(key))}
        owner = sa.select(tenants.c.number, tenants.c.id).where(tenants.c.number.in_(numbers))
        async with self._database.snapshot() as connection:
            found: dict[str, tuple[Owner, str | None]] = {}
            for row in await connection.execute(content):
                key = engine_key(row.digest, row.number if self.with_tenants else None)
                found[key] = (Owner(row.number or 0, row.tenant), row.name)
            known = await connection.execute(owner) if numbers else ()
            names = {str(row.number): Owner(row.number, row.id) for row in known}
        gone = {key: (names[account_of(key)], None) for key in wanted - found.keys() if account_of(key) in names}
        return {**{key: who for key, who in found.items() if key in wanted}, **gone}

    async def adopt(self, fingerprint: str, former: Sequence[str]) -> int:
        """Versions made for a base that was known by `former` are from now on for the same base by its new
        `fingerprint`; how many there were. Nothing is written where there are none."""
        known = versions.c.fingerprint.in_(former)
        async with self._database.read() as connection:
            if not former or await connection.scalar(sa.select(sa.func.count()).where(known)) == 0:
                return 0
        async with self._database.write() as connection:
            return (await connection.execute(sa.update(versions).where(known).values(fingerprint=fingerprint))).rowcount

    async def pinned(self, fingerprints: Sequence[str]) -> list[Resolved]:
        """Default versions of the pinned adapters made for the base known by these fingerprints."""
        statement = (
            sa.select(adapters.c.tenant, *_RESOLVED)
            .join_from(adapters, versions, sa.and_(_of_adapter, versions.c.number == adapters.c.default_version))
            .outerjoin(tenants, _owner)
            .where(adapters.c.pinned, versions.c.fingerprint.in_(fingerprints))
        )
        async with self._database.read() as connection:
            rows = (await connection.execute(statement)).all()
        return [self._resolved(row.tenant, row[1:]) for row in rows]


async def _assemble(connection: AsyncConnection, rows: Sequence[sa.Row[Any]], with_tenants: bool) -> list[Adapter]:
    ids = [row.id for row in rows]
    numbers: dict[int, list[int]] = {i: [] for i in ids}
    pointers: dict[int, dict[str, int]] = {i: {} for i in ids}
    tags: dict[int, dict[str, str]] = {i: {} for i in ids}
    grants: dict[int, list[str]] = {row.id: [] for row in rows if row.visibility == SHARED}
    if ids:
        of = versions.c.adapter_id
        for row in await connection.execute(sa.select(of, versions.c.number).where(of.in_(ids)).order_by(of, "number")):
            numbers[row.adapter_id].append(row.number)
        for row in await connection.execute(sa.select(aliases).where(aliases.c.adapter_id.in_(ids)).order_by("alias")):
            pointers[row.adapter_id][row.alias] = row.version
        for row in await connection.execute(sa.select(labels).where(labels.c.adapter_id.in_(ids)).order_by("key")):
            tags[row.adapter_id][row.key] = row.value
    if grants:
        of = adapter_grants.c.adapter_id
        for row in await connection.execute(sa.select(adapter_grants).where(of.in_(list(grants))).order_by("tenant")):
            grants[row.adapter_id].append(row.tenant)
    return [
        Adapter(
            id=row.id,
            tenant=row.tenant,
            name=row.name,
            description=row.description,
            pinned=row.pinned,
            default_version=row.default_version,
            revision=row.revision,
            created_at=row.created_at,
            updated_at=row.updated_at,
            versions=tuple(numbers[row.id]),
            aliases=pointers[row.id],
            labels=tags[row.id],
            visibility=row.visibility,
            shared_with=tuple(grants.get(row.id, ())),
            default=Version(
                id=row.v_id,
                number=row.v_number,
                digest=row.v_digest,
                fingerprint=row.v_fingerprint,
                bytes=row.v_bytes,
                max_rank=row.v_max_rank,
                spec=row.v_spec,
                created_at=row.v_created_at,
                aliases=tuple(a for a, number in pointers[row.id].items() if number == row.v_number),
                owner=row.owner if with_tenants else None,
            ),
        )
        for row in rows
    ]


async def _with_files(
    connection: AsyncConnection, adapter_id: int, rows: Sequence[sa.Row[Any]], owner: int | None
) -> list[Version]:
    ids = [row.id for row in rows]
    stored: dict[int, list[File]] = {i: [] for i in ids}
    if ids:
        statement = sa.select(files).where(files.c.version_id.in_(ids)).order_by(files.c.filename)
        for row in await connection.execute(statement):
            stored[row.version_id].append(File(row.filename, row.sha256, row.bytes))
    pointers = (await connection.execute(sa.select(aliases).where(aliases.c.adapter_id == adapter_id))).all()
    return [
        Version(
            id=row.id,
            number=row.number,
            digest=row.digest,
            fingerprint=row.fingerprint,
            bytes=row.bytes,
            max_rank=row.max_rank,
            spec=row.spec,
            created_at=row.created_at,
            files=tuple(stored[row.id]),
            aliases=tuple(sorted(p.alias for p in pointers if p.version == row.number)),
            owner=owner,
        )
        for row in rows
    ]

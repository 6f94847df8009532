"""Tenants and their keys.

A key is stored as a salted hash. A fast one: a key's secret has 160 random bits, which nobody guesses however many
guesses a second he has. bcrypt and its like slow down guesses at what people choose, and would cost each request 50 ms.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa

from service.store.database import Database
from service.store.edits import Edits
from service.store.errors import KeyNotFound, TenantExists, TenantNotFound, TenantReserved
from service.store.records import Page, Removed
from service.store.tables import (
    DEFAULT_TENANT,
    adapter_grants,
    adapters,
    counters,
    tenant_keys,
    tenants,
)

SCOPES = ("infer", "upload", "manage")
RESERVED = frozenset({"admin", "all", "everybody", "loraplex", "none", "null", "private", "public", "shared", "system"})
"""What no tenant may be called: words that mean something else in some place."""

KEY = re.compile(r"lpx_([0-9a-f]{16})_([0-9a-f]{40})")
"""The forms of a key: its id, which is no secret, and its secret."""

_UNKNOWN = ("0" * 32, "0" * 64)  # salt and hash of no key


@dataclass(frozen=True, slots=True)
class Tenant:
    """`limits`: those that are set, by the names of service/limits.py."""

    number: int
    id: str
    weight: float = 1.0
    limits: Mapping[str, int] = field(default_factory=dict)
    disabled: bool = False
    created_at: int = 0


@dataclass(frozen=True, slots=True)
class Key:
    """What may be shown of a key."""

    id: str
    scopes: tuple[str, ...]
    description: str
    created_at: int
    expires_at: int | None
    last_used_at: int | None
    disabled: bool = False


@dataclass(frozen=True, slots=True)
class Credentials:
    """What a request with a key is judged by."""

    tenant: Tenant
    key_id: str
    scopes: frozenset[str]
    expires_at: int | None
    salt: str
    hash: str
    disabled: bool = False

    def matches(self, secret: str) -> bool:
        return hmac.compare_digest(hash_secret(secret, self.salt), self.hash)


def hash_secret(secret: str, salt: str) -> str:
    """BLAKE2b, keyed with the salt: 1 us. Hexadecimal, as everything that is stored."""
    return hashlib.blake2b(secret.encode(), key=bytes.fromhex(salt), digest_size=32).hexdigest()


def matches_none(secret: str) -> bool:
    """False, after as much work as `Credentials.matches` takes."""
    return hmac.compare_digest(hash_secret(secret, _UNKNOWN[0]), _UNKNOWN[1]) and False


_CREDENTIALS = (
    sa.select(
        tenants,
        tenant_keys.c.id.label("key_id"),
        tenant_keys.c.scopes,
        tenant_keys.c.expires_at,
        tenant_keys.c.salt,
        tenant_keys.c.hash,
        tenant_keys.c.disabled.label("key_disabled"),
    )
    .join_from(tenant_keys, tenants, tenant_keys.c.tenant_number == tenants.c.number)
    .where(tenant_keys.c.id == sa.bindparam("key_id"))
)
_TENANT = sa.select(tenants).where(tenants.c.id == sa.bindparam("tenant"))
_KEY_COLUMNS = (
    tenant_keys.c.id,
    tenant_keys.c.scopes,
    tenant_keys.c.description,
    tenant_keys.c.created_at,
    tenant_keys.c.expires_at,
    tenant_keys.c.last_used_at,
    tenant_keys.c.disabled,
)


class Tenants:
    """Reads and changes of the rows; every call is one transaction."""

    def __init__(self, database: Database) -> None:
        self._database = database

    # ------------------------------------------------------------ on the way of requests

    async def credentials(self, key_id: str) -> Credentials | None:
        row = await self._database.ask(_CREDENTIALS, {"key_id": key_id})
        if row is None:
            return None
        scopes = frozenset(row.scopes.split())
        return Credentials(
            _tenant(row), row.key_id, scopes, row.expires_at, row.salt, row.hash, disabled=row.key_disabled
        )

    async def note_use(self, used: Mapping[str, int]) -> None:
        """Enters when keys were last used (seconds since 1970, by id)."""
        statement = (
            sa.update(tenant_keys)
            .where(
                tenant_keys.c.id == sa.bindparam("key_id"),
                sa.or_(tenant_keys.c.last_used_at.is_(None), tenant_keys.c.last_used_at < sa.bindparam("at")),
            )
            .values(last_used_at=sa.bindparam("at"))
        )
        async with self._database.write() as connection:
            for key_id, at in used.items():
                await connection.execute(statement, {"key_id": key_id, "at": at})

    # ------------------------------------------------------------ tenants

    async def get(self, tenant: str) -> Tenant:
        """Raises TenantNotFound."""
        row = await self._database.ask(_TENANT, {"tenant": tenant})
        if row is None:
            raise TenantNotFound(tenant)
        return _tenant(row)

    async def list_tenants(self, limit: int, after: str | None) -> Page[Tenant]:
        statement = sa.select(tenants).order_by(tenants.c.id).limit(limit + 1)
        if after is not None:
            statement = statement.where(tenants.c.id > after)
        async with self._database.read() as connection:
            rows = (await connection.execute(statement)).all()
        return Page([_tenant(row) for row in rows[:limit]], len(rows) > limit)

    async def create(self, tenant: str, weight: float, limits: Mapping[str, int]) -> Tenant:
        """Raises TenantExists."""
        if tenant.lower() in RESERVED:
            raise TenantReserved(tenant)
        async with self._database.write() as connection:
            if (await connection.execute(_TENANT, {"tenant": tenant})).one_or_none() is not None:
                raise TenantExists(tenant)
            values = {"id": tenant, "weight": weight, "limits": dict(limits), "disabled": False}
            statement = sa.insert(tenants).values(**values, created_at=int(time.time())).returning(*tenants.c)
            return _tenant((await connection.execute(statement)).one())

    async def change(
        self,
        tenant: str,
        *,
        weight: float | None = None,
        limits: Mapping[str, int | None] | None = None,
        disabled: bool | None = None,
    ) -> Tenant:
        """Sets what is not None. Of `limits`, those that are None are lifted, those that are not named stay."""
        async with self._database.write() as connection:
            row = (await connection.execute(_TENANT, {"tenant": tenant})).one_or_none()
            if row is None:
                raise TenantNotFound(tenant)
            values: dict[str, Any] = {"weight": weight, "disabled": disabled}
            if limits is not None:
                merged = {**row.limits, **limits}
                values["limits"] = {name: value for name, value in merged.items() if value is not None}
            values = {name: value for name, value in values.items() if value is not None}
            if values:
                await connection.execute(sa.update(tenants).where(tenants.c.number == row.number).values(**values))
            return _tenant((await connection.execute(_TENANT, {"tenant": tenant})).one())

    async def retire(self, tenant: str) -> None:
        """Before `delete`: its keys are refused. Raises TenantNotFound, TenantReserved."""
        if tenant == DEFAULT_TENANT:
            raise TenantReserved(tenant)
        await self.change(tenant, disabled=True)

    async def delete(self, tenant: str) -> tuple[list[Removed], list[str]]:
        """Deletes the tenant with its keys, adapters and merges, and what others had shared with it. Whoever is given
        the same name later begins with nothing. (what its adapters leave behind, ids of its merges). Raises
        TenantNotFound, TenantReserved."""
        if tenant == DEFAULT_TENANT:
            raise TenantReserved(tenant)
        async with self._database.write() as connection:
            row = (await connection.execute(_TENANT, {"tenant": tenant})).one_or_none()
            if row is None:
                raise TenantNotFound(tenant)
            edits = Edits(connection)
            jobs = await edits.merges.remove_all(tenant)
            names = (await connection.scalars(sa.select(adapters.c.name).where(adapters.c.tenant == tenant))).all()
            removed = [await edits.remove_adapter(name, tenant) for name in names]
            await connection.execute(sa.delete(counters).where(counters.c.tenant == tenant))
            await connection.execute(sa.delete(adapter_grants).where(adapter_grants.c.tenant == tenant))
            await connection.execute(sa.delete(tenant_keys).where(tenant_keys.c.tenant_number == row.number))
            await connection.execute(sa.delete(tenants).where(tenants.c.number == row.number))
        return removed, jobs

    # ------------------------------------------------------------ keys

    async def create_key(
        self, tenant: str, scopes: Iterable[str], expires_at: int | None, description: str
    ) -> tuple[Key, str]:
        """(what is kept of it, the key itself: nobody can show it again). Raises TenantNotFound."""
        key_id, secret, salt = secrets.token_hex(8), secrets.token_hex(20), secrets.token_hex(16)
        ordered = tuple(scope for scope in SCOPES if scope in set(scopes))
        now = int(time.time())
        async with self._database.write() as connection:
            row = (await connection.execute(_TENANT, {"tenant": tenant})).one_or_none()
            if row is None:
                raise TenantNotFound(tenant)
            await connection.execute(
                sa.insert(tenant_keys).values(
                    id=key_id,
                    tenant_number=row.number,
                    salt=salt,
                    hash=hash_secret(secret, salt),
                    scopes=" ".join(ordered),
                    description=description,
                    created_at=now,
                    expires_at=expires_at,
                )
            )
        return Key(key_id, ordered, description, now, expires_at, None), f"lpx_{key_id}_{secret}"

    async def list_keys(self, tenant: str, limit: int, after: str | None) -> Page[Key]:
        """Raises TenantNotFound."""
        number = (await self.get(tenant)).number
        statement = sa.select(*_KEY_COLUMNS).where(tenant_keys.c.tenant_number == number)
        statement = statement.order_by(tenant_keys.c.id).limit(limit + 1)
        if after is not None:
            statement = statement.where(tenant_keys.c.id > after)
        async with self._database.read() as connection:
            rows = (await connection.execute(statement)).all()
        return Page([_key(row) for row in rows[:limit]], len(rows) > limit)

    async def get_key(self, tenant: str, key_id: str) -> Key:
        """Raises TenantNotFound, KeyNotFound."""
        number = (await self.get(tenant)).number
        here = sa.and_(tenant_keys.c.tenant_number == number, tenant_keys.c.id == key_id)
        async with self._database.read() as connection:
            row = (await connection.execute(sa.select(*_KEY_COLUMNS).where(here))).one_or_none()
        if row is None:
            raise KeyNotFound(tenant, key_id)
        return _key(row)

    async def change_key(self, tenant: str, key_id: str, values: Mapping[str, Any]) -> Key:
        """Sets some of `disabled`, `expires_at` (None: never), `description`. Raises TenantNotFound, KeyNotFound."""
        async with self._database.write() as connection:
            row = (await connection.execute(_TENANT, {"tenant": tenant})).one_or_none()
            if row is None:
                raise TenantNotFound(tenant)
            here = sa.and_(tenant_keys.c.tenant_number == row.number, tenant_keys.c.id == key_id)
            if values:
                await connection.execute(sa.update(tenant_keys).where(here).values(**values))
            found = (await connection.execute(sa.select(*_KEY_COLUMNS).where(here))).one_or_none()
            if found is None:
                raise KeyNotFound(tenant, key_id)
            return _key(found)

    async def delete_key(self, tenant: str, key_id: str) -> None:
        """Raises TenantNotFound, KeyNotFound."""
        async with self._database.write() as connection:
            row = (await connection.execute(_TENANT, {"tenant": tenant})).one_or_none()
            if row is None:
                raise TenantNotFound(tenant)
            here = sa.and_(tenant_keys.c.tenant_number == row.number, tenant_keys.c.id == key_id)
            if (await connection.execute(sa.delete(tenant_keys).where(here))).rowcount == 0:
                raise KeyNotFound(tenant, key_id)


def _tenant(row: sa.Row[Any]) -> Tenant:
    return Tenant(row.number, row.id, row.weight, row.limits, row.disabled, row.created_at)


def _key(row: Any) -> Key:
    scopes = tuple(row.scopes.split())
    return Key(row.id, scopes, row.description, row.created_at, row.expires_at, row.last_used_at, row.disabled)

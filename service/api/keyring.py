"""Callers, and the keys by which they are known.

A key's row is read again once it is CACHE_S old: so a key that is revoked or disabled, a tenant that is disabled, and
new limits take effect within a second in every process of every instance, in the one that was told at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import time
from dataclasses import dataclass
from typing import Any

from service.api.failure import ApiError
from service.limits import TenantLimits
from service.store.errors import CatalogueError
from service.store.tables import DEFAULT_TENANT, DEFAULT_TENANT_NUMBER
from service.store.tenants import KEY, SCOPES, Credentials, Tenant, Tenants, matches_none
from service.store.usage import Owner

CACHE_S = 1.0
MOST_CACHED = 10_000
USE_NOTED_S = 60.0
"""When a key was last used is entered at most so often."""
MAX_KEY_CHARACTERS = 512
ADMIN = "admin"
"""A rule that only the admin key fulfils; and who the audit log says it was."""
OPERATOR = "operator"
"""Who the audit log says it was on a server without keys: nobody else can reach it, or may do everything."""

UNLIMITED = TenantLimits()


@dataclass(frozen=True, slots=True)
class Caller:
    """Who calls. `namespace`: whose adapters a plain name means, the caller's own unless ?tenant says otherwise."""

    tenant: str
    tenant_id: int
    key_id: str | None
    admin: bool
    scopes: frozenset[str]
    weight: float = 1.0
    limits: TenantLimits = UNLIMITED
    namespace: str = DEFAULT_TENANT
    viewer: str | None = None
    """Whose eyes see what is shown (service/store/visibility.py); None: everything."""

    @property
    def owner(self) -> Owner:
        """Whose what the caller changes is."""
        return Owner(self.tenant_id, self.tenant)

    @property
    def salt(self) -> str:
        """Separates prefix caches: nobody can find out by the time it takes what others have asked."""
        return str(self.tenant_id)

    def says(self, owner: str, name: str) -> str:
        """What an adapter is called by this caller: its name, with its owner if that is somebody else."""
        return name if owner == self.tenant else f"{owner}/{name}"

    @property
    def actor(self) -> str:
        return ADMIN if self.admin else self.key_id or ""


SINGLE_USER = Caller(DEFAULT_TENANT, DEFAULT_TENANT_NUMBER, None, True, frozenset(SCOPES))
"""The only one there is without an admin key."""


class Keyring:
    """Tells callers by their keys."""

    def __init__(self, tenants: Tenants, admin_key: str) -> None:
        self._tenants = tenants
        self._admin = hashlib.sha256(admin_key.encode()).digest()
        self._keys: dict[str, tuple[float, Credentials]] = {}
        self._named: dict[str, tuple[float, Tenant]] = {}
        self._used: dict[str, int] = {}
        self._noted: dict[str, float] = {}
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._note_uses())

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        with contextlib.suppress(CatalogueError):
            await self._tenants.note_use(self._used)

    def forget(self) -> None:
        """Rows have been changed here: they are read again."""
        self._keys.clear()
        self._named.clear()

    async def caller(self, authorization: str | None, tenant: str | None) -> Caller:
        """`tenant`: the ?tenant of the request. Raises ApiError 401, 403; 404 to the admin for an unknown tenant."""
        if authorization is None:
            raise _unauthorized("missing_key", "A key is needed: Authorization: Bearer <key>.")
        scheme, _, key = authorization.partition(" ")
        key = key.strip()
        if scheme.lower() != "bearer" or not key or len(key) > MAX_KEY_CHARACTERS:
            raise _unauthorized("invalid_key", "The Authorization header should be: Bearer <key>.")
        if hmac.compare_digest(hashlib.sha256(key.encode("utf-8", "replace")).digest(), self._admin):
            return await self._administrator(tenant)
        known = await self._credentials(key)
        if known.expires_at is not None and known.expires_at <= time.time():
            raise _unauthorized("key_expired", "The key has expired.")
        if known.disabled:
            raise _unauthorized("key_disabled", "The key is disabled.")
        owner = known.tenant
        if owner.disabled:
            raise ApiError(403, f"Tenant {owner.id!r} is disabled.", code="tenant_disabled")
        self._used[known.key_id] = int(time.time())
        return Caller(
            owner.id,
            owner.number,
            known.key_id,
            False,
            known.scopes,
            owner.weight,
            TenantLimits.of(owner.limits),
            owner.id if tenant is None else tenant,
            owner.id,
        )

    async def _administrator(self, tenant: str | None) -> Caller:
        """As `tenant`, with its limits and its view; without one as the default tenant who sees everything."""
        name = DEFAULT_TENANT if tenant is None else tenant
        fresh = self._named.get(name)
        if fresh is None or time.monotonic() - fresh[0] > CACHE_S:
            read_at = time.monotonic()
            found = await self._tenants.get(name)
            # One that is disabled may be about to be deleted, and the name be given again.
            fresh = (read_at, found) if found.disabled else _keep(self._named, name, found, read_at)
        own = fresh[1]
        limits = TenantLimits.of(own.limits)
        return Caller(own.id, own.number, None, True, frozenset(SCOPES), own.weight, limits, own.id, tenant)

    async def _credentials(self, key: str) -> Credentials:
        invalid = _unauthorized("invalid_key", "The key is not valid.")
        if (form := KEY.fullmatch(key)) is None:
            raise invalid
        key_id, secret = form[1], form[2]
        fresh = self._keys.get(key_id)
        if fresh is None or time.monotonic() - fresh[0] > CACHE_S:
            read_at = time.monotonic()  # before the row is read: it may change while it is under way
            known = await self._tenants.credentials(key_id)
            if known is None:
                self._keys.pop(key_id, None)
                matches_none(secret)
                raise invalid
            fresh = _keep(self._keys, key_id, known, read_at)
        if not fresh[1].matches(secret):
            raise invalid
        return fresh[1]

    async def _note_uses(self) -> None:
        while True:
            await asyncio.sleep(1.0)
            now = time.monotonic()
            due = {key: at for key, at in self._used.items() if now - self._noted.get(key, -1e9) >= USE_NOTED_S}
            if not due:
                continue
            for key in due:
                del self._used[key]
            with contextlib.suppress(CatalogueError):  # the next use is as good
                await self._tenants.note_use(due)
                self._noted |= dict.fromkeys(due, now)


def _keep(cache: dict[str, tuple[float, Any]], key: str, value: Any, at: float | None = None) -> tuple[float, Any]:
    if len(cache) >= MOST_CACHED:
        cache.clear()
    cache[key] = (time.monotonic() if at is None else at, value)
    return cache[key]


def _unauthorized(code: str, message: str) -> ApiError:
    return ApiError(401, message, code=code, headers={"WWW-Authenticate": "Bearer"})

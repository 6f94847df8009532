"""/v1/tenants, their keys, and /v1/audit. All of it needs the admin key, where there is one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, Literal

from service.wire.adapters import PAGE, at
from service.wire.flows import Flow, PageOf, json_of, pages
from service.wire.tenant_records import AuditAction, NewKey, Scope, Tenant, TenantKey

_ROOT = "/v1/tenants"

LIMITS = (
    "requests_per_minute", "tokens_per_minute", "concurrent_requests", "adapters", "stored_bytes", "resident_bytes",
    "max_rank", "max_tokens",
)  # fmt: skip
"""What may be limited; a newer server may know more."""


def create(name: str, *, weight: float | None = None, limits: Mapping[str, int | None] | None = None) -> Flow[Tenant]:
    """A new tenant; its name is its adapters' namespace. `limits`: by the names in LIMITS. Conflict if there is one."""
    body = _given(name=name, weight=weight, limits=None if limits is None else dict(limits))
    return Tenant.read((yield from json_of("POST", _ROOT, json=body, repeatable=False)))


def every() -> PageOf[Tenant]:
    """All tenants by name."""
    return pages(_ROOT, Tenant.read, limit=PAGE)


def get(name: str) -> Flow[Tenant]:
    """One tenant, with what it uses of its limits now."""
    return Tenant.read((yield from json_of("GET", at(name, root=_ROOT))))


def update(
    name: str,
    *,
    weight: float | None = None,
    limits: Mapping[str, int | None] | None = None,
    disabled: bool | None = None,
) -> Flow[Tenant]:
    """Changes what is given. Of `limits`, None lifts one, and those not named stay. The keys of a disabled tenant are
    refused; what it has is kept."""
    body = _given(weight=weight, limits=None if limits is None else dict(limits), disabled=disabled)
    return Tenant.read((yield from json_of("PATCH", at(name, root=_ROOT), json=body)))


def delete(name: str) -> Flow[int]:
    """A tenant with its keys, adapters and merges; how many adapters that were."""
    body = yield from json_of("DELETE", at(name, root=_ROOT))
    return int(body.get("adapters", 0)) if isinstance(body, dict) else 0


def _given(**fields: Any) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


# ---------------------------------------------------------------- keys


def create_key(
    tenant: str, scopes: Sequence[Scope], *, expires_at: datetime | int | None = None, description: str | None = None
) -> Flow[NewKey]:
    """A new key: `.key` of this answer is the only place where it is ever shown. `scopes`: "infer" (ask models),
    "upload" (adapters and merges), "manage" (change and delete them, see the use). `expires_at`: a time with its zone,
    or seconds since 1970."""
    if isinstance(expires_at, datetime):
        expires_at = int(expires_at.timestamp())
    body = _given(scopes=list(scopes), expires_at=expires_at, description=description)
    # Sent twice it would make two.
    return NewKey.read((yield from json_of("POST", at(tenant, "keys", root=_ROOT), json=body, repeatable=False)))


def keys(tenant: str) -> PageOf[TenantKey]:
    """A tenant's keys by id, without the secrets."""
    return pages(at(tenant, "keys", root=_ROOT), TenantKey.read, limit=PAGE)


def get_key(tenant: str, id: str) -> Flow[TenantKey]:
    """One key by its id: the part between the two `_` of a key."""
    return TenantKey.read((yield from json_of("GET", at(tenant, "keys", id, root=_ROOT))))


def update_key(
    tenant: str,
    id: str,
    *,
    disabled: bool | None = None,
    expires_at: datetime | int | Literal["never"] | None = None,
    description: str | None = None,
) -> Flow[TenantKey]:
    """Changes what is given, within a second everywhere. A disabled key is refused until it is enabled again."""
    if isinstance(expires_at, datetime):
        expires_at = int(expires_at.timestamp())
    body = _given(disabled=disabled, expires_at=expires_at, description=description)
    if expires_at == "never":
        body["expires_at"] = None
    return TenantKey.read((yield from json_of("PATCH", at(tenant, "keys", id, root=_ROOT), json=body)))


def delete_key(tenant: str, id: str) -> Flow[None]:
    """Revokes a key; within a second it is refused everywhere."""
    yield from json_of("DELETE", at(tenant, "keys", id, root=_ROOT))


# ---------------------------------------------------------------- audit


def audit(*, tenant: str | None = None) -> PageOf[AuditAction]:
    """What was changed by whom, the newest first; of everybody, or as one tenant."""
    return pages("/v1/audit", AuditAction.read, limit=PAGE, tenant_id=tenant)

"""Tenants, keys, use and the audit log as typed values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from service.wire.records import Record, _all, _as

Scope = Literal["infer", "upload", "manage"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tenant(Record):
    """`weight`: its share of the device against other tenants' while they compete for it. `limits`: None where there is
    none. `used`: what counts against them now; `tenants.get` alone brings it. `number`: no later tenant gets it again,
    whatever its name."""

    name: str
    number: int | None = None
    weight: float = 1.0
    limits: Mapping[str, int | None] = field(default_factory=dict)
    disabled: bool = False
    created: float | None = None
    used: Mapping[str, int] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantKey(Record):
    """What can be shown of a key. Times are seconds since 1970; `last_used_at` is up to a minute old."""

    id: str
    scopes: tuple[Scope, ...] = _as(_all(str))
    description: str = ""
    created: float | None = None
    expires_at: float | None = None
    last_used_at: float | None = None
    disabled: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class NewKey(TenantKey):
    """`key` is the key itself, which no later answer shows; nor does `repr`."""

    key: str = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class UsageRow(Record):
    """Sums over what the rest of the row says: those of `hour` (its start, UTC), `day`, `tenant`, `key` (its id) and
    `adapter` that were grouped by; the others are None. `adapter` is "" for the base model. The admin's rows by tenant
    have its number, and whether it has been deleted: a later one of the same name has rows of its own.

    ttft_ms: mean time to the first token, None without one. loads: how often adapters were brought to the device.
    byte_hours: their bytes there, times hours.
    """

    hour: str | None = None
    day: str | None = None
    tenant: str | None = None
    tenant_number: int | None = None
    tenant_deleted: bool | None = None
    key: str | None = None
    adapter: str | None = None
    requests: int
    prompt_tokens: int
    cached_tokens: int = 0
    completion_tokens: int
    ttft_ms: float | None = None
    loads: int = 0
    byte_hours: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditAction(Record):
    """`actor` ("admin", a key's id, or "operator" on a server without keys) has asked for `action` on `target` of
    `tenant`; `at`: seconds since 1970. `state`: "done", "refused" or "failed" with that HTTP `status`; "begun" where
    there was none (yet)."""

    id: str
    at: float
    actor: str
    tenant: str
    action: str
    target: str
    state: str = "done"
    status: int | None = None
    request_id: str | None = None

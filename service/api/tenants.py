"""/v1/tenants, for the admin key: who may use the server, with which keys, and how much of it. And /v1/audit."""

from __future__ import annotations

import asyncio
import time
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.responses import JSONResponse
from pydantic import Field, StrictBool, StrictFloat, StrictInt, StrictStr

from service.api.adapters import Lib, Limit, _list_json
from service.api.auth import CallerDep, Guards, Route, about, allow
from service.api.failure import ApiError, shown
from service.api.keyring import CACHE_S
from service.api.merges import MergesDep
from service.api.schemas import Strict
from service.limits import LIMITS
from service.store.audit import BEGUN, Action, AuditLog
from service.store.names import NAME_RULE, valid_name
from service.store.tenants import Key, Tenant

router = APIRouter(tags=["tenants"], route_class=Route)

MAX_WEIGHT = 1000.0
FORGOTTEN_S = CACHE_S + 0.25
"""After which every process has read a key's row again."""
_Limit = Annotated[StrictInt | None, Field(ge=0, lt=2**63)]


class LimitsPatch(Strict):
    """Limits of one tenant. One that is not named stays, null lifts it."""

    requests_per_minute: _Limit = None
    """Inference, /tokenize and /detokenize, uploads and merges; 429."""
    tokens_per_minute: _Limit = None
    """Tokens of prompts and answers. What a request may use at most is reserved when it begins, and what it has not
    used is given back when it ends; 429, and 413 for one that alone may use more."""
    concurrent_requests: _Limit = None
    """Answers being computed, a request counts as its prompts times its n, and uploads and merges being sent. 429, and
    413 for a request that alone is more."""
    adapters: _Limit = None
    """413."""
    stored_bytes: _Limit = None
    """Of the files of all versions of all adapters, and of merged checkpoints, also of those that are queued; 413."""
    resident_bytes: _Limit = None
    """Of the tenant's adapters on the device: others leave for those that are called; 413 for what is larger alone."""
    max_rank: _Limit = None
    """Of an adapter; 413."""
    max_tokens: _Limit = None
    """Of one answer; 413 where more is asked for."""

    def given(self) -> dict[str, int | None]:
        return {name: getattr(self, name) for name in LIMITS if name in self.model_fields_set}


class TenantCreate(Strict):
    """POST /v1/tenants."""

    name: StrictStr = Field(max_length=256)
    weight: StrictFloat = Field(1.0, gt=0, le=MAX_WEIGHT)
    """Share of the device against other tenants' while they compete for it."""
    limits: LimitsPatch = LimitsPatch()


class TenantPatch(Strict):
    """PATCH /v1/tenants/{tenant}; what is not given stays."""

    weight: StrictFloat = Field(1.0, gt=0, le=MAX_WEIGHT)
    limits: LimitsPatch = LimitsPatch()
    disabled: StrictBool = False
    """Its keys are refused with 403; what it has is kept, and requests that run end as they would."""


_Expiry = Annotated[StrictInt, Field(ge=1, lt=2**53)] | None


class KeyCreate(Strict):
    """POST /v1/tenants/{tenant}/keys."""

    scopes: list[Literal["infer", "upload", "manage"]] = Field(min_length=1, max_length=3)
    expires_at: _Expiry = None
    """Seconds since 1970."""
    description: StrictStr = Field("", max_length=1024)


class KeyPatch(Strict):
    """PATCH /v1/tenants/{tenant}/keys/{key}; what is not given stays."""

    disabled: StrictBool = False
    """It is refused with 401 until it is enabled again."""
    expires_at: _Expiry = None
    """Seconds since 1970; null: never."""
    description: StrictStr = Field("", max_length=1024)


async def get_guards(request: Request) -> Guards:
    guards: Guards = request.app.state.guards
    return guards


GuardsDep = Annotated[Guards, Depends(get_guards)]


def _tenant_json(tenant: Tenant) -> dict[str, Any]:
    return {
        "id": tenant.id,
        "object": "tenant",
        "name": tenant.id,
        "number": tenant.number,
        "weight": tenant.weight,
        "limits": {name: tenant.limits.get(name) for name in LIMITS},
        "disabled": tenant.disabled,
        "created": tenant.created_at,
    }


def _key_json(key: Key) -> dict[str, Any]:
    return {
        "id": key.id,
        "object": "tenant.key",
        "scopes": list(key.scopes),
        "description": key.description,
        "disabled": key.disabled,
        "created": key.created_at,
        "expires_at": key.expires_at,
        "last_used_at": key.last_used_at,
    }


def _action_json(action: Action) -> dict[str, Any]:
    return {
        "id": str(action.number),
        "object": "audit.action",
        "at": action.at,
        "actor": action.actor,
        "tenant": action.tenant,
        "action": action.action,
        "target": action.target,
        "state": _state(action.status),
        "status": None if action.status == BEGUN else action.status,
        "request_id": action.request_id,
    }


def _state(status: int) -> str:
    if status == BEGUN:
        return "begun"
    return "done" if status < 400 else "refused" if status < 500 else "failed"


@router.post("/v1/tenants", status_code=201)
@allow("admin")
async def create_tenant(request: Request, body: TenantCreate, guards: GuardsDep) -> Response:
    """A new tenant. Its name is its id, and its adapters' namespace."""
    if not valid_name(body.name):
        message = f"A tenant's name is {NAME_RULE} (value {shown(body.name)})."
        raise ApiError(400, message, code="invalid_name", param="name")
    limits = {name: value for name, value in body.limits.given().items() if value is not None}
    await about(request, body.name)
    tenant = await guards.tenants.create(body.name, body.weight, limits)
    guards.keyring.forget()
    return JSONResponse(_tenant_json(tenant), 201, {"Location": f"/v1/tenants/{tenant.id}"})


@router.get("/v1/tenants")
@allow("admin")
async def list_tenants(guards: GuardsDep, limit: Limit = 20, after: str | None = None) -> dict[str, Any]:
    """Tenants by name."""
    page = await guards.tenants.list_tenants(limit, after)
    return _list_json([_tenant_json(tenant) for tenant in page.items], page.has_more)


@router.get("/v1/tenants/{tenant}")
@allow("admin")
async def get_tenant(tenant: str, guards: GuardsDep, library: Lib) -> dict[str, Any]:
    """One tenant, with what it uses of its limits now."""
    found = await guards.tenants.get(tenant)
    count, stored = await library.catalogue.totals(tenant)
    used = {**guards.limiter.used(found.number), "adapters": count, "stored_bytes": stored}
    return {**_tenant_json(found), "used": used}


@router.patch("/v1/tenants/{tenant}")
@allow("admin")
async def change_tenant(tenant: str, body: TenantPatch, guards: GuardsDep) -> dict[str, Any]:
    """Changes weight, limits, disabled. It takes effect within a second, here at once."""
    given = body.model_fields_set
    changed = await guards.tenants.change(
        tenant,
        weight=body.weight if "weight" in given else None,
        limits=body.limits.given() if "limits" in given else None,
        disabled=body.disabled if "disabled" in given else None,
    )
    guards.keyring.forget()
    return _tenant_json(changed)


@router.delete("/v1/tenants/{tenant}")
@allow("admin")
async def delete_tenant(tenant: str, guards: GuardsDep, library: Lib, merges: MergesDep) -> dict[str, Any]:
    """Deletes a tenant with its keys, adapters and merges. Generations that run end as they would; uploads end with
    404. The answer comes when no process takes the keys any more, so that nobody uses them on another tenant who is
    given the name at once. One that is broken off meanwhile leaves the tenant disabled, with all that it has."""
    await guards.tenants.retire(tenant)
    guards.keyring.forget()
    await asyncio.sleep(FORGOTTEN_S)
    removed, jobs = await guards.tenants.delete(tenant)
    guards.keyring.forget()
    for each in removed:
        library.reclaim(each)
    await asyncio.to_thread(merges.remove_files, jobs)
    return {"id": tenant, "object": "tenant", "deleted": True, "adapters": len(removed)}


@router.post("/v1/tenants/{tenant}/keys", status_code=201)
@allow("admin")
async def create_key(request: Request, tenant: str, body: KeyCreate, guards: GuardsDep) -> Response:
    """A new key. This answer is the only one that shows it. Others stay valid, so that keys can be exchanged while
    requests come."""
    _require_future(body.expires_at)
    key, text = await guards.tenants.create_key(tenant, body.scopes, body.expires_at, body.description)
    request.scope["state"]["target"] = f"{tenant} {key.id}"
    location = f"/v1/tenants/{tenant}/keys/{key.id}"
    headers = {"Location": location, "Cache-Control": "no-store"}
    return JSONResponse({**_key_json(key), "key": text}, 201, headers)


@router.get("/v1/tenants/{tenant}/keys")
@allow("admin")
async def list_keys(tenant: str, guards: GuardsDep, limit: Limit = 20, after: str | None = None) -> dict[str, Any]:
    """A tenant's keys by id, without the secrets."""
    page = await guards.tenants.list_keys(tenant, limit, after)
    return _list_json([_key_json(key) for key in page.items], page.has_more)


@router.get("/v1/tenants/{tenant}/keys/{key}")
@allow("admin")
async def get_key(tenant: str, key: str, guards: GuardsDep) -> dict[str, Any]:
    """One key, by its id. `last_used_at` is entered at most once a minute."""
    return _key_json(await guards.tenants.get_key(tenant, key))


def _require_future(expires_at: int | None) -> None:
    """Raises ApiError 400."""
    if expires_at is not None and expires_at <= time.time():
        message = f"'expires_at' should be in the future (value {expires_at})."
        raise ApiError(400, message, code="invalid_expiry", param="expires_at")


@router.patch("/v1/tenants/{tenant}/keys/{key}")
@allow("admin")
async def change_key(tenant: str, key: str, body: KeyPatch, guards: GuardsDep) -> dict[str, Any]:
    """Disables a key or enables it again, and changes when it expires: within a second everywhere, here at once."""
    _require_future(body.expires_at)
    changed = await guards.tenants.change_key(tenant, key, body.model_dump(exclude_unset=True))
    guards.keyring.forget()
    return _key_json(changed)


@router.delete("/v1/tenants/{tenant}/keys/{key}")
@allow("admin")
async def delete_key(tenant: str, key: str, guards: GuardsDep) -> dict[str, Any]:
    """Revokes a key: within a second nobody is let in with it any more, in this process at once."""
    await guards.tenants.delete_key(tenant, key)
    guards.keyring.forget()
    return {"id": key, "object": "tenant.key", "deleted": True}


audit_router = APIRouter(tags=["audit"], route_class=Route)


@audit_router.get("/v1/audit")
@allow("admin")
async def list_audit(
    request: Request,
    caller: CallerDep,
    limit: Limit = 20,
    after: Annotated[str | None, Query(pattern="^[0-9]{1,18}$")] = None,
    tenant_id: Annotated[str | None, Query(description="As this tenant alone, also a deleted one.")] = None,
) -> dict[str, Any]:
    """What has been changed by whom, the newest first: uploads and every other management action, `done`, `refused` or
    `failed`; one that has only `begun` still runs, or its process ended before its end could be entered. The actor is
    "admin", the id of a key, or on a server without keys "operator". Of everybody, or as one tenant with `tenant`."""
    audit: AuditLog = request.app.state.audit
    whose = caller.viewer if tenant_id is None else tenant_id
    page = await audit.list_actions(limit, None if after is None else int(after), whose)
    return _list_json([_action_json(action) for action in page.items], page.has_more)


single_user = APIRouter(route_class=Route, include_in_schema=False)
"""In place of the others where there is no admin key."""


@single_user.api_route("/v1/tenants", methods=["GET", "POST"])
@single_user.api_route("/v1/tenants/{rest:path}", methods=["GET", "POST", "PATCH", "DELETE"])
@allow("open")
async def no_tenants() -> Response:
    message = "This server has one user and no tenants: it was started without LORAPLEX_ADMIN_KEY."
    raise ApiError(404, message, code="single_user")

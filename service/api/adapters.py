"""/v1/adapters: upload, list, change, delete, load. Wiring: `app.state.library` is the
Library, whose `recover()` has to run before the first request.

Handlers translate between HTTP and service/library.py; the order of things that makes uploads durable is there.
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Callable, Coroutine
from typing import Annotated, Any, Literal

import msgspec
from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.responses import FileResponse, JSONResponse
from pydantic import Field, StrictBool, StrictInt, StrictStr
from pydantic.json_schema import SkipJsonSchema
from starlette.requests import ClientDisconnect

from service.api import auth, ranges
from service.api.auth import Caller, CallerDep, allow
from service.api.errors import ClientGone
from service.api.failure import ApiError, shown
from service.api.schemas import Strict
from service.engine.errors import EngineUnavailable
from service.jobs import WorkersUnavailable
from service.library import MAX_LABELS, Library, Published, check_labels
from service.store.edits import Condition
from service.store.errors import VersionNotFound
from service.store.names import ALIAS_RULE, NAME, Selector, parse_selector, valid_alias, valid_name
from service.store.records import Adapter, Removed, Resolved, Version
from service.store.visibility import MAX_GRANTS, PRIVATE, PUBLIC, SHARED

RETRY_AFTER_S = 5.0
MAX_JSON_BYTES = 64 << 10


class Route(auth.Route):
    """Turns what only uploads run into into HTTP errors; service/api/errors.py knows all others."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            try:
                return await handler(request)
            except ClientDisconnect:
                raise ClientGone from None
            except WorkersUnavailable as error:
                raise ApiError(503, str(error), code="workers_unavailable", retry_after_s=RETRY_AFTER_S) from error
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                    raise ApiError(507, "The server's disk is full.", code="insufficient_storage") from error
                raise

        return handle


router = APIRouter(prefix="/v1/adapters", tags=["adapters"], route_class=Route)


def get_library(request: Request) -> Library:
    library: Library = request.app.state.library
    return library


def get_condition(request: Request) -> Condition:
    """If-Match and If-None-Match of the request, about the adapter's ETag."""
    match, none_match = request.headers.get("if-match"), request.headers.get("if-none-match")

    def holds(etag: str | None) -> bool:
        if match is not None and not _matches(match, etag):
            return False
        return none_match is None or not _matches(none_match, etag)

    return holds


def _matches(header: str, etag: str | None) -> bool:
    tags = {tag.strip() for tag in header.split(",")}
    return etag is not None and ("*" in tags or etag in tags)


Lib = Annotated[Library, Depends(get_library)]
Cond = Annotated[Condition, Depends(get_condition)]
Limit = Annotated[int, Query(ge=1, le=1000)]


_LABELS: dict[str, Any] = {
    "additionalProperties": {"type": "string", "maxLength": 255},
    "propertyNames": {"minLength": 1, "maxLength": 63, "pattern": "^[^=]*$"},
    "maxProperties": MAX_LABELS,
}


class AdapterPatch(Strict):
    """What PATCH changes; fields that are not given stay."""

    description: StrictStr = Field("", max_length=16 << 10)
    labels: dict[str, Any] = Field({}, description="Replaces all labels.", json_schema_extra=_LABELS)
    default_version: StrictInt = Field(1, ge=1, le=2**31 - 1)
    pinned: StrictBool = Field(False, description="Fetched when the service starts.")
    # Not available yet, and refused as such.
    visibility: SkipJsonSchema[Any] = None
    traffic: SkipJsonSchema[Any] = None


class AliasTarget(Strict):
    version: StrictInt = Field(ge=1, le=2**31 - 1)


# ---------------------------------------------------------------- representations


def _spec(version: Version) -> dict[str, Any]:
    return {**version.spec, "bytes": version.bytes, "sha256": version.digest}


def _adapter_json(adapter: Adapter, library: Library, residency: dict[str, str], caller: Caller) -> dict[str, Any]:
    bases = library.fingerprints()
    compatible = None if bases is None else adapter.default.fingerprint in bases
    answer = {
        "id": caller.says(adapter.tenant, adapter.name),
        "object": "adapter",
        "name": adapter.name,
        "owner": adapter.tenant,
        "description": adapter.description,
        "labels": adapter.labels,
        "pinned": adapter.pinned,
        "default_version": adapter.default_version,
        "versions": list(adapter.versions),
        "aliases": adapter.aliases,
        "spec": _spec(adapter.default),
        "residency": residency[adapter.default.key],
        "compatible": compatible,
        "state": {True: "ready", False: "incompatible", None: "unknown"}[compatible],
        "created": adapter.created_at,
        "updated": adapter.updated_at,
    }
    if caller is not auth.SINGLE_USER:
        # Whom else it is shared with is the owner's business.
        own = caller.viewer in (None, adapter.tenant)
        shared = list(adapter.shared_with) if own else [caller.viewer]
        answer["visibility"] = shared if adapter.visibility == SHARED else adapter.visibility
    return answer


def _version_json(name: str, version: Version, library: Library, residency: dict[str, str]) -> dict[str, Any]:
    bases = library.fingerprints()
    return {
        "id": f"{name}@{version.number}",
        "object": "adapter.version",
        "adapter": name,
        "version": version.number,
        "aliases": list(version.aliases),
        "spec": _spec(version),
        "files": [_file_json(version, file.filename) for file in version.files],
        "residency": residency[version.key],
        "compatible": None if bases is None else version.fingerprint in bases,
        "base_fingerprint": version.fingerprint,
        "created": version.created_at,
    }


def _file_json(version: Version, filename: str) -> dict[str, Any]:
    file = next(file for file in version.files if file.filename == filename)
    return {"id": filename, "object": "adapter.file", "filename": filename, "bytes": file.bytes, "sha256": file.sha256}


def _list_json(data: list[dict[str, Any]], has_more: bool) -> dict[str, Any]:
    return {
        "object": "list",
        "data": data,
        "first_id": data[0]["id"] if data else None,
        "last_id": data[-1]["id"] if data else None,
        "has_more": has_more,
    }


def _removed_json(identity: str, kind: str, removed: Removed) -> dict[str, Any]:
    return {
        "id": identity,
        "object": kind,
        "deleted": True,
        "versions": sorted(removed.digests),
        "adapter_deleted": removed.adapter_gone,
        "freed": {"files": removed.freed_files, "bytes": removed.freed_bytes},
    }


async def _adapter_response(
    library: Library, caller: Caller, name: str, status: int = 200, headers: dict[str, str] | None = None, **more: Any
) -> JSONResponse:
    adapter = await library.catalogue.get_adapter(name, caller.namespace, caller.viewer)
    residency = await library.residency([adapter.default.key])
    body = _adapter_json(adapter, library, residency, caller) | more
    return JSONResponse(body, status, headers={"ETag": adapter.etag, **(headers or {})})


def _selector(name: str, text: str) -> Selector:
    try:
        return parse_selector(text)
    except ValueError:
        raise VersionNotFound(name, text) from None


# ---------------------------------------------------------------- adapters

_FORM = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["config", "weights"],
                    "properties": {
                        "name": {
                            "type": "string",
                            "pattern": f"^{NAME.pattern}$",
                            "description": "Required by POST.",
                        },
                        "config": {"type": "string", "format": "binary", "description": "adapter_config.json"},
                        "weights": {
                            "type": "array",
                            "items": {"type": "string", "format": "binary"},
                            "description": "*.safetensors, repeatable",
                        },
                        "index": {"type": "string", "format": "binary", "description": "The index of shards."},
                        "description": {"type": "string"},
                        "labels": {"type": "string", "description": "A JSON object of strings."},
                    },
                }
            }
        },
    }
}


@router.post("", status_code=201, openapi_extra=_FORM)
@allow("upload", metered=True)
async def create_adapter(request: Request, library: Lib, caller: CallerDep) -> Response:
    """Uploads a new adapter. 200 if the name has this content already, 409 if it has other content."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() == "application/json":
        await _refuse_source(request)
    return await _published(request, library, caller, await library.upload(request, owner=caller.owner))


@router.put("/{name}", status_code=201, openapi_extra=_FORM)
@allow("upload", metered=True)
async def put_adapter(
    request: Request, name: str, library: Lib, condition: Cond, caller: CallerDep, default: bool | None = None
) -> Response:
    """Uploads a version of an adapter and makes it the default unless `default=false`; creates the adapter if there
    is none. 200 with the version that has this content already, if one has."""
    published = await library.upload(request, name=name, make_default=default, condition=condition, owner=caller.owner)
    return await _published(request, library, caller, published)


async def _published(request: Request, library: Library, caller: Caller, published: Published) -> Response:
    name, number = published.name, published.version
    request.scope["state"]["target"] = f"{name} {number}"
    location = f"/v1/adapters/{name}/versions/{number}" if number > 1 else f"/v1/adapters/{name}"
    status = 201 if published.created else 200
    return await _adapter_response(library, caller, name, status, {"Location": location}, version=number)


async def _refuse_source(request: Request) -> None:
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > MAX_JSON_BYTES:
            raise ApiError(413, f"A JSON body may have {MAX_JSON_BYTES} bytes.", code="body_too_large")
    try:
        value = msgspec.json.decode(body, type=dict[str, Any])
    except (msgspec.MsgspecError, RecursionError):
        raise ApiError(400, "The body is not a JSON object.", code="invalid_json") from None
    if not isinstance(value.get("source"), str):
        raise ApiError(400, "The body needs name and source, or use multipart/form-data.", param="source")
    raise ApiError(
        403, "Sources are not enabled on this server; upload the files as multipart/form-data.", code="sources_disabled"
    )


@router.get("")
@allow("any")
async def list_adapters(
    library: Lib,
    caller: CallerDep,
    limit: Limit = 20,
    after: str | None = None,
    label: str | None = None,
    owner: str | None = None,
    state: Literal["ready", "incompatible"] | None = None,
) -> dict[str, Any]:
    """Adapters by name. `label`: `key` or `key=value`; `state`: whether the default version fits the base served."""
    if caller is auth.SINGLE_USER and owner not in (None, caller.tenant):
        return _list_json([], False)
    if caller.namespace != caller.tenant:  # a tenant asks for what another one shares with it
        if owner not in (None, caller.namespace):
            return _list_json([], False)
        owner = caller.namespace
    fingerprints = library.engine.manifest.fingerprints if state is not None else None
    page = await library.catalogue.list_adapters(
        limit,
        after,
        label=label,
        fingerprints=fingerprints,
        other_base=state == "incompatible",
        tenant=caller.tenant,
        others=caller is not auth.SINGLE_USER,
        viewer=caller.viewer,
        owner=owner,
    )
    residency = await library.residency([adapter.default.key for adapter in page.items])
    return _list_json([_adapter_json(adapter, library, residency, caller) for adapter in page.items], page.has_more)


@router.get("/{name}")
@allow("any")
async def get_adapter(name: str, library: Lib, caller: CallerDep) -> Response:
    """One adapter; the ETag can be given as If-Match to whatever changes it."""
    return await _adapter_response(library, caller, name)


@router.patch("/{name}")
@allow("manage")
async def change_adapter(name: str, body: AdapterPatch, library: Lib, condition: Cond, caller: CallerDep) -> Response:
    """Changes description, labels, default version, pinned; with tenants, visibility: "private", "public", or the list
    of tenants that may see and use it."""
    given = body.model_fields_set
    later = ("visibility", "traffic") if caller is auth.SINGLE_USER else ("traffic",)
    for field in later:
        if field in given:
            value = shown(getattr(body, field))
            raise ApiError(400, f"{field!r} is not available yet (value {value}).", code="not_available", param=field)
    async with library.catalogue.write(caller.owner) as edits:
        await edits.change(
            name,
            description=body.description if "description" in given else None,
            new_labels=check_labels(body.labels) if "labels" in given else None,
            default_version=body.default_version if "default_version" in given else None,
            pinned=body.pinned if "pinned" in given else None,
            visibility=_visibility(body.visibility) if "visibility" in given else None,
            tenant=caller.tenant,
            condition=condition,
        )
    if "pinned" in given and body.pinned:
        library.prefetch(await library.catalogue.find_version(name, None, caller.tenant))
    return await _adapter_response(library, caller, name)


def _visibility(value: Any) -> str | list[str]:
    """Raises ApiError 400. Whether there are such tenants is not asked: nobody can find out by it."""
    if value in (PRIVATE, PUBLIC):
        return str(value)
    if (
        isinstance(value, list)
        and len(value) <= MAX_GRANTS
        and all(isinstance(tenant, str) and valid_name(tenant) for tenant in value)
    ):
        return value
    message = f'\'visibility\' should be "private", "public" or a list of at most {MAX_GRANTS} tenants'
    raise ApiError(400, f"{message} (value {shown(value)}).", code="invalid_visibility", param="visibility")


@router.delete("/{name}")
@allow("manage")
async def delete_adapter(name: str, library: Lib, condition: Cond, caller: CallerDep) -> dict[str, Any]:
    """Deletes an adapter with all its versions. Running requests finish. Says which stored bytes become free."""
    async with library.catalogue.write(caller.owner) as edits:
        removed = await edits.remove_adapter(name, caller.tenant, condition)
    library.reclaim(removed)
    return _removed_json(name, "adapter", removed)


# ---------------------------------------------------------------- versions and files


@router.get("/{name}/versions")
@allow("any")
async def list_versions(
    name: str, library: Lib, caller: CallerDep, limit: Limit = 20, after: str = "0"
) -> dict[str, Any]:
    """Versions by number. `after`: a number, or an id of this list."""
    number = after.rpartition("@")[2]
    if not (number.isascii() and number.isdigit() and len(number) < 10):
        raise ApiError(
            400, f"after is a version's number or id (value {shown(after)}).", code="invalid_cursor", param="after"
        )
    page = await library.catalogue.list_versions(name, limit, int(number), caller.namespace, caller.viewer)
    residency = await library.residency([version.key for version in page.items])
    return _list_json([_version_json(name, version, library, residency) for version in page.items], page.has_more)


async def _version(library: Library, caller: Caller, name: str, version: str) -> Version:
    return await library.catalogue.get_version(name, _selector(name, version), caller.namespace, caller.viewer)


@router.get("/{name}/versions/{version}")
@allow("any")
async def get_version(name: str, version: str, library: Lib, caller: CallerDep) -> dict[str, Any]:
    """One version, by number or alias."""
    found = await _version(library, caller, name, version)
    return _version_json(name, found, library, await library.residency([found.key]))


@router.delete("/{name}/versions/{version}")
@allow("manage")
async def delete_version(name: str, version: int, library: Lib, condition: Cond, caller: CallerDep) -> dict[str, Any]:
    """Deletes a version; its number is never used again. 409 for the default while there are others, and for one with
    aliases. The adapter goes with its last version."""
    async with library.catalogue.write(caller.owner) as edits:
        removed = await edits.remove_version(name, version, caller.tenant, condition)
    library.reclaim(removed)
    return _removed_json(f"{name}@{version}", "adapter.version", removed)


@router.get("/{name}/versions/{version}/files")
@allow("any")
async def list_files(name: str, version: str, library: Lib, caller: CallerDep) -> dict[str, Any]:
    """The files of a version."""
    found = await _version(library, caller, name, version)
    return _list_json([_file_json(found, file.filename) for file in found.files], False)


@router.get("/{name}/versions/{version}/files/{filename}", response_class=FileResponse)
@allow("upload", "manage")
async def get_file(
    request: Request, name: str, version: str, filename: str, library: Lib, caller: CallerDep
) -> Response:
    """The bytes as they were uploaded. The ETag is their sha256; ranges work."""
    found = await _version(library, caller, name, version)
    if caller.viewer not in (None, caller.namespace):
        message = f"{name!r} belongs to another tenant, which lets it be used; its files are the owner's alone."
        raise ApiError(403, message, code="not_your_tenant", param="tenant")
    file = next((file for file in found.files if file.filename == filename), None)
    missing = ApiError(404, f"Version {found.number} of {name!r} has no file {shown(filename)}.", code="file_not_found")
    if file is None:
        raise missing
    headers = {"ETag": f'"{file.sha256}"', "Cache-Control": "private, no-cache"}
    if _matches(request.headers.get("if-none-match", ""), headers["ETag"]):
        return Response(status_code=304, headers=headers)
    path = await library.sound_file(name, found, file, caller.namespace)
    try:
        stat = await asyncio.to_thread(os.stat, path)
    except FileNotFoundError:
        raise missing from None  # deleted since then
    ranges.check(request, stat.st_size)
    media_type = "application/json" if filename.endswith(".json") else "application/octet-stream"
    return FileResponse(path, headers=headers, media_type=media_type, filename=filename, stat_result=stat)


# ---------------------------------------------------------------- aliases


@router.put("/{name}/aliases/{alias}")
@allow("manage")
async def put_alias(
    name: str, alias: str, body: AliasTarget, library: Lib, condition: Cond, caller: CallerDep
) -> Response:
    """Points an alias to a version: `name@alias` in requests. 201 when the alias is new."""
    if not valid_alias(alias):
        message = f"An alias is {ALIAS_RULE} (value {shown(alias)})."
        raise ApiError(400, message, code="invalid_alias", param="alias")
    async with library.catalogue.write(caller.owner) as edits:
        new = await edits.set_alias(name, alias, body.version, caller.tenant, condition)
    answer = {"id": f"{name}@{alias}", "object": "adapter.alias", "alias": alias, "version": body.version}
    return JSONResponse(answer, 201 if new else 200)


@router.delete("/{name}/aliases/{alias}")
@allow("manage")
async def delete_alias(name: str, alias: str, library: Lib, condition: Cond, caller: CallerDep) -> dict[str, Any]:
    """Removes an alias; the version stays."""
    async with library.catalogue.write(caller.owner) as edits:
        await edits.remove_alias(name, alias, caller.tenant, condition)
    return {"id": f"{name}@{alias}", "object": "adapter.alias", "deleted": True}


# ---------------------------------------------------------------- residency


async def _wanted(library: Library, caller: Caller, name: str, version: str | None) -> Resolved:
    selector = None if version is None else _selector(name, version)
    found = await library.catalogue.find_version(name, selector, caller.namespace, caller.viewer)
    found.require_base(*library.engine.manifest.fingerprints)
    if not library.engine.ready.is_set():
        raise EngineUnavailable("it is not ready")
    return found


async def _residency_response(library: Library, found: Resolved, status: int) -> Response:
    where = (await library.residency([found.key]))[found.key]
    body = {
        "id": f"{found.name}@{found.version}",
        "object": "adapter.residency",
        "name": found.name,
        "version": found.version,
        "residency": where,
    }
    return JSONResponse(body, status)


@router.post("/{name}/load", status_code=202)
@allow("manage")
async def load_adapter(
    name: str, library: Lib, caller: CallerDep, version: str | None = None, wait: bool = False
) -> Response:
    """Brings a version (the default one, a number or an alias) to the device: 202 at once, or with `wait` 200 when it
    is there."""
    found = await _wanted(library, caller, name, version)
    if wait:
        await library.engine.load(found.key, resident_limits=found.resident_limits)
    else:
        library.prefetch(found)
    return await _residency_response(library, found, 200 if wait else 202)


@router.post("/{name}/unload", status_code=202)
@allow("manage")
async def unload_adapter(
    name: str, library: Lib, caller: CallerDep, version: str | None = None, wait: bool = False
) -> Response:
    """Drops a version from the device's and the host's memory when no request uses it any more: 202 at once, or with
    `wait` 200 when it is done. The next request that names it brings it back."""
    found = await _wanted(library, caller, name, version)
    if wait:
        await library.engine.unload(found.key)
    else:
        library.unload_later(found.key)
    return await _residency_response(library, found, 200 if wait else 202)

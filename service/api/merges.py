"""/v1/merges: jobs that make an adapter, or a full checkpoint, out of adapters. `app.state.merges` is the Merges.

What is checked and when is in service/merges.py, how jobs are done in service/merger.py.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Annotated, Any, Literal

from fastapi import APIRouter, Depends, Header, Request, Response
from fastapi.responses import FileResponse, JSONResponse
from pydantic import AfterValidator, Field, StrictFloat, StrictInt, StrictStr, model_validator

from adapters.errors import AdapterMissing
from adapters.merge_request import MAX_SOURCES, METHODS, MIN_SHARD_BYTES
from service.api import ranges
from service.api.adapters import Limit, Route, _list_json, _matches
from service.api.auth import Caller, CallerDep, allow
from service.api.failure import ApiError, shown
from service.api.schemas import Model, Strict, _refused, _text
from service.merges import Merges, Wanted
from service.store.merges import Job, State

router = APIRouter(prefix="/v1/merges", tags=["merges"], route_class=Route)

MAX_KEY_CHARACTERS = 255

if TYPE_CHECKING:
    Method = str
else:
    Method = Literal[tuple(METHODS)]


class MergeSource(Strict):
    """One adapter that takes part."""

    adapter: Model
    """adapter | adapter@3 | adapter@alias. The version is fixed when the merge is queued."""
    weight: StrictFloat = Field(1.0, ge=-1000, le=1000)
    """May be negative."""


class MergeRequest(Strict):
    """POST /v1/merges. Options that the method does not read are refused, and so is a method that needs one."""

    name: Annotated[StrictStr, AfterValidator(_text)] = Field(max_length=256)
    """Of the result. An adapter of that name gets a new version, which becomes its default."""
    sources: list[MergeSource] = Field(min_length=1, max_length=MAX_SOURCES, fail_fast=True)
    into: Literal["adapter", "checkpoint"] = "adapter"
    """adapter: one that is served at once. checkpoint: base and adapters as a Hugging Face folder to download."""
    method: Method = "linear"
    """PEFT's combination types. For a checkpoint linear alone: the weighted sum of the adapters, exactly."""
    density: StrictFloat | None = Field(None, gt=0, le=1)
    """Share of the values that pruning methods keep."""
    majority_sign_method: Literal["total", "frequency"] | None = None
    """How ties methods elect the sign; default total."""
    svd_rank: StrictInt | None = Field(None, ge=1, le=2**31 - 1)
    """Rank of the result of svd methods; default: the largest of the sources."""
    seed: StrictInt | None = Field(None, ge=0, lt=2**63)
    """Of the methods that drop values at random; default 0."""
    max_shard_bytes: StrictInt | None = Field(None, ge=MIN_SHARD_BYTES, lt=2**63)
    """The largest weights file of a checkpoint; default 5 GB."""
    description: Annotated[StrictStr, AfterValidator(_text)] = Field("", max_length=16 << 10)
    """Of an adapter that is new; a checkpoint has none."""

    @model_validator(mode="after")
    def _a_checkpoint_has_no_description(self) -> MergeRequest:
        if self.description and self.into == "checkpoint":
            raise _refused("description", self.description, "is an adapter's; into = checkpoint has no use for it")
        return self

    def wanted(self) -> Wanted:
        given = {name: getattr(self, name) for name in _OPTIONS if getattr(self, name) is not None}
        sources = tuple((source.adapter, source.weight) for source in self.sources)
        return Wanted(self.name, self.into, sources, given, self.description)


_OPTIONS = ("method", "density", "majority_sign_method", "svd_rank", "seed", "max_shard_bytes")


def get_merges(request: Request) -> Merges:
    merges: Merges = request.app.state.merges
    return merges


def get_key(
    idempotency_key: Annotated[
        str | None,
        Header(description="The same key with the same body is the same merge, however often it is sent."),
    ] = None,
) -> str | None:
    if idempotency_key is not None and not (
        1 <= len(idempotency_key) <= MAX_KEY_CHARACTERS and idempotency_key.isascii() and idempotency_key.isprintable()
    ):
        value = shown(idempotency_key)
        raise ApiError(
            400,
            f"Idempotency-Key has 1 to {MAX_KEY_CHARACTERS} printable ASCII characters (value {value}).",
            code="invalid_idempotency_key",
            param="Idempotency-Key",
        )
    return idempotency_key


MergesDep = Annotated[Merges, Depends(get_merges)]
Key = Annotated[str | None, Depends(get_key)]


def merge_json(job: Job) -> dict[str, Any]:
    """`adapter` is there for a merge into an adapter that has succeeded, `files` for one into a checkpoint."""
    body = {
        "id": job.id,
        "object": "merge",
        "name": job.name,
        "into": job.target,
        **job.options,
        "sources": [
            {"adapter": each.adapter, "version": each.version, "digest": each.digest, "weight": each.weight}
            for each in job.sources
        ],
        "state": job.state,
        "progress": round(job.progress, 4),
        "phase": job.phase,
        "error": job.error,
        "created_at": job.created_at,
        "started_at": job.started_at,
        "finished_at": job.finished_at,
    }
    if job.state == "succeeded":
        if job.target == "adapter":
            body["adapter"] = f"{job.name}@{job.result_version}"
        else:
            body["files"] = list(job.files)
    return body


@router.post("", status_code=202)
@allow("upload", metered=True)
async def create_merge(body: MergeRequest, merges: MergesDep, caller: CallerDep, key: Key) -> Response:
    """Queues a merge. 200 with the merge as it is now if this Idempotency-Key has started it already."""
    job, new = await merges.submit(body.wanted(), key, caller.owner, caller.viewer)
    return JSONResponse(merge_json(job), 202 if new else 200, {"Location": f"/v1/merges/{job.id}"})


@router.get("")
@allow("upload", "manage")
async def list_merges(
    merges: MergesDep, caller: CallerDep, limit: Limit = 20, after: str | None = None, state: State | None = None
) -> dict[str, Any]:
    """Merges, the newest first. `after`: the id of one of them."""
    _require_own(caller)
    async with merges.library.catalogue.merges() as table:
        page = await table.page(limit, after, state, caller.tenant)
    return _list_json([merge_json(job) for job in page.items], page.has_more)


def _require_own(caller: Caller) -> None:
    """Raises ApiError 403 for ?tenant of another one: merges are not shared, and the caller's own are not meant."""
    if caller.namespace != caller.tenant:
        raise ApiError(403, "A key shows the merges of its own tenant only.", code="not_your_tenant", param="tenant")


async def _job(merges: Merges, identity: str, caller: Caller) -> Job:
    _require_own(caller)
    async with merges.library.catalogue.merges() as table:
        return await table.get(identity, caller.tenant)


@router.get("/{merge}")
@allow("upload", "manage")
async def get_merge(merge: str, merges: MergesDep, caller: CallerDep) -> dict[str, Any]:
    """One merge: queued, running, succeeded, failed (`error` says why) or cancelled."""
    return merge_json(await _job(merges, merge, caller))


@router.delete("/{merge}")
@allow("upload", "manage")
async def delete_merge(merge: str, merges: MergesDep, caller: CallerDep) -> dict[str, Any]:
    """Cancels a merge that is queued or running, and answers with it. Any other is deleted, a checkpoint with its
    files; an adapter that it made stays."""
    cancelled = await merges.delete(merge, caller.owner)
    if cancelled is not None:
        return merge_json(cancelled)
    return {"id": merge, "object": "merge", "deleted": True}


@router.get("/{merge}/files")
@allow("upload", "manage")
async def list_merge_files(merge: str, merges: MergesDep, caller: CallerDep) -> dict[str, Any]:
    """The files of a checkpoint; none before it is complete."""
    files = (await _job(merges, merge, caller)).files
    return _list_json([{"id": file["name"], "object": "merge.file", **file} for file in files], False)


@router.get("/{merge}/files/{filename:path}", response_class=FileResponse)
@allow("upload", "manage")
async def get_merge_file(request: Request, merge: str, filename: str, merges: MergesDep, caller: CallerDep) -> Response:
    """One file of a checkpoint, by its name in the list; that of a chat template may have a folder and a slash in it.
    The ETag is its sha256; ranges work, so a download can be resumed."""
    job = await _job(merges, merge, caller)
    file = next((file for file in job.files if file["name"] == filename), None)
    missing = ApiError(404, f"Merge {job.id} has no file {shown(filename)}.", code="file_not_found")
    if file is None:
        raise missing
    headers = {"ETag": f'"{file["sha256"]}"', "Cache-Control": "private, no-cache"}
    if _matches(request.headers.get("if-none-match", ""), headers["ETag"]):
        return Response(status_code=304, headers=headers)
    media_type = "application/json" if filename.endswith(".json") else "application/octet-stream"
    async with merges.library.catalogue.merges() as table:
        in_store = await table.in_store(job)
    if in_store:
        headers["Content-Disposition"] = f'attachment; filename="{PurePosixPath(filename).name}"'

        async def read(start: int, end: int) -> bytes:
            return await merges.library.read(file["sha256"], start, end)

        try:
            return await ranges.download(request, read, file["bytes"], headers, media_type)
        except AdapterMissing:
            raise missing from None  # deleted since then
    path = merges.file(job, filename)
    try:
        stat = await asyncio.to_thread(os.stat, path)
    except FileNotFoundError:
        raise missing from None  # deleted since then
    ranges.check(request, stat.st_size)
    return FileResponse(path, headers=headers, media_type=media_type, filename=path.name, stat_result=stat)

"""Uploads into versions, and versions out of the way: what the catalogue, the blob store and the engine do together.

The order is the guarantee. An upload is inspected in the spool and flushed to the disk; its blobs are claimed in the
catalogue, stored, and only then entered as a version, in the transaction that takes the claims away: whoever sees the
row can read the bytes. A deletion goes the other way: rows first, blobs when no engine needs them any more
(service/janitor.py). Whatever a crash leaves between the two is a blob that the catalogue knows as claimed or garbage.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import logging
import os
import shutil
import uuid
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from adapters.blobs import Blobs, BlobStore
from adapters.errors import AdapterMissing, BlobDamaged
from adapters.inspection import INDEX_NAME, Inspection, inspect_upload
from adapters.manifest import Manifest
from adapters.peft_config import CONFIG_NAME, MAX_CONFIG_BYTES
from adapters.peft_format import MAX_INDEX_BYTES
from service.api.failure import ApiError, shown
from service.engine.client import EngineClient
from service.engine.errors import EngineError
from service.engine.messages import Ready
from service.janitor import UNLOAD_TIMEOUT_S, Janitor
from service.job_worker import import_modules
from service.jobs import Workers
from service.store.catalogue import Catalogue
from service.store.edits import Condition, Edits, always
from service.store.errors import AdapterExists, CatalogueError, CatalogueUnavailable
from service.store.names import NAME_RULE, valid_name
from service.store.records import File, NewVersion, Removed, Resolved, Version, engine_key
from service.store.tables import DEFAULT_TENANT
from service.store.usage import Owner
from service.uploads import FieldRule, Form, Spool, UploadedFile, safe_basename

if TYPE_CHECKING:
    from fastapi import Request  # the merger imports this module, and has none

log = logging.getLogger(__name__)

WEIGHTS = "adapter_model.safetensors"

FIELDS = {
    "name": FieldRule(256),
    "config": FieldRule(MAX_CONFIG_BYTES, file=True),
    "weights": FieldRule(0, file=True, repeatable=True),
    "index": FieldRule(MAX_INDEX_BYTES, file=True),
    "description": FieldRule(16 << 10),
    "labels": FieldRule(16 << 10),
}
MAX_LABELS = 64
STORE_THREADS = 8  # files on their way to or from the blob store at once
ABANDON_PAUSE_S = 5.0
# A deletion asks the engine so much later: requests that had looked the name up before it are with the engine by then.
RECLAIM_DELAY_S = 2.0

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Published:
    """What an upload became: a new version, or the one that has this content already."""

    name: str
    version: int
    created: bool


class Library:
    """The adapters of this server. One per API process, made of parts that the caller opens and closes."""

    def __init__(
        self,
        catalogue: Catalogue,
        blobs: Blobs,
        spool: Spool,
        workers: Workers,
        engine: EngineClient,
        base_name: str,
        cache_dir: Path,
        on_damage: Callable[[], None] = lambda: None,
    ) -> None:
        """`on_damage` is called for every damaged blob that is met."""
        self.catalogue = catalogue
        self.blobs = blobs
        self._on_damage = on_damage
        self.engine = engine
        self.base_name = base_name
        self._spool = spool
        self._workers = workers
        self._janitor = Janitor(catalogue, blobs, spool, engine, cache_dir, RECLAIM_DELAY_S)
        # Threads of their own: a store that hangs must not hold up those that everything else uses.
        self._threads = ThreadPoolExecutor(STORE_THREADS, thread_name_prefix="blobs")
        self._background: set[asyncio.Task[None]] = set()

    async def recover(self) -> None:
        """Sweeps what a crash left in spool, blob store and block cache, and has the pinned adapters fetched by this
        engine and all that follow. Call it once, at start."""
        await asyncio.to_thread(self._spool.sweep)
        await self._janitor.recover()
        self._spool.serve()
        self._start(self._janitor.run())
        self.engine.on_hello.append(self._greet)
        if self.engine.ready.is_set() and self.engine.last_ready is not None:
            self._greet(self.engine.last_ready)
        # A worker takes a second to start; the first upload should not wait for it.
        self._start(self._workers.run(import_modules, "adapters.inspection", "adapters.values"))

    async def close(self) -> None:
        """Ends the work in the background: deletions that wait for the engine are left to the next start's sweep.
        What it was given belongs to the caller."""
        for task in self._background:
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)
        self._threads.shutdown(wait=False, cancel_futures=True)

    def require_name(self, name: str) -> None:
        """Raises ApiError 400 for a name that no adapter may have, 409 for the base model's."""
        if not valid_name(name):
            message = f"An adapter's name is {NAME_RULE} (value {shown(name)})."
            raise ApiError(400, message, code="invalid_name", param="name")
        if name == self.base_name:
            raise ApiError(409, f"{name!r} is the name of the base model.", code="name_reserved", param="name")

    async def upload(
        self,
        request: Request,
        *,
        name: str | None = None,
        make_default: bool | None = None,
        condition: Condition = always,
        owner: Owner,
    ) -> Published:
        """Publishes the adapter in the request's multipart body.

        With `name` (PUT) it becomes a version of that adapter, and its default unless `make_default` is False; content
        that a version has already gives that version back and changes nothing, but the default if `make_default` is
        True. Without (POST) the form names a new adapter. What the tenant's limits cannot admit is refused before it is
        received. Raises ApiError, AdapterRefused, AdapterExists, QuotaReached, PreconditionFailed, EngineUnavailable,
        TenantNotFound for an owner who was deleted meanwhile,
        WorkersUnavailable.
        """
        _ = self.engine.manifest  # nothing can be checked before there is an engine
        if name is not None:
            self.require_name(name)
        room = await self.catalogue.upload_room(owner.name, name)
        async with self._spool.receive(request, FIELDS, owner.name, room) as form:
            given = form.fields.get("name")
            _require(form, ("config", "weights") if name is not None else ("name", "config", "weights"))
            if name is not None and given is not None and given != name:
                raise ApiError(
                    400, f"The form names {shown(given)}, the address {shown(name)}.", code="invalid_name", param="name"
                )
            target = name if name is not None else form.fields["name"]
            self.require_name(target)
            labels = parse_labels(form.fields["labels"]) if "labels" in form.fields else None
            config, index = form.files["config"][0].path, _first(form.files.get("index"))
            weights = name_weights(form.files["weights"], sharded=index is not None)
            return await self.publish(
                target,
                config,
                weights,
                index,
                new_adapter=name is None,
                make_default=make_default,
                condition=condition,
                description=form.fields.get("description"),
                labels=labels,
                tenant=owner.name,
                owner=owner,
            )

    async def publish(
        self,
        target: str,
        config: Path,
        weights: dict[str, Path],
        index: Path | None,
        *,
        new_adapter: bool = False,
        make_default: bool | None = None,
        condition: Condition = always,
        description: str | None = None,
        labels: dict[str, str] | None = None,
        provenance: dict[str, Any] | None = None,
        also: Callable[[Edits, int], Awaitable[None]] | None = None,
        tenant: str = DEFAULT_TENANT,
        owner: Owner | None = None,
    ) -> Published:
        """Local files, which are moved away, as a version of the adapter `target`; the rest as `upload` says, and also
        StoreUnavailable and CatalogueUnavailable. Whatever is raised, nothing has changed.

        `new_adapter`: refuse (AdapterExists) if it is there with other content. `provenance` is shown in the version's
        spec. `also`, given the version's number, is part of the same transaction; what it raises undoes all. `owner`:
        the tenant, who must not have been deleted meanwhile (TenantNotFound)."""
        manifest = self.engine.manifest
        inspection = await self._workers.run(inspect_upload, config, weights, index, manifest)
        sources = {CONFIG_NAME: config, **weights} | ({INDEX_NAME: index} if index is not None else {})
        await self._spool.sync(list(sources.values()))
        new = _new_version(inspection, manifest, provenance)
        names = {**{file.sha256: False for file in new.files}, new.digest: True}
        upload = uuid.uuid4().hex
        async with self.catalogue.write(owner) as edits:
            if await _find(edits, target, new, new_adapter, tenant, condition) is None:
                await edits.require_room(target, new, tenant)
            await edits.blobs.claim(upload, names, self._janitor.instance, self._spool.process)
        try:
            # Also what is there already: should it have been damaged since, this repairs it.
            await _to_its_end(self._in_thread(self._store, inspection, sources))
            async with self.catalogue.write(owner) as edits:
                number = await _find(edits, target, new, new_adapter, tenant, condition)
                created = number is None
                if number is None:
                    await edits.require_room(target, new, tenant)
                    number = await edits.publish(target, new, default=make_default is not False, tenant=tenant)
                    await edits.change(target, description=description, new_labels=labels, tenant=tenant)
                else:
                    await edits.revalidate(target, number, new, tenant)
                    if make_default:
                        await edits.change(target, default_version=number, tenant=tenant)
                if also is not None:
                    await also(edits, number)
                await edits.blobs.complete(upload, len(names))
        except BaseException:
            self._start(self._abandon(upload, set(names)))
            raise
        with contextlib.suppress(CatalogueError):  # deleted since then; a hint is no reason to fail
            self.prefetch(await self.catalogue.find_version(target, number, tenant))
        return Published(target, number, created)

    async def keep(self, files: Mapping[str, Path], also: Callable[[Edits], Awaitable[None]]) -> None:
        """Stores copies of local files under their hashes. `also` enters the rows that need them, in the transaction
        that gives the claim up; what it raises undoes all. Raises BlobDamaged, StoreUnavailable, CatalogueUnavailable;
        whatever is raised, nothing has changed."""
        upload, names = uuid.uuid4().hex, dict.fromkeys(files, False)
        async with self.catalogue.write() as edits:
            await edits.blobs.claim(upload, names, self._janitor.instance, self._spool.process)
        try:
            for sha, path in files.items():
                await _to_its_end(self._in_thread(self.blobs.put, path, sha))
            async with self.catalogue.write() as edits:
                await also(edits)
                await edits.blobs.complete(upload, len(names))
        except BaseException:
            self._start(self._abandon(upload, set(names)))
            raise

    async def read(self, sha: str, start: int, end: int) -> bytes:
        """Part of a stored file, as the store gives it. Raises AdapterMissing, StoreUnavailable."""
        return await self._in_thread(self.blobs.read, sha, start, end)

    def _store(self, inspection: Inspection, sources: dict[str, Path]) -> None:
        record = inspection.record
        for filename, sha256, _ in record.files:
            self.blobs.put(sources[filename], sha256, move=True)
        self.blobs.put_bytes(record.to_json())

    async def _abandon(self, upload: str, names: set[str]) -> None:
        """Gives back what an upload that failed may have stored."""
        while True:
            try:
                async with self.catalogue.write() as edits:
                    if not self.catalogue.shared and isinstance(self.blobs, BlobStore):
                        # Nobody else's, and before any row is written: the disk may be full.
                        unused = await edits.blobs.unneeded(names, but=upload) - await edits.blobs.garbage()
                        await self._in_thread(self.blobs.discard, unused)
                    await edits.blobs.abandon([upload])
                return
            except CatalogueUnavailable as error:
                log.warning("the files of an upload that failed are left for later: %s", error)
                await asyncio.sleep(ABANDON_PAUSE_S)

    def reclaim(self, removed: Removed) -> None:
        """Has the blobs that a deletion left unused deleted, once no running request needs them. What is not unused,
        because others have the same content, still leaves the memory that counts for this owner. Returns at once."""
        if removed.unused:
            self._janitor.wake()
        if self.catalogue.with_tenants:
            for digest in set(removed.digests.values()) - removed.unused:
                self.unload_later(engine_key(digest, removed.owner))

    async def materialise(self, files: Iterable[File], folder: Path) -> dict[str, Path]:
        """Puts the files of a version into `folder` under their names, each checked; links where that is possible, so
        they are not to be changed. Raises BlobDamaged, AdapterMissing, StoreUnavailable."""

        def place(file: File) -> Path:
            target = folder / file.filename
            for _ in range(3):  # a cached copy may be evicted between the two lines
                source = self.blobs.fetch(file.sha256)
                try:
                    os.link(source, target)
                except FileNotFoundError:
                    continue
                except OSError:
                    shutil.copyfile(source, target)
                return target
            raise AdapterMissing(file.sha256)

        return {file.filename: await self._in_thread(place, file) for file in files}

    async def _in_thread(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        work = functools.partial(function, *args, **kwargs)
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    async def sound_file(self, name: str, version: Version, file: File, tenant: str = DEFAULT_TENANT) -> Path:
        """Where the file lies, once its bytes are known to be those that were uploaded. Raises BlobDamaged, and
        VersionNotFound if it was deleted in the meantime."""
        try:
            return await self._in_thread(self.blobs.fetch, file.sha256)
        except AdapterMissing:
            await self.catalogue.get_version(name, version.number, tenant)
            damage = BlobDamaged(file.sha256, "its file is gone")
        except BlobDamaged as error:
            damage = error
        self._on_damage()
        where = self.blobs.where(file.sha256)
        log.error("%s of %s@%d is damaged: %s (%s)", file.filename, name, version.number, damage.detail, where)
        raise damage

    def prefetch(self, *adapters: Resolved) -> None:
        """Hints to the engine that these are about to be used."""
        limits = {owner: limit for each in adapters for owner, limit in each.resident_limits.items()}
        self.engine.prefetch(dict.fromkeys(each.key for each in adapters), limits)

    def unload_later(self, key: str) -> None:
        """Asks the engine to drop an adapter; nobody waits for it."""

        async def unload() -> None:
            with contextlib.suppress(EngineError):
                await self.engine.unload(key, timeout_s=UNLOAD_TIMEOUT_S)

        self._start(unload())

    async def residency(self, keys: Iterable[str]) -> dict[str, str]:
        """Where the engine has each adapter: absent, loading, host, device, failed; unknown if it cannot be asked."""
        wanted = tuple(dict.fromkeys(keys))
        known: dict[str, str] = {}
        if wanted and self.engine.ready.is_set():
            with contextlib.suppress(EngineError):
                known = await self.engine.residency(wanted, timeout_s=2.0)
        return {key: known.get(key, "unknown") for key in wanted}

    def fingerprints(self) -> tuple[str, ...] | None:
        """All that the base model served is known by; None until the engine has said."""
        try:
            return self.engine.manifest.fingerprints
        except EngineError:
            return None

    def _greet(self, _: Ready) -> None:
        manifest = self.engine.manifest

        async def prefetch() -> None:
            pinned = await self.catalogue.pinned(manifest.fingerprints)
            if pinned:
                self.prefetch(*pinned)

        async def adopt() -> None:
            # Not waited for: what an earlier version stored fits before as well. From then on a change of the base
            # is noticed that the former fingerprint did not show.
            count = await self.catalogue.adopt(manifest.fingerprint, manifest.former)
            if count:
                log.info("%d adapter versions are known to be for this base by its new fingerprint", count)

        self._start(prefetch())
        self._start(adopt())

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._background.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("work in the background failed", exc_info=error)


async def _to_its_end(work: Awaitable[None]) -> None:
    """Not broken off in the middle: its thread goes on anyway, and stores what nobody would know of any more."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        while not task.done():  # who stops may cancel more than once
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait([task])
        raise


async def _find(
    edits: Edits, name: str, new: NewVersion, new_adapter: bool, tenant: str, condition: Condition
) -> int | None:
    """The number of the version that has this content already. Raises AdapterExists, PreconditionFailed."""
    exists, number = await edits.find_content(name, new.digest, tenant, condition)
    if exists and number is None and new_adapter:
        raise AdapterExists(name)
    return number


def parse_labels(text: str) -> dict[str, str]:
    """The labels field: a JSON object of strings. Raises ApiError 400."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = text
    return check_labels(value)


def check_labels(value: object) -> dict[str, str]:
    """Raises ApiError 400 unless this is {key (1 to 63 characters): text (up to 255)}, of at most MAX_LABELS."""
    if (
        not isinstance(value, dict)
        or len(value) > MAX_LABELS
        or not all(isinstance(k, str) and 1 <= len(k) <= 63 and "=" not in k and k.isprintable() for k in value)
        or not all(isinstance(v, str) and len(v) <= 255 and v.isprintable() for v in value.values())
    ):
        raise ApiError(
            400,
            f"labels must be a JSON object of at most {MAX_LABELS} printable strings; keys have 1 to 63 characters and "
            f"no '=', values at most 255 characters (value {shown(value)}).",
            code="invalid_labels",
            param="labels",
        )
    return value


def name_weights(files: list[UploadedFile], *, sharded: bool) -> dict[str, Path]:
    """Names under which the weights are kept: a single file's is PEFT's own; shards keep the client's names, since the
    index uses them. Raises ApiError 400 for two of the same name."""
    if len(files) == 1 and not sharded:
        return {WEIGHTS: files[0].path}
    named: dict[str, Path] = {}
    for number, file in enumerate(files, start=1):
        base = safe_basename(file.filename)
        key = base if base is not None and base.endswith(".safetensors") else f"model-{number:05d}.safetensors"
        if key in named:
            raise ApiError(400, f"Two weights files are named {shown(key)}.", code="invalid_multipart", param="weights")
        named[key] = file.path
    return named


def _require(form: Form, names: tuple[str, ...]) -> None:
    missing = [name for name in names if name not in form.fields and name not in form.files]
    if missing:
        raise ApiError(400, f"The form lacks {', '.join(missing)}.", code="missing_field", param=missing[0])


def _first(files: list[UploadedFile] | None) -> Path | None:
    return files[0].path if files else None


def _new_version(inspection: Inspection, manifest: Manifest, provenance: dict[str, Any] | None = None) -> NewVersion:
    spec = inspection.spec
    return NewVersion(
        digest=inspection.record.digest,
        fingerprint=manifest.fingerprint,
        max_rank=spec.max_rank,
        spec={
            "rank": spec.rank,
            "alpha": spec.alpha,
            "max_rank": spec.max_rank,
            "use_rslora": spec.use_rslora,
            "targets": list(spec.target_modules),
            "parameters": spec.parameters,
            "tensor_bytes": spec.tensor_bytes,
            **({"merge": provenance} if provenance else {}),
        },
        files=tuple(File(name, sha256, size) for name, sha256, size in inspection.record.files),
    )

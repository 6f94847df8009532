"""Uploads into versions, and versions out of the way: what the catalogue, the blob store and the engine do together.

The order is the guarantee. An upload is inspected in the spool, flushed to the disk, moved into the blob store and only
then entered in the catalogue, inside one write transaction; whoever sees the row can read the bytes. A deletion goes
the other way: rows first, blobs when the engine needs them no more. Whatever a crash leaves between the two is a blob
without a row, which the next start sweeps.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import Request

from adapters.blobs import AdapterRecord, BlobStore
from adapters.block import delete_blocks, sweep_blocks
from adapters.errors import AdapterMissing, BlobDamaged
from adapters.inspection import INDEX_NAME, Inspection, inspect_upload
from adapters.manifest import Manifest
from adapters.peft_config import CONFIG_NAME, MAX_CONFIG_BYTES
from adapters.peft_format import MAX_INDEX_BYTES
from service.api.errors import ApiError, shown
from service.engine.client import EngineClient
from service.engine.errors import EngineCallTimedOut, EngineError
from service.engine.messages import Ready
from service.jobs import Workers, import_modules
from service.store import AdapterExists, Catalogue, File, NewVersion, Version
from service.store.edits import Condition, Edits, always
from service.store.names import NAME_RULE, valid_name
from service.store.records import Removed
from service.store.tables import DEFAULT_TENANT
from service.uploads import FieldRule, Form, Spool, UploadedFile, safe_basename

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
ORPHANS_WAIT_S = 60.0  # for the engine, before what a killed process left is deleted
UNLOAD_TIMEOUT_S = 3600.0  # the longest a deletion waits for running requests
# A deletion asks the engine so much later: requests that had looked the name up before it are with the engine by then.
RECLAIM_DELAY_S = 2.0
_MAX_RECORD_BYTES = 1 << 20


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
        blobs: BlobStore,
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
        self._cache_dir = cache_dir
        self._on_damage = on_damage
        self.engine = engine
        self.base_name = base_name
        self._spool = spool
        self._workers = workers
        self._background: set[asyncio.Task[None]] = set()

    async def recover(self) -> None:
        """Sweeps what a crash left in spool, blob store and block cache, and has the pinned adapters fetched by this
        engine and all that follow. Call it once, at start."""
        await asyncio.to_thread(self._spool.sweep)
        # As a writer: no upload of any process can be between its blobs and its row now, so no age needs sparing.
        async with self.catalogue.write() as edits:
            keep = await edits.referenced()
            if self._spool.alone():
                await asyncio.to_thread(self._sweep, keep)
                orphans: set[str] = set()
            else:  # other API processes serve: what they deleted may still be needed by requests of theirs
                orphans = await asyncio.to_thread(self._orphans, keep)
        if orphans:
            self._start(self._reclaim_orphans(orphans))
        self.engine.on_hello.append(self._prefetch_pinned)
        if self.engine.ready.is_set() and self.engine.last_ready is not None:
            self._prefetch_pinned(self.engine.last_ready)
        # A worker takes a second to start; the first upload should not wait for it.
        self._start(self._workers.run(import_modules, "adapters.inspection"))

    def _sweep(self, keep: set[str]) -> None:
        files, freed = self.blobs.sweep(keep, 0.0)
        blocks = sweep_blocks(self._cache_dir, keep)
        if files or blocks:
            log.info("swept %d files (%d bytes) that no adapter needs, and %d blocks", files, freed, blocks)

    def _orphans(self, keep: set[str]) -> set[str]:
        """The blobs that no adapter needs. What interrupted writes left goes at once, since nobody writes."""
        orphans = set(self.blobs) - keep
        self.blobs.sweep(keep | orphans, 0.0)
        return orphans

    async def close(self) -> None:
        """Ends the work in the background: deletions that wait for the engine are left to the next start's sweep.
        What it was given belongs to the caller."""
        for task in self._background:
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)

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
        tenant: str = DEFAULT_TENANT,
    ) -> Published:
        """Publishes the adapter in the request's multipart body.

        With `name` (PUT) it becomes a version of that adapter, and its default unless `make_default` is False; content
        that a version has already gives that version back and changes nothing, but the default if `make_default` is
        True. Without (POST) the form names a new adapter. Raises ApiError, AdapterRefused, AdapterExists,
        PreconditionFailed, EngineUnavailable, WorkersUnavailable.
        """
        _ = self.engine.manifest  # nothing can be checked before there is an engine
        if name is not None:
            self.require_name(name)
        async with self._spool.receive(request, FIELDS) as form:
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
                tenant=tenant,
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
    ) -> Published:
        """Local files, which are moved away, as a version of the adapter `target`; the rest as `upload` says.

        `new_adapter`: refuse (AdapterExists) if it is there with other content. `provenance` is shown in the version's
        spec. `also`, given the version's number, is part of the same transaction; what it raises undoes all."""
        manifest = self.engine.manifest
        inspection = await self._workers.run(inspect_upload, config, weights, index, manifest)
        sources = {CONFIG_NAME: config, **weights} | ({INDEX_NAME: index} if index is not None else {})
        await self._spool.sync(list(sources.values()))
        new = _new_version(inspection, manifest, provenance)
        stored = False
        try:
            async with self.catalogue.write() as edits:
                exists, number = await edits.find_content(target, new.digest, tenant, condition)
                if exists and number is None and new_adapter:
                    raise AdapterExists(target)
                created = number is None
                stored = True
                # Also what is there already: should it have been damaged since, this repairs it.
                await asyncio.to_thread(self._store, inspection, sources)
                if number is None:
                    number = await edits.publish(target, new, default=make_default is not False, tenant=tenant)
                    await edits.change(target, description=description, new_labels=labels, tenant=tenant)
                else:
                    await edits.revalidate(target, number, new, tenant)
                    if make_default:
                        await edits.change(target, default_version=number, tenant=tenant)
                if also is not None:
                    await also(edits, number)
        except BaseException:
            if stored:  # rolled back: the disk may be full, so this cannot wait for the next start
                names = {new.digest, *(file.sha256 for file in new.files)}
                self._start(self._delete_unused([], names))
            raise
        self.engine.prefetch([new.digest])
        return Published(target, number, created)

    def _store(self, inspection: Inspection, sources: dict[str, Path]) -> None:
        record = inspection.record
        for filename, sha256, _ in record.files:
            self.blobs.put(sources[filename], sha256, move=True)
        self.blobs.put_bytes(record.to_json())

    def reclaim(self, removed: Removed) -> None:
        """Deletes the blobs that a deletion left unused, once no running request needs them. Returns at once."""
        if removed.unused:
            self._start(self._reclaim(removed))

    async def _reclaim(self, removed: Removed) -> None:
        await asyncio.sleep(RECLAIM_DELAY_S)
        # A digest that is still used belongs to another adapter with the same content.
        digests = [digest for digest in removed.digests.values() if digest in removed.unused]
        await self._delete_unused(digests, removed.unused)

    async def _reclaim_orphans(self, orphans: set[str]) -> None:
        with contextlib.suppress(EngineError):
            await self.engine.wait_ready(ORPHANS_WAIT_S)
        await self._delete_unused(await asyncio.to_thread(self._records, orphans), orphans)

    def _records(self, names: Iterable[str]) -> list[str]:
        """Those of the blobs that are the record of a version, and so its digest."""
        found = []
        for name in names:
            with contextlib.suppress(AdapterMissing, BlobDamaged):
                if self.blobs.size(name) <= _MAX_RECORD_BYTES:
                    with self.blobs.open(name) as stream:
                        AdapterRecord.from_json(stream.read(), name)
                    found.append(name)
        return found

    async def _delete_unused(self, digests: Iterable[str], names: Iterable[str]) -> None:
        """Deletes those of the blobs `names` that no version needs, after the engine has let go of `digests`."""
        for digest in digests:
            try:
                await self.engine.unload(digest, forget=True, timeout_s=UNLOAD_TIMEOUT_S)
            except EngineCallTimedOut:
                log.warning("the engine still uses a deleted adapter; the next start sweeps its files")
                return
            except EngineError as error:
                # Without an engine there are no running requests either.
                log.info("a deleted adapter was not unloaded: %s", error)
        async with self.catalogue.write() as edits:
            # Again: the same content may have been uploaded in the meantime.
            unused = await edits.unreferenced(names)
            await asyncio.to_thread(self._delete_blobs, unused)

    def _delete_blobs(self, names: Iterable[str]) -> None:
        for name in names:
            self.blobs.delete(name)
            delete_blocks(self._cache_dir, name)

    async def sound_file(self, name: str, version: Version, file: File) -> Path:
        """Where the file lies, once its bytes are known to be those that were uploaded. Raises BlobDamaged, and
        VersionNotFound if it was deleted in the meantime."""
        try:
            await asyncio.to_thread(self.blobs.verify, file.sha256)
        except AdapterMissing:
            await self.catalogue.get_version(name, version.number)
            damage = BlobDamaged(file.sha256, "its file is gone")
        except BlobDamaged as error:
            damage = error
        else:
            return self.blobs.path(file.sha256)
        self._on_damage()
        path = self.blobs.path(file.sha256)
        log.error("%s of %s@%d is damaged: %s (%s)", file.filename, name, version.number, damage.detail, path)
        raise damage

    def unload_later(self, digest: str) -> None:
        """Asks the engine to drop an adapter; nobody waits for it."""

        async def unload() -> None:
            with contextlib.suppress(EngineError):
                await self.engine.unload(digest, timeout_s=UNLOAD_TIMEOUT_S)

        self._start(unload())

    async def residency(self, digests: Iterable[str]) -> dict[str, str]:
        """Where the engine has each adapter: absent, loading, host, device, failed; unknown if it cannot be asked."""
        wanted = tuple(dict.fromkeys(digests))
        known: dict[str, str] = {}
        if wanted and self.engine.ready.is_set():
            with contextlib.suppress(EngineError):
                known = await self.engine.residency(wanted, timeout_s=2.0)
        return {digest: known.get(digest, "unknown") for digest in wanted}

    def fingerprint(self) -> str | None:
        """Of the base model served; None until the engine has said."""
        try:
            return self.engine.manifest.fingerprint
        except EngineError:
            return None

    def _prefetch_pinned(self, hello: Ready) -> None:
        async def prefetch() -> None:
            digests = await self.catalogue.pinned_digests(hello.manifest.fingerprint)
            if digests:
                self.engine.prefetch(digests)

        self._start(prefetch())

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._background.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("work in the background failed", exc_info=error)


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

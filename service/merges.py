"""Merges as the API sees them: what is checked before a job is queued, where results lie, and how they go.

The jobs are rows (service/store/merges.py), done by a process of its own (service/merger.py).
"""

from __future__ import annotations

import asyncio
import hashlib
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec

from adapters.disk import require_space
from adapters.manifest import Manifest
from adapters.merge_plan import Forecast, forecast_merge
from adapters.merge_request import MergeOptions
from service.api.failure import ApiError, shown
from service.jobs import Workers
from service.library import Library
from service.merge_task import StoredSource, held
from service.settings import Settings
from service.store.merges import Job, KeyReused, NewJob, Source, TooManyMerges
from service.store.usage import Owner

MAX_QUEUED = 64
"""Of one tenant."""
RETRY_AFTER_S = 30.0


@dataclass(frozen=True, slots=True)
class Wanted:
    """A well-formed request. `sources`: (model string, weight); `options`: fields of MergeOptions that were given."""

    name: str
    target: Literal["adapter", "checkpoint"]
    sources: tuple[tuple[str, float], ...]
    options: dict[str, Any]
    description: str = ""

    @property
    def digest(self) -> str:
        """Equal for equal requests."""
        plain = [self.name, self.target, self.sources, sorted(self.options.items()), self.description]
        return hashlib.sha256(msgspec.json.encode(plain)).hexdigest()


async def stored_sources(library: Library, sources: Iterable[Source], tenant: str) -> list[StoredSource]:
    """Raises AdapterNotFound, VersionNotFound."""
    found = []
    for source in sources:
        version = await library.catalogue.get_version(source.adapter, source.version, tenant)
        files = tuple((file.filename, file.sha256) for file in version.files)
        found.append(StoredSource(f"{source.adapter}@{source.version}", files, source.weight))
    return found


def require_space_for(folder: Path, target: str, model: Path, source_bytes: int) -> None:
    """Raises OSError ENOSPC unless the result fits. An adapter's is guessed; the checkpoint is as large as the base."""
    needed = 4 * source_bytes
    if target == "checkpoint":
        needed = sum(entry.stat().st_size for entry in model.iterdir() if entry.is_file())
    require_space(folder, needed)


class Merges:
    """What the routes use; one per API process. `workers`: where files are read and checked."""

    def __init__(self, library: Library, workers: Workers, settings: Settings) -> None:
        self.library = library
        self._workers = workers
        self._model = Path(settings.model)
        self._memory = settings.merge_memory_bytes
        self._folder = settings.merges_dir
        self._folder.mkdir(parents=True, exist_ok=True)

    async def submit(
        self, wanted: Wanted, key: str | None, owner: Owner, viewer: str | None = None
    ) -> tuple[Job, bool]:
        """The queued job and True, or the one that this Idempotency-Key has started already and False. `viewer`: whose
        eyes see the sources; None: everything.

        Raises ApiError (400, 403 for another tenant's source, 409, 422 with every reason, 429), NotFound, Conflict,
        QuotaReached, EngineUnavailable, OSError ENOSPC.
        """
        tenant = owner.name
        if key is not None:
            async with self.library.catalogue.merges() as table:
                if (job := _same(await table.by_key(key, tenant), wanted)) is not None:
                    return job, False
        self.library.require_name(wanted.name)
        manifest = self.library.engine.manifest
        sources, size = [], 0
        for model, weight in wanted.sources:
            found = await self.library.catalogue.resolve(model, tenant, viewer)
            if found.tenant != tenant:  # to use what others share is not to take it away
                message = f"{shown(model)} belongs to another tenant; only adapters of your own can be merged."
                raise ApiError(403, message, code="not_your_tenant", param="sources")
            found.require_base(*manifest.fingerprints)
            size += found.bytes
            sources.append(Source(found.name, found.version, found.digest, weight))
        require_space_for(self._folder, wanted.target, self._model, size)
        forecast = await self._forecast(wanted, sources, manifest, tenant)
        new = NewJob(
            tenant,
            wanted.name,
            wanted.target,
            wanted.description,
            wanted.options,
            tuple(sources),
            wanted.digest,
            key,
            forecast.bytes,
            forecast.rank,
        )
        try:
            async with self.library.catalogue.write(owner) as edits:
                if key is not None and (job := _same(await edits.merges.by_key(key, tenant), wanted)) is not None:
                    return job, False
                return await edits.merges.add(new, MAX_QUEUED), True
        except TooManyMerges as error:
            raise ApiError(429, f"{error}. Try again.", code="too_many_merges", retry_after_s=RETRY_AFTER_S) from None

    async def _forecast(self, wanted: Wanted, sources: list[Source], manifest: Manifest, tenant: str) -> Forecast:
        """What it will give. Raises ApiError 422 if it is impossible."""
        stored = await stored_sources(self.library, sources, tenant)
        options = MergeOptions(**wanted.options)
        with held(stored, self.library.blobs):
            local = await asyncio.to_thread(lambda: [source.fetch(self.library.blobs) for source in stored])
            forecast = await self._workers.run(
                forecast_merge, local, manifest, options, wanted.target, self._model, self._memory
            )
        if forecast.reasons:
            texts = [str(reason) for reason in forecast.reasons]
            raise ApiError(422, "The merge is impossible: " + "; ".join(texts), code="merge_refused", reasons=texts)
        return forecast

    async def delete(self, identity: str, owner: Owner) -> Job | None:
        """Cancels a queued or running job and gives it; of any other, deletes row and files, and gives None."""
        async with self.library.catalogue.write(owner) as edits:
            job = await edits.merges.get(identity, owner.name)
            if job.active:
                await edits.merges.cancel(job)
                return await edits.merges.get(identity, owner.name)
            await edits.merges.remove(job)
        await asyncio.to_thread(remove_folder, self._folder / job.id)
        return None

    def remove_files(self, identities: Iterable[str]) -> None:
        """Of merges whose rows are gone; for a thread."""
        for identity in identities:
            remove_folder(self._folder / identity)

    def file(self, job: Job, name: str) -> Path:
        """Where a file of the finished checkpoint lies, or lay; `name` is one of `job.files`."""
        return self._folder / job.id / name


def _same(job: Job | None, wanted: Wanted) -> Job | None:
    if job is not None and job.request_digest != wanted.digest:
        raise KeyReused(job.id)
    return job


def remove_folder(folder: Path) -> None:
    """Deletes it if it is there; what cannot be deleted now goes with the next start."""
    shutil.rmtree(folder, ignore_errors=True)

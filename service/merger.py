"""The process that does the jobs of /v1/merges, one after the other: `python -m service.merger`. It never loads torch;
each job has a process of its own that does (merge_job.py), and ends with it.

A job's files are made in merges/work/<id>.<attempt>/. A checkpoint's folder is then renamed to merges/<id>/ and the row
says so, or, where services share a blob store, its files go there as those of an upload do; an adapter is published
like an upload, in one transaction with the job's end. Whatever ends in between, the next attempt starts from nothing,
and what lies in the folder without a row that says so goes at the next start.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import signal
from collections.abc import Coroutine
from contextlib import AsyncExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec

from adapters.blobs import BlobStore, fsync_folder
from adapters.errors import AdapterRefused, LoraplexAdapterError, StoreUnavailable
from adapters.merge_request import METHODS
from adapters.peft_config import CONFIG_NAME
from service import log
from service.api.failure import ApiError
from service.children import Child
from service.engine.client import EngineClient
from service.engine.errors import EngineError
from service.jobs import Workers, WorkersUnavailable
from service.library import WEIGHTS, Library
from service.merge_task import BLOBS_URL, Priority, Said, Task, explain
from service.merges import remove_folder, require_space_for, stored_sources
from service.pace import keep_pace, measurable
from service.settings import Settings
from service.store.catalogue import Catalogue
from service.store.edits import Edits
from service.store.errors import CatalogueUnavailable, Conflict, NotFound, QuotaReached
from service.store.instances import instance_id
from service.store.merges import Job, JobLost
from service.uploads import Spool

POLL_S = 0.5
"""So often the table is asked for jobs, and for whether the running one is still wanted."""
WRITE_S = 1.0
"""The shortest time between two writes of progress."""
BEAT_S = 20.0
"""The longest."""
FAILURE_PAUSE_S = 5.0
STORE_TRIES = 10
STORE_PAUSE_S = 15.0
"""A store that does not answer is asked again so often, with this pause and its own retries of 20 s between."""
STORE_BEAT_S = 5.0
"""So often a job says that it is wanted while its files are on their way to the store."""

logger = log.get(__name__)


class Failed(Exception):  # noqa: N818 - it says what happened
    """The job cannot be done. str(): why, for whoever asked for it."""


class Interrupted(Exception):  # noqa: N818
    """The job's process was ended by something else; another attempt may get further."""


class Merger:
    """One at a time on a data folder. `workers`: the library's own."""

    def __init__(self, library: Library, workers: Workers, settings: Settings) -> None:
        self._library = library
        self._workers = workers
        self._catalogue = library.catalogue
        self._settings = settings
        self._folder = settings.merges_dir
        self._work = self._folder / "work"
        self._runner = instance_id(settings.uploads_dir)
        self._priority: Priority = settings.merge_priority
        if self._priority == "low" and not measurable():
            self._priority = "idle"  # rather late than in the way

    async def recover(self) -> None:
        """Sweeps what earlier attempts and deletions have left. No job may be running."""
        self._work.mkdir(parents=True, exist_ok=True)
        async with self._catalogue.merges() as table:
            keep = await table.checkpoints()
        await asyncio.to_thread(self._sweep, keep)

    def _sweep(self, keep: set[str]) -> None:
        for folder in [*self._folder.iterdir(), *self._work.iterdir()]:
            if folder != self._work and folder.name not in keep:
                logger.info("swept what a merge has left", folder=folder.name)
                remove_folder(folder)

    async def serve(self) -> None:
        """Does jobs until it is cancelled; the job that is then being done is queued again."""
        while True:
            try:
                job = await self._next()
                if job is not None:
                    await self._do(job)
                    continue
                await asyncio.sleep(POLL_S)
            except (CatalogueUnavailable, EngineError) as error:
                logger.warning("merges have to wait", reason=str(error))
                await asyncio.sleep(FAILURE_PAUSE_S)

    async def _next(self) -> Job | None:
        alone = not self._catalogue.shared
        async with self._catalogue.merges() as table:
            if not await table.waiting(self._runner, alone):
                return None
        await self._library.engine.wait_ready()  # what is merged has to fit its base
        async with self._catalogue.write() as edits:
            again, failed = await edits.merges.requeue(self._runner, alone)
            job = await edits.merges.claim(self._runner)
        for each in again:
            logger.warning("an interrupted merge is taken up again", merge=each.id, phase=each.phase)
        for each in failed:
            logger.error("a merge is given up", merge=each.id, attempts=each.attempt)
        return job

    # ------------------------------------------------------------ one job

    async def _do(self, job: Job) -> None:
        work = self._work / f"{job.id}.{job.attempt}"
        logger.info("merge started", merge=job.id, name=job.name, into=job.target, attempt=job.attempt)
        try:
            await self._attempt(job, work)
            logger.info("merge succeeded", merge=job.id)
        except JobLost:
            logger.info("merge cancelled", merge=job.id)
        except Interrupted as error:  # the row says running still: _next decides
            logger.warning("merge interrupted", merge=job.id, reason=str(error))
        except Failed as error:
            logger.error("merge failed", merge=job.id, reason=str(error))
            await asyncio.to_thread(remove_folder, work)  # on a full disk the row needs the room
            with contextlib.suppress(JobLost):
                async with self._catalogue.write() as edits:
                    await edits.merges.fail(job, str(error))
        except asyncio.CancelledError:
            async with self._catalogue.write() as edits:
                await edits.merges.give_back(job)
            raise
        finally:
            await asyncio.to_thread(remove_folder, work)

    async def _attempt(self, job: Job, work: Path) -> None:
        """Raises JobLost, Interrupted, Failed, and CatalogueUnavailable."""
        try:
            task = await self._task(job, work)
            files = await self._child(job, task, work)
            if job.target == "adapter":
                await self._publish(job, Path(task.out))
            else:
                await self._keep(job, Path(task.out), files)
        except (AdapterRefused, LoraplexAdapterError, OSError) as error:
            if not isinstance(error, LoraplexAdapterError) and not _full(error):
                logger.error("a merge met an error", merge=job.id, exc_info=error)
            raise Failed(explain(error)) from error
        except (NotFound, Conflict, QuotaReached, ApiError) as error:
            raise Failed(str(error)) from error
        except WorkersUnavailable as error:
            raise Interrupted(str(error)) from error

    async def _task(self, job: Job, work: Path) -> Task:
        sources = await stored_sources(self._library, job.sources, job.tenant)
        model = Path(self._settings.model)
        size = sum(self._bytes(sha) for source in sources for _, sha in source.files)
        await asyncio.to_thread(require_space_for, self._folder, job.target, model, size)
        out = work / "out"
        out.mkdir(parents=True)
        settings = self._settings
        task = Task(
            job.target, sources, self._library.engine.manifest, str(model), str(out), job.options,
            str(settings.blobs_dir), str(settings.cache_dir), settings.blob_cache_bytes, self._priority,
            (settings.log_level, settings.log_format),
        )  # fmt: skip
        (work / "task.json").write_bytes(msgspec.json.encode(task))
        return task

    def _bytes(self, sha: str) -> int:
        return self._library.blobs.size(sha)

    async def _child(self, job: Job, task: Task, work: Path) -> list[dict[str, Any]]:
        """Runs the job's process. The files of a checkpoint."""
        reading, writing = os.pipe()
        try:
            threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
            env = {**os.environ, **threads, BLOBS_URL: self._settings.blobs_url.get_secret_value()}
            arguments = str(writing), str(work / "task.json")
            child = await Child.start("merge", "service.merge_job", *arguments, env=env, pass_fds=[writing])
        except BaseException:
            os.close(reading)
            raise
        finally:
            os.close(writing)
        heard = Heard()
        helpers = [listening := asyncio.create_task(heard.listen(reading))]
        if self._priority == "low":
            helpers.append(asyncio.create_task(keep_pace(child)))
        try:
            await self._watch(job, child, heard)
            await listening
        finally:
            await child.kill()
            for helper in helpers:
                helper.cancel()
            await asyncio.gather(*helpers, return_exceptions=True)
        if heard.error:
            raise Failed(heard.error)
        if not heard.done:
            raise Interrupted(f"its process {child.outcome} while {heard.phase}")
        return heard.files

    async def _watch(self, job: Job, child: Child, heard: Heard) -> None:
        """Until the process has ended, writes down what it says. Raises JobLost when the job is no longer wanted."""
        ended = asyncio.create_task(child.wait())
        ended.add_done_callback(lambda _: heard.news.set())
        loop = asyncio.get_running_loop()
        phase, progress, written = job.phase, job.progress, loop.time()
        try:
            while not ended.done():
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(heard.news.wait(), POLL_S)
                heard.news.clear()
                since = loop.time() - written
                moved = heard.progress > progress and since >= WRITE_S
                if heard.phase != phase or moved or since >= BEAT_S:
                    await self._report(job, heard.phase, heard.progress)
                    phase, progress, written = heard.phase, heard.progress, loop.time()
                    continue
                async with self._catalogue.merges() as table:
                    if not await table.running(job):
                        raise JobLost
        finally:
            ended.cancel()

    async def _report(self, job: Job, phase: str, progress: float) -> None:
        async with self._catalogue.write() as edits:
            await edits.merges.report(job, phase, progress)

    # ------------------------------------------------------------ results

    async def _publish(self, job: Job, out: Path) -> None:
        await self._report(job, "publishing", 1.0)

        async def finish(edits: Edits, version: int) -> None:
            await edits.merges.succeed(job, version=version)

        await self._library.publish(
            job.name, out / CONFIG_NAME, {WEIGHTS: out / WEIGHTS}, None,
            make_default=True,  # also where an older version has these bytes
            description=job.description or None, provenance=provenance(job), also=finish, tenant=job.tenant,
        )  # fmt: skip

    async def _keep(self, job: Job, out: Path, files: list[dict[str, Any]]) -> None:
        """A checkpoint, where every service that knows of it finds it: in a store that they share, or in the folder."""
        await self._report(job, "publishing", 1.0)
        if isinstance(self._library.blobs, BlobStore):
            await self._keep_here(job, out, files)
            return
        paths = {str(file["sha256"]): out / file["name"] for file in files}

        async def finish(edits: Edits) -> None:
            await edits.merges.succeed(job, files=files, in_store=True)

        for attempt in range(1, STORE_TRIES + 1):
            try:
                await self._beating(job, self._library.keep(paths, finish))
                return
            except StoreUnavailable as error:  # what was computed is not thrown away for that
                logger.warning("a merged checkpoint cannot be stored", merge=job.id, attempt=attempt, reason=str(error))
                if attempt == STORE_TRIES:
                    raise Failed("The store of files does not answer, so the checkpoint could not be kept.") from error
                await asyncio.sleep(STORE_PAUSE_S)

    async def _beating(self, job: Job, work: Coroutine[Any, Any, None]) -> None:
        """Says meanwhile that the job goes on. Raises JobLost when it is no longer wanted, once `work` has ended."""
        task = asyncio.create_task(work)
        try:
            while not (await asyncio.wait([task], timeout=STORE_BEAT_S))[0]:
                await self._report(job, "publishing", 1.0)
        except BaseException:
            task.cancel()
            await asyncio.wait([task])
            raise
        task.result()

    async def _keep_here(self, job: Job, out: Path, files: list[dict[str, Any]]) -> None:
        final = self._folder / job.id
        try:
            await asyncio.to_thread(_move, out, final)
            async with self._catalogue.write() as edits:
                await edits.merges.succeed(job, files=files)
        except BaseException:
            # Unless it is the commit's answer that was lost: then the row needs the folder.
            async with self._catalogue.merges() as table:
                kept = job.id in await table.checkpoints()
            if not kept:
                await asyncio.to_thread(remove_folder, final)
            raise


class Heard:
    """What the job's process has said so far."""

    def __init__(self) -> None:
        self.phase = "starting"
        self.progress = 0.0
        self.done = False
        self.error = ""
        self.files: list[dict[str, Any]] = []
        self.news = asyncio.Event()

    async def listen(self, fd: int) -> None:
        """Until the other end is closed."""
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader(limit=1 << 24)
        transport, _ = await loop.connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(fd, "rb", buffering=0)
        )
        try:
            async for line in reader:
                if not line.endswith(b"\n"):
                    break  # it was killed in the middle of a word
                self._take(msgspec.json.decode(line, type=Said))
        finally:
            transport.close()

    def _take(self, said: Said) -> None:
        if said.phase:
            self.phase, self.progress = said.phase, max(said.progress, self.progress)
        self.done, self.error, self.files = said.done, said.error, said.files
        self.news.set()


def provenance(job: Job) -> dict[str, Any]:
    """What the version's spec says of its origin."""
    drawn = METHODS[str(job.options["method"])].prune == "random"
    seed = {"seed": 0} if drawn else {}
    return {"id": job.id, **seed, **job.options, "sources": [asdict(source) for source in job.sources]}


def _move(out: Path, final: Path) -> None:
    """Durable when it returns. What an earlier attempt has left there goes."""
    remove_folder(final)
    fsync_folder(out)
    out.rename(final)
    fsync_folder(final.parent)


def _full(error: OSError) -> bool:
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


async def run(settings: Settings) -> None:
    """Until SIGTERM."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with AsyncExitStack() as stack:
        for folder in (settings.data_dir, settings.uploads_dir):
            folder.mkdir(parents=True, exist_ok=True)
        engine = EngineClient(settings.engine_socket)
        catalogue = await Catalogue.open(settings.database_address(), with_tenants=settings.multi_tenant)
        stack.push_async_callback(catalogue.close)
        await engine.connect()
        stack.push_async_callback(engine.close)
        workers = Workers(1)
        stack.push_async_callback(workers.close)
        spool = Spool(settings.uploads_dir, settings.max_upload_bytes, 1)
        stack.callback(spool.close)
        spool.serve()
        base_name = settings.base_name()
        library = Library(catalogue, settings.open_blobs(), spool, workers, engine, base_name, settings.cache_dir)
        stack.push_async_callback(library.close)
        merger = Merger(library, workers, settings)
        await merger.recover()
        logger.info("merger started")
        serving = asyncio.create_task(merger.serve())
        stopping = asyncio.create_task(stop.wait())
        try:
            await asyncio.wait([serving, stopping], return_when=asyncio.FIRST_COMPLETED)
            if serving.done():
                serving.result()
        finally:
            for task in (serving, stopping):
                task.cancel()
            await asyncio.gather(serving, stopping, return_exceptions=True)


def main() -> None:
    settings = Settings.load()
    log.configure(settings)
    asyncio.run(run(settings))


# Its worker process imports this module again, under another name.
if __name__ == "__main__":
    main()

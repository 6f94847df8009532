"""The jobs of /v1/merges: rows of `merges` and `merge_sources`.

queued ── claim ──> running ──> succeeded | failed
   │  <── requeue ──   │
   └───────────────────┴──────> cancelled

Every change of a running job names the attempt that makes it, and changes nothing if the job is no longer running in
that attempt: whoever cancels a job, deletes it or gives it to another merger has the last word, at once.
"""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from service.store import quotas
from service.store.blob_book import BlobBook
from service.store.errors import Conflict, NotFound, VersionInUse, VersionNotFound
from service.store.records import Page
from service.store.tables import DEFAULT_TENANT, adapters, merge_files, merge_sources, merge_turns, merges, versions

State = Literal["queued", "running", "succeeded", "failed", "cancelled"]
STATES: tuple[State, ...] = ("queued", "running", "succeeded", "failed", "cancelled")
ACTIVE: tuple[State, ...] = ("queued", "running")

MAX_ATTEMPTS = 3
"""A job whose merger or process was killed so often has failed: it may be what kills them."""
LEASE_S = 120
"""A running job of another service that has not been heard of for so long is taken over."""


class MergeNotFound(NotFound):
    code = "merge_not_found"

    def __init__(self, identity: str) -> None:
        super().__init__(f"There is no merge {identity[:64]!r}.")


class MergeExists(Conflict):
    code = "merge_exists"
    param = "name"

    def __init__(self, name: str, identity: str, state: str) -> None:
        super().__init__(
            f"Merge {identity} makes a checkpoint named {name!r} ({state}). Delete it, or use another name."
        )


class KeyReused(Conflict):
    code = "idempotency_key_reused"
    param = "Idempotency-Key"

    def __init__(self, identity: str) -> None:
        super().__init__(f"This Idempotency-Key has started the merge {identity} with another body.")


class TooManyMerges(Exception):  # noqa: N818 - it says what happened
    """`count`: how many of the tenant's wait already."""

    def __init__(self, count: int) -> None:
        super().__init__(f"{count} merges are waiting, which is the limit")
        self.count = count


class JobLost(Exception):  # noqa: N818
    """The job is no longer this attempt's: cancelled, deleted or taken over."""


@dataclass(frozen=True, slots=True)
class Source:
    adapter: str
    version: int
    digest: str
    weight: float


@dataclass(frozen=True, slots=True)
class NewJob:
    """What a request asks for. `options`: fields of adapters.merge_request.MergeOptions that were given; `bytes` and
    `rank`: of the result, as far as is known (adapters/merge_plan.py)."""

    tenant: str
    name: str
    target: Literal["adapter", "checkpoint"]
    description: str
    options: dict[str, Any]
    sources: tuple[Source, ...]
    request_digest: str
    idempotency_key: str | None = None
    bytes: int = 0
    rank: int = 0


@dataclass(frozen=True, slots=True)
class Job:
    """A row. `number` orders jobs; `attempt` counts how often it was taken up. `bytes`: of a checkpoint."""

    number: int
    id: str
    tenant: str
    name: str
    target: Literal["adapter", "checkpoint"]
    description: str
    options: dict[str, Any]
    sources: tuple[Source, ...]
    request_digest: str
    state: State
    phase: str
    progress: float
    attempt: int
    runner: str | None
    error: str | None
    result_version: int | None
    files: tuple[dict[str, Any], ...]
    bytes: int
    created_at: int
    started_at: int | None
    finished_at: int | None

    @property
    def active(self) -> bool:
        return self.state in ACTIVE


class MergeTable:
    """One connection's view; changes need the write transaction of Catalogue.write."""

    def __init__(self, connection: AsyncConnection) -> None:
        self._connection = connection

    # ------------------------------------------------------------ requests

    async def by_key(self, key: str, tenant: str = DEFAULT_TENANT) -> Job | None:
        """The job that this Idempotency-Key has started."""
        return await self._one(merges.c.tenant == tenant, merges.c.idempotency_key == key)

    async def get(self, identity: str, tenant: str | None = DEFAULT_TENANT) -> Job:
        """`tenant` None: of any. Raises MergeNotFound."""
        job = await self._one(merges.c.id == identity, sa.true() if tenant is None else merges.c.tenant == tenant)
        if job is None:
            raise MergeNotFound(identity)
        return job

    async def add(self, new: NewJob, max_queued: int) -> Job:
        """Raises MergeExists for a checkpoint's name that is taken, VersionNotFound for a source that has been deleted
        since it was looked up, TooManyMerges, and QuotaReached for a result that the tenant may not keep. What a
        checkpoint will have is taken from the tenant's stored_bytes by this."""
        mine = merges.c.tenant == new.tenant
        for source in new.sources:
            found = (
                sa.select(versions.c.id)
                .join_from(adapters, versions, versions.c.adapter_id == adapters.c.id)
                .where(adapters.c.tenant == new.tenant, adapters.c.name == source.adapter)
                .where(versions.c.number == source.version, versions.c.digest == source.digest)
            )
            if (await self._connection.execute(found)).one_or_none() is None:
                raise VersionNotFound(source.adapter, source.version)
        if new.target == "checkpoint":
            taken = await self._one(
                mine, merges.c.target == "checkpoint", merges.c.name == new.name,
                merges.c.state.in_([*ACTIVE, "succeeded"]),
            )  # fmt: skip
            if taken is not None:
                raise MergeExists(new.name, taken.id, taken.state)
        waiting = sa.select(sa.func.count()).select_from(merges).where(mine, merges.c.state == "queued")
        count = int(await self._connection.scalar(waiting) or 0)
        if count >= max_queued:
            raise TooManyMerges(count)
        if new.target == "checkpoint":
            await quotas.require_bytes(self._connection, new.tenant, new.bytes)
        else:
            await quotas.require_adapter(self._connection, new.tenant, new.name, new.bytes, new.rank)
        identity = f"merge-{secrets.token_hex(12)}"
        result = await self._connection.execute(
            sa.insert(merges)
            .values(
                id=identity, tenant=new.tenant, name=new.name, target=new.target, description=new.description,
                options=new.options, idempotency_key=new.idempotency_key, request_digest=new.request_digest,
                state="queued", phase="queued", progress=0.0, attempts=0, files=[], created_at=_now(),
                bytes=new.bytes if new.target == "checkpoint" else 0,
            )
            .returning(merges.c.number)
        )  # fmt: skip
        number: int = result.scalar_one()
        await self._connection.execute(
            sa.insert(merge_sources),
            [
                {
                    "merge_number": number, "position": position, "adapter": source.adapter,
                    "version": source.version, "digest": source.digest, "weight": source.weight,
                }
                for position, source in enumerate(new.sources)
            ],
        )  # fmt: skip
        return await self.get(identity, new.tenant)

    async def page(self, limit: int, after: str | None, state: State | None, tenant: str = DEFAULT_TENANT) -> Page[Job]:
        """The newest first, those behind `after`. Raises MergeNotFound if that is gone."""
        conditions = [merges.c.tenant == tenant]
        if after is not None:
            conditions.append(merges.c.number < (await self.get(after, tenant)).number)
        if state is not None:
            conditions.append(merges.c.state == state)
        jobs = await self._jobs(*conditions, order=merges.c.number.desc(), limit=limit + 1)
        return Page(jobs[:limit], len(jobs) > limit)

    async def cancel(self, job: Job) -> None:
        await self._set(job, state="cancelled", phase="cancelled", finished_at=_now())

    async def remove(self, job: Job) -> None:
        await self._remove(merges.c.number == job.number)

    async def remove_all(self, tenant: str) -> list[str]:
        """Of a tenant that is deleted; their ids. A merge that runs finds that it is no more, and ends."""
        identities = await self._connection.scalars(sa.select(merges.c.id).where(merges.c.tenant == tenant))
        found = list(identities.all())
        await self._remove(merges.c.tenant == tenant)
        await self._connection.execute(sa.delete(merge_turns).where(merge_turns.c.tenant == tenant))
        return found

    async def _remove(self, which: sa.ColumnElement[bool]) -> None:
        """Also what is theirs in the blob store, unless somebody else needs it."""
        numbers = sa.select(merges.c.number).where(which)
        stored = await self._connection.scalars(
            sa.select(merge_files.c.sha256).where(merge_files.c.merge_number.in_(numbers)).distinct()
        )
        names = dict.fromkeys(stored.all(), False)
        for table in (merge_files, merge_sources):
            await self._connection.execute(sa.delete(table).where(table.c.merge_number.in_(numbers)))
        await self._connection.execute(sa.delete(merges).where(which))
        await BlobBook(self._connection).discard(names)

    async def count(self) -> dict[str, int]:
        """Jobs by state, of all tenants."""
        statement = sa.select(merges.c.state, sa.func.count()).group_by(merges.c.state)
        found = {state: int(number) for state, number in await self._connection.execute(statement)}
        return {state: found.get(state, 0) for state in STATES}

    # ------------------------------------------------------------ the merger

    async def waiting(self, runner: str, alone: bool) -> bool:
        """Whether `requeue` or `claim` would find something."""
        statement = sa.select(merges.c.number).where(
            sa.or_(merges.c.state == "queued", sa.and_(merges.c.state == "running", _abandoned(runner, alone)))
        )
        return (await self._connection.execute(statement.limit(1))).first() is not None

    async def claim(self, runner: str) -> Job | None:
        """A queued job, now running, or None. Tenants take turns: of those with the fewest merges running, the one
        whose last merge was begun before all others'; of its own, the oldest."""
        other = merges.alias()
        running = (
            sa.select(sa.func.count())
            .where(other.c.tenant == merges.c.tenant, other.c.state == "running")
            .scalar_subquery()
        )
        statement = (
            sa.select(merges.c.number)
            .join_from(merges, merge_turns, merge_turns.c.tenant == merges.c.tenant, isouter=True)
            .where(merges.c.state == "queued")
            .order_by(running, sa.func.coalesce(merge_turns.c.turn, 0), merges.c.number)
            .limit(1)
        )
        number = await self._connection.scalar(statement)
        job = None if number is None else await self._one(merges.c.number == number)
        if job is None:
            return None
        await self._set(
            job, state="running", phase="starting", progress=0.0, runner=runner, seen_at=_now(),
            attempts=merges.c.attempts + 1, started_at=job.started_at or _now(),
        )  # fmt: skip
        turn = int(await self._connection.scalar(sa.select(sa.func.max(merge_turns.c.turn))) or 0) + 1
        mine = sa.update(merge_turns).where(merge_turns.c.tenant == job.tenant).values(turn=turn)
        if (await self._connection.execute(mine)).rowcount == 0:
            await self._connection.execute(sa.insert(merge_turns).values(tenant=job.tenant, turn=turn))
        return await self.get(job.id, None)

    async def requeue(self, runner: str, alone: bool) -> tuple[list[Job], list[Job]]:
        """Running jobs that nobody runs any more, asked by a runner that runs none: its own, and those not heard of for
        LEASE_S, or all of them if it is the only one (`alone`).
        Gives (queued again, failed because they were taken up MAX_ATTEMPTS times)."""
        again, failed = [], []
        for job in await self._jobs(merges.c.state == "running", _abandoned(runner, alone), order=merges.c.number):
            if job.attempt >= MAX_ATTEMPTS:
                error = (
                    f"The merge was interrupted {job.attempt} times, the last time while {job.phase}; it is given up."
                )
                await self.fail(job, error)
                failed.append(job)
            else:
                await self._set(job, state="queued", phase="queued", progress=0.0, runner=None)
                again.append(job)
        return again, failed

    async def give_back(self, job: Job) -> None:
        """Queues the job again as if this attempt had not been: its merger was told to stop."""
        with contextlib.suppress(JobLost):
            await self._advance(
                job, state="queued", phase="queued", progress=0.0, runner=None, attempts=job.attempt - 1
            )

    async def running(self, job: Job) -> bool:
        """Whether the job is still running in this attempt."""
        statement = sa.select(merges.c.number).where(*_still(job))
        return (await self._connection.execute(statement)).one_or_none() is not None

    async def report(self, job: Job, phase: str, progress: float) -> None:
        """Raises JobLost."""
        await self._advance(job, phase=phase, progress=progress, seen_at=_now())

    async def fail(self, job: Job, error: str) -> None:
        """Raises JobLost."""
        await self._advance(job, state="failed", error=error, finished_at=_now())

    async def succeed(
        self, job: Job, *, version: int | None = None, files: Collection[dict[str, Any]] = (), in_store: bool = False
    ) -> None:
        """`in_store`: the files lie in the blob store, under their hashes. Raises JobLost, and QuotaReached for files
        that the tenant may not keep (any more)."""
        size = sum(int(file["bytes"]) for file in files)
        if files:
            await quotas.require_bytes(self._connection, job.tenant, size, instead_of=job.bytes)
        await self._advance(
            job, state="succeeded", phase="finished", progress=1.0, result_version=version, files=list(files),
            bytes=size, finished_at=_now(),
        )  # fmt: skip
        if in_store:
            names = sorted({str(file["sha256"]) for file in files})
            rows = [{"merge_number": job.number, "sha256": name} for name in names]
            await self._connection.execute(sa.insert(merge_files), rows)

    async def in_store(self, job: Job) -> bool:
        """Whether the checkpoint's files lie in the blob store, rather than in the data folder where it was made."""
        statement = sa.select(merge_files.c.sha256).where(merge_files.c.merge_number == job.number).limit(1)
        return (await self._connection.execute(statement)).first() is not None

    async def checkpoints(self) -> set[str]:
        """Ids of the jobs whose files are there for the taking."""
        statement = sa.select(merges.c.id).where(merges.c.state == "succeeded", merges.c.target == "checkpoint")
        return set((await self._connection.scalars(statement)).all())

    # ------------------------------------------------------------ parts

    async def _set(self, job: Job, **values: Any) -> None:
        await self._connection.execute(sa.update(merges).where(merges.c.number == job.number).values(**values))

    async def _advance(self, job: Job, **values: Any) -> None:
        result = await self._connection.execute(sa.update(merges).where(*_still(job)).values(**values))
        if result.rowcount == 0:
            raise JobLost

    async def _one(self, *conditions: sa.ColumnElement[bool]) -> Job | None:
        jobs = await self._jobs(*conditions, order=merges.c.number, limit=1)
        return jobs[0] if jobs else None

    async def _jobs(
        self, *conditions: sa.ColumnElement[bool], order: sa.ColumnElement[Any], limit: int | None = None
    ) -> list[Job]:
        statement = sa.select(merges).where(*conditions).order_by(order).limit(limit)
        rows = (await self._connection.execute(statement)).all()
        sources: dict[int, list[Source]] = {row.number: [] for row in rows}
        if rows:
            of = merge_sources.c.merge_number
            wanted = sa.select(merge_sources).where(of.in_(list(sources))).order_by(of, merge_sources.c.position)
            for row in await self._connection.execute(wanted):
                sources[row.merge_number].append(Source(row.adapter, row.version, row.digest, row.weight))
        return [
            Job(
                number=row.number, id=row.id, tenant=row.tenant, name=row.name, target=row.target,
                description=row.description, options=row.options, sources=tuple(sources[row.number]),
                request_digest=row.request_digest, state=row.state, phase=row.phase, progress=row.progress,
                attempt=row.attempts, runner=row.runner, error=row.error, result_version=row.result_version,
                files=tuple(row.files), bytes=row.bytes, created_at=row.created_at, started_at=row.started_at,
                finished_at=row.finished_at,
            )
            for row in rows
        ]  # fmt: skip


def _abandoned(runner: str, alone: bool) -> sa.ColumnElement[bool]:
    if alone:
        return sa.true()
    return sa.or_(merges.c.runner == runner, merges.c.seen_at < _now() - LEASE_S)


def _still(job: Job) -> tuple[sa.ColumnElement[bool], ...]:
    return (merges.c.number == job.number, merges.c.state == "running", merges.c.attempts == job.attempt)


async def require_no_merge(connection: AsyncConnection, tenant: str, adapter: str, version: int | None = None) -> None:
    """Raises VersionInUse while a queued or running merge reads the adapter, or that version of it."""
    statement = (
        sa.select(merges.c.id, merges.c.state, merge_sources.c.version)
        .join_from(merges, merge_sources, merge_sources.c.merge_number == merges.c.number)
        .where(merges.c.tenant == tenant, merges.c.state.in_(ACTIVE), merge_sources.c.adapter == adapter)
        .order_by(merges.c.number)
        .limit(1)
    )
    if version is not None:
        statement = statement.where(merge_sources.c.version == version)
    row = (await connection.execute(statement)).one_or_none()
    if row is not None:
        raise VersionInUse(
            f"Version {row.version} of adapter {adapter!r} is a source of the merge {row.id}, which is {row.state}. "
            "Wait for it, or cancel it first."
        )


def _now() -> int:
    return int(time.time())

"""The jobs of /v1/merges as rows: who has a job, and who no longer has it."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.config import Config

from service.store.catalogue import Catalogue
from service.store.database import Database, sqlite_url
from service.store.errors import VersionInUse, VersionNotFound
from service.store.merges import (
    MAX_ATTEMPTS,
    Job,
    JobLost,
    MergeExists,
    MergeNotFound,
    NewJob,
    Source,
    TooManyMerges,
)
from service.store.records import File, NewVersion
from service.store.revisions import MIGRATIONS

DIGEST = "d" * 64
NEW = NewJob("default", "out", "adapter", "", {"method": "linear"}, (Source("a", 1, DIGEST, 0.5),), "r" * 64)


@pytest.fixture
async def catalogue(tmp_path: Path) -> AsyncIterator[Catalogue]:
    opened = await Catalogue.open(sqlite_url(tmp_path / "catalogue.sqlite3"))
    async with opened.write() as edits:
        await edits.publish("a", NewVersion(DIGEST, "base", 8, {}, (File("f", "c" * 64, 1),)), default=True)
    yield opened
    await opened.close()


async def add(catalogue: Catalogue, new: NewJob = NEW, most: int = 9) -> Job:
    async with catalogue.write() as edits:
        return await edits.merges.add(new, most)


async def claim(catalogue: Catalogue, runner: str = "one") -> Job | None:
    async with catalogue.write() as edits:
        return await edits.merges.claim(runner)


async def get(catalogue: Catalogue, job: Job) -> Job:
    async with catalogue.merges() as table:
        return await table.get(job.id)


async def changed(catalogue: Catalogue, job: Job, change: str) -> None:
    """A change of the job, and another one in the same transaction."""
    arguments = {"report": ("x", 0.5), "fail": ("x",), "succeed": ()}[change]
    async with catalogue.write() as edits:
        await edits.set_alias("a", change, 1)
        await getattr(edits.merges, change)(job, *arguments)


async def test_jobs_are_taken_in_order_and_once(catalogue: Catalogue) -> None:
    jobs = [await add(catalogue) for _ in range(3)]
    taken = [await claim(catalogue) for _ in range(4)]
    assert [job and job.id for job in taken] == [*(job.id for job in jobs), None]
    assert all(job is not None and (job.state, job.attempt) == ("running", 1) for job in taken[:3])
    async with catalogue.merges() as table:
        assert await table.count() == {"queued": 0, "running": 3, "succeeded": 0, "failed": 0, "cancelled": 0}


async def begun(catalogue: Catalogue) -> str:
    """Of the next merge that is begun, the tenant; it has ended at once."""
    job = await claim(catalogue)
    assert job is not None
    async with catalogue.write() as edits:
        await edits.merges.succeed(job)
        await edits.merges.remove(job)  # whoever deletes what is done is not first again by that
    return job.tenant


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
async def test_tenants_take_turns(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Whoever has queued many before does not hold up the others: one of each in turn."""
    url = sqlite_url(tmp_path / "turns.sqlite3")
    if kind == "postgresql":
        url = request.getfixturevalue("postgres").create()
    catalogue = await Catalogue.open(url)
    try:
        for tenant in ("flood", "other", "third"):
            async with catalogue.write() as edits:
                new = NewVersion(DIGEST, "base", 8, {}, (File("f", "c" * 64, 1),))
                await edits.publish("a", new, default=True, tenant=tenant)
        for _ in range(6):
            await add(catalogue, replace(NEW, tenant="flood"), 64)
        assert [await begun(catalogue) for _ in range(2)] == ["flood", "flood"]
        for tenant in ("other", "other", "third"):
            await add(catalogue, replace(NEW, tenant=tenant))
        assert [await begun(catalogue) for _ in range(7)] == [
            "other", "third", "flood", "other", "flood", "flood", "flood",
        ]  # fmt: skip
        # With several services, whoever has a merge running lets the others go first.
        for tenant in ("flood", "flood", "other"):
            await add(catalogue, replace(NEW, tenant=tenant))
        taken = [await claim(catalogue, runner) for runner in ("one", "two", "three")]
        assert [job and job.tenant for job in taken] == ["other", "flood", "flood"]
    finally:
        await catalogue.close()


async def test_whoever_cancels_deletes_or_takes_over_has_the_last_word(catalogue: Catalogue) -> None:
    """The attempt that had the job can change nothing any more, and what it does along with it is undone."""
    for lost in ("cancel", "remove", "requeue"):
        await add(catalogue)
        job = await claim(catalogue)
        assert job is not None
        async with catalogue.write() as edits:
            if lost == "requeue":
                await edits.merges.requeue("one", True)
                assert (await edits.merges.claim("two")) is not None
            else:
                await getattr(edits.merges, lost)(job)
        for change in ("report", "fail", "succeed"):
            with pytest.raises(JobLost):
                await changed(catalogue, job, change)
        assert (await catalogue.get_adapter("a")).aliases == {}
        async with catalogue.merges() as table:
            assert not await table.running(job)


async def test_a_job_is_taken_up_three_times_and_then_fails(catalogue: Catalogue) -> None:
    await add(catalogue)
    for attempt in range(1, MAX_ATTEMPTS + 1):
        job = await claim(catalogue)
        assert job is not None
        assert job.attempt == attempt
        async with catalogue.write() as edits:
            await edits.merges.report(job, "merging", 0.5)
            again, failed = await edits.merges.requeue("one", False)
        assert [len(again), len(failed)] == ([1, 0] if attempt < MAX_ATTEMPTS else [0, 1])
    assert job is not None
    ended = await get(catalogue, job)
    assert (ended.state, ended.error) == (
        "failed", "The merge was interrupted 3 times, the last time while merging; it is given up.",
    )  # fmt: skip


async def test_another_runners_job_is_left_alone_while_it_is_heard_of(catalogue: Catalogue) -> None:
    await add(catalogue)
    job = await claim(catalogue, "one")
    assert job is not None
    async with catalogue.write() as edits:
        assert await edits.merges.requeue("two", False) == ([], [])
        assert not await edits.merges.waiting("two", False)
        await edits.merges.give_back(job)
    given_back = await claim(catalogue, "two")
    assert given_back is not None
    assert given_back.attempt == 1  # a stop is no failed attempt


async def test_sources_are_held_while_the_job_is_active(catalogue: Catalogue) -> None:
    job = await add(catalogue)
    for remove in ("remove_adapter", "remove_version"):
        with pytest.raises(VersionInUse, match=job.id):
            async with catalogue.write() as edits:
                await getattr(edits, remove)(*(("a",) if remove == "remove_adapter" else ("a", 1)))
    async with catalogue.write() as edits:
        await edits.merges.cancel(job)
        await edits.remove_adapter("a")
    assert (await get(catalogue, job)).sources == NEW.sources  # it still says what they were
    with pytest.raises(VersionNotFound):
        await add(catalogue)


async def test_names_keys_and_the_queue_have_limits(catalogue: Catalogue) -> None:
    checkpoint = replace(NEW, target="checkpoint")
    first = await add(catalogue, checkpoint)
    with pytest.raises(MergeExists, match=first.id):
        await add(catalogue, checkpoint)
    await add(catalogue, replace(checkpoint, name="other"))
    with pytest.raises(TooManyMerges):
        await add(catalogue, NEW, most=2)
    with pytest.raises(MergeNotFound):
        async with catalogue.merges() as table:
            await table.get(first.id, "somebody")
    async with catalogue.write() as edits:
        await edits.merges.cancel(first)
    keyed = await add(catalogue, replace(checkpoint, idempotency_key="k"))  # the name is free again
    async with catalogue.merges() as table:
        assert await table.by_key("k") == keyed
        assert await table.by_key("k", "somebody") is None
        assert await table.checkpoints() == set()


async def test_checkpoints_of_before_count_after_the_upgrade(tmp_path: Path) -> None:
    url = sqlite_url(tmp_path / "old.sqlite3")
    old = Database.unmigrated(url)

    def upgrade(connection: sa.Connection) -> None:
        config = Config()
        config.set_main_option("script_location", str(MIGRATIONS))
        config.attributes["connection"] = connection
        command.upgrade(config, "0005")

    files = json.dumps([{"name": name, "bytes": size, "sha256": name} for name, size in (("a", 7), ("b", 5))])
    async with old.write() as connection:
        await connection.run_sync(upgrade)
        await connection.execute(
            sa.text(
                "INSERT INTO merges (id, tenant, name, target, description, options, request_digest, state, phase, "
                "progress, attempts, files, created_at) VALUES ('m', 't', 'n', 'checkpoint', '', '{}', 'x', "
                "'succeeded', 'finished', 1, 1, :files, 1)"
            ),
            {"files": files},
        )
    await old.close()
    catalogue = await Catalogue.open(url)
    try:
        assert await catalogue.totals("t") == (0, 12)
    finally:
        await catalogue.close()

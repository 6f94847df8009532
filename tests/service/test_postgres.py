"""The catalogue when PostgreSQL is away, hangs, comes back, or is not what it should be."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from service.settings import Settings, SettingsError
from service.store.catalogue import Catalogue
from service.store.database import check
from service.store.errors import AdapterNotFound, CatalogueUnavailable, CatalogueUnusable, UnstorableText
from service.store.revisions import REVISIONS
from tests.real_parts import PASSWORD, Postgres

from .launch import run
from .test_catalogue import content, publish


@pytest.fixture
async def catalogue(postgres: Postgres) -> AsyncIterator[Catalogue]:
    opened = await Catalogue.open(postgres.create())
    yield opened
    await opened.close()


async def answers(catalogue: Catalogue, seconds: float = 60.0) -> None:
    """Waits until reads work; what they raise before has to say that the database is away."""
    until = time.monotonic() + seconds
    while True:
        try:
            await catalogue.resolve("law")
            return
        except CatalogueUnavailable:
            if time.monotonic() > until:
                raise
        await asyncio.sleep(0.1)


async def test_a_server_that_goes_and_comes_back(
    catalogue: Catalogue, postgres: Postgres, caplog: pytest.LogCaptureFixture
) -> None:
    await publish(catalogue, "law", 1)
    postgres.stop()
    try:
        for _ in range(3):
            with pytest.raises(CatalogueUnusable, match="does not answer"):
                await catalogue.resolve("law")
            with pytest.raises(CatalogueUnusable, match="does not answer"):
                await publish(catalogue, "law", 2)
    finally:
        postgres.start()
    await answers(catalogue)
    assert await publish(catalogue, "law", 2) == 2
    assert PASSWORD not in caplog.text


async def test_a_connection_that_is_cut_rolls_back(catalogue: Catalogue, postgres: Postgres) -> None:
    await publish(catalogue, "law", 1)
    with pytest.raises(CatalogueUnusable):  # noqa: PT012
        async with catalogue.write() as edits:
            await edits.change("law", description="half")
            name = catalogue._database.engine.url.database
            cut = f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'"
            await asyncio.to_thread(postgres.sql, cut)
            await edits.change("law", description="more")
    await answers(catalogue)
    assert (await catalogue.get_adapter("law")).description == ""
    async with catalogue.write() as edits:  # nobody holds the writers' lock
        await edits.change("law", description="whole")


async def test_a_server_that_hangs_is_found_out(
    catalogue: Catalogue, postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.store.database.STATEMENT_TIMEOUT_S", 1.0)
    monkeypatch.setattr("service.store.database.CONNECT_TIMEOUT_S", 1.0)
    impatient = await Catalogue.open(catalogue._database.engine.url.render_as_string(hide_password=False))
    try:
        await publish(impatient, "law", 1)
        postgres.freeze(True)
        try:
            with pytest.raises(CatalogueUnusable, match="does not answer"):
                await impatient.resolve("law")
        finally:
            postgres.freeze(False)
        await answers(impatient)
    finally:
        await impatient.close()


async def test_text_that_postgresql_cannot_hold(catalogue: Catalogue) -> None:
    await publish(catalogue, "law", 1)
    with pytest.raises(UnstorableText, match=r"U\+0000"):
        async with catalogue.write() as edits:
            await edits.change("law", description="a\0b")
    with pytest.raises(UnstorableText):
        await catalogue.list_adapters(label="a\0b")
    assert (await catalogue.get_adapter("law")).description == ""


async def test_names_are_ordered_by_their_bytes_in_any_language(postgres: Postgres) -> None:
    """As SQLite does; pages depend on it. A language's own order would put b between A and C."""
    url = postgres.create()
    opened = await Catalogue.open(url)
    try:
        for number, name in enumerate(("b", "C", "A", "a-b", "ab", "a.b")):
            await publish(opened, name, number)
        assert [a.name for a in (await opened.list_adapters()).items] == ["A", "C", "a-b", "a.b", "ab", "b"]
        assert [a.name for a in (await opened.list_adapters(after="C")).items] == ["a-b", "a.b", "ab", "b"]
        async with opened._database.read() as connection:
            columns = await connection.exec_driver_sql(
                "SELECT collation_name FROM information_schema.columns WHERE table_name = 'adapters' "
                "AND column_name = 'name'"
            )
            assert columns.scalar() == "C"
    finally:
        await opened.close()


async def test_every_migration_runs_on_what_the_one_before_has_left(postgres: Postgres) -> None:
    """Two instances that start at once migrate once."""
    url = postgres.create()
    both = await asyncio.gather(Catalogue.open(url), Catalogue.open(url))
    try:
        database = url.rpartition("/")[2]
        assert postgres.sql("SELECT version_num FROM alembic_version", database) == [[REVISIONS[-1]]]
        await publish(both[0], "law", 1)
        assert (await both[1].resolve("law")).digest == content(1).digest
    finally:
        for catalogue in both:
            await catalogue.close()


async def test_rows_of_another_process_are_seen_at_once(postgres: Postgres) -> None:
    url = postgres.create()
    one, other = await Catalogue.open(url), await Catalogue.open(url)
    try:
        for number in range(20):
            await publish(one, "law", number)
            assert (await other.resolve("law")).version == number + 1
        async with one.write() as edits:
            await edits.remove_adapter("law")
        with pytest.raises(AdapterNotFound):
            await other.resolve("law")
    finally:
        await one.close()
        await other.close()


@pytest.mark.parametrize(
    ("url", "what"),
    [
        ("postgresql://u:hidden-word@127.0.0.1:1/x", "Connect"),
        ("postgresql://u:hidden-word@no.such.host.invalid/x", "[Nn]ame"),
    ],
)
async def test_no_server(url: str, what: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG), pytest.raises(CatalogueUnusable) as caught:
        await check(url)
    assert "hidden-word" not in caplog.text + str(caught.value) + caught.value.reason


@pytest.mark.parametrize(
    ("key", "url"),
    [
        ("DATABASE_URL", "mysql://u:hidden-word@h/x"),
        ("DATABASE_URL", "postgresql://u:hidden-word/@h:port/x"),
        ("BLOBS_URL", "http://key:hidden-word@h/x"),
        ("BLOBS_URL", "s3://bucket/x?secret=hidden-word"),
    ],
)
def test_a_wrong_url_is_named_without_its_secrets(key: str, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"LORAPLEX_{key}", url)
    with pytest.raises(SettingsError, match=f"^LORAPLEX_{key}=\\(secret\\): ") as caught:
        Settings.load()
    assert "hidden-word" not in str(caught.value)


def _start(tmp_path: Path, url: str) -> subprocess.CompletedProcess[str]:
    flags = ("--data-dir", str(tmp_path / "data"), "--port", "0", "--simulated", "{}")
    return run("serve", *flags, timeout=120, LORAPLEX_DATABASE_URL=url)


def test_start_without_a_database_is_one_line_and_a_hint(tmp_path: Path, postgres: Postgres) -> None:
    for url, what in (
        ("postgresql://u:hidden-word@127.0.0.1:1/x", "Connect call failed"),
        (postgres.url("no_such_database"), "no_such_database"),
        (postgres.create().replace("loraplex:", "loraplex:hidden-word"), "password authentication failed"),
    ):
        done = _start(tmp_path, url)
        assert done.returncode == 1
        text = done.stdout
        line = next(line for line in text.splitlines() if "LORAPLEX_DATABASE_URL" in line)
        assert line.startswith("loraplex: LORAPLEX_DATABASE_URL: the database cannot be used: ")
        assert what in " ".join(text.split()), text
        assert "Traceback" not in text
        assert "hidden-word" not in text
        assert PASSWORD not in text


async def test_start_with_the_database_of_a_newer_version(tmp_path: Path, postgres: Postgres) -> None:
    url = postgres.create()
    await (await Catalogue.open(url)).close()
    postgres.sql("UPDATE alembic_version SET version_num = '9999'", url.rpartition("/")[2])
    done = await asyncio.to_thread(_start, tmp_path, url)
    text = " ".join(done.stdout.split())
    assert done.returncode == 1
    assert "revision 9999, which is newer than this version" in text
    assert "docs/operations.md" in text

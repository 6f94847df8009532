"""The catalogue on real databases, SQLite and PostgreSQL: model strings, pages, numbers, transactions."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import sqlite3
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy.dialects import postgresql
from sqlalchemy.schema import CreateIndex, CreateTable

import service.store.database
from service.store.backup import Damaged, Missing, backup_path, check_and_copy
from service.store.catalogue import Catalogue
from service.store.database import check, sqlite_url
from service.store.errors import (
    AdapterNotFound,
    AliasNotFound,
    CatalogueBusy,
    CatalogueDamaged,
    CatalogueFull,
    CatalogueTooNew,
    PreconditionFailed,
    VersionInUse,
    VersionNotFound,
    WrongBase,
)
from service.store.names import parse_selector, valid_alias, valid_name
from service.store.records import File, NewVersion
from service.store.revisions import REVISION
from service.store.tables import metadata
from service.store.tenants import Tenants
from service.store.usage import Owner
from tests.real_parts import Postgres


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database."""
    if request.param == "sqlite":
        return sqlite_url(tmp_path / "catalogue.sqlite3")
    postgres: Postgres = request.getfixturevalue("postgres")
    return postgres.create()


@pytest.fixture
async def catalogue(url: str) -> AsyncIterator[Catalogue]:
    opened = await Catalogue.open(url)
    yield opened
    await opened.close()


def content(number: int, fingerprint: str = "base") -> NewVersion:
    """A version whose weights are its own and whose configuration all versions share."""
    files = (File("adapter_config.json", "c" * 64, 100), File("adapter_model.safetensors", f"{number:064x}", 1000))
    return NewVersion(f"{number:x}".rjust(64, "d"), fingerprint, 8, {"rank": 8}, files)


async def publish(catalogue: Catalogue, name: str, number: int, *, default: bool = True, **kwargs: str) -> int:
    async with catalogue.write() as edits:
        return await edits.publish(name, content(number, **kwargs), default=default)


async def test_model_strings(catalogue: Catalogue) -> None:
    for number in (1, 2, 3):
        assert await publish(catalogue, "law", number, default=number != 3) == number
    async with catalogue.write() as edits:
        assert await edits.set_alias("law", "prod", 1)
        assert not await edits.set_alias("law", "prod", 3)
    for model, version in (("law", 2), ("law@1", 1), ("law@2", 2), ("law@03", 3), ("law@prod", 3)):
        found = await catalogue.resolve(model)
        assert (found.name, found.version, found.digest) == ("law", version, content(version).digest)
    for model in ("law@4", "law@0", "law@", "law@test", "law@prod@1", "law@-1", "law@99999999999999999999"):
        with pytest.raises(VersionNotFound) as missing:
            await catalogue.resolve(model)
        assert str(missing.value.selector) == model.partition("@")[2]
    for model in ("law2", "", "@1", "no/slash", "Law", "x" * 97, "law\n", "nö", "other@1"):
        with pytest.raises(AdapterNotFound):
            await catalogue.resolve(model)


async def test_base_is_checked(catalogue: Catalogue) -> None:
    await publish(catalogue, "law", 1, fingerprint="old")
    found = await catalogue.resolve("law")
    found.require_base("old")
    with pytest.raises(WrongBase, match="another base"):
        found.require_base("new")


async def test_a_base_that_has_another_fingerprint_since_an_upgrade(catalogue: Catalogue) -> None:
    """What is stored with a former one fits before and after it has been given the new one."""
    await publish(catalogue, "law", 1, fingerprint="former")
    await publish(catalogue, "other", 2, fingerprint="another base")
    async with catalogue.write() as edits:
        await edits.change("law", pinned=True)
    known = ("new", "former")
    assert [adapter.name for adapter in (await catalogue.list_adapters(fingerprints=known)).items] == ["law"]
    assert [found.digest for found in await catalogue.pinned(known)] == [content(1).digest]
    (await catalogue.resolve("law")).require_base(*known)
    etag = (await catalogue.get_adapter("law")).etag
    assert await catalogue.adopt("new", []) == 0
    assert await catalogue.adopt("new", ["former", "older"]) == 1
    assert await catalogue.adopt("new", ["former", "older"]) == 0
    found = await catalogue.resolve("law")
    found.require_base("new")
    assert not found.fits("former"), "a base that only the former fingerprint takes for the same"
    assert (await catalogue.get_adapter("law")).etag == etag
    assert not (await catalogue.resolve("other")).fits(*known)


async def test_the_same_content_for_a_new_base(catalogue: Catalogue) -> None:
    await publish(catalogue, "law", 1, fingerprint="old")
    etag = (await catalogue.get_adapter("law")).etag
    async with catalogue.write() as edits:
        await edits.revalidate("law", 1, content(1, "old"))
    assert (await catalogue.get_adapter("law")).etag == etag
    async with catalogue.write() as edits:
        await edits.revalidate("law", 1, content(1, "new"))
    (await catalogue.resolve("law")).require_base("new")
    assert (await catalogue.get_adapter("law")).etag != etag


async def test_tenants_do_not_see_each_other(catalogue: Catalogue) -> None:
    async with catalogue.write() as edits:
        await edits.publish("law", content(1), default=True, tenant="one")
        await edits.publish("law", content(2), default=True, tenant="two")
    assert (await catalogue.resolve("law", "one")).digest == content(1).digest
    assert (await catalogue.resolve("law", "two")).digest == content(2).digest
    with pytest.raises(AdapterNotFound):
        await catalogue.resolve("law")
    assert (await catalogue.list_adapters()).items == []


async def test_pages_and_filters(catalogue: Catalogue) -> None:
    names = [f"a{i:02d}" for i in range(25)]
    for i, name in enumerate(reversed(names)):
        await publish(catalogue, name, i, fingerprint="old" if i % 5 == 0 else "base")
        async with catalogue.write() as edits:
            await edits.change(name, new_labels={"team": "red" if i % 2 else "blue"} | ({"x": "1"} if i == 3 else {}))
    seen: list[str] = []
    after = None
    while True:
        page = await catalogue.list_adapters(10, after)
        seen += [adapter.name for adapter in page.items]
        after = seen[-1]
        if not page.has_more:
            break
    assert seen == names
    assert not (await catalogue.list_adapters(25)).has_more
    assert len((await catalogue.list_adapters(100, label="team=red")).items) == 12
    assert len((await catalogue.list_adapters(100, label="team")).items) == 25
    assert [a.labels for a in (await catalogue.list_adapters(100, label="x")).items] == [{"team": "red", "x": "1"}]
    assert (await catalogue.list_adapters(100, label="team=")).items == []
    assert len((await catalogue.list_adapters(100, fingerprints=["base"])).items) == 20
    assert len((await catalogue.list_adapters(100, fingerprints=["base"], other_base=True)).items) == 5


async def test_versions_with_files_and_aliases(catalogue: Catalogue) -> None:
    for number in range(1, 6):
        await publish(catalogue, "law", number)
    async with catalogue.write() as edits:
        await edits.set_alias("law", "b", 4)
        await edits.set_alias("law", "a", 4)
    page = await catalogue.list_versions("law", 2, 2)
    assert [version.number for version in page.items] == [3, 4]
    assert page.has_more
    assert page.items[1].aliases == ("a", "b")
    assert page.items[0].files == content(3).files
    assert (await catalogue.get_version("law", "a")).number == 4
    with pytest.raises(VersionNotFound):
        await catalogue.get_version("law", 6)
    with pytest.raises(AdapterNotFound):
        await catalogue.list_versions("other")
    adapter = await catalogue.get_adapter("law")
    assert adapter.versions == (1, 2, 3, 4, 5)
    assert adapter.aliases == {"a": 4, "b": 4}


async def test_numbers_and_etags_are_never_used_again(catalogue: Catalogue) -> None:
    for number in (1, 2, 3):
        await publish(catalogue, "law", number)
    etags = {(await catalogue.get_adapter("law")).etag}
    async with catalogue.write() as edits:
        await edits.change("law", default_version=1)
        removed = await edits.remove_version("law", 3)
    assert removed.digests == {3: content(3).digest}
    assert removed.unused == {content(3).digest, content(3).files[1].sha256}
    assert (removed.freed_files, removed.freed_bytes, removed.adapter_gone) == (1, 1000, False)
    assert await publish(catalogue, "law", 4) == 4
    etags.add((await catalogue.get_adapter("law")).etag)
    async with catalogue.write() as edits:
        removed = await edits.remove_adapter("law")
    assert removed.adapter_gone
    assert (removed.freed_files, removed.freed_bytes) == (4, 3100)
    assert await publish(catalogue, "law", 1) == 5
    adapter = await catalogue.get_adapter("law")
    assert adapter.default_version == 5
    etags.add(adapter.etag)
    assert len(etags) == 3


async def test_shared_content_is_not_freed(catalogue: Catalogue) -> None:
    await publish(catalogue, "one", 1)
    await publish(catalogue, "two", 1)
    async with catalogue.write() as edits:
        removed = await edits.remove_adapter("one")
    assert (removed.unused, removed.freed_bytes) == (frozenset(), 0)
    async with catalogue.write() as edits:
        assert await edits.referenced() == {content(1).digest, *(file.sha256 for file in content(1).files)}


async def test_versions_in_use_stay(catalogue: Catalogue) -> None:
    await publish(catalogue, "law", 1)
    await publish(catalogue, "law", 2)
    with pytest.raises(VersionInUse, match="default"):
        async with catalogue.write() as edits:
            await edits.remove_version("law", 2)
    async with catalogue.write() as edits:
        await edits.set_alias("law", "prod", 1)
    with pytest.raises(VersionInUse, match="prod"):
        async with catalogue.write() as edits:
            await edits.remove_version("law", 1)
    with pytest.raises(AliasNotFound):
        async with catalogue.write() as edits:
            await edits.remove_alias("law", "test")
    async with catalogue.write() as edits:
        await edits.remove_alias("law", "prod")
        await edits.remove_version("law", 1)
        removed = await edits.remove_version("law", 2)
    assert removed.adapter_gone
    with pytest.raises(AdapterNotFound):
        await catalogue.resolve("law")


async def test_conditions(catalogue: Catalogue) -> None:
    await publish(catalogue, "law", 1)
    etag = (await catalogue.get_adapter("law")).etag
    async with catalogue.write() as edits:
        await edits.change("law", description="new", condition=lambda seen: seen == etag)
    with pytest.raises(PreconditionFailed):
        async with catalogue.write() as edits:
            await edits.change("law", description="newer", condition=lambda seen: seen == etag)
    assert (await catalogue.get_adapter("law")).description == "new"
    with pytest.raises(PreconditionFailed):
        async with catalogue.write() as edits:
            await edits.find_content("other", "d", condition=lambda seen: seen is not None)


async def test_a_failed_block_changes_nothing(catalogue: Catalogue) -> None:
    await publish(catalogue, "law", 1)
    with pytest.raises(RuntimeError, match="stop"):  # noqa: PT012
        async with catalogue.write() as edits:
            await edits.publish("law", content(2), default=True)
            await edits.publish("new", content(3), default=True)
            raise RuntimeError("stop")
    with pytest.raises(VersionNotFound):
        async with catalogue.write() as edits:
            await edits.change("law", description="half", default_version=7)
    assert (await catalogue.get_adapter("law")).versions == (1,)
    assert (await catalogue.get_adapter("law")).description == ""
    with pytest.raises(AdapterNotFound):
        await catalogue.resolve("new")
    assert await publish(catalogue, "law", 4) == 2


async def test_writers_of_two_processes_take_turns(catalogue: Catalogue, url: str) -> None:
    """Two pools on one database, as two API processes have; reads go on while a writer holds the lock."""
    other = await Catalogue.open(url)
    try:
        numbers = await asyncio.gather(*(publish((catalogue, other)[i % 2], "law", i) for i in range(20)))
        assert sorted(numbers) == list(range(1, 21))
        async with catalogue.write() as edits:
            await edits.change("law", description="unseen")
            assert (await other.get_adapter("law")).description == ""
        assert (await other.get_adapter("law")).description == "unseen"
        await asyncio.gather(*(other.resolve(f"law@{1 + i % 20}") for i in range(100)))
    finally:
        await other.close()


async def test_another_process_is_seen_at_once(catalogue: Catalogue, url: str) -> None:
    """Names are resolved on a connection that stays open (SQLite): none of its reads may see a state of before."""
    await publish(catalogue, "law", 1)
    other = await Catalogue.open(url)
    try:
        for number in (2, 3):
            assert (await catalogue.resolve("law")).version == number - 1
            assert await publish(other, "law", number) == number
            assert (await catalogue.resolve("law")).version == number
        async with catalogue.write() as edits:
            await edits.set_alias("law", "prod", 2)
            with pytest.raises(VersionNotFound):  # not committed yet, and nobody waits for that
                await catalogue.resolve("law@prod")
        assert (await catalogue.resolve("law@prod")).version == 2
        with contextlib.suppress(RuntimeError):
            async with other.write() as edits:
                await edits.set_alias("law", "prod", 3)
                raise RuntimeError("rolled back")
        assert (await catalogue.resolve("law@prod")).version == 2
        async with other.write() as edits:
            await edits.remove_adapter("law")
        for model in ("law", "law@1", "law@prod"):
            with pytest.raises(AdapterNotFound):
                await catalogue.resolve(model)
    finally:
        await other.close()


async def test_rows_hold_together(catalogue: Catalogue) -> None:
    """The database itself refuses what the code should never do: SQLite runs with foreign keys, WAL and full syncs."""
    await publish(catalogue, "law", 1)
    if not catalogue.shared:
        async with catalogue._database.read() as connection:
            assert (await connection.exec_driver_sql("PRAGMA foreign_keys")).scalar() == 1
            assert (await connection.exec_driver_sql("PRAGMA journal_mode")).scalar() == "wal"
            assert (await connection.exec_driver_sql("PRAGMA synchronous")).scalar() == 2
    with pytest.raises(sa.exc.IntegrityError):
        async with catalogue._database.write() as connection:
            await connection.exec_driver_sql("DELETE FROM adapters")
    with pytest.raises(sa.exc.IntegrityError):
        async with catalogue.write() as edits:
            await edits.publish("law", replace(content(1)), default=True)


async def test_migrations_make_the_tables_of_the_code(catalogue: Catalogue) -> None:
    async with catalogue._database.read() as connection:
        difference = await connection.run_sync(
            lambda sync: compare_metadata(MigrationContext.configure(sync, opts={"compare_type": True}), metadata)
        )
    assert difference == []


def test_the_newest_revision_is_the_one_that_is_looked_for() -> None:
    folder = Path(service.store.database.__file__).parent / "migrations"
    config = Config()
    config.set_main_option("script_location", str(folder))
    assert ScriptDirectory.from_config(config).get_heads() == [REVISION]


async def test_failures_of_sqlite_are_said_to_be_that(tmp_path: Path) -> None:
    """Real ones: a file that may not grow, another writer that does not end, pages of garbage. Those of PostgreSQL are
    in test_postgres.py."""
    path = tmp_path / "catalogue.sqlite3"
    opened = await Catalogue.open(sqlite_url(path))
    await publish(opened, "law", 1)
    await opened.close()
    opened = await Catalogue.open(sqlite_url(path))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(CatalogueFull):
            await publish(opened, "law", 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (await opened.resolve("law")).version == 1
    assert await publish(opened, "law", 2) == 2, "the failed one has left nothing"

    async with opened._database.engine.connect() as connection:
        await connection.exec_driver_sql("PRAGMA busy_timeout = 50")
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(CatalogueBusy):
        await publish(opened, "law", 3)
    other.execute("ROLLBACK")
    other.close()
    await opened.close()

    data = bytearray(path.read_bytes())
    data[4096:] = bytes(len(data) - 4096)
    path.write_bytes(data)
    with pytest.raises(CatalogueDamaged):
        await (await Catalogue.open(sqlite_url(path))).resolve("law")


async def test_updated_never_goes_back(catalogue: Catalogue, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1_700_000_000
    for jump, expected in ((0, 0), (3600, 3600), (-7200, 3600), (3700, 3700)):
        monkeypatch.setattr(time, "time", lambda jump=jump: now + jump)
        await publish(catalogue, "law", jump + 10_000)
        assert (await catalogue.get_adapter("law")).updated_at == now + expected


def test_the_check_at_start(tmp_path: Path) -> None:
    catalogue, blobs = tmp_path / "catalogue.sqlite3", tmp_path / "blobs"
    copy = backup_path(catalogue)
    assert not check_and_copy(catalogue, blobs), "a first start"
    with contextlib.closing(sqlite3.connect(catalogue)) as connection:
        connection.execute("CREATE TABLE t AS SELECT 1 AS x")
        connection.commit()
    assert check_and_copy(catalogue, blobs)
    with contextlib.closing(sqlite3.connect(copy)) as connection:
        assert connection.execute("SELECT x FROM t").fetchall() == [(1,)]
    whole = copy.read_bytes()
    with contextlib.closing(sqlite3.connect(catalogue)) as connection:
        connection.execute("CREATE TABLE alembic_version AS SELECT '9999' AS version_num")
        connection.commit()
    with pytest.raises(CatalogueTooNew, match="9999"):
        check_and_copy(catalogue, blobs)
    assert copy.read_bytes() == whole, "the backup of a version before is not lost"
    with contextlib.closing(sqlite3.connect(catalogue)) as connection:
        connection.execute("UPDATE alembic_version SET version_num = ?", (REVISION,))
        connection.commit()
    assert check_and_copy(catalogue, blobs)
    whole = copy.read_bytes()
    catalogue.write_bytes(b"x" * 10_000)
    with pytest.raises(Damaged, match=f"^{catalogue} is damaged: "):
        check_and_copy(catalogue, blobs)
    assert copy.read_bytes() == whole, "a damaged catalogue does not become the backup"
    catalogue.unlink()
    (blobs / "ab").mkdir(parents=True)
    assert not check_and_copy(catalogue, blobs)
    (blobs / "ab" / ("ab" * 32)).touch()
    with pytest.raises(Missing, match=f"{blobs} holds adapters"):
        check_and_copy(catalogue, blobs)
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".new"] == []


async def test_opening_again_keeps_everything(catalogue: Catalogue, url: str) -> None:
    await publish(catalogue, "law", 1)
    await catalogue.close()
    again = await Catalogue.open(url.replace("+aiosqlite", ""))
    assert (await again.resolve("law")).version == 1
    await again.close()


async def test_a_newer_schema_is_refused(catalogue: Catalogue, url: str) -> None:
    await check(url)
    async with catalogue._database.write() as connection:
        await connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
    for attempt in (check, Catalogue.open):
        with pytest.raises(CatalogueTooNew, match="9999"):
            await attempt(url)


async def test_resolve_is_one_statement_over_indices(catalogue: Catalogue) -> None:
    await publish(catalogue, "law", 1)
    async with catalogue.write() as edits:
        await edits.set_alias("law", "prod", 1)
    statements: list[tuple[str, tuple]] = []
    engine = catalogue._database.engine

    def record(_conn, _cursor, statement, parameters, _context, _many) -> None:  # type: ignore[no-untyped-def]
        statements.append((statement, parameters))

    listened = engine.sync_engine
    if not catalogue.shared:
        await catalogue.resolve("law")
        here = catalogue._database._here
        assert here is not None
        listened = here.engine
    sa.event.listen(listened, "before_cursor_execute", record)
    for model in ("law", "law@1", "law@prod"):
        await catalogue.resolve(model)
    sa.event.remove(listened, "before_cursor_execute", record)
    assert len(statements) == 3
    async with catalogue._database.read() as connection:
        if catalogue.shared:  # a planner that knows that the tables are empty would scan them
            await connection.exec_driver_sql("SET enable_seqscan = off")
        for statement, parameters in statements:
            if catalogue.shared:
                plan = (await connection.exec_driver_sql(f"EXPLAIN {statement}", parameters)).all()
                assert not any("Seq Scan" in row[0] for row in plan), plan
            else:
                plan = (await connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters)).all()
                assert all("SEARCH" in row[3] for row in plan), plan


def test_the_schema_compiles_for_postgresql() -> None:
    dialect = postgresql.dialect()  # type: ignore[no-untyped-call]
    text = ""
    for table in metadata.sorted_tables:
        text += str(CreateTable(table).compile(dialect=dialect))
        for index in table.indexes:
            text += str(CreateIndex(index).compile(dialect=dialect))
    assert "SERIAL" in text
    assert "BIGINT" in text


def test_names() -> None:
    assert all(map(valid_name, ("a", "9", "A.b_c-d", "x" * 96)))
    assert not any(map(valid_name, ("", ".a", "-a", "_a", "a b", "a/b", "a@1", "x" * 97, "a\n", "ä")))
    assert valid_alias("v1")
    assert not valid_alias("1v")
    assert parse_selector("007") == 7
    for text in ("0", "", "1a", "²", "٣"):
        with pytest.raises(ValueError, match="neither"):
            parse_selector(text)


async def test_owners_and_what_the_engine_knows_adapters_by(url: str) -> None:
    catalogue = await Catalogue.open(url, with_tenants=True)
    try:
        rows = Tenants(catalogue.database)
        numbers = {}
        for name, limits in (("alpha", {"resident_bytes": 7}), ("beta", {})):
            numbers[name] = (await rows.create(name, 1.0, limits)).number
            async with catalogue.write() as edits:
                for adapter in ("first", "again"):
                    await edits.publish(adapter, content(1), default=True, tenant=name)
                await edits.change("again", pinned=True, tenant=name)
        alpha, beta = (f"{content(1).digest}@{number}" for number in numbers.values())
        found = await catalogue.resolve("alpha/first", "beta", None)
        assert (found.key, found.resident_limits) == (alpha, {str(numbers["alpha"]): 7})
        assert (await catalogue.resolve("first@1", "beta")).resident_limits == {str(numbers["beta"]): None}
        assert {each.key for each in await catalogue.pinned(("base",))} == {alpha, beta}
        assert {each.default.key for each in (await catalogue.list_adapters(others=True)).items} == {alpha, beta}
        assert (await catalogue.get_version("first", 1, "beta")).key == beta
        # Each owner's own, the oldest of several; and the owner of what it has no more.
        gone, nobody = f"{content(9).digest}@{numbers['beta']}", f"{content(1).digest}@999"
        first, second = (Owner(numbers[name], name) for name in ("alpha", "beta"))
        owners = await catalogue.owners([alpha, beta, gone, nobody])
        assert owners == {alpha: (first, "first"), beta: (second, "first"), gone: (second, None)}
        async with catalogue.write() as edits:
            removed = await edits.remove_adapter("first", "alpha")
        assert (removed.owner, removed.unused) == (numbers["alpha"], frozenset())
        assert (await catalogue.owners([alpha])) == {alpha: (first, "again")}
        # The same rows for a single user: the content is all there is to say.
        alone = Catalogue(catalogue.database)
        found = await alone.resolve("alpha/again", "alpha")
        assert (found.key, found.resident_limits) == (content(1).digest, {})
        assert await alone.owners([content(1).digest]) == {content(1).digest: (first, "again")}
    finally:
        await catalogue.close()

"""service/store/usage.py on real databases: sums, groups and ranges."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.config import Config

from service.store import usage
from service.store.database import Database, sqlite_url
from service.store.revisions import MIGRATIONS
from service.store.tables import tenants
from service.store.usage import DAY_S, HOUR_S, Counts, Owner
from tests.real_parts import Postgres


@pytest.fixture(params=["sqlite", "postgresql"])
async def database(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Database]:
    if request.param == "sqlite":
        url = sqlite_url(tmp_path / "catalogue.sqlite3")
    else:
        postgres: Postgres = request.getfixturevalue("postgres")
        url = postgres.create()
    opened = await Database.open(url)
    yield opened
    await opened.close()


async def read(database: Database, **query: Any) -> list[dict[str, Any]]:
    asked = {"start": 0, "end": 10 * DAY_S, "tenant": None, "group_by": (), "limit": 100} | query
    async with database.read() as connection:
        return await usage.read(connection, **asked)


NUMBERS = {"a": 11, "b": 12}


async def add(database: Database, *rows: tuple[int, str, str, str, Counts]) -> None:
    async with database.write() as connection:
        counts = {(hour, Owner(NUMBERS[name], name), *rest): sums for hour, name, *rest, sums in rows}
        await usage.add(connection, counts)  # type: ignore[arg-type]


ONE = Counts(1, 10, 4, 20, 1, 50.0, 0, 0.0)


async def test_rows_add_up(database: Database) -> None:
    await add(database, (0, "a", "k", "x", ONE))
    await add(database, (0, "a", "k", "x", ONE), (0, "a", "k", "y", ONE))
    await add(database)
    rows = await read(database, group_by=("adapter",))
    assert [row["adapter"] for row in rows] == ["x", "y"]
    assert rows[0] == {"adapter": "x", **{name: 2 * getattr(ONE, name) for name in usage.COUNTS}}
    assert usage.total(rows) == Counts(3, 30, 12, 60, 3, 150.0, 0, 0.0)


async def test_writers_at_once_lose_nothing(database: Database) -> None:
    await asyncio.gather(*(add(database, (0, "a", "", "", ONE)) for _ in range(20)))
    assert (await read(database))[0]["requests"] == 20


async def test_groups_ranges_and_tenants(database: Database) -> None:
    for tenant in ("a", "b"):
        for hour in (0, 1, 25):
            for key in ("k1", "k2"):
                await add(database, (hour * HOUR_S, tenant, key, "x", ONE))
    assert (await read(database))[0]["requests"] == 12
    assert (await read(database, tenant=11))[0]["requests"] == 6
    assert (await read(database, end=HOUR_S))[0]["requests"] == 4
    assert (await read(database, start=HOUR_S, end=2 * HOUR_S, tenant=12))[0]["requests"] == 2
    days = await read(database, group_by=("day", "tenant"))
    assert [(row["day"], row["tenant"], row["requests"]) for row in days] == [
        (0, "a", 4), (0, "b", 4), (DAY_S, "a", 2), (DAY_S, "b", 2),
    ]  # fmt: skip
    hours = await read(database, group_by=("hour", "key"), tenant=11, limit=3, offset=1)
    assert [(row["hour"], row["key"]) for row in hours] == [(0, "k2"), (HOUR_S, "k1"), (HOUR_S, "k2")]


async def test_a_range_without_use_is_zero(database: Database) -> None:
    assert usage.total(await read(database)) == Counts()
    assert await read(database, group_by=("tenant",)) == []


async def test_old_hours_can_be_forgotten(database: Database) -> None:
    await add(database, (0, "a", "", "", ONE), (HOUR_S, "a", "", "", ONE))
    async with database.write() as connection:
        assert await usage.forget(connection, HOUR_S) == 1
    assert (await read(database))[0]["requests"] == 1


async def test_a_new_tenant_with_an_old_name_has_rows_of_its_own(database: Database) -> None:
    async with database.write() as connection:
        row = {"id": "acme", "weight": 1.0, "limits": {}, "disabled": False, "created_at": 0}
        number = (await connection.execute(sa.insert(tenants).values(row).returning(tenants.c.number))).scalar_one()
        old = Owner(number + 100, "acme")
        await usage.add(connection, {(0, old, "k", "secret"): ONE, (0, Owner(number, "acme"), "", ""): ONE})
    rows = await read(database, group_by=("tenant", "adapter"))
    seen = [(row["tenant"], row["tenant_number"], row["tenant_deleted"], row["adapter"]) for row in rows]
    assert seen == [("acme", number, False, ""), ("acme", number + 100, True, "secret")]
    assert [row["adapter"] for row in await read(database, tenant=number, group_by=("adapter",))] == [""]
    assert (await read(database, tenant=number + 100))[0]["requests"] == 1


def _to(connection: sa.Connection, revision: str) -> None:
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    config.attributes["connection"] = connection
    if revision < "0006":
        command.downgrade(config, revision)
    else:
        command.upgrade(config, revision)


async def test_rows_of_before_are_given_to_the_tenant_whose_they_surely_are(database: Database) -> None:
    created = 10 * HOUR_S + 600
    async with database.write() as connection:
        await connection.run_sync(_to, "0005")
        insert = "INSERT INTO tenants (number, id, weight, limits, disabled, created_at) VALUES (7, 'acme', 1, '{}', "
        await connection.exec_driver_sql(f"{insert} {'0' if database.is_sqlite else 'false'}, {created})")
        keys = "INSERT INTO tenant_keys (id, tenant_number, salt, hash, scopes, description, created_at) VALUES "
        await connection.exec_driver_sql(f"{keys} ('new', 7, '', '', '', '', {created})")
        rows = [
            (9, "acme", "old", "before"), (10, "acme", "old", "same-hour"), (10, "acme", "new", "mine"),
            (10, "acme", "", "whose"), (11, "acme", "gone", "later"), (9, "lost", "x", "of-nobody"),
            (9, "default", "", "single"),
        ]  # fmt: skip
        for hour, tenant, key, adapter in rows:
            values = f"({hour * HOUR_S}, '{tenant}', '{key}', '{adapter}', 1, 2, 0, 3, 1, 5.5, 0, 0.25)"
            await connection.exec_driver_sql(f"INSERT INTO usage VALUES {values}")
        await connection.run_sync(_to, "head")
    found = await read(database, group_by=("adapter", "tenant"))
    assert {row["adapter"]: (row["tenant"], row["tenant_number"]) for row in found} == {
        "before": ("acme", 0), "same-hour": ("acme", 0), "whose": ("acme", 0), "mine": ("acme", 7),
        "later": ("acme", 7), "of-nobody": ("lost", 0), "single": ("default", 1),
    }  # fmt: skip
    assert usage.total(found) == Counts(7, 14, 0, 21, 7, 38.5, 0, 1.75)
    async with database.write() as connection:
        await connection.run_sync(_to, "0005")
        assert (await connection.exec_driver_sql("SELECT SUM(requests) FROM usage")).scalar() == 7
        await connection.run_sync(_to, "head")

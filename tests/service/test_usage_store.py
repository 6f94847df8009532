"""service/store/usage.py on real databases: sums, groups and ranges."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from service.store import usage
from service.store.database import Database, sqlite_url
from service.store.usage import DAY_S, HOUR_S, Counts
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


async def add(database: Database, *rows: tuple[int, str, str, str, Counts]) -> None:
    async with database.write() as connection:
        await usage.add(connection, {row[:4]: row[4] for row in rows})


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
    assert (await read(database, tenant="a"))[0]["requests"] == 6
    assert (await read(database, end=HOUR_S))[0]["requests"] == 4
    assert (await read(database, start=HOUR_S, end=2 * HOUR_S, tenant="b"))[0]["requests"] == 2
    days = await read(database, group_by=("day", "tenant"))
    assert [(row["day"], row["tenant"], row["requests"]) for row in days] == [
        (0, "a", 4), (0, "b", 4), (DAY_S, "a", 2), (DAY_S, "b", 2),
    ]  # fmt: skip
    hours = await read(database, group_by=("hour", "key"), tenant="a", limit=3, offset=1)
    assert [(row["hour"], row["key"]) for row in hours] == [(0, "k2"), (HOUR_S, "k1"), (HOUR_S, "k2")]


async def test_a_range_without_use_is_zero(database: Database) -> None:
    assert usage.total(await read(database)) == Counts()
    assert await read(database, group_by=("tenant",)) == []


async def test_old_hours_can_be_forgotten(database: Database) -> None:
    await add(database, (0, "a", "", "", ONE), (HOUR_S, "a", "", "", ONE))
    async with database.write() as connection:
        assert await usage.forget(connection, HOUR_S) == 1
    assert (await read(database))[0]["requests"] == 1

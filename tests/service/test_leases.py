"""Limits over several services: the leases, on PostgreSQL, with a clock that runs fast and services that come and go.
(tests/crash/test_instance_limits.py has whole services.)"""

from __future__ import annotations

import asyncio
import contextlib
import random
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import sqlalchemy as sa

from service.leases import LENT_S, Leases, shares
from service.limits import Limiter, LimitReached, TenantLimits, unlent
from service.store.blob_book import BlobBook
from service.store.database import Database
from tests.real_parts import Postgres

LIMIT, AT_ONCE = 60, 6
MINUTE, RUNNING, SPENDING = 1, 2, 3
TOKENS, LARGEST = 3000, 400
LIMITS = {
    MINUTE: TenantLimits(requests_per_minute=LIMIT),
    RUNNING: TenantLimits(concurrent_requests=AT_ONCE),
    SPENDING: TenantLimits(tokens_per_minute=TOKENS),
}


def test_shares() -> None:
    assert shares(100, {"a": 0}) == {"a": 100}
    assert shares(100, {"a": 1000, "b": 1000}) == {"a": 50, "b": 50}
    assert shares(100, {"a": 1000, "b": 20}) == {"a": 80, "b": 20}
    assert shares(100, {"a": 10, "b": 30}) == {"a": 40, "b": 60}
    for limit in range(12):
        for wanted in ({"a": 3, "b": 1, "c": 2}, {"a": 9, "b": 9, "c": 9}, {"a": 0, "b": 0, "c": 4}):
            given = shares(limit, wanted)
            assert sum(given.values()) == limit
            assert min(given.values()) >= 0


@pytest.mark.parametrize("limit", [0, 1, 2, 7, 64, 1000])
def test_the_stated_overshoot(limit: int) -> None:
    assert unlent(limit, 1) == limit
    for services in range(2, 20):
        assert services * unlent(limit, services) <= max(services, limit / 8)


class Clock:
    now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Service:
    """One service as far as limits go. `hunger`: tries a second."""

    name: str
    limiter: Limiter
    leases: Leases
    stalled_until: float = 0.0
    hunger: float = 0.0
    running: list[float] = field(default_factory=list)


class Cluster:
    def __init__(self, database: Database, folder: Path, clock: Clock, seed: int) -> None:
        self.random = random.Random(seed)
        self.services: list[Service] = []
        self.admitted: list[tuple[float, str]] = []
        self.spent: list[tuple[float, int]] = []
        self.most_running = 0
        self._database, self._folder, self._clock = database, folder, clock
        self._started = 0

    async def start(self) -> Service:
        self._started += 1
        name = f"service-{self._started}"
        limiter = Limiter(self._folder / name, self._clock, shared=True)
        leases = Leases(self._database, limiter, name, self._folder / name, self._clock)
        service = Service(name, limiter, leases)
        await self._here(service)
        await leases.turn()
        self.services.append(service)
        return service

    def kill(self, service: Service) -> None:
        self.services.remove(service)
        service.limiter.close()

    async def run(self, seconds: int, *, stalls: bool = False) -> None:
        """Time passes; `stalls`: now and then a service does not get to speak to the database for a while."""
        for _ in range(seconds):
            for service in self.services:
                if self._clock.now >= service.stalled_until:
                    if int(self._clock.now) % 5 == 0:
                        await self._here(service)
                    await service.leases.turn()
                if stalls and self.random.random() < 0.02:
                    service.stalled_until = self._clock.now + self.random.uniform(1, 4 * LENT_S)
                # Requests come after one service's turn and before the next one's.
                for each in self.services:
                    self._request(each)
                self._clock.now += 1 / len(self.services)

    def _request(self, service: Service) -> None:
        ended = [at for at in service.running if at <= self._clock.now]
        service.running = [at for at in service.running if at > self._clock.now]
        for _ in ended:
            service.limiter.end(RUNNING, 0)
        part = service.hunger / len(self.services)
        for _ in range(int(part) + (self.random.random() < part % 1)):
            with contextlib.suppress(LimitReached):
                service.limiter.begin(MINUTE, LIMITS[MINUTE])
                service.limiter.end(MINUTE, 0)
                self.admitted.append((self._clock.now, service.name))
            self._spend(service.limiter)
            with contextlib.suppress(LimitReached):
                service.limiter.begin(RUNNING, LIMITS[RUNNING])
                service.running.append(self._clock.now + self.random.uniform(0.3, 10))
        self.most_running = max(self.most_running, sum(len(each.running) for each in self.services))

    def _spend(self, limiter: Limiter) -> None:
        """A request that uses all that it has reserved, or half."""
        most, limits = self.random.randint(1, LARGEST), LIMITS[SPENDING]
        with contextlib.suppress(LimitReached):
            limiter.begin(SPENDING, limits)
            used = reserved = 0
            try:
                limiter.reserve(SPENDING, limits, sequences=1, tokens=most)
                used, reserved = most // self.random.choice((1, 2)), most
                self.spent.append((self._clock.now, used))
            finally:
                limiter.end(SPENDING, used, reserved=reserved)

    def most_spent_in_a_minute(self) -> int:
        most, first, held = 0, 0, 0
        for at, tokens in self.spent:
            held += tokens
            while self.spent[first][0] <= at - 60:
                held -= self.spent[first][1]
                first += 1
            most = max(most, held)
        return most

    def in_the_last_minute(self, service: Service | None = None) -> int:
        names = {service.name} if service else {name for _, name in self.admitted}
        return sum(at > self._clock.now - 60 and name in names for at, name in self.admitted)

    def most_in_a_minute(self) -> int:
        times, most, first = sorted(at for at, _ in self.admitted), 0, 0
        for last, at in enumerate(times):
            while times[first] <= at - 60:
                first += 1
            most = max(most, last - first + 1)
        return most

    async def _here(self, service: Service) -> None:
        async with self._database.write() as connection:
            await BlobBook(connection).here(service.name)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The database's too."""
    clock = Clock()
    monkeypatch.setattr(BlobBook, "now", property(lambda _: sa.cast(sa.literal(int(clock.now)), sa.BigInteger)))
    return clock


def test_services_share_a_limit(postgres: Postgres, clock: Clock, tmp_path: Path) -> None:
    async def scenario() -> None:
        database = await Database.open(postgres.create())
        cluster = Cluster(database, tmp_path, clock, 1)
        try:
            one = await cluster.start()
            one.hunger = 20.0
            await cluster.run(3)
            # One that is alone has everything at once.
            assert cluster.in_the_last_minute() == LIMIT
            two = await cluster.start()
            two.hunger = 20.0
            await cluster.run(100)
            # Both have the same, together nearly all; what is short are seconds in which a share is under way.
            assert LIMIT * 0.8 <= cluster.in_the_last_minute() <= LIMIT
            assert abs(cluster.in_the_last_minute(one) - cluster.in_the_last_minute(two)) <= LIMIT * 0.2
            # What one does not want the other gets.
            two.hunger = 0.05
            await cluster.run(90)
            assert cluster.in_the_last_minute(one) >= LIMIT * 0.8
            # And what one had that is gone.
            two.hunger = 20.0
            await cluster.run(65)
            cluster.kill(one)
            await cluster.run(2 * LENT_S)
            assert len(two.running) > AT_ONCE / 2
            await cluster.run(110)
            assert cluster.in_the_last_minute(two) >= LIMIT * 0.9
            assert cluster.most_in_a_minute() <= LIMIT + max(2, LIMIT // 8)
            assert cluster.most_running <= AT_ONCE + 2
            assert TOKENS * 0.8 <= cluster.most_spent_in_a_minute() <= TOKENS + max(TOKENS // 8, 2 * LARGEST)
        finally:
            for each in list(cluster.services):
                cluster.kill(each)
            await database.close()

    asyncio.run(scenario())


def test_a_service_that_is_cut_off(postgres: Postgres, clock: Clock, tmp_path: Path) -> None:
    """It goes on with no more than what it may without having been lent anything; the other one has the rest."""

    async def scenario() -> None:
        database = await Database.open(postgres.create())
        cluster = Cluster(database, tmp_path, clock, 3)
        try:
            one, two = await cluster.start(), await cluster.start()
            one.hunger = two.hunger = 20.0
            await cluster.run(20)
            two.stalled_until = clock.now + 150
            await cluster.run(145)
            assert 0 < cluster.in_the_last_minute(two) <= unlent(LIMIT, 2)
            assert cluster.in_the_last_minute(one) == LIMIT
            assert cluster.most_in_a_minute() <= LIMIT + max(2, LIMIT // 8)
        finally:
            for each in list(cluster.services):
                cluster.kill(each)
            await database.close()

    asyncio.run(scenario())


@pytest.mark.parametrize("seed", [1, 2])
def test_never_more_than_stated(postgres: Postgres, clock: Clock, tmp_path: Path, seed: int) -> None:
    """Up to four services that start, die, are cut off from the database, and want much or little at random."""

    async def scenario() -> None:
        database = await Database.open(postgres.create())
        cluster = Cluster(database, tmp_path, clock, seed)
        most = 1
        try:
            for _ in range(30):
                if (len(cluster.services) < 4 and cluster.random.random() < 0.3) or not cluster.services:
                    await cluster.start()
                elif len(cluster.services) > 1 and cluster.random.random() < 0.1:
                    cluster.kill(cluster.random.choice(cluster.services))
                for service in cluster.services:
                    service.hunger = cluster.random.choice((0.0, 0.2, 2.0, 15.0))
                most = max(most, len(cluster.services))
                await cluster.run(cluster.random.randint(1, 14), stalls=True)
            assert most == 4
            assert len(cluster.admitted) > 2 * LIMIT
            assert cluster.most_in_a_minute() <= LIMIT + max(4, LIMIT // 8)
            assert TOKENS * 0.5 <= cluster.most_spent_in_a_minute() <= TOKENS + max(TOKENS // 8, 4 * LARGEST)
        finally:
            for each in list(cluster.services):
                cluster.kill(each)
            await database.close()

    asyncio.run(scenario())

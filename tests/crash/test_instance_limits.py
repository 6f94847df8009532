"""Two whole services on one PostgreSQL: a tenant's limits hold over both, within what service/leases.py states."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import httpx
import pytest

from service.leases import LENT_S, START_S
from tests.crash.world import BASE, World
from tests.real_parts import S3, Postgres
from tests.service.launch import PLAIN, wait_for

ADMIN = {"Authorization": "Bearer the-admin-key-of-these-tests"}
PER_MINUTE, AT_ONCE = 64, 6
OVERSHOOT = 8, 2
"""max(k, limit / 8) of k = 2 services."""


@pytest.fixture
def pair(postgres: Postgres, s3: S3, make_world: Callable[..., World]) -> tuple[World, World]:
    state = {"database": postgres.create(), "blobs_url": s3.create()}
    # Two API processes: one of them sees to the leases of both.
    engine = '{"step_s": 0.05}'
    worlds = make_world(engine=engine, **state), make_world(api_workers=2, engine=engine, **state)
    for world in worlds:
        world.start(LORAPLEX_ADMIN_KEY=ADMIN["Authorization"].split()[1])
    return worlds


def tenant(world: World, name: str, **limits: int) -> dict[str, str]:
    """Of a new tenant, the headers."""
    with httpx.Client(base_url=world.url, headers=ADMIN, timeout=60, **PLAIN) as http:
        assert http.post("/v1/tenants", json={"name": name, "limits": limits}).status_code == 201
        made = http.post(f"/v1/tenants/{name}/keys", json={"scopes": ["infer"]})
        return {"Authorization": f"Bearer {made.json()['key']}"}


class Spray:
    """Clients that ask the services again and again, as soon as they were answered. `admitted`, `asked`: times."""

    def __init__(self, worlds: tuple[World, ...], headers: dict[str, str], *, clients: int, tokens: int) -> None:
        self.admitted: list[float] = []
        self.asked = 0
        self.errors: list[str] = []
        self._body = {"model": BASE, "prompt": [1, 2, 3], "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
        self._headers = headers
        self._end = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(each,)) for each in worlds for _ in range(clients)]

    def __enter__(self) -> Spray:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join(60)

    def _ask(self, world: World) -> None:
        with httpx.Client(base_url=world.url, headers=self._headers, timeout=60, **PLAIN) as http:
            while not self._end.is_set():
                try:
                    answer = http.post("/v1/completions", json=self._body)
                except httpx.TransportError:  # it was killed
                    return
                self.asked += 1
                if answer.status_code == 200:
                    self.admitted.append(time.monotonic())
                elif (answer.status_code, answer.json()["error"]["code"]) != (429, "limit_exceeded"):
                    self.errors.append(answer.text)
                    return
                else:
                    self._end.wait(0.1)


def running(worlds: tuple[World, ...], name: str) -> int:
    """What runs of a tenant in all services, as they say. One after another, so each is asked twice: what ended between
    counts for nothing."""
    counts: dict[str, int] = {}
    for world in worlds + worlds:
        answer = httpx.get(f"{world.url}/v1/tenants/{name}", headers=ADMIN, timeout=60, **PLAIN)
        count = answer.json()["used"]["concurrent_requests"]
        counts[world.url] = min(counts.get(world.url, count), count)
    return sum(counts.values())


def test_a_tenants_limits_hold_over_two_services(pair: tuple[World, World]) -> None:
    one, two = pair
    spread = tenant(one, "spread", requests_per_minute=PER_MINUTE)
    alone = tenant(one, "alone", requests_per_minute=PER_MINUTE)
    many = tenant(two, "many", concurrent_requests=AT_ONCE)
    time.sleep(START_S + 1)  # until then each has its first allowance

    # One of two services alone can use the whole limit, and asked both, they admit no more.
    began = time.monotonic()
    with Spray(pair, spread, clients=3, tokens=1) as both, Spray((two,), alone, clients=3, tokens=1) as single:
        wait_for(lambda: len(single.admitted) == PER_MINUTE and len(both.admitted) >= 0.9 * PER_MINUTE, 45)
        asked = both.asked
        wait_for(lambda: both.asked > asked + 40)
    assert both.errors + single.errors == []
    within = [at for at in both.admitted if at < began + 60]
    assert 0.9 * PER_MINUTE <= len(within) <= PER_MINUTE + OVERSHOOT[0]

    # At once, too; and when one service dies with its share, the other one has all within seconds.
    with Spray((two,), many, clients=AT_ONCE + 2, tokens=40) as rest:
        wait_for(lambda: running((two,), "many") == AT_ONCE)
        with Spray((one,), many, clients=AT_ONCE, tokens=10):
            seen = 0
            for _ in range(20):
                seen = max(seen, running(pair, "many"))
                time.sleep(0.1)
            assert AT_ONCE - 1 <= seen <= AT_ONCE + OVERSHOOT[1]
            one.kill_everything()
        died = time.monotonic()
        wait_for(lambda: running((two,), "many") == AT_ONCE, LENT_S * 5)
        print(f"the whole limit again {time.monotonic() - died:.1f} s after the other service died")
    assert rest.errors == []
    for world in pair:
        logs = "".join(world.logs) + (world.running.log.read_text() if world.service else "")
        assert "Traceback" not in logs

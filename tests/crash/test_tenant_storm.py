"""Many tenants, killed: a storm, and the moment between a change and the end of its entry in the audit log."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from tests.crash.tenant_storm import ADMIN, TenantStorm
from tests.crash.world import World
from tests.real_parts import Postgres
from tests.service.launch import PLAIN, wait_for


@pytest.mark.timeout(900)
def test_two_tenants_under_fire(make_world: Callable[..., World]) -> None:
    storm = TenantStorm(make_world("--unhealthy-s", "1", api_workers=2), 7)
    storm.run(["api", "service", "engine", "service", "api"])
    print(f"{dict(storm.kills)}; {len(storm.book.acknowledged)} management actions, "
          f"tokens {[(m.tenant, m.least, m.most) for m in storm.members]}")  # fmt: skip
    assert len(storm.book.acknowledged) > 20
    assert all(member.least > 0 and member.published for member in storm.members)


REFUSE = "CREATE TRIGGER stop BEFORE UPDATE OF status ON audit BEGIN SELECT RAISE(ABORT, 'no'); END"
SLEEP = (
    "CREATE FUNCTION sleep() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM pg_sleep(600); RETURN NEW; END $$",
    "CREATE TRIGGER stop BEFORE UPDATE OF status ON audit FOR EACH ROW EXECUTE FUNCTION sleep()",
)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_what_is_done_is_in_the_audit_log(
    kind: str, make_world: Callable[..., World], request: pytest.FixtureRequest
) -> None:
    """Everything is killed when the change is committed and the end of its entry is not: the entry is there, begun.
    (On PostgreSQL the statement that completes it hangs, on SQLite it fails, until then.)"""
    url = ""
    if kind == "postgresql":
        postgres: Postgres = request.getfixturevalue("postgres")
        url = postgres.create()
    world = make_world(database=url)
    world.start(LORAPLEX_ADMIN_KEY=ADMIN)

    def client() -> httpx.Client:
        return httpx.Client(base_url=world.url, headers={"Authorization": f"Bearer {ADMIN}"}, timeout=120, **PLAIN)

    def entry(http: httpx.Client) -> dict[str, Any]:
        return dict(http.get("/v1/audit?limit=1").json()["data"][0])

    with client() as http:
        assert http.post("/v1/tenants", json={"name": "before"}).status_code == 201
        assert entry(http)["state"] == "done"
        if kind == "postgresql":
            for statement in SLEEP:
                postgres.sql(statement, url.rpartition("/")[2])
        else:
            with sqlite3.connect(world.data / "catalogue.sqlite3", isolation_level=None) as database:
                database.execute(REFUSE)
            database.close()

        def change() -> None:
            with client() as own:
                try:
                    own.post("/v1/tenants", json={"name": "between"}, headers={"x-request-id": "cut-off"})
                except httpx.TransportError:
                    return

        thread = threading.Thread(target=change)
        thread.start()
        wait_for(lambda: http.get("/v1/tenants/between").status_code == 200)
    world.kill_everything()
    thread.join(60)
    if kind == "postgresql":
        name = url.rpartition("/")[2]
        postgres.sql(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'")
        postgres.sql("DROP TRIGGER stop ON audit", name)
    world.start(LORAPLEX_ADMIN_KEY=ADMIN)
    with client() as http:
        assert http.get("/v1/tenants/between").status_code == 200
        left = entry(http)
        assert (left["action"], left["target"], left["request_id"]) == ("create_tenant", "between", "cut-off")
        assert (left["state"], left["status"]) == ("begun", None)
        if kind == "sqlite":
            with sqlite3.connect(world.data / "catalogue.sqlite3", isolation_level=None) as database:
                database.execute("DROP TRIGGER stop")
            database.close()
        assert http.delete("/v1/tenants/between").status_code == 200
        assert entry(http)["state"] == "done"

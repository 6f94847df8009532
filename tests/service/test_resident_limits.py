"""What of tenants' adapters lies on the device, over HTTP with a simulated engine: whose it is, and how much."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from .inference_helpers import BASE
from .tenant_helpers import TenantServer, complete, upload, wait_for

NAMES = ("one", "two", "three", "four", "five")


@pytest.fixture(scope="module")
def server(base_model_dir: Path) -> Iterator[TenantServer]:
    server = TenantServer(base_model_dir, engine_options={"step_s": 0.01, "load_s": 0.05})
    try:
        yield server.start()
    finally:
        server.stop()


def limit(server: TenantServer, tenant: str, nbytes: int | None) -> None:
    answer = server.http.patch(f"/v1/tenants/{tenant}", json={"limits": {"resident_bytes": nbytes}})
    assert answer.status_code == 200, answer.text


def load(client: httpx.Client, name: str, **query: Any) -> httpx.Response:
    return client.post(f"/v1/adapters/{name}/load", params={"wait": True, **query})


def size(server: TenantServer, tenant: str, client: httpx.Client, name: str) -> int:
    """Bytes of an adapter on the device, which a limit that is too small tells."""
    limit(server, tenant, 1)
    answer = load(client, name)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (413, "limit_exceeded", "resident_bytes")
    found = re.search(r"(\d+) bytes", error["message"])
    assert found is not None
    limit(server, tenant, None)
    return int(found[1])


def resident(client: httpx.Client) -> set[str]:
    """Of the client's tenant; all of them asked at the same moment."""
    found = client.get("/v1/adapters", params={"limit": 100}).json()["data"]
    return {each["id"] for each in found if each["residency"] == "device" and "/" not in each["id"]}


def loads(client: httpx.Client) -> dict[str, int]:
    rows = client.get("/v1/usage", params={"group_by": "adapter"}).json()["data"]
    return {row["adapter"]: row["loads"] for row in rows if row["loads"] or row["byte_hours"]}


# ---------------------------------------------------------------- equal content of two tenants


def test_what_one_does_with_equal_content_concerns_nobody_else(server: TenantServer) -> None:
    with server.member() as (_, alpha), server.member() as (_, beta):
        for client in (alpha, beta):
            assert upload(client, "hub", 900).status_code == 201
            assert client.post("/v1/adapters/hub/unload", params={"wait": True}).status_code == 200
        assert complete(alpha, "hub").status_code == 200
        assert (resident(alpha), resident(beta)) == ({"hub"}, set())
        for path in ("", "/versions/1"):
            assert beta.get(f"/v1/adapters/hub{path}").json()["residency"] == "absent"
        assert beta.get("/v1/adapters/hub/versions").json()["data"][0]["residency"] == "absent"
        assert beta.post("/v1/adapters/hub/unload", params={"wait": True}).json()["residency"] == "absent"
        assert resident(alpha) == {"hub"}
        wait_for(lambda: loads(alpha).get("hub"))
        before = loads(beta).get("hub", 0)
        assert load(beta, "hub").json()["residency"] == "device"
        wait_for(lambda: loads(beta).get("hub", 0) > before)


def test_a_limit_sends_away_nobody_elses_equal_content(server: TenantServer) -> None:
    with server.member() as (_, alpha), server.member() as (tenant, beta):
        for client in (alpha, beta):
            for seed, name in enumerate(NAMES[:2]):
                assert upload(client, name, 910 + seed).status_code == 201
                assert load(client, name).status_code == 200
        limit(server, tenant, max(size(server, tenant, beta, name) for name in NAMES[:2]))
        for name in (*NAMES[:2], *NAMES[:2]):
            assert complete(beta, name).status_code == 200
            assert resident(beta) == {name}
            assert resident(alpha) == set(NAMES[:2])


def test_a_shared_adapter_is_its_owners_whoever_uses_it(server: TenantServer) -> None:
    with server.member() as (owner, own), server.member(limits={"resident_bytes": 0}) as (_, guest):
        for seed, name in enumerate(NAMES[:2]):
            assert upload(own, name, 920 + seed).status_code == 201
            own.patch(f"/v1/adapters/{name}", json={"visibility": "public"})
        sizes = {name: size(server, owner, own, name) for name in NAMES[:2]}
        limit(server, owner, max(sizes.values()))
        for name in (*NAMES[:2], *NAMES[:2]):
            assert complete(guest, f"{owner}/{name}").status_code == 200
            assert resident(own) == {name}
        wait_for(lambda: loads(own).keys() == set(NAMES[:2]))
        assert loads(guest) == {}
        # What the guest brings itself counts for the guest.
        assert upload(guest, "mine", 920).status_code == 201
        answer = complete(guest, "mine")
        assert (answer.status_code, answer.json()["error"]["param"]) == (413, "resident_bytes")
        both = [{"name": f"{owner}/{name}"} for name in NAMES[:2]]
        assert complete(guest, BASE, adapters=both).status_code == 413


def test_what_is_deleted_leaves_the_memory_that_counts_for_its_owner(server: TenantServer) -> None:
    with server.member() as (_, alpha), server.member() as (_, beta):
        for client in (alpha, beta):
            assert upload(client, "hub", 930).status_code == 201
            assert load(client, "hub").status_code == 200
        gauge = "loraplex_engine_adapters_on_device"
        wait_for(lambda: loads(alpha).get("hub") == loads(beta).get("hub") == 1)
        checks = server.metrics()["loraplex_engine_integrity_checks_total"]
        assert resident(alpha) == resident(beta) == {"hub"}
        server.wait_for_engine("integrity_checks_total", checks + 1)  # a heartbeat: the figures are those of now
        before = server.metrics()[gauge]
        assert alpha.delete("/v1/adapters/hub").status_code == 200
        wait_for(lambda: server.metrics()[gauge] == before - 1)
        assert resident(beta) == {"hub"}
        assert complete(beta, "hub").status_code == 200
        assert beta.get("/v1/adapters/hub/versions/1/files/adapter_config.json").status_code == 200
        assert beta.delete("/v1/adapters/hub").status_code == 200
        wait_for(lambda: server.metrics()[gauge] == before - 2)


# ---------------------------------------------------------------- the limit


def test_five_requests_at_once_for_five_adapters_where_one_fits(server: TenantServer) -> None:
    """They take turns; nobody else waits for that, and at no moment is there more than may be."""
    with server.member() as (tenant, client), server.member() as (_, other):
        sizes, digests = {}, {}
        for seed, name in enumerate(NAMES):
            assert upload(client, name, 940 + seed).status_code == 201
            sizes[name] = size(server, tenant, client, name)
            digests[name] = client.get(f"/v1/adapters/{name}").json()["spec"]["sha256"]
        assert upload(other, "theirs", 940).status_code == 201
        assert load(other, "theirs").status_code == 200
        most = max(sizes.values())
        limit(server, tenant, most)
        seen: set[str] = set()
        # Turns of a second: a busy machine may let half of one pass before it is looked at again.
        body = {"prompt": "one two", "max_tokens": 100, "temperature": 0, "ignore_eos": True}
        with ThreadPoolExecutor(6) as threads:
            asked = {
                name: threads.submit(client.post, "/v1/completions", json={**body, "model": name}) for name in NAMES
            }
            loading = threads.submit(load, client, "five")
            assert complete(other, "theirs", max_tokens=3).status_code == 200
            turns = sum(each.done() for each in asked.values())
            while not all(each.done() for each in (*asked.values(), loading)):
                there = resident(client)
                seen |= there
                assert sum(sizes[name] for name in there) <= most, there
        assert seen == set(NAMES)
        assert loading.result().status_code == 200
        assert turns < len(NAMES) / 2, "the other one has waited for them"
        for name, each in asked.items():
            answer = each.result()
            assert answer.status_code == 200, answer.text
            # The simulated model's 100 tokens are those of this adapter, whatever was swapped meanwhile.
            text = answer.json()["choices"][0]["text"]
            assert text == server.expected_text("one two", 100, {digests[name]: 1.0})


def test_loads_pins_and_uploads_keep_to_the_limit_and_a_new_engine_too(base_model_dir: Path) -> None:
    server = TenantServer(base_model_dir, engine_options={"load_s": 0.02})
    try:
        server.start()
        with server.member() as (tenant, client):
            sizes = {}
            for seed, name in enumerate(NAMES):
                assert upload(client, name, 950 + seed).status_code == 201
                sizes[name] = size(server, tenant, client, name)
            most = max(sizes.values())

            def check() -> None:
                for _ in range(10):
                    there = resident(client)
                    assert sum(sizes[name] for name in there) <= most, there
                    time.sleep(0.02)

            limit(server, tenant, most)
            for name in NAMES:  # one after the other, the newest stays
                assert load(client, name).status_code == 200
                assert name in resident(client)
                check()
            with ThreadPoolExecutor(5) as threads:  # all at once
                assert {answer.status_code for answer in threads.map(lambda name: load(client, name), NAMES)} == {200}
            check()
            for name in NAMES:
                assert client.post(f"/v1/adapters/{name}/load").status_code == 202
                assert client.patch(f"/v1/adapters/{name}", json={"pinned": True}).status_code == 200
            check()
            for seed, name in enumerate(NAMES):
                assert upload(client, name, 960 + seed).status_code == 201
                assert client.patch(f"/v1/adapters/{name}", json={"default_version": 1}).status_code == 200
            check()
            server.kill_engine()
            server.start_engine()
            wait_for(lambda: server.http.get("/ready").status_code == 200)
            wait_for(lambda: resident(client))  # what is pinned comes back, as far as it may
            check()
    finally:
        server.stop()

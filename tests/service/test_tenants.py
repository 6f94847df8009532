"""Tenants, keys, namespaces, sharing, limits and the audit log, over HTTP with a simulated engine."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import sqlalchemy as sa

from service.store.audit import BEGUN, DAY_S, AuditLog
from service.store.database import Database, sqlite_url
from service.store.tenants import KEY
from tests.real_parts import Postgres

from .inference_helpers import BASE, InferenceServer
from .tenant_helpers import ADMIN, TenantServer, adapter_files, complete, key_id, upload, wait_for


def names(answer: httpx.Response) -> list[str]:
    return [each["id"] for each in answer.json()["data"]]


@pytest.fixture(scope="module")
def on_postgres(base_model_dir: Path, postgres: Postgres) -> Iterator[TenantServer]:
    server = TenantServer(base_model_dir, database_url=postgres.create())
    try:
        server.start()
        yield server
    finally:
        server.stop()


@pytest.fixture(params=["tenants", "on_postgres"])
def stored(request: pytest.FixtureRequest) -> TenantServer:
    """For what is a matter of rows: both databases."""
    server: TenantServer = request.getfixturevalue(request.param)
    return server


# ---------------------------------------------------------------- modes


def test_a_server_without_an_admin_key_has_one_user(server: InferenceServer) -> None:
    assert server.http.get("/v1/models").status_code == 200
    for method, path in (("GET", "/v1/tenants"), ("POST", "/v1/tenants/x/keys")):
        answer = server.http.request(method, path)
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "single_user")
        assert "LORAPLEX_ADMIN_KEY" in answer.text
    assert "x-loraplex-rule" not in server.http.get("/openapi.json").text
    assert server.http.get("/ready").json() == {"status": "ready", "model": BASE}


def test_who_has_no_key_is_told_no_more_than_a_load_balancer_needs(tenants: TenantServer) -> None:
    assert tenants.bare.get("/health").json() == {"status": "ok"}
    assert tenants.bare.get("/ready").json() == {"status": "ready"}


def test_answers_have_security_headers_and_no_cors(tenants: TenantServer) -> None:
    for client, path in ((tenants.bare, "/health"), (tenants.bare, "/v1/models"), (tenants.http, "/v1/models")):
        answer = client.get(path, headers={"Origin": "https://evil.example"})
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["x-frame-options"] == "DENY"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert not [name for name in answer.headers if name.startswith("access-control")]
    preflight = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
    assert tenants.bare.options("/v1/completions", headers=preflight).status_code == 401


# ---------------------------------------------------------------- tenants


def test_a_tenants_life(stored: TenantServer) -> None:
    http = stored.http
    made = http.post("/v1/tenants", json={"name": "life", "weight": 2, "limits": {"adapters": 3, "max_rank": None}})
    assert made.status_code == 201
    assert made.headers["location"] == "/v1/tenants/life"
    body = made.json()
    assert (body["id"], body["weight"], body["disabled"], body["limits"]["adapters"]) == ("life", 2, False, 3)
    assert http.post("/v1/tenants", json={"name": "life"}).status_code == 409
    assert http.get("/v1/tenants/life").json()["used"]["adapters"] == 0
    changed = http.patch("/v1/tenants/life", json={"limits": {"max_tokens": 5, "adapters": None}})
    assert (changed.json()["limits"]["max_tokens"], changed.json()["limits"]["adapters"]) == (5, None)
    assert changed.json()["weight"] == 2
    first = http.get("/v1/tenants", params={"limit": 1}).json()
    assert first["has_more"]
    assert "life" in names(http.get("/v1/tenants", params={"limit": 1000}))
    assert names(http.get("/v1/tenants", params={"limit": 1, "after": "lifd"})) == ["life"]
    assert http.delete("/v1/tenants/life").json()["deleted"]
    for method in ("GET", "PATCH", "DELETE"):
        answer = http.request(method, "/v1/tenants/life", json={} if method == "PATCH" else None)
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "tenant_not_found")


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"name": "no spaces"}, 400, "name"),
        ({"name": "a/b"}, 400, "name"),
        ({"name": "admin"}, 409, "name"),
        ({"name": "default"}, 409, "name"),
        ({"name": "w", "weight": 0}, 400, "weight"),
        ({"name": "w", "limits": {"adapters": -1}}, 400, "limits.adapters"),
        ({"name": "w", "limits": {"adaptors": 1}}, 400, "limits.adaptors"),
        ({"name": "w", "colour": 1}, 400, "colour"),
    ],
)
def test_what_no_tenant_can_be(tenants: TenantServer, body: dict[str, Any], status: int, param: str) -> None:
    answer = tenants.http.post("/v1/tenants", json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, param), answer.text


def test_the_default_tenant_stays(tenants: TenantServer) -> None:
    assert tenants.http.get("/v1/tenants/default").status_code == 200
    assert tenants.http.delete("/v1/tenants/default").json()["error"]["code"] == "tenant_reserved"


def test_deleting_a_tenant_takes_everything_and_leaves_nothing_to_the_next(stored: TenantServer) -> None:
    with stored.member() as (other, second):
        first = stored.tenant("phoenix")
        key = stored.key(first)
        with stored.client(key) as client:
            for seed in (1, 2):
                assert upload(client, f"ash-{seed}", seed).status_code == 201
            client.patch("/v1/adapters/ash-1", json={"visibility": "public"})
            upload(second, "gift", 9)
            second.patch("/v1/adapters/gift", json={"visibility": ["phoenix"]})
            assert complete(client, f"{other}/gift").status_code == 200
            assert complete(second, "phoenix/ash-1").status_code == 200
            source = {"adapter": "ash-2", "weight": 0.5}
            assert client.post("/v1/merges", json={"name": "mixed", "sources": [source]}).status_code == 202
            assert stored.http.delete("/v1/tenants/phoenix").json()["adapters"] == 2
            assert client.get("/v1/models").status_code == 401
        assert complete(second, "phoenix/ash-1").status_code == 404
        stored.tenant("phoenix")
        with stored.client(stored.key("phoenix")) as client:
            assert names(client.get("/v1/adapters")) == names(client.get("/v1/merges")) == []
            assert complete(client, f"{other}/gift").status_code == 404
            assert upload(client, "ash-1", 1).json()["version"] == 1
        stored.http.delete("/v1/tenants/phoenix")


@pytest.mark.parametrize("again", [False, True], ids=["gone", "given again"])
def test_an_upload_ends_with_its_tenant(stored: TenantServer, again: bool) -> None:
    """Half of it has come when the tenant is deleted: the rest is nobody's, also if another has the name by then."""
    stored.tenant("swift")
    with stored.client(stored.key("swift")) as client:
        whole = client.build_request("POST", "/v1/adapters", data={"name": "ghost"}, files=adapter_files(3))
    body = whole.read()
    head = "".join(f"{name}: {value}\r\n" for name, value in whole.headers.items())
    with socket.create_connection(("127.0.0.1", stored.settings.port), timeout=60) as connection:
        connection.sendall(f"POST /v1/adapters HTTP/1.1\r\n{head}\r\n".encode() + body[: len(body) // 2])
        wait_for(lambda: any(path.is_dir() for path in stored.settings.uploads_dir.glob("*/*")))
        assert stored.http.delete("/v1/tenants/swift").status_code == 200
        if again:
            stored.tenant("swift")
        connection.sendall(body[len(body) // 2 :])
        answer = b""
        while not answer.endswith(b"}}") and (piece := connection.recv(65536)):
            answer += piece
    assert answer.startswith(b"HTTP/1.1 404 ")
    assert b'"tenant_not_found"' in answer
    assert "ghost" not in names(stored.http.get("/v1/adapters", params={"owner": "swift"}))
    if again:
        with stored.client(stored.key("swift")) as client:
            assert names(client.get("/v1/adapters")) == []
            assert upload(client, "ghost", 3).json()["version"] == 1
        stored.http.delete("/v1/tenants/swift")


def test_a_question_ends_with_its_tenant(stored: TenantServer) -> None:
    """The body comes when another has the name, and an adapter of the name that is asked for."""
    stored.tenant("crow")
    with stored.client(stored.key("crow")) as client:
        whole = client.build_request(
            "POST", "/v1/completions", json={"model": "secret", "prompt": [1], "max_tokens": 1}
        )
    body = whole.read()
    head = "".join(f"{name}: {value}\r\n" for name, value in whole.headers.items() if name != "connection")
    with socket.create_connection(("127.0.0.1", stored.settings.port), timeout=60) as connection:
        connection.sendall(f"POST /v1/completions HTTP/1.1\r\nConnection: close\r\n{head}\r\n".encode() + body[:9])
        wait_for(lambda: used(stored, "crow")["concurrent_requests"] == 1)  # its caller has been asked for
        assert stored.http.delete("/v1/tenants/crow").status_code == 200
        stored.tenant("crow")
        with stored.client(stored.key("crow")) as client:
            assert upload(client, "secret", 1).status_code == 201
        connection.sendall(body[9:])
        answer = b""
        while piece := connection.recv(65536):
            answer += piece
    assert answer.startswith(b"HTTP/1.1 401 "), answer
    stored.http.delete("/v1/tenants/crow")


@contextlib.contextmanager
def asking(ask: Callable[[], object]) -> Iterator[None]:
    """Again and again, by a thread, so that what a process remembers of the answer is new until the block ends."""
    stop = threading.Event()

    def go_on() -> None:
        while not stop.is_set():
            ask()

    thread = threading.Thread(target=go_on)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def test_the_admin_finds_a_name_that_was_given_again_at_once(stored: TenantServer) -> None:
    """In every process: each remembers for a second whom `?tenant` means."""
    stored.tenant("rail")
    with stored.another_process() as url, stored.client(ADMIN, url) as admin:
        with asking(lambda: admin.get("/v1/adapters", params={"tenant": "rail"})):
            assert stored.http.delete("/v1/tenants/rail").status_code == 200
        stored.tenant("rail")
        made = admin.put("/v1/adapters/n", params={"tenant": "rail"}, files=adapter_files(1))
        assert made.status_code == 201, made.text
        stored.http.delete("/v1/tenants/rail")


def test_no_process_takes_a_deleted_tenants_key_for_the_next_one(stored: TenantServer) -> None:
    """Each remembers keys for a second: time enough to delete, to give the name again, and to use it."""
    stored.tenant("lapwing")
    old = stored.key("lapwing")
    with stored.another_process() as url, stored.client(old, url) as stale:
        with asking(lambda: stale.get("/v1/adapters")):
            assert stored.http.delete("/v1/tenants/lapwing").status_code == 200
        stored.tenant("lapwing")
        with stored.client(stored.key("lapwing")) as client:
            assert upload(client, "secret", 1).status_code == 201
            # 403 where it is known yet, as a disabled tenant's.
            assert stale.get("/v1/adapters").status_code in (401, 403)
            assert stale.delete("/v1/adapters/secret").status_code in (401, 403)
            assert names(client.get("/v1/adapters")) == ["secret"]
        stored.http.delete("/v1/tenants/lapwing")


def test_use_stays_with_the_tenant_that_had_it(stored: TenantServer) -> None:
    """A stream goes on while its tenant is deleted and another is given the name: all it uses is the old one's."""
    stored.tenant("ibis")
    old = stored.http.get("/v1/tenants/ibis").json()["number"]
    key = stored.key("ibis")
    body = {"model": "hidden", "prompt": [1] * 5, "max_tokens": 400, "ignore_eos": True, "stream": True}
    with stored.client(key) as client:
        assert upload(client, "hidden", 1).status_code == 201
        with client.stream("POST", "/v1/completions", json=body) as stream:
            lines = stream.iter_lines()
            next(lines)
            stored.http.delete("/v1/tenants/ibis")
            stored.tenant("ibis")
            assert "[DONE]" in list(lines)[-2]
    new = stored.http.get("/v1/tenants/ibis").json()["number"]
    with stored.client(stored.key("ibis")) as client:
        assert complete(client, BASE).status_code == 200

        def rows(asking: httpx.Client, **query: Any) -> list[dict[str, Any]]:
            found = asking.get("/v1/usage", params={"group_by": "tenant,adapter,key"} | query).json()["data"]
            return [row for row in found if row["tenant"] == "ibis"]

        def of_old() -> list[dict[str, Any]]:
            return rows(stored.http, tenant_number=old)

        wait_for(lambda: sum(row["completion_tokens"] for row in of_old()) == 400 and rows(client))
        assert {row["adapter"] for row in of_old()} == {"hidden"}
        assert {(row["tenant_number"], row["tenant_deleted"]) for row in of_old()} == {(old, True)}
        (mine,) = rows(client)
        assert (mine["adapter"], mine["requests"], mine["prompt_tokens"]) == ("", 1, 2)
        assert "tenant_number" not in mine
        assert {row["tenant_number"] for row in rows(stored.http)} == {old, new}
        assert {row["tenant_number"] for row in rows(stored.http, tenant="ibis")} == {new}
        assert client.get("/v1/usage", params={"tenant_number": old}).status_code == 403
        table = stored.http.get("/v1/usage", params={"group_by": "tenant", "format": "csv"}).text
        assert f"\r\nibis,{old},True," in table
    stored.http.delete("/v1/tenants/ibis")


# ---------------------------------------------------------------- keys


def test_a_key_is_shown_once_and_kept_as_a_hash(stored: TenantServer) -> None:
    tenant = stored.tenant()
    made = stored.http.post(f"/v1/tenants/{tenant}/keys", json={"scopes": ["manage", "infer"], "description": "web"})
    body = made.json()
    assert KEY.fullmatch(body["key"])
    assert len(bytes.fromhex(body["key"].split("_")[2])) >= 16
    assert made.headers["location"] == f"/v1/tenants/{tenant}/keys/{body['id']}"
    assert made.headers["cache-control"] == "no-store"
    shown = stored.http.get(made.headers["location"]).json()
    assert shown == {**{key: value for key, value in body.items() if key != "key"}, "last_used_at": None}
    assert (shown["scopes"], shown["description"]) == (["infer", "manage"], "web")
    secret = body["key"].split("_")[2]
    listed = stored.http.get(f"/v1/tenants/{tenant}/keys").text
    assert secret not in listed
    assert "hash" not in listed
    for path in stored.settings.data_dir.glob("catalogue.sqlite3*"):
        assert secret.encode() not in path.read_bytes()
    with stored.client(body["key"]) as client:
        client.get("/v1/models")
    wait_for(lambda: stored.http.get(made.headers["location"]).json()["last_used_at"])


def test_keys_are_exchanged_while_requests_come(stored: TenantServer) -> None:
    tenant = stored.tenant()
    old, new = stored.key(tenant), stored.key(tenant)
    with stored.client(old) as before, stored.client(new) as after:
        assert before.get("/v1/models").status_code == after.get("/v1/models").status_code == 200
        assert sorted(names(stored.http.get(f"/v1/tenants/{tenant}/keys"))) == sorted([key_id(old), key_id(new)])
        assert stored.http.delete(f"/v1/tenants/{tenant}/keys/{key_id(old)}").status_code == 200
        assert before.get("/v1/models").status_code == 401  # at once, in this process
        assert after.get("/v1/models").status_code == 200
    assert stored.http.delete(f"/v1/tenants/{tenant}/keys/{key_id(old)}").status_code == 404
    assert stored.http.get(f"/v1/tenants/default/keys/{key_id(new)}").status_code == 404


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"scopes": []}, "scopes"),
        ({"scopes": ["infer", "root"]}, "scopes[1]"),
        ({"scopes": ["infer"], "expires_at": 5}, "expires_at"),
        ({}, "scopes"),
    ],
)
def test_what_no_key_can_be(tenants: TenantServer, body: dict[str, Any], param: str) -> None:
    answer = tenants.http.post("/v1/tenants/default/keys", json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text


def test_a_key_is_disabled_and_enabled(stored: TenantServer) -> None:
    tenant = stored.tenant()
    key = stored.key(tenant)
    path = f"/v1/tenants/{tenant}/keys/{key_id(key)}"

    def asked() -> tuple[int, str | None]:
        answer = stored.bare.get("/v1/models", headers={"Authorization": f"Bearer {key}"})
        return answer.status_code, None if answer.status_code == 200 else answer.json()["error"]["code"]

    for _ in range(2):
        assert stored.http.patch(path, json={"disabled": True}).json()["disabled"] is True
        assert asked() == (401, "key_disabled")
        assert stored.http.get(path).json()["disabled"] is True
        assert stored.http.patch(path, json={"disabled": False, "description": "again"}).status_code == 200
        assert asked() == (200, None)
    soon = int(time.time()) + 5
    changed = stored.http.patch(path, json={"expires_at": soon}).json()
    assert (changed["expires_at"], changed["description"], changed["disabled"]) == (soon, "again", False)
    wait_for(lambda: asked() == (401, "key_expired"))
    assert stored.http.patch(path, json={"expires_at": None}).json()["expires_at"] is None
    assert asked() == (200, None)
    assert stored.http.patch(path, json={}).json() == stored.http.get(path).json()
    assert stored.http.patch(path, json={"expires_at": 1}).status_code == 400
    assert stored.http.patch(path, json={"scopes": ["infer"]}).status_code == 400
    assert stored.http.patch(f"/v1/tenants/{tenant}/keys/0123456789abcdef", json={}).status_code == 404
    assert stored.http.patch(f"/v1/tenants/default/keys/{key_id(key)}", json={"disabled": True}).status_code == 404
    assert asked() == (200, None)


def test_what_one_process_revokes_another_refuses_within_a_second(tenants: TenantServer) -> None:
    """Keys, disabled tenants and new limits; rows are read again once they are a second old."""
    with tenants.another_process() as url:
        tenant = tenants.tenant()
        first, second = tenants.key(tenant), tenants.key(tenant)

        def status(key: str) -> int:
            return httpx.get(f"{url}/v1/models", headers={"Authorization": f"Bearer {key}"}, timeout=60).status_code

        assert status(first) == status(second) == 200
        tenants.http.delete(f"/v1/tenants/{tenant}/keys/{key_id(first)}")
        wait_for(lambda: status(first) == 401)
        assert status(second) == 200
        tenants.http.patch(f"/v1/tenants/{tenant}", json={"disabled": True})
        wait_for(lambda: status(second) == 403)
        tenants.http.patch(f"/v1/tenants/{tenant}", json={"disabled": False})
        wait_for(lambda: status(second) == 200)
        tenants.http.delete(f"/v1/tenants/{tenant}")
        wait_for(lambda: status(second) == 401)


# ---------------------------------------------------------------- namespaces


def test_the_same_name_in_two_tenants_is_two_adapters(stored: TenantServer) -> None:
    with stored.member() as (one, first), stored.member() as (two, second):
        assert upload(first, "pirate", 1).status_code == 201
        assert upload(second, "pirate", 2).status_code == 201
        digests = [client.get("/v1/adapters/pirate/versions/1").json()["spec"]["sha256"] for client in (first, second)]
        assert digests[0] != digests[1]
        for client, tenant, digest in ((first, one, digests[0]), (second, two, digests[1])):
            expected = stored.expected_text("one two", 3, {digest: 1.0})
            for model in ("pirate", f"{tenant}/pirate", "pirate@1"):
                answer = complete(client, model)
                assert answer.json()["choices"][0]["text"] == expected
                assert answer.headers["x-loraplex-adapter"] == "pirate@1"
            assert names(client.get("/v1/models")) == [BASE, "pirate"]
            assert names(client.get("/v1/adapters")) == ["pirate"]
            assert client.get("/v1/adapters/pirate").json()["owner"] == tenant
            assert complete(client, BASE).status_code == 200
        assert first.delete("/v1/adapters/pirate").status_code == 200
        assert complete(first, "pirate").status_code == 404
        assert complete(second, "pirate").status_code == 200
        assert upload(first, BASE, 1).json()["error"]["code"] == "name_reserved"


def test_what_a_deletion_frees_does_not_tell_what_others_have(stored: TenantServer) -> None:
    with stored.member() as (_, first), stored.member() as (_, second):
        for name in ("same", "again"):
            upload(first, name, 77)
        upload(second, "same", 77)
        assert first.delete("/v1/adapters/same").json()["freed"] == {"files": 0, "bytes": 0}  # `again` has them too
        freed = first.delete("/v1/adapters/again").json()["freed"]
        assert freed["files"] == 2
        assert second.delete("/v1/adapters/same").json()["freed"] == freed


def test_the_admin_acts_as_any_tenant(stored: TenantServer) -> None:
    with stored.member() as (tenant, client):
        assert upload(stored.http, "placed", 5, tenant=tenant).status_code == 201
        assert client.get("/v1/adapters/placed").json()["owner"] == tenant
        assert names(stored.http.get("/v1/models", params={"tenant": tenant})) == [BASE, "placed"]
        assert complete(stored.http, f"{tenant}/placed").status_code == 200
        assert f"{tenant}/placed" in names(stored.http.get("/v1/adapters", params={"limit": 1000}))
        assert stored.http.patch("/v1/adapters/placed", json={"pinned": True}).status_code == 404
        changed = stored.http.patch(f"/v1/adapters/placed?tenant={tenant}", json={"description": "x"})
        assert changed.json()["description"] == "x"
        assert stored.http.delete(f"/v1/adapters/placed?tenant={tenant}").status_code == 200
        assert names(client.get("/v1/adapters")) == []
    unknown = stored.http.get("/v1/models?tenant=nobody-at-all")
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "tenant_not_found")
    assert stored.http.get("/v1/models?tenant=a&tenant=b").status_code == 400


def test_sharing(stored: TenantServer) -> None:
    with stored.member() as (owner, own), stored.member() as (friend, near), stored.member() as (_, far):
        upload(own, "voice", 1)
        upload(own, "quiet", 2)
        upload(near, "voice", 3)
        full = f"{owner}/voice"
        for client in (near, far):
            assert complete(client, full).status_code == 404
        granted = own.patch("/v1/adapters/voice", json={"visibility": [friend, "not-a-tenant"]})
        assert granted.json()["visibility"] == sorted([friend, "not-a-tenant"])
        assert complete(near, full).headers["x-loraplex-adapter"] == f"{owner}/voice@1"
        assert complete(near, f"{full}@1").status_code == 200
        assert complete(far, full).status_code == 404
        # What one sees, pages, and knows of the others.
        assert names(near.get("/v1/models")) == [BASE, "voice", full]
        assert names(near.get("/v1/adapters?limit=1")) == ["voice"]
        assert names(near.get("/v1/adapters?limit=1&after=voice")) == [full]
        assert names(near.get(f"/v1/adapters?after={full}")) == []
        for query in (f"owner={owner}", f"tenant={owner}"):
            assert names(near.get(f"/v1/adapters?{query}")) == [full]
        assert near.get(f"/v1/adapters/voice?tenant={owner}").json()["visibility"] == [friend]
        assert near.get(f"/v1/models/{full}").json()["id"] == full
        # To use it is not to take it away, nor to change it.
        file = "/versions/1/files/adapter_config.json"
        assert own.get(f"/v1/adapters/voice{file}").status_code == 200
        for method, path in (
            ("DELETE", ""), ("PATCH", ""), ("POST", "/unload"), ("PUT", "/aliases/a"), ("GET", file),
        ):  # fmt: skip
            body = {} if method == "PATCH" else {"version": 1} if method == "PUT" else None
            answer = near.request(method, f"/v1/adapters/voice{path}?tenant={owner}", json=body)
            assert (answer.status_code, answer.json()["error"]["code"]) == (403, "not_your_tenant"), path
        # A mix of adapters of several owners, each by the same rule.
        digests = {client.get("/v1/adapters/voice/versions/1").json()["spec"]["sha256"]: 0.5 for client in (own, near)}
        parts = [{"name": full, "weight": 0.5}, {"name": "voice", "weight": 0.5}]
        mixed = complete(near, BASE, adapters=parts)
        assert mixed.json()["choices"][0]["text"] == stored.expected_text("one two", 3, digests)
        hidden = complete(near, BASE, adapters=[*parts, {"name": f"{owner}/quiet", "weight": 1.0}])
        assert (hidden.status_code, hidden.json()["error"]["param"]) == (404, "adapters[2].name")
        # To everybody, and back.
        assert own.patch("/v1/adapters/voice", json={"visibility": "public"}).json()["visibility"] == "public"
        assert complete(far, full).status_code == 200
        assert far.get(f"/v1/adapters/voice?tenant={owner}").json()["visibility"] == "public"
        assert own.patch("/v1/adapters/voice", json={"visibility": "private"}).status_code == 200
        for client in (near, far):
            assert complete(client, full).status_code == 404
        for wrong in ("everybody", 1, None, [1], ["a b"]):
            assert own.patch("/v1/adapters/voice", json={"visibility": wrong}).status_code == 400


def test_tenants_do_not_find_each_others_prompts_in_the_cache(tenants: TenantServer) -> None:
    prompt = list(range(100, 300))

    def cached(client: httpx.Client) -> int:
        usage = complete(client, BASE, prompt=prompt).json()["usage"]
        found: int = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
        return found

    with tenants.member() as (_, first), tenants.member() as (_, second):
        assert cached(first) == 0
        assert cached(first) > 0
        assert cached(second) == 0


# ---------------------------------------------------------------- limits


def refused(answer: httpx.Response, status: int, name: str) -> None:
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (status, "limit_exceeded", name), answer.text
    assert name in error["message"]
    assert (int(answer.headers["retry-after"]) >= 1) if status == 429 else "retry-after" not in answer.headers


def test_requests_and_tokens_per_minute(tenants: TenantServer) -> None:
    with tenants.member(limits={"requests_per_minute": 3}) as (tenant, client):
        for _ in range(3):
            assert complete(client, BASE).status_code == 200
        refused(complete(client, BASE), 429, "requests_per_minute")
        refused(client.post("/v1/completions", content=b"{"), 429, "requests_per_minute")
        assert client.get("/v1/models").status_code == 200  # only inference is counted
        tenants.http.patch(f"/v1/tenants/{tenant}", json={"limits": {"requests_per_minute": 4}})
        assert complete(client, BASE).status_code == 200
        refused(complete(client, BASE), 429, "requests_per_minute")


def chat(client: httpx.Client, **fields: Any) -> httpx.Response:
    body = {"model": BASE, "messages": [{"role": "user", "content": "x"}], "ignore_eos": True, **fields}
    return client.post("/v1/chat/completions", json=body)


def used(server: TenantServer, tenant: str) -> dict[str, int]:
    found: dict[str, int] = server.http.get(f"/v1/tenants/{tenant}").json()["used"]
    return found


def test_tokens_per_minute(tenants: TenantServer) -> None:
    with tenants.member(limits={"tokens_per_minute": 80}) as (tenant, client):
        usage = complete(client, BASE, prompt=[5] * 30, max_tokens=9, ignore_eos=True).json()["usage"]
        assert usage["total_tokens"] == 39
        wait_for(lambda: used(tenants, tenant)["tokens_per_minute"] == 39)
        for more in ({"max_tokens": 12}, {"max_tokens": 6, "n": 2}, {"max_tokens": 12, "stream": True}):
            refused(complete(client, BASE, prompt=[5] * 30, **more), 429, "tokens_per_minute")
        answer = complete(client, BASE, prompt=[5] * 30, max_tokens=11)  # may fill it to the last
        assert answer.status_code == 200
        spent = 39 + answer.json()["usage"]["total_tokens"]
        wait_for(lambda: used(tenants, tenant)["tokens_reserved"] == 0)  # the rest was given back
        assert used(tenants, tenant)["tokens_per_minute"] == spent
    with tenants.member(limits={"tokens_per_minute": 240}) as (tenant, client):
        refused(complete(client, BASE, prompt=[5] * 230, max_tokens=11), 413, "tokens_per_minute")
        refused(chat(client, max_tokens=240), 413, "tokens_per_minute")
        # Who names no max_tokens has an eighth of the limit for his answers.
        for n in (1, 2):
            assert chat(client, n=n).json()["usage"]["completion_tokens"] == 30
        wait_for(lambda: used(tenants, tenant)["concurrent_requests"] == 0)
        assert used(tenants, tenant)["tokens_reserved"] == 0


def test_a_burst_does_not_exceed_the_tokens_of_a_minute(slow_tenants: TenantServer) -> None:
    """Forty at once to two processes, each of which may use a fifth of the limit: no more begin than fit."""
    server = slow_tenants
    with server.another_process() as url, server.member(limits={"tokens_per_minute": 500}) as (tenant, client):
        statuses: list[int] = []

        def ask(base: str) -> None:
            with httpx.Client(base_url=base, headers=client.headers, timeout=60) as own:
                answer = complete(own, BASE, prompt=[5] * 60, max_tokens=40, ignore_eos=True)
                statuses.append(answer.status_code)

        threads = [threading.Thread(target=ask, args=(base,)) for base in (server.url, url) * 20]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(statuses) == [200] * 5 + [429] * 35
        wait_for(lambda: used(server, tenant)["tokens_per_minute"] == 500)


def test_what_is_refused_is_not_charged(base_model_dir: Path) -> None:
    """A full engine refuses most of a burst: the counter of the limit, the metrics and the table of usage all have what
    was answered, and nothing of the others."""
    server = TenantServer(base_model_dir, engine_options={"step_s": 0.05}, max_sequences=1, max_queue=2)
    try:
        server.start()
        with server.member(limits={"tokens_per_minute": 100_000}) as (tenant, client):
            answers: list[httpx.Response] = []

            def ask() -> None:
                with server.client(client.headers["authorization"].removeprefix("Bearer ")) as own:
                    for _ in range(4):
                        answers.append(complete(own, BASE, prompt=[7] * 50, max_tokens=10, ignore_eos=True))

            threads = [threading.Thread(target=ask) for _ in range(10)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            full = [answer for answer in answers if answer.status_code == 429]
            assert len(full) >= 20
            assert {answer.json()["error"]["code"] for answer in full} == {"queue_full"}
            spent = 60 * sum(answer.status_code == 200 for answer in answers)
            assert spent > 0

            def billed() -> int:
                (row,) = client.get("/v1/usage", params={"group_by": ""}).json()["data"]
                return int(row["prompt_tokens"] + row["completion_tokens"])

            wait_for(lambda: billed() == spent)
            counted = used(server, tenant)
            assert (counted["tokens_per_minute"], counted["tokens_reserved"]) == (spent, 0)
            metrics = server.http.get("/metrics").text
            assert f"\nloraplex_prompt_tokens_total {spent * 5 // 6}.0\n" in metrics
    finally:
        server.stop()


def test_processes_count_together(tenants: TenantServer) -> None:
    """Sixty requests at once to two processes: exactly as many pass as may."""
    with tenants.another_process() as url, tenants.member(limits={"requests_per_minute": 25}) as (_, client):
        statuses: list[int] = []

        def ask(base: str) -> None:
            with httpx.Client(base_url=base, headers=client.headers, timeout=60) as own:
                for _ in range(15):
                    statuses.append(complete(own, BASE, max_tokens=1).status_code)

        threads = [threading.Thread(target=ask, args=(base,)) for base in (tenants.url, url) * 2]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(statuses) == [200] * 25 + [429] * 35


def test_concurrent_requests(slow_tenants: TenantServer) -> None:
    """A stream that runs counts until it ends, or its client leaves."""
    server = slow_tenants
    with server.member(limits={"concurrent_requests": 1}) as (tenant, client):

        def running() -> int:
            found: int = server.http.get(f"/v1/tenants/{tenant}").json()["used"]["concurrent_requests"]
            return found

        body = {"model": BASE, "prompt": "x", "max_tokens": 400, "stream": True, "ignore_eos": True}
        with client.stream("POST", "/v1/completions", json=body) as stream:
            assert stream.status_code == 200
            lines = stream.iter_lines()  # kept: one that is let go closes the stream
            next(lines)
            refused(complete(client, BASE), 429, "concurrent_requests")
            assert running() == 1
            with server.member() as (_, other):
                assert complete(other, BASE).status_code == 200
        wait_for(lambda: running() == 0)
        assert complete(client, BASE).status_code == 200
        wait_for(lambda: running() == 0)
        assert complete(client, "nothing").status_code == 404
        wait_for(lambda: running() == 0)
        # It is answers that are counted: one request does not take more places than many.
        refused(complete(client, BASE, n=2), 413, "concurrent_requests")
        refused(complete(client, BASE, prompt=["x", "y"]), 413, "concurrent_requests")
        server.http.patch(f"/v1/tenants/{tenant}", json={"limits": {"concurrent_requests": 5}})
        with client.stream("POST", "/v1/completions", json={**body, "prompt": ["x", "y"], "n": 2}) as stream:
            lines = stream.iter_lines()
            next(lines)
            assert running() == 4
            refused(complete(client, BASE, n=2), 429, "concurrent_requests")
            assert complete(client, BASE).status_code == 200
        wait_for(lambda: running() == 0)


def test_what_a_tenant_may_keep(stored: TenantServer) -> None:
    with stored.member(limits={"adapters": 1, "max_rank": 4}) as (tenant, client):
        refused(upload(client, "big", 1, rank=8), 413, "max_rank")
        assert upload(client, "one", 1).status_code == 201
        refused(upload(client, "two", 2), 413, "adapters")
        assert upload(client, "one", 2).status_code == 201  # a version is no adapter more
        assert upload(client, "one", 1).status_code == 200
        size = stored.http.get(f"/v1/tenants/{tenant}").json()["used"]["stored_bytes"]
        assert size > 0
        limits = {"adapters": None, "stored_bytes": size + size // 4}
        stored.http.patch(f"/v1/tenants/{tenant}", json={"limits": limits})
        refused(upload(client, "two", 3), 413, "stored_bytes")
        client.delete("/v1/adapters/one/versions/1")
        assert upload(client, "two", 3).status_code == 201
        refused(upload(stored.http, "three", 4, tenant=tenant), 413, "stored_bytes")
        assert names(client.get("/v1/adapters")) == ["one", "two"]


def test_max_tokens(tenants: TenantServer) -> None:
    with tenants.member(limits={"max_tokens": 5}) as (_, client):
        refused(complete(client, BASE, max_tokens=6), 413, "max_tokens")
        assert complete(client, BASE, max_tokens=5, ignore_eos=True).json()["usage"]["completion_tokens"] == 5
        body = {"model": BASE, "messages": [{"role": "user", "content": "x"}], "ignore_eos": True}
        answer = client.post("/v1/chat/completions", json=body)
        assert answer.json()["usage"]["completion_tokens"] == 5  # what is not asked for is not refused, it is cut
        refused(client.post("/v1/chat/completions", json={**body, "max_tokens": 9}), 413, "max_tokens")


# ---------------------------------------------------------------- audit and logs


def test_every_change_is_in_the_audit_log_and_no_key_is_in_any_log(stored: TenantServer) -> None:
    with stored.member() as (tenant, client):
        key = client.headers["authorization"].removeprefix("Bearer ")
        upload(client, "noted", 1)
        client.patch("/v1/adapters/noted", json={"visibility": "public"})
        client.patch("/v1/adapters/missing", json={"pinned": True})
        client.patch("/v1/adapters/noted", json={"pinned": "?"})
        client.post("/v1/tenants", json={"name": "another"})
        client.delete("/v1/adapters/noted", params={"tenant": "default"})
        with stored.client(stored.key(tenant, "infer")) as reader:
            reader.delete("/v1/adapters/no%00ted")
            user = key_id(reader.headers["authorization"])
        upload(client, "noted", 1)
        client.get("/v1/adapters/noted")
        complete(client, "noted")
        request_id = client.delete("/v1/adapters/noted", headers={"x-request-id": "by-hand"}).headers["x-request-id"]
        stored.http.get("/v1/adapters", params={"tenant": tenant})
        stored.http.patch(f"/v1/tenants/{tenant}", json={"disabled": True})
        actions = stored.http.get("/v1/audit", params={"tenant_id": tenant}).json()["data"]
        me = key_id(key)
        assert [(each["action"], each["actor"], each["target"], each["status"]) for each in reversed(actions)] == [
            ("put_adapter", me, "noted 1", 201),
            ("change_adapter", me, "noted", 200),
            ("change_adapter", me, "missing", 404),
            ("change_adapter", me, "noted", 400),
            ("create_tenant", me, "", 403),
            ("delete_adapter", me, "noted", 403),
            ("delete_adapter", user, "no\\x00ted", 403),
            ("put_adapter", me, "noted 1", 200),
            ("delete_adapter", me, "noted", 200),
        ]
        assert [each["state"] for each in actions] == ["done"] * 2 + ["refused"] * 5 + ["done"] * 2
        assert actions[0]["request_id"] == request_id == "by-hand"
        assert stored.http.get("/v1/audit", params={"tenant": tenant}).json()["data"] == actions
        both = stored.http.get("/v1/audit", params={"tenant": "default", "tenant_id": tenant})
        assert both.json()["data"] == actions
        assert stored.http.get("/v1/audit", params={"tenant": "nobody-at-all"}).status_code == 404
        newest = stored.http.get("/v1/audit?limit=3").json()
        assert newest["has_more"]
        assert (newest["data"][0]["action"], newest["data"][0]["target"]) == ("change_tenant", tenant)
        older = stored.http.get("/v1/audit", params={"limit": 1, "after": newest["last_id"]}).json()["data"]
        assert int(older[0]["id"]) < int(newest["last_id"])
        kinds = {each["action"] for each in stored.http.get("/v1/audit?limit=1000").json()["data"]}
        assert {"create_tenant", "create_key"} <= kinds

        wrong = f"{key[:-1]}{'0' if key[-1] != '0' else '1'}"
        stored.bare.get("/v1/models", headers={"Authorization": f"Bearer {wrong}"})
        stored.bare.get(f"/v1/models?api_key={key}")
        for text in (stored.log_path.read_text(), json.dumps(actions)):
            for secret in (key.split("_")[2], wrong.split("_")[2], ADMIN):
                assert secret not in text
        lines = [json.loads(line) for line in stored.log_path.read_text().splitlines() if line.startswith("{")]
        assert [line for line in lines if line.get("tenant") == tenant and line.get("key") == key_id(key)]
        assert [line for line in lines if line.get("event") == "management action" and line["actor"] == key_id(key)]


def test_the_only_user_has_an_audit_log_too(server: InferenceServer) -> None:
    server.http.delete("/v1/adapters/not-there")
    server.http.delete("/v1/adapters/not-there", params={"tenant": "acme"})
    found = server.http.get("/v1/audit", params={"limit": 2}).json()["data"]
    assert [(each["actor"], each["tenant"], each["action"], each["status"]) for each in found] == [
        ("operator", "default", "delete_adapter", 404)
    ] * 2


def test_a_change_is_answered_though_its_end_cannot_be_entered(base_model_dir: Path) -> None:
    """The database refuses to complete entries (a trigger of its own): what is done is answered as done, its entry says
    that it was begun, and is completed with the next one that can be. Without an entry nothing is done."""
    server = TenantServer(base_model_dir)
    try:
        server.start()
        database = sqlite3.connect(server.settings.data_dir / "catalogue.sqlite3", isolation_level=None)

        def newest() -> dict[str, Any]:
            return dict(server.http.get("/v1/audit?limit=1").json()["data"][0])

        refuse = "CREATE TRIGGER refuse BEFORE {} ON audit BEGIN SELECT RAISE(ABORT, 'no'); END"
        database.execute(refuse.format("UPDATE OF status"))
        server.tenant("late")
        assert server.http.get("/v1/tenants/late").status_code == 200
        entry = newest()
        assert (entry["action"], entry["target"], entry["state"]) == ("create_tenant", "late", "begun")
        assert entry["status"] is None
        database.execute("DROP TRIGGER refuse")
        server.tenant("next")
        done = {each["target"]: each["state"] for each in server.http.get("/v1/audit").json()["data"]}
        assert (done["late"], done["next"]) == ("done", "done")
        database.execute(refuse.format("INSERT"))
        assert server.http.delete("/v1/tenants/late").status_code == 500
        assert server.http.get("/v1/tenants/late").status_code == 200
        database.close()
    finally:
        server.stop()


async def test_entries_that_come_together_share_a_transaction(tmp_path: Path) -> None:
    database = await Database.open(sqlite_url(tmp_path / "catalogue.sqlite3"))
    commits = 0

    @sa.event.listens_for(database.engine.sync_engine, "commit")
    def count(_: Any) -> None:
        nonlocal commits
        commits += 1

    try:
        rows = AuditLog(database, 30)
        numbers = await asyncio.gather(*(rows.record("k", "t", "act", str(i)) for i in range(50)))
        assert len(set(numbers)) == 50
        assert commits <= 2
        await asyncio.gather(*(rows.complete(number, f"it {number}", 200) for number in numbers[1:]))
        found = (await rows.list_actions(100, None, None)).items
        assert {each.number: (each.target, each.status) for each in found} == {
            numbers[0]: ("0", BEGUN), **{number: (f"it {number}", 200) for number in numbers[1:]}
        }  # fmt: skip
    finally:
        await database.close()


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
async def test_old_lines_of_the_audit_log_are_deleted(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = sqlite_url(tmp_path / "catalogue.sqlite3")
    if kind == "postgresql":
        url = request.getfixturevalue("postgres").create()
    database = await Database.open(url)
    now = time.time()

    async def record(rows: AuditLog, days_ago: float) -> list[str]:
        monkeypatch.setattr(time, "time", lambda: now - days_ago * DAY_S)
        await rows.record("admin", "default", "change_tenant", f"{days_ago:g}", 200, "r")
        return [each.target for each in (await rows.list_actions(100, None, None)).items]

    try:
        rows = AuditLog(database, 30)
        assert await record(rows, 40) == ["40"]
        assert await record(rows, 31) == ["31", "40"]
        assert await record(rows, 9.9) == ["9.9", "31"]
        assert await record(rows, 0) == ["0", "9.9"]
        assert await record(rows, 35) == ["35", "0", "9.9"]  # a clock that is wrong
        assert await record(AuditLog(database, 30), 0) == ["0", "0", "9.9"]
    finally:
        await database.close()


# ---------------------------------------------------------------- another configuration


def test_origins_that_may_call_from_a_browser(base_model_dir: Path) -> None:
    server = TenantServer(base_model_dir, cors_origins="https://one.example, https://two.example/")
    try:
        server.start(engine=False)
        preflight = {
            "Origin": "https://two.example",
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization,content-type",
        }
        answer = server.bare.options("/v1/completions", headers=preflight)
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == "https://two.example"
        answer = server.bare.get("/v1/models", headers={"Origin": "https://one.example"})
        assert answer.status_code == 401
        assert answer.headers["access-control-allow-origin"] == "https://one.example"
        answer = server.http.get("/v1/models", headers={"Origin": "https://three.example"})
        assert "access-control-allow-origin" not in answer.headers
    finally:
        server.stop()

"""Every endpoint times every kind of wrong caller. The table comes from the OpenAPI document of the running service, so
that a route is tested, or fails here, as soon as it exists."""

from __future__ import annotations

import base64
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from fastapi import APIRouter

from service.api import auth
from service.app import create_app
from service.settings import Settings
from service.store.catalogue import Catalogue
from service.store.database import sqlite_url
from service.store.errors import AdapterNotFound
from service.store.records import File, NewVersion
from service.store.tenants import SCOPES

from .inference_helpers import BASE, InferenceServer
from .tenant_helpers import ADMIN, TenantServer, complete, key_id, upload, wait_for

SECRET = "secret-adapter"
"""alpha's, private."""


class Cast:
    """Two tenants, alpha with a private adapter and a merge's place; and a key of every kind that is no good."""

    def __init__(self, server: TenantServer) -> None:
        self.server = server
        self.alpha, self.beta = server.tenant("alpha"), server.tenant("beta")
        self.alpha_key, self.beta_key = server.key("alpha"), server.key("beta")
        self.scoped = {scope: server.key("alpha", scope) for scope in SCOPES}
        with server.client(self.alpha_key) as client:
            assert upload(client, SECRET, 1).status_code == 201
            merge = client.post("/v1/merges", json={"name": "mixed", "sources": [{"adapter": SECRET, "weight": 0.5}]})
            assert merge.status_code == 202, merge.text
            self.merge: str = merge.json()["id"]
        expires_at = int(time.time()) + 5  # what has passed when the request comes is refused
        self.expired = server.key("alpha", expires_at=expires_at)
        self.deleted = server.key("alpha")
        assert server.http.delete(f"/v1/tenants/alpha/keys/{key_id(self.deleted)}").status_code == 200
        self.off = server.key("alpha")
        path = f"/v1/tenants/alpha/keys/{key_id(self.off)}"
        assert server.http.patch(path, json={"disabled": True}).status_code == 200
        self.disabled = server.key(server.tenant("disabled"))
        assert server.http.patch("/v1/tenants/disabled", json={"disabled": True}).status_code == 200
        self.orphan = server.key(server.tenant("orphan"))
        assert server.http.delete("/v1/tenants/orphan").status_code == 200
        wait_for(lambda: time.time() > expires_at)

    def wrong(self) -> dict[str, tuple[list[tuple[str, str]], int, str]]:
        """(headers, status, code) of every caller that nothing is open to."""
        good = self.alpha_key
        basic = base64.b64encode(f"alpha:{good}".encode()).decode()
        other_secret = good[:-1] + ("0" if good[-1] != "0" else "1")

        def bearer(key: str) -> list[tuple[str, str]]:
            return [("Authorization", f"Bearer {key}")]

        return {
            "no key": ([], 401, "missing_key"),
            "key in another header": ([("X-Api-Key", good)], 401, "missing_key"),
            "key as a cookie": ([("Cookie", f"Authorization=Bearer {good}")], 401, "missing_key"),
            "two keys": (bearer(good) + bearer(good), 401, "missing_key"),
            "no scheme": ([("Authorization", good)], 401, "invalid_key"),
            "another scheme": ([("Authorization", f"Basic {basic}")], 401, "invalid_key"),
            "nothing after the scheme": ([("Authorization", "Bearer")], 401, "invalid_key"),
            "malformed": (bearer("lpx_something"), 401, "invalid_key"),
            "cut off": (bearer(good[:-1]), 401, "invalid_key"),
            "in capitals": (bearer(good.upper()), 401, "invalid_key"),
            "very long": (bearer("x" * 5000), 401, "invalid_key"),
            "unknown": (bearer("lpx_0123456789abcdef_" + "0" * 40), 401, "invalid_key"),
            "known id, other secret": (bearer(other_secret), 401, "invalid_key"),
            "almost the admin's": (bearer(ADMIN + "x"), 401, "invalid_key"),
            "expired": (bearer(self.expired), 401, "key_expired"),
            "disabled": (bearer(self.off), 401, "key_disabled"),
            "deleted": (bearer(self.deleted), 401, "invalid_key"),
            "of a deleted tenant": (bearer(self.orphan), 401, "invalid_key"),
            "of a disabled tenant": (bearer(self.disabled), 403, "tenant_disabled"),
        }


@pytest.fixture(scope="module")
def cast(tenants: TenantServer) -> Iterator[Cast]:
    made = Cast(tenants)
    yield made
    for tenant in ("alpha", "beta", "disabled"):
        tenants.http.delete(f"/v1/tenants/{tenant}")


@pytest.fixture(scope="module")
def operations(tenants: TenantServer) -> list[tuple[str, str, dict[str, Any]]]:
    paths = tenants.http.get("/openapi.json").json()["paths"]
    return [(method.upper(), path, item[method]) for path, item in paths.items() for method in item]


def address(path: str, operation: dict[str, Any], **given: str) -> str:
    examples = {each["name"]: each["example"] for each in operation["parameters"] if each["in"] == "path"}
    return path.format(**{**examples, **given})


def send(server: TenantServer, method: str, path: str, headers: list[tuple[str, str]], **query: str) -> Any:
    """With a body that is no JSON, no form, nothing: whoever may not call is told so before it is looked at."""
    content = None if method in ("GET", "HEAD") else b"{no json"
    return server.bare.request(
        method,
        path,
        headers=[("Content-Type", "application/json"), *headers],
        content=content,
        params=query,
    )


def test_every_operation_declares_its_rule(operations: list[tuple[str, str, dict[str, Any]]]) -> None:
    assert len(operations) >= 35
    for method, path, operation in operations:
        words = operation.get("x-loraplex-rule")
        assert words, f"{method} {path}: declare who may call it, service/api/auth.py says how"
        assert set(words) <= {*SCOPES, "any", "open", "admin"}
        assert operation["security"] == ([] if words == ["open"] else [{"key": []}])
    assert {path for _, path, each in operations if each["x-loraplex-rule"] == ["open"]} == {"/health", "/ready"}


def test_a_route_without_a_rule_cannot_be_made(tmp_path: Path) -> None:
    router = APIRouter(route_class=auth.Route)
    with pytest.raises(TypeError, match="declares no rule"):

        @router.get("/new")
        async def new() -> None: ...

    # And every route of the application is of that kind.
    app = create_app(Settings.load(data_dir=tmp_path, model="/x", served_name="base", admin_key=ADMIN))
    made = [route for each in app.routes for route in getattr(getattr(each, "original_router", None), "routes", [])]
    assert len(made) >= 35
    assert all(isinstance(route, auth.Route) for route in made)


def test_wrong_callers_times_every_endpoint(cast: Cast, operations: list[tuple[str, str, dict[str, Any]]]) -> None:
    tried = 0
    for method, path, operation in operations:
        target = address(path, operation, name=SECRET, tenant="alpha")
        for kind, (headers, status, code) in cast.wrong().items():
            answer = send(cast.server, method, target, headers)
            tried += 1
            if operation["x-loraplex-rule"] == ["open"]:
                assert answer.status_code == 200, (kind, path)
                continue
            assert answer.status_code == status, (kind, method, path, answer.text)
            assert answer.json()["error"]["code"] == code, (kind, method, path)
            if status == 401:
                assert answer.headers["www-authenticate"] == "Bearer"
                assert SECRET not in answer.text
    print(f"{tried} wrong calls")
    assert tried >= 36 * 19


def test_a_wrong_scope_at_every_endpoint(cast: Cast, operations: list[tuple[str, str, dict[str, Any]]]) -> None:
    """A key of each scope alone: let in exactly where the rule says. Addresses are of nothing that there is."""
    for method, path, operation in operations:
        words = operation["x-loraplex-rule"]
        target = address(path, operation, name="nothing", tenant="nobody", merge="none")
        for scope, key in cast.scoped.items():
            answer = send(cast.server, method, target, [("Authorization", f"Bearer {key}")])
            if words in (["open"], ["any"]) or scope in words:
                assert answer.status_code not in (401, 403), (scope, method, path, answer.text)
                continue
            assert answer.status_code == 403, (scope, method, path, answer.text)
            code = answer.json()["error"]["code"]
            assert code == ("admin_only" if words == ["admin"] else "missing_scope"), (scope, path)


def test_paths_that_are_not_in_the_document(cast: Cast) -> None:
    for path in ("/", "/docs", "/redoc", "/openapi.json", "/docs/oauth2-redirect", "/nothing", "/v1/nothing", "//docs"):
        assert send(cast.server, "GET", path, []).status_code == 401, path
    for path in ("/docs", "/redoc", "/openapi.json"):
        answer = send(cast.server, "GET", path, [("Authorization", f"Bearer {cast.alpha_key}")])
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "admin_only"), path
        assert cast.server.http.get(path).status_code == 200
    assert send(cast.server, "GET", f"/v1/models?key={cast.alpha_key}&api_key={cast.alpha_key}", []).status_code == 401


def test_another_tenants_adapter_is_not_there(cast: Cast, operations: list[tuple[str, str, dict[str, Any]]]) -> None:
    """Whatever is asked about an adapter of another tenant, the answer is the one for an adapter that is not there, and
    the one for a tenant that is not there."""
    key = [("Authorization", f"Bearer {cast.beta_key}")]
    seen = set()
    for method, path, operation in operations:
        if "{name}" not in path:
            continue
        answers = []
        for tenant, name in (("alpha", SECRET), ("alpha", "secret-nothing"), ("nobody", SECRET)):
            answer = send(cast.server, method, address(path, operation, name=name), key, tenant=tenant)
            body = answer.text.replace(name, "NAME").replace(tenant, "TENANT")
            answers.append((answer.status_code, body, sorted(set(answer.headers) - {"date", "x-request-id"})))
        assert answers[0] == answers[1] == answers[2], (method, path, answers)
        assert answers[0][0] == (404 if method == "GET" else 403), (method, path, answers)
        seen.add(method)
    assert seen == {"GET", "PUT", "PATCH", "DELETE", "POST"}


def test_another_tenants_merge_is_not_there(cast: Cast, operations: list[tuple[str, str, dict[str, Any]]]) -> None:
    key = [("Authorization", f"Bearer {cast.beta_key}")]
    seen = 0
    for method, path, operation in operations:
        if "{merge}" not in path:
            continue
        queries: tuple[dict[str, str], ...] = ({}, {"tenant": "alpha"})
        for query in queries:
            hidden = send(cast.server, method, address(path, operation, merge=cast.merge), key, **query)
            missing = send(cast.server, method, address(path, operation, merge="nothing"), key, **query)
            assert hidden.status_code == missing.status_code == (403 if query else 404), path
            assert hidden.text.replace(cast.merge, "ID") == missing.text.replace("nothing", "ID")
            seen += 1
    assert seen >= 8
    with cast.server.client(cast.beta_key) as client:
        assert client.get("/v1/merges").json()["data"] == []
        # Not its own in place of those that were asked for; there or not, the answer is the same.
        for tenant in ("alpha", "nobody"):
            refused = client.get("/v1/merges", params={"tenant": tenant})
            assert (refused.status_code, refused.json()["error"]["code"]) == (403, "not_your_tenant")
        assert client.get("/v1/merges", params={"tenant": "beta"}).json()["data"] == []
    with cast.server.client(cast.alpha_key) as client:
        assert [each["id"] for each in client.get("/v1/merges").json()["data"]] == [cast.merge]
        assert client.get(f"/v1/merges/{cast.merge}", params={"tenant": "alpha"}).status_code == 200
    assert cast.server.http.get("/v1/merges", params={"tenant": "alpha"}).json()["data"][0]["id"] == cast.merge


def test_another_tenants_adapter_in_requests(cast: Cast) -> None:
    with cast.server.client(cast.beta_key) as client:

        def told(name: str, owner: str = "alpha") -> list[tuple[int, str]]:
            full = f"{owner}/{name}"
            given = [
                complete(client, full),
                complete(client, f"{full}@1"),
                complete(client, f"{full}@prod"),
                complete(client, BASE, adapters=[{"name": full, "weight": 0.5}]),
                client.post(
                    "/v1/chat/completions", json={"model": full, "messages": [{"role": "user", "content": "x"}]}
                ),
                client.get(f"/v1/models/{full}"),
                client.post("/tokenize", json={"model": full, "prompt": "x"}),
                complete(client, name),
                client.get(f"/v1/adapters/{name}"),
                client.post(
                    "/v1/merges", json={"name": "m", "sources": [{"adapter": full}, {"adapter": full, "weight": 0.1}]}
                ),
            ]
            return [(a.status_code, a.text.replace(name, "NAME").replace(owner, "OWNER")) for a in given]

        hidden, missing, nobody = told(SECRET), told("secret-nothing"), told(SECRET, "nobody")
        assert hidden == missing == nobody
        assert {status for status, _ in hidden} <= {404, 422}
        assert [status for status, _ in hidden][:9] == [404] * 9
        for path in ("/v1/models", "/v1/adapters", "/v1/adapters?owner=alpha", "/v1/adapters?tenant=alpha"):
            assert SECRET not in client.get(path).text
        assert client.get("/v1/adapters").json()["data"] == []


async def test_what_is_hidden_costs_the_same_statements_as_what_is_not_there(tmp_path: Path) -> None:
    """The same class of time: the same statements, in the same order."""
    catalogue = await Catalogue.open(sqlite_url(tmp_path / "catalogue.sqlite3"))
    run: list[str] = []

    @sa.event.listens_for(sa.Engine, "before_cursor_execute")  # the pool's, and the one in the event loop
    def note(_c: Any, _cursor: Any, statement: str, *_more: Any) -> None:
        run.append(statement)

    try:
        new = NewVersion("d" * 64, "base", 4, {}, (File("f", "e" * 64, 1),))
        async with catalogue.write() as edits:
            await edits.publish("hidden", new, default=True, tenant="alpha")
            await edits.publish("granted", new, default=True, tenant="alpha")
            await edits.change("granted", visibility=["gamma"], tenant="alpha")

        async def asked(tenant: str, name: str) -> list[list[str]]:
            reads = [
                catalogue.resolve(f"{tenant}/{name}", "beta", "beta"),
                catalogue.resolve(f"{tenant}/{name}@1", "beta", "beta"),
                catalogue.resolve(f"{tenant}/{name}@prod", "beta", "beta"),
                catalogue.get_adapter(name, tenant, "beta"),
                catalogue.list_versions(name, 20, 0, tenant, "beta"),
                catalogue.get_version(name, 1, tenant, "beta"),
            ]
            found = []
            for read in reads:
                run.clear()
                with pytest.raises(AdapterNotFound):
                    await read
                found.append(list(run))
            return found

        await catalogue.resolve("alpha/granted", "gamma", "gamma")  # opens what stays open
        hidden = await asked("alpha", "hidden")
        assert all(hidden)
        assert hidden == await asked("alpha", "granted")
        assert hidden == await asked("alpha", "nothing") == await asked("nobody", "hidden")
        # The same reads do find what the viewer may see.
        assert (await catalogue.resolve("alpha/granted", "gamma", "gamma")).name == "granted"
        assert (await catalogue.get_adapter("granted", "alpha", "gamma")).name == "granted"
    finally:
        sa.event.remove(sa.Engine, "before_cursor_execute", note)
        await catalogue.close()


def test_a_server_without_tenants_refuses_a_tenant(server: InferenceServer) -> None:
    """What is meant for another tenant's adapter must not hit the only user's."""
    refused = server.http.get("/v1/adapters", params={"tenant": "acme"})
    assert refused.status_code == 404
    assert refused.json()["error"]["code"] == "single_user"
    assert server.http.delete("/v1/adapters/x", params={"tenant": "acme"}).json()["error"]["code"] == "single_user"
    assert server.http.get("/v1/adapters", params={"tenant": "default"}).status_code == 200

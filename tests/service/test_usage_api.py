"""GET /v1/usage over HTTP: what requests used, by whom, and what a killed process loses of it."""

from __future__ import annotations

import csv
import io
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from .inference_helpers import BASE, InferenceServer
from .tenant_helpers import TenantServer, wait_for


@pytest.fixture(scope="module")
def tenants(base_model_dir: Path) -> Iterator[TenantServer]:
    server = TenantServer(base_model_dir, engine_options={"step_s": 0.001})
    try:
        yield server.start()
    finally:
        server.stop()


def sums(client: httpx.Client, **query: Any) -> dict[str, Any]:
    """The only row of a query without groups."""
    answer = client.get("/v1/usage", params={"group_by": ""} | query)
    assert answer.status_code == 200, answer.text
    (row,) = answer.json()["data"]
    return dict(row)


def complete(client: httpx.Client, tokens: int, model: str = BASE, **body: Any) -> httpx.Response:
    request = {"model": model, "prompt": [5, 6, 7], "max_tokens": tokens, "ignore_eos": True, **body}
    answer = client.post("/v1/completions", json=request)
    assert answer.status_code == 200, answer.text
    return answer


def test_every_tenant_sees_its_own_use_and_the_admin_all(tenants: TenantServer) -> None:
    with tenants.member() as (one, first), tenants.member() as (two, second):
        for client, tokens in ((first, 4), (first, 6), (second, 9)):
            complete(client, tokens)
        complete(first, 5, stream=True)
        wait_for(lambda: sums(first)["completion_tokens"] == 15 and sums(second)["completion_tokens"] == 9)
        mine = sums(first)
        assert (mine["prompt_tokens"], mine["completion_tokens"]) == (9, 15)
        assert mine["ttft_ms"] > 0
        assert sums(second)["completion_tokens"] == 9
        assert sums(tenants.http, tenant=two)["completion_tokens"] == 9
        everybody = tenants.http.get("/v1/usage", params={"group_by": "tenant"}).json()["data"]
        seen = {row["tenant"]: row["requests"] for row in everybody}
        assert (seen[one], seen[two]) == (3, 1)
        assert first.get("/v1/usage", params={"tenant": two}).status_code == 403
        by_key = first.get("/v1/usage", params={"group_by": "key"}).json()["data"]
        assert len(by_key) == 1
        assert by_key[0]["key"]


def test_adapters_and_their_place_on_the_device(tenants: TenantServer, tmp_path: Path) -> None:
    with tenants.member() as (tenant, client):
        previous, tenants.http = tenants.http, client  # the adapters are this tenant's
        try:
            for number, name in enumerate(("x", "y"), start=50):
                tenants.upload(name, tmp_path, number)
        finally:
            tenants.http = previous
        complete(client, 3, "x")
        complete(client, 4, adapters=[{"name": "y", "weight": 1.0}, {"name": "x", "weight": 0.5}])

        def rows() -> dict[str, dict[str, Any]]:
            data = client.get("/v1/usage", params={"group_by": "adapter"}).json()["data"]
            return {row["adapter"]: row for row in data}

        wait_for(lambda: rows().keys() == {"x", "y", "x+y"} and all(rows()[name]["byte_hours"] for name in "xy"))
        # A request that was still running at a write is in two of them.
        wait_for(lambda: sums(client)["completion_tokens"] == 7)
        found = rows()
        assert (found["x"]["completion_tokens"], found["x+y"]["completion_tokens"]) == (3, 4)
        assert (found["x"]["loads"], found["y"]["loads"], found["x+y"]["loads"]) == (1, 1, 0)
        assert all(found[name]["byte_hours"] > 0 for name in "xy")
        before = found["x"]["byte_hours"]
        wait_for(lambda: rows()["x"]["byte_hours"] > before)
        total = sums(client)
        assert total["requests"] == 2
        assert sums(tenants.http, tenant=tenant)["requests"] == 2


def test_ranges_pages_and_csv(server: InferenceServer) -> None:
    before = sums(server.http)["completion_tokens"]
    complete(server.http, 2)
    wait_for(lambda: sums(server.http)["completion_tokens"] >= before + 2)
    whole = server.http.get("/v1/usage", params={"group_by": "hour,adapter", "limit": 1}).json()
    assert whole["object"] == "list"
    assert whole["group_by"] == ["hour", "adapter"]
    assert whole["data"][0]["hour"].endswith(":00:00Z")
    if whole["has_more"]:
        rest = server.http.get("/v1/usage", params={"group_by": "hour,adapter", "after": whole["last_id"]}).json()
        assert rest["data"][0] != whole["data"][0]
    assert sums(server.http, **{"from": "2020-01-01", "to": "2020-02-01T00:00:00Z"})["requests"] == 0
    assert sums(server.http, **{"from": str(int(time.time()) - 60)})["requests"] >= 1
    for query, headers in (({"format": "csv"}, {}), ({}, {"accept": "text/csv"})):
        answer = server.http.get("/v1/usage", params={"group_by": "day,tenant"} | query, headers=headers)
        assert answer.headers["content-type"] == "text/csv; charset=utf-8"
        row = next(row for row in csv.DictReader(io.StringIO(answer.text)) if row["tenant"] == "default")
        assert len(row["day"]) == 10
        assert int(row["completion_tokens"]) >= 2


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ({"group_by": "colour"}, "group_by"),
        ({"group_by": "day,day"}, "group_by"),
        ({"from": "yesterday"}, "from"),
        ({"from": "2026-02-01", "to": "2026-01-01"}, "from"),
        ({"to": "9999-12-31T23:59:59"}, "to"),
        ({"from": "0001-01-01T00:00:00+14:00"}, "from"),
        ({"limit": 0}, "limit"),
        ({"after": -1}, "after"),
        ({"format": "xml"}, "format"),
    ],
)
def test_what_cannot_be_asked(server: InferenceServer, query: dict[str, str], param: str) -> None:
    answer = server.http.get("/v1/usage", params=query)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param


def test_a_killed_process_loses_only_its_last_moment(base_model_dir: Path) -> None:
    """What was counted a second before the kill is there afterwards, that of a stream that still ran too."""
    server = InferenceServer(base_model_dir, engine_options={"step_s": 0.01}, max_positions=4096)
    try:
        server.start()
        complete(server.http, 7)
        body = {"model": BASE, "prompt": [1], "max_tokens": 4000, "ignore_eos": True, "stream": True}
        with httpx.Client(base_url=server.url, timeout=60).stream("POST", "/v1/completions", json=body) as stream:
            lines = stream.iter_lines()
            for _ in range(40):
                next(lines)
            wait_for(lambda: sums(server.http)["completion_tokens"] >= 27)
            seen = sums(server.http)
            assert server.api is not None
            os.kill(server.api.pid, signal.SIGKILL)
            server.api.wait()
        server.start(engine=False)
        assert sums(server.http)["completion_tokens"] >= seen["completion_tokens"]
        assert sums(server.http)["requests"] == 2
    finally:
        server.stop()

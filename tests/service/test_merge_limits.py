"""What merges may keep: the same limits as uploads, before the work begins and when it is done."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import httpx
import psutil
import pytest

from tests.crash.merge_world import Client, merge_service
from tests.crash.world import Content, World

pytestmark = [pytest.mark.xdist_group("merges"), pytest.mark.timeout(600)]

ADMIN = "the-admin-key-of-these-tests"


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with merge_service() as made:
        made.start(LORAPLEX_ADMIN_KEY=ADMIN)
        yield made


@pytest.fixture(scope="module")
def admin(world: World) -> Iterator[httpx.Client]:
    headers = {"Authorization": f"Bearer {ADMIN}"}
    with httpx.Client(base_url=world.url, headers=headers, timeout=60, trust_env=False) as http:
        yield http


class Tenant(Client):
    """A tenant's client."""

    def __init__(self, world: World, admin: httpx.Client, name: str, **limits: int) -> None:
        super().__init__(world)
        self.name = name
        self.admin = admin
        assert admin.post("/v1/tenants", json={"name": name, "limits": limits}).status_code == 201
        key = admin.post(f"/v1/tenants/{name}/keys", json={"scopes": ["infer", "upload", "manage"]}).json()["key"]
        self.http.headers["Authorization"] = f"Bearer {key}"

    def limit(self, **limits: int | None) -> None:
        assert self.admin.patch(f"/v1/tenants/{self.name}", json={"limits": limits}).status_code == 200

    def used(self, name: str = "stored_bytes") -> int:
        found: int = self.admin.get(f"/v1/tenants/{self.name}").json()["used"][name]
        return found

    def delete(self, identity: str) -> None:
        assert self.http.delete(f"/v1/merges/{identity}").status_code == 200


@pytest.fixture
def make_tenant(world: World, admin: httpx.Client) -> Iterator[Callable[..., Tenant]]:
    """Tenant(name, limits...)"""
    with ExitStack() as stack:

        def make(name: str, **limits: int) -> Tenant:
            made = Tenant(world, admin, name, **limits)
            stack.callback(made.http.close)
            return made

        yield make


@contextmanager
def paused(merger: psutil.Process) -> Iterator[None]:
    """What is queued stays queued."""
    merger.suspend()
    try:
        yield
    finally:
        merger.resume()


def refused(answer: httpx.Response, status: int, name: str) -> None:
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (status, "limit_exceeded", name), answer.text


def size(job: dict[str, Any]) -> int:
    return sum(file["bytes"] for file in job["files"])


def test_checkpoints_count_from_the_moment_they_are_queued(make_tenant: Callable[..., Tenant]) -> None:
    """Exactly: what they will have is known before."""
    tenant = make_tenant("keeper")
    tenant.upload("a", 1)
    before = tenant.used()
    merger = tenant.merger()
    with paused(merger):
        first = tenant.submit("one", {"a": 0.5}, into="checkpoint")
        promised = tenant.used() - before
        assert promised > 4_000_000
        tenant.limit(stored_bytes=before + 2 * promised - 1)
        refused(tenant.post("two", {"a": 0.5}, into="checkpoint"), 413, "stored_bytes")
        # In shards there are more headers, and an index.
        tenant.limit(stored_bytes=None)
        second = tenant.submit("two", {"a": 0.5}, into="checkpoint", max_shard_bytes=1 << 20)
        promised_both = tenant.used() - before
        tenant.limit(stored_bytes=tenant.used())
        refused(tenant.post("three", {"a": 1.0}), 413, "stored_bytes")
        refused(tenant.http.put("/v1/adapters/b", files=Content.make(9, 4).form), 413, "stored_bytes")
    jobs = [tenant.ended(identity) for identity in (first, second)]
    assert [job["state"] for job in jobs] == ["succeeded", "succeeded"], jobs
    assert len(jobs[1]["files"]) > len(jobs[0]["files"])
    assert size(jobs[0]) == promised
    assert size(jobs[1]) == promised_both - promised
    assert tenant.used() == before + promised_both
    tenant.delete(first)
    assert tenant.used() == before + promised_both - promised
    tenant.delete(second)
    assert tenant.used() == before
    with paused(merger):
        identity = tenant.submit("one", {"a": 0.5}, into="checkpoint")
        tenant.delete(identity)  # cancelled, and still listed
        assert tenant.used() == before
    tenant.limit(stored_bytes=4000)
    refused(tenant.post("two", {"a": 0.5}, into="checkpoint"), 413, "stored_bytes")


def test_merged_adapters_have_the_limits_of_uploaded_ones(make_tenant: Callable[..., Tenant]) -> None:
    tenant = make_tenant("maker", adapters=2, max_rank=4)
    tenant.upload("a", 1)
    tenant.upload("b", 2)
    refused(tenant.post("c", {"a": 0.5}), 413, "adapters")
    refused(tenant.post("a", {"a": 0.5, "b": 0.5}, method="cat"), 413, "max_rank")
    assert tenant.ended(tenant.submit("a", {"a": 0.5, "b": 0.5}))["adapter"] == "a@2"


def test_limits_hold_when_the_result_is_kept(make_tenant: Callable[..., Tenant]) -> None:
    """They were lowered, or used up, since the merge was queued: it fails and says why, and the merger goes on."""
    tenant = make_tenant("late")
    tenant.upload("a", 1)
    tenant.upload("b", 2)
    before = tenant.used()
    merger = tenant.merger()
    for limits, options, said in (
        ({"stored_bytes": before + 1000}, {"into": "checkpoint"}, "stored_bytes"),
        ({"stored_bytes": before}, {}, "stored_bytes"),
        ({"adapters": 2}, {}, "adapters"),
        ({"max_rank": 7}, {"method": "cat"}, "max_rank"),
    ):
        with paused(merger):
            identity = tenant.submit("late", {"a": 0.5, "b": 0.5}, **options)
            tenant.limit(**limits)
        job = tenant.ended(identity)
        assert (job["state"], said in job["error"]) == ("failed", True), job
        assert tenant.used() == before
        tenant.limit(**dict.fromkeys(limits))
    assert tenant.merger().pid == merger.pid
    assert tenant.ended(tenant.submit("late", {"a": 0.5}))["state"] == "succeeded"

"""Tenants, keys, sharing, use and the audit log: the client, blocking and in an event loop, against a real server."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from service import client as api
from tests.service.client_helpers import Both, peft_folder
from tests.service.inference_helpers import BASE
from tests.service.tenant_helpers import ADMIN, TenantServer, wait_for

Connect = Callable[..., Both]


@pytest.fixture(params=["sync", "async"])
def connect(request: pytest.FixtureRequest, tenants: TenantServer) -> Iterator[Connect]:
    """A client with this key."""
    made: list[Both] = []

    def to(key: str, **options: Any) -> Both:
        made.append(Both(request.param, tenants.url, key=key, **options))
        return made[-1]

    yield to
    for both in made:
        both.close()


def test_tenants(connect: Connect, tenants: TenantServer) -> None:
    admin, name = connect(ADMIN), f"life-{tenants.key(tenants.tenant())[4:12]}"
    calls = admin.client.tenants
    made = admin.do(calls.create(name, weight=2.5, limits={"adapters": 3, "max_tokens": 9}))
    assert (made.name, made.weight, made.disabled) == (name, 2.5, False)
    assert (made.limits["adapters"], made.limits["max_tokens"], made.limits["max_rank"]) == (3, 9, None)
    with pytest.raises(api.Conflict) as taken:
        admin.do(calls.create(name))
    assert taken.value.code == "tenant_exists"
    assert admin.do(calls.create(f"{name}-plain")).weight == 1.0
    assert {name, f"{name}-plain"} <= {tenant.name for tenant in admin.all(calls.list())}
    changed = admin.do(calls.update(name, limits={"adapters": None, "max_rank": 8}, weight=1))
    assert (changed.limits["adapters"], changed.limits["max_tokens"], changed.limits["max_rank"]) == (None, 9, 8)
    assert (changed.weight, changed.used) == (1.0, None)
    found = admin.do(calls.get(name))
    assert (found.used["adapters"], found.used["requests_per_minute"]) == (0, 0)
    with pytest.raises(api.BadRequest) as odd:
        admin.do(calls.update(name, limits={"horses": 3}))
    assert odd.value.status == 400
    assert admin.do(calls.delete(name)) == 0
    with pytest.raises(api.NotFound) as gone:
        admin.do(calls.get(name))
    assert gone.value.code == "tenant_not_found"


def test_keys(connect: Connect, tenants: TenantServer) -> None:
    admin, name = connect(ADMIN), tenants.tenant()
    keys = admin.client.keys
    later = datetime.now(UTC) + timedelta(hours=1)
    made = admin.do(keys.create(name, ["upload", "infer"], expires_at=later, description="for the app"))
    assert (made.scopes, made.expires_at, made.description) == (
        ("infer", "upload"),
        int(later.timestamp()),
        "for the app",
    )
    assert made.key not in repr(made)
    assert made.key.split("_")[1] == made.id
    member = connect(made.key)
    assert member.all(member.client.models())[0].id == BASE
    with pytest.raises(api.Forbidden) as forbidden:
        member.all(member.client.tenants.list())
    assert forbidden.value.code == "admin_only"
    wait_for(
        lambda: admin.do(keys.get(name, made.id)).last_used_at
    )  # entered some time after the request, and once a minute
    (listed,) = admin.all(keys.list(name))
    assert listed == admin.do(keys.get(name, made.id))
    assert (listed.id, listed.scopes) == (made.id, made.scopes)
    assert made.key not in str(listed.raw)
    admin.do(admin.client.tenants.update(name, disabled=True))
    with pytest.raises(api.Forbidden) as disabled:
        member.do(member.client.base_model())
    assert disabled.value.code == "tenant_disabled"
    admin.do(admin.client.tenants.update(name, disabled=False))
    assert member.do(member.client.base_model()) == BASE
    assert admin.do(keys.update(name, made.id, disabled=True, description="off")).disabled
    with pytest.raises(api.Unauthorized) as off:
        member.do(member.client.base_model())
    assert off.value.code == "key_disabled"
    changed = admin.do(keys.update(name, made.id, disabled=False, expires_at="never"))
    assert (changed.disabled, changed.expires_at, changed.description) == (False, None, "off")
    assert admin.do(keys.update(name, made.id, expires_at=later)).expires_at == int(later.timestamp())
    assert member.do(member.client.base_model()) == BASE
    admin.do(keys.delete(name, made.id))
    with pytest.raises(api.Unauthorized):
        member.do(member.client.base_model())
    with pytest.raises(api.NotFound):
        admin.do(keys.delete(name, made.id))
    third, first, second = (action for action, _ in zip(admin.all(admin.client.audit()), range(3), strict=False))
    assert (third.action, third.state, third.status) == ("delete_key", "refused", 404)
    assert (first.actor, first.action, first.target) == ("admin", "delete_key", f"{name} {made.id}")
    assert (second.action, second.target) == ("change_key", f"{name} {made.id}")
    assert admin.all(admin.client.audit(tenant=name)) == []  # the admin did it all


def test_sharing(connect: Connect, tenants: TenantServer, tmp_path: Path) -> None:
    a, b = tenants.tenant(), tenants.tenant()
    key = tenants.key(b)
    owner, other = connect(tenants.key(a)), connect(key)
    theirs, name = other.client.adapters, f"{a}/news"
    folder = peft_folder(tmp_path / "up", 51)
    assert owner.do(owner.client.adapters.upload("news", folder)).adapter.visibility == "private"
    with pytest.raises(api.NotFound):
        other.do(theirs.get(name))
    shared = owner.do(owner.client.adapters.update("news", visibility=[b]))
    assert (shared.id, shared.visibility) == ("news", (b,))

    found = other.do(theirs.get(name))
    assert (found.id, found.owner, found.name, found.visibility) == (name, a, "news", (b,))
    assert [adapter.id for adapter in other.all(theirs.list(owner=a))] == [name]
    assert other.do(theirs.version(f"{name}@1")).version == 1
    assert other.do(theirs.version(name)).version == 1
    assert [version.version for version in other.all(theirs.versions(name))] == [1]
    with pytest.raises(api.Forbidden):  # to use it is not to have it
        other.do(theirs.download(name, tmp_path / "down"))
    admin = connect(ADMIN)
    paths = admin.do(admin.client.adapters.download(f"{name}@1", tmp_path / "down"))
    assert {path.name: path.read_bytes() for path in paths} == {
        path.name: path.read_bytes() for path in folder.iterdir()
    }
    assert other.do(other.client.complete("The sea", model=name, max_tokens=2)).adapter == f"{name}@1"
    assert other.do(other.client.complete("The sea", adapters={name: 0.5}, max_tokens=2)).adapter == f"{name}@1"
    assert other.do(other.client.model(name)).id == name
    refused: list[Callable[[], Any]] = [
        lambda: theirs.delete(name),
        lambda: theirs.update(name, description="x"),
        lambda: theirs.set_alias(name, "y", 1),
        lambda: theirs.delete_version(name, 1),
        lambda: theirs.upload(name, folder),
    ]
    for call in refused:
        with pytest.raises(api.Forbidden) as no:
            other.do(call())
        assert no.value.code == "not_your_tenant"
    through = connect(key, tenant=a)
    assert [adapter.id for adapter in through.all(through.client.adapters.list())] == [name]

    assert owner.do(owner.client.adapters.update("news", visibility="public")).visibility == "public"
    assert other.do(theirs.get(name)).visibility == "public"
    assert owner.do(owner.client.adapters.update("news", visibility="private")).visibility == "private"
    with pytest.raises(api.NotFound):
        other.all(theirs.versions(name))
    with pytest.raises(api.BadRequest) as wrong:
        owner.do(owner.client.adapters.update("news", visibility=["no tenant's name"]))
    assert wrong.value.code == "invalid_visibility"
    # The owner may say whose it is, and the admin acts for him.
    assert owner.do(owner.client.adapters.set_alias(name, "live", 1)).version == 1
    acting = connect(ADMIN, tenant=a)
    assert acting.do(acting.client.adapters.update("news", description="by the admin")).description == "by the admin"
    assert acting.do(acting.client.adapters.create(f"{b}/more", folder)).adapter.owner == b
    acting.do(acting.client.adapters.delete_alias("news", "live"))
    assert acting.do(acting.client.adapters.delete("news")).adapter_deleted
    assert [adapter.id for adapter in other.all(theirs.list())] == ["more"]


def test_usage(connect: Connect, tenants: TenantServer, tmp_path: Path) -> None:
    a, b = tenants.tenant(), tenants.tenant()
    member, admin = connect(tenants.key(a)), connect(ADMIN)
    member.do(member.client.adapters.upload("used", peft_folder(tmp_path / "up", 61)))
    for model, tokens in ((BASE, 3), (BASE, 4), ("used", 5)):
        options = {"temperature": 0, "ignore_eos": True, "max_tokens": tokens}
        member.do(member.client.complete([5, 6, 7], model=model, **options))

    def total(both: Both, **query: Any) -> Any:
        (row,) = both.all(both.client.usage(group_by=(), **query))
        return row

    # Not only until all are counted: one that still runs is, with the tokens that it has.
    wait_for(lambda: (total(member).requests, total(member).completion_tokens) == (3, 12))
    now = datetime.now(UTC)
    rows = member.all(member.client.usage(start=now - timedelta(hours=2), group_by=("tenant", "adapter")))
    assert [(row.tenant, row.adapter, row.requests, row.completion_tokens) for row in rows] == [
        (a, "", 2, 7), (a, "used", 1, 5),
    ]  # fmt: skip
    assert all(row.day is None and row.ttft_ms > 0 for row in rows)
    assert total(member, start=now.date() - timedelta(days=9), end=now.date() - timedelta(days=8)).requests == 0
    assert total(admin, tenant=a).prompt_tokens == 9
    assert total(connect(ADMIN, tenant=a)).prompt_tokens == 9
    assert total(admin, tenant=b).requests == 0
    assert {a} <= {row.tenant for row in admin.all(admin.client.usage(group_by=["tenant"]))}
    text = member.do(member.client.usage_csv(group_by=["adapter"], start="2020-01-01"))
    table = {row["adapter"]: row for row in csv.DictReader(io.StringIO(text))}
    assert (table["used"]["requests"], table[""]["completion_tokens"]) == ("1", "7")
    with pytest.raises(api.Forbidden):
        total(member, tenant=b)
    with pytest.raises(api.BadRequest) as odd:
        member.all(member.client.usage(group_by=["weekday"]))
    assert odd.value.param == "group_by"


def test_lists_of_every_kind_page_by_themselves(
    connect: Connect, tenants: TenantServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    admin, name = connect(ADMIN), tenants.tenant()
    made = sorted(admin.do(admin.client.keys.create(name, ["infer"])).id for _ in range(5))
    monkeypatch.setattr("service.wire.tenants.PAGE", 2)
    assert [key.id for key in admin.all(admin.client.keys.list(name))] == made
    names = [tenant.name for tenant in admin.all(admin.client.tenants.list())]
    assert names == sorted(set(names))
    assert name in names
    actions = admin.all(admin.client.audit())
    created = [each.target for each in actions if (each.action, each.state) == ("create_key", "done")]
    assert {f"{name} {key}" for key in made} <= set(created)
    assert len(created) == len(set(created))

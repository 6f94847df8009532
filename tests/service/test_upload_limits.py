"""Uploads of many tenants at once: slots, request limits, quotas that hold before a body is received, the disk."""

from __future__ import annotations

import contextlib
import select
import socket
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from service.api.failure import ApiError
from service.store.errors import QuotaReached
from service.store.quotas import UNLIMITED, Room
from service.upload_shares import FORM_BYTES, Shares

from .tenant_helpers import TenantServer, adapter_files, complete, upload, wait_for

SLOTS = 4
MIB = 1 << 20


@pytest.fixture(scope="module")
def busy(base_model_dir: Path) -> Iterator[TenantServer]:
    server = TenantServer(base_model_dir, max_uploads=SLOTS)
    try:
        server.start()
        yield server
    finally:
        server.stop()


class Unfinished:
    """A PUT whose head and first bytes are sent, and no more unless `send` is called. `length` None: chunked."""

    def __init__(self, server: TenantServer, key: str, name: str, length: int | None) -> None:
        self.socket = socket.create_connection(("127.0.0.1", server.settings.port), timeout=30)
        size = "Transfer-Encoding: chunked" if length is None else f"Content-Length: {length}"
        self.socket.sendall(
            f"PUT /v1/adapters/{name} HTTP/1.1\r\nHost: localhost\r\nAuthorization: {key}\r\n{size}\r\n"
            "Content-Type: multipart/form-data; boundary=xx\r\n\r\n".encode()
        )
        self._chunked = length is None
        self.send(b'--xx\r\nContent-Disposition: form-data; name="weights"; filename="a.safetensors"\r\n\r\n')

    def send(self, data: bytes) -> None:
        self.socket.sendall(b"%x\r\n%s\r\n" % (len(data), data) if self._chunked else data)

    def answer(self) -> str:
        """Head and body of the error."""
        text = b""
        while not text.endswith(b"}}"):
            text += self.socket.recv(65536)
        return text.decode()

    def answered(self) -> bool:
        return bool(select.select([self.socket], [], [], 0)[0])


@contextlib.contextmanager
def unfinished(
    server: TenantServer, client: httpx.Client, name: str, length: int | None = 10_000
) -> Iterator[Unfinished]:
    made = Unfinished(server, client.headers["Authorization"], name, length)
    try:
        yield made
    finally:
        made.socket.close()


def spooled(server: TenantServer) -> int:
    """Bytes of unfinished uploads."""
    return sum(path.stat().st_size for path in server.settings.uploads_dir.glob("*/*/*"))


def folders(server: TenantServer) -> int:
    return len([path for path in server.settings.uploads_dir.glob("*/*") if path.is_dir()])


def code(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["code"]


def test_a_tenant_with_all_slots_keeps_nobody_from_uploading(busy: TenantServer) -> None:
    with busy.member() as (_, greedy), busy.member() as (_, other), busy.member() as (_, third):
        with contextlib.ExitStack() as stack:
            for number in range(SLOTS):
                stack.enter_context(unfinished(busy, greedy, f"g{number}"))
            wait_for(lambda: folders(busy) == SLOTS)
            refused = upload(greedy, "more", 1)
            assert code(refused) == (429, "too_many_uploads")
            assert refused.headers["retry-after"]
            # Others have their share, however many come; and who has more than its share is not let in before them.
            for number in range(2):
                stack.enter_context(unfinished(busy, other, f"o{number}"))
            wait_for(lambda: folders(busy) == SLOTS + 2)
            assert code(upload(other, "more", 2)) == (429, "too_many_uploads")
            assert upload(third, "one", 3).status_code == 201
            assert code(upload(greedy, "more", 1)) == (429, "too_many_uploads")
        wait_for(lambda: folders(busy) == 0)
        assert upload(greedy, "more", 1).status_code == 201


def test_uploads_and_merges_count_as_requests(busy: TenantServer) -> None:
    limits = {"requests_per_minute": 3, "concurrent_requests": 1}
    with busy.member(limits=limits) as (tenant, client):
        with unfinished(busy, client, "slow"):
            wait_for(lambda: folders(busy) == 1)
            refused = upload(client, "second", 1)
            assert (code(refused), refused.json()["error"]["param"]) == ((429, "limit_exceeded"), "concurrent_requests")
        wait_for(lambda: busy.http.get(f"/v1/tenants/{tenant}").json()["used"]["concurrent_requests"] == 0)
        assert upload(client, "second", 1).status_code == 201
        merge = {"name": "m", "sources": [{"adapter": "nobody"}]}
        assert client.post("/v1/merges", json=merge).status_code == 404
        for refused in (upload(client, "third", 2), client.post("/v1/merges", json=merge), complete(client, "second")):
            assert refused.json()["error"]["param"] == "requests_per_minute"
            assert refused.headers["retry-after"]
        # What is counted is written down all the same, and so is what was refused.
        lines = busy.http.get("/v1/audit", params={"tenant_id": tenant}).json()["data"]
        actions = [(line["action"], line["status"]) for line in reversed(lines) if line["status"] is not None]
        assert [action for action in actions if action[1] < 400] == [("put_adapter", 201)]
        assert {("put_adapter", 429), ("create_merge", 404), ("create_merge", 429)} <= set(actions)


def test_what_a_tenant_cannot_keep_is_refused_before_it_is_received(busy: TenantServer) -> None:
    """The server answers although nothing of the weights was sent."""
    for limits, param in (({"adapters": 0}, "adapters"), ({"stored_bytes": 0}, "stored_bytes")):
        with busy.member(limits=limits) as (_, client):
            for length in (500, 5 * MIB, None):
                with unfinished(busy, client, "none", length) as sent:
                    answer = sent.answer()
                    assert answer.startswith("HTTP/1.1 413"), answer
                    assert param in answer
            assert folders(busy) == 0
            assert code(client.post("/v1/adapters", files=adapter_files(1), data={"name": "x"})) == (
                413, "limit_exceeded",
            )  # fmt: skip
    with busy.member(limits={"stored_bytes": 2 * MIB}) as (_, client):
        with unfinished(busy, client, "none", 3 * MIB) as sent:
            assert sent.answer().startswith("HTTP/1.1 413")
        with unfinished(busy, client, "fits", 2 * MIB) as sent:
            wait_for(lambda: folders(busy) == 1)
            assert not sent.answered()


def test_a_body_that_does_not_say_its_size_is_stopped_at_what_may_be_kept(busy: TenantServer) -> None:
    """Of all uploads of the tenant together."""
    with busy.member(limits={"stored_bytes": 6 * MIB}) as (_, client):
        with unfinished(busy, client, "one", None) as one, unfinished(busy, client, "two", None) as two:
            for sent in (one, two):
                for _ in range(2):
                    sent.send(bytes(MIB))
            wait_for(lambda: spooled(busy) >= 2 * MIB)
            assert not one.answered()
            assert not two.answered()
            for _ in range(64):
                if one.answered():
                    break
                one.send(bytes(MIB // 8))
            wait_for(one.answered)
            assert spooled(busy) <= 6 * MIB + 2 * FORM_BYTES
            answer = one.answer()
            assert answer.startswith("HTTP/1.1 413"), answer
            assert "stored_bytes" in answer
        wait_for(lambda: folders(busy) == 0)


def test_content_that_is_kept_already_can_always_be_sent_again(busy: TenantServer) -> None:
    """That takes no room, and repairs files that were damaged."""
    with busy.member() as (tenant, client):
        assert upload(client, "kept", 1).status_code == 201
        size = busy.http.get(f"/v1/tenants/{tenant}").json()["used"]["stored_bytes"]
        limits = {"stored_bytes": size, "adapters": 1}
        busy.http.patch(f"/v1/tenants/{tenant}", json={"limits": limits})
        assert upload(client, "kept", 1).status_code == 200
        again = client.post("/v1/adapters", files=adapter_files(1), data={"name": "kept"})
        assert again.status_code == 200, again.text
        assert upload(client, "kept", 2).json()["error"]["param"] == "stored_bytes"
        assert upload(client, "other", 2).json()["error"]["param"] == "adapters"


def test_uploads_of_one_tenant_leave_room_on_the_disk_for_the_next() -> None:
    """Half of what is free, whatever the number of its uploads; a single user has all of it."""
    shares = Shares(8, share_disk=True)
    free = 100
    with shares.enter("a", UNLIMITED) as first, shares.enter("a", UNLIMITED) as second:
        for upload in (first, second) * 2:
            upload.grow(12, free)
            free -= 12
        for upload in (first, second):
            with pytest.raises(ApiError, match="unfinished") as caught:
                upload.require(3, free)
            assert caught.value.status == 507
        with shares.enter("b", UNLIMITED) as other:
            other.grow(26, free)
            with pytest.raises(ApiError):
                other.grow(1, free - 26)
    with shares.enter("a", UNLIMITED) as fresh:
        fresh.grow(50, 100)
    with Shares(8, share_disk=False).enter("default", UNLIMITED) as only:
        only.grow(99, 100)


def test_room_is_for_all_uploads_of_a_tenant_together() -> None:
    shares = Shares(8, share_disk=False)
    room = Room(1000, "stored_bytes", 5000, "4000 are stored")
    with shares.enter("a", room) as first, shares.enter("a", room) as second, shares.enter("b", room) as other:
        first.grow(900 + FORM_BYTES, 1 << 40)
        second.grow(100, 1 << 40)
        with pytest.raises(QuotaReached, match="stored_bytes of 5000"):
            second.grow(1 + FORM_BYTES, 1 << 40)
        other.grow(1000, 1 << 40)

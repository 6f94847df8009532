"""A merged checkpoint where two services share PostgreSQL and S3: every one of them gives it out, and it goes with its
merge. What is left of one that came to nothing goes too."""

from __future__ import annotations

import hashlib
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import httpx
import numpy as np
import pytest
from safetensors.numpy import load

from tests.crash.merge_world import JOB, MERGER, Client, Q, delta, merge_service
from tests.crash.world import World
from tests.real_parts import S3, Postgres, bucket_names
from tests.service.launch import wait_for

pytestmark = [pytest.mark.xdist_group("merges"), pytest.mark.timeout(900)]


@pytest.fixture
def state(postgres: Postgres, s3: S3) -> dict[str, str]:
    return {"database": postgres.create(), "blobs_url": s3.create()}


@pytest.fixture
def make_client() -> Iterator[Callable[[World], Client]]:
    with ExitStack() as stack:

        def make(world: World) -> Client:
            made = Client(world)
            stack.callback(made.http.close)
            return made

        yield make


@pytest.fixture
def pair(state: dict[str, str]) -> Iterator[tuple[World, World]]:
    with ExitStack() as stack:
        worlds = tuple(stack.enter_context(merge_service(**state)) for _ in range(2))
        for world in worlds:
            world.start()
        yield worlds  # type: ignore[misc]


def test_a_checkpoint_is_given_out_by_every_service(
    pair: tuple[World, World], state: dict[str, str], make_client: Callable[[World], Client]
) -> None:
    clients = [make_client(world) for world in pair]
    content = clients[0].upload("a", 1)
    before = bucket_names(state["blobs_url"])
    identity = clients[0].submit("whole", {"a": 0.5}, into="checkpoint", max_shard_bytes=1 << 20)
    job = clients[1].ended(identity)
    assert job["state"] == "succeeded", job
    assert bucket_names(state["blobs_url"]) == before | {file["sha256"] for file in job["files"]}
    for client in clients:
        assert client.folders() == set()
        tensors: dict[str, np.ndarray] = {}
        for file in job["files"]:
            got = client.http.get(f"/v1/merges/{identity}/files/{file['name']}")
            assert (got.status_code, len(got.content)) == (200, file["bytes"])
            assert hashlib.sha256(got.content).hexdigest() == file["sha256"]
            assert got.headers["etag"] == f'"{file["sha256"]}"'
            if file["name"].endswith(".safetensors"):
                tensors |= load(got.content)
        assert np.abs(tensors[f"{Q}.weight"]).max() > 0
    base = load((pair[0].base / "model.safetensors").read_bytes())[f"{Q}.weight"]
    np.testing.assert_allclose(tensors[f"{Q}.weight"], base + 0.5 * delta(content), atol=1e-5)
    for client in clients:
        ranges(client, identity, max(job["files"], key=lambda file: file["bytes"]))

    # Deleted through the one that did not make it.
    assert clients[1].http.delete(f"/v1/merges/{identity}").json()["deleted"]
    for client in clients:
        gone = client.http.get(f"/v1/merges/{identity}/files/config.json")
        assert (gone.status_code, gone.json()["error"]["code"]) == (404, "merge_not_found")
    wait_for(lambda: bucket_names(state["blobs_url"]) == before, 60)


def ranges(client: Client, identity: str, file: dict[str, object]) -> None:
    url, size = f"/v1/merges/{identity}/files/{file['name']}", int(str(file["bytes"]))
    whole = client.http.get(url)

    def part(wanted: str, **headers: str) -> httpx.Response:
        return client.http.get(url, headers={"Range": wanted, **headers})

    assert size > 1000
    for wanted, start, end in (
        ("bytes=0-9", 0, 10), ("bytes=100-", 100, size), ("bytes=-7", size - 7, size),
        (f"bytes={size - 3}-{size + 100}", size - 3, size), (f"bytes=-{2 * size}", 0, size),
    ):  # fmt: skip
        got = part(wanted)
        assert (got.status_code, got.content) == (206, whole.content[start:end]), wanted
        assert got.headers["content-range"] == f"bytes {start}-{end - 1}/{size}"
    for wanted in (f"bytes={size}-", "bytes=-0"):
        beyond = part(wanted)
        assert (beyond.status_code, beyond.headers["content-range"]) == (416, f"bytes */{size}")
        assert beyond.json()["error"]["code"] == "range_not_satisfiable"
    for wanted in ("bytes=0-1,5-6", "lines=0-1", "bytes=9-3", "bytes=-"):  # what is not understood is not heeded
        assert part(wanted).content == whole.content
    etag = whole.headers["etag"]
    assert part("bytes=0-9", **{"If-Range": etag}).status_code == 206
    assert part("bytes=0-9", **{"If-Range": '"another"'}).content == whole.content
    assert client.http.get(url, headers={"If-None-Match": etag}).status_code == 304


def test_what_comes_to_nothing_leaves_nothing_in_the_store(
    state: dict[str, str], s3: S3, make_client: Callable[[World], Client]
) -> None:
    """A store that does not answer for a while is waited for; a merger killed meanwhile, and a merge cancelled
    meanwhile, leave nothing there."""
    with merge_service(**state) as world:
        world.start()
        client = make_client(world)
        client.upload("a", 1)
        before = bucket_names(state["blobs_url"])

        def storing(identity: str) -> bool:
            return client.get(identity)["phase"] == "publishing"

        for end in ("goes on", "killed", "cancelled"):
            merger = client.merger()
            merger.suspend()
            identity = client.submit(end.replace(" ", "-"), {"a": 0.5}, into="checkpoint")
            merger.resume()
            client.wait(identity, lambda: bool(world.pids(JOB)))
            s3.freeze(True)
            try:
                client.wait(identity, lambda identity=identity: storing(identity))  # type: ignore[misc]
                if end == "killed":
                    merger.send_signal(signal.SIGKILL)
                    wait_for(lambda: world.pids(MERGER) and world.pids(MERGER) != [merger.pid])  # noqa: B023
                elif end == "cancelled":
                    assert client.http.delete(f"/v1/merges/{identity}").json()["state"] == "cancelled"
            finally:
                s3.freeze(False)
            job = client.ended(identity)
            if end == "cancelled":
                assert job["state"] == "cancelled"
            else:
                assert job["state"] == "succeeded", job
                assert {file["sha256"] for file in job["files"]} <= bucket_names(state["blobs_url"])
                client.http.delete(f"/v1/merges/{identity}")
            wait_for(lambda: bucket_names(state["blobs_url"]) == before, 90)
            wait_for(lambda: client.folders() == set(), 30)

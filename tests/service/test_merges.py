"""/v1/merges over HTTP: the whole service with two API processes, a simulated engine, and merges of real files."""

from __future__ import annotations

import hashlib
import signal
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
from safetensors.numpy import load_file

from tests.crash.merge_world import JOB, MERGER, TEMPLATE, Client, Moments, Q, at, delta, merge_service
from tests.crash.world import API, BASE, World
from tests.service.launch import wait_for

pytestmark = [pytest.mark.xdist_group("merges"), pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with merge_service(api_workers=2) as made:
        yield made


@pytest.fixture(scope="module")
def moments(world: World) -> Iterator[Moments]:
    made = Moments(world)
    yield made
    made.close()


@pytest.fixture
def client(moments: Moments) -> Client:
    moments.client.merger()
    return moments.client


@contextmanager
def paused(merger: psutil.Process) -> Iterator[None]:
    """What is queued stays queued."""
    merger.suspend()
    try:
        yield
    finally:
        merger.resume()


def error_of(response: httpx.Response) -> dict[str, Any]:
    error = response.json()["error"]
    assert {"message", "type", "code", "param"} <= error.keys()
    return error  # type: ignore[no-any-return]


def test_adapters_into_an_adapter(client: Client) -> None:
    """From the request to the version that serves, with its origin; again under the same name: the next version."""
    a, b = client.upload("a", 1, rank=4), client.upload("b", 2, rank=4)
    answer = client.post("ab", {"a": 0.5, "b@1": -2.0}, description="half a, less b")
    assert answer.status_code == 202
    queued = answer.json()
    assert queued["state"] == "queued"
    assert (queued["object"], queued["name"], queued["into"], queued["method"]) == ("merge", "ab", "adapter", "linear")
    assert queued["sources"] == [
        {"adapter": "a", "version": 1, "digest": a.digest, "weight": 0.5},
        {"adapter": "b", "version": 1, "digest": b.digest, "weight": -2.0},
    ]
    job = client.ended(queued["id"])
    assert (job["state"], job["error"], job["progress"]) == ("succeeded", None, 1.0), job
    assert job["adapter"] == "ab@1"
    assert "files" not in job
    assert queued["created_at"] <= job["started_at"] <= job["finished_at"]
    version = client.http.get("/v1/adapters/ab/versions/1").json()
    assert version["spec"]["merge"] == {"id": job["id"], "method": "linear", "sources": job["sources"]}
    assert client.http.get("/v1/adapters/ab").json()["description"] == "half a, less b"
    # PEFT's linear adds factors, not products.
    merged = client.adapter_delta("ab", 1)
    assert merged.shape == (16, 16)
    assert np.abs(merged).max() > 0
    done = client.http.post(
        "/v1/completions", json={"model": "ab", "prompt": [1, 2], "max_tokens": 4, "temperature": 0}
    )
    assert done.status_code == 200, done.text
    assert (
        done.json()["choices"][0]["text"].strip() == client.world.answer([1, 2], 4, version["spec"]["sha256"]).strip()
    )

    job = client.ended(client.submit("ab", {"a": 0.5, "b": -2.0}, method="cat"))
    assert job["adapter"] == "ab@2"
    assert client.http.get("/v1/adapters/ab").json()["default_version"] == 2
    np.testing.assert_allclose(client.adapter_delta("ab", 2), 0.5 * delta(a) - 2 * delta(b), atol=1e-5)
    # The same once more has the content of that version, and is that version.
    again = client.ended(client.submit("ab", {"a": 0.5, "b": -2.0}, method="cat"))
    assert again["adapter"] == "ab@2"
    assert client.http.get("/v1/adapters/ab").json()["versions"] == [1, 2]
    # So has one with the content of an older version, and makes that the default, as every merge does with its version.
    older = client.ended(client.submit("ab", {"a": 0.5, "b": -2.0}))
    assert older["adapter"] == "ab@1"
    found = client.http.get("/v1/adapters/ab").json()
    assert (found["versions"], found["default_version"]) == ([1, 2], 1)
    assert client.folders() == set()

    listed = client.http.get("/v1/merges", params={"limit": 2}).json()
    assert [each["id"] for each in listed["data"]] == [older["id"], again["id"]]
    assert listed["has_more"]
    rest = client.http.get("/v1/merges", params={"after": listed["last_id"], "state": "succeeded"}).json()
    assert queued["id"] in [each["id"] for each in rest["data"]]
    figures = client.http.get("/metrics").text
    assert 'loraplex_merges{state="succeeded"}' in figures
    assert 'loraplex_merges{state="running"} 0.0' in figures
    deleted = client.http.delete(f"/v1/merges/{again['id']}")
    assert deleted.json() == {"id": again["id"], "object": "merge", "deleted": True}
    assert error_of(client.http.get(f"/v1/merges/{again['id']}"))["code"] == "merge_not_found"
    assert client.http.get("/v1/adapters/ab/versions/2").status_code == 200  # it stays


def test_an_adapter_into_the_base(client: Client) -> None:
    """A folder to download, in ranges; its source may go, and it goes with its merge."""
    content = client.upload("gone-later", 3, rank=8)
    identity = client.submit("whole", {"gone-later": 0.5}, into="checkpoint", max_shard_bytes=1 << 20)
    taken = client.post("whole", {"gone-later": 1.0}, into="checkpoint")
    assert (taken.status_code, error_of(taken)["code"]) == (409, "merge_exists")
    job = client.ended(identity)
    assert job["state"] == "succeeded", job
    assert "adapter" not in job
    assert client.http.delete("/v1/adapters/gone-later").status_code == 200
    listed = client.http.get(f"/v1/merges/{identity}/files").json()["data"]
    assert [{key: file[key] for key in ("name", "bytes", "sha256")} for file in listed] == job["files"]
    assert {"config.json", "tokenizer.json", "model.safetensors.index.json"} <= {file["name"] for file in listed}
    assert sum(file["name"].endswith(".safetensors") for file in listed) > 1
    for file in listed:
        got = client.http.get(f"/v1/merges/{identity}/files/{file['name']}")
        assert (got.status_code, len(got.content)) == (200, file["bytes"])
        assert hashlib.sha256(got.content).hexdigest() == file["sha256"]
        assert got.headers["etag"] == f'"{file["sha256"]}"'
    base, merged = load_file(client.world.base / "model.safetensors"), client.weights_of(identity)
    assert merged.keys() == base.keys()
    for name, tensor in base.items():
        if name == f"{Q}.weight":
            np.testing.assert_allclose(merged[name], tensor + 0.5 * delta(content), rtol=1e-5, atol=1e-5)
        else:
            np.testing.assert_array_equal(merged[name], tensor)

    file = max(listed, key=lambda each: each["bytes"])
    url, size, etag = f"/v1/merges/{identity}/files/{file['name']}", file["bytes"], f'"{file["sha256"]}"'
    whole = client.http.get(url).content

    def ranged(value: str, **headers: str) -> httpx.Response:
        return client.http.get(url, headers={"Range": value, **{k.replace("_", "-"): v for k, v in headers.items()}})

    for value, part in (("bytes=10-19", whole[10:20]), ("bytes=-5", whole[-5:]), (f"bytes={size - 3}-", whole[-3:])):
        got = ranged(value)
        assert (got.status_code, got.content) == (206, part)
        assert got.headers["content-range"].endswith(f"/{size}")
    past = ranged(f"bytes={size}-")
    assert (past.status_code, past.headers["content-range"]) == (416, f"bytes */{size}")
    assert (error_of(past)["code"], error_of(past)["param"]) == ("range_not_satisfiable", "Range")
    modified = ranged("bytes=0-1").headers["last-modified"]
    for value in ("bytes=5-2", "bytes=a-b", "bytes=-", "items=0-5", f"bytes=0-1,{size}-", "bytes=0-1,7-3", "bytes=,"):
        assert (ranged(value).status_code, ranged(value).content) == (200, whole), value
    assert ranged("bytes=" + "0-0," * 10_000).content == whole
    for value in ("Bytes=0-1", "bytes=0-1,", "bytes= 0-1"):
        assert (ranged(value).status_code, ranged(value).content) == (206, whole[:2]), value
    for value in (f"bytes={'9' * 5000}-", f"bytes={size}-,{size + 5}-"):
        assert ranged(value).status_code == 416, value
    assert ranged(f"bytes=0-{'9' * 5000}").content == whole
    assert ranged("bytes=0-1", If_Range=modified).status_code == 206
    several = ranged("bytes=0-1, 5-6")
    assert several.status_code == 206
    assert several.headers["content-type"].startswith("multipart/byteranges")
    same, other = ranged("bytes=0-1", If_Range=etag), ranged("bytes=0-1", If_Range='"another"')
    assert (same.status_code, same.content, other.status_code, other.content) == (206, whole[:2], 200, whole)
    assert client.http.get(url, headers={"If-None-Match": etag}).status_code == 304
    assert error_of(client.http.get(f"/v1/merges/{identity}/files/other"))["code"] == "file_not_found"
    assert TEMPLATE in {file["name"] for file in listed}
    got = client.http.get(f"/v1/merges/{identity}/files/{TEMPLATE.replace('/', '%2F')}")
    assert got.content == (client.world.base / TEMPLATE).read_bytes()
    for path in ("..%2f..%2fcatalogue.sqlite3", "%2e%2e", "work", TEMPLATE.partition("/")[0], f"x/{TEMPLATE}"):
        assert client.http.get(f"/v1/merges/{identity}/files/{path}").status_code == 404

    assert client.http.delete(f"/v1/merges/{identity}").json()["deleted"]
    assert client.http.get(url).status_code == 404
    assert client.folders() == set()


def test_an_idempotency_key_starts_one_merge(client: Client) -> None:
    """However often and wherever it is sent; with another body it is refused."""
    client.upload("idem", 4)
    with paused(client.merger()):

        def send(_: int) -> tuple[int, str]:
            # A connection each: the kernel spreads them over the API processes.
            with httpx.Client(base_url=client.world.url, timeout=60, trust_env=False) as http:
                body = {"name": "once", "sources": [{"adapter": "idem"}]}
                answer = http.post("/v1/merges", json=body, headers={"Idempotency-Key": "key-1"})
            return answer.status_code, answer.json()["id"]

        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(send, range(16)))
        assert Counter(status for status, _ in answers) == {202: 1, 200: 15}
        assert len({identity for _, identity in answers}) == 1
        other = client.post("once", {"idem": 2.0}, key="key-1")
        assert (other.status_code, error_of(other)["code"]) == (409, "idempotency_key_reused")
        assert answers[0][1] in error_of(other)["message"]
        bad = client.post("once", {"idem": 1.0}, key="k" * 256)
        assert (bad.status_code, error_of(bad)["param"]) == (400, "Idempotency-Key")
        client.http.delete(f"/v1/merges/{answers[0][1]}")


def test_a_merge_holds_its_sources_until_it_ends(client: Client, moments: Moments) -> None:
    """Queued and running; then a cancelled one is gone at once, with its process and its files."""
    client.upload("held", 5)
    client.upload("held", 6)
    with paused(client.merger()):
        identity = client.submit("holder", {"held@1": 1.0})
        assert client.http.patch("/v1/adapters/held", json={"default_version": 2}).status_code == 200
        for path in ("/v1/adapters/held", "/v1/adapters/held/versions/1"):
            refused = client.http.delete(path)
            assert (refused.status_code, error_of(refused)["code"]) == (409, "version_in_use")
            assert identity in error_of(refused)["message"]
        cancelled = client.http.delete(f"/v1/merges/{identity}").json()
        assert (cancelled["state"], cancelled["id"]) == ("cancelled", identity)
        assert client.http.delete("/v1/adapters/held/versions/1").status_code == 200

    moments.at(at(JOB, "open", "/task.json", number=signal.SIGSTOP))
    identity = client.submit("holder", {"held": 1.0})
    job = moments.held(identity)
    assert client.get(identity)["state"] == "running"
    assert client.http.delete("/v1/adapters/held").status_code == 409
    assert client.http.delete(f"/v1/merges/{identity}").json()["state"] == "cancelled"
    assert client.http.delete("/v1/adapters/held").status_code == 200
    wait_for(lambda: not job.is_running() and client.folders() == set(), 30)
    assert client.get(identity)["state"] == "cancelled"
    assert client.http.get("/v1/adapters/holder").status_code == 404
    assert client.http.get(f"/v1/merges/{identity}/files").json()["data"] == []


@pytest.mark.parametrize(
    ("options", "status", "code", "said"),
    [
        ({"method": "ties"}, 422, "merge_refused", ["density"]),
        ({"method": "linear", "density": 0.5, "svd_rank": 4}, 422, "merge_refused", ["density", "svd_rank"]),
        ({"into": "checkpoint", "method": "cat"}, 422, "merge_refused", ["cat"]),
        ({"sources": [{"adapter": "x"}, {"adapter": "wide"}]}, 422, "merge_refused", ["wide@1", "rank"]),
        ({"sources": [{"adapter": "x"}, {"adapter": "nobody"}]}, 404, "adapter_not_found", ["nobody"]),
        ({"sources": [{"adapter": "x@7"}]}, 404, "version_not_found", ["7"]),
        ({"sources": []}, 400, None, ["sources"]),
        ({"sources": [{"adapter": "x"}] * 65}, 400, None, ["sources"]),
        ({"sources": [{"adapter": "x", "weight": 1e9}]}, 400, None, ["weight"]),
        ({"sources": [{"adapter": "x", "scale": 1}]}, 400, "unknown_field", ["scale"]),
        ({"method": "magic"}, 400, None, ["method", "magic"]),
        ({"density": 0}, 400, None, ["density"]),
        ({"into": "gguf"}, 400, None, ["into", "gguf"]),
        ({"name": "../x"}, 400, "invalid_name", ["../x"]),
        ({"name": BASE}, 409, "name_reserved", [BASE]),
        ({"max_shard_bytes": 1}, 400, None, ["max_shard_bytes"]),
        ({"into": "checkpoint", "description": "Both"}, 400, None, ["description", "Both", "checkpoint"]),
        ({"surprise": 1}, 400, "unknown_field", ["surprise"]),
    ],
)
def test_what_cannot_be_merged_is_refused_at_once(
    options: dict[str, Any], status: int, code: str | None, said: list[str], client: Client
) -> None:
    client.upload("x", 1, rank=4)
    client.upload("wide", 2, rank=8)
    answer = client.http.post("/v1/merges", json={"name": "y", "sources": [{"adapter": "x"}], **options})
    error = error_of(answer)
    assert (answer.status_code, error["code"]) == (status, code), error
    assert all(text in error["message"] for text in said), error
    if status == 422:
        assert all(any(text in reason for reason in error["reasons"]) for text in said)


def test_the_merger_has_no_torch(client: Client) -> None:
    """Nor do the API processes; the process that merges has it, or will."""
    client.upload("light", 8)
    identity = client.submit("lighter", {"light": 1.0})
    client.ended(identity)
    for process in (client.merger(), *(psutil.Process(pid) for pid in client.world.pids(API))):
        loaded = {Path(mapped.path).name for mapped in process.memory_maps()}
        assert not [name for name in loaded if name.startswith("libtorch")], process.cmdline()
    assert not client.world.pids(JOB)


def test_what_needs_more_memory_than_a_merge_may_take_is_refused() -> None:
    """And starts no merger, as the first merge does that may be done."""
    with merge_service(merger=False) as world:
        world.start(LORAPLEX_MERGE_MEMORY_BYTES="100MB")
        client = Client(world)
        with closing(client.http):
            client.upload("one", 1)
            refused = client.post("too-much", {"one": 1.0}, method="ties_svd", density=0.5)
            assert (refused.status_code, error_of(refused)["code"]) == (422, "merge_refused")
            assert "a merge may take 0.1 (LORAPLEX_MERGE_MEMORY_BYTES)" in error_of(refused)["message"]
            assert client.http.get("/v1/merges").json()["data"] == []
            world.running.wait_announced()  # or it might have come with the service
            assert not world.pids(MERGER)
            assert world.stop() == 0
            world.start()
            assert client.ended(client.submit("half", {"one": 0.5}))["adapter"] == "half@1"
            assert len(world.pids(MERGER)) == 1

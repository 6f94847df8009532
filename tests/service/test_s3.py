"""Files in S3 when it is away, fails, hangs, or has lost or damaged something; the local copies of them."""

from __future__ import annotations

import hashlib
import os
import pickle
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import obstore
import pytest

from adapters import s3 as s3_module
from adapters.block import read_header
from adapters.errors import AdapterUnavailable, BlobDamaged, StoreUnavailable
from adapters.packer import Packer
from adapters.s3 import S3Blobs, parse_url
from tests.adapters.stored_adapters import make_manifest, store_adapter
from tests.real_parts import S3, bucket, bucket_names

from .adapter_helpers import Engine, Server, files_of, make_peft_adapter, vary
from .launch import wait_for


class Failing(BaseHTTPRequestHandler):
    """An S3 server that answers every request with what `codes` says, in turn; the last one stays."""

    codes: list[int]
    seen: int

    def _answer(self) -> None:
        kind = type(self)
        code = kind.codes[min(kind.seen, len(kind.codes) - 1)]
        kind.seen += 1
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(code)
        self.send_header("Content-Length", "0")
        self.send_header("ETag", '"x"')
        self.end_headers()

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _answer  # noqa: N815

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def failing() -> Iterator[Callable[..., tuple[type[Failing], str]]]:
    """(handler, blobs URL) of a server that fails in a given way."""
    servers = []

    def make(*codes: int) -> tuple[type[Failing], str]:
        handler = type("Handler", (Failing,), {"codes": list(codes), "seen": 0})
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        endpoint = f"http://127.0.0.1:{server.server_port}"
        return handler, f"s3://b/p?endpoint={endpoint}&access_key_id=k&secret_access_key=hidden-word"

    yield make
    for server in servers:
        server.shutdown()
        server.server_close()


def test_passing_failures_are_retried(failing: Callable[..., tuple[type[Failing], str]], tmp_path: Path) -> None:
    handler, url = failing(503, 500, 200)
    S3Blobs(url, tmp_path, 1 << 20).put_bytes(b"x")
    assert handler.seen == 3


@pytest.mark.parametrize("code", [500, 503, 403])
def test_lasting_failures_are_said(
    code: int, failing: Callable[..., tuple[type[Failing], str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_module, "RETRIES", 2)
    handler, url = failing(code)
    blobs = S3Blobs(url, tmp_path / "cache", 1 << 20)
    path = tmp_path / "upload"
    path.write_bytes(b"x")
    sha = hashlib.sha256(b"x").hexdigest()
    for call in (
        lambda: blobs.put_bytes(b"x"), lambda: blobs.put(path, sha, move=True), lambda: blobs.fetch(sha),
        lambda: blobs.size(sha), lambda: blobs.discard([sha]), blobs.check,
    ):  # fmt: skip
        with pytest.raises(StoreUnavailable) as caught:
            call()
        assert "hidden-word" not in str(caught.value)
    assert path.exists()
    assert handler.seen >= 6


def test_a_store_that_hangs_is_given_up(s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RETRIES", 1), ("RETRY_S", 1), ("REQUEST_TIMEOUT_S", 1)):
        monkeypatch.setattr(s3_module, name, value)
    blobs = S3Blobs(s3.create(), tmp_path, 1 << 20)
    sha = blobs.put_bytes(b"x")
    s3.freeze(True)
    try:
        with pytest.raises(StoreUnavailable):
            blobs.fetch(sha)
    finally:
        s3.freeze(False)
    wait_for(lambda: blobs.has(sha))


def test_the_cache_is_bounded_and_its_copies_are_checked(
    s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_module, "YOUNG_S", -1.0)
    blobs = S3Blobs(s3.create(), tmp_path, 2500)
    names = [blobs.put_bytes(bytes([number]) * 1000) for number in range(4)]
    for number, sha in enumerate(names[:3]):
        os.utime(blobs.fetch(sha), (number, number))
    cached = {path.name for path in tmp_path.glob("??/*")}
    assert len(cached) == 2
    assert names[2] in cached
    blobs.fetch(names[2]).write_bytes(b"damaged here")
    assert blobs.fetch(names[2]).read_bytes() == b"\2" * 1000, "it is fetched again"
    huge = blobs.put_bytes(b"x" * 5000)
    assert blobs.fetch(huge).stat().st_size == 5000, "the one in use always fits"
    again = pickle.loads(pickle.dumps(blobs))
    assert again.fetch(names[3]).read_bytes() == b"\3" * 1000


def test_what_is_held_stays_in_the_cache(s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sources of a merge may be more than it holds, and take minutes to come."""
    monkeypatch.setattr(s3_module, "YOUNG_S", -1.0)
    blobs = S3Blobs(s3.create(), tmp_path, 2500)
    names = [blobs.put_bytes(bytes([number]) * 1000) for number in range(5)]
    with blobs.hold(names):
        paths = [blobs.fetch(sha) for sha in names]
        again = tmp_path / "again"
        again.write_bytes(b"\0" * 1000)
        blobs.put(again, names[0], move=True)  # somebody uploads the same
        other = S3Blobs(blobs._url, tmp_path, 2500)  # as in another process
        other.fetch(other.put_bytes(b"passes through"))
        assert [path.read_bytes()[0] for path in paths] == [0, 1, 2, 3, 4]
    assert list((tmp_path / "held").iterdir()) == []
    (tmp_path / "held" / "killed").write_text(names[0])
    blobs.fetch(blobs.put_bytes(b"one more"))
    blobs.fetch(blobs.put_bytes(b"and one"))
    assert sum(path.stat().st_size for path in tmp_path.glob("??/*")) <= 2500
    assert list((tmp_path / "held").iterdir()) == []


def test_a_packer_fetches_and_finds_damage(s3: S3, tmp_path: Path) -> None:
    """As the engine does: in its worker process, out of a cache that was never filled."""
    url, manifest = s3.create(), make_manifest()
    adapter = store_adapter(S3Blobs(url, tmp_path / "one", 1 << 20), manifest, tmp_path, seed=1)  # type: ignore[arg-type]
    whole = Packer(S3Blobs(url, tmp_path / "two", 1 << 20), manifest, tmp_path / "blocks")
    try:
        whole.pack(adapter.digest)
        assert len(list((tmp_path / "two").glob("??/*"))) == 3
        block = next((tmp_path / "blocks").rglob("*.block"))
        assert read_header(block)[0].digest == adapter.digest
    finally:
        whole.close()
    weights = max(bucket_names(url), key=lambda sha: obstore.head(bucket(url), f"{sha[:2]}/{sha}")["size"])
    obstore.put(bucket(url), f"{weights[:2]}/{weights}", b"damaged")
    for folder, expected in (("three", BlobDamaged), ("four", StoreUnavailable)):
        broken = url if folder == "three" else "s3://b?endpoint=http://127.0.0.1:1&access_key_id=k&secret_access_key=s"
        packer = Packer(S3Blobs(broken, tmp_path / folder, 1 << 20), manifest, tmp_path / f"blocks-{folder}")
        try:
            with pytest.raises((expected, AdapterUnavailable)):
                packer.pack(adapter.digest)
        finally:
            packer.close()
        assert list((tmp_path / f"blocks-{folder}").rglob("*.block")) == []


@pytest.mark.parametrize(
    ("url", "parsed"),
    [
        ("s3://b", ("b", "", {})),
        ("s3://b/p/q/?region=eu", ("b", "p/q", {"region": "eu"})),
    ],
)
def test_urls(url: str, parsed: tuple[str, str, dict[str, str]]) -> None:
    assert parse_url(url) == parsed


@pytest.mark.parametrize("url", ["", "x", "s3://", "s3:///p", "http://b/p", "s3://k:s@b/p", "s3://b/p#x", "s3://b?x=1"])
def test_wrong_urls(url: str) -> None:
    with pytest.raises(ValueError, match=r"should be s3://|unknown option"):
        parse_url(url)


def test_a_service_whose_store_goes_away(s3: S3, tmp_path: Path, free_port: Callable[[], int]) -> None:
    """SQLite and S3: uploads and downloads are a clear 503 meanwhile, nothing is half there, all else goes on."""
    url = s3.create()
    adapter = make_peft_adapter(tmp_path / "adapter")
    other = vary(adapter, tmp_path / "other", 1)
    data = tmp_path / "data"
    engine = Engine(data)
    server = Server(data, free_port(), blobs_url=url)
    try:
        server.start()
        http = server.client
        assert http.put("/v1/adapters/a", files=files_of(adapter)).status_code == 201
        stored = bucket_names(url)
        assert len(stored) == 3
        weights = (adapter / "adapter_model.safetensors").read_bytes()
        path = "/v1/adapters/a/versions/1/files/adapter_model.safetensors"
        for copy in (data / "cache" / "blobs").glob("??/*"):
            copy.unlink()
        part = http.get(path, headers={"Range": "bytes=10-29"})
        assert (part.status_code, part.content) == (206, weights[10:30])
        assert http.get(path).content == weights
        sha = hashlib.sha256(weights).hexdigest()
        s3.stop()
        try:
            for copy in (data / "cache" / "blobs").glob("??/*"):
                copy.unlink()
            refused = http.put("/v1/adapters/a", files=files_of(other))
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "storage_unavailable")
            assert refused.headers["Retry-After"]
            assert "127.0.0.1" not in refused.text
            refused = http.get(path)
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "storage_unavailable")
            assert http.get("/v1/adapters/a").json()["versions"] == [1]
            assert http.get("/probe").json()["ready"]
        finally:
            s3.start()
        # moto keeps what it has in memory alone: put back what was there.
        s3.create_again(url)
        obstore.put(bucket(url), f"{sha[:2]}/{sha}", b"damaged")
        damaged = http.get(path)
        assert (damaged.status_code, damaged.json()["error"]["code"]) == (500, "file_damaged")
        assert http.put("/v1/adapters/a", files=files_of(adapter)).status_code == 200
        assert http.get(path).content == weights
        assert http.put("/v1/adapters/a", files=files_of(other)).status_code == 201
        assert http.delete("/v1/adapters/a").status_code == 200
        wait_for(lambda: bucket_names(url) == set())
    finally:
        server.close()
        engine.stop()

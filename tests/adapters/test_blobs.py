from __future__ import annotations

import hashlib
import os
import pickle
import subprocess
import sys
import threading
import time
from pathlib import Path

import obstore
import pytest

from adapters.blobs import AdapterRecord, Blobs, BlobStore, open_blobs
from adapters.errors import (
    AdapterMissing,
    AdapterRefused,
    AdapterTooLarge,
    AdapterUnavailable,
    BlobDamaged,
    StoreUnavailable,
    capped,
)
from tests.real_parts import S3, bucket, bucket_names


@pytest.fixture
def store(tmp_path: Path) -> BlobStore:
    return BlobStore(tmp_path / "blobs")


def spooled(tmp_path: Path, data: bytes) -> tuple[Path, str]:
    path = tmp_path / "upload"
    path.write_bytes(data)
    return path, hashlib.sha256(data).hexdigest()


def content(store: Blobs, sha: str) -> bytes:
    with store.open(sha) as stream:
        return stream.read()


class Backing:
    """What lies behind a store, as somebody who damages it gets at it."""

    def __init__(self, blobs: Blobs, url: str, store: BlobStore) -> None:
        self.blobs = blobs
        self._url = url
        self._store = store

    def write(self, sha: str, data: bytes) -> None:
        if not self._url:
            self._store.path(sha).write_bytes(data)
            return
        obstore.put(bucket(self._url), f"{sha[:2]}/{sha}", data)
        self.blobs.forget(sha)

    def names(self) -> set[str]:
        if not self._url:
            return set(self._store)
        return bucket_names(self._url)


@pytest.fixture(params=["local", "s3"])
def backing(request: pytest.FixtureRequest, tmp_path: Path, store: BlobStore) -> Backing:
    """A store of each kind."""
    if request.param == "local":
        return Backing(store, "", store)
    s3: S3 = request.getfixturevalue("s3")
    url = s3.create()
    return Backing(open_blobs(tmp_path / "blobs", tmp_path / "cache", 1 << 30, url), url, store)


@pytest.fixture
def blobs(backing: Backing) -> Blobs:
    return backing.blobs


@pytest.mark.parametrize("move", [False, True])
@pytest.mark.parametrize("data", [b"", b"hello", bytes(range(256)) * (84 << 10)], ids=["empty", "small", "parts"])
def test_put_and_read_back(backing: Backing, tmp_path: Path, data: bytes, move: bool) -> None:
    blobs = pickle.loads(pickle.dumps(backing.blobs))  # packers get a copy
    path, sha = spooled(tmp_path, data)
    assert not blobs.has(sha)
    blobs.put(path, sha, move=move)
    assert path.exists() is not move
    for _ in range(2):
        assert blobs.has(sha)
        assert blobs.size(sha) == len(data)
        assert content(blobs, sha) == data
        assert blobs.fetch(sha).read_bytes() == data
        blobs.verify(sha)
        blobs.forget(sha)  # what is kept locally: it comes again
    assert backing.names() == {sha}
    if move:
        path.write_bytes(data)
    blobs.put(path, sha, move=move)
    assert path.exists() is not move
    assert [path for path in tmp_path.rglob("*") if path.parent.name in ("tmp", "incoming")] == []


def test_put_bytes(backing: Backing) -> None:
    blobs = backing.blobs
    sha = blobs.put_bytes(b"record")
    assert sha == hashlib.sha256(b"record").hexdigest()
    assert content(blobs, sha) == b"record"
    assert blobs.put_bytes(b"record") == sha
    assert backing.names() == {sha}


def test_missing(blobs: Blobs) -> None:
    sha = "0" * 64
    for call in (blobs.open, blobs.size, blobs.verify, blobs.fetch):
        with pytest.raises(AdapterMissing):
            call(sha)
    blobs.discard([sha])
    blobs.forget(sha)
    blobs.check()


@pytest.mark.parametrize("name", ["", "x", "../" + "0" * 61, "A" * 64, "0" * 63, "0" * 64 + "\n", "0" * 65])
def test_only_hashes_are_names(blobs: Blobs, tmp_path: Path, name: str) -> None:
    for call in (blobs.has, blobs.size, blobs.open, blobs.fetch, blobs.where):
        with pytest.raises(ValueError, match="sha256"):
            call(name)
    with pytest.raises(ValueError, match="sha256"):
        blobs.discard([name])
    with pytest.raises(ValueError, match="sha256"):
        blobs.put(spooled(tmp_path, b"x")[0], name)


def test_a_copy_with_another_hash_is_not_stored(backing: Backing, tmp_path: Path) -> None:
    path, _ = spooled(tmp_path, b"data")
    with pytest.raises(BlobDamaged):
        backing.blobs.put(path, "0" * 64)
    assert backing.names() == set()
    assert list(tmp_path.rglob("tmp/*")) == []


@pytest.mark.parametrize("damaged", [b"0123x56789", b"01234", b""])
def test_damage_is_found_and_repaired(backing: Backing, tmp_path: Path, damaged: bytes) -> None:
    """Of any kind, also where the size is right: what an upload brings has just been hashed."""
    blobs = backing.blobs
    path, sha = spooled(tmp_path, b"0123456789")
    record = blobs.put_bytes(b"record")
    blobs.put(path, sha)
    backing.write(sha, damaged)
    for call in (blobs.verify, blobs.fetch):
        with pytest.raises(BlobDamaged):
            call(sha)
    backing.write(record, b"rexord")
    blobs.put(path, sha, move=True)
    assert blobs.put_bytes(b"record") == record
    blobs.verify(sha)
    blobs.verify(record)
    assert content(blobs, sha) == b"0123456789"
    assert blobs.where(sha).endswith(f"/{sha[:2]}/{sha}")


def test_discard(backing: Backing) -> None:
    blobs = backing.blobs
    names = {blobs.put_bytes(b"%d" % number) for number in range(5)}
    kept = blobs.put_bytes(b"kept")
    for sha in names:
        blobs.fetch(sha)
    blobs.discard(names | {"0" * 64})
    assert backing.names() == {kept}
    assert not any(map(blobs.has, names))
    with pytest.raises(AdapterMissing):
        blobs.open(names.pop())


def test_a_sweep_without_grace_asks_no_clock(store: BlobStore) -> None:
    kept, unused = store.put_bytes(b"kept"), store.put_bytes(b"unused")
    for sha in (kept, unused):
        age(store.path(sha), -10_000)  # made before the clock went back
    assert store.sweep({kept}, grace_seconds=50) == (0, 0)
    assert store.sweep({kept}, grace_seconds=0.0) == (1, len(b"unused"))
    assert set(store) == {kept}


def test_delete(store: BlobStore) -> None:
    sha = store.put_bytes(b"x")
    assert store.delete(sha) is True
    assert not store.has(sha)


def age(path: Path, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(path, (then, then))


def test_sweep(store: BlobStore) -> None:
    kept, unused, young, again = (store.put_bytes(text) for text in (b"kept", b"unused", b"young", b"again"))
    leftover = store.temp / "leftover"
    leftover.write_bytes(b"half")
    writing = store.temp / "writing"
    writing.write_bytes(b"half")
    for path in (store.path(kept), store.path(unused), store.path(again), leftover):
        age(path, 100)
    store.put_bytes(b"again")  # an upload that found its blob present is as young as any other
    assert store.sweep({kept}, grace_seconds=50) == (2, len(b"unused") + len(b"half"))
    assert set(store) == {kept, young, again}
    assert writing.exists()
    assert not leftover.exists()


def test_a_moved_file_is_young(store: BlobStore, tmp_path: Path) -> None:
    path, sha = spooled(tmp_path, b"old upload")
    age(path, 10_000)
    store.put(path, sha, move=True)
    assert store.sweep(set(), grace_seconds=50) == (0, 0)


PUT_FOR_EVER = """
import sys
from pathlib import Path
from adapters.blobs import BlobStore
store, data = BlobStore(Path(sys.argv[1])), bytes(4 << 20)
while True:
    store.delete(store.put_bytes(data))
"""


def test_a_killed_writer_leaves_no_half_blob(store: BlobStore) -> None:
    """A blob is there whole or not at all, wherever its writer was killed."""
    for _ in range(3):
        writer = subprocess.Popen([sys.executable, "-c", PUT_FOR_EVER, str(store.root)])
        deadline = time.monotonic() + 30
        while not any(store.temp.iterdir()) and time.monotonic() < deadline:
            time.sleep(0.001)
        assert writer.poll() is None
        writer.kill()
        writer.wait()
        for sha in store:
            assert store.size(sha) == 4 << 20
            store.verify(sha)
    store.sweep(set(), grace_seconds=-10)
    assert list(store) == []
    assert list(store.temp.iterdir()) == []


def test_writers_and_sweeper_together(store: BlobStore) -> None:
    """What a put has returned is there, however often unused blobs are swept with a grace period."""
    failures: list[BaseException] = []

    def write(number: int) -> None:
        try:
            for step in range(30):
                data = b"%d" % (step % 3)
                sha = store.put_bytes(data)
                if content(store, sha) != data:
                    raise BlobDamaged(sha, "differs")
        except BaseException as error:
            failures.append(error)

    old = [store.put_bytes(b"%d" % step) for step in range(3)]
    for sha in old:
        age(store.path(sha), 1000)
    threads = [threading.Thread(target=write, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        store.sweep(set(), grace_seconds=500)
    for thread in threads:
        thread.join()
    assert failures == []


def test_record() -> None:
    files = (("b.safetensors", "1" * 64, 7), ("adapter_config.json", "0" * 64, 5))
    record = AdapterRecord(files)
    text = f'{{"files":[["adapter_config.json","{"0" * 64}",5],["b.safetensors","{"1" * 64}",7]]}}'.encode()
    assert record.to_json() == text
    assert record.digest == hashlib.sha256(text).hexdigest()
    assert AdapterRecord(files[::-1]).digest == record.digest
    assert set(AdapterRecord.from_json(text, record.digest).files) == set(files)


@pytest.mark.parametrize(
    "data", [b"", b"[]", b'{"files":[["../x","%s",1]]}' % (b"0" * 64), b'{"files":[["x","y",1]]}', b'{"files":[["x"]]}']
)
def test_bad_records(data: bytes) -> None:
    with pytest.raises(BlobDamaged):
        AdapterRecord.from_json(data, hashlib.sha256(data).hexdigest())
    with pytest.raises(BlobDamaged):
        AdapterRecord.from_json(AdapterRecord(()).to_json(), "0" * 64)


@pytest.mark.parametrize(
    "error",
    [
        AdapterRefused(["a", "b"]),
        AdapterMissing("d"),
        BlobDamaged("d", "x"),
        AdapterTooLarge("d", 2, 1),
        AdapterUnavailable("d", "x"),
        StoreUnavailable("x"),
    ],
)
def test_errors_cross_processes(error: Exception) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert str(copy) == str(error)
    assert vars(copy) == vars(error)


def test_capped() -> None:
    assert capped(["a", "a", "b"]) == ["a", "b"]
    assert capped(map(str, range(5)), limit=3) == ["0", "1", "2", "and 2 more"]

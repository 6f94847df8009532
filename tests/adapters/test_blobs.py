from __future__ import annotations

import hashlib
import os
import pickle
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from adapters.blobs import AdapterRecord, BlobStore
from adapters.errors import AdapterMissing, AdapterRefused, AdapterTooLarge, AdapterUnavailable, BlobDamaged, capped


@pytest.fixture
def store(tmp_path: Path) -> BlobStore:
    return BlobStore(tmp_path / "blobs")


def spooled(tmp_path: Path, data: bytes) -> tuple[Path, str]:
    path = tmp_path / "upload"
    path.write_bytes(data)
    return path, hashlib.sha256(data).hexdigest()


def content(store: BlobStore, sha: str) -> bytes:
    with store.open(sha) as stream:
        return stream.read()


@pytest.mark.parametrize("move", [False, True])
@pytest.mark.parametrize("data", [b"", b"hello", bytes(3 << 20)])
def test_put_and_read_back(store: BlobStore, tmp_path: Path, data: bytes, move: bool) -> None:
    path, sha = spooled(tmp_path, data)
    assert not store.has(sha)
    store.put(path, sha, move=move)
    assert store.has(sha)
    assert store.size(sha) == len(data)
    assert content(store, sha) == data
    assert store.path(sha).read_bytes() == data
    assert path.exists() is not move
    assert list(store) == [sha]
    assert list(store.temp.iterdir()) == []
    store.verify(sha)
    if move:
        path.write_bytes(data)
    store.put(path, sha, move=move)
    assert path.exists() is not move
    assert BlobStore(store.root).has(sha)


def test_put_bytes(store: BlobStore) -> None:
    sha = store.put_bytes(b"record")
    assert sha == hashlib.sha256(b"record").hexdigest()
    assert content(store, sha) == b"record"
    assert store.put_bytes(b"record") == sha


def test_missing(store: BlobStore) -> None:
    sha = "0" * 64
    for call in (store.open, store.size, store.verify):
        with pytest.raises(AdapterMissing):
            call(sha)
    assert store.delete(sha) is False


@pytest.mark.parametrize("name", ["", "x", "../" + "0" * 61, "A" * 64, "0" * 63, "0" * 64 + "\n", "0" * 65])
def test_only_hashes_are_names(store: BlobStore, name: str) -> None:
    for call in (store.path, store.has, store.size, store.open, store.delete):
        with pytest.raises(ValueError, match="sha256"):
            call(name)


def test_a_copy_with_another_hash_is_not_stored(store: BlobStore, tmp_path: Path) -> None:
    path, _ = spooled(tmp_path, b"data")
    with pytest.raises(BlobDamaged):
        store.put(path, "0" * 64)
    assert list(store) == []
    assert list(store.temp.iterdir()) == []


def test_damage_is_found_and_repaired(store: BlobStore, tmp_path: Path) -> None:
    path, sha = spooled(tmp_path, b"0123456789")
    store.put(path, sha)
    store.path(sha).write_bytes(b"0123x56789")
    with pytest.raises(BlobDamaged):
        store.verify(sha)
    store.path(sha).write_bytes(b"01234")
    store.put(path, sha)
    store.verify(sha)


def test_storing_again_repairs_damage_of_any_kind(store: BlobStore, tmp_path: Path) -> None:
    """Also where the size is right: what an upload brings has just been hashed."""
    path, sha = spooled(tmp_path, b"0123456789")
    record = store.put_bytes(b"record")
    store.put(path, sha)
    store.path(sha).write_bytes(b"0123x56789")
    store.path(record).write_bytes(b"rexord")
    store.put(path, sha, move=True)
    assert store.put_bytes(b"record") == record
    store.verify(sha)
    store.verify(record)


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

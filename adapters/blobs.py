"""Files by content hash, and the record that makes files an adapter version.

A blob is named by the sha256 (hex) of its bytes and never changes. It appears under its name only when all its bytes
are on the disk: written to a temporary file, fsync, rename, fsync of the folder.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import tempfile
import time
from collections.abc import Collection, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO, Protocol

import msgspec

from adapters.errors import AdapterMissing, BlobDamaged

INDEX_SUFFIX = ".safetensors.index.json"
SWEEP_GRACE_SECONDS = 3600.0
"""An upload is stored before its row is committed: a sweep spares blobs younger than this."""

_SHA256 = re.compile(r"[0-9a-f]{64}")
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")


class Blobs(Protocol):
    """What the rest of the project asks of a store, whatever lies behind it: BlobStore or adapters/s3.py.

    All may take long and are for threads. StoreUnavailable where a remote store does not answer or refuses; ValueError
    for a name that is no sha256 in lower-case hex."""

    def put(self, path: Path, sha: str, *, move: bool = False) -> None:
        """Stores the file at `path`, durable when this returns; `move` gives the file up."""

    def put_bytes(self, data: bytes) -> str:
        """Stores `data`, durable when this returns; gives its sha256."""

    def has(self, sha: str) -> bool: ...
    def size(self, sha: str) -> int: ...
    def open(self, sha: str) -> BufferedReader: ...

    def read(self, sha: str, start: int, end: int) -> bytes:
        """The bytes from `start` to before `end`, as the store has them: a part cannot be checked. AdapterMissing."""

    def verify(self, sha: str) -> None:
        """What `open` gives has the bytes that were stored. AdapterMissing, BlobDamaged."""

    def fetch(self, sha: str) -> Path:
        """A local file with the blob's bytes, checked just now; not to be changed. A cache keeps it for a minute, or as
        long as it is held (`hold`). AdapterMissing, BlobDamaged."""

    def hold(self, shas: Iterable[str]) -> AbstractContextManager[None]:
        """Until the block ends, or this process, a cache keeps those of them that are there or come meanwhile. OSError
        where the disk is full."""

    def where(self, sha: str) -> str:
        """For messages to the operator."""

    @property
    def shared_at(self) -> str:
        """Where other services find the same blobs; empty: nowhere, they lie in a local folder."""

    def discard(self, shas: Collection[str]) -> None:
        """Deletes those of the blobs that are there."""

    def forget(self, sha: str) -> None:
        """Drops what of the blob is kept locally, if it is kept elsewhere."""

    def sweep(self, keep: Collection[str], grace_seconds: float = SWEEP_GRACE_SECONDS) -> tuple[int, int]: ...
    def sweep_unfinished(self) -> None: ...

    def check(self) -> None:
        """StoreUnavailable if it does not answer."""


class BlobStore:
    """Blobs in a local folder: <root>/<first two digits>/<sha256>, temporary files in <root>/tmp.

    Safe to use from several threads and processes. ValueError for a name that is no sha256 in lower-case hex."""

    def __init__(self, root: Path) -> None:
        self.root = Path(root)
        self.temp = self.root / "tmp"
        self.temp.mkdir(parents=True, exist_ok=True)

    def path(self, sha: str) -> Path:
        """Where the blob lies or would lie; whether it exists is for `has` to say."""
        if not _SHA256.fullmatch(sha):
            raise ValueError(f"{sha!r} is not a sha256 in hexadecimal")
        return self.root / sha[:2] / sha

    def has(self, sha: str) -> bool:
        return self.path(sha).is_file()

    def size(self, sha: str) -> int:
        """Bytes. AdapterMissing."""
        try:
            return self.path(sha).stat().st_size
        except FileNotFoundError as error:
            raise AdapterMissing(sha) from error

    def open(self, sha: str) -> BufferedReader:
        """For reading. AdapterMissing."""
        try:
            return self.path(sha).open("rb")
        except FileNotFoundError as error:
            raise AdapterMissing(sha) from error

    def read(self, sha: str, start: int, end: int) -> bytes:
        with self.open(sha) as stream:
            stream.seek(start)
            return stream.read(end - start)

    def put(self, path: Path, sha: str, *, move: bool = False) -> None:
        """Stores the file at `path` under `sha`; durable when this returns.

        A copy is hashed on the way (BlobDamaged if it is not `sha`). `move` takes the file itself when it lies on the
        same file system: the caller has hashed it and gives it up (on success nothing is left at `path`). What is
        stored already is replaced, so that storing it again repairs a blob that has been damaged on the disk."""
        target = self.path(sha)
        with self._lock(fcntl.LOCK_SH):
            if move and path.stat().st_dev == self.temp.stat().st_dev:
                with path.open("rb") as stream:
                    os.fsync(stream.fileno())
                os.utime(path)
                self._publish(path, target)
                return
            if not move and self._refresh(target, path.stat().st_size):
                return
            with path.open("rb") as source, self._temporary() as stream:
                digest = _copy(source, stream)
                if digest != sha:
                    raise BlobDamaged(sha, f"{path.name} hashes to {digest}")
                self._finish(stream, target)
        if move:
            path.unlink()

    def put_bytes(self, data: bytes) -> str:
        """Stores `data`, durable when this returns; gives its sha256."""
        sha = hashlib.sha256(data).hexdigest()
        target = self.path(sha)
        with self._lock(fcntl.LOCK_SH):
            if not self._refresh(target, len(data)) or target.read_bytes() != data:
                with self._temporary() as stream:
                    stream.write(data)
                    self._finish(stream, target)
        return sha

    def delete(self, sha: str) -> bool:
        """Whether there was something to delete."""
        target = self.path(sha)
        with self._lock(fcntl.LOCK_SH):
            try:
                target.unlink()
            except FileNotFoundError:
                return False
            fsync_folder(target.parent)
        return True

    def verify(self, sha: str) -> None:
        """Reads the blob again. AdapterMissing, or BlobDamaged if it no longer hashes to its name."""
        with self.open(sha) as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        if digest != sha:
            raise BlobDamaged(sha, f"its bytes hash to {digest}")

    def fetch(self, sha: str) -> Path:
        """The file, once its bytes are known to be those that were stored. AdapterMissing, BlobDamaged."""
        self.verify(sha)
        return self.path(sha)

    def hold(self, shas: Iterable[str]) -> AbstractContextManager[None]:
        """Nothing is evicted here."""
        return nullcontext()

    def where(self, sha: str) -> str:
        return str(self.path(sha))

    @property
    def shared_at(self) -> str:
        return ""

    def check(self) -> None:
        """Nothing: the folder is there."""

    def discard(self, shas: Collection[str]) -> None:
        for sha in shas:
            self.delete(sha)

    def forget(self, sha: str) -> None:
        """Nothing: the only copy is the one that is kept."""

    def __iter__(self) -> Iterator[str]:
        for folder in sorted(self.root.iterdir()):
            if len(folder.name) == 2 and folder.is_dir():
                yield from sorted(entry.name for entry in folder.iterdir() if _SHA256.fullmatch(entry.name))

    def sweep(self, keep: Collection[str], grace_seconds: float = SWEEP_GRACE_SECONDS) -> tuple[int, int]:
        """Deletes blobs that are not in `keep` and what interrupted writes left, if older than the grace period.

        `keep` must be read after the grace period's start, or a blob stored meanwhile could be lost: rows are committed
        well within it. Grace 0 asks no clock: the caller keeps writers away. Gives (files, bytes) deleted."""
        wanted = frozenset(keep)
        unused = [self.path(sha) for sha in self if sha not in wanted]
        return self._sweep([*self._leftovers(), *unused], grace_seconds)

    def sweep_unfinished(self) -> None:
        """Deletes what interrupted writes left; who is writing now is waited for."""
        self._sweep(self._leftovers(), 0.0)

    def _leftovers(self) -> list[Path]:
        return [entry for entry in self.temp.iterdir() if entry.is_file()]

    def _sweep(self, paths: list[Path], grace_seconds: float) -> tuple[int, int]:
        limit = time.time() - grace_seconds if grace_seconds else float("inf")
        files = freed = 0
        for path in paths:
            # Exclusive, and for one file at a time: a put that finds the blob present refreshes its time first.
            with self._lock(fcntl.LOCK_EX):
                try:
                    status = path.stat()
                    if status.st_mtime >= limit:
                        continue
                    path.unlink()
                except FileNotFoundError:
                    continue
            files += 1
            freed += status.st_size
        return files, freed

    def _refresh(self, target: Path, size: int) -> bool:
        """Whether the blob is there whole; if so a sweep must see it as new."""
        try:
            if target.stat().st_size != size:
                return False
            os.utime(target)
        except FileNotFoundError:
            return False
        return True

    @contextmanager
    def _lock(self, how: int) -> Iterator[None]:
        with (self.root / ".lock").open("ab") as stream:
            fcntl.flock(stream, how)
            yield

    @contextmanager
    def _temporary(self) -> Iterator[BinaryIO]:
        with tempfile.NamedTemporaryFile(dir=self.temp, delete=False) as stream:
            try:
                yield stream  # type: ignore[misc]
            finally:
                Path(stream.name).unlink(missing_ok=True)

    def _finish(self, stream: BinaryIO, target: Path) -> None:
        stream.flush()
        os.fchmod(stream.fileno(), 0o644)
        os.fsync(stream.fileno())
        self._publish(Path(stream.name), target)

    def _publish(self, source: Path, target: Path) -> None:
        if not target.parent.is_dir():
            target.parent.mkdir(exist_ok=True)
            fsync_folder(self.root)
        source.replace(target)
        fsync_folder(target.parent)


def open_blobs(folder: Path, cache_dir: Path, cache_bytes: int, url: str = "") -> Blobs:
    """The store in the local `folder`, or at `url` (s3://bucket/prefix...) with copies in `cache_dir`.

    The URL may hold credentials, and so comes by LORAPLEX_BLOBS_URL to every process that needs it, never by a command
    line. ValueError for a URL that cannot be used."""
    if not url:
        return BlobStore(folder)
    from adapters.s3 import S3Blobs

    return S3Blobs(url, Path(cache_dir) / "blobs", cache_bytes)


class AdapterRecord(msgspec.Struct, frozen=True):
    """The files of one adapter version: (file name, sha256, bytes), sorted by name."""

    files: tuple[tuple[str, str, int], ...]

    def to_json(self) -> bytes:
        """Canonical: the same files give the same bytes. {"files":[[name,sha256,bytes],...]}"""
        return msgspec.json.encode({"files": sorted(self.files)})

    @property
    def digest(self) -> str:
        """sha256 (hex) of `to_json`: the identity of the version, and the name of the record's own blob."""
        return hashlib.sha256(self.to_json()).hexdigest()

    @classmethod
    def from_json(cls, data: bytes, digest: str) -> AdapterRecord:
        """BlobDamaged unless `data` is a record and hashes to `digest`."""
        if hashlib.sha256(data).hexdigest() != digest:
            raise BlobDamaged(digest, "the record does not hash to its name")
        try:
            record = msgspec.json.decode(data, type=cls)
        except (msgspec.DecodeError, msgspec.ValidationError) as error:
            raise BlobDamaged(digest, f"not an adapter record: {error}") from error
        for name, sha, size in record.files:
            if not _FILE_NAME.fullmatch(name) or not _SHA256.fullmatch(sha) or size < 0:
                raise BlobDamaged(digest, f"not an adapter record: file {name!r}")
        return record


def is_file_name(name: str) -> bool:
    """Whether a file of an adapter may be called so: letters, digits, . _ -, no path, at most 128 characters."""
    return _FILE_NAME.fullmatch(name) is not None


def fsync_folder(path: Path) -> None:
    """Makes renames and deletions in a folder durable."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _copy(source: BinaryIO, target: BinaryIO) -> str:
    digest = hashlib.sha256()

    class Tee:
        def write(self, data: bytes) -> int:
            digest.update(data)
            return target.write(data)

    shutil.copyfileobj(source, Tee(), 1 << 20)
    return digest.hexdigest()

"""Blobs in an S3 bucket, or in any store that speaks S3, with a bounded local cache: the other Blobs of blobs.py.

A blob is the object <prefix>/<first two digits>/<sha256>. It appears when its upload is complete and never changes; the
store checks the SHA-256 that goes with every part. What is read is downloaded whole into the cache, hashed on the way,
and only then used: packing reads a file several times, and a damaged object never gets further than that.

Retries with back-off, time limits and parallel parts are the library's (obstore; ARCHITECTURE.md says why this one).
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import tempfile
import time
from collections.abc import Collection, Iterable, Iterator
from datetime import timedelta
from io import BufferedReader
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import obstore
from obstore.exceptions import BaseError, NotFoundError
from obstore.store import S3Store

from adapters.blobs import BlobStore
from adapters.errors import AdapterMissing, BlobDamaged, StoreUnavailable

PART_BYTES = 8 << 20
PARTS_AT_ONCE = 3
"""So an upload holds 24 MiB at most, and S3's 10,000 parts are 80 GB."""
CONNECT_TIMEOUT_S = 5
REQUEST_TIMEOUT_S = 60
"""Of one request, that is of one part; a download's time is counted from its last byte."""
RETRIES = 6
RETRY_S = 20
"""So long a request is repeated after failures that may pass: no connection, 5xx, 429."""
YOUNG_S = 60.0
"""Cached files that were used so short a time ago are not evicted: somebody may be about to open one."""
OPTIONS = ("endpoint", "region", "access_key_id", "secret_access_key", "session_token", "path_style")


def parse_url(url: str) -> tuple[str, str, dict[str, str]]:
    """(bucket, prefix, options) of s3://bucket/prefix?endpoint=...; ValueError says what is wrong, without secrets."""
    parts = urlsplit(url)
    if parts.scheme != "s3" or not parts.netloc or "@" in parts.netloc or parts.fragment:
        raise ValueError("should be s3://bucket/prefix")
    options: dict[str, str] = {}
    for key, value in parse_qsl(parts.query, keep_blank_values=True):
        if key not in OPTIONS:
            raise ValueError(f"has the unknown option {key[:40]!r}; there are {', '.join(OPTIONS)}")
        options[key] = value
    return parts.netloc, parts.path.strip("/"), options


class S3Blobs:
    """Safe to use from several threads and processes, and can be pickled.

    `cache`: folder of the local copies; `cache_bytes`: what they may take together, though the one in use always fits.
    """

    def __init__(self, url: str, cache: Path, cache_bytes: int) -> None:
        self._url = url
        self._cache_bytes = cache_bytes
        self._cache = BlobStore(cache)
        self._bucket, self._prefix, self._options = parse_url(url)
        self._store = self._connect(RETRIES, RETRY_S, REQUEST_TIMEOUT_S)
        # Deleting happens under the writers' lock of the catalogue, and can be done again at any time.
        self._hasty = self._connect(1, 5, 5)

    def __reduce__(self) -> tuple[Any, ...]:
        return S3Blobs, (self._url, self._cache.root, self._cache_bytes)

    def _connect(self, retries: int, retry_s: float, timeout_s: float) -> S3Store:
        options: dict[str, Any] = dict(self._options)
        endpoint = (
            options.get("endpoint") or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        )
        path_style = options.pop("path_style", "true" if endpoint else "false").lower() in ("", "1", "true", "yes")
        if endpoint:
            options["endpoint"] = endpoint
        options.setdefault(
            "region", os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
        )
        return S3Store(
            self._bucket,
            prefix=self._prefix or None,
            virtual_hosted_style_request=not path_style,
            checksum_algorithm="SHA256",
            client_options={
                "allow_http": bool(endpoint and endpoint.startswith("http://")),
                "connect_timeout": timedelta(seconds=CONNECT_TIMEOUT_S),
                "timeout": timedelta(seconds=timeout_s),
            },
            retry_config={"max_retries": retries, "retry_timeout": timedelta(seconds=retry_s)},
            **options,
        )

    def where(self, sha: str) -> str:
        return "/".join(filter(None, (f"s3://{self._bucket}", self._prefix, _key(sha))))

    @property
    def shared_at(self) -> str:
        """Without the endpoint: services may reach one store by different names."""
        return "/".join(filter(None, (f"s3://{self._bucket}", self._prefix)))

    def check(self) -> None:
        """StoreUnavailable if the bucket does not answer, is not there or may not be listed."""
        with _translated(""):
            next(iter(obstore.list(self._hasty, chunk_size=1)), None)

    # ------------------------------------------------------------ writing

    def put(self, path: Path, sha: str, *, move: bool = False) -> None:
        """Uploads the file, in parts if it is large. With `move` it becomes the cached copy: who has just uploaded an
        adapter is about to use it. Without, it is hashed first (BlobDamaged)."""
        key, size = _key(sha), path.stat().st_size
        if not move:
            with path.open("rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
            if digest != sha:
                raise BlobDamaged(sha, f"{path.name} hashes to {digest}")
        with _translated(sha):
            obstore.put(
                self._store,
                key,
                path,
                use_multipart=size > PART_BYTES,
                chunk_size=PART_BYTES,
                max_concurrency=PARTS_AT_ONCE,
            )
            stored = obstore.head(self._store, key)["size"]
        if stored != size:
            raise StoreUnavailable(f"{self.where(sha)} has {stored} bytes after {size} were sent")
        if move:
            with contextlib.suppress(OSError):  # a cache; the disk may be full
                self._cache.put(path, sha, move=True)
                self._evict(keep=sha)
            path.unlink(missing_ok=True)

    def put_bytes(self, data: bytes) -> str:
        sha = hashlib.sha256(data).hexdigest()
        with _translated(sha):
            obstore.put(self._store, _key(sha), data, use_multipart=False)
        return sha

    def discard(self, shas: Collection[str]) -> None:
        names = sorted(shas)
        for start in range(0, len(names), 1000):  # what one request may name
            keys = [_key(sha) for sha in names[start : start + 1000]]
            with _translated(""), contextlib.suppress(NotFoundError, FileNotFoundError):
                obstore.delete(self._hasty, keys)
        for sha in names:
            self.forget(sha)

    # ------------------------------------------------------------ reading

    def has(self, sha: str) -> bool:
        try:
            self._head(sha)
        except AdapterMissing:
            return False
        return True

    def size(self, sha: str) -> int:
        """Bytes. AdapterMissing."""
        try:
            return self._cache.size(sha)
        except AdapterMissing:
            return self._head(sha)

    def _head(self, sha: str) -> int:
        key = _key(sha)
        with _translated(sha):
            return int(obstore.head(self._store, key)["size"])

    def open(self, sha: str) -> BufferedReader:
        """For reading, from the cache, into which it comes if it is not there. AdapterMissing, BlobDamaged."""
        for _ in range(3):
            with contextlib.suppress(AdapterMissing):
                stream = self._cache.open(sha)
                with contextlib.suppress(FileNotFoundError):
                    os.utime(self._cache.path(sha))
                return stream
            self._download(sha)
        raise StoreUnavailable(f"{sha} is evicted from the cache as fast as it comes")

    def read(self, sha: str, start: int, end: int) -> bytes:
        """Past the cache: what is read so is large and read once."""
        with _translated(sha):
            return bytes(obstore.get_range(self._store, _key(sha), start=start, end=end))

    def fetch(self, sha: str) -> Path:
        """The cached file, downloaded if it is not there or not sound. AdapterMissing, BlobDamaged."""
        try:
            self._cache.verify(sha)
            os.utime(self._cache.path(sha))
        except (AdapterMissing, BlobDamaged, FileNotFoundError):
            self._download(sha)
        return self._cache.path(sha)

    def verify(self, sha: str) -> None:
        self.fetch(sha)

    def _download(self, sha: str) -> None:
        """Into the cache. AdapterMissing; BlobDamaged if the object is not what was stored."""
        key, digest = _key(sha), hashlib.sha256()
        with _translated(sha):
            result = obstore.get(self._store, key)
            with self._incoming() as handle:
                for piece in result.stream(min_chunk_size=1 << 20):
                    view = memoryview(piece)
                    digest.update(view)
                    handle.write(view)
                handle.flush()
                if digest.hexdigest() != sha:
                    raise BlobDamaged(sha, f"the object's bytes hash to {digest.hexdigest()}")
                self._cache.put(Path(handle.name), sha, move=True)
        self._evict(keep=sha)

    @contextlib.contextmanager
    def _incoming(self) -> Iterator[Any]:
        """A file beside the cache that is gone at the end, unless it was moved; locked, so that it is known as in use.
        Not in the cache's own tmp: a download may take minutes, and a sweep would wait for it."""
        folder = self._cache.root / "incoming"
        folder.mkdir(exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, delete=False) as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            try:
                yield handle
            finally:
                Path(handle.name).unlink(missing_ok=True)

    # ------------------------------------------------------------ the cache

    def forget(self, sha: str) -> None:
        self._cache.delete(sha)

    def sweep(self, keep: Collection[str], grace_seconds: float = 0.0) -> tuple[int, int]:
        """Of the cache alone: what may be deleted from the bucket is known by name (service/store/blob_book.py); the
        bucket is never searched for it."""
        self.sweep_unfinished()
        return self._cache.sweep(keep, 0.0)

    def sweep_unfinished(self) -> None:
        self._cache.sweep_unfinished()
        folder = self._cache.root / "incoming"
        for path in folder.iterdir() if folder.is_dir() else ():
            with contextlib.suppress(OSError), path.open("rb") as stream:
                # One that was made this moment may not be locked yet; and a young one is no loss.
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if time.time() - path.stat().st_mtime > YOUNG_S:
                    path.unlink()

    def _evict(self, keep: str) -> None:
        """Deletes the cached files that were not used for longest, until the others fit."""
        found, held = [], self._held() | {keep}
        for sha in self._cache:
            with contextlib.suppress(FileNotFoundError):
                status = self._cache.path(sha).stat()
                found.append((status.st_mtime, status.st_size, sha))
        total, young = sum(size for _, size, _ in found), time.time() - YOUNG_S
        for used, size, sha in sorted(found):
            if total <= self._cache_bytes or used > young:
                break
            if sha not in held:
                self._cache.delete(sha)
                total -= size

    @contextlib.contextmanager
    def hold(self, shas: Iterable[str]) -> Iterator[None]:
        """By a file with their names, locked as long as it counts: what a merge reads may come over many minutes, and
        be more than the cache may hold."""
        folder = self._cache.root / "held"
        folder.mkdir(exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=folder, delete=False) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
                file.write("\n".join(shas))
                file.flush()
                yield
            finally:
                Path(file.name).unlink(missing_ok=True)

    def _held(self) -> set[str]:
        found: set[str] = set()
        folder = self._cache.root / "held"
        for path in folder.iterdir() if folder.is_dir() else ():
            with contextlib.suppress(FileNotFoundError), path.open() as stream:
                found.update(stream.read().split())
                with contextlib.suppress(BlockingIOError):
                    fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
                    if time.time() - path.stat().st_mtime > YOUNG_S:  # its process is gone
                        path.unlink()
        return found


@contextlib.contextmanager
def _translated(sha: str) -> Iterator[None]:
    """The library's failures as AdapterMissing and StoreUnavailable."""
    try:
        yield
    except (NotFoundError, FileNotFoundError) as error:
        if "NoSuchBucket" in str(error):
            raise StoreUnavailable("there is no such bucket") from error
        raise AdapterMissing(sha) from error
    except BaseError as error:
        # The first line says it; what follows is the library's own debug output.
        raise StoreUnavailable(str(error).strip().partition("\n")[0][:500]) from error


def _key(sha: str) -> str:
    if len(sha) != 64 or not all(char in "0123456789abcdef" for char in sha):
        raise ValueError(f"{sha!r} is not a sha256 in hexadecimal")
    return f"{sha[:2]}/{sha}"

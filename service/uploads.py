"""Multipart uploads, streamed to disk: a body of any size costs a constant amount of memory.

Every upload has a folder of its own in the spool, which goes when the `async with` of `Spool.receive` ends, however it
ends. A process's folders lie in one that it holds locked, so that a starting process can sweep what dead ones left
without touching the living.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import re
import shutil
import sys
import threading
import uuid
from collections.abc import AsyncIterator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from python_multipart import MultipartParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header

from adapters.blobs import is_file_name
from adapters.disk import require_space
from service.api.body import set_body_limit
from service.api.failure import ApiError, shown
from service.store.quotas import UNLIMITED, Room
from service.store.tables import DEFAULT_TENANT
from service.upload_shares import Shares

if TYPE_CHECKING:
    from fastapi import Request  # the merger imports this module, and has none

CHUNK = 1 << 20  # what is handed to the writing thread at once
MAX_PARTS = 1024
MAX_HEADERS = 16
MAX_HEADER_BYTES = 4096
MAX_BOUNDARY_BYTES = 200
IDLE_TIMEOUT_S = 60.0  # without a byte from the client
LOCK_FILE = "lock"
SERVING_BYTES = 1
"""Size of the lock file of a process that serves; it is empty before."""


@dataclass(frozen=True, slots=True)
class FieldRule:
    """What a form field may be. `max_bytes` 0: only the body's own limit holds."""

    max_bytes: int
    file: bool = False
    repeatable: bool = False


@dataclass(frozen=True, slots=True)
class UploadedFile:
    """A part on disk. `filename` is what the client called it, and is never used as a path."""

    filename: str
    path: Path
    bytes: int


@dataclass(slots=True)
class Form:
    """A received body: small fields decoded, files on disk."""

    fields: dict[str, str] = field(default_factory=dict)
    files: dict[str, list[UploadedFile]] = field(default_factory=dict)


def safe_basename(filename: str) -> str | None:
    """The last component of a client's file name if it can be used in the catalogue, else None."""
    name = re.split(r"[/\\]", filename)[-1]
    return name if is_file_name(name) else None


class Spool:
    """The folder of unfinished uploads."""

    def __init__(self, root: Path, max_bytes: int, max_uploads: int = 16, *, share_disk: bool = False) -> None:
        """`max_uploads`, `share_disk`: service/upload_shares.py."""
        self.root = self._root = root
        self._max_bytes = max_bytes
        self._shares = Shares(max_uploads, share_disk=share_disk)
        self._home = root / uuid.uuid4().hex
        self.process = self._home.name
        """What this process is known by to others of the same data folder: `lives`."""
        # Its own threads: a slow disk must not hold up the threads that everything else uses.
        self._threads = ThreadPoolExecutor(4, thread_name_prefix="upload")
        root.mkdir(parents=True, exist_ok=True)
        with _held_still(root):  # another process that sweeps would take a folder without its lock for abandoned
            self._home.mkdir()
            self._lock = (self._home / LOCK_FILE).open("wb")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def sweep(self) -> int:
        """Deletes what processes that are gone left behind; returns how many entries of the spool that were."""
        swept = 0
        with _held_still(self._root):
            for entry in self._root.iterdir():
                if entry != self._home and not _held(entry):
                    # A process that closes lets go of its folder and deletes it itself: what it was faster with is
                    # gone, and what this one has not come to is still deleted there.
                    with suppress(FileNotFoundError):
                        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
                        swept += 1
        return swept

    def serve(self) -> None:
        """This process may have requests from now on."""
        self._lock.truncate(SERVING_BYTES)  # needs no room on a full disk

    def alone(self) -> bool:
        """Whether no other living process serves this data folder. Those that have not come to `serve` do not count:
        where several start at once, each of them would otherwise leave to another what the first one has to sweep."""
        others = (entry for entry in self._root.iterdir() if entry != self._home)
        return not any(_held(entry, SERVING_BYTES) for entry in others)

    def lives(self, process: str) -> bool:
        """Whether the process that had this name still runs."""
        return process == self.process or _held(self._root / process)

    def close(self) -> None:
        self._threads.shutdown(wait=True)
        self._lock.close()
        shutil.rmtree(self._home, ignore_errors=True)

    @asynccontextmanager
    async def receive(
        self, request: Request, rules: Mapping[str, FieldRule], tenant: str = DEFAULT_TENANT, room: Room = UNLIMITED
    ) -> AsyncIterator[Form]:
        """The request's form; its files are gone when the block ends. `room`: what the tenant may still keep; nothing
        of a body that says of itself that it is larger is read.

        Raises ApiError 400 (malformed, unknown or repeated fields, cut off), 408, 413, 415, 429 (too many uploads at
        once), 507 (too much of the disk), QuotaReached, OSError ENOSPC, and Starlette's ClientDisconnect.
        """
        boundary = _boundary(request)
        length = request.headers.get("content-length", "")
        declared = int(length[:20]) if length.isdigit() else 0
        if declared > self._max_bytes:
            raise _too_large(declared, self._max_bytes)
        with self._shares.enter(tenant, room) as upload:
            upload.require(declared, require_space(self._root, declared))
            # The limit of small bodies does not hold here; writer.feed watches this one.
            set_body_limit(request.scope, sys.maxsize)
            folder = self._home / uuid.uuid4().hex
            loop = asyncio.get_running_loop()
            folder.mkdir()
            writer = _FormWriter(folder, boundary, rules, self._max_bytes)
            try:
                async for chunk in _chunks(request):
                    upload.grow(len(chunk), require_space(self._root, len(chunk)))
                    await loop.run_in_executor(self._threads, writer.feed, chunk)
                yield await loop.run_in_executor(self._threads, writer.finish)
            finally:
                # Shielded: it must also happen when this task is being cancelled, perhaps while a thread still writes.
                await asyncio.shield(loop.run_in_executor(self._threads, _remove, writer, folder))

    async def sync(self, paths: list[Path]) -> None:
        """Flushes files to the disk."""
        await asyncio.get_running_loop().run_in_executor(self._threads, _sync, paths)


@contextmanager
def _held_still(root: Path) -> Iterator[None]:
    """No other process adds folders to the spool, or sweeps it, meanwhile."""
    handle = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _held(entry: Path, least_bytes: int = 0) -> bool:
    """Whether a living process holds this folder of the spool, by a lock file of at least that size."""
    try:
        with (entry / LOCK_FILE).open("rb") as lock:
            if os.fstat(lock.fileno()).st_size < least_bytes:
                return False
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: two that ask at once are not in each other's way
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _remove(writer: _FormWriter, folder: Path) -> None:
    writer.close()
    shutil.rmtree(folder, ignore_errors=True)


def _sync(paths: list[Path]) -> None:
    for path in paths:
        with path.open("rb") as file:
            os.fsync(file.fileno())


def _boundary(request: Request) -> bytes:
    media_type, options = parse_options_header(request.headers.get("content-type", ""))
    if media_type != b"multipart/form-data":
        given = request.headers.get("content-type", "")
        raise ApiError(
            415,
            f"Content-Type must be multipart/form-data (value {shown(given)}).",
            code="unsupported_media_type",
            param="Content-Type",
        )
    encoding = request.headers.get("content-encoding", "identity").lower()
    if encoding != "identity":
        raise ApiError(
            415,
            f"Content-Encoding {shown(encoding)} is not supported; send the bytes as they are.",
            code="unsupported_media_type",
            param="Content-Encoding",
        )
    boundary = options.get(b"boundary", b"")
    if not 1 <= len(boundary) <= MAX_BOUNDARY_BYTES:
        raise _malformed(
            f"Content-Type needs a boundary of 1 to {MAX_BOUNDARY_BYTES} characters (it has {len(boundary)}).",
            "Content-Type",
        )
    return boundary


async def _chunks(request: Request) -> AsyncIterator[bytearray]:
    """The body in pieces of about CHUNK bytes: fewer trips to the writing thread than the server's own pieces."""
    stream = request.stream()
    buffer = bytearray()
    while True:
        try:
            async with asyncio.timeout(IDLE_TIMEOUT_S):
                piece = await anext(stream, None)
        except TimeoutError:
            raise ApiError(
                408, "The upload stalled.", code="request_timeout", headers={"Connection": "close"}
            ) from None
        if piece is None:
            break
        buffer += piece
        if len(buffer) >= CHUNK:
            yield buffer
            buffer = bytearray()
    if buffer:
        yield buffer


def _malformed(message: str, param: str | None = None) -> ApiError:
    return ApiError(400, message, code="invalid_multipart", param=param)


def _too_large(size: int, limit: int) -> ApiError:
    message = f"The upload has {size} bytes or more; at most {limit} are accepted (LORAPLEX_MAX_UPLOAD_BYTES)."
    return ApiError(413, message, code="upload_too_large")


class _FormWriter:
    """The parser's callbacks: one part after the other into a file or a field. Runs in the writing threads."""

    def __init__(self, folder: Path, boundary: bytes, rules: Mapping[str, FieldRule], max_bytes: int) -> None:
        self._folder = folder
        self._rules = rules
        self._max_bytes = max_bytes
        self._received = 0
        self._parts = 0
        self._complete = False
        self._closed = False
        self._form = Form()
        self._header_name = bytearray()
        self._header_value = bytearray()
        self._headers: dict[bytes, bytes] = {}
        self._field = ""
        self._rule = FieldRule(0)
        self._filename = ""
        self._text = bytearray()
        self._file: BinaryIO | None = None
        self._path = folder
        self._size = 0
        # close() may come while feed() is at work in another thread, when the request's task was cancelled.
        self._busy = threading.Lock()
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._part_begin,
                "on_header_field": self._add_header_name,
                "on_header_value": self._add_header_value,
                "on_header_end": self._header_end,
                "on_headers_finished": self._headers_finished,
                "on_part_data": self._part_data,
                "on_part_end": self._part_end,
                "on_end": self._end,
            },
            max_header_count=MAX_HEADERS,
            max_header_size=MAX_HEADER_BYTES,
        )

    def feed(self, data: bytearray) -> None:
        """The next piece of the body. Raises ApiError."""
        with self._busy:
            if self._closed:
                return
            self._received += len(data)
            if self._received > self._max_bytes:
                raise _too_large(self._received, self._max_bytes)
            try:
                self._parser.write(bytes(data))
            except FormParserError as error:
                raise _malformed(f"The multipart body is malformed: {error}") from None

    def finish(self) -> Form:
        """The whole form, after the last piece. Raises ApiError 400 if the body ended too early."""
        if not self._complete:
            raise _malformed("The multipart body ends before its closing boundary: it was cut off.")
        return self._form

    def close(self) -> None:
        with self._busy:
            self._closed = True
            if self._file is not None:
                self._file.close()
                self._file = None

    def _part_begin(self) -> None:
        self._parts += 1
        if self._parts > MAX_PARTS:
            raise _malformed(f"The form has more than {MAX_PARTS} parts.")
        self._headers = {}

    def _add_header_name(self, data: bytes, start: int, end: int) -> None:
        self._header_name += data[start:end]

    def _add_header_value(self, data: bytes, start: int, end: int) -> None:
        self._header_value += data[start:end]

    def _header_end(self) -> None:
        self._headers[bytes(self._header_name).lower()] = bytes(self._header_value)
        self._header_name.clear()
        self._header_value.clear()

    def _headers_finished(self) -> None:
        kind, options = parse_options_header(self._headers.get(b"content-disposition", b""))
        if kind != b"form-data" or b"name" not in options:
            raise _malformed("A part has no Content-Disposition: form-data with a name.")
        coding = self._headers.get(b"content-transfer-encoding", b"binary").strip().lower()
        if coding not in (b"binary", b"8bit", b"7bit"):
            raise _malformed("Content-Transfer-Encoding is not supported; send the bytes as they are.")
        self._field = options[b"name"].decode("utf-8", "replace")
        rule = self._rules.get(self._field)
        if rule is None:
            raise _malformed(
                f"Unknown form field {self._field[:100]!r}; the fields are {', '.join(self._rules)}.", self._field[:100]
            )
        if not rule.repeatable and (self._field in self._form.fields or self._field in self._form.files):
            raise _malformed(f"Form field {self._field!r} is given twice.", self._field)
        self._rule = rule
        self._size = 0
        self._filename = options.get(b"filename", b"").decode("utf-8", "replace")
        if rule.file:
            self._path = self._folder / f"part-{self._parts:05d}"
            self._file = self._path.open("xb", buffering=0)

    def _part_data(self, data: bytes, start: int, end: int) -> None:
        self._size += end - start
        if self._rule.max_bytes and self._size > self._rule.max_bytes:
            raise ApiError(
                413,
                f"Form field {self._field!r} is larger than its limit of {self._rule.max_bytes} bytes.",
                code="field_too_large",
                param=self._field,
            )
        if self._file is None:
            self._text += data[start:end]
            return
        view = memoryview(data)[start:end]
        while view:  # an unbuffered file may take less than it is given
            view = view[self._file.write(view) :]

    def _part_end(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
            uploaded = UploadedFile(self._filename, self._path, self._size)
            self._form.files.setdefault(self._field, []).append(uploaded)
            return
        try:
            self._form.fields[self._field] = self._text.decode("utf-8")
        except UnicodeDecodeError:
            raise _malformed(f"Form field {self._field!r} is not UTF-8.", self._field) from None
        self._text.clear()

    def _end(self) -> None:
        self._complete = True

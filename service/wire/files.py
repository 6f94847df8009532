"""Files on their way to the server and back, in constant memory."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import httpx
from anyio import to_thread  # httpx depends on it

from service.wire.errors import DamagedFile, LocalFileError

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
INDEX = "adapter_model.safetensors.index.json"
CHUNK = 1 << 20

Progress = Callable[[int, int], None]
"""Called with the bytes done and the bytes in all."""


# ---------------------------------------------------------------- to the server


@dataclass(frozen=True, slots=True)
class Upload:
    """The form of an upload: which files of this machine are its parts, and its text fields."""

    parts: tuple[tuple[str, Path], ...]
    fields: Mapping[str, str] = field(default_factory=dict)
    progress: Progress | None = None

    def open(self) -> list[tuple[str, Part]]:
        """The files with the names of their fields; every call reads them from the start. Raises LocalFileError."""
        return [(name, Part(path)) for name, path in self.parts]


def peft_folder(folder: Path) -> tuple[tuple[str, Path], ...]:
    """The form's parts for a folder that PEFT's save_pretrained wrote: one file of weights, or shards with their index.

    Raises LocalFileError.
    """
    if not folder.is_dir():
        raise LocalFileError(f"{folder} is not a folder; it should be one that PEFT's save_pretrained wrote")
    if not (folder / CONFIG).is_file():
        inner = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG}"))
        hint = f" (there is one in {', '.join(inner[:5])})" if inner else ""
        raise LocalFileError(f"{folder} has no {CONFIG}{hint}; it should be a folder that save_pretrained wrote")
    parts = [("config", folder / CONFIG)]
    index = folder / INDEX
    if index.is_file():
        weights = [folder / name for name in _shards(index)]
        parts.append(("index", index))
    elif (folder / WEIGHTS).is_file():
        weights = [folder / WEIGHTS]
    else:
        weights = sorted(folder.glob("*.safetensors"))
    if missing := [path.name for path in weights if not path.is_file()]:
        raise LocalFileError(f"{folder} lacks {', '.join(missing[:5])}, named in {INDEX}")
    if not weights:
        old = " It has adapter_model.bin, which can run code when it is read; save it with safe_serialization=True."
        hint = old if (folder / "adapter_model.bin").is_file() else ""
        raise LocalFileError(f"{folder} has no *.safetensors.{hint}")
    return (*parts, *(("weights", path) for path in weights))


def _shards(index: Path) -> list[str]:
    """The files that an index names. Raises LocalFileError for one that is none, or that leaves the folder."""
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as exc:
        raise LocalFileError(f"{index} is not an index of shards: {exc}") from None
    for name in names:
        if not _plain(name):
            raise LocalFileError(f"{index}: {name!r} is not a file's name")
    return names


def _inside(name: str) -> bool:
    """Whether it names a file in a folder or in one of that folder's own, and nothing outside."""
    return all(map(_plain, name.split("/")))


def _plain(name: object) -> bool:
    """Whether it names a file in a folder, and nothing outside."""
    return isinstance(name, str) and re.fullmatch(r"[^/\\\0]{1,255}", name) is not None and name not in (".", "..")


class Part:
    """A file that is opened at its first read: a form may have more parts than a process may have open files."""

    def __init__(self, path: Path) -> None:
        self.name = path.name
        self._path = path
        self._file: IO[bytes] | None = None
        self._at = 0
        try:
            self._size = path.stat().st_size
        except OSError as exc:
            raise LocalFileError(f"{path}: {exc.strerror}") from None

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """To the start or to the end, which is how httpx finds the size."""
        self.close()
        self._at = self._size if whence == os.SEEK_END else offset
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int = -1) -> bytes:
        try:
            if self._file is None:
                if self._at >= self._size:
                    return b""
                self._file = self._path.open("rb")
                self._file.seek(self._at)
            # What was announced has to come, no more and no less, or the body has no end.
            data = self._file.read(min(CHUNK if size < 0 else size, self._size - self._at))
        except OSError as exc:
            raise LocalFileError(f"{self._path}: {exc.strerror}") from None
        self._at += len(data)
        if self._at >= self._size:
            self.close()
        elif not data:
            raise LocalFileError(f"{self._path} became shorter while it was being uploaded")
        return data

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


class UploadBody(httpx.SyncByteStream, httpx.AsyncByteStream):
    """A form's body that tells how far it is. In an event loop, files are read in a thread."""

    def __init__(self, body: Iterable[bytes], parts: Sequence[Part], total: int, progress: Progress | None) -> None:
        self._body = body
        self._parts = parts
        self._total = total
        self._progress = progress

    def __iter__(self) -> Iterator[bytes]:
        done = 0
        for chunk in self._body:
            yield chunk
            done += len(chunk)
            self._report(done)

    async def __aiter__(self) -> AsyncIterator[bytes]:
        done = 0
        chunks = iter(self._body)
        while (chunk := await to_thread.run_sync(next, chunks, None)) is not None:
            yield chunk
            done += len(chunk)
            self._report(done)

    def _report(self, done: int) -> None:
        if self._progress is not None:
            self._progress(done, self._total)

    def close(self) -> None:
        """Where it was not sent to its end, a file is still open."""
        for part in self._parts:
            part.close()


# ---------------------------------------------------------------- from the server


@dataclass(frozen=True, slots=True)
class Remote:
    """A file that the server has."""

    name: str
    bytes: int
    sha256: str


class FileSink:
    """One file of a download. It grows beside its place, and takes it when its sha256 is right: what lies under the
    file's own name is whole. A download that was cut goes on where it was, also in a later process."""

    def __init__(self, folder: Path, remote: Remote, progress: Callable[[int], None]) -> None:
        """`progress`: called with the bytes there are. Raises LocalFileError for a name that leaves the folder."""
        if not _inside(remote.name):
            raise LocalFileError(f"the server names a file {remote.name!r}, which is no name for a file here")
        self.path = folder / remote.name
        # With the digest in its name, what is left of another file is never continued.
        self._part = self.path.with_name(f".{self.path.name[:150]}.{remote.sha256[:16]}.part")
        self._remote = remote
        self._progress = progress
        self._hash: Any = hashlib.sha256()
        self._file: IO[bytes] | None = None
        self.size = 0

    def present(self) -> bool:
        """Whether the file is there already, whole."""
        if not self.path.is_file() or self.path.stat().st_size != self._remote.bytes:
            return False
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == self._remote.sha256

    def open(self) -> int:
        """Ready to go on; how many bytes there are. Raises LocalFileError."""
        with _local(self._part):
            self._part.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._part.open("a+b")
            self._file.seek(0)
            self._hash, self.size = hashlib.sha256(), 0
            while data := self._file.read(CHUNK):
                self._hash.update(data)
                self.size += len(data)
            if self.size > self._remote.bytes:
                self.restart()
        return self.size

    def restart(self) -> None:
        """Nothing of what is there counts."""
        if self._file is not None:
            self._file.truncate(0)
        self._hash, self.size = hashlib.sha256(), 0

    def write(self, data: bytes) -> None:
        if self._file is None:
            raise LocalFileError(f"{self._part} is not open")
        with _local(self._part):
            self._file.write(data)
        self._hash.update(data)
        self.size += len(data)

    def report(self) -> None:
        self._progress(self.size)

    @property
    def complete(self) -> bool:
        return self.size >= self._remote.bytes

    def commit(self) -> None:
        """The file takes its place. Raises DamagedFile."""
        self.close()
        if self.size != self._remote.bytes or self._hash.hexdigest() != self._remote.sha256:
            self._part.unlink(missing_ok=True)
            raise DamagedFile(f"{self._remote.name}: the bytes received are not those that the server announced")
        with _local(self.path):
            self._part.replace(self.path)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> FileSink:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


@contextlib.contextmanager
def _local(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        raise LocalFileError(f"{path}: {exc.strerror or exc}") from None

"""What a merger and the process that does one merge say to each other. No torch."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Literal

import msgspec

from adapters.blobs import INDEX_SUFFIX, Blobs, open_blobs
from adapters.errors import AdapterRefused, LoraplexAdapterError
from adapters.manifest import Manifest
from adapters.merge_request import MergeSource
from adapters.peft_config import CONFIG_NAME

Priority = Literal["idle", "low", "normal"]

BLOBS_URL = "LORAPLEX_BLOBS_URL"
"""It comes by the environment, not in the task: it may hold a secret, and the task is a file."""


class StoredSource(msgspec.Struct, frozen=True):
    """A source by its files' hashes. `name` is for messages, `files`: (name, sha256)."""

    name: str
    files: tuple[tuple[str, str], ...]
    weight: float

    def fetch(self, blobs: Blobs) -> MergeSource:
        """Local files, checked. AdapterMissing, BlobDamaged, StoreUnavailable."""
        paths = {name: blobs.fetch(sha) for name, sha in self.files}
        index = next((path for name, path in paths.items() if name.endswith(INDEX_SUFFIX)), None)
        weights = {name: path for name, path in paths.items() if name.endswith(".safetensors")}
        return MergeSource(self.name, paths[CONFIG_NAME], weights, index, self.weight)


def held(sources: Iterable[StoredSource], blobs: Blobs) -> AbstractContextManager[None]:
    """What they fetch stays until the block ends."""
    return blobs.hold([sha for source in sources for _, sha in source.files])


class Task(msgspec.Struct, frozen=True):
    """What to merge into the folder `out`. `options`: fields of adapters.merge_request.MergeOptions; blobs_dir,
    cache_dir and cache_bytes: arguments of adapters.blobs.open_blobs; log: level and format."""

    target: Literal["adapter", "checkpoint"]
    sources: list[StoredSource]
    manifest: Manifest
    model: str
    out: str
    options: dict[str, str | int | float]
    blobs_dir: str
    cache_dir: str
    cache_bytes: int
    priority: Priority
    log: tuple[str, str]

    def open_blobs(self) -> Blobs:
        """Where the sources' files lie."""
        return open_blobs(Path(self.blobs_dir), Path(self.cache_dir), self.cache_bytes, os.environ.get(BLOBS_URL, ""))


class Said(msgspec.Struct, frozen=True, omit_defaults=True):
    """`phase` and `progress` while it goes on; in the end `done` (with the files of a checkpoint) or `error`."""

    phase: str = ""
    progress: float = 0.0
    done: bool = False
    files: list[dict[str, str | int]] = []
    error: str = ""


def explain(error: Exception) -> str:
    """For whoever asked for the merge."""
    match error:
        case AdapterRefused():
            return "The merge is impossible: " + "; ".join(str(reason) for reason in error.reasons)
        case LoraplexAdapterError():
            return f"A source cannot be read: {error}"
        case OSError() if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return "The server's disk is full."
        case MemoryError():
            return "The server has not enough memory for this merge."
    return "Internal error. The server's log has the details."

"""Writing a safetensors file whose tensors come one after the other: it never has to fit in memory."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from adapters.safetensors_header import DTYPE_BYTES

FLUSH_BYTES = 64 << 20
"""After so many bytes they are sent to the disk and dropped from the page cache: gigabytes of dirty pages would later
stall whoever else writes, and evict what others read."""


class TensorPlan(NamedTuple):
    """A tensor that will be written; `dtype` in the format's own spelling (BF16)."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        size = DTYPE_BYTES[self.dtype]
        for length in self.shape:
            size *= length
        return size


class WrittenFile(NamedTuple):
    name: str
    bytes: int
    sha256: str


def aligned_order(tensors: Sequence[TensorPlan]) -> list[TensorPlan]:
    """Widest dtype first, else as given: so every tensor begins at a multiple of its item size, as readers like it."""
    return sorted(tensors, key=lambda tensor: -DTYPE_BYTES[tensor.dtype])


def head_of(tensors: Sequence[TensorPlan]) -> tuple[bytes, int]:
    """What comes before the tensors, which lie one after the other, and how many bytes they have."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [end, end + tensor.nbytes],
        }
        end += tensor.nbytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    return len(encoded).to_bytes(8, "little") + encoded, end


class SafetensorsWriter:
    """The header at once, then `write` for the bytes of every tensor in the order of the plan, in pieces of any size.

    Leaving the `with` block without an error syncs the file; ValueError if bytes are missing or too many."""

    def __init__(self, path: Path, tensors: Sequence[TensorPlan]) -> None:
        self.path = path
        head, end = head_of(tensors)
        self._expected = len(head) + end
        self._written = self._flushed = 0
        self._hash = hashlib.sha256()
        self._file = path.open("wb", buffering=0)
        self.write(head)

    def write(self, data: bytes | memoryview) -> None:
        view = memoryview(data).cast("B")
        self._hash.update(view)
        while view:
            count = self._file.write(view)
            self._written += count
            view = view[count:]
        if self._written - self._flushed >= FLUSH_BYTES:
            self._flush()

    def result(self) -> WrittenFile:
        return WrittenFile(self.path.name, self._written, self._hash.hexdigest())

    def _flush(self) -> None:
        os.fdatasync(self._file.fileno())
        os.posix_fadvise(self._file.fileno(), self._flushed, self._written - self._flushed, os.POSIX_FADV_DONTNEED)
        self._flushed = self._written

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            if kind is None:
                if self._written != self._expected:
                    raise ValueError(f"{self.path.name}: {self._written} bytes written, {self._expected} planned")
                os.fsync(self._file.fileno())
        finally:
            self._file.close()

"""What passes between residency (which decides), the loader (which moves bytes) and the arena (which holds them).

Torch-free, so that the decisions can be tested without it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from adapters.errors import LoraplexAdapterError
from adapters.regions import Region


class Entry(Protocol):
    """One target of a block, as adapters/block.py has it: offsets in elements from the start of the payload."""

    @property
    def index(self) -> int: ...
    @property
    def rank(self) -> int: ...
    @property
    def scale(self) -> float: ...
    @property
    def a_offset(self) -> int: ...
    @property
    def b_offset(self) -> int: ...


@dataclass(frozen=True, slots=True, eq=False)
class RowEntries:
    """A block's row of the arena's table, relative to the block's first element. Rank 0: target not adapted.

    Arrays rather than one object per target: thousands of these are held.
    """

    ranks: NDArray[np.int32]
    """[targets]"""
    offsets: NDArray[np.int64]
    """[targets, 2]: A, B; elements."""
    scales: NDArray[np.float32]
    """[targets]"""

    @classmethod
    def of(cls, entries: Iterable[Entry], targets: int) -> RowEntries:
        """Raises ValueError when an entry's index is not below `targets`."""
        row = cls(np.zeros(targets, np.int32), np.zeros((targets, 2), np.int64), np.zeros(targets, np.float32))
        for entry in entries:
            if not 0 <= entry.index < targets:
                raise ValueError(f"target index {entry.index} is not among {targets} targets")
            row.ranks[entry.index] = entry.rank
            row.offsets[entry.index] = entry.a_offset, entry.b_offset
            row.scales[entry.index] = entry.scale
        return row


@dataclass(frozen=True, slots=True, eq=False)
class BlockInfo:
    """Where a block's bytes lie on disk and how they are laid out."""

    path: Path
    payload_offset: int
    nbytes: int
    checksums: bytes
    """Of the payload (adapters/block.py)."""
    entries: RowEntries


Stage = Literal["prepare", "read", "copy", "stream", "discard"]


@dataclass(frozen=True, slots=True)
class Completion:
    """The end of one job. `info` belongs to "prepare"; with `error` the job's destination holds nothing of use."""

    stage: Stage
    digest: str
    info: BlockInfo | None = None
    error: LoraplexAdapterError | None = None
    rebuilt: bool = False
    """The block file was damaged, which began a new one."""


class Fence(Protocol):
    """A point in the device's work; done() tells, without waiting, whether the device has passed it."""

    def done(self) -> bool: ...


class Loader(Protocol):
    """Jobs return at once; each ends in exactly one Completion, in any order. `digest` is a key (adapters/keys.py), and
    at most one job per key runs; files are found by the digest in it, and while one is discarded no other job of that
    content runs."""

    @property
    def host_bytes(self) -> int:
        """Size of the host slab."""

    def prepare(self, digest: str) -> None:
        """Makes the block file unless it exists, and reads its header. Here and below a block file that turns out to
        be damaged, or is gone, is made again."""

    def read(self, digest: str, info: BlockInfo, host: Region) -> None:
        """Disk to host slab."""

    def copy(self, digest: str, info: BlockInfo, host: Region, device: Region, after: Fence | None) -> None:
        """Host slab to arena; the region is written once the device has passed `after`."""

    def stream(self, digest: str, info: BlockInfo, device: Region, after: Fence | None) -> None:
        """Disk to arena through a small buffer: for blocks larger than the host slab."""

    def discard(self, digest: str) -> None:
        """Deletes the block file."""

    def completions(self) -> Iterable[Completion]:
        """What has ended since the last call; never waits."""


class ArenaTier(Protocol):
    """The device tier, as residency needs it (adapters/arena.py)."""

    @property
    def capacity(self) -> int: ...
    @property
    def free_bytes(self) -> int: ...
    @property
    def rows(self) -> int: ...
    @property
    def generation(self) -> NDArray[np.int64]: ...
    @property
    def fragmentation(self) -> float: ...

    def allocate(self, nbytes: int) -> Region | None: ...
    def free(self, region: Region) -> None: ...
    def bind(self, row: int, region: Region, entries: RowEntries) -> None: ...
    def unbind(self, row: int) -> None: ...
    def compact(self, max_bytes: int, want: int | None = None) -> int: ...
    def fence(self) -> Fence | None: ...
    def region_of(self, row: int) -> Region | None: ...
    def check_integrity(self) -> None: ...

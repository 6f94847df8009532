"""A loader whose jobs end when, in which order and how the test says. It really moves the bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from adapters.arena import Arena
from adapters.errors import AdapterUnavailable, LoraplexAdapterError
from adapters.keys import account_of, digest_of
from adapters.regions import Region
from adapters.residency import Lease, Residency
from adapters.tiers import BlockInfo, Completion, Fence, RowEntries

FEATURES = 8
"""k and d of the one target: a block of rank r has 2 * 8 * r float32 values, 64 * r bytes."""


def payload_of(digest: str, rank: int) -> np.ndarray:
    seed = int.from_bytes(hashlib.sha256(digest_of(digest).encode()).digest()[:4], "little")
    return np.random.default_rng(seed).standard_normal(2 * FEATURES * rank, dtype=np.float32)


def make_arena(nbytes: int, rows: int = 16) -> Arena:
    return Arena([(FEATURES, FEATURES)], dtype=torch.float32, device="cpu", nbytes=nbytes, rows=rows)


class ScriptedLoader:
    def __init__(self, arena: Arena, ranks: dict[str, int], host_bytes: int) -> None:
        self.arena = arena
        self.ranks = ranks
        self.host_bytes = host_bytes
        self.slab = np.zeros(host_bytes, np.uint8)
        self.jobs: list[tuple[str, str, BlockInfo | None, Region | None, Region | None]] = []
        self.log: list[tuple[str, str]] = []
        self._done: list[Completion] = []

    def _add(self, stage: str, digest: str, *rest: BlockInfo | Region | None) -> None:
        if any(job[1] == digest for job in self.jobs):
            raise AssertionError(f"two jobs at a time for {digest}")
        self.log.append((stage, digest))
        self.jobs.append((stage, digest, *rest, *[None] * (3 - len(rest))))

    def prepare(self, digest: str) -> None:
        self._add("prepare", digest)

    def read(self, digest: str, info: BlockInfo, host: Region) -> None:
        self._add("read", digest, info, host)

    def copy(self, digest: str, info: BlockInfo, host: Region, device: Region, after: Fence | None) -> None:
        self._add("copy", digest, info, host, device)

    def stream(self, digest: str, info: BlockInfo, device: Region, after: Fence | None) -> None:
        self._add("stream", digest, info, None, device)

    def discard(self, digest: str) -> None:
        self._add("discard", digest)

    def completions(self) -> Iterator[Completion]:
        while self._done:
            yield self._done.pop(0)

    def finish(self, index: int = 0, error: LoraplexAdapterError | None = None) -> None:
        """Ends the job at `index` of those under way."""
        stage, digest, info, host, device = self.jobs.pop(index)
        if error is not None and stage != "discard":
            self._done.append(Completion(stage, digest, error=error))
            return
        rank = self.ranks[digest_of(digest)]
        payload = payload_of(digest, rank).view(np.uint8)
        size = len(payload)
        arena = self.arena.bytes.numpy()
        if stage == "prepare":
            half = FEATURES * rank
            entries = RowEntries(np.array([rank], np.int32), np.array([[0, half]], np.int64), np.ones(1, np.float32))
            info = BlockInfo(Path(digest), 0, size, b"", entries)
        elif stage == "read":
            self.slab[host.offset : host.offset + size] = payload
        elif stage == "copy":
            arena[device.offset : device.offset + size] = self.slab[host.offset : host.offset + size]
        elif stage == "stream":
            arena[device.offset : device.offset + size] = payload
        self._done.append(Completion(stage, digest, info=info if stage == "prepare" else None))

    def finish_all(self) -> None:
        while self.jobs:
            self.finish()


class Tiers:
    """A residency over a real arena on CPU and a scripted loader, with a clock that the test moves."""

    def __init__(
        self, ranks: dict[str, int], *, arena_bytes: int, host_bytes: int = 1 << 16, rows: int = 16, **options: int
    ) -> None:
        self.now = 0.0
        self.arena = make_arena(arena_bytes, rows)
        self.loader = ScriptedLoader(self.arena, ranks, host_bytes)
        self.residency = Residency(self.arena, self.loader, clock=lambda: self.now, **options)

    def settle(self) -> None:
        """Lets everything under way come to its end."""
        for _ in range(1000):
            if not self.residency.poll() and not self.loader.jobs:
                return
            self.loader.finish_all()
        raise AssertionError("blocks come and go without end")

    def fail(self, digest: str, reason: str = "disk on fire") -> None:
        index = next(i for i, job in enumerate(self.loader.jobs) if job[1] == digest)
        self.loader.finish(index, AdapterUnavailable(digest, reason))
        self.residency.poll()

    def lease(self, *digests: str) -> Lease:
        """The lease of somebody for whom everything is done at once."""
        ticket = object()
        for _ in range(100):
            lease = self.residency.try_lease(digests, ticket)
            if lease is not None:
                return lease
            self.settle()
        raise AssertionError(f"{digests} are never served")

    def check_lease(self, lease: Lease) -> None:
        """The bytes that a kernel would find through the lease's rows are the adapters'."""
        if len(lease.rows) != len(lease.digests):
            raise AssertionError("one row per digest")
        for digest, row, generation in zip(lease.digests, lease.rows, lease.generations, strict=True):
            rank = self.loader.ranks[digest_of(digest)]
            half = FEATURES * rank
            found = [self.arena.data[o : o + half] for o in self.arena.offsets[row, 0].tolist()]
            if int(self.arena.ranks[row, 0]) != rank or self.arena.generation[row] != generation:
                raise AssertionError(f"row {row} is not that of {digest}")
            np.testing.assert_array_equal(torch.cat(found).numpy(), payload_of(digest, rank))

    def resident(self, account: str) -> int:
        """Bytes of an account's blocks on the device, counted one by one, copies under way included."""
        blocks = self.residency._placement.blocks.values()
        return sum(each.region.nbytes for each in blocks if each.region and account_of(each.digest) == account)

    def check(self, *leases: Lease) -> None:
        self.residency.check_integrity()
        for lease in leases:
            self.check_lease(lease)

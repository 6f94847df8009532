"""Moves blocks between the tiers, on threads of its own: blob files -> block file -> host slab -> arena.

Three threads, so that nothing quick waits behind something slow: packing (waits for a worker process), files (headers
and payloads, with the threads of adapters/payload_reader.py), device copies. Requests and results go through
SimpleQueues; whoever asks never waits. What to move and where is decided elsewhere (adapters/residency.py).
"""

from __future__ import annotations

import errno
import logging
import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from adapters.arena import Arena, StreamFence
from adapters.blobs import Blobs
from adapters.block import CHECKED_BYTES, checksum_of, read_header, read_payload
from adapters.block_files import block_path
from adapters.errors import (
    AdapterMissing,
    AdapterUnavailable,
    BlobDamaged,
    LoraplexAdapterError,
)
from adapters.keys import digest_of
from adapters.manifest import Manifest
from adapters.packer import Packer
from adapters.payload_reader import PayloadReader
from adapters.regions import Region
from adapters.slab import Slab
from adapters.tiers import BlockInfo, Completion, Fence, RowEntries, Stage

log = logging.getLogger(__name__)

BOUNCE_BYTES = CHECKED_BYTES
"""Of a piece that is copied to the device: what comes from a file is checked before."""


class Packing(Protocol):
    """Makes block files: adapters.packer.Packer."""

    def pack(self, digest: str) -> None: ...
    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class _Job:
    stage: Stage
    digest: str
    info: BlockInfo | None = None
    host: Region | None = None
    device: Region | None = None
    after: Fence | None = None
    packed: bool = False
    """The block file has just been built, so a fault in it is final."""
    rebuilt: bool = False
    """It was built because the one that was there is damaged."""


class BlockLoader:
    """The Loader of adapters/tiers.py, for an arena on CPU or CUDA."""

    def __init__(
        self,
        store: Blobs,
        manifest: Manifest,
        cache_dir: Path,
        arena: Arena,
        *,
        host: Slab | int,
        notify: Callable[[], None] = lambda: None,
        packer: Packing | None = None,
    ) -> None:
        """`host`: the slab, or its size in bytes; pinned if the arena is on CUDA. Without one (0) every block is
        streamed from its file, which on CPU saves a copy. `notify` is called, on a loader thread, after each
        completion: it should wake the engine's loop."""
        self._manifest = manifest
        self._cache_dir = Path(cache_dir)
        self._arena = arena
        self._cuda = arena.data.device.type == "cuda"
        self._slab = host if isinstance(host, Slab) else Slab(host, pinned=self._cuda)
        self._bounce = Slab(2 * BOUNCE_BYTES if self._cuda else 0, pinned=self._cuda)
        self._notify = notify
        self._packer: Packing = packer if packer is not None else Packer(store, manifest, cache_dir)
        self._done: queue.SimpleQueue[Completion] = queue.SimpleQueue()
        self._packs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._files: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._copies: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._closing = threading.Event()
        self._reader = PayloadReader()
        self._threads = [
            threading.Thread(target=self._serve, args=(jobs, work), name=f"loraplex-{name}", daemon=True)
            for name, jobs, work in (
                ("packs", self._packs, self._pack),
                ("files", self._files, self._file_job),
                ("copies", self._copies, self._copy),
            )
        ]
        for thread in self._threads:
            thread.start()

    # ------------------------------------------------------------ called by residency

    @property
    def host_bytes(self) -> int:
        return len(self._slab.memory)

    def prepare(self, digest: str) -> None:
        self._files.put(_Job("prepare", digest))

    def read(self, digest: str, info: BlockInfo, host: Region) -> None:
        self._files.put(_Job("read", digest, info, host))

    def copy(self, digest: str, info: BlockInfo, host: Region, device: Region, after: Fence | None) -> None:
        self._copies.put(_Job("copy", digest, info, host, device, after))

    def stream(self, digest: str, info: BlockInfo, device: Region, after: Fence | None) -> None:
        self._files.put(_Job("stream", digest, info, None, device, after))

    def discard(self, digest: str) -> None:
        self._files.put(_Job("discard", digest))

    def completions(self) -> Iterator[Completion]:
        while True:
            try:
                yield self._done.get_nowait()
            except queue.Empty:
                return

    def close(self) -> None:
        """Ends threads and worker: the job each thread is at is finished, those behind it are not begun, and nothing
        is notified any more. May be called twice."""
        if self._closing.is_set():
            return
        self._closing.set()
        self._packer.close()
        for jobs in (self._packs, self._files, self._copies):
            jobs.put(None)
        for thread in self._threads:
            thread.join(timeout=30)
        if not any(thread.is_alive() for thread in self._threads):
            self._reader.close()
            self._slab.close()
            self._bounce.close()

    # ------------------------------------------------------------ on the threads

    def _serve(self, jobs: queue.SimpleQueue[_Job | None], work: Callable[[_Job], Completion | None]) -> None:
        if self._cuda:
            torch.cuda.set_device(self._arena.data.device)
            torch.cuda.set_stream(torch.cuda.Stream(self._arena.data.device))
        while (job := jobs.get()) is not None:
            if self._closing.is_set():
                return
            try:
                completion = work(job)
            except Exception as error:
                fault = _as_adapter_error(digest_of(job.digest), error)
                completion = Completion(job.stage, job.digest, error=fault, rebuilt=job.rebuilt)
                log.warning("%s of adapter %s failed: %s", job.stage, job.digest, error)
            if completion is not None and not self._closing.is_set():
                self._done.put(completion)
                try:
                    self._notify()
                except Exception:
                    log.exception("the wake-up call failed")

    def _pack(self, job: _Job) -> None:
        self._packer.pack(digest_of(job.digest))
        self._files.put(replace(job, packed=True))

    def _file_job(self, job: _Job) -> Completion | None:
        digest = digest_of(job.digest)
        if job.stage == "discard":
            block_path(self._cache_dir, digest, self._manifest).unlink(missing_ok=True)
            return Completion("discard", job.digest)
        try:
            # Also before a read that begins again: where the bytes go was decided by what the first header said.
            info = self._read_header(digest) if job.stage == "prepare" or job.packed else job.info
            if info is None:
                return None
            if job.stage == "prepare":
                return Completion("prepare", job.digest, info=info, rebuilt=job.rebuilt)
            if job.info is None or not _same(info, job.info):
                raise AdapterUnavailable(digest, "its block file was built again and differs")
            if job.host is not None:
                begin = job.host.offset
                self._reader.read(info, self._slab.memory[begin : begin + info.nbytes], digest)
            elif job.device is not None:
                self._stream(digest, info, job.device, job.after)
        except (FileNotFoundError, BlobDamaged) as error:
            if job.packed:
                raise
            damaged = isinstance(error, BlobDamaged)
            if damaged:
                log.warning("the block of adapter %s is built again: %s", digest, error)
            self._packs.put(replace(job, rebuilt=damaged))
            return None
        return Completion(job.stage, job.digest, rebuilt=job.rebuilt)

    def _read_header(self, digest: str) -> BlockInfo:
        """FileNotFoundError; BlobDamaged if it is not the header of this block."""
        path = block_path(self._cache_dir, digest, self._manifest)
        header, offset = read_header(path)
        found = (header.digest, header.fingerprint, header.dtype)
        if found != (digest, self._manifest.fingerprint, self._manifest.dtype):
            raise BlobDamaged(digest, f"{path.name} is the block of {found}")
        # Before anything is written to the arena: what does not fit the manifest must not be bound.
        try:
            entries = RowEntries.of(header.entries, len(self._manifest.linears))
        except ValueError as error:
            raise BlobDamaged(digest, f"{path.name}: {error}") from error
        return BlockInfo(path, offset, header.payload_bytes, header.checksums, entries)

    def _copy(self, job: _Job) -> Completion | None:
        if job.info is None or job.host is None or job.device is None:
            return None
        count, source, target = job.info.nbytes, job.host.offset, job.device.offset
        if not self._cuda:
            # numpy's copy releases the GIL and, unlike torch's, takes no threads from the step.
            np.copyto(self._arena_array()[target : target + count], self._slab.array[source : source + count])
        else:
            self._wait_for(job.after)
            # Piece by piece, each waited for, so that a step's inputs need not stand behind a whole block: streams' p99
            # was seen to grow by what a copy of 84 MB takes, 1.5 ms.
            for begin in range(0, count, BOUNCE_BYTES):
                piece = min(BOUNCE_BYTES, count - begin)
                destination = self._arena.bytes[target + begin : target + begin + piece]
                destination.copy_(self._slab.tensor[source + begin : source + begin + piece], non_blocking=True)
                _finished()
        return Completion("copy", job.digest)

    def _stream(self, digest: str, info: BlockInfo, device: Region, after: Fence | None) -> None:
        if not self._cuda:
            target = self._arena_array()[device.offset : device.offset + info.nbytes]
            self._reader.read(info, target.data, digest)
            return
        with info.path.open("rb", buffering=0) as file:
            self._wait_for(after)
            # Two halves: one is filled while the other is copied.
            copied: list[torch.cuda.Event | None] = [None, None]
            try:
                for index, begin in enumerate(range(0, info.nbytes, BOUNCE_BYTES)):
                    half, count = index % 2 * BOUNCE_BYTES, min(BOUNCE_BYTES, info.nbytes - begin)
                    event = copied[index % 2]
                    if event is not None:
                        event.synchronize()
                    memory = self._bounce.memory[half : half + count]
                    expected = checksum_of(info.checksums, index)
                    read_payload(file.fileno(), info.payload_offset + begin, memory, expected, digest)
                    destination = self._arena.bytes[device.offset + begin : device.offset + begin + count]
                    destination.copy_(self._bounce.tensor[half : half + count], non_blocking=True)
                    copied[index % 2] = event = torch.cuda.Event(blocking=True)
                    event.record()
            finally:
                # Also of a file that turns out to be damaged: both halves and the region are used anew.
                _finished()

    def _arena_array(self) -> np.ndarray:
        return self._arena.bytes.numpy()

    def _wait_for(self, after: Fence | None) -> None:
        """Makes this thread's stream wait; the thread itself goes on."""
        if isinstance(after, StreamFence):
            torch.cuda.current_stream(self._arena.data.device).wait_event(after.event)


def _finished() -> None:
    """Waits, without spinning, until this thread's stream has done what it was given."""
    event = torch.cuda.Event(blocking=True)
    event.record()
    event.synchronize()


def _same(one: BlockInfo, other: BlockInfo) -> bool:
    """Whether a block that was read by `other` may be bound by `one`."""
    a, b = one.entries, other.entries
    pairs = ((a.ranks, b.ranks), (a.offsets, b.offsets), (a.scales, b.scales))
    return one.nbytes == other.nbytes and all(np.array_equal(mine, theirs) for mine, theirs in pairs)


def _as_adapter_error(digest: str, error: Exception) -> LoraplexAdapterError:
    """Missing, damaged and unavailable adapters as they are; anything else means that loading failed."""
    if isinstance(error, (AdapterMissing, AdapterUnavailable, BlobDamaged)):
        return error
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return AdapterUnavailable(digest, "the server's disk is full, and it has to be unpacked there first")
    text = str(error) if isinstance(error, LoraplexAdapterError) else f"{type(error).__name__}: {error}"
    return AdapterUnavailable(digest, text)

"""Moves blocks between the tiers, on threads of its own: blob files -> block file -> host slab -> arena.

Three threads, so that nothing quick waits behind something slow: packing (waits for a worker process), files (headers
and payloads), device copies. Requests and results go through SimpleQueues; whoever asks never waits. What to move and
where is decided elsewhere (adapters/residency.py).
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np
import torch

from adapters.arena import Arena, StreamFence
from adapters.blobs import Blobs
from adapters.block import block_path, read_header
from adapters.errors import (
    AdapterMissing,
    AdapterUnavailable,
    BlobDamaged,
    LoraplexAdapterError,
)
from adapters.manifest import Manifest
from adapters.packer import Packer
from adapters.regions import Region
from adapters.slab import Slab
from adapters.tiers import BlockInfo, Completion, Fence, RowEntries, Stage

log = logging.getLogger(__name__)

BOUNCE_BYTES = 8 << 20


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
    """Of a prepare job: the block file has just been built, so a fault in it is final."""


class BlockLoader:
    """The Loader of adapters/tiers.py, for an arena on CPU or CUDA."""

    def __init__(
        self,
        store: Blobs,
        manifest: Manifest,
        cache_dir: Path,
        arena: Arena,
        *,
        host_bytes: int,
        notify: Callable[[], None] = lambda: None,
        packer: Packing | None = None,
    ) -> None:
        """`host_bytes`: size of the host slab, pinned if the arena is on CUDA. Without one (0) every block is streamed
        from its file, which on CPU saves a copy. `notify` is called, on a loader thread, after each completion: it
        should wake the engine's loop."""
        self._manifest = manifest
        self._cache_dir = Path(cache_dir)
        self._arena = arena
        self._cuda = arena.data.device.type == "cuda"
        self._slab = Slab(host_bytes, pinned=self._cuda)
        self._bounce = Slab(2 * BOUNCE_BYTES if self._cuda else 0, pinned=self._cuda)
        self._notify = notify
        self._packer: Packing = packer if packer is not None else Packer(store, manifest, cache_dir)
        self._done: queue.SimpleQueue[Completion] = queue.SimpleQueue()
        self._packs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._files: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._copies: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._closing = threading.Event()
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
                completion = Completion(job.stage, job.digest, error=_as_adapter_error(job.digest, error))
                log.warning("%s of adapter %s failed: %s", job.stage, job.digest, error)
            if completion is not None and not self._closing.is_set():
                self._done.put(completion)
                try:
                    self._notify()
                except Exception:
                    log.exception("the wake-up call failed")

    def _pack(self, job: _Job) -> None:
        self._packer.pack(job.digest)
        self._files.put(_Job("prepare", job.digest, packed=True))

    def _file_job(self, job: _Job) -> Completion | None:
        if job.stage == "prepare":
            return self._prepare(job)
        if job.stage == "discard":
            block_path(self._cache_dir, job.digest, self._manifest).unlink(missing_ok=True)
        elif job.info is not None and job.host is not None:
            begin = job.host.offset
            with job.info.path.open("rb", buffering=0) as file:
                file.seek(job.info.payload_offset)
                _read_into(file, self._slab.memory[begin : begin + job.info.nbytes])
        elif job.info is not None and job.device is not None:
            self._stream(job.info, job.device, job.after)
        return Completion(job.stage, job.digest)

    def _prepare(self, job: _Job) -> Completion | None:
        path = block_path(self._cache_dir, job.digest, self._manifest)
        try:
            header, offset = read_header(path)
            found = (header.digest, header.fingerprint, header.dtype)
            wanted = (job.digest, self._manifest.fingerprint, self._manifest.dtype)
            if found != wanted:
                raise BlobDamaged(job.digest, f"{path.name} is the block of {found}")
            # Before anything is written to the arena: what does not fit the manifest must not be bound.
            entries = RowEntries.of(header.entries, len(self._manifest.linears))
        except (FileNotFoundError, BlobDamaged, ValueError):
            if job.packed:
                raise
            self._packs.put(job)
            return None
        return Completion("prepare", job.digest, info=BlockInfo(path, offset, header.payload_bytes, entries))

    def _copy(self, job: _Job) -> Completion | None:
        if job.info is None or job.host is None or job.device is None:
            return None
        count, source, target = job.info.nbytes, job.host.offset, job.device.offset
        if not self._cuda:
            # numpy's copy releases the GIL and, unlike torch's, takes no threads from the step.
            np.copyto(self._arena_array()[target : target + count], self._slab.array[source : source + count])
        else:
            self._wait_for(job.after)
            destination = self._arena.bytes[target : target + count]
            destination.copy_(self._slab.tensor[source : source + count], non_blocking=True)
            _finished()
        return Completion("copy", job.digest)

    def _stream(self, info: BlockInfo, device: Region, after: Fence | None) -> None:
        with info.path.open("rb", buffering=0) as file:
            file.seek(info.payload_offset)
            if not self._cuda:
                target = self._arena_array()[device.offset : device.offset + info.nbytes]
                _read_into(file, memoryview(target))  # type: ignore[arg-type]
                return
            self._wait_for(after)
            # Two halves: one is filled while the other is copied.
            copied: list[torch.cuda.Event | None] = [None, None]
            for index, begin in enumerate(range(0, info.nbytes, BOUNCE_BYTES)):
                half, count = index % 2 * BOUNCE_BYTES, min(BOUNCE_BYTES, info.nbytes - begin)
                event = copied[index % 2]
                if event is not None:
                    event.synchronize()
                _read_into(file, self._bounce.memory[half : half + count])
                destination = self._arena.bytes[device.offset + begin : device.offset + begin + count]
                destination.copy_(self._bounce.tensor[half : half + count], non_blocking=True)
                copied[index % 2] = event = torch.cuda.Event(blocking=True)
                event.record()
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


def _read_into(file: BinaryIO, memory: memoryview) -> None:
    done = 0
    while done < len(memory):
        count = file.readinto(memory[done:])  # type: ignore[attr-defined]
        if not count:
            raise OSError(f"the block file ends {len(memory) - done} bytes too early")
        done += count


def _as_adapter_error(digest: str, error: Exception) -> LoraplexAdapterError:
    """Missing, damaged and unavailable adapters as they are; anything else means that loading failed."""
    if isinstance(error, (AdapterMissing, AdapterUnavailable, BlobDamaged)):
        return error
    text = str(error) if isinstance(error, LoraplexAdapterError) else f"{type(error).__name__}: {error}"
    return AdapterUnavailable(digest, text)

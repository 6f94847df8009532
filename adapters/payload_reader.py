"""Reads the payload of a block file into memory with several threads, and checks it. No torch."""

from __future__ import annotations

import os
import queue
import threading

from adapters.block import checksum_of, piece_at, pieces_of, read_payload
from adapters.tiers import BlockInfo

MOST_READERS = 4
"""Reading 84 MB from the page cache and adding them up takes one thread some 29 ms beside an H200. Were it a quarter of
that, it would be less than a step or two; more threads would crowd the step's."""
CORES_PER_READER = 2
"""The other cores are for the step and the API's processes: two cores have one reader, eight have four."""


class PayloadReader:
    """The thread that calls `read`, and up to MOST_READERS - 1 that help it.

    Each has a run of neighbouring pieces, as the kernel's readahead wants it: from a disk, two readers that took every
    other piece needed 1.4 times the time of one, with a half each 1.1 times. It reads a piece and checks it before it
    goes on to the next, while the bytes are in the processor's cache. The threads are no executor's, for which the
    interpreter waits at its end: a disk may hang."""

    def __init__(self) -> None:
        readers = max(1, min(MOST_READERS, _usable_cores() // CORES_PER_READER))
        self._parts: queue.SimpleQueue[_Part | None] = queue.SimpleQueue()
        self._helpers = [
            threading.Thread(target=self._help, name=f"loraplex-reads-{number}", daemon=True)
            for number in range(1, readers)
        ]
        for thread in self._helpers:
            thread.start()

    def read(self, info: BlockInfo, memory: memoryview, digest: str) -> None:
        """Fills `memory` (`info.nbytes` bytes) with the payload of block `digest`. Once it has returned or raised,
        nobody writes there any more.

        FileNotFoundError and what else opening raises; BlobDamaged, of the first piece that cannot be read, ends too
        early or differs from its checksum: `memory` then holds nothing of use."""
        pieces = pieces_of(info.nbytes)
        readers = min(len(self._helpers) + 1, pieces)
        with info.path.open("rb", buffering=0) as file:
            parts = [
                _Part(file.fileno(), info, memory, digest, range(pieces * k // readers, pieces * (k + 1) // readers))
                for k in range(readers)
            ]
            for part in parts[1:]:
                self._parts.put(part)
            for part in parts[:1]:
                part.read()
            for part in parts:
                part.ended.wait()
        for part in parts:
            if part.failure is not None:
                raise part.failure

    def close(self) -> None:
        """Ends the threads; no `read` may be under way."""
        for _ in self._helpers:
            self._parts.put(None)
        for thread in self._helpers:
            thread.join()

    def _help(self) -> None:
        while (part := self._parts.get()) is not None:
            part.read()


class _Part:
    """What one thread reads of a payload: the pieces with these numbers."""

    def __init__(self, descriptor: int, info: BlockInfo, memory: memoryview, digest: str, pieces: range) -> None:
        self._descriptor, self._info, self._memory, self._digest = descriptor, info, memory, digest
        self._pieces = pieces
        self.failure: Exception | None = None
        """Of its first piece that failed; known when it has `ended`."""
        self.ended = threading.Event()

    def read(self) -> None:
        info = self._info
        try:
            for number in self._pieces:
                begin, end = piece_at(number, info.nbytes)
                read_payload(
                    self._descriptor,
                    info.payload_offset + begin,
                    self._memory[begin:end],
                    checksum_of(info.checksums, number),
                    self._digest,
                    following=info.nbytes - end,
                )
        except Exception as error:
            self.failure = error
        finally:
            self.ended.set()


def _usable_cores() -> int:
    # Linux alone says which of the machine's cores this process may use.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

"""What a tenant may use, and the counters of what it uses, which all API processes of a service share.

The counters lie in one memory-mapped file, a page per tenant, changed under a file lock. To admit a request took 15 us,
and with four processes at it 75 us at the 99th percentile, where a transaction of SQLite without fsync took 1150 us,
since its waiting is polling; both on two busy cores. A process that dies takes its lock with it; the requests that it
was running are known by its slot, and are taken off.

Exact, over all API processes of a service: requests per minute (never more in any 60 seconds) and concurrent requests.
Tokens are charged when a request ends, prompt and answer, and a request is admitted while the last minute's tokens are
below the limit: what is running when the limit is reached still ends, so it is exceeded by at most those requests'
tokens.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import BinaryIO

WINDOW = 61
"""Seconds counted, the one that is not over included: so any 60 seconds lie within."""
PROCESSES = 320
"""API processes at once; LORAPLEX_API_WORKERS allows 256."""
RETRY_RUNNING_S = 1.0
"""What a client is told to wait while too many of its tenant's requests run."""

_PAGE = 4096
_WORDS = _PAGE // 8
_SECOND, _REQUESTS, _TOKENS, _RUNNING = 0, 1, 1 + WINDOW, 1 + 2 * WINDOW
_GROW = 64  # pages


@dataclass(frozen=True, slots=True)
class TenantLimits:
    """None: no limit."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrent_requests: int | None = None
    adapters: int | None = None
    stored_bytes: int | None = None
    resident_bytes: int | None = None
    max_rank: int | None = None
    max_tokens: int | None = None

    @classmethod
    def of(cls, values: Mapping[str, int]) -> TenantLimits:
        """From what is stored; names of other versions of the service are passed over."""
        return cls(**{name: value for name, value in values.items() if name in LIMITS})


LIMITS = tuple(each.name for each in fields(TenantLimits))


class LimitReached(Exception):  # noqa: N818 - it says what happened
    """`name`: of TenantLimits. `retry_after_s`: when there is room again, as far as is known."""

    def __init__(self, name: str, limit: int, retry_after_s: float) -> None:
        super().__init__(f"the limit {name} of {limit} is reached")
        self.name = name
        self.limit = limit
        self.retry_after_s = retry_after_s


class Limiter:
    """The counters, as one process sees them. Not for several threads. `folder` is made if need be."""

    def __init__(self, folder: Path, clock: Callable[[], float] = time.time) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._clock = clock
        self._slot, self._alive = self._take_slot()
        self._file = (folder / "counters").open("a+b", buffering=0)
        self._map: mmap.mmap | None = None
        self._words = memoryview(bytearray()).cast("Q")
        with self._locked():
            self._remap(0)
            for page in range(len(self._words) // _WORDS):  # of a process that died in this slot
                self._words[page * _WORDS + _RUNNING + self._slot] = 0

    def close(self) -> None:
        self._words.release()
        if self._map is not None:
            self._map.close()
        self._file.close()
        self._alive.close()

    def begin(self, tenant: int, limits: TenantLimits) -> None:
        """Admits a request of the tenant of this number, or raises LimitReached. Admitted ones must `end`."""
        with self._locked():
            base = self._page(tenant)
            now = self._advance(base)
            words = self._words
            if limits.concurrent_requests is not None:
                running = base + _RUNNING
                if self._sum(running, PROCESSES) >= limits.concurrent_requests:
                    self._take_off_dead(base)
                    if self._sum(running, PROCESSES) >= limits.concurrent_requests:
                        raise LimitReached("concurrent_requests", limits.concurrent_requests, RETRY_RUNNING_S)
            for name, limit, at in (
                ("requests_per_minute", limits.requests_per_minute, base + _REQUESTS),
                ("tokens_per_minute", limits.tokens_per_minute, base + _TOKENS),
            ):
                if limit is not None and self._sum(at, WINDOW) >= limit:
                    raise LimitReached(name, limit, self._wait(at, now, limit))
            words[base + _REQUESTS + now % WINDOW] += 1
            words[base + _RUNNING + self._slot] += 1

    def end(self, tenant: int, tokens: int) -> None:
        """A request that was admitted has ended and used so many tokens."""
        with self._locked():
            base = self._page(tenant)
            self._words[base + _TOKENS + self._advance(base) % WINDOW] += tokens
            if self._words[base + _RUNNING + self._slot]:
                self._words[base + _RUNNING + self._slot] -= 1

    def used(self, tenant: int) -> dict[str, int]:
        """What counts against the limits now, by their names."""
        with self._locked():
            base = self._page(tenant)
            self._advance(base)
            self._take_off_dead(base)
            return {
                "requests_per_minute": self._sum(base + _REQUESTS, WINDOW),
                "tokens_per_minute": self._sum(base + _TOKENS, WINDOW),
                "concurrent_requests": self._sum(base + _RUNNING, PROCESSES),
            }

    # ------------------------------------------------------------ the file

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        fcntl.flock(self._file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(self._file, fcntl.LOCK_UN)

    def _page(self, tenant: int) -> int:
        """Where the tenant's words begin."""
        if (tenant + 1) * _WORDS > len(self._words):
            self._remap(tenant + 1)
        return tenant * _WORDS

    def _sum(self, at: int, count: int) -> int:
        with self._words[at : at + count] as part:  # one that is left over would keep the file from being closed
            return sum(part)

    def _remap(self, pages: int) -> None:
        size = os.fstat(self._file.fileno()).st_size
        if size < max(1, pages) * _PAGE:
            grown = -(-max(1, pages) // _GROW) * _GROW * _PAGE
            # Not a hole: to write into one when the disk is full would kill the process.
            os.posix_fallocate(self._file.fileno(), size, grown - size)
            size = grown
        self._words.release()
        if self._map is not None:
            self._map.close()
        self._map = mmap.mmap(self._file.fileno(), size)
        self._words = memoryview(self._map).cast("Q")

    def _advance(self, base: int) -> int:
        """The present second; what is older than the window is forgotten."""
        words, now, last = self._words, int(self._clock()), self._words[base + _SECOND]
        if now == last:
            return now
        if now < last:
            if last - now < WINDOW:
                return last  # the clock was set back a little: this second goes on until it has caught up
            last = 0
        for second in range(max(last + 1, now - WINDOW + 1), now + 1):
            words[base + _REQUESTS + second % WINDOW] = words[base + _TOKENS + second % WINDOW] = 0
        words[base + _SECOND] = now
        return now

    def _wait(self, at: int, now: int, limit: int) -> float:
        """Seconds until enough of what is counted at `at` is out of the window to be below the limit."""
        left = self._sum(at, WINDOW)
        for second in range(now - WINDOW + 1, now + 1):
            left -= self._words[at + second % WINDOW]
            if left < limit:
                return max(0.0, second + WINDOW - self._clock())
        return float(WINDOW)  # a limit of 0

    # ------------------------------------------------------------ processes

    def _take_slot(self) -> tuple[int, BinaryIO]:
        """A number that no living process has, and the open file that says that it is taken."""
        for slot in range(PROCESSES):
            if (file := self._free(slot)) is not None:
                return slot, file
        raise OSError(f"{self._folder}: all {PROCESSES} slots for API processes are taken")

    def _free(self, slot: int) -> BinaryIO | None:
        file = (self._folder / f"process-{slot}").open("a+b", buffering=0)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return None
        return file

    def _take_off_dead(self, base: int) -> None:
        for slot in range(PROCESSES):
            at = base + _RUNNING + slot
            if slot != self._slot and self._words[at] and (file := self._free(slot)) is not None:
                self._words[at] = 0
                file.close()

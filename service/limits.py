"""What a tenant may use, and the counters of what it uses, which all API processes of a service share.

The counters lie in one memory-mapped file, a page per tenant, changed under a file lock. To admit a request took 15 us,
and with four processes at it 75 us at the 99th percentile, where a transaction of SQLite without fsync took 1150 us,
since its waiting is polling; both on two busy cores. A process that dies takes its lock with it; the requests that it
was running are known by its slot, and are taken off.

Exact, over all API processes of a service: none of the limits counted here is ever exceeded. Requests per minute go by
when they came (never more in any 60 seconds). `concurrent_requests` counts sequences: each prompt of a request, times
its n, as these are what takes places in the engine. Tokens are charged when a request ends, prompt and answer, but
before it is begun what it may use at most is reserved (`reserve`), and what it has not used is given back when it
ends: so the tokens of the last minute and those that are still to come together stay below the limit.

A request is looked at twice, since neither its prompts nor its max_tokens are known before its body is read: `begin`
counts it and refuses it unread where nothing is left, `reserve` sees to the rest. A request's `begin` and `end` took
18 us with all three limits, 28 us with `reserve` between them, which only tenants with a limit for tokens and requests
with several sequences pay (medians of 3000, the best of three runs, two busy cores).

Several services on one database share a tenant's limits: each admits up to what it has been lent (service/leases.py
lends, and says by how much the limits may be exceeded). Where nothing is lent yet, `unlent` is what may be used. For
this a page has, beside the counters, the limits last asked for, what is lent and until when, and how many were refused.
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
RETRY_LENT_S = 2.0
"""And while another service has what this one would need: by then more may have been lent."""

_PAGE = 8192
_WORDS = _PAGE // 8
_SECOND, _REQUESTS, _TOKENS, _RUNNING = 0, 1, 1 + WINDOW, 1 + 2 * WINDOW
_LIMIT, _LENT, _REFUSED = (_RUNNING + PROCESSES + 3 * n for n in range(3))  # a limit is kept as itself + 1
_LENT_UNTIL = _REFUSED + 3
_RESERVED = _LENT_UNTIL + 1  # tokens, by process
_FILE = "counters-2"  # says how its pages are laid out: another version's are not read
_SERVICES, _KNOWN_SINCE, _KNOWN_UNTIL = 0, 1, 2  # of page 0, as no tenant has that number
_COUNTED = (("concurrent_requests", _RUNNING), ("requests_per_minute", _REQUESTS), ("tokens_per_minute", _TOKENS))
RATES = tuple(name for name, _ in _COUNTED)
"""The limits that are counted here."""
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
    """`name`: of TenantLimits. `retry_after_s`: when there is room again, as far as is known; None: never, since
    the request alone is more than the limit."""

    def __init__(self, name: str, limit: int, retry_after_s: float | None) -> None:
        super().__init__(f"the limit {name} of {limit} is reached")
        self.name = name
        self.limit = limit
        self.retry_after_s = retry_after_s


@dataclass(frozen=True, slots=True)
class Need:
    """Of one limit of a tenant in this service: what counts against it, of that what came in the last two seconds, and
    how many requests were refused since it was last asked."""

    tenant: int
    name: str
    limit: int
    used: int
    recent: int
    refused: int


def unlent(limit: int, services: int) -> int:
    """What a service that has been lent nothing may use of a limit: everything if it is alone."""
    return limit if services == 1 else min(limit, max(1, limit // (8 * services)))


class Limiter:
    """The counters, as one process sees them. Not for several threads. `folder` is made if need be. `shared`: with
    other services."""

    def __init__(self, folder: Path, clock: Callable[[], float] = time.time, *, shared: bool = False) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._shared = shared
        self._folder = folder
        self._clock = clock
        self._slot, self._alive = self._take_slot()
        self._file = (folder / _FILE).open("a+b", buffering=0)
        self._map: mmap.mmap | None = None
        self._words = memoryview(bytearray()).cast("Q")
        with self._locked():
            self._remap(0)
            for page in range(len(self._words) // _WORDS):  # of a process that died in this slot
                base = page * _WORDS
                self._words[base + _RUNNING + self._slot] = self._words[base + _RESERVED + self._slot] = 0

    def close(self) -> None:
        self._words.release()
        if self._map is not None:
            self._map.close()
        self._file.close()
        self._alive.close()

    def begin(self, tenant: int, limits: TenantLimits) -> None:
        """Admits a request of the tenant of this number, as one sequence and one token of which more may be reserved,
        or raises LimitReached. Admitted ones must `end`."""
        with self._locked():
            base = self._page(tenant)
            now = self._advance(base)
            for n, (name, _) in enumerate(_COUNTED):
                limit: int | None = getattr(limits, name)
                if self._shared:
                    self._words[base + _LIMIT + n] = 0 if limit is None else limit + 1
                if limit is not None:
                    self._require(base, n, limit, 1, now)
            self._words[base + _REQUESTS + now % WINDOW] += 1
            self._words[base + _RUNNING + self._slot] += 1

    def reserve(self, tenant: int, limits: TenantLimits, *, sequences: int, tokens: int) -> None:
        """For a request that was admitted: room for all its sequences, and for the tokens that it may use at most; or
        raises LimitReached, and nothing has changed. What was reserved is given to `end`."""
        with self._locked():
            base = self._page(tenant)
            now = self._advance(base)
            wanted = (("concurrent_requests", sequences, sequences - 1), ("tokens_per_minute", tokens, tokens))
            for name, whole, more in wanted:
                limit: int | None = getattr(limits, name)
                if limit is None or not more:
                    continue
                if whole > limit:
                    raise LimitReached(name, limit, None)
                self._require(base, RATES.index(name), limit, more, now, own=whole - more)
            self._words[base + _RUNNING + self._slot] += sequences - 1
            self._words[base + _RESERVED + self._slot] += tokens

    def end(self, tenant: int, tokens: int, *, sequences: int = 1, reserved: int = 0) -> None:
        """A request that was admitted has ended and used so many tokens; the rest of what it had is free again."""
        with self._locked():
            base = self._page(tenant)
            self._words[base + _TOKENS + self._advance(base) % WINDOW] += tokens
            for at, count in ((base + _RUNNING + self._slot, sequences), (base + _RESERVED + self._slot, reserved)):
                self._words[at] -= min(count, self._words[at])

    def _require(self, base: int, n: int, limit: int, more: int, now: int, *, own: int = 0) -> None:
        """Raises LimitReached unless so much more fits into what may be used of a limit. `own`: what the request has
        of it already."""
        room = self._lent(base, n, limit, now) if self._shared else limit
        used = self._used(base, n)
        if used + more <= room:
            return
        name, at = _COUNTED[n]
        if at != _REQUESTS:
            self._take_off_dead(base)
            used = self._used(base, n)
            if used + more <= room:
                return
        if self._shared:
            # Nothing has been lent yet: a single request is let in, else one that is larger than such a share never is.
            if used == own and more > 1 and not self._has_lease(base, n, now):
                return
            self._words[base + _REFUSED + n] += more
        if room < limit:
            raise LimitReached(name, limit, RETRY_LENT_S)
        raise LimitReached(name, limit, RETRY_RUNNING_S if at == _RUNNING else self._wait(base + at, now, limit, more))

    def used(self, tenant: int) -> dict[str, int]:
        """What counts against the limits now, by their names."""
        with self._locked():
            base = self._page(tenant)
            self._advance(base)
            self._take_off_dead(base)
            return {
                "requests_per_minute": self._used(base, RATES.index("requests_per_minute")),
                "tokens_per_minute": self._sum(base + _TOKENS, WINDOW),
                "tokens_reserved": self._sum(base + _RESERVED, PROCESSES),
                "concurrent_requests": self._used(base, RATES.index("concurrent_requests")),
            }

    # ------------------------------------------------------------ shared with other services

    def needs(self) -> Iterator[Need]:
        """Of every tenant that has used something within the window, or wanted to; to others no more is lent."""
        if os.fstat(self._file.fileno()).st_size > len(self._words) * 8:
            self._remap(0)  # another process has seen a new tenant
        for tenant in range(1, len(self._words) // _WORDS):
            base = tenant * _WORDS
            if self._sum(base + _LIMIT, len(RATES)):
                with self._locked():
                    found = list(self._needs(tenant, base))
                yield from found

    def _needs(self, tenant: int, base: int) -> Iterator[Need]:
        words, now = self._words, self._advance(base)
        self._take_off_dead(base)
        used = [self._used(base, n) for n in range(len(RATES))]
        if not any(used) and not self._sum(base + _REFUSED, len(RATES)):
            for at in (*range(_LIMIT, _LIMIT + len(RATES)), _LENT_UNTIL):
                words[base + at] = 0
            return
        for n, (name, at) in enumerate(_COUNTED):
            refused, words[base + _REFUSED + n] = words[base + _REFUSED + n], 0
            if limit := words[base + _LIMIT + n]:
                new = base + (_TOKENS if at == _TOKENS else _REQUESTS)
                recent = words[new + now % WINDOW] + words[new + (now - 1) % WINDOW]
                yield Need(tenant, name, limit - 1, used[n], recent, refused)

    def give_back(self, tenant: int, name: str, keep: int) -> int:
        """From now on this service uses no more than `keep` of the limit, or than it does already: returns which."""
        n = RATES.index(name)
        with self._locked():
            base = self._page(tenant)
            self._advance(base)
            keep = max(keep, self._used(base, n))
            self._words[base + _LENT + n] = min(self._words[base + _LENT + n], keep + 1)
        return keep

    def lend(self, tenant: int, lent: Mapping[str, int], until: float) -> None:
        """What this service may use of the tenant's limits until that time; nothing of those that are not named."""
        with self._locked():
            base = self._page(tenant)
            for n, name in enumerate(RATES):
                self._words[base + _LENT + n] = lent.get(name, -1) + 1  # 0: nothing is said
            self._words[base + _LENT_UNTIL] = int(until)

    def know(self, services: int, until: float) -> None:
        """How many services there are, itself included, as is known until that time."""
        with self._locked():
            if not self._known():
                self._words[_KNOWN_SINCE] = int(self._clock())
            self._words[_SERVICES], self._words[_KNOWN_UNTIL] = services, int(until)

    def known_for(self) -> float:
        """For so many seconds it has been known, without a break, how many services there are."""
        with self._locked():
            return self._clock() - self._words[_KNOWN_SINCE] if self._known() else 0.0

    def _known(self) -> bool:
        return self._clock() < self._words[_KNOWN_UNTIL]

    def _lent(self, base: int, n: int, limit: int, now: int) -> int:
        words = self._words
        services = words[_SERVICES] if now < words[_KNOWN_UNTIL] else max(2, words[_SERVICES])
        if services > 1 and self._has_lease(base, n, now):
            return min(limit, words[base + _LENT + n] - 1)
        return unlent(limit, services)

    def _has_lease(self, base: int, n: int, now: int) -> bool:
        return bool(self._words[base + _LENT + n]) and now < self._words[base + _LENT_UNTIL]

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

    def _used(self, base: int, n: int) -> int:
        """What counts against a limit: of tokens, those that are reserved too."""
        at = base + _COUNTED[n][1]
        if n == 0:
            return self._sum(at, PROCESSES)
        return self._sum(at, WINDOW) + (self._sum(base + _RESERVED, PROCESSES) if n == 2 else 0)

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

    def _wait(self, at: int, now: int, limit: int, more: int) -> float:
        """Seconds until enough of what is counted at `at` is out of the window for so much more."""
        left = self._sum(at, WINDOW)
        if left + more <= limit:
            return RETRY_RUNNING_S  # what is reserved is in the way, and may be given back at any time
        for second in range(now - WINDOW + 1, now + 1):
            left -= self._words[at + second % WINDOW]
            if left + more <= limit:
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
        words = self._words
        for slot in range(PROCESSES):
            running, reserved = base + _RUNNING + slot, base + _RESERVED + slot
            if slot == self._slot or not (words[running] or words[reserved]):
                continue
            if (file := self._free(slot)) is not None:
                words[running] = words[reserved] = 0
                file.close()

"""Who waits for adapters, in which order, and who may be served now: the fairness of residency. Pure Python.

Oldest first, without starvation and without idling when nothing is contended:

- A block is claimed by the oldest waiter that needs it. Nobody younger evicts it.
- The oldest waiter (the head) is always admitted. Going on from it, a younger one is admitted while the needs of all
  admitted waiters, together with every block leased to requests younger than the head, fit the arena. Only admitted
  waiters are given leases.

So whatever a younger request holds while the head waits fits the arena beside everything the head needs; all other
leases are older, finite in number, and come back. Hence the head is served, whatever the overlaps.

One whose accounts have no room for it yet (adapters/accounts.py) is held: it wants nothing of the arena, so it stands
in nobody's way there. When it is let in it takes its place by age. Younger leases may then be too large to lie beside
its needs; until they have come back nobody younger is admitted.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass

from adapters.accounts import Accounts
from adapters.errors import LoraplexAdapterError


@dataclass(eq=False, slots=True)
class Waiter:
    """A request for a set of blocks. `order`: place in the queue, never reused."""

    ticket: Hashable
    digests: tuple[str, ...]
    need: frozenset[str]
    order: int
    error: LoraplexAdapterError | None = None
    """Why it cannot be served; raised when it asks next, and it wants nothing until then."""
    asleep: bool = False
    """A block of it was unloaded: it wants nothing until it asks again."""
    held: bool = False
    """An account of its blocks has no room for it yet."""

    @property
    def awake(self) -> bool:
        return self.error is None and not self.asleep

    @property
    def active(self) -> bool:
        return self.awake and not self.held


@dataclass(eq=False, slots=True)
class Lease:
    """The right to use blocks in steps until it is released. `rows[i]` is the arena row of `digests[i]`."""

    digests: tuple[str, ...]
    rows: tuple[int, ...]
    generations: tuple[int, ...]
    """Of the rows, at the time of the lease; a row whose generation differs serves another block."""
    order: int
    loaded_bytes: int = 0
    """Of those blocks that nobody has leased since they were copied to the device."""


class WaitQueue:
    """Waiters by age, what they claim and who is admitted."""

    def __init__(self, capacity: int, rows: int, size_of: Callable[[str], int], accounts: Accounts) -> None:
        """`size_of`: a block's size in the arena, 0 while it is not known."""
        self._accounts = accounts
        self._capacity = capacity
        self._rows = rows
        self._size_of = size_of
        self._waiters: dict[Hashable, Waiter] = {}
        self._needing: dict[str, dict[Waiter, None]] = {}
        self._orders = 0
        self._admitted: set[frozenset[str]] = set()
        self._let_in: set[frozenset[str]] = set()
        """By their accounts; not kept where there are no limits."""
        self._reserved: set[str] = set()
        self._reserved_bytes = 0

    def __len__(self) -> int:
        return len(self._waiters)

    def __iter__(self) -> Iterator[Waiter]:
        """Oldest first."""
        return iter(self._waiters.values())

    def get(self, ticket: Hashable) -> Waiter | None:
        return self._waiters.get(ticket)

    def needing(self, digest: str) -> list[Waiter]:
        """Oldest first."""
        return list(self._needing.get(digest, ()))

    def is_needed(self, digest: str) -> bool:
        return digest in self._needing

    def claim(self, digest: str) -> int | None:
        """Order of the oldest active waiter that needs the block; None: it is nobody's."""
        return next((waiter.order for waiter in self._needing.get(digest, ()) if waiter.active), None)

    def is_admitted(self, waiter: Waiter) -> bool:
        return waiter.active and waiter.need in self._admitted

    def join(self, ticket: Hashable, digests: tuple[str, ...]) -> Waiter:
        """A new waiter at the end of the queue. Between two calls of admit() what is reserved can only be more
        than needed, so one that fits beside it may be admitted at once."""
        self._orders += 1
        waiter = Waiter(ticket, digests, frozenset(digests), self._orders)
        self._ask_accounts(waiter)
        if waiter.held:
            pass
        elif not any(other.active for other in self._waiters.values()):
            # It is the head: all leases are older.
            self._reserve_only(waiter.need)
        else:
            self._admit_beside(waiter.need)
        self._waiters[ticket] = waiter
        for digest in waiter.need:
            self._needing.setdefault(digest, {})[waiter] = None
        return waiter

    def wake(self, waiter: Waiter) -> None:
        """It wants its blocks again."""
        waiter.asleep = False
        self._ask_accounts(waiter)

    def drop(self, waiter: Waiter) -> None:
        del self._waiters[waiter.ticket]
        for digest in waiter.need:
            needing = self._needing[digest]
            del needing[waiter]
            if not needing:
                del self._needing[digest]

    def admit(self, leases: Iterable[Lease]) -> None:
        """Decides afresh who is let in by its accounts and who is admitted, from waiters and leases as they are now."""
        self._reserve_only(frozenset())
        self._let_in = set()
        if self._accounts.limited:
            leases = list(leases)
            self._accounts.begin(digest for lease in leases for digest in lease.digests)
        seen: set[frozenset[str]] = set()
        head = True
        for waiter in self._waiters.values():
            if waiter.awake:
                self._ask_accounts(waiter)
            if not waiter.active or waiter.need in seen:
                continue
            seen.add(waiter.need)
            if head:
                younger = {digest for lease in leases if lease.order > waiter.order for digest in lease.digests}
                self._reserve_only(waiter.need)
                self._reserve(younger)
                head = False
            else:
                self._admit_beside(waiter.need)

    def _ask_accounts(self, waiter: Waiter) -> None:
        """Equal sets are let in together, as they are admitted together: whoever asks asks for all of them."""
        waiter.held = False
        if self._accounts.limited and waiter.need not in self._let_in:
            waiter.held = not self._accounts.enter(waiter.need)
            if not waiter.held:
                self._let_in.add(waiter.need)

    def _reserve_only(self, need: frozenset[str]) -> None:
        self._reserved, self._reserved_bytes, self._admitted = set(), 0, {need}
        self._reserve(need)

    def _admit_beside(self, need: frozenset[str]) -> None:
        extra = need - self._reserved
        size = sum(map(self._size_of, extra))
        if self._reserved_bytes + size <= self._capacity and len(self._reserved) + len(extra) <= self._rows:
            self._reserve(extra)
            self._admitted.add(need)

    def _reserve(self, digests: Iterable[str]) -> None:
        for digest in digests:
            if digest not in self._reserved:
                self._reserved.add(digest)
                self._reserved_bytes += self._size_of(digest)

"""Which adapters are where (disk, pinned host memory, device), and who may use them. Pure Python, no torch.

    absent -> (prepare: pack, read the header) -> (read) -> host -> (copy) -> device          any step may fail
                                               -> (stream, for blocks larger than the host slab) -> device

Everything here runs on the engine thread and never waits: the loader's threads do the work, poll() takes what they
have finished and decides what comes next. Both tiers evict the least recently used block that nobody needs
(adapters/placement.py); fairness between requests that wait is in adapters/waiters.py, and what each account may take
up of the device in adapters/accounts.py. What is called digest here is a key (adapters/keys.py): each account has
blocks of its own, also of equal content, and only the block file is one for all.
"""

from __future__ import annotations

import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Hashable, Iterable
from typing import Literal

from adapters.errors import AccountTooSmall, AdapterTooLarge
from adapters.keys import digest_of
from adapters.placement import Block, Placement, Unload
from adapters.tiers import ArenaTier, Completion, Fence, Loader
from adapters.waiters import Lease, Waiter, WaitQueue

__all__ = ["Lease", "Residency", "TooManyAdapters", "Unload"]

State = Literal["absent", "loading", "host", "device", "failed"]


class TooManyAdapters(AdapterTooLarge):
    """A set names more adapters (`nbytes`) than the arena's table has rows (`capacity`)."""

    def __str__(self) -> str:
        return f"{self.nbytes} adapters in one request, the arena's table has {self.capacity} rows"


class Residency:
    """The tiers of one engine. See the module's text; every public call returns at once."""

    def __init__(
        self,
        arena: ArenaTier,
        loader: Loader,
        *,
        compact_bytes: int = 64 << 20,
        retry_after: float = 5.0,
        max_prefetch: int = 1024,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`compact_bytes`: most bytes moved inside the arena per poll. `retry_after`: seconds for which a failed
        block is refused at once. `max_prefetch`: hints remembered; the oldest are dropped first."""
        self._arena = arena
        self._loader = loader
        self._retry_after = retry_after
        self._max_prefetch = max_prefetch
        self._clock = clock
        self._placement = Placement(
            arena,
            loader,
            compact_bytes=compact_bytes,
            clock=clock,
            claim=lambda digest: self._queue.claim(digest),
            wanted=lambda digest: digest in self._prefetches or self._queue.is_needed(digest),
        )
        self._accounts = self._placement.accounts
        self._queue = WaitQueue(arena.capacity, arena.rows, self._placement.size_of, self._accounts)
        self._leases: dict[int, Lease] = {}
        self._prefetches: OrderedDict[str, None] = OrderedDict()
        self._failures: deque[tuple[float, str]] = deque()
        self._fenced: set[Block] = set()
        self._forgets: dict[str, list[Unload]] = {}
        """By content."""
        self._dirty = False
        self._hits = self._misses = 0

    # ------------------------------------------------------------ requests

    def limit(self, account: str, nbytes: int | None) -> None:
        """How many bytes of an account's blocks may lie on the device at once, copies under way included; None: as many
        as fit. From now on nothing arrives beyond it; of what is there already, the least recently used leave as soon
        as nobody needs them."""
        if not self._accounts.limit(account, nbytes):
            return
        self._queue.admit(self._leases.values())
        for waiter in self._queue:
            if waiter.awake:
                self._check(waiter)
        self._dirty = True

    def prefetch(self, digests: Iterable[str]) -> None:
        """A hint: brings blocks to host memory, and to the device if there is room that nobody waits for."""
        for digest in digests:
            if digest_of(digest) in self._forgets:
                continue
            block = self._placement.block(digest)
            if block.on_device:
                self._placement.touch(block)
            elif not self._placement.failed(block) and not block.unloads:
                self._prefetches[digest] = None
                self._placement.fetch(block)
                self._dirty = True
        while len(self._prefetches) > self._max_prefetch:
            self._drop_prefetch(next(iter(self._prefetches)))

    def try_lease(self, digests: tuple[str, ...], ticket: Hashable = None) -> Lease | None:
        """All of `digests` or nothing. None: they are on their way, ask again after the next poll().

        `ticket` names the waiting request (any hashable, such as its id), keeps its place in the queue from one call
        to the next, and goes when a lease is given, an error is raised or cancel_wait() is called. Left out, callers
        that ask for equal tuples share a place. A waiter that neither asks again nor cancels holds up those behind.

        Raises AdapterMissing, AdapterUnavailable (loading failed, now or less than `retry_after` seconds ago),
        AdapterTooLarge (this set can never fit), AccountTooSmall (nor what its account may take up), ValueError (the
        ticket waits for other digests).
        """
        digests = tuple(digests)
        if not digests:
            return Lease((), (), (), 0)
        key = digests if ticket is None else ticket
        waiter = self._queue.get(key)
        first = waiter is None
        if waiter is None:
            waiter = self._queue.join(key, digests)
        elif waiter.digests != digests:
            raise ValueError(f"ticket {key!r} waits for {waiter.digests}, not for {digests}")
        if first or waiter.asleep:
            if waiter.asleep:
                self._queue.wake(waiter)
            self._check(waiter)
            self._dirty = True
        if waiter.error is not None:
            self._leave(waiter)
            raise waiter.error.with_traceback(None)
        blocks = [self._placement.block(digest) for digest in digests]
        for block in blocks:
            self._placement.fetch(block)
        ready = all(block.on_device and not block.unloads for block in blocks)
        if not ready or not self._queue.is_admitted(waiter):
            return None
        if first:
            self._hits += len(waiter.need)
        else:
            self._misses += len(waiter.need)
        return self._grant(waiter, blocks)

    def is_held(self, ticket: Hashable) -> bool:
        """Whether it waits for an account's room, which only that account's own blocks can give."""
        waiter = self._queue.get(ticket)
        return waiter is not None and waiter.held

    def cancel_wait(self, ticket: Hashable) -> None:
        """The request no longer waits. Unknown tickets (already served, already cancelled) are ignored."""
        waiter = self._queue.get(ticket)
        if waiter is not None:
            self._leave(waiter)

    def release(self, lease: Lease, fence: Fence | None = None) -> None:
        """Gives a lease back. `fence`: lies behind the last step that names its rows, when that step may still be
        running. Raises ValueError for a lease that is not held (released before)."""
        if not lease.digests:
            return
        if self._leases.get(lease.order) is not lease:
            raise ValueError(f"this lease of {lease.digests} is not held")
        del self._leases[lease.order]
        for digest in dict.fromkeys(lease.digests):
            block = self._placement.block(digest)
            block.leases -= 1
            if fence is not None:
                block.fences.append(fence)
                self._fenced.add(block)
            self._placement.touch(block)
            self._drop_if_unloaded(block)
        self._dirty = True

    def size_of(self, digest: str) -> int:
        """Bytes of a block on the device; 0 while it is not known."""
        return self._placement.size_of(digest)

    def leases_of(self, digest: str) -> int:
        """Leases that name it."""
        block = self._placement.blocks.get(digest)
        return 0 if block is None else block.leases

    def unload(self, digest: str, forget: bool = False) -> Unload:
        """Drops a block from both tiers as soon as no lease holds it; with `forget` all blocks of this content, of any
        account, and then deletes the block file.

        Requests that wait for it fetch it anew when they ask next; new leases wait until it is dropped."""
        if forget:
            return self._forget(digest_of(digest))
        unload = Unload(digest, forget)
        block = self._placement.block(digest)
        block.unloads.append(unload)
        self._prefetches.pop(digest, None)
        for waiter in self._queue.needing(digest):
            waiter.asleep = True
        self._dirty = True
        self._drop_if_unloaded(block)
        return unload

    def _forget(self, digest: str) -> Unload:
        parts = [self.unload(block.digest) for block in self._placement.of_content(digest)]
        forget = Unload(digest, True, parts=parts)
        self._forgets.setdefault(digest, []).append(forget)
        self._placement.deleting.add(digest)
        self._discard_if_dropped(digest)
        return forget

    def _discard_if_dropped(self, digest: str) -> None:
        """Carries out a forget once no block of the content is left."""
        forgets = self._forgets.get(digest, ())
        if forgets and all(part.done for forget in forgets for part in forget.parts):
            block = self._placement.block(digest)
            if block.job is None:
                self._placement.discard_file(block)

    def state(self, digest: str) -> State:
        block = self._placement.blocks.get(digest)
        if block is None:
            return "absent"
        if block.on_device:
            return "device"
        if self._placement.failed(block):
            return "failed"
        if block.job is not None and block.job != "discard":
            return "loading"
        if block.host_ready:
            return "host"
        return "loading" if digest in self._prefetches or self._queue.is_needed(digest) else "absent"

    def take_occupancy(self) -> dict[str, tuple[int, float]]:
        """{digest: (loads to the device, bytes there times seconds)} since the last call."""
        return self._placement.occupancy.take()

    # ------------------------------------------------------------ progress

    def poll(self) -> bool:
        """Takes what the loader has finished, then starts what can be started: to be called once per step, and
        before going to sleep. True: there is more to do at once (compaction); do not sleep, poll again."""
        for completion in self._loader.completions():
            self._complete(completion)
        while self._failures and self._failures[0][0] <= self._clock():
            self._placement.forget_if_idle(self._placement.block(self._failures.popleft()[1]))
        for block in list(self._fenced):
            block.busy()
            if not block.fences:
                self._fenced.discard(block)
                self._drop_if_unloaded(block)
                self._dirty = True
        if not self._dirty:
            return False
        self._queue.admit(self._leases.values())
        for account in list(self._accounts.exceeded):
            self._placement.trim(account)
        self._dirty = self._advance()
        return self._dirty

    def _advance(self) -> bool:
        """Oldest waiter first. Once one of them lacks room in a tier, nobody younger takes room there."""
        more = arena_closed = slab_closed = False
        place = self._placement
        seen: set[frozenset[str]] = set()
        for waiter in self._queue:
            if not waiter.active or waiter.need in seen:
                continue
            if arena_closed and slab_closed:
                break
            seen.add(waiter.need)
            admitted = self._queue.is_admitted(waiter)
            arena_closed = arena_closed or not admitted
            for digest in dict.fromkeys(waiter.digests):
                block = place.block(digest)
                place.fetch(block)
                if block.on_device or block.job is not None or block.info is None or block.unloads:
                    continue
                claim = self._queue.claim(digest)
                if place.wants_read(block):
                    slab_closed = slab_closed or not place.start_read(block, claim)
                elif not arena_closed:
                    leaving = place.beyond_limit(block.account, block.nbytes)
                    if leaving is None:
                        continue  # until a copy, or a step, of a block that has to leave has ended
                    if not place.make_room(block, claim, leaving):
                        arena_closed = True
                    elif not place.start_copy(block):
                        # There is room, but in pieces. Nothing moved: a region that is being written is in the way.
                        moved = place.compact(block.nbytes)
                        arena_closed = not place.start_copy(block)
                        more = arena_closed and moved > 0
        for digest in list(self._prefetches):
            self._advance_prefetch(digest, arena_closed, slab_closed)
        return more

    def _advance_prefetch(self, digest: str, arena_closed: bool, slab_closed: bool) -> None:
        block = self._placement.block(digest)
        if block.job is not None and not self._queue.is_needed(digest):
            return
        if block.info is None or block.on_device or self._queue.is_needed(digest):
            self._drop_prefetch(digest)
        elif self._placement.wants_read(block):
            if slab_closed or not self._placement.start_read(block, None):
                self._drop_prefetch(digest)
        else:
            if not arena_closed:
                self._placement.start_copy(block)
            self._drop_prefetch(digest)

    def _complete(self, completion: Completion) -> None:
        self._dirty = True
        block = self._placement.finish(completion)
        if completion.stage == "discard":
            self._finish_forgets(block)
            return
        if completion.error is not None:
            block.retry_at = self._clock() + self._retry_after
            self._failures.append((block.retry_at, block.digest))
            self._prefetches.pop(block.digest, None)
            for waiter in self._queue.needing(block.digest):
                if waiter.awake:
                    waiter.error = completion.error
        elif completion.stage == "prepare":
            for waiter in self._queue.needing(block.digest):
                self._check(waiter)
        self._drop_if_unloaded(block)
        self._placement.forget_if_idle(block)

    def _check(self, waiter: Waiter) -> None:
        """Notes why a waiter cannot be served, if that is known."""
        total = sum(map(self._placement.size_of, waiter.need))
        if len(waiter.need) > self._arena.rows:
            waiter.error = TooManyAdapters(digest_of(waiter.digests[0]), len(waiter.need), self._arena.rows)
        elif total > self._arena.capacity:
            names = dict.fromkeys(map(digest_of, waiter.digests))
            waiter.error = AdapterTooLarge(" + ".join(names), total, self._arena.capacity)
        elif (beyond := self._accounts.too_small(waiter.need)) is not None:
            waiter.error = AccountTooSmall(*beyond)
        for digest in waiter.need:
            block = self._placement.blocks.get(digest)
            if block is not None and self._placement.failed(block):
                waiter.error = block.failure

    # ------------------------------------------------------------ leaving

    def _grant(self, waiter: Waiter, blocks: list[Block]) -> Lease:
        rows = tuple(block.row for block in blocks if block.row is not None)
        generations = tuple(int(self._arena.generation[row]) for row in rows)
        loaded = sum(block.nbytes for block in dict.fromkeys(blocks) if block.fresh)
        lease = Lease(waiter.digests, rows, generations, waiter.order, loaded)
        for block in dict.fromkeys(blocks):
            block.fresh = False
            block.leases += 1
            self._placement.touch(block)
        self._leases[lease.order] = lease
        self._queue.drop(waiter)
        self._dirty = True
        return lease

    def _leave(self, waiter: Waiter) -> None:
        self._queue.drop(waiter)
        self._dirty = True
        for digest in waiter.need:
            self._placement.forget_if_idle(self._placement.block(digest))

    def _drop_prefetch(self, digest: str) -> None:
        del self._prefetches[digest]
        self._placement.forget_if_idle(self._placement.block(digest))

    def _drop_if_unloaded(self, block: Block) -> None:
        """Carries out an unload once nothing uses the block."""
        if not block.unloads or block.job is not None or block.busy():
            return
        self._placement.drop(block)
        for unload in block.unloads:
            unload.done = True
        block.unloads.clear()
        block.failure = None
        self._placement.forget_if_idle(block)
        self._dirty = True
        self._discard_if_dropped(digest_of(block.digest))

    def _finish_forgets(self, block: Block) -> None:
        """The block file is gone. So it is for those that have asked since: nobody could make it anew."""
        for forget in self._forgets.pop(block.digest, ()):
            forget.done = True
        self._placement.deleting.discard(block.digest)
        block.failure = None
        self._drop_if_unloaded(block)
        self._placement.forget_if_idle(block)

    # ------------------------------------------------------------ what others see

    def stats(self) -> dict[str, float]:
        """Gauges and, ending in _total, counters. Bytes and seconds; a hit is a block leased at first asking."""
        place = self._placement
        loading = sum(block.job not in (None, "discard") for block in place.blocks.values())
        counters = {**place.counters, "hits": self._hits, "misses": self._misses}
        return {
            "adapters_on_device": float(len(place.on_device)),
            "adapters_on_host": float(len(place.on_host)),
            "adapters_loading": float(loading),
            "adapter_leases": float(len(self._leases)),
            "adapter_waiting": float(len(self._queue)),
            "adapter_device_bytes": float(self._arena.capacity - self._arena.free_bytes),
            "adapter_device_capacity_bytes": float(self._arena.capacity),
            "adapter_device_fragmentation": self._arena.fragmentation,
            "adapter_host_bytes": float(place.slab.used_bytes),
            "adapter_host_capacity_bytes": float(place.slab.capacity),
            **{f"adapter_{name}_total": float(value) for name, value in counters.items()},
        }

    def check_integrity(self) -> None:
        """Raises RuntimeError unless tiers, rows, leases, waiters and jobs agree with each other."""
        self._arena.check_integrity()
        self._placement.slab.check_integrity()
        leased = Counter(digest for lease in self._leases.values() for digest in set(lease.digests))
        problems = list(self._placement.problems(leased))
        for lease in self._leases.values():
            for digest, row, generation in zip(lease.digests, lease.rows, lease.generations, strict=True):
                block = self._placement.blocks.get(digest)
                if block is None or block.row != row or self._arena.generation[row] != generation:
                    problems.append(f"lease {lease.order}: row {row} no longer serves {digest}")
        if problems:
            raise RuntimeError("residency: " + "; ".join(problems))

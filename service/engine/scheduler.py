"""Decides what runs in the next step. No torch, no sockets, no clock.

A step has a budget of tokens. First every running sequence that decodes gets its one token, so that no stream waits
for another's prompt; what is left goes to the chunks of prompts, those begun before those new. Sequences come and go
in order of arrival: the oldest is admitted first and preempted last, so the oldest always gets to its end and,
after it, the next. Only two may be passed: one whose adapters are still on their way (FETCHING), and one that waits
for a sibling to fill the prefix cache for it. Nobody passes one that waits for pages, however many it needs.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator
from itertools import pairwise

from adapters.errors import LoraplexAdapterError
from adapters.residency import Lease, Residency
from service.engine.errors import IntegrityError
from service.engine.kv_cache import PagePool
from service.engine.messages import AdapterRef
from service.engine.request import Batch, Scheduled, Sequence, State

MAX_FETCHING = 64
"""Mixes asked for at once. Asking costs 4 us a mix and step: 900 of them would cost as much as the step itself."""


def _arrival(seq: Sequence) -> float:
    return seq.arrival


class Scheduler:
    """The queues of the engine. Raises ValueError for limits under which nothing could run."""

    def __init__(self, pool: PagePool, residency: Residency, *, max_sequences: int, max_tokens_per_step: int) -> None:
        if max_sequences < 1 or max_tokens_per_step < 1:
            raise ValueError("max_sequences and max_tokens_per_step must be at least 1")
        self.pool = pool
        self.residency = residency
        self.max_tokens_per_step = max_tokens_per_step
        # Every running sequence decodes in every step, so there are never more of them than the budget has tokens.
        self.max_sequences = min(max_sequences, max_tokens_per_step)
        self.waiting: list[Sequence] = []
        """WAITING and FETCHING, by arrival; preempted sequences arrived before whoever waits, so they come first."""
        self.running: list[Sequence] = []
        """By arrival; among them those whose prompt is not yet computed."""
        self.failed: list[tuple[Sequence, LoraplexAdapterError]] = []
        """Sequences whose adapters cannot be had, for the owner to take away and finish()."""
        self.preemptions = 0
        self._leader: dict[Sequence, Sequence] = {}
        self._lease: dict[Sequence, Lease] = {}

    @property
    def num_fetching(self) -> int:
        return sum(seq.state is State.FETCHING for seq in self.waiting)

    def add(self, seq: Sequence, leader: Sequence | None = None) -> None:
        """Queue `seq`. `leader` has the same prompt and adapters: `seq` waits until the leader's prompt is computed
        and then finds it in the prefix cache."""
        if leader is not None and self.pool.prefix_caching and seq.num_prompt > self.pool.page_size:
            self._leader[seq] = leader
        insort(self.waiting, seq, key=_arrival)

    def finish(self, seq: Sequence) -> None:
        """Take `seq` out, wherever it is, with all it holds. The owner says why in finish_reason."""
        (self.running if seq.state is State.RUNNING else self.waiting).remove(seq)
        seq.state = State.FINISHED
        self._leader.pop(seq, None)
        self.residency.cancel_wait(seq)
        self._give_back(seq)

    # ------------------------------------------------------------ one step

    def schedule(self) -> Batch:
        """The next step's work; empty if nothing can run now. The sequences' pages reach as far as the batch does."""
        before = self.preemptions
        items = list(self._decode())
        budget = self.max_tokens_per_step - len(items)
        for seq in self.running:
            if budget > 0 and seq.num_uncomputed > 1:
                items.append(self._chunk(seq, budget))
                budget -= items[-1].count
        # Pages were just short: whoever came in now would be the next to go.
        if self.preemptions == before:
            items += self._admit(budget)
        return Batch(items)

    def _decode(self) -> Iterator[Scheduled]:
        """One token of every running sequence whose earlier tokens are all computed."""
        i = 0
        while i < len(self.running):
            seq = self.running[i]
            if seq.num_uncomputed == 1:
                if not self._make_room(seq):
                    return  # it was the newest, and has gone itself
                yield Scheduled(seq, 1, samples=True)
            i += 1

    def _chunk(self, seq: Sequence, budget: int) -> Scheduled:
        count = min(seq.num_uncomputed, budget)
        return Scheduled(seq, count, samples=count == seq.num_uncomputed)

    def _make_room(self, seq: Sequence) -> bool:
        """Pages for all tokens of `seq`, taken from the newest sequences if need be; False if `seq` is the newest."""
        while not self.pool.can_allocate(seq, len(seq.tokens)):
            newest = self.running[-1]
            if newest is seq and len(self.running) == 1:
                raise IntegrityError(f"{seq.request_id}/{seq.index} is alone and does not fit: it should be refused")
            self._preempt(newest)
            if newest is seq:
                return False
        self.pool.allocate(seq, len(seq.tokens))
        return True

    def _preempt(self, seq: Sequence) -> None:
        """Back to the queue with nothing in hand; its tokens are computed again as if they were its prompt. Random
        numbers depend on (seed, position), so its stream goes on as if nothing had happened."""
        self.running.remove(seq)
        self._give_back(seq)
        seq.state = State.WAITING
        seq.preemptions += 1
        self.preemptions += 1
        insort(self.waiting, seq, key=_arrival)

    # ------------------------------------------------------------ admission

    def _admit(self, budget: int) -> Iterator[Scheduled]:
        """First chunks of those who may come in."""
        if budget <= 0 or len(self.running) >= self.max_sequences:
            return
        missing: set[tuple[AdapterRef, ...]] = set()
        for seq in list(self.waiting):
            if self._follows(seq) or not self._leased(seq, missing):
                continue
            # Pages for the whole prompt at once, and one more for each running sequence, each of which needs its
            # next page soon: without them the newcomer would be preempted at once.
            if not self.pool.can_allocate(seq, len(seq.tokens), reserve=len(self.running)):
                return
            self.pool.allocate(seq, len(seq.tokens))
            self.waiting.remove(seq)
            insort(self.running, seq, key=_arrival)
            seq.state = State.RUNNING
            scheduled = self._chunk(seq, budget)
            yield scheduled
            budget -= scheduled.count
            if budget <= 0 or len(self.running) >= self.max_sequences:
                return

    def _follows(self, seq: Sequence) -> bool:
        leader = self._leader.get(seq)
        if leader is None:
            return False
        if leader.state is not State.FINISHED and leader.num_computed < leader.num_prompt:
            return True
        del self._leader[seq]
        return False

    def _leased(self, seq: Sequence, missing: set[tuple[AdapterRef, ...]]) -> bool:
        """Whether the adapters of `seq` are on the device and kept there for it. Once they are, they stay while it
        waits for pages: pages come from sequences that wait for nothing, so this cannot lock up.

        `missing`: mixes that were asked for in vain in this step. Residency answers by mix, so the same one is not
        asked for twice; and who is not FETCHING yet waits its turn while many mixes are, unless its own is there."""
        if not seq.adapters or seq in self._lease:
            return True
        if seq.adapters in missing:
            return False
        digests = tuple(ref.digest for ref in seq.adapters)
        full = seq.state is not State.FETCHING and len(missing) >= MAX_FETCHING
        if full and any(self.residency.state(digest) != "device" for digest in digests):
            return False
        try:
            lease = self.residency.try_lease(digests, ticket=seq)
        except LoraplexAdapterError as error:
            self.failed.append((seq, error))
            return False
        if lease is None:
            seq.state = State.FETCHING
            missing.add(seq.adapters)
            return False
        seq.state = State.WAITING
        self._lease[seq] = lease
        seq.rows = tuple((row, ref.weight) for row, ref in zip(lease.rows, seq.adapters, strict=True))
        return True

    def _give_back(self, seq: Sequence) -> None:
        self.pool.free(seq)
        seq.rows = ()
        lease = self._lease.pop(seq, None)
        if lease is not None:
            self.residency.release(lease)

    # ------------------------------------------------------------ the truth

    def check_integrity(self) -> None:
        """Raises IntegrityError unless queues, pages and leases agree."""
        self.pool.check_integrity(self.running)
        for queue in (self.waiting, self.running):
            if any(a.arrival > b.arrival for a, b in pairwise(queue)):
                raise IntegrityError("a queue is not in order of arrival")
        if len(self.running) > self.max_sequences:
            raise IntegrityError("more sequences run than may")
        for seq in self.running:
            if seq.state is not State.RUNNING or bool(seq.adapters) != (seq in self._lease):
                raise IntegrityError(f"{seq.request_id}/{seq.index} runs in state {seq.state}, or without its adapters")
        for seq in self.waiting:
            if seq.state not in (State.WAITING, State.FETCHING) or seq.pages or seq.num_computed:
                raise IntegrityError(f"{seq.request_id}/{seq.index} waits in state {seq.state} with pages {seq.pages}")
        known = {*self.waiting, *self.running}
        if not set(self._lease) <= known or not set(self._leader) <= known:
            raise IntegrityError("a sequence that is gone has left a lease or a leader behind")

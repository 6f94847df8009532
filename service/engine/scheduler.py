"""Decides what runs in the next step. No torch, no sockets, no clock.

A step has a budget of tokens. First every running sequence that decodes gets its one token, so that no stream waits
for another's prompt; what is left goes to the chunks of prompts. While somebody decodes, those chunks have a bound of
their own (`max_prefill_tokens_per_step`): it, and not the budget, says how long the streams' next token takes. How much
of it a step is given, and when more than that, is in budgets.py.

Between tenants, the one charged least goes first (fairness.py), but for the rest of a prompt that the step before had
no room for; within one, a higher priority, then prompts that are begun, then order of arrival. Only two are passed by
others of their tenant: one whose adapters are on their way (FETCHING), and one that waits for a sibling to fill the
prefix cache for it. How sequences come in and who has to make room is in admission.py.

While tenants with few sequences come and go beside tenants with many (guests.py), the latter keep their steps short,
their prompts come last, and they sit out the steps that compute the others' prompts.

Every sequence gets to its end. The oldest of all that run is never preempted, and has its turn soon where turns are
taken, so it ends, and after it the next. (Hosts' prompts stand still while guests' are computed. That ends too: hosts'
decodes end, from then on hosts are charged nothing, and who has been charged more than they were is no guest.) Of
those that wait, take the oldest: only finitely many of its tenant are before it, so what they cost is finite, while
other tenants' counters rise with all they get, until its tenant is first (but for rests of prompts, one a step at
most, which have begun before); from then on at most MAX_PASSED come in before it, those that run end, and it comes in.
(Priorities are a tenant's own affair: a stream of urgent requests can keep its other requests waiting.) With a single
tenant all this is first come, first served, newest preempted.
"""

from __future__ import annotations

import heapq
from bisect import insort
from collections.abc import Iterator
from itertools import pairwise

from adapters.errors import LoraplexAdapterError
from adapters.residency import Residency
from service.engine.admission import Admission
from service.engine.budgets import Backlog, Filling, Left, riding_tokens
from service.engine.errors import IntegrityError
from service.engine.fairness import Prices, Tenant, Tenants, rank
from service.engine.guests import Guests
from service.engine.kv_cache import PagePool
from service.engine.request import Batch, Scheduled, Sequence, State

_RUNNING = State.RUNNING  # faster than by the enumeration, once for each sequence and step


def _arrival(seq: Sequence) -> float:
    return seq.arrival


SINGLE_USER = {"", "default"}
"""The tenant where there are none: of a request without, and of a service in single-user mode
(service.store.tables.DEFAULT_TENANT)."""


class Scheduler:
    """The queues of the engine. Raises ValueError for limits under which nothing could run."""

    def __init__(
        self,
        pool: PagePool,
        residency: Residency,
        *,
        max_sequences: int,
        max_tokens_per_step: int,
        max_prefill_tokens_per_step: int = 0,
        prices: Prices | None = None,
        filling: Filling | None = None,
        backlog: bool = False,
    ) -> None:
        """`max_prefill_tokens_per_step`: of prompts, in a step in which sequences decode; 0: no such bound. filling:
        how much of that a step is given. backlog: more where prompts have stood behind others' for long."""
        if max_sequences < 1 or max_tokens_per_step < 1:
            raise ValueError("max_sequences and max_tokens_per_step must be at least 1")
        self.pool = pool
        self.max_tokens_per_step = max_tokens_per_step
        self.max_prefill_tokens_per_step = max_prefill_tokens_per_step or max_tokens_per_step
        self._filling = filling or Filling({})
        self._backlog = Backlog() if backlog else None
        # Every running sequence decodes in every step, so there are never more of them than the budget has tokens.
        self.max_sequences = min(max_sequences, max_tokens_per_step)
        self.tenants = Tenants(prices or Prices())
        self.running: list[Sequence] = []
        """By arrival; among them those whose prompt is not yet computed."""
        self.preemptions = 0
        self.steps_in_backlog = 0
        """In which prompts might take more than the bound, as others had stood behind them for long."""
        self._admission = Admission(self, residency)
        self._step: dict[Sequence, Scheduled] = {}
        """What is decided of this step."""
        self._gone: set[Sequence] = set()
        """Preempted in this step."""
        self._rode = False
        """There were prompts in the last step."""
        self._cut: Sequence | None = None
        """The last step had no room for all of its prompt."""
        self._guests = Guests(self.tenants, self.max_prefill_tokens_per_step)

    @property
    def failed(self) -> list[tuple[Sequence, LoraplexAdapterError]]:
        """Sequences whose adapters cannot be had, for the owner to take away and finish()."""
        return self._admission.failed

    @property
    def waiting(self) -> list[Sequence]:
        """WAITING and FETCHING, tenant by tenant."""
        return [seq for tenant in self.tenants.queued.values() for seq in tenant.waiting]

    @property
    def num_waiting(self) -> int:
        return self.tenants.num_waiting

    @property
    def num_fetching(self) -> int:
        return len(self._admission.fetching)

    def add(self, seq: Sequence, leader: Sequence | None = None, weight: float = 1.0) -> None:
        """Queue `seq`. `leader` has the same prompt and adapters: `seq` waits until the leader's prompt is computed
        and then finds it in the prefix cache. `weight`: its tenant's from now on."""
        if self._backlog and not self.running and not self.num_waiting:
            self._backlog = Backlog()
        tenant = self.tenants.open(seq.tenant, weight)
        if leader is not None and self.pool.prefix_caching and seq.num_prompt > self.pool.page_size:
            self._admission.leader[seq] = leader
        self.tenants.enqueue(seq, lift=True)
        self._guests.came(tenant, len(self.running))

    def took(self, batch: Batch, seconds: float, lead: float = 0.0) -> None:
        """How long the step took, and how long before its end the next one was closed."""
        self._guests.took(batch.num_tokens - len(batch.items), len(batch.items), seconds, lead)
        if self._backlog and batch.left:
            self.steps_in_backlog += self._backlog.lasts
            self._backlog.took(seconds, batch.left)

    def finish(self, seq: Sequence) -> None:
        """Take `seq` out, wherever it is, with all it holds. The owner says why in finish_reason."""
        if seq.state is State.RUNNING:
            self._leave(seq)
        else:
            self.tenants.dequeue(seq)
        seq.state = State.FINISHED
        self._admission.forget(seq)

    # ------------------------------------------------------------ one step

    def schedule(self) -> Batch:
        """The next step's work; empty if nothing can run now. The sequences' pages reach as far as the batch does."""
        self._step.clear()
        self._gone.clear()
        hosts = self._guests.hosts(len(self.running))
        begun = self._decode(self._guests.in_turn(self.running, hosts) if hosts else self.running)
        decoding = len(self._step)
        budget = self.max_tokens_per_step - decoding
        if decoding:
            budget = min(budget, self._riding(decoding, guests=bool(hosts)))
        # Where pages were just short, whoever came in now would be the next to go.
        left = self._prefill(begun, budget, admit=not self._gone, hosts=hosts)
        self._rode = len(self._step) > decoding
        return Batch(list(self._step.values()), left if decoding else None)

    def _riding(self, decoding: int, *, guests: bool) -> int:
        """Prompt tokens that may ride with so many decoding sequences."""
        bound = self.max_prefill_tokens_per_step
        alone = self.tenants.serving.keys() <= SINGLE_USER
        # Short steps and free slots are what makes a flood bearable for other tenants (guests.py).
        if guests and not alone:
            return bound
        lasts = self._backlog is not None and self._backlog.lasts
        if alone and (most := riding_tokens(decoding, bound, lasts=lasts)) > bound:
            return most
        # A prompt that comes alone ends sooner in one step; where one follows another, the next fills up what is cut.
        return self._filling.tokens(decoding, min(bound, self.max_tokens_per_step - decoding)) if self._rode else bound

    def _decode(self, running: list[Sequence]) -> dict[str, list[Sequence]]:
        """One token of every one of `running` whose earlier tokens are all computed. The others are returned, by
        tenant. Written for speed: nearly all sequences go through here in every step."""
        begun: dict[str, list[Sequence]] = {}
        owed: dict[str, float] = {}
        size, step = self.pool.page_size, self._step
        for seq in list(running):
            known, computed = len(seq.tokens), seq.num_computed
            if known - computed != 1:
                if known != computed:  # equal: the step in flight draws its last token
                    begun.setdefault(seq.tenant, []).append(seq)
            elif seq.state is _RUNNING and (len(seq.pages) * size >= known or self._grow(seq)):
                if seq.paid > computed or computed < seq.num_prompt:
                    self._put(seq, 1)
                    continue
                step[seq] = Scheduled(seq, 1, True, seq.decode_cost, 1)
                seq.paid = known
                owed[seq.tenant] = owed.get(seq.tenant, 0.0) + seq.decode_cost
        for name, cost in owed.items():
            self.tenants.charge(self.tenants[name], cost)
        return begun

    def _prefill(self, begun: dict[str, list[Sequence]], budget: int, admit: bool, hosts: dict[str, Tenant]) -> Left:
        """Chunks of prompts, the next always of the tenant that has been charged least; hosts come last."""
        admit = self._admission.begin() and admit
        names = {**begun, **self.tenants.queued} if admit else begun
        guests = self._guests.among(names, len(self.running), hosts) if hosts else set()
        rest = self._guests.rest(len(self._step)) if hosts else budget
        first = self._rest_of_cut()
        heap = []
        for place, name in enumerate(names):
            tenant = self.tenants[name]
            order = (name in hosts, name != first, *tenant.standing(), place)
            heap.append((order, tenant, self._candidates(tenant, begun.get(name, []), admit)))
        heapq.heapify(heap)
        fed: list[Sequence] = []
        while heap and budget > 0:
            order, tenant, candidates = heap[0]
            limit = budget
            if order[0]:
                limit = 0 if fed else min(limit, rest)
            seq = next(candidates, None) if limit > 0 else None
            if seq is None:
                heapq.heappop(heap)
                continue
            if tenant.name in guests:
                fed.append(seq)
                if not seq.paid:
                    self._guests.asks(seq.num_uncomputed)
            count = min(seq.num_uncomputed, limit)
            self._put(seq, count)
            if count < seq.num_uncomputed:
                self._cut = seq
            budget -= count
            rest -= count if order[0] else 0
            heapq.heapreplace(heap, ((order[0], True, *tenant.standing(), order[-1]), tenant, candidates))
        if hosts and self._guests.sit_out(any(seq in self._step for seq in fed)):
            for seq in [seq for seq in self._step if seq.tenant in hosts]:
                self._take_out(seq)
        if budget > 0:
            return Left.ROOM
        free = admit and len(self.running) < self.max_sequences
        behind = free and self.num_waiting > self.num_fetching
        behind |= any(seq.state is _RUNNING and seq not in self._step for seqs in begun.values() for seq in seqs)
        return Left.OTHERS if behind else Left.REST

    def _rest_of_cut(self) -> str | None:
        """The tenant of the prompt that the last step cut, if half a step's prompts or less are left of it: it goes
        first, once. Otherwise it would wait, charged for what it had, until all others' prompts were nearly computed
        too."""
        cut, self._cut = self._cut, None
        if cut is None or cut.state is not _RUNNING or cut.num_uncomputed > self.max_prefill_tokens_per_step // 2:
            return None
        return cut.tenant

    def _candidates(self, tenant: Tenant, begun: list[Sequence], admit: bool) -> Iterator[Sequence]:
        """The sequences of a tenant that have prompt tokens to compute, one after the other: whoever asks for the next
        computes it. New ones come in as they are asked for."""
        begun.sort(key=rank)
        b = 0
        for seq in list(tenant.waiting) if admit else ():
            while b < len(begun) and begun[b].priority >= seq.priority:
                if begun[b].state is State.RUNNING:
                    yield begun[b]
                b += 1
            if seq in self._gone:
                continue
            if not self._admission.slot(tenant):
                break
            if self._admission.ready(tenant, seq):
                if not self._admission.enter(tenant, seq):
                    break
                self.tenants.begin(seq)
                insort(self.running, seq, key=_arrival)
                seq.state = State.RUNNING
                seq.decode_cost = self.tenants.prices.step(0, 1, seq.adapter_bytes)
                yield seq
        for seq in begun[b:]:
            if seq.state is State.RUNNING:
                yield seq

    def _put(self, seq: Sequence, count: int) -> None:
        """Into the step, at its tenant's cost."""
        begin = seq.num_computed
        end = begin + count
        item = self._step[seq] = Scheduled(seq, count, samples=end == len(seq.tokens))
        if end > seq.paid:
            item.charged = end - max(seq.paid, begin)
            decode = min(item.charged, max(0, end - seq.num_prompt))
            item.cost = self.tenants.prices.step(item.charged - decode, decode, seq.adapter_bytes)
            seq.paid = end
            self.tenants.charge(self.tenants[seq.tenant], item.cost)

    def _take_out(self, seq: Sequence) -> None:
        """Of the step, as if it had not been in it."""
        item = self._step.pop(seq, None)
        if item is not None:
            seq.paid -= item.charged
            self.tenants.charge(self.tenants[seq.tenant], -item.cost)

    # ------------------------------------------------------------ room

    def _grow(self, seq: Sequence) -> bool:
        """Pages for all tokens of `seq`, taken from others if need be; False if it had to go itself."""
        while not self.pool.can_allocate(seq, len(seq.tokens)):
            if len(self.running) == 1:
                raise IntegrityError(f"{seq.request_id}/{seq.index} is alone and does not fit: it should be refused")
            victim = self._admission.most_over_share_of_pages()
            self.preempt(victim)
            if victim is seq:
                return False
        self.pool.allocate(seq, len(seq.tokens))
        return True

    def preempt(self, seq: Sequence) -> None:
        """Back to the queue with nothing in hand; its tokens are computed again as if they were its prompt. Random
        numbers depend on (seed, position), so its stream goes on as if nothing had happened."""
        self._take_out(seq)
        self._leave(seq)
        self._admission.give_back(seq)
        seq.state = State.WAITING
        seq.preemptions += 1
        self.preemptions += 1
        self._gone.add(seq)
        self.tenants.enqueue(seq, lift=False)

    def _leave(self, seq: Sequence) -> None:
        self.running.remove(seq)
        self.tenants.end(seq)

    # ------------------------------------------------------------ the truth

    def check_integrity(self) -> None:
        """Raises IntegrityError unless queues, pages and leases agree."""
        self.pool.check_integrity(self.running)
        self.tenants.check_integrity(self.running)
        if any(a.arrival > b.arrival for a, b in pairwise(self.running)):
            raise IntegrityError("those that run are not in order of arrival")
        if len(self.running) > self.max_sequences:
            raise IntegrityError("more sequences run than may")
        for seq in self.running:
            if seq.state is not State.RUNNING or bool(seq.adapters) != self._admission.leased(seq):
                raise IntegrityError(f"{seq.request_id}/{seq.index} runs in state {seq.state}, or without its adapters")
        waiting = self.waiting
        for seq in waiting:
            if seq.state not in (State.WAITING, State.FETCHING) or seq.pages or seq.num_computed:
                raise IntegrityError(f"{seq.request_id}/{seq.index} waits in state {seq.state} with pages {seq.pages}")
        self._admission.check_integrity({*waiting, *self.running})

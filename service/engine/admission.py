"""Who comes in, and who has to make room for it: slots, pages, and adapters in the arena. No torch.

What is free goes to whoever is first. What is taken is taken back for a tenant that has less than its share, from the
one that has most for its weight, by one rule for slots, pages and arena room alike: an exchange takes place only if
the newcomer's tenant has been charged no more than the other one, and then has no more for its weight than the other
one still has. So it cannot be turned round afterwards, and a tenant that is alone, or has its share, takes nothing
from anyone. Who goes is the newest of its
tenant with the lowest priority, never the oldest of all. A reserve of slots would do without preemptions, but would
lie idle while nobody else asks; a victim finds most of its pages again in the prefix cache.

One that waits for pages lets others of its tenant wait too, however many it needs. Other tenants may pass it while they
stay within their shares of the pages, MAX_PASSED times: a tenant's huge prompt does not stop everybody while the pages
for it come together, and still they do.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

from adapters.errors import LoraplexAdapterError
from adapters.residency import Lease, Residency
from service.engine.errors import IntegrityError
from service.engine.fairness import Tenant, rank
from service.engine.messages import AdapterRef
from service.engine.request import Sequence, State

if TYPE_CHECKING:
    from service.engine.scheduler import Scheduler

MAX_FETCHING = 64
"""Mixes asked for at once. Asking costs 4 us a mix and step: 900 of them would cost as much as the step itself. Tenants
share them; each may always ask for one, up to twice as many in all."""
MAX_PASSED = 64
"""Sequences of other tenants that may come in before one that waits for pages."""


class Admission:
    """The way from a tenant's queue to the running sequences of `scheduler`."""

    def __init__(self, scheduler: Scheduler, residency: Residency) -> None:
        self.residency = residency
        self.leader: dict[Sequence, Sequence] = {}
        self.failed: list[tuple[Sequence, LoraplexAdapterError]] = []
        self.fetching: dict[Sequence, None] = {}
        """Those that stand in the residency's queue, in its order."""
        self._scheduler = scheduler
        self._pool = scheduler.pool
        self._tenants = scheduler.tenants
        self._lease: dict[Sequence, Lease] = {}
        # Of one step:
        self._missing: set[tuple[AdapterRef, ...]] = set()
        self._missing_of: Counter[str] = Counter()
        self._blocked: Sequence | None = None
        self._made_room = False

    def begin(self) -> bool:
        """A new step; False if nobody can come in."""
        self._missing.clear()
        self._missing_of.clear()
        self._blocked = None
        self._made_room = False
        if not self._tenants.queued:
            return False
        return self._slots_free() or len({*self._tenants.queued, *self._tenants.serving}) > 1

    # ------------------------------------------------------------ slots

    def slot(self, tenant: Tenant) -> bool:
        """Whether one more sequence of `tenant` may run."""
        return self._slots_free() or self._slot_victim(tenant) is not None

    def _slots_free(self) -> bool:
        return len(self._scheduler.running) < self._scheduler.max_sequences

    def _slot_victim(self, tenant: Tenant) -> Sequence | None:
        other = self._has_more(tenant)
        return None if other is None else self._newest(other.name)

    def _has_more(self, tenant: Tenant) -> Tenant | None:
        """Who runs most for its weight, if one of its sequences may go for one of `tenant`. Written for speed: where
        many tenants wait, each of them asks in every step."""
        least = (tenant.running + 1) / tenant.weight
        if self._tenants.most_to_spare < least:
            return None
        found, most, counter = None, 0.0, tenant.counter
        for other in self._tenants.serving.values():
            if other.counter >= counter and (share := other.running / other.weight) > most and other is not tenant:
                found, most = other, share
        return None if found is None or (found.running - 1) / found.weight < least else found

    # ------------------------------------------------------------ coming in

    def enter(self, tenant: Tenant, seq: Sequence) -> bool:
        """Pages and a slot for `seq`, whose adapters are there; False if it, and whoever of its tenant is behind it,
        has to wait."""
        # Pages for the whole prompt at once, and one more for each running sequence, each of which needs its
        # next page soon: without them the newcomer would be preempted at once.
        fits = self._pool.can_allocate(seq, len(seq.tokens), reserve=len(self._scheduler.running))
        if self._blocked is not None:
            if not fits or self._blocked.passed >= MAX_PASSED or not self._within_share(tenant, seq):
                return False
            self._blocked.passed += 1
        elif not fits and not self._take_pages(tenant, seq):
            self._blocked = seq
            return False
        if not self._slots_free():
            victim = self._slot_victim(tenant)
            if victim is None:
                return False
            self._scheduler.preempt(victim)
        self._pool.allocate(seq, len(seq.tokens))
        seq.passed = 0
        return True

    def _pages(self) -> dict[str, int]:
        pages: dict[str, int] = {}
        for seq in self._scheduler.running:
            pages[seq.tenant] = pages.get(seq.tenant, 0) + len(seq.pages)
        return pages

    def _within_share(self, tenant: Tenant, seq: Sequence) -> bool:
        pages = self._pages()
        names = {*pages, *self._tenants.queued}
        share = self._pool.num_pages * tenant.weight / sum(self._tenants[name].weight for name in names)
        return pages.get(tenant.name, 0) + self._pool.pages_for(len(seq.tokens)) <= share

    def _take_pages(self, tenant: Tenant, seq: Sequence) -> bool:
        """Preempts sequences of tenants that have more pages for their weight, if that makes `seq` fit. Their next
        pages need no reserve: they would be the first to go again."""
        pages = self._pages()
        mine = (pages.get(tenant.name, 0) + self._pool.pages_for(len(seq.tokens))) / tenant.weight
        short = self._pool.pages_for(len(seq.tokens)) + tenant.running - self._pool.num_available
        victims: list[Sequence] = []
        while short > 0:
            other = self._most(pages, tenant)
            victim = None if other is None else self._newest(other.name, victims)
            if other is None or victim is None:
                return False
            pages[other.name] -= len(victim.pages)
            if pages[other.name] / other.weight < mine:
                return False
            victims.append(victim)
            short -= len(victim.pages)
        for victim in victims:
            if self._pool.can_allocate(seq, len(seq.tokens), reserve=tenant.running):
                return True
            self._scheduler.preempt(victim)
        return self._pool.can_allocate(seq, len(seq.tokens), reserve=tenant.running)

    # ------------------------------------------------------------ who goes

    def most_over_share_of_pages(self) -> Sequence:
        """Who is preempted when those that run need more pages than there are."""
        other = self._most({name: pages for name, pages in self._pages().items() if self._newest(name) is not None})
        victim = None if other is None else self._newest(other.name)
        if victim is None:
            raise IntegrityError("nobody but the oldest runs, and it does not fit: it should be refused")
        return victim

    def _most(self, amounts: dict[str, int], apart: Tenant | None = None) -> Tenant | None:
        """Who has most for its weight; with `apart`, of the others that were not charged less than that one."""
        others = [self._tenants[name] for name in amounts if apart is None or name != apart.name]
        if apart is not None:
            others = [other for other in others if other.counter >= apart.counter]
        return max(others, key=lambda other: amounts[other.name] / other.weight, default=None)

    def _newest(self, name: str, but: list[Sequence] | None = None) -> Sequence | None:
        """The first of a tenant to go: never the oldest sequence of all."""
        oldest = self._scheduler.running[0]
        mine = (seq for seq in self._scheduler.running if seq.tenant == name and seq is not oldest)
        return max((seq for seq in mine if not but or seq not in but), key=rank, default=None)

    # ------------------------------------------------------------ adapters

    def ready(self, tenant: Tenant, seq: Sequence) -> bool:
        """Whether `seq` needs nothing but pages and a slot."""
        if self._follows(seq):
            return False
        there = self._has_adapters(tenant, seq)
        if seq.timeline is not None:
            seq.timeline.adapters(there)
        return there

    def _follows(self, seq: Sequence) -> bool:
        leader = self.leader.get(seq)
        if leader is None:
            return False
        # Pages can be found once the step that fills them has been read.
        known = leader.num_generated - leader.pending
        if leader.state is not State.FINISHED and (leader.num_computed < leader.num_prompt or not known):
            return True
        del self.leader[seq]
        return False

    def _has_adapters(self, tenant: Tenant, seq: Sequence) -> bool:
        """Whether the adapters of `seq` are on the device and kept there for it. Once they are, they stay while it
        waits for pages: pages come from sequences that wait for nothing, so this cannot lock up.

        Residency answers by mix, so one that was asked for in vain in this step is not asked for again; and who is
        not FETCHING yet waits its turn while many mixes are, unless its own is there."""
        if not seq.adapters or seq in self._lease:
            return True
        if seq.adapters in self._missing:
            return False
        digests = tuple(ref.digest for ref in seq.adapters)
        asks_enough = seq.state is not State.FETCHING and self._asks_enough(tenant)
        if asks_enough and any(self.residency.state(digest) != "device" for digest in digests):
            return False
        try:
            lease = self.residency.try_lease(digests, ticket=seq)
        except LoraplexAdapterError as error:
            self.fetching.pop(seq, None)
            seq.state = State.WAITING
            self.failed.append((seq, error))
            return False
        if lease is None:
            self._missing.add(seq.adapters)
            self._missing_of[tenant.name] += 1
            if seq.state is not State.FETCHING:
                seq.state = State.FETCHING
                self._go_before_others(tenant, seq)
                self.fetching[seq] = None
            elif not self._made_room and not self.residency.is_held(seq):
                self._make_room_in_arena(tenant, digests)
            return False
        self._take(tenant, seq, lease)
        if lease.loaded_bytes:
            self._lease_alike(tenant, seq)
        return True

    def _take(self, tenant: Tenant, seq: Sequence, lease: Lease) -> None:
        self.fetching.pop(seq, None)
        seq.state = State.WAITING
        self._lease[seq] = lease
        seq.rows = tuple((row, ref.weight) for row, ref in zip(lease.rows, seq.adapters, strict=True))
        seq.adapter_bytes = sum(map(self.residency.size_of, lease.digests))
        if lease.loaded_bytes:
            self._tenants.charge(tenant, self._tenants.prices.loading(lease.loaded_bytes))

    def _lease_alike(self, tenant: Tenant, first: Sequence) -> None:
        """Others that wait for the mix that has just been loaded for `first` have it as well, as many as there are
        slots for, though this step may have no room for their prompts. In the next one it would be the turn of older
        requests, and where their adapters find no room beside it, it would have been loaded for those few."""
        if not self.fetching:
            return
        waiting = sum(seq.state is not State.RUNNING for seq in self._lease)
        room = self._scheduler.max_sequences - len(self._scheduler.running) - waiting
        for seq in tenant.waiting:
            if room <= 0:
                break
            if seq.adapters != first.adapters or seq in self._lease or seq in self.fetching:
                continue
            # One that follows must not hold what its leader, should that be preempted, would wait for behind others.
            if self._follows(seq):
                continue
            try:
                lease = self.residency.try_lease(tuple(ref.digest for ref in seq.adapters), ticket=seq)
            except LoraplexAdapterError:  # which it is told when it asks itself
                break
            if lease is None:
                self.residency.cancel_wait(seq)
                break
            self._take(tenant, seq, lease)
            room -= 1

    def _asks_enough(self, tenant: Tenant) -> bool:
        tenants = max(1, len(self._tenants.queued))
        mine = self._missing_of[tenant.name] >= max(1, MAX_FETCHING // tenants)
        return mine or len(self._missing) >= (2 if tenants > 1 else 1) * MAX_FETCHING

    def _go_before_others(self, tenant: Tenant, seq: Sequence) -> None:
        """The residency serves in the order of asking. Those that stand behind `seq` here ask again, behind it there;
        what is being loaded for them goes on."""
        stand = Counter(other.tenant for other in self.fetching)
        mine = (tenant.counter, (stand[tenant.name] + 1) / tenant.weight)
        for other in list(self.fetching):
            theirs = self._tenants[other.tenant]
            if theirs is tenant:
                behind = other.priority < seq.priority
            else:
                behind = (theirs.counter, stand[theirs.name] / theirs.weight) > mine
            if behind:
                del self.fetching[other]
                other.state = State.WAITING
                self.residency.cancel_wait(other)

    def _make_room_in_arena(self, tenant: Tenant, digests: tuple[str, ...]) -> None:
        """For a tenant with less than its share whose adapters lie in host memory, since those of running sequences
        fill the arena: mixes go with all that run with them, as many as free enough at once (what is too little is
        leased again before more is free). Once a step: the arena shows only after the next poll."""
        states = {digest: self.residency.state(digest) for digest in digests}
        if "host" not in states.values() or any(state not in ("host", "device") for state in states.values()):
            return
        other = self._has_more(tenant)
        if other is None:
            return
        need = sum(self.residency.size_of(digest) for digest, state in states.items() if state == "host")
        # Who does not run yet gives back its lease for nothing; then whole mixes go, with all that run with them.
        spare = [seq for seq in other.waiting if seq in self._lease]
        oldest = self._scheduler.running[0]
        mine = sorted((seq for seq in self._scheduler.running if seq.tenant == other.name), key=rank, reverse=True)
        groups: dict[tuple[AdapterRef, ...], list[Sequence]] = {}
        for seq in mine:
            if seq.adapters:
                groups.setdefault(seq.adapters, []).append(seq)
        left = Counter(digest for seq in spare for digest in self._lease[seq].digests)
        victims: list[Sequence] = []
        need -= self._freed(left, left)
        for group in groups.values():
            if need <= 0:
                break
            running = other.running - len(victims) - len(group)
            if oldest in group or running / other.weight < (tenant.running + 1) / tenant.weight:
                continue
            more = Counter(digest for seq in group for digest in self._lease[seq].digests)
            freed = self._freed(left + more, more)
            if freed:
                left += more
                victims += group
                need -= freed
        if need <= 0:
            self._made_room = True
            for seq in spare:
                self.residency.release(self._lease.pop(seq))
                seq.rows = ()
            for seq in victims:
                self._scheduler.preempt(seq)

    def _freed(self, left: Counter[str], digests: Iterable[str]) -> int:
        """Bytes of those of `digests` that nobody would use any more after so many of their leases."""
        return sum(self.residency.size_of(each) for each in digests if self.residency.leases_of(each) == left[each])

    def leased(self, seq: Sequence) -> bool:
        return seq in self._lease

    def give_back(self, seq: Sequence) -> None:
        """Everything that `seq` holds."""
        self._pool.free(seq)
        seq.rows = ()
        lease = self._lease.pop(seq, None)
        if lease is not None:
            self.residency.release(lease)

    def forget(self, seq: Sequence) -> None:
        """It has ended: with what it holds, what it waits for."""
        self.leader.pop(seq, None)
        self.fetching.pop(seq, None)
        self.residency.cancel_wait(seq)
        self.give_back(seq)

    def check_integrity(self, known: set[Sequence]) -> None:
        """Raises IntegrityError unless leases, leaders and states agree with the sequences that exist."""
        if not set(self._lease) <= known or not set(self.leader) <= known:
            raise IntegrityError("a sequence that is gone has left a lease or a leader behind")
        if set(self.fetching) != {seq for seq in known if seq.state is State.FETCHING}:
            raise IntegrityError("those that are FETCHING are others than those that wait for adapters")

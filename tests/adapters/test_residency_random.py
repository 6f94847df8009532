"""Residency under random traffic: any calls, any order of completions; integrity after each call, nobody starves."""

from __future__ import annotations

import random
from collections.abc import Iterable

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from adapters.errors import AccountTooSmall, AdapterTooLarge, AdapterUnavailable
from adapters.keys import account_of, digest_of
from adapters.residency import Lease, Unload
from tests.adapters.scripted_loader import Tiers

NAMES = "abcdefgh"
ARENA_BYTES = 6144
RANKS = dict(zip(NAMES, (4, 8, 16, 16, 30, 40, 96, 100), strict=True))
"""64 bytes per rank: from 256 bytes to all of the arena (g), and more than that (h)."""

KEYS = (*NAMES, "a@1", "c@1", "d@1", "e@1", "a@2", "f@2")
"""Some content has blocks of two accounts, and one that is nobody's."""
LIMITS = (None, 1024, 2048, 2304, 3072)

sets = st.lists(st.sampled_from(KEYS), min_size=1, max_size=4).map(tuple)
picks = st.integers(0, 1 << 16)


class Fence:
    passed = False

    def done(self) -> bool:
        return self.passed


def size(digests: Iterable[str]) -> int:
    return sum(-(-RANKS[digest_of(name)] * 64 // 256) * 256 for name in set(digests))


def fits(digests: tuple[str, ...]) -> bool:
    return size(digests) <= ARENA_BYTES


class Traffic(RuleBasedStateMachine):
    @initialize(
        host=st.sampled_from([0, 512, 2048, 4096, 1 << 15]),
        rows=st.sampled_from([4, 5, 16]),
        compact=st.sampled_from([256, 2048]),
    )
    def start(self, host: int, rows: int, compact: int) -> None:
        self.tiers = Tiers(RANKS, arena_bytes=ARENA_BYTES, host_bytes=host, rows=rows, compact_bytes=compact)
        self.residency = self.tiers.residency
        self.tickets = 0
        self.waiting: dict[int, tuple[str, ...]] = {}
        self.leases: list[Lease] = []
        self.unloads: list[Unload] = []
        self.fences: list[Fence] = []
        self.limits: dict[str, int | None] = {"1": None, "2": None}
        self.lowered: set[str] = set()
        """Accounts that may still have more on the device than their limit."""

    @rule(account=st.sampled_from("12"), limit=st.sampled_from(LIMITS))
    def limit(self, account: str, limit: int | None) -> None:
        self.limits[account] = limit
        self.residency.limit(account, limit)
        if limit is not None and self.tiers.resident(account) > limit:
            self.lowered.add(account)

    def too_much(self, digests: tuple[str, ...]) -> bool:
        """Whether an account's limit is in the way of these for good."""
        mine = {account: size(key for key in digests if account_of(key) == account) for account in self.limits}
        return any(limit is not None and mine[account] > limit for account, limit in self.limits.items())

    def ask_again(self, ticket: int) -> None:
        digests = self.waiting[ticket]
        try:
            lease = self.residency.try_lease(digests, ticket)
        except AdapterTooLarge:
            assert not fits(digests)
        except AccountTooSmall as error:
            whose, needed, limit = error.account, error.nbytes, error.limit
            assert needed > limit  # which may have been raised since
            assert size(key for key in digests if account_of(key) == whose) >= needed
        except AdapterUnavailable as error:
            blamed = error.digest
            assert blamed in map(digest_of, digests)
        else:
            if lease is None:
                return
            assert fits(digests)
            assert not self.too_much(digests)
            assert lease.digests == digests
            self.leases.append(lease)
        del self.waiting[ticket]

    @rule(digests=sets)
    def ask(self, digests: tuple[str, ...]) -> None:
        self.tickets += 1
        self.waiting[self.tickets] = digests
        self.ask_again(self.tickets)

    @rule(pick=picks)
    def ask_one_again(self, pick: int) -> None:
        if self.waiting:
            self.ask_again(list(self.waiting)[pick % len(self.waiting)])

    @rule()
    def ask_all_again(self) -> None:
        for ticket in list(self.waiting):
            self.ask_again(ticket)

    @rule(pick=picks)
    def cancel(self, pick: int) -> None:
        if self.waiting:
            ticket = list(self.waiting)[pick % len(self.waiting)]
            self.residency.cancel_wait(ticket)
            del self.waiting[ticket]

    @rule(pick=picks, fenced=st.booleans())
    def release(self, pick: int, fenced: bool) -> None:
        if self.leases:
            fence = Fence() if fenced else None
            self.residency.release(self.leases.pop(pick % len(self.leases)), fence)
            if fence is not None:
                self.fences.append(fence)

    @rule()
    def device_moves_on(self) -> None:
        for fence in self.fences:
            fence.passed = True
        self.fences.clear()

    @rule(digests=sets)
    def prefetch(self, digests: tuple[str, ...]) -> None:
        self.residency.prefetch(digests)

    @rule(key=st.sampled_from(KEYS), forget=st.booleans())
    def unload(self, key: str, forget: bool) -> None:
        self.unloads.append(self.residency.unload(key, forget))

    @rule()
    def poll(self) -> None:
        self.residency.poll()

    @rule(pick=picks, fails=st.integers(0, 9))
    def finish_a_job(self, pick: int, fails: int) -> None:
        jobs = self.tiers.loader.jobs
        if jobs:
            index = pick % len(jobs)
            error = AdapterUnavailable(digest_of(jobs[index][1]), "as the test said") if fails == 0 else None
            self.tiers.loader.finish(index, error)

    @rule()
    def time_passes(self) -> None:
        self.tiers.now += 3.0

    @rule()
    def finish_everything(self) -> None:
        self.tiers.loader.finish_all()
        self.residency.poll()

    @invariant()
    def all_is_consistent(self) -> None:
        if hasattr(self, "tiers"):
            self.tiers.check(*self.leases)
            for key in KEYS:
                assert self.residency.state(key) in ("absent", "loading", "host", "device", "failed")
            for account, limit in self.limits.items():
                if limit is None or self.tiers.resident(account) <= limit:
                    self.lowered.discard(account)
                assert limit is None or account in self.lowered or self.tiers.resident(account) <= limit

    def teardown(self) -> None:
        """When leases come back and jobs end, everybody is served and every unload is done."""
        if not hasattr(self, "tiers"):
            return
        self.device_moves_on()
        for _ in range(40 + 4 * len(self.waiting)):
            for lease in self.leases:
                self.residency.release(lease)
            self.leases.clear()
            self.finish_everything()
            self.ask_all_again()
            self.tiers.check(*self.leases)
            if not self.waiting and not self.leases:
                break
        assert not self.waiting
        self.finish_everything()
        assert all(unload.done for unload in self.unloads)
        self.tiers.check()
        for account, limit in self.limits.items():
            assert limit is None or self.tiers.resident(account) <= limit


TestTraffic = Traffic.TestCase
TestTraffic.settings = settings(
    max_examples=120,
    stateful_step_count=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)


@pytest.mark.parametrize("seed", range(12))
def test_nobody_starves_while_others_keep_coming(seed: int) -> None:
    """Endless younger requests, of which some always run: each older one is served after a bounded number of steps,
    however its set overlaps theirs."""
    rng = random.Random(seed)
    tiers = Tiers(
        RANKS,
        arena_bytes=ARENA_BYTES,
        host_bytes=rng.choice([0, 1024, 1 << 13]),
        rows=rng.choice([4, 16]),
        compact_bytes=rng.choice([256, 4096]),
    )
    # Every other time, of two accounts with limits, and in mixes of both.
    limits = {"1": rng.choice([1024, 2048]), "2": rng.choice([1536, 3072])} if seed % 2 else {}
    for account, limit in limits.items():
        tiers.residency.limit(account, limit)
    waiting: dict[int, tuple[tuple[str, ...], int]] = {}
    running: list[tuple[Lease, int]] = []
    served = longest = 0
    for step in range(1500):
        if len(waiting) < 12:
            # Mostly a popular few; now and then one that needs nearly all of the arena.
            names = rng.choices("abcdefg", weights=(8, 8, 6, 4, 2, 1, 1), k=rng.choice([1, 1, 1, 2, 3]))
            names = [f"{name}@{rng.choice('112')}" if limits and rng.random() < 0.7 else name for name in names]
            mine = {account: size(key for key in names if account_of(key) == account) for account in limits}
            if fits(tuple(names)) and all(mine[account] <= limit for account, limit in limits.items()):
                waiting[step] = (tuple(names), step)
        for ticket, (digests, since) in list(waiting.items()):
            lease = tiers.residency.try_lease(digests, ticket)
            if lease is not None:
                served += 1
                longest = max(longest, step - since)
                running.append((lease, step + rng.randrange(1, 12)))
                del waiting[ticket]
        for lease, end in list(running):
            if end <= step:
                tiers.residency.release(lease)
                running.remove((lease, end))
        for _ in range(rng.randrange(4)):
            if tiers.loader.jobs:
                tiers.loader.finish(rng.randrange(len(tiers.loader.jobs)))
        tiers.residency.poll()
        assert all(tiers.resident(account) <= limit for account, limit in limits.items())
        if step % 25 == 0:
            tiers.check(*(lease for lease, _ in running))
        assert all(step - since < 400 for _, since in waiting.values()), "starved"
    assert served > 150

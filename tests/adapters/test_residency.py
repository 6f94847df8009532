"""Residency: states, leases, eviction, fairness, failures; the arena is real, the loader does what the test says."""

from __future__ import annotations

import subprocess
import sys

import pytest

from adapters.errors import AccountTooSmall, AdapterMissing, AdapterTooLarge, AdapterUnavailable
from adapters.residency import TooManyAdapters
from adapters.waiters import WaitQueue
from tests.adapters.scripted_loader import Tiers

KB4 = dict.fromkeys("abcdefgh", 16)
"""Blocks of 1024 bytes."""


def test_residency_needs_no_torch() -> None:
    code = "import sys, adapters.residency; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_block_goes_through_its_states_and_is_leased() -> None:
    tiers = Tiers(KB4, arena_bytes=4096)
    states = [tiers.residency.state("a")]
    assert tiers.residency.try_lease(("a",), "r1") is None
    while tiers.residency.state("a") != "device":
        states.append(tiers.residency.state("a"))
        tiers.loader.finish_all()
        tiers.residency.poll()
        tiers.check()
    assert states[:2] == ["absent", "loading"]
    assert [stage for stage, _ in tiers.loader.log] == ["prepare", "read", "copy"]
    lease = tiers.residency.try_lease(("a",), "r1")
    assert lease is not None
    tiers.check(lease)
    tiers.residency.release(lease)
    with pytest.raises(ValueError, match="not held"):
        tiers.residency.release(lease)
    tiers.check()


def test_a_set_may_name_an_adapter_twice_and_counts_it_once() -> None:
    tiers = Tiers(KB4, arena_bytes=2048)
    lease = tiers.lease("a", "b", "a")
    assert lease.rows[0] == lease.rows[2] != lease.rows[1]
    tiers.check(lease)
    tiers.residency.release(lease)
    tiers.check()


def test_the_empty_set_needs_nothing() -> None:
    tiers = Tiers(KB4, arena_bytes=2048)
    lease = tiers.residency.try_lease(())
    assert lease is not None
    assert lease.rows == ()
    tiers.residency.release(lease)
    tiers.check()


def test_callers_without_tickets_share_a_place() -> None:
    tiers = Tiers(KB4, arena_bytes=4096)
    assert tiers.residency.try_lease(("a",)) is None
    assert tiers.residency.try_lease(("a",)) is None
    assert tiers.residency.stats()["adapter_waiting"] == 1
    tiers.settle()
    leases = [tiers.residency.try_lease(("a",)) for _ in range(2)]
    assert None not in leases
    assert leases[0].rows == leases[1].rows
    tiers.check(*leases)


def test_a_ticket_stands_for_one_set() -> None:
    tiers = Tiers(KB4, arena_bytes=4096)
    tiers.residency.try_lease(("a",), "r1")
    with pytest.raises(ValueError, match="waits for"):
        tiers.residency.try_lease(("b",), "r1")


@pytest.mark.parametrize("names", [("big",), ("a", "b", "c")])
def test_what_can_never_fit_is_refused(names: tuple[str, ...]) -> None:
    tiers = Tiers({**KB4, "big": 48}, arena_bytes=2048)
    assert tiers.residency.try_lease(names, "r1") is None
    tiers.settle()
    with pytest.raises(AdapterTooLarge) as caught:
        tiers.residency.try_lease(names, "r1")
    assert (caught.value.nbytes, caught.value.capacity) == (3072, 2048)
    assert tiers.residency.stats()["adapter_waiting"] == 0
    # Those that fit are served as before.
    tiers.check(tiers.lease("a", "b"))


def test_more_adapters_than_rows_are_refused_at_once() -> None:
    tiers = Tiers(KB4, arena_bytes=1 << 16, rows=2)
    with pytest.raises(TooManyAdapters, match="3 adapters"):
        tiers.residency.try_lease(("a", "b", "c"), "r1")
    tiers.check(tiers.lease("a", "b", "a"))


def test_the_least_recently_used_block_leaves() -> None:
    tiers = Tiers(KB4, arena_bytes=3072)
    for name in "abc":
        tiers.residency.release(tiers.lease(name))
    tiers.residency.release(tiers.lease("a"))
    tiers.check(tiers.lease("d"))
    assert {name: tiers.residency.state(name) for name in "abcd"} == {
        "a": "device",
        "b": "host",
        "c": "device",
        "d": "device",
    }


def test_rows_are_a_limit_like_bytes_and_generations_tell_their_tenants_apart() -> None:
    tiers = Tiers(KB4, arena_bytes=1 << 16, rows=1)
    first = tiers.lease("a")
    tiers.residency.release(first)
    second = tiers.lease("b")
    assert first.rows == second.rows
    assert first.generations != second.generations
    tiers.check(second)


def test_a_block_larger_than_the_slab_is_streamed() -> None:
    tiers = Tiers(KB4, arena_bytes=4096, host_bytes=512)
    lease = tiers.lease("a")
    assert ("stream", "a") in tiers.loader.log
    assert ("read", "a") not in tiers.loader.log
    tiers.check(lease)


def test_a_returning_block_comes_from_host_memory() -> None:
    tiers = Tiers(KB4, arena_bytes=1024)
    for name in "aba":
        lease = tiers.lease(name)
        tiers.check(lease)
        tiers.residency.release(lease)
    assert tiers.loader.log.count(("read", "a")) == 1
    assert tiers.loader.log.count(("copy", "a")) == 2


# ---------------------------------------------------------------- fairness


def test_an_older_waiter_keeps_what_it_has_got() -> None:
    tiers = Tiers(KB4, arena_bytes=2048)
    held = tiers.lease("c")
    assert tiers.residency.try_lease(("a", "b"), "old") is None
    assert tiers.residency.try_lease(("d",), "young") is None
    tiers.settle()
    # One of the older waiter's blocks lies in the half that is free; the younger must not push it out.
    assert tiers.residency.state("a") == "device"
    assert tiers.residency.state("d") == "host"
    assert tiers.residency.try_lease(("d",), "young") is None
    tiers.residency.release(held)
    tiers.settle()
    lease = tiers.residency.try_lease(("a", "b"), "old")
    assert lease is not None
    tiers.check(lease)
    tiers.residency.release(lease)
    tiers.settle()
    assert tiers.residency.try_lease(("d",), "young") is not None


def test_a_younger_waiter_is_served_meanwhile_if_it_takes_nothing() -> None:
    tiers = Tiers(KB4, arena_bytes=4096)
    tiers.residency.release(tiers.lease("c"))
    assert tiers.residency.try_lease(("a", "b"), "old") is None
    lease = tiers.residency.try_lease(("c",), "young")
    assert lease is not None
    tiers.check(lease)


def test_a_popular_adapter_does_not_starve_an_older_waiter() -> None:
    tiers = Tiers(KB4, arena_bytes=2048)
    running = [tiers.lease("h")]
    assert tiers.residency.try_lease(("a", "b"), "old") is None
    tiers.settle()
    # There is always one more request for the resident adapter, before the last one ends.
    for number in range(20):
        younger = tiers.residency.try_lease(("h",), f"young{number}")
        for lease in running:
            tiers.residency.release(lease)
        running = [younger] if younger is not None else []
        tiers.settle()
        tiers.check(*running)
        if tiers.residency.try_lease(("a", "b"), "old") is not None:
            return
    raise AssertionError("starved")


def test_several_popular_adapters_in_turn_do_not_starve_an_older_waiter() -> None:
    tiers = Tiers(KB4, arena_bytes=3072)
    running = {name: tiers.lease(name) for name in "fgh"}
    assert tiers.residency.try_lease(("a", "b"), "old") is None
    tiers.settle()
    # Any one of them fits beside what the older one needs, but not all of them, and each is always running.
    for number in range(30):
        name = "fgh"[number % 3]
        younger = tiers.residency.try_lease((name,), f"young{number}")
        if name in running:
            tiers.residency.release(running.pop(name))
        if younger is not None:
            running[name] = younger
        tiers.settle()
        tiers.check(*running.values())
        if tiers.residency.try_lease(("a", "b"), "old") is not None:
            return
    raise AssertionError("starved")


def test_nothing_is_placed_for_those_behind_one_that_does_not_fit_yet() -> None:
    tiers = Tiers(KB4, arena_bytes=4096)
    assert tiers.residency.try_lease(("a",), "head") is None
    assert tiers.residency.try_lease(("b", "c", "d", "e"), "second") is None
    assert tiers.residency.try_lease(("f",), "third") is None
    tiers.settle()
    assert [tiers.residency.state(name) for name in "abcdef"] == ["device"] + ["host"] * 5
    head = tiers.residency.try_lease(("a",), "head")
    assert head is not None
    tiers.residency.release(head)
    tiers.settle()
    assert tiers.residency.try_lease(("b", "c", "d", "e"), "second") is not None


def test_a_younger_set_does_not_take_rows_from_an_older_one() -> None:
    tiers = Tiers(KB4, arena_bytes=1 << 16, rows=2)
    held = tiers.lease("c")
    assert tiers.residency.try_lease(("a", "b"), "old") is None
    tiers.settle()
    assert tiers.residency.try_lease(("c",), "young") is None
    tiers.residency.release(held)
    tiers.settle()
    assert tiers.residency.try_lease(("a", "b"), "old") is not None


def test_a_cancelled_waiter_no_longer_holds_up_the_others() -> None:
    tiers = Tiers(KB4, arena_bytes=2048)
    held = tiers.lease("c")
    assert tiers.residency.try_lease(("a", "b"), "old") is None
    assert tiers.residency.try_lease(("d",), "young") is None
    tiers.settle()
    tiers.residency.cancel_wait("old")
    tiers.residency.cancel_wait("unknown")
    tiers.settle()
    tiers.check(held, tiers.residency.try_lease(("d",), "young"))


def test_a_fence_keeps_the_block_until_the_device_has_passed_it() -> None:
    class Fence:
        passed = False

        def done(self) -> bool:
            return self.passed

    tiers = Tiers(KB4, arena_bytes=1024)
    fence = Fence()
    tiers.residency.release(tiers.lease("a"), fence)
    dropped = tiers.residency.unload("a")
    assert tiers.residency.try_lease(("b",), "r") is None
    tiers.settle()
    assert tiers.residency.state("a") == "device"
    assert not dropped.done
    fence.passed = True
    tiers.settle()
    assert dropped.done
    assert tiers.residency.try_lease(("b",), "r") is not None
    tiers.check()


def test_compaction_makes_one_hole_of_many_and_leases_go_on() -> None:
    ranks = {**{f"s{i}": 16 for i in range(8)}, "wide": 64}
    tiers = Tiers(ranks, arena_bytes=8192, compact_bytes=1024)
    leases = [tiers.lease(f"s{i}") for i in range(8)]
    for lease in leases[::2]:
        tiers.residency.release(lease)
    kept = leases[1::2]
    wide = tiers.lease("wide")
    tiers.check(wide, *kept)
    assert tiers.residency.stats()["adapter_moved_bytes_total"] > 0


# ---------------------------------------------------------------- failures


@pytest.mark.parametrize("stage", ["prepare", "read", "copy"])
def test_a_failure_reaches_every_waiter_and_is_remembered_for_a_while(stage: str) -> None:
    tiers = Tiers(KB4, arena_bytes=4096, retry_after=5.0)
    assert tiers.residency.try_lease(("a", "b"), "r1") is None
    assert tiers.residency.try_lease(("a",), "r2") is None
    while not any(job[:2] == (stage, "a") for job in tiers.loader.jobs):
        tiers.loader.finish_all()
        tiers.residency.poll()
    tiers.fail("a")
    tiers.check()
    for digests, ticket in ((("a", "b"), "r1"), (("a",), "r2"), (("c", "a"), "r3")):
        with pytest.raises(AdapterUnavailable, match="disk on fire"):
            tiers.residency.try_lease(digests, ticket)
    assert tiers.residency.state("a") == "failed"
    assert tiers.residency.stats()["adapter_waiting"] == 0
    tiers.settle()
    tiers.now = 5.1
    tiers.residency.poll()
    assert tiers.residency.state("a") == "absent"
    tiers.check(tiers.lease("a", "b"))


def test_a_missing_adapter_is_missing() -> None:
    tiers = Tiers(KB4, arena_bytes=4096)
    assert tiers.residency.try_lease(("a",), "r1") is None
    tiers.loader.finish(0, AdapterMissing("a"))
    tiers.residency.poll()
    with pytest.raises(AdapterMissing):
        tiers.residency.try_lease(("a",), "r1")


# ---------------------------------------------------------------- unload and prefetch


def test_unload_waits_for_the_lease_and_forget_deletes_the_file() -> None:
    tiers = Tiers(KB4, arena_bytes=4096)
    lease = tiers.lease("a")
    dropped = tiers.residency.unload("a", forget=True)
    assert not dropped.done
    # Who asks now is served after the drop, from the blobs.
    assert tiers.residency.try_lease(("a",), "later") is None
    tiers.check(lease)
    tiers.residency.release(lease)
    assert tiers.loader.log[-1] == ("discard", "a")
    assert not dropped.done
    tiers.loader.finish_all()
    tiers.residency.poll()
    assert dropped.done
    tiers.settle()
    again = tiers.residency.try_lease(("a",), "later")
    assert again is not None
    assert tiers.loader.log.count(("prepare", "a")) == 2
    tiers.check(again)


def test_unload_of_a_block_on_its_way_drops_it_when_it_arrives() -> None:
    tiers = Tiers(KB4, arena_bytes=4096)
    assert tiers.residency.try_lease(("a",), "r1") is None
    dropped = tiers.residency.unload("a")
    tiers.settle()
    assert dropped.done
    assert ("read", "a") not in tiers.loader.log
    # The waiter brings it back by asking, not before.
    assert tiers.residency.try_lease(("a",), "r1") is None
    tiers.settle()
    assert tiers.residency.try_lease(("a",), "r1") is not None


def test_unload_of_an_absent_block_is_done_at_once() -> None:
    tiers = Tiers(KB4, arena_bytes=4096)
    assert tiers.residency.unload("a").done
    tiers.check()


def test_prefetch_takes_free_room_but_evicts_nothing_from_the_device() -> None:
    tiers = Tiers(KB4, arena_bytes=2048)
    tiers.residency.release(tiers.lease("a"))
    tiers.residency.prefetch(("b", "c"))
    tiers.settle()
    states = {name: tiers.residency.state(name) for name in "abc"}
    assert states["a"] == "device"
    assert sorted((states["b"], states["c"])) == ["device", "host"]
    assert tiers.residency.stats()["adapter_evictions_device_total"] == 0
    tiers.check()


def test_prefetch_into_a_full_slab_drops_what_was_used_least_recently() -> None:
    tiers = Tiers(KB4, arena_bytes=1024, host_bytes=2048)
    for name in "abc":
        tiers.residency.prefetch((name,))
        tiers.settle()
        tiers.check()
    assert {name: tiers.residency.state(name) for name in "abc"} == {"a": "device", "b": "host", "c": "host"}


def test_stats_count_loads_hits_and_evictions() -> None:
    tiers = Tiers(KB4, arena_bytes=1024)
    tiers.residency.release(tiers.lease("a"))
    tiers.residency.release(tiers.lease("a"))
    tiers.residency.release(tiers.lease("b"))
    stats = tiers.residency.stats()
    assert stats["adapter_loads_total"] == 2
    assert stats["adapter_hits_total"] == 1
    assert stats["adapter_misses_total"] == 2
    assert stats["adapter_evictions_device_total"] == 1
    assert (stats["adapters_on_device"], stats["adapters_on_host"]) == (1, 2)
    assert (stats["adapter_device_bytes"], stats["adapter_host_bytes"]) == (1024, 2048)


# ---------------------------------------------------------------- accounts


def states(tiers: Tiers, keys: str) -> dict[str, str]:
    return {key: tiers.residency.state(key) for key in keys.split()}


def test_equal_content_of_two_accounts_is_two_blocks() -> None:
    """What one does with its own shows nothing of the other's, and changes nothing there."""
    tiers = Tiers(KB4, arena_bytes=4096)
    mine = tiers.lease("a@1")
    assert states(tiers, "a@1 a@2 a") == {"a@1": "device", "a@2": "absent", "a": "absent"}
    dropped = tiers.residency.unload("a@2")
    tiers.settle()
    assert dropped.done
    tiers.check(mine)
    theirs = tiers.lease("a@2")
    assert mine.rows != theirs.rows
    tiers.check(mine, theirs)
    tiers.residency.release(theirs)
    assert tiers.residency.unload("a@2").done
    assert states(tiers, "a@1 a@2") == {"a@1": "device", "a@2": "absent"}
    loads = {key: loads for key, (loads, _) in tiers.residency.take_occupancy().items()}
    assert loads == {"a@1": 1, "a@2": 1}
    # One failing is not the other failing.
    tiers.residency.try_lease(("b@1",), "r1")
    tiers.residency.try_lease(("b@2",), "r2")
    tiers.fail("b@1")
    assert states(tiers, "b@1 b@2") == {"b@1": "failed", "b@2": "loading"}
    with pytest.raises(AdapterUnavailable, match="adapter b@1 could"):
        tiers.residency.try_lease(("b@1",), "r1")
    tiers.check(tiers.lease("b@2"))


def test_a_file_is_deleted_when_no_account_has_its_content_any_more() -> None:
    tiers = Tiers(KB4, arena_bytes=8192)
    first, second = tiers.lease("a@1"), tiers.lease("a@2")
    tiers.residency.release(tiers.lease("a"))
    other = tiers.lease("b@1")
    gone = tiers.residency.unload("a", forget=True)
    tiers.settle()
    assert ("discard", "a") not in tiers.loader.log
    tiers.residency.release(first)
    tiers.settle()
    tiers.residency.release(second)
    assert ("discard", "a") in tiers.loader.log
    # Whoever asks for it now gets it from a file that is made anew, not from the one that is being deleted.
    assert tiers.residency.try_lease(("a@3",), "late") is None
    tiers.residency.prefetch(["a@1"])
    tiers.residency.poll()
    tiers.check(other)
    assert [job[:2] for job in tiers.loader.jobs] == [("discard", "a")]
    again = tiers.residency.unload("a@3", forget=True)
    tiers.loader.finish_all()
    tiers.residency.poll()
    assert gone.done
    tiers.settle()
    assert again.done
    tiers.check(tiers.lease("a@3"), other)
    assert tiers.loader.log.count(("discard", "a")) == 1


def test_an_account_keeps_its_limit_whoever_asks() -> None:
    """Leases, hints and copies under way count; others are not concerned."""
    tiers = Tiers(KB4, arena_bytes=8192)
    tiers.residency.limit("1", 2048)
    tiers.residency.prefetch([f"{name}@1" for name in "abcd"])
    tiers.residency.prefetch([f"{name}@2" for name in "abcd"])
    while tiers.residency.poll() or tiers.loader.jobs:
        tiers.loader.finish()
        assert tiers.resident("1") <= 2048
    assert (tiers.resident("1"), tiers.resident("2")) == (2048, 4096)
    # The least recently used of its own leave, nobody else's, though the arena has room.
    held = tiers.lease("c@1", "d@1")
    assert (tiers.resident("1"), tiers.resident("2")) == (2048, 4096)
    # While those are leased, the next one waits, and holds up nobody else.
    assert tiers.residency.try_lease(("a@1",), "r1") is None
    tiers.settle()
    assert tiers.residency.is_held("r1")
    assert tiers.residency.try_lease(("a@1",), "r1") is None
    tiers.check(held, tiers.lease("e@2"), tiers.lease("f"))
    tiers.residency.release(held)
    tiers.check(tiers.lease("a@1"))
    assert tiers.resident("1") == 2048


def test_who_waits_for_an_account_takes_no_room_from_others() -> None:
    """Even the oldest of all: what it needs is not kept free for it before its account has room."""
    tiers = Tiers(KB4, arena_bytes=4096)
    tiers.residency.limit("1", 2048)
    running = tiers.lease("a@1", "b@1")
    assert tiers.residency.try_lease(("c@1", "d@1"), "held") is None
    tiers.settle()
    others = tiers.lease("a@2", "b@2")
    tiers.check(running, others)
    tiers.residency.release(running)
    assert tiers.residency.try_lease(("c@1", "d@1"), "held") is None
    # Now it is the oldest in the arena's queue, too: a younger one waits for it there.
    assert tiers.residency.try_lease(("c@2", "d@2", "e@2"), "younger") is None
    tiers.settle()
    served = tiers.residency.try_lease(("c@1", "d@1"), "held")
    assert served is not None
    tiers.check(served, others)


def test_leased_blocks_of_an_account_do_not_pass_who_waits_there() -> None:
    tiers = Tiers(KB4, arena_bytes=8192)
    tiers.residency.limit("1", 1024)
    running = tiers.lease("a@1")
    assert tiers.residency.try_lease(("b@1",), "older") is None
    tiers.settle()
    assert tiers.residency.try_lease(("a@1",), "younger") is None
    tiers.residency.release(running)
    older = None
    while older is None:
        tiers.settle()
        assert tiers.residency.try_lease(("a@1",), "younger") is None
        older = tiers.residency.try_lease(("b@1",), "older")
    tiers.residency.release(older)
    tiers.check(tiers.lease("a@1"))


def test_what_an_account_can_never_hold_is_refused() -> None:
    tiers = Tiers(KB4, arena_bytes=8192)
    tiers.residency.limit("1", 2048)
    assert tiers.residency.try_lease(("a@1", "b@1", "c@1"), "r1") is None
    tiers.settle()
    with pytest.raises(AccountTooSmall) as caught:
        tiers.residency.try_lease(("a@1", "b@1", "c@1"), "r1")
    assert (caught.value.account, caught.value.nbytes, caught.value.limit) == ("1", 3072, 2048)
    # A mix with others' is asked for what is its own alone.
    tiers.residency.release(tiers.lease("a@1", "b@1", "c@2", "d"))
    # A limit that is lowered refuses who waits already.
    held = tiers.lease("a@1")
    assert tiers.residency.try_lease(("b@1", "c@1"), "r2") is None
    tiers.settle()
    tiers.residency.limit("1", 1024)
    with pytest.raises(AccountTooSmall):
        tiers.residency.try_lease(("b@1", "c@1"), "r2")
    tiers.check(held)


def test_a_lowered_limit_lets_what_is_used_go_on_and_the_rest_leave() -> None:
    tiers = Tiers(KB4, arena_bytes=8192)
    tiers.residency.release(tiers.lease("a@1", "b@1"))
    held = tiers.lease("c@1", "d@1")
    tiers.residency.limit("1", 1024)
    tiers.settle()
    assert tiers.resident("1") == 2048
    tiers.check(held)
    tiers.residency.release(held)
    tiers.settle()
    assert tiers.resident("1") == 1024
    assert tiers.residency.state("d@1") == "device"
    tiers.residency.limit("1", None)
    tiers.residency.release(tiers.lease("a@1", "b@1", "c@1", "d@1"))
    assert tiers.resident("1") == 4096
    tiers.residency.limit("1", 0)
    tiers.settle()
    assert tiers.resident("1") == 0
    tiers.check()


def test_an_account_waits_for_steps_and_copies_that_are_under_way() -> None:
    class Behind:
        passed = False

        def done(self) -> bool:
            return self.passed

    tiers = Tiers(KB4, arena_bytes=8192)
    tiers.residency.limit("1", 1024)
    fence = Behind()
    tiers.residency.release(tiers.lease("a@1"), fence)
    assert tiers.residency.try_lease(("b@1",), "r1") is None
    tiers.settle()
    assert states(tiers, "a@1 b@1") == {"a@1": "device", "b@1": "host"}
    tiers.check(tiers.lease("c@2"))  # nor does that hold up others
    fence.passed = True
    tiers.check(tiers.lease("b@1"))
    assert tiers.resident("1") == 1024


def test_for_one_that_comes_not_all_that_are_there_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"n{number}" for number in range(300)]
    tiers = Tiers(dict.fromkeys(names, 16), arena_bytes=200 << 10, host_bytes=100 << 10, rows=300)
    for name in names[:200]:
        tiers.residency.release(tiers.lease(name))
    asked = 0

    def claim(queue: WaitQueue, digest: str) -> int | None:
        nonlocal asked
        asked += 1
        return of_queue(queue, digest)

    of_queue = WaitQueue.claim
    monkeypatch.setattr(WaitQueue, "claim", claim)
    for name in names[200:]:
        tiers.residency.release(tiers.lease(name))
    tiers.check()
    stats = tiers.residency.stats()
    assert stats["adapter_evictions_device_total"] == 100
    assert stats["adapter_evictions_host_total"] == 200
    assert asked < 100 * 20


def test_the_slab_gives_up_no_more_than_makes_a_hole() -> None:
    tiers = Tiers({**KB4, "long": 40}, arena_bytes=4096, host_bytes=4096)
    for name in "abcd":
        tiers.residency.release(tiers.lease(name))
    tiers.residency.release(tiers.lease("a"))  # of those in the slab b, c and d leave first
    tiers.residency.release(tiers.lease("long"))
    tiers.check()
    assert [*tiers.residency._placement.on_host] == ["a", "long"]

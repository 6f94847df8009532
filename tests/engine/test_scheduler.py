"""Who runs when. Steps are played without a runner: every sampled token is a 1."""

from __future__ import annotations

import itertools

import pytest

from adapters.residency import Residency
from service.engine import admission
from service.engine.budgets import Filling
from service.engine.kv_cache import PagePool
from service.engine.messages import AdapterRef, SamplingParams
from service.engine.request import Batch, Sequence, State
from service.engine.scheduler import Scheduler
from service.engine.simulated import Options, SimulatedArena, SimulatedLoader
from service.store.tables import DEFAULT_TENANT


class Stage:
    """A scheduler with a pool, an arena and a clock that only tick() moves."""

    def __init__(self, pages: int = 100, max_sequences: int = 8, budget: int = 16, load_s: float = 0.0) -> None:
        self.now = 0.0
        options = Options(load_s=load_s, adapter_bytes=256)
        tier = SimulatedArena(64 * 256, 64)
        self.residency = Residency(
            tier, SimulatedLoader(tier, 1 << 20, options, lambda: self.now), clock=lambda: self.now
        )
        self.pool = PagePool(pages, 4)
        self.scheduler = Scheduler(self.pool, self.residency, max_sequences=max_sequences, max_tokens_per_step=budget)
        self._arrivals = itertools.count()
        self._texts = itertools.count(100)

    def sequence(self, prompt: int | list[int], *adapters: str) -> Sequence:
        """`prompt`: its tokens, or their number (then no two prompts are alike)."""
        tokens = [next(self._texts) for _ in range(prompt)] if isinstance(prompt, int) else prompt
        refs = tuple(AdapterRef(each) for each in adapters)
        arrival = next(self._arrivals)
        return Sequence(
            f"r{arrival}", 0, b"", tokens, len(tokens), SamplingParams(), 0, adapters=refs, arrival=float(arrival)
        )

    def add(self, prompt: int | list[int], *adapters: str, leader: Sequence | None = None) -> Sequence:
        seq = self.sequence(prompt, *adapters)
        self.scheduler.add(seq, leader)
        return seq

    def tick(self, seconds: float = 0.0) -> Batch:
        self.now += seconds
        for _ in range(4):  # prepare, read, copy and then some
            self.residency.poll()
        batch = self.scheduler.schedule()
        for item in batch.items:
            item.seq.num_computed += item.count
            self.pool.commit(item.seq)
            if item.samples:
                item.seq.tokens.append(1)
        self.check()
        return batch

    def check(self) -> None:
        self.scheduler.check_integrity()
        self.residency.check_integrity()


def counts(batch: Batch) -> list[tuple[Sequence, int, bool]]:
    return [(item.seq, item.count, item.samples) for item in batch.items]


def test_a_long_prompt_goes_in_chunks_and_samples_with_its_last_token() -> None:
    stage = Stage(budget=16)
    seq = stage.add(40)
    assert counts(stage.tick()) == [(seq, 16, False)]
    assert counts(stage.tick()) == [(seq, 16, False)]
    assert counts(stage.tick()) == [(seq, 8, True)]
    assert counts(stage.tick()) == [(seq, 1, True)]


def test_decoding_comes_first_then_begun_prompts_then_new_ones() -> None:
    stage = Stage(budget=16)
    decoding = stage.add(4)
    stage.tick()
    begun, new = stage.add(18), stage.add(30)
    assert counts(stage.tick()) == [(decoding, 1, True), (begun, 15, False)]
    assert counts(stage.tick()) == [(decoding, 1, True), (begun, 3, True), (new, 12, False)]
    assert counts(stage.tick()) == [(decoding, 1, True), (begun, 1, True), (new, 14, False)]


def test_several_prompts_share_a_step() -> None:
    stage = Stage(budget=16)
    first, second, third = stage.add(5), stage.add(6), stage.add(9)
    assert counts(stage.tick()) == [(first, 5, True), (second, 6, True), (third, 5, False)]


def test_no_more_sequences_run_than_may_or_than_the_budget_has_tokens() -> None:
    stage = Stage(max_sequences=3)
    for _ in range(5):
        stage.add(1)
    assert len(stage.tick().items) == 3
    narrow = Stage(max_sequences=100, budget=4)
    for _ in range(9):
        narrow.add(1)
    for _ in range(3):
        assert narrow.tick().num_tokens == 4


def test_the_newest_is_preempted_and_goes_on_with_all_its_tokens() -> None:
    stage = Stage(pages=6)
    old, new = stage.add(8), stage.add(8)
    batch = stage.tick()
    assert [item.seq for item in batch.items] == [old, new]
    while new.state is State.RUNNING:
        stage.tick()
    assert old.state is State.RUNNING
    assert (new.state, new.pages, new.num_computed, new.preemptions) == (State.WAITING, [], 0, 1)
    assert stage.scheduler.preemptions == 1
    tokens = list(new.tokens)
    assert len(tokens) > new.num_prompt
    while len(old.tokens) < 20:
        assert [item.seq for item in stage.tick().items] == [old]
    stage.scheduler.finish(old)
    (item,) = stage.tick().items
    assert item.seq is new
    assert item.samples
    assert new.tokens == [*tokens, 1]


def test_nobody_comes_in_who_would_be_preempted_at_once() -> None:
    stage = Stage(pages=5)
    first, second = stage.add(8), stage.add(12)
    stage.tick()
    # Two pages and three would do, but the first sequence needs its third for the token it has just drawn.
    assert (first.state, second.state) == (State.RUNNING, State.WAITING)
    stage.scheduler.finish(first)
    stage.tick()
    assert second.state is State.RUNNING


def test_a_large_request_is_not_starved_by_small_ones_behind_it() -> None:
    stage = Stage(pages=10, max_sequences=4)
    small = [stage.add(4) for _ in range(2)]
    stage.tick()
    large = stage.add(36)
    for _ in range(3):
        stage.add(4)
        stage.tick()
    assert large.state is State.WAITING
    assert len(stage.scheduler.running) == 2
    for seq in small:
        stage.scheduler.finish(seq)
    stage.tick()
    assert stage.scheduler.running == [large]


def test_a_request_whose_adapter_is_on_its_way_holds_up_nobody() -> None:
    stage = Stage(load_s=5.0)
    cold, base = stage.add(4, "cold"), stage.add(4)
    assert [item.seq for item in stage.tick().items] == [base]
    assert cold.state is State.FETCHING
    assert stage.scheduler.num_fetching == 1
    assert [item.seq for item in stage.tick(1.0).items] == [base]
    batch = stage.tick(5.0)
    assert [item.seq for item in batch.items] == [base, cold]
    assert len(cold.rows) == 1
    assert stage.scheduler.running == [cold, base], "by arrival, so the later arrival would be preempted first"


def test_many_absent_adapters_hold_up_neither_the_base_nor_a_resident_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission, "MAX_FETCHING", 3)
    stage = Stage(load_s=5.0, max_sequences=100, budget=100)
    warm = stage.add(1, "warm")
    for _ in range(3):
        stage.tick(6.0)
    assert warm.state is State.RUNNING
    cold = [stage.add(1, f"cold{i // 2}") for i in range(12)]
    base, again = stage.add(1), stage.add(1, "warm")
    assert [item.seq for item in stage.tick().items] == [warm, base, again]
    assert stage.scheduler.num_fetching == 3
    for _ in range(6):
        stage.tick(6.0)
    assert all(seq.state is State.RUNNING for seq in cold)


def test_leases_come_and_go_with_running() -> None:
    stage = Stage(pages=6)
    old, new = stage.add(8, "a", "b"), stage.add(8, "b")
    stage.tick()
    assert stage.tick().num_tokens == 16
    assert stage.residency.stats()["adapter_leases"] == 2
    while new.state is State.RUNNING:
        stage.tick()
    assert new.rows == ()
    assert stage.residency.stats()["adapter_leases"] == 1
    stage.scheduler.finish(old)
    stage.scheduler.finish(new)
    assert stage.residency.stats()["adapter_leases"] == 0
    stage.check()


def test_a_request_taken_back_while_it_fetches_leaves_nothing_behind() -> None:
    stage = Stage(load_s=5.0)
    seq = stage.add(4, "cold")
    stage.tick()
    assert stage.residency.stats()["adapter_waiting"] == 1
    stage.scheduler.finish(seq)
    assert stage.residency.stats()["adapter_waiting"] == 0
    assert stage.scheduler.waiting == []
    stage.check()


def test_an_adapter_that_cannot_be_had_is_reported_and_others_go_on() -> None:
    stage = Stage()
    bad, good = stage.add(4, "broken"), stage.add(4)
    stage.tick()
    stage.tick()
    assert [seq for seq, _ in stage.scheduler.failed] == [bad]
    assert "it is broken" in str(stage.scheduler.failed[0][1])
    assert good.num_generated == 2


@pytest.mark.parametrize("prompt", [9, 40])
def test_siblings_wait_for_the_first_and_then_find_its_prompt_in_the_cache(prompt: int) -> None:
    stage = Stage(budget=16)
    tokens = list(range(prompt))
    first = stage.add(list(tokens))
    second = stage.add(list(tokens), leader=first)
    other = stage.add(2)
    while first.num_uncomputed > 1:
        assert second not in [item.seq for item in stage.tick().items]
    batch = stage.tick()
    assert second in [item.seq for item in batch.items]
    assert second.cached_tokens == (prompt - 1) // 4 * 4
    assert other.num_generated > 0


def test_siblings_go_on_when_the_first_is_taken_away() -> None:
    stage = Stage()
    first = stage.add(list(range(40)))
    second = stage.add(list(range(40)), leader=first)
    stage.tick()
    stage.scheduler.finish(first)
    assert [item.seq for item in stage.tick().items] == [second]


def test_limits_under_which_nothing_could_run_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        Stage(budget=0)


@pytest.mark.parametrize(
    ("tenant", "decoding", "allowed"),
    [("", 1, 64), ("", 80, 64), ("", 120, 72), (DEFAULT_TENANT, 160, 96), ("somebody", 160, 64)],
)
def test_the_bound_of_prompts_grows_with_a_crowd_that_decodes(tenant: str, decoding: int, allowed: int) -> None:
    """Unless there are tenants."""
    stage = Stage(pages=400, max_sequences=200, budget=1000)
    for _ in range(decoding):
        seq = stage.sequence(1)
        seq.tenant = tenant
        stage.scheduler.add(seq)
    stage.tick()
    stage.scheduler.max_prefill_tokens_per_step = 64
    stage.add(300)
    assert [count for _, count, _ in counts(stage.tick()) if count > 1] == [allowed]


def filled() -> Stage:
    """One in which 20 sequences of the tenant "default" decode, a step has at most 100 tokens of prompts beside them,
    and a size of 96 tokens is the one to fill."""
    stage = Stage(pages=10_000, max_sequences=64, budget=512)
    stage.scheduler = Scheduler(
        stage.pool,
        stage.residency,
        max_sequences=64,
        max_tokens_per_step=512,
        max_prefill_tokens_per_step=100,
        filling=Filling({64: 1.0, 96: 1.1, 128: 2.0, 160: 2.4}),
    )
    for _ in range(20):
        add(stage, 4)
    assert {count for _, count, _ in counts(stage.tick())} == {4}
    return stage


def add(stage: Stage, prompt: int, tenant: str = "default") -> Sequence:
    seq = stage.sequence(prompt)
    seq.tenant = tenant
    stage.scheduler.add(seq)
    return seq


def prompts(batch: Batch) -> list[tuple[Sequence, int]]:
    return [(item.seq, item.count) for item in batch.items if item.count > 1]


def test_prompts_that_ride_are_cut_where_a_size_is_full() -> None:
    """And what is left of them goes first in the next step, with as much of the next prompt as has room."""
    stage = filled()
    decoding = list(stage.scheduler.running)
    first, second = add(stage, 100), add(stage, 100)
    assert prompts(stage.tick()) == [(first, 76)]
    assert prompts(stage.tick()) == [(first, 24), (second, 52)]
    assert prompts(stage.tick()) == [(second, 48)]
    assert all(len(seq.tokens) == 8 for seq in decoding), "every stream had its token in every step"


def test_a_prompt_that_comes_alone_is_not_cut() -> None:
    """Only where one follows another does the next fill up what is cut."""
    stage = filled()
    assert prompts(stage.tick()) == []
    alone = add(stage, 100)
    assert prompts(stage.tick()) == [(alone, 100)]
    following = add(stage, 100)
    assert prompts(stage.tick()) == [(following, 75)]


def without_hosts(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage.scheduler._guests, "hosts", lambda running: {})


def test_the_rest_of_a_cut_prompt_goes_before_other_tenants_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Charged for nearly all of it, its tenant would wait until all others' prompts were nearly computed too."""
    stage = filled()
    without_hosts(stage, monkeypatch)
    cut, *others = (add(stage, 96, tenant) for tenant in ("a", "b", "c", "d"))
    assert prompts(stage.tick()) == [(cut, 76)]
    done = []
    for _ in range(6):
        batch = stage.tick()
        assert sum(count for _, count in prompts(batch)) <= 76
        done += [item.seq for item in batch.items if item.samples and item.count > 1]
    assert done[:2] == [cut, others[0]]
    assert set(done) == {cut, *others}


def test_a_long_prompt_that_is_cut_has_no_such_right(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = filled()
    without_hosts(stage, monkeypatch)
    long = add(stage, 300, "a")
    assert prompts(stage.tick()) == [(long, 76)]
    other = add(stage, 76, "b")
    assert prompts(stage.tick()) == [(other, 76)], "224 tokens are left, more than half of the bound"


def test_while_guests_are_about_steps_of_tenants_are_not_filled(monkeypatch: pytest.MonkeyPatch) -> None:
    """What they may take is the guests' affair (guests.py)."""
    stage = filled()
    add(stage, 4, "host")
    stage.tick()
    hosts = {name: stage.scheduler.tenants[name] for name in ("default", "host")}
    monkeypatch.setattr(stage.scheduler._guests, "hosts", lambda running: hosts)
    monkeypatch.setattr(stage.scheduler._guests, "in_turn", lambda running, hosts: running)
    guest = add(stage, 100, "guest")
    assert prompts(stage.tick()) == [(guest, 100)]

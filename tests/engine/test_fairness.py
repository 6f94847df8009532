"""Tenants get their shares, whatever the others do. Time is the simulation's own: no clock, no sleep, exact results."""

from __future__ import annotations

import math
import random
from collections.abc import ItemsView, ValuesView

import msgspec
import pytest

from adapters.manifest import Manifest, Module
from benchmarks import fairness
from benchmarks.timeline import H200_8B, Timeline, percentile
from service.engine import admission, guests
from service.engine.budgets import Filling
from service.engine.fairness import MAX_IDLE, Prices, Tenant, Tenants
from service.engine.guests import PAUSE
from service.engine.pace import StepTimes
from service.engine.request import Sequence, State
from service.engine.scheduler import Scheduler
from service.engine.simulated import Options
from tests.engine.test_scheduler import Stage, counts

FREE = Prices(decode=1.0)


class Shared(Stage):
    """test_scheduler's stage with tenants."""

    def of(self, tenant: str, prompt: int, *adapters: str, weight: float = 1.0, priority: int = 0) -> Sequence:
        seq = self.sequence(prompt, *adapters)
        seq.tenant, seq.priority = tenant, priority
        self.scheduler.add(seq, weight=weight)
        return seq

    def served(self, tenant: str) -> float:
        return self.scheduler.tenants[tenant].served

    def soon(self, seq: Sequence) -> bool:
        """Whether it runs within eight steps; they are made until it does."""
        for _ in range(8):
            self.tick(1.0)
            if seq.state is State.RUNNING:
                return True
        return False


# ---------------------------------------------------------------- prices and accounts


def test_prices_follow_the_shapes_of_the_base() -> None:
    modules = (Module("a", "linear", 100, 300), Module("b", "linear", 300, 100), Module("head", "output", 100, 9999))
    prices = Prices.of(Manifest("f", "A", "a", "bfloat16", 9999, 64, modules))
    assert prices.base_bytes == 2 * 60_000
    rank = 3
    adapter = 2 * rank * (400 + 400)
    share = adapter / prices.base_bytes
    assert share == pytest.approx(rank * 800 / 60_000)
    assert prices.step(7, 0, 0) == 7.0
    assert prices.step(7, 0, adapter) == pytest.approx(7.0 * (1 + 20 * share))
    assert prices.step(0, 2, adapter) == pytest.approx(8.0 * (1 + 48 * share))
    assert prices.loading(adapter) == pytest.approx(12_000 * share)
    assert Prices().step(1, 1, 1 << 30) == 5.0


@pytest.mark.parametrize("weight", [0.0, -1.0, math.inf, math.nan])
def test_a_weight_that_is_no_share_is_refused(weight: float) -> None:
    with pytest.raises(ValueError, match="tenant_weight"):
        Tenants(FREE).open("a", weight)
    line = Timeline(Options())
    assert line.ask("a", 3, 3, weight=weight).refused == "too_large"


def test_who_comes_back_is_lifted_to_those_that_wait_and_debts_stay() -> None:
    stage = Shared(max_sequences=1, budget=100)
    first = stage.of("a", 50)
    stage.of("a", 10)
    stage.tick()
    tenants = stage.scheduler.tenants
    assert tenants["a"].counter == 50.0
    stage.of("b", 10)
    assert tenants["b"].counter == 50.0, "what it did not ask for is not saved up"
    stage.scheduler.finish(first)
    stage.tick()
    assert (tenants["a"].counter, tenants["b"].counter) == (60.0, 50.0), "equal counters: first come, first served"
    stage.scheduler.finish(stage.scheduler.running[0])
    stage.tick()
    assert (tenants["a"].counter, tenants["b"].counter) == (60.0, 60.0)
    for seq in [*stage.scheduler.running, *stage.scheduler.waiting]:
        stage.scheduler.finish(seq)
    tenants.charge(tenants["b"], 5.0)
    for name in "bac":
        stage.of(name, 10)
    assert [tenants[name].counter for name in "bac"] == [65.0, 65.0, 65.0], "leaving for a moment does not help"


def test_weights_divide_what_is_charged() -> None:
    stage = Shared(budget=100)
    stage.of("light", 30)
    stage.of("heavy", 30, weight=3.0)
    stage.tick()
    tenants = stage.scheduler.tenants
    assert (tenants["light"].counter, tenants["heavy"].counter) == (30.0, 10.0)
    assert stage.served("light") == stage.served("heavy") == 30.0


def test_accounts_of_tenants_that_are_gone_do_not_pile_up() -> None:
    stage = Shared(budget=100)
    for number in range(3 * MAX_IDLE):
        stage.scheduler.finish(stage.of(f"t{number}", 1))
    assert len(stage.scheduler.tenants) <= 2 * MAX_IDLE
    stage.scheduler.check_integrity()


def test_loading_is_charged_to_who_brings_it_in_once() -> None:
    stage = Shared(budget=100)
    stage.scheduler.tenants.prices = Prices(base_bytes=256 * 100.0)
    stage.of("a", 4, "x")
    stage.tick()
    stage.tick()
    size = stage.residency.size_of("x")
    assert size > 0
    prefill = stage.scheduler.tenants.prices.step(4, 0, size)
    assert stage.served("a") == pytest.approx(stage.scheduler.tenants.prices.loading(size) + prefill)
    stage.of("b", 4, "x")
    stage.tick()
    assert stage.served("b") == pytest.approx(prefill)


def test_what_a_preemption_makes_us_compute_again_is_paid_for_once() -> None:
    stage = Shared(pages=6, budget=100)
    old, new = stage.of("a", 8), stage.of("a", 8)
    while new.preemptions == 0:
        stage.tick()
    stage.scheduler.finish(old)
    stage.tick()
    assert new.state is State.RUNNING
    tokens = sum(seq.num_prompt + 4.0 * max(0, seq.num_generated - 1) for seq in (old, new))
    assert stage.served("a") == tokens


# ---------------------------------------------------------------- the order of a step


def test_priorities_and_then_arrival_within_a_tenant_and_no_priority_over_another() -> None:
    stage = Shared(max_sequences=8, budget=8)
    low, high, late = stage.of("a", 6), stage.of("a", 6, priority=5), stage.of("a", 6, priority=5)
    other = stage.of("b", 6, priority=-9)
    assert counts(stage.tick()) == [(high, 6, True), (other, 2, False)]
    assert counts(stage.tick()) == [(high, 1, True), (other, 4, True), (late, 3, False)]
    stage.tick()
    stage.tick()
    assert [seq.state for seq in (low, high, late, other)] == [State.RUNNING] * 4


def test_a_long_prompt_that_waits_for_pages_lets_what_is_begun_go_on() -> None:
    stage = Shared(pages=10, budget=8)
    begun = stage.of("a", 24)
    stage.tick()
    huge = stage.of("a", 36, priority=9)
    assert counts(stage.tick()) == [(begun, 8, False)]
    assert huge.state is State.WAITING


def test_prompts_that_ride_with_decoding_sequences_have_their_own_bound() -> None:
    stage = Stage(budget=100)
    stage.scheduler.max_prefill_tokens_per_step = 16
    alone = stage.add(40)
    assert counts(stage.tick()) == [(alone, 40, True)], "nobody waits for it"
    second, third = stage.add(20), stage.add(20)
    assert counts(stage.tick()) == [(alone, 1, True), (second, 16, False)]
    assert counts(stage.tick()) == [(alone, 1, True), (second, 4, True), (third, 12, False)]
    stage.scheduler.finish(alone)
    stage.scheduler.finish(second)
    fourth = stage.add(60)
    assert counts(stage.tick()) == [(third, 8, True), (fourth, 60, True)]


# ---------------------------------------------------------------- guests and hosts


def crowd(flood: int) -> tuple[Shared, list[Sequence]]:
    """So many sequences of one tenant decode; bound of 16 prompt tokens. Step times are what StepTimes begins with."""
    stage = Shared(pages=2000, max_sequences=100, budget=1000)
    stage.scheduler = Scheduler(
        stage.pool, stage.residency, max_sequences=100, max_tokens_per_step=1000, max_prefill_tokens_per_step=16
    )
    sequences = [stage.of("flood", 4) for _ in range(flood)]
    while any(seq.num_generated == 0 for seq in sequences):
        stage.tick()
    return stage, sequences


def test_a_flood_sits_out_while_a_guests_prompt_is_computed_but_not_for_long() -> None:
    stage, flood = crowd(20)
    mine = stage.of("mine", 16 * 6)
    charged = stage.served("flood")
    for _ in range(PAUSE):
        assert counts(stage.tick()) == [(mine, 16, False)]
    assert stage.served("flood") == charged, "for what was not done nothing is charged"
    assert counts(stage.tick()) == [*((seq, 1, True) for seq in flood), (mine, 16, False)]
    assert counts(stage.tick()) == [(mine, 16, True)]
    assert {item.seq for item in stage.tick().items} == {*flood, mine}


def test_short_prompts_one_after_the_other_do_not_stop_a_flood() -> None:
    stage, flood = crowd(20)
    for _ in range(40):
        before = [seq.num_generated for seq in flood]
        for number in range(PAUSE + 1):
            seq = stage.of(f"mine{number}", 2)
            stage.tick()
            stage.scheduler.finish(seq)
        assert all(seq.num_generated > count for seq, count in zip(flood, before, strict=True))


def test_who_was_charged_more_than_the_flood_is_no_guest() -> None:
    stage, flood = crowd(20)
    stage.scheduler.finish(stage.of("mine", 4))
    tenants = stage.scheduler.tenants
    tenants.charge(tenants["mine"], 1e6)
    mine = stage.of("mine", 4)
    assert {item.seq for item in stage.tick().items} == {*flood, mine}


def test_a_flood_decodes_in_turns_while_guests_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guests, "LATELY", 40 * 0.02)
    stage, flood = crowd(90)
    assert len(stage.tick().items) == 90, "nobody else is there"
    stage.scheduler.finish(stage.of("mine", 4))
    waited = dict.fromkeys(flood, 0)
    for _ in range(40):
        batch = stage.tick()
        stage.scheduler.took(batch, 0.02)
        assert 90 // 8 < len(batch.items) < 90
        for seq in flood:
            waited[seq] = 0 if any(item.seq is seq for item in batch.items) else waited[seq] + 1
        assert max(waited.values()) < 8
    assert len(stage.tick().items) == 90, "no guest came lately"


def test_a_tenant_alone_has_neither_guests_nor_turns() -> None:
    stage, flood = crowd(90)
    for _ in range(5):
        more = stage.of("flood", 40)
        batch = stage.tick()
        assert {*flood, more} == {item.seq for item in batch.items}
        assert batch.num_tokens == 90 + 16
        stage.scheduler.finish(more)


@pytest.mark.parametrize("truth", [(4.7, 0.0215, 0.041), (5.6, 0.0215, 0.147), (50.0, 3.0, 8.0)])
def test_step_times_are_learned(truth: tuple[float, float, float]) -> None:
    fixed, prompt, sequence = (each / 1e3 for each in truth)
    times = StepTimes(512, 0.012)
    rng = random.Random(1)
    for _ in range(2000):
        tokens, sequences = rng.choice([0, rng.randint(1, 512)]), rng.randint(1, 200)
        seconds = fixed + prompt * tokens + sequence * sequences
        times.observe(tokens, sequences, seconds * (100.0 if rng.random() < 0.002 else rng.uniform(0.98, 1.02)))
    for _ in range(200):  # what comes out of the ordinary is forgotten again
        times.observe(256, 64, fixed + prompt * 256 + sequence * 64)
    assert times.step(256, 64) == pytest.approx(fixed + prompt * 256 + sequence * 64, rel=0.01)
    assert times.step(512, 1) == pytest.approx(fixed + prompt * 512 + sequence, rel=0.15)
    assert times.step(0, 200) == pytest.approx(fixed + sequence * 200, rel=0.15)
    assert times.tokens_in(times.step(300, 0) - times.step(0, 0)) == pytest.approx(300, abs=1)
    assert times.sequences_in(times.step(0, 70) - times.step(0, 0)) == pytest.approx(70, abs=1)


# ---------------------------------------------------------------- room


def test_a_newcomer_gets_a_slot_from_a_flood_at_once_and_gives_none_back() -> None:
    stage = Shared(max_sequences=6, budget=100)
    flood = [stage.of("flood", 4) for _ in range(12)]
    stage.tick()
    assert [seq.state for seq in flood] == [State.RUNNING] * 6 + [State.WAITING] * 6
    mine = [stage.of("mine", 4) for _ in range(12)]
    stage.tick()
    running = stage.scheduler.running
    assert mine[0] in running, "at once"
    for _ in range(3):
        stage.tick()
    assert running == [*flood[:3], *mine[:3]], "to its share, from the newest of the flood"
    before = stage.scheduler.preemptions
    for _ in range(5):
        stage.tick()
    assert stage.scheduler.preemptions == before
    assert running == [*flood[:3], *mine[:3]]
    stage.scheduler.finish(mine[0])
    for seq in mine[3:]:
        stage.scheduler.finish(seq)
    stage.tick()
    assert running == [*flood[:4], *mine[1:3]], "what nobody else wants goes to whoever asks"


def test_of_many_tenants_that_wait_not_each_looks_at_all_that_run() -> None:
    class Looked(dict[str, Tenant]):
        times = 0

        def values(self) -> ValuesView[Tenant]:
            self.times += 1
            return super().values()

        def items(self) -> ItemsView[str, Tenant]:
            self.times += 1
            return super().items()

    stage = Shared(pages=1000, max_sequences=64, budget=256)
    serving = stage.scheduler.tenants.serving = Looked()
    for number in range(200):
        stage.of(f"t{number}", 4)
    stage.tick()
    assert len(stage.scheduler.running) == 64
    serving.times = 0
    stage.scheduler.schedule()
    assert serving.times < 5
    stage.of("t0", 4)
    stage.scheduler.finish(stage.scheduler.running[-1])
    stage.tick()
    assert stage.scheduler.preemptions == 0, "nobody has one to spare"


def test_a_newcomer_gets_pages_from_a_flood() -> None:
    stage = Shared(pages=40, max_sequences=20, budget=200)
    flood = [stage.of("flood", 15) for _ in range(12)]
    stage.tick()
    assert sum(seq.state is State.RUNNING for seq in flood) >= 7
    mine = stage.of("mine", 40)
    stage.tick()
    assert mine.state is State.RUNNING
    assert flood[0].state is State.RUNNING
    too_much = stage.of("mine", 60)
    stage.tick()
    assert too_much.state is State.WAITING, "that would be more than its share"


def test_short_of_pages_the_newest_of_who_holds_most_goes() -> None:
    stage = Shared(pages=16, max_sequences=8, budget=100)
    small = stage.of("small", 4)
    large = [stage.of("large", 12) for _ in range(3)]
    newest = stage.of("small", 4)
    stage.tick()
    while stage.scheduler.preemptions == 0:
        stage.tick()
    assert [seq.preemptions for seq in (small, *large, newest)] == [0, 0, 0, 1, 0]


def test_the_oldest_of_all_is_never_preempted_however_much_it_holds() -> None:
    stage = Shared(pages=16, max_sequences=8, budget=100)
    oldest = stage.of("large", 32)
    others = [stage.of(f"small{i}", 4) for i in range(3)]
    for _ in range(30):
        stage.tick()
        if len(oldest.tokens) >= 60:
            break
    assert oldest.preemptions == 0
    assert len(oldest.tokens) >= 60
    assert sum(seq.preemptions for seq in others) > 0


def test_a_huge_prompt_is_passed_so_often_and_not_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission, "MAX_PASSED", 5)
    stage = Shared(pages=30, max_sequences=8, budget=200)
    long_running = stage.of("small", 20)
    stage.tick()
    huge = stage.of("huge", 100)
    came, running = 0, []
    for _ in range(30):
        running.append(stage.of("small", 4))
        stage.tick()
        for seq in [each for each in running if each.num_generated >= 2]:
            running.remove(seq)
            stage.scheduler.finish(seq)
            came += 1
    assert huge.state is State.WAITING
    assert 1 <= came <= 6
    stage.scheduler.finish(long_running)
    stage.tick()
    assert huge.state is State.RUNNING


def test_a_flood_of_cold_adapters_does_not_stand_before_anothers() -> None:
    stage = Shared(load_s=1.0, max_sequences=100, budget=1000, pages=1000)
    for number in range(50):
        stage.of("flood", 1, f"cold{number}")
    for _ in range(5):
        stage.tick(0.1)
    mine = stage.of("mine", 1, "mine")
    stage.tick(0.0)
    asked = list(stage.scheduler._admission.fetching)
    assert asked[0] is mine or mine.state is State.RUNNING
    for _ in range(4):
        stage.tick(1.0)
    assert mine.state is State.RUNNING


def test_a_cold_adapter_gets_into_an_arena_full_of_hot_ones() -> None:
    # Blocks of one to three times 256 bytes: some 30 fit. Each sequence of the flood has its own, and runs for ever.
    stage = Shared(max_sequences=100, budget=1000, pages=2000)
    flood = [stage.of("flood", 1, f"hot{number}") for number in range(60)]
    for _ in range(20):
        stage.tick(1.0)
    running = sum(seq.state is State.RUNNING for seq in flood)
    assert 20 < running < 60
    mine = stage.of("mine", 1, "cold")
    assert stage.soon(mine)
    assert sum(seq.preemptions for seq in flood) <= 4
    before = stage.scheduler.preemptions
    for _ in range(20):
        stage.tick(1.0)
    assert mine.state is State.RUNNING
    assert stage.scheduler.preemptions == before


def test_hot_adapters_that_several_use_make_room_too() -> None:
    stage = Shared(max_sequences=100, budget=1000, pages=2000)
    flood = [stage.of("flood", 1, f"hot{number % 40}") for number in range(90)]
    for _ in range(20):
        stage.tick(1.0)
    assert 40 < sum(seq.state is State.RUNNING for seq in flood) < 90
    mine = stage.of("mine", 1, "cold")
    assert stage.soon(mine)
    assert sum(seq.preemptions for seq in flood) <= 8


def test_an_adapter_that_was_loaded_serves_all_that_waited_for_it() -> None:
    # Two adapters of which the arena holds one, and steps with room for four prompts.
    line = Timeline(
        msgspec.structs.replace(H200_8B, adapter_bytes=1 << 20, load_s=0.004),
        max_sequences=64,
        max_tokens_per_step=2048,
        max_prefill_tokens_per_step=512,
        arena_bytes=3 << 20,
    )
    line.closed_loop("", 64, 512, 128, adapters=("a", "d"))
    running = []
    line.run(20.0, lambda: running.append(len(line.engine.scheduler.running)))
    line.engine.check_integrity()
    assert line.engine.stats()["adapters_on_device"] == 1
    assert line.engine.stats()["adapter_loads_total"] > 5
    assert max(running) >= 32
    waits = [(asked.times[0] if asked.times else line.now) - asked.sent for asked in line.asked.values()]
    assert max(waits) < 6.0


def test_who_waits_for_its_leader_holds_no_adapter() -> None:
    stage = Shared(load_s=1.0, budget=4)
    leader = stage.add(list(range(20)), "a")
    follower = stage.add(list(range(20)), "a", leader=leader)
    alike = stage.add(4, "a")
    stage.add(4, "b")
    admission = stage.scheduler._admission
    while not admission.leased(leader):
        stage.tick(1.0)
    assert admission.leased(alike)
    assert not admission.leased(follower), "or its leader, once preempted, could wait for ever behind others' adapters"


def test_no_adapter_starves_among_hot_ones_of_its_own_tenant() -> None:
    """Hot adapters are asked for again and again, in a full arena: the cold one's request is older than all that are
    sent after it, and only those before it may be served before it (adapters/waiters.py)."""
    stage = Shared(max_sequences=8, budget=100, pages=400)
    hot = [f"hot{number}" for number in range(64)]
    rng = random.Random(1)
    for _ in range(40):
        stage.of("a", 1, rng.choice(hot))
    for _ in range(10):
        stage.tick(1.0)
    before = len(stage.scheduler.waiting) + len(stage.scheduler.running)
    cold = stage.of("a", 1, "cold")
    ended = 0
    while cold.state is not State.RUNNING:
        stage.of("a", 1, rng.choice(hot))
        stage.tick(1.0)
        for seq in [seq for seq in stage.scheduler.running if seq.num_generated >= 3]:
            stage.scheduler.finish(seq)
            ended += 1
        assert ended <= before + 8, "more ended than were before it and ran beside it"


# ---------------------------------------------------------------- the queue


def test_a_flood_does_not_fill_the_queue_for_others() -> None:
    line = Timeline(Options(step_s=0.01), max_queue=20, max_sequences=2)
    flood = [line.ask("flood", 3, 5) for _ in range(30)]
    assert [asked.refused for asked in flood] == [None] * 20 + ["queue_full"] * 10
    mine = [line.ask("mine", 3, 5) for _ in range(15)]
    assert [asked.refused for asked in mine] == [None] * 10 + ["queue_full"] * 5
    heavy = [line.ask("heavy", 3, 5, weight=2.0) for _ in range(15)]
    assert [asked.refused for asked in heavy] == [None] * 10 + ["queue_full"] * 5
    line.run(3.0)
    assert all(len(asked.times) == 5 for asked in (*flood, *mine, *heavy) if asked.refused is None)


# ---------------------------------------------------------------- what it is all for


@pytest.mark.parametrize("prompt", fairness.PROMPTS)
@pytest.mark.parametrize("max_sequences", fairness.SLOTS)
@pytest.mark.parametrize("machine", fairness.MACHINES)
def test_a_flood_less_than_doubles_anothers_time_to_first_token(machine: str, max_sequences: int, prompt: int) -> None:
    """200 requests in flight, 512 tokens in and 128 out, against one request a second, with two models of an 8B model's
    step times on an H200, and one of an H100 beside which the engine works: not one of 20 takes twice as long as alone.
    The benchmark, here and there the same code, has 120 of each. Beside the H100 the first of all may: it finds steps
    that nobody has kept short yet."""
    options = fairness.MACHINES[machine]
    lone = fairness.alone(options, prompt, max_sequences, 5)
    found = fairness.beside(options, prompt, max_sequences, 20)
    assert max(found.ttft[1:] if options.ahead else found.ttft) < 2.0 * max(lone)
    assert found.ttft[0] < 2.2 * max(lone)
    assert percentile(found.gaps, 0.5) < 0.05, "nor does the flood stand still"


def test_shares_of_saturating_tenants_converge_to_their_weights() -> None:
    weights = {"a": 1.0, "b": 2.0, "c": 5.0}
    line = Timeline(H200_8B, max_sequences=48, max_tokens_per_step=8192, max_prefill_tokens_per_step=512)
    for (name, weight), (prompt, output) in zip(weights.items(), ((100, 60), (300, 20), (40, 90)), strict=True):
        line.closed_loop(name, 100, prompt, output, weight=weight)
    line.run(2.0)
    before = line.served()
    line.run(12.0)
    got = {name: served - before[name] for name, served in line.served().items()}
    for name, weight in weights.items():
        assert got[name] / sum(got.values()) == pytest.approx(weight / 8.0, rel=0.05)


def test_capacity_that_one_leaves_goes_to_the_other() -> None:
    def generated(*loads: tuple[str, int]) -> dict[str, int]:
        line = Timeline(H200_8B, max_sequences=32, max_tokens_per_step=8192, max_prefill_tokens_per_step=512)
        for name, streams in loads:
            line.closed_loop(name, streams, 100, 40)
        line.run(8.0)
        return line.tokens(2.0)

    alone, beside = generated(("a", 64)), generated(("a", 64), ("b", 2))
    assert beside["a"] + beside["b"] > 0.95 * alone["a"]
    assert beside["b"] > 0.04 * alone["a"], "two streams of 32 that never wait for long"


# ---------------------------------------------------------------- anything goes


class Anywhere(Filling):
    """Cuts steps of few sequences too, which are all there are here."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__({})
        self.tokens = lambda decoding, bound: rng.randint(1, bound)  # type: ignore[assignment]


class Books(Shared):
    """What was computed, priced once more from outside."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__(
            pages=rng.randint(14, 30),
            max_sequences=rng.randint(2, 7),
            budget=rng.randint(7, 30),
            load_s=rng.choice([0.0, 1.5]),
        )
        prices = Prices(base_bytes=256 * rng.choice([50.0, 500.0]))
        self.scheduler = Scheduler(
            self.pool,
            self.residency,
            max_sequences=rng.randint(2, 7),
            max_tokens_per_step=rng.randint(7, 30),
            max_prefill_tokens_per_step=rng.choice([0, 0, 3, 6]),
            prices=prices,
            filling=rng.choice([None, Anywhere(rng)]),
        )
        self.expected: dict[str, float] = {}
        self.reached: dict[Sequence, int] = {}

    def tick(self, seconds: float = 1.0) -> None:
        oldest = self.scheduler.running[0] if self.scheduler.running else None
        loads = self.loaded()
        ready = {seq for seq in self.scheduler.running if seq.num_uncomputed == 1}
        batch = super().tick(seconds)
        if oldest is not None and oldest.state is State.WAITING:
            assert self.scheduler.running[0].arrival < oldest.arrival, "only if an older one has come in"
        assert self.loaded() >= loads
        decoding = sum(item.seq in ready for item in batch.items)
        if decoding:
            assert batch.num_tokens - decoding <= self.scheduler.max_prefill_tokens_per_step
        assert batch.num_tokens <= self.scheduler.max_tokens_per_step
        assert len({id(item.seq) for item in batch.items}) == len(batch.items)
        for item in batch.items:
            seq = item.seq
            begin, end = seq.num_computed - item.count, seq.num_computed
            new = range(max(begin, self.reached.get(seq, 0)), end)
            decode = sum(position >= seq.num_prompt for position in new)
            cost = self.scheduler.tenants.prices.step(len(new) - decode, decode, seq.adapter_bytes)
            self.expected[seq.tenant] = self.expected.get(seq.tenant, 0.0) + cost
            self.reached[seq] = max(end, self.reached.get(seq, 0))

    def loaded(self) -> float:
        return self.residency.stats()["adapter_loads_total"]


@pytest.mark.parametrize("seed", range(60))
def test_whatever_happens_books_agree_and_everybody_gets_to_the_end(seed: int) -> None:
    """Random tenants, weights, priorities, adapters, aborts over few pages, slots and a small arena. The stage checks
    the integrity of everything after each step."""
    rng = random.Random(seed)
    stage = Books(rng)
    open_: list[Sequence] = []
    names = "abc"[: rng.randint(1, 3)]
    limit = min(24, (stage.pool.num_pages - 1) * 4)

    def end_those_that_are_done() -> None:
        for seq in [seq for seq in open_ if seq.num_generated >= 6]:
            open_.remove(seq)
            stage.scheduler.finish(seq)

    for _ in range(120):
        if rng.random() < 0.5:
            adapters = rng.sample("uvwxyz", rng.choice([0, 0, 1, 1, 2]))
            open_.append(
                stage.of(
                    rng.choice(names), rng.randint(1, limit - 6), *adapters,
                    weight=rng.choice([0.5, 1.0, 3.0]), priority=rng.choice([0, 0, 0, 2]),
                )
            )  # fmt: skip
        if open_ and rng.random() < 0.05:
            seq = open_.pop(rng.randrange(len(open_)))
            stage.scheduler.finish(seq)
            stage.check()
        stage.tick()
        end_those_that_are_done()
    for _ in range(60 * (len(open_) + 1)):
        if not open_:
            break
        stage.tick()
        end_those_that_are_done()
    assert not open_, "they do not end"
    prices = stage.scheduler.tenants.prices
    for tenant in stage.scheduler.tenants:
        loading = tenant.served - stage.expected.get(tenant.name, 0.0)
        assert loading >= -1e-6
        blocks = loading / (prices.load * 256 / prices.base_bytes)
        assert blocks == pytest.approx(round(blocks), abs=1e-6), "the rest is whole blocks that were loaded"
    assert stage.pool.num_used == 0


def test_the_random_plays_reach_what_they_are_for() -> None:
    preempted = passed = 0
    for seed in range(20):
        rng = random.Random(seed)
        stage = Books(rng)
        for turn in range(60):
            if turn % 2:
                stage.of(rng.choice("abc"), rng.choice([1, 2, 3, 30]), priority=rng.choice([0, 1]))
            stage.tick()
            for seq in [seq for seq in stage.scheduler.running if seq.num_generated >= 6]:
                stage.scheduler.finish(seq)
            passed = max(passed, max((seq.passed for seq in stage.scheduler.waiting), default=0))
        preempted += stage.scheduler.preemptions
    assert preempted > 20
    assert passed > 0

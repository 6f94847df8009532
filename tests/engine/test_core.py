"""The engine over the simulated runner: whatever happens around a request, its tokens are those it gets alone."""

from __future__ import annotations

import random
from collections import defaultdict
from typing import Any

import pytest

from adapters.keys import account_of
from service.engine.config import EngineConfig
from service.engine.core import MAX_FAILED_STEPS, Collect, is_out_of_memory
from service.engine.errors import EngineBroken
from service.engine.messages import (
    Abort,
    AdapterRef,
    Delta,
    FromEngine,
    LoadAdapter,
    Outputs,
    Prefetch,
    QueryResidency,
    Refused,
    Reply,
    SamplingParams,
    Submit,
    TakeOccupancy,
    TokenLogprob,
    UnloadAdapter,
)
from service.engine.request import Batch, Sampled
from service.engine.simulated import Options, build_engine, expected

VOCABULARY = 50
GREEDY = SamplingParams(temperature=0.0, max_tokens=8)
ME = b"me"
NAMES = "abcdefgh"
OWNERS = ("", "@1", "@1", "@2")


class Bench:
    """An engine, what it has said, and a clock that advances by one second a step."""

    def __init__(self, options: Options | None = None, **config: Any) -> None:
        self.now = 0.0
        self.deltas: dict[tuple[bytes, str, int], list[Delta]] = defaultdict(list)
        self.refused: dict[str, Refused] = {}
        self.replies: dict[str, Reply] = {}
        self.messages: list[tuple[bytes, FromEngine]] = []
        self.limits: dict[str, int | None] = {}
        """Of owners of adapters, from now on, with every message that may carry them."""
        settings: dict[str, Any] = {
            "model_path": "",
            "blobs_dir": "",
            "cache_dir": "",
            "socket": "",
            "page_size": 4,
        } | config
        options = options or Options(vocab_size=VOCABULARY, adapter_bytes=256)
        self.engine, _ = build_engine(EngineConfig(**settings), self._hear, options, clock=lambda: self.now)

    def _hear(self, client: bytes, message: FromEngine) -> None:
        self.messages.append((client, message))
        if isinstance(message, Outputs):
            for delta in message.deltas:
                self.deltas[client, delta.request_id, delta.index].append(delta)
        elif isinstance(message, Refused):
            self.refused[message.request_id] = message
        elif isinstance(message, Reply):
            self.replies[message.call_id] = message

    def submit(self, name: str, *prompts: list[int], client: bytes = ME, **more: Any) -> Submit:
        request = Submit(request_id=name, prompts=list(prompts), **({"sampling": GREEDY} | more))
        self.engine.handle(client, request)
        return request

    def resident(self, owner: str) -> int:
        """Bytes of an owner's adapters on the device, copies under way included, counted one by one."""
        blocks = self.engine.residency._placement.blocks.values()
        return sum(each.region.nbytes for each in blocks if each.region and account_of(each.digest) == owner)

    def step(self, times: int = 1) -> None:
        for _ in range(times):
            self.now += 1.0
            self.engine.step()
            self.engine.check_integrity()

    def finish(self, limit: int = 5000) -> None:
        while self.engine.busy:
            self.step()
            limit -= 1
            assert limit > 0, "the requests do not end"
        self.idle()

    def idle(self) -> None:
        """Nothing is held once nothing runs."""
        stats = self.engine.stats()
        assert stats["kv_pages_used"] == 0
        assert stats["adapter_leases"] == stats["adapter_waiting"] == 0

    def tokens(self, name: str, index: int = 0, client: bytes = ME) -> list[int]:
        return [token for delta in self.deltas[client, name, index] for token in delta.token_ids]

    def reason(self, name: str, index: int = 0) -> str | None:
        return self.deltas[ME, name, index][-1].finish_reason

    def check(self, request: Submit, index: int, client: bytes = ME) -> None:
        prompt, choice = request.prompts[index // request.n], index % request.n
        alone = expected(prompt, request.sampling, request.adapters, choice=choice, vocab_size=VOCABULARY)
        assert self.tokens(request.request_id, index, client) == alone


def test_a_request_streams_its_tokens_and_ends_with_length() -> None:
    bench = Bench()
    request = bench.submit("r", [1, 2, 3])
    bench.finish()
    bench.check(request, 0)
    assert [delta.finish_reason for delta in bench.deltas[ME, "r", 0]] == [None] * 7 + ["length"]


def test_a_stop_token_is_delivered_and_ends_the_sequence_but_not_before_min_tokens() -> None:
    bench = Bench()
    stream = expected([1, 2, 3], GREEDY, vocab_size=VOCABULARY)
    stop = (stream[3],)
    bench.submit("r", [1, 2, 3], sampling=SamplingParams(temperature=0.0, max_tokens=8, stop_token_ids=stop))
    late = SamplingParams(temperature=0.0, max_tokens=400, min_tokens=6, stop_token_ids=stop)
    request = bench.submit("late", [1, 2, 3], sampling=late)
    bench.finish()
    assert bench.tokens("r") == stream[: stream.index(stop[0]) + 1]
    assert bench.reason("r") == "stop"
    bench.check(request, 0)
    assert stop[0] not in bench.tokens("late")[:6]
    assert bench.reason("late") == "stop"


def test_logprobs_of_prompt_and_output_come_once_each() -> None:
    bench = Bench(kv_pages=8, max_tokens_per_step=3)
    params = SamplingParams(temperature=0.0, max_tokens=4, logprobs=0, prompt_logprobs=0)
    prompt = list(range(10))
    bench.submit("warm", prompt)
    bench.finish()
    bench.submit("r", prompt, sampling=params)
    bench.finish()
    first, *others = bench.deltas[ME, "r", 0]
    assert first.prompt_logprobs is not None
    assert first.prompt_logprobs[0] is None
    assert [entry.token_id for entry in first.prompt_logprobs[1:] if entry] == prompt[1:]
    assert first.cached_tokens == 0
    assert all(delta.prompt_logprobs is None for delta in others)
    entries = [entry for delta in (first, *others) for entry in delta.logprobs or ()]
    assert all(isinstance(entry, TokenLogprob) for entry in entries)
    assert [entry.token_id for entry in entries] == bench.tokens("r")


def test_nothing_need_be_generated() -> None:
    bench = Bench()
    params = SamplingParams(max_tokens=0, prompt_logprobs=0, stop_token_ids=(3,))
    bench.submit("r", [1, 2, 3], sampling=params)
    bench.finish()
    (delta,) = bench.deltas[ME, "r", 0]
    assert (delta.token_ids, delta.finish_reason) == ([], "length")
    assert len(delta.prompt_logprobs or ()) == 3


def test_seeds_repeat_and_choices_differ() -> None:
    bench = Bench()
    params = SamplingParams(temperature=1.0, seed=7, max_tokens=8)
    first = bench.submit("a", [1, 2, 3], [4, 5], n=3, sampling=params)
    bench.finish()
    bench.submit("b", [1, 2, 3], [4, 5], n=3, sampling=params)
    bench.finish()
    for index in range(6):
        bench.check(first, index)
        assert bench.tokens("a", index) == bench.tokens("b", index)
    assert len({tuple(bench.tokens("a", index)) for index in range(3)}) == 3
    unseeded = SamplingParams(temperature=1.0, max_tokens=8)
    bench.submit("c", [1, 2, 3], n=2, sampling=unseeded)
    bench.finish()
    assert bench.tokens("c", 0) != bench.tokens("c", 1)


def test_choices_of_one_prompt_compute_it_once() -> None:
    bench = Bench()
    bench.submit("r", list(range(41)), n=4)
    bench.finish()
    assert [bench.deltas[ME, "r", index][0].cached_tokens for index in range(4)] == [0, 40, 40, 40]
    assert bench.engine.stats()["prefill_tokens_total"] == 41 + 3
    assert bench.engine.stats()["prefix_hit_tokens_total"] == 120


def test_what_a_step_asks_of_the_loader_is_begun_in_that_step() -> None:
    """An engine that has nothing to compute sleeps afterwards."""
    bench = Bench(max_resident_adapters=1)
    loader = bench.engine.residency._loader
    for name in ("a", "b"):
        bench.engine.handle(ME, LoadAdapter(name, name))
        while name not in bench.replies:
            bench.step()
    assert bench.engine.residency.state("a") == "host"
    request = bench.submit("r", [1, 2], adapters=(AdapterRef("a"),))
    bench.step()
    assert [completion.stage for _, completion, _ in loader._jobs] == ["copy"]
    bench.finish()
    bench.check(request, 0)


def test_one_message_per_api_process_and_step() -> None:
    bench = Bench()
    bench.submit("a", [1], [2], n=2)
    bench.submit("b", [3])
    bench.submit("a", [4], client=b"other")
    bench.messages.clear()
    bench.step()
    assert sorted(client for client, _ in bench.messages) == [ME, b"other"]


def test_two_api_processes_may_use_the_same_request_id() -> None:
    bench = Bench()
    mine, theirs = bench.submit("r", [1]), bench.submit("r", [2], client=b"other")
    bench.step(2)
    bench.engine.handle(b"other", Abort("r"))
    bench.finish()
    bench.check(mine, 0)
    assert bench.tokens("r", client=b"other") == expected([2], theirs.sampling, vocab_size=VOCABULARY)[:2]


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ({"prompts": [[1] * 60]}, "max_positions|at most 64"),
        ({"prompts": [[1] * 41]}, "KV cache holds 48"),
        ({"prompts": [[]]}, "no tokens"),
        ({"prompts": []}, "0 sequences"),
        ({"prompts": [[VOCABULARY]]}, "outside 0..49"),
        ({"prompts": [[-1]]}, "outside 0..49"),
        ({"prompts": [[1]], "n": 11}, "11 sequences"),
        ({"prompts": [[1]], "adapters": (AdapterRef("a"),) * 9}, "9 adapters"),
        ({"prompts": [[1]], "sampling": SamplingParams(stop_token_ids=(50,))}, "stop_token_ids"),
        ({"prompts": [[1]], "sampling": SamplingParams(logit_bias={-1: 1.0})}, "logit_bias"),
    ],
)
def test_what_can_never_be_served_is_refused_at_once(more: dict[str, Any], text: str) -> None:
    bench = Bench(kv_pages=12, max_positions=64, max_queue=10)
    fields: dict[str, Any] = {"request_id": "r", "sampling": GREEDY} | more
    bench.engine.handle(ME, Submit(**fields))
    assert bench.refused["r"].code == "too_large"
    assert any(part in bench.refused["r"].message for part in text.split("|"))
    assert not bench.engine.busy


def test_what_just_fits_is_served() -> None:
    bench = Bench(kv_pages=12, max_positions=48)
    request = bench.submit("r", [1] * 40)
    bench.finish()
    bench.check(request, 0)


def test_a_full_queue_refuses_and_says_when_to_come_back() -> None:
    bench = Bench(max_sequences=1, max_queue=3)
    bench.submit("a", [1], n=3)
    bench.step()
    bench.submit("b", [1], n=2)
    assert bench.refused["b"].code == "queue_full"
    assert 1.0 <= (bench.refused["b"].retry_after_s or 0.0) <= 60.0
    bench.submit("c", [1])
    assert "c" not in bench.refused
    bench.finish()
    assert "a" not in bench.refused


def test_draining_refuses_new_requests_and_finishes_old_ones() -> None:
    bench = Bench()
    request = bench.submit("a", [1])
    bench.engine.draining = True
    bench.submit("b", [1])
    bench.finish()
    assert bench.refused["b"].code == "shutting_down"
    bench.check(request, 0)


def test_an_abort_frees_everything_between_two_steps() -> None:
    bench = Bench()
    bench.submit("r", [1] * 20, n=2, adapters=(AdapterRef("a"),))
    bench.step(6)
    assert bench.engine.stats()["kv_pages_used"] > 0
    bench.engine.handle(ME, Abort("r", 0))
    bench.engine.check_integrity()
    bench.step()
    assert bench.engine.stats()["sequences_running"] == 1
    bench.engine.handle(ME, Abort("r"))
    bench.engine.handle(ME, Abort("r"))
    bench.engine.handle(ME, Abort("never heard of"))
    assert not bench.engine.busy
    bench.idle()
    assert not bench.refused


def test_a_client_that_is_gone_leaves_nothing() -> None:
    bench = Bench(Options(vocab_size=VOCABULARY, load_s=1000.0))
    bench.submit("a", [1] * 9)
    bench.submit("b", [1] * 9, adapters=(AdapterRef("cold"),))
    bench.engine.handle(ME, LoadAdapter("call", "cold"))
    kept = bench.submit("a", [2], client=b"other")
    bench.step(2)
    bench.engine.drop_client(ME)
    bench.finish()
    bench.check(kept, 0, b"other")
    assert "call" not in bench.replies


def test_an_adapter_that_fails_fails_its_request_alone() -> None:
    bench = Bench()
    bench.submit("bad", [1], [2], n=2, adapters=(AdapterRef("good"), AdapterRef("broken")))
    good = bench.submit("good", [1], adapters=(AdapterRef("good"),))
    bench.finish()
    assert bench.refused["bad"].code == "adapter_failed"
    assert "broken" in bench.refused["bad"].message
    bench.check(good, 0)


def test_a_failing_step_fails_its_requests_and_the_engine_goes_on() -> None:
    bench = Bench(Options(vocab_size=VOCABULARY, poison=13))
    bench.submit("poisoned", [1, 13, 2])
    bench.submit("beside", [1, 2])
    bench.step()
    assert {name: each.code for name, each in bench.refused.items()} == dict.fromkeys(
        ["poisoned", "beside"], "engine_error"
    )
    bench.idle()
    after = bench.submit("after", [1, 2], sampling=SamplingParams(temperature=0.0, max_tokens=3))
    bench.finish()
    bench.check(after, 0)


@pytest.mark.parametrize(
    "options",
    [
        Options(vocab_size=VOCABULARY, out_of_memory=13),
        Options(vocab_size=VOCABULARY, out_of_memory_every=5),
    ],
    ids=["host", "device"],
)
def test_a_step_out_of_memory_fails_its_requests_and_the_engine_goes_on(options: Options) -> None:
    bench = Bench(options, max_sequences=2)
    short = SamplingParams(temperature=0.0, max_tokens=4)
    before = bench.submit("before", [1, 2], sampling=short)
    bench.finish()
    bench.submit("full", [1, 13, 2])
    bench.submit("beside", [1, 2])
    waiting = bench.submit("waiting", [1, 2], sampling=short)
    bench.step()
    assert {name: each.code for name, each in bench.refused.items()} == dict.fromkeys(
        ["full", "beside"], "out_of_memory"
    )
    bench.finish()
    bench.check(before, 0)
    bench.check(waiting, 0)
    assert bench.engine.stats()["out_of_memory_total"] == 1


def test_what_counts_as_out_of_memory() -> None:
    class OutOfMemoryError(RuntimeError):  # as torch has it
        pass

    class OfOneDeviceError(OutOfMemoryError):
        pass

    texts = (
        "[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory",
        "CUDA error: out of memory",
    )
    for error in (MemoryError(), OfOneDeviceError("x"), *map(RuntimeError, texts)):
        assert is_out_of_memory(error)
    for other in (RuntimeError("shape mismatch"), ValueError("out of memory")):
        assert not is_out_of_memory(other)


def test_failures_far_apart_are_forgiven() -> None:
    bench = Bench(Options(vocab_size=VOCABULARY, poison=13))
    for i in range(2 * MAX_FAILED_STEPS):
        bench.submit(f"bad{i}", [13])
        bench.step()
        good = bench.submit(f"good{i}", [1])
        bench.finish()
        bench.check(good, 0)


def test_an_engine_that_keeps_failing_gives_up() -> None:
    bench = Bench(Options(vocab_size=VOCABULARY, poison=13))
    for i in range(MAX_FAILED_STEPS - 1):
        bench.submit(f"r{i}", [13])
        bench.step()
    bench.submit("last", [13])
    with pytest.raises(EngineBroken, match="3 steps"):
        bench.step()


def test_results_that_do_not_match_the_batch_are_an_error() -> None:
    bench = Bench()

    class Forgetful:
        ahead = False

        def launch(self, batch: Batch) -> Collect:
            return lambda: [None for _ in batch.items]

    bench.engine.runner = Forgetful()
    bench.submit("r", [1])
    bench.step()
    assert bench.refused["r"].code == "engine_error"


def test_a_request_id_in_use_ends_both_requests() -> None:
    bench = Bench()
    bench.submit("r", [1])
    bench.step()
    bench.submit("r", [2])
    assert bench.refused["r"].code == "engine_error"
    assert not bench.engine.busy


def test_control_calls() -> None:
    bench = Bench(Options(vocab_size=VOCABULARY, load_s=3.0))
    engine = bench.engine
    assert not engine.expecting
    engine.handle(ME, Prefetch(("hinted",)))
    assert engine.expecting
    engine.handle(ME, LoadAdapter("load", "a"))
    engine.handle(ME, LoadAdapter("fail", "broken"))
    bench.step(2)
    assert set(bench.replies) == {"fail"}
    assert "it is broken" in (bench.replies["fail"].error or "")
    bench.step(5)
    assert bench.replies["load"].error is None
    engine.handle(ME, QueryResidency("query", ("a", "b", "hinted")))
    assert bench.replies["query"].value == {"a": "device", "b": "absent", "hinted": "device"}
    assert not engine.expecting

    bench.submit("r", [1], adapters=(AdapterRef("a"),))
    bench.step(2)
    engine.handle(ME, UnloadAdapter("unload", "a", forget=True))
    bench.step()
    assert "unload" not in bench.replies, "a running request keeps its adapter"
    bench.finish()
    bench.step(3)
    assert bench.replies["unload"].error is None
    engine.handle(ME, QueryResidency("again", ("a",)))
    assert bench.replies["again"].value == {"a": "absent"}
    bench.idle()


def test_a_deleted_adapter_is_forgotten_once_no_accepted_request_names_it() -> None:
    bench = Bench(Options(vocab_size=VOCABULARY, load_s=3.0, adapter_bytes=256), max_sequences=1)
    bench.submit("first", [1])
    fetching = bench.submit("fetching", [1], adapters=(AdapterRef("gone"), AdapterRef("kept")))
    waiting = bench.submit("waiting", [2], adapters=(AdapterRef("gone", 0.5),))
    bench.engine.handle(ME, UnloadAdapter("forget", "gone", forget=True))
    bench.engine.handle(ME, UnloadAdapter("other", "never used", forget=True))
    while bench.engine.busy:
        assert "forget" not in bench.replies
        bench.step()
    assert "other" in bench.replies
    bench.check(fetching, 0)
    bench.check(waiting, 0)
    bench.step(2)
    assert bench.replies["forget"].error is None
    assert bench.engine.residency.state("gone") == "absent"
    bench.submit("late", [1], adapters=(AdapterRef("slow"),))
    bench.engine.handle(ME, UnloadAdapter("dropped", "slow", forget=True))
    bench.engine.drop_client(ME)
    bench.step(5)
    assert "dropped" not in bench.replies
    assert not bench.engine.expecting


def test_a_deleted_content_is_forgotten_once_no_request_names_it_for_any_owner() -> None:
    bench = Bench(Options(vocab_size=VOCABULARY, load_s=3.0, adapter_bytes=256), max_sequences=1)
    first = bench.submit("first", [1], adapters=(AdapterRef("gone@1"),))
    second = bench.submit("second", [2], adapters=(AdapterRef("gone@2"),))
    bench.engine.handle(ME, UnloadAdapter("forget", "gone", forget=True))
    while bench.engine.busy:
        assert "forget" not in bench.replies
        bench.step()
    bench.check(first, 0)
    bench.check(second, 0)
    bench.step(2)
    assert bench.replies["forget"].error is None
    assert {bench.engine.residency.state(key) for key in ("gone", "gone@1", "gone@2")} == {"absent"}


def test_equal_content_of_two_owners_is_not_one_adapter() -> None:
    """Neither its place on the device, nor its prefixes, nor who is charged for loading it."""
    bench = Bench()
    for owner in "12":
        request = bench.submit(f"r{owner}", [3] * 9, adapters=(AdapterRef(f"same@{owner}"),))
        bench.finish()
        bench.check(request, 0)
        assert bench.deltas[ME, f"r{owner}", 0][0].cached_tokens == 0
    bench.engine.handle(ME, UnloadAdapter("u", "same@2"))
    bench.engine.handle(ME, QueryResidency("q", ("same", "same@1", "same@2")))
    assert bench.replies["q"].value == {"same": "absent", "same@1": "device", "same@2": "absent"}
    bench.engine.handle(ME, TakeOccupancy("o"))
    assert {key: loads for key, (loads, _) in (bench.replies["o"].value or {}).items()} == {"same@1": 1, "same@2": 1}


def test_an_owner_s_adapters_take_turns_under_its_limit_and_hold_up_nobody() -> None:
    """Five requests at once for five adapters where one fits; beside them somebody else's, which does not wait."""
    bench = Bench(max_sequences=16)
    names = ("v", "w", "x", "y", "z")
    limits: dict[str, int | None] = {"1": 768}
    mine = [
        bench.submit(name, [4], adapters=(AdapterRef(f"{name}@1"),), tenant="1", resident_limits=limits)
        for name in names
    ]
    bench.engine.handle(ME, LoadAdapter("load", "u@1", limits))
    bench.engine.handle(ME, Prefetch(("t@1", "s@1"), limits))
    other = bench.submit("other", [5], adapters=(AdapterRef("v@2"), AdapterRef("w@2")), tenant="2")
    before = None
    while bench.engine.busy or bench.engine.expecting:
        bench.step()
        assert bench.resident("1") <= 768
        if before is None and bench.tokens("other"):
            before = sum(bool(bench.tokens(name)) for name in names)
    assert before is not None
    assert before <= 2, "somebody else's request waited for turns that are not its own"
    for request in (*mine, other):
        bench.check(request, 0)
    assert bench.replies["load"].error is None
    bench.idle()


def test_what_an_owner_may_not_have_is_refused_by_name() -> None:
    bench = Bench()
    bench.submit("mix", [1], adapters=(AdapterRef("a@1"), AdapterRef("b@1")), resident_limits={"1": 256})
    bench.engine.handle(ME, LoadAdapter("load", "g@1", {"1": 255}))
    bench.step(5)
    assert bench.refused["mix"].code == "resident_limit"
    assert (bench.replies["load"].code, bench.replies["load"].value) == ("resident_limit", None)
    again = bench.submit("b", [1], adapters=(AdapterRef("b@1"),), resident_limits={"1": None})
    bench.finish()
    bench.check(again, 0)


def test_what_can_never_be_loaded_is_refused_as_such() -> None:
    bench = Bench(arena_bytes=255)
    bench.submit("large", [1], adapters=(AdapterRef("a@1"),))
    bench.engine.handle(ME, LoadAdapter("load", "b@1", {}))
    bench.step(5)
    assert bench.refused["large"].code == "too_large"
    assert bench.replies["load"].code == "too_large"
    assert "needs" in (bench.replies["load"].error or "")
    bench.idle()


def test_stats_add_up() -> None:
    bench = Bench(kv_pages=32)
    bench.submit("r", [1] * 9, sampling=SamplingParams(temperature=0.0, max_tokens=5))
    bench.finish()
    stats = bench.engine.stats()
    assert stats["generated_tokens_total"] == 5
    assert stats["prefill_tokens_total"] == 9
    assert stats["steps_total"] == 5
    assert stats["steps_late_total"] == 0, "nothing is launched ahead"
    assert stats["kv_pages"] == 32
    assert stats["kv_pages_cached"] == 3
    assert all(isinstance(value, int | float) for value in stats.values())


AHEAD = Options(vocab_size=VOCABULARY, adapter_bytes=256, ahead=True)


def test_a_step_is_launched_before_the_one_before_it_is_collected() -> None:
    bench = Bench(AHEAD)
    events: list[str] = []
    launch, numbers = bench.engine.runner.launch, iter(range(100))

    def noted(batch: Batch) -> Collect:
        number, collect = next(numbers), launch(batch)
        events.append(f"launch {number}")

        def collected() -> list[Sampled | None]:
            events.append(f"collect {number}")
            return collect()

        return collected

    bench.engine.runner.launch = noted  # type: ignore[method-assign]
    request = bench.submit("r", [1, 2, 3], sampling=SamplingParams(temperature=0.0, max_tokens=3))
    bench.step()
    assert bench.engine.step_started is not None, "a hang of the step in flight must be seen"
    assert bench.tokens("r") == []
    bench.finish()
    bench.check(request, 0)
    # Nothing is launched after the third: whatever it draws is the last token.
    assert events == ["launch 0", "launch 1", "collect 0", "launch 2", "collect 1", "collect 2"]
    assert bench.engine.step_started is None
    assert not bench.engine.step()


def test_who_stops_is_computed_once_more_for_nothing() -> None:
    bench = Bench(AHEAD)
    stream = expected([1, 2, 3], GREEDY, vocab_size=VOCABULARY)
    bench.submit("r", [1, 2, 3], sampling=SamplingParams(temperature=0.0, max_tokens=8, stop_token_ids=(stream[3],)))
    other = bench.submit("other", [4, 5], sampling=SamplingParams(temperature=0.0, max_tokens=20))
    bench.finish()
    known = stream[: stream.index(stream[3]) + 1]
    assert bench.tokens("r") == known
    assert bench.reason("r") == "stop"
    bench.check(other, 0)
    assert sum(bench.engine.runner.batches) == 5 + len(known) + 19


def test_a_launch_that_fails_costs_nothing_of_the_step_in_flight() -> None:
    bench = Bench(Options(vocab_size=VOCABULARY, adapter_bytes=256, ahead=True, out_of_memory=13))
    one = SamplingParams(temperature=0.0, max_tokens=1)
    last = bench.submit("last", [1, 2], sampling=one)
    bench.submit("runs", [3, 4], sampling=SamplingParams(temperature=0.0, max_tokens=9))
    bench.step()
    bench.submit("bad", [13])
    bench.step()
    bench.check(last, 0)
    assert "last" not in bench.refused
    assert bench.refused["bad"].code == bench.refused["runs"].code == "out_of_memory"
    assert len(bench.tokens("runs")) == 1
    good = bench.submit("good", [5])
    bench.finish()
    bench.check(good, 0)


def test_a_step_that_fails_when_it_is_collected_takes_its_requests_and_nobody_else() -> None:
    bench = Bench(Options(vocab_size=VOCABULARY, adapter_bytes=256, ahead=True, poison=13))
    bench.submit("bad", [13, 13])
    bench.step()
    good = bench.submit("good", [5, 6])
    bench.step()
    assert bench.refused["bad"].code == "engine_error"
    bench.finish()
    bench.check(good, 0)
    assert "good" not in bench.refused


def test_a_device_that_keeps_failing_gives_up() -> None:
    bench = Bench(Options(vocab_size=VOCABULARY, adapter_bytes=256, ahead=True, poison=13))
    for i in range(MAX_FAILED_STEPS):  # the first of them is launched, and not collected yet
        bench.submit(f"r{i}", [13])
        bench.step()
    with pytest.raises(EngineBroken, match="3 steps"):
        bench.step()


@pytest.mark.parametrize("budget", [None, 8], ids=["whole", "in parts"])
@pytest.mark.parametrize("ahead", [False, True])
def test_what_a_prompt_without_finite_logits_computed_is_found_by_nobody(ahead: bool, budget: int | None) -> None:
    """Of one in parts that is known at its end; what was written before may be no numbers even for tokens before the
    one that overflows (0 times NaN is NaN, under a mask too)."""
    bench = Bench(Options(vocab_size=VOCABULARY, ahead=ahead), max_tokens_per_step=budget)
    launch, broken = bench.engine.runner.launch, [True]

    def not_finite_once(batch: Batch) -> Collect:
        collect = launch(batch)

        def told() -> list[Sampled | None]:
            found = collect()
            if broken and any(result is not None for result in found):
                broken.clear()
                return [None if result is None else Sampled(-1) for result in found]
            return found

        return told

    bench.engine.runner.launch = not_finite_once  # type: ignore[method-assign]
    prompt = list(range(20))
    bench.submit("first", prompt)
    bench.finish()
    assert bench.refused["first"].code == "not_finite"
    for name, found in (("again", 0), ("third", 16)):
        request = bench.submit(name, prompt)
        bench.finish()
        bench.check(request, 0)
        assert bench.deltas[ME, name, 0][0].cached_tokens == found


def test_choices_find_their_prompt_in_the_cache_when_steps_are_prepared_ahead() -> None:
    bench = Bench(AHEAD)
    request = bench.submit("r", list(range(1, 22)), n=3)
    bench.finish()
    for index in range(3):
        bench.check(request, index)
    assert [bench.deltas[ME, "r", index][0].cached_tokens for index in range(3)] == [0, 20, 20]


def _random_request(rng: random.Random, bench: Bench, name: str, client: bytes) -> Submit:
    shared = [i % VOCABULARY for i in range(7, 60)]
    prompts = []
    for _ in range(rng.choice([1, 1, 2])):
        prompt = shared[: rng.randint(0, 24)] + [rng.randrange(VOCABULARY) for _ in range(rng.randint(1, 6))]
        prompts.append(prompt)
    names = rng.sample(NAMES, rng.choice([0, 1, 1, 2, 3])) if rng.random() < 0.95 else ["broken"]
    adapters = tuple(AdapterRef(each + rng.choice(OWNERS), rng.choice([1.0, 0.5])) for each in names)
    sampling = SamplingParams(
        temperature=rng.choice([0.0, 1.0]),
        seed=rng.randrange(100),
        max_tokens=rng.choice([0, 5, 15, 30]),
        min_tokens=rng.choice([0, 0, 3]),
        stop_token_ids=tuple(rng.sample(range(VOCABULARY), rng.choice([0, 2]))),
        prompt_logprobs=rng.choice([None, None, 0]),
    )
    return bench.submit(
        name, *prompts, client=client, n=rng.choice([1, 1, 3]), adapters=adapters, sampling=sampling,
        salt=rng.choice(["", "tenant"]), resident_limits=bench.limits,
    )  # fmt: skip


def _play(seed: int, ahead: bool) -> Bench:
    rng = random.Random(seed)
    bench = Bench(
        Options(vocab_size=VOCABULARY, adapter_bytes=256, load_s=rng.choice([0.0, 2.0]), ahead=ahead),
        kv_pages=rng.randint(12, 20),
        max_sequences=rng.randint(2, 6),
        max_tokens_per_step=rng.randint(6, 20),
        max_queue=20,
        arena_bytes=256 * rng.randint(9, 12),
        max_resident_adapters=rng.randint(3, 6),
        prefix_caching=rng.random() < 0.8,
    )
    # Blocks have 256 to 768 bytes.
    bench.limits = {"1": rng.choice([None, 512, 1024, 1536]), "2": rng.choice([None, 768])}
    requests: list[tuple[bytes, Submit]] = []
    aborted: set[tuple[bytes, str, int]] = set()
    clients = [ME, b"other"]
    for turn in range(150):
        action = rng.random()
        client = rng.choice(clients)
        if action < 0.3:
            requests.append((client, _random_request(rng, bench, f"r{turn}", client)))
        elif action < 0.36 and requests:
            owner, request = rng.choice(requests)
            index = rng.choice([None, rng.randrange(len(request.prompts) * request.n)])
            bench.engine.handle(owner, Abort(request.request_id, index))
            for each in range(len(request.prompts) * request.n):
                if index in (None, each):
                    aborted.add((owner, request.request_id, each))
        elif action < 0.40:
            key = rng.choice(NAMES) + rng.choice(OWNERS)
            bench.engine.handle(client, UnloadAdapter(f"u{turn}", key, rng.random() < 0.5))
        elif action < 0.44:
            key = rng.choice(NAMES) + rng.choice(OWNERS)
            bench.engine.handle(client, LoadAdapter(f"l{turn}", key, bench.limits))
        elif action < 0.48:
            bench.engine.handle(client, Prefetch((rng.choice(NAMES) + rng.choice(OWNERS),), bench.limits))
        bench.engine.check_integrity()
        bench.step()
        assert all(limit is None or bench.resident(owner) <= limit for owner, limit in bench.limits.items())
    bench.finish()
    for owner, request in requests:
        name = request.request_id
        if name in bench.refused:
            assert bench.refused[name].code in ("queue_full", "too_large", "adapter_failed", "resident_limit")
            if bench.refused[name].code == "adapter_failed":
                assert any(ref.digest.startswith("broken") for ref in request.adapters)
            if bench.refused[name].code == "resident_limit":
                assert any(bench.limits.get(account_of(ref.digest)) for ref in request.adapters)
            continue
        for index in range(len(request.prompts) * request.n):
            tokens = bench.tokens(name, index, owner)
            alone = expected(
                request.prompts[index // request.n], request.sampling, request.adapters,
                choice=index % request.n, vocab_size=VOCABULARY,
            )  # fmt: skip
            if (owner, name, index) in aborted:
                assert tokens == alone[: len(tokens)]
                continue
            assert tokens == alone
            deltas = bench.deltas[owner, name, index]
            assert [delta.finish_reason is not None for delta in deltas] == [False] * (len(deltas) - 1) + [True]
            prompt = request.prompts[index // request.n]
            if request.sampling.prompt_logprobs is not None:
                told = deltas[0].prompt_logprobs or []
                assert [entry and entry.token_id for entry in told] == [None, *prompt[1:]]
    return bench


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("seed", range(40))
def test_whatever_happens_every_stream_is_what_it_is_alone(seed: int, ahead: bool) -> None:
    """Random submits, aborts, loads and unloads over few pages and a small arena; books checked after each."""
    _play(seed, ahead)


@pytest.mark.parametrize("ahead", [False, True])
def test_the_random_plays_reach_what_they_are_for(ahead: bool) -> None:
    """Otherwise the test above could pass for lack of trouble."""
    totals: dict[str, float] = defaultdict(float)
    codes = set()
    for seed in range(5):
        bench = _play(seed, ahead)
        codes |= {refused.code for refused in bench.refused.values()}
        for name, value in bench.engine.stats().items():
            totals[name] += value
    assert "resident_limit" in codes
    for trouble in ("preemptions", "prefix_hit_tokens", "adapter_evictions_device", "adapter_misses"):
        assert totals[f"{trouble}_total"] > 0, trouble


def test_giving_everything_up_says_so_to_everyone() -> None:
    bench = Bench()
    bench.submit("a", [1], adapters=(AdapterRef("a"),))
    bench.step()
    bench.engine.refuse_all("shutting_down", "bye")
    assert bench.refused["a"].code == "shutting_down"
    bench.idle()

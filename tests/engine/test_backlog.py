"""Prompts that are left over for long get longer steps. The real scheduler in simulated time."""

from __future__ import annotations

import itertools

import msgspec
import pytest

from benchmarks.timeline import Timeline, percentile
from service.engine import budgets
from service.engine.budgets import LASTING, LASTING_S, Backlog, Left, riding_tokens
from service.engine.simulated import Options
from tests.engine.test_scheduler import Stage

H200 = Options(step_s=0.005, token_s=0.0000205, decode_token_s=0.00005, ahead=True)
"""An 8B model: 32 sequences with contexts of 2,048 tokens and 480 tokens of prompts took 16.4 ms."""
BOUND = 512


def driven(line: Timeline, streams: int, prompt: int, output: int, requests: int, tenants: int = 1) -> float:
    """A closed loop until all requests have ended; its seconds."""
    left, begin = requests, line.now

    def send(tenant: str) -> None:
        nonlocal left
        if left:
            left -= 1
            line.ask(tenant, prompt, output, done=lambda: send(tenant))

    for stream in range(streams):
        send("" if tenants == 1 else f"t{stream % tenants}")
    while line.engine.busy:
        line.run(line.now + 0.05)
    return line.now - begin


def figures(line: Timeline) -> tuple[float, float]:
    """Median of the wait for a first token, and the 99th percentile between two tokens, in s."""
    gaps = [b - a for asked in line.asked.values() for a, b in itertools.pairwise(asked.times)]
    return percentile([asked.ttft for asked in line.asked.values()], 0.5), percentile(gaps, 0.99)


def timeline(*, ahead: bool = True, **config: int) -> Timeline:
    settings = {"max_sequences": 256, "max_tokens_per_step": 2048, "max_prefill_tokens_per_step": BOUND} | config
    return Timeline(msgspec.structs.replace(H200, ahead=ahead), **settings)


@pytest.mark.parametrize("ahead", [True, False])
def test_long_prompts_with_short_answers_do_not_wait_for_one_another(ahead: bool) -> None:
    line = timeline(ahead=ahead)
    seconds = driven(line, streams=32, prompt=2048, output=64, requests=512)
    waited, gap = figures(line)
    assert 512 * 64 / seconds > 1080, "tokens/s; under the bound 973"
    assert waited < 0.15, "under the bound 1.06 s"
    stats = line.engine.stats()
    assert stats["steps_total"] / 2 < stats["steps_backlog_total"] < stats["steps_total"]
    assert gap < 0.0275, "the bound's 12 ms of prompts twice"


@pytest.mark.parametrize(
    ("streams", "prompt", "output", "gap"),
    [
        (64, 512, 128, 0.019),
        (32, 512, 128, 0.019),
        (128, 512, 128, 0.025),
        (16, 4096, 128, 0.017),
        (16, 2048, 64, 0.017),
    ],
)
def test_a_burst_is_over_before_and_who_is_alone_in_a_step_stands_behind_nobody(
    streams: int, prompt: int, output: int, gap: float
) -> None:
    line = timeline()
    driven(line, streams=streams, prompt=prompt, output=output, requests=8 * streams)
    assert figures(line)[1] < gap
    assert line.engine.stats()["steps_backlog_total"] == 0


def test_one_prompt_however_long_is_no_backlog() -> None:
    line = timeline(max_positions=200_000)
    for _ in range(8):
        line.ask("", 100, 1000)
    line.run(line.now + 0.5)
    line.ask("", 130_000, 1)
    while line.engine.busy:
        line.run(line.now + 0.05)
    assert figures(line)[1] < 0.017


def test_other_tenants_keep_steps_short() -> None:
    line = timeline()
    driven(line, streams=32, prompt=2048, output=64, requests=96, tenants=2)
    assert figures(line)[1] < 0.017


def test_who_comes_to_an_idle_engine_finds_short_steps() -> None:
    line = timeline()
    driven(line, streams=32, prompt=2048, output=64, requests=128)
    assert figures(line)[1] > 0.02
    line.asked.clear()
    driven(line, streams=8, prompt=2048, output=64, requests=16)
    assert figures(line)[1] < 0.017


def test_it_begins_by_those_behind_and_ends_by_room() -> None:
    backlog = Backlog()
    for left, seconds, lasts in (
        (Left.REST, 100.0, False),
        (Left.OTHERS, LASTING_S - 0.1, False),
        (Left.ROOM, 0.1, False),
        (Left.OTHERS, 0.1, False),
        (Left.REST, 0.1, False),
        (Left.OTHERS, 0.3, True),
        (Left.REST, 100.0, True),
        (Left.ROOM, LASTING_S - 0.1, True),
        (Left.REST, 0.1, True),
        (Left.ROOM, 0.3, False),
        (Left.REST, 100.0, False),
        (Left.OTHERS, LASTING_S, True),
    ):
        backlog.took(seconds, left)
        assert backlog.lasts == lasts


def test_what_a_step_leaves() -> None:
    """Where nobody decodes there is no bound; who takes all of it leaves others behind only if there are any."""
    stage = Stage(max_sequences=4, budget=200)
    stage.scheduler.max_prefill_tokens_per_step = 16
    stage.add(16)
    assert stage.tick().left is None
    assert stage.tick().left is Left.ROOM
    stage.add(16)
    assert stage.tick().left is Left.REST
    stage.add(40)
    assert stage.tick().left is Left.REST
    stage.add(40)
    assert [stage.tick().left for _ in range(5)] == [Left.OTHERS, Left.REST, Left.REST, Left.REST, Left.ROOM]
    stage.add(40)
    assert stage.tick().left is Left.ROOM, "it waits for a slot, not for room in a step"


def test_a_scheduler_without_keeps_its_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CPU, and where an operator has set one."""
    line = timeline()
    monkeypatch.setattr(line.engine.scheduler, "_backlog", None)
    driven(line, streams=32, prompt=2048, output=64, requests=256)
    assert figures(line)[1] < 0.017


@pytest.mark.parametrize("bound", [64, 128, 512, 4096])
def test_its_steps_fill_a_size_and_are_no_shorter_than_those_of_a_crowd(bound: int) -> None:
    for decoding in range(1, 600):
        prompts = riding_tokens(decoding, bound, lasts=True)
        assert prompts >= riding_tokens(decoding, bound)
        assert prompts == bound or decoding + prompts in budgets.STEP_SIZES
        if decoding <= 2 * budgets.CROWD:
            assert prompts <= LASTING * bound

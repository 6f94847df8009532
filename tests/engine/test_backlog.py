"""Prompts that are left over for long get longer steps. The real scheduler in simulated time."""

from __future__ import annotations

import itertools

import pytest

from benchmarks.timeline import Timeline, percentile
from service.engine import budgets
from service.engine.budgets import LASTING, LASTING_S, Backlog, riding_tokens
from service.engine.simulated import Options

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


def timeline(**settings: int) -> Timeline:
    return Timeline(H200, max_sequences=256, max_tokens_per_step=2048, max_prefill_tokens_per_step=BOUND, **settings)


def test_long_prompts_with_short_answers_do_not_wait_for_one_another() -> None:
    line = timeline()
    seconds = driven(line, streams=32, prompt=2048, output=64, requests=256)
    waited, gap = figures(line)
    assert 256 * 64 / seconds > 1050, "tokens/s; under the bound 960"
    assert waited < 0.15, "under the bound 1.06 s"
    assert gap < 0.0275, "the bound's 12 ms of prompts twice"


@pytest.mark.parametrize(("streams", "prompt", "output"), [(64, 512, 128), (32, 512, 128)])
def test_a_burst_at_the_start_is_over_before(streams: int, prompt: int, output: int) -> None:
    line = timeline()
    driven(line, streams=streams, prompt=prompt, output=output, requests=4 * streams)
    assert figures(line)[1] < 0.019


def test_other_tenants_keep_steps_short() -> None:
    line = timeline()
    driven(line, streams=32, prompt=2048, output=64, requests=96, tenants=2)
    assert figures(line)[1] < 0.017


def test_who_comes_to_an_idle_engine_finds_short_steps() -> None:
    line = timeline()
    driven(line, streams=32, prompt=2048, output=64, requests=96)
    assert figures(line)[1] > 0.02
    line.asked.clear()
    driven(line, streams=8, prompt=2048, output=64, requests=16)
    assert figures(line)[1] < 0.017


def test_it_lasts_until_as_much_time_had_room_for_all() -> None:
    backlog = Backlog()
    for left_over, seconds, lasts in (
        (True, LASTING_S - 0.1, False),
        (False, 0.1, False),
        (True, 0.1, False),
        (True, 0.2, True),
        (True, 100.0, True),
        (False, LASTING_S - 0.1, True),
        (True, 0.1, True),
        (False, 0.3, False),
        (True, LASTING_S - 0.1, False),
        (False, 50.0, False),
        (True, LASTING_S, True),
    ):
        backlog.took(seconds, left_over=left_over)
        assert backlog.lasts == lasts


@pytest.mark.parametrize("bound", [64, 128, 512, 4096])
def test_its_steps_fill_a_size_and_are_no_shorter_than_those_of_a_crowd(bound: int) -> None:
    for decoding in range(1, 600):
        prompts = riding_tokens(decoding, bound, lasts=True)
        assert prompts >= riding_tokens(decoding, bound)
        assert prompts == bound or decoding + prompts in budgets.STEP_SIZES
        if decoding <= 2 * budgets.CROWD:
            assert prompts <= LASTING * bound

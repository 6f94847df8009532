"""The next step is launched late enough for who comes meanwhile, and early enough for the device. Simulated time."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.timeline import Timeline
from service.engine.patience import MARGIN_S, Patience, kind_of
from service.engine.request import Batch
from service.engine.simulated import Options

STEP_S = 0.02
DEVICE = Options(step_s=STEP_S, ahead=True)
KIND = kind_of(0, 3)
SOON = 10.0
"""Seconds that a step waits for its end: it is known."""


def test_what_is_not_known_is_not_waited_for() -> None:
    patience = Patience()
    assert patience.until(KIND, 5.0) == pytest.approx(5.0 - MARGIN_S)
    patience.took(KIND, 0.03, SOON)
    assert patience.until(KIND, 5.0) < 5.0, "one step says little"
    patience.took(KIND, 0.02, SOON)
    assert patience.until(kind_of(65, 3), 5.0) < 5.0, "another kind"
    assert patience.until(KIND, 5.0) == pytest.approx(5.02 - MARGIN_S)


def test_steps_are_of_one_kind_up_to_64_prompt_tokens_and_16_sequences() -> None:
    assert kind_of(1, 1) == kind_of(64, 16)
    assert len({kind_of(0, 1), kind_of(1, 1), kind_of(65, 1), kind_of(1, 17)}) == 4


def test_the_least_is_believed_at_once_and_more_only_slowly() -> None:
    patience = Patience()
    for seconds in (0.02, 0.03, 0.01):
        patience.took(KIND, seconds, SOON)
    assert patience.until(KIND, 0.0) == pytest.approx(0.01 - MARGIN_S)
    patience.took(KIND, 9.0, SOON)
    assert patience.until(KIND, 0.0) < 0.0104
    for _ in range(200):
        patience.took(KIND, 0.02, SOON)
    assert 0.0198 < patience.until(KIND, 0.0) + MARGIN_S < 0.02


def test_behind_a_late_launch_nothing_is_believed_until_a_step_has_shown_its_time() -> None:
    patience = Patience()
    for _ in range(2):
        patience.took(KIND, 0.05, SOON)
    patience.took(KIND, 0.049, 0.0)
    assert patience.late == 1
    assert patience.until(KIND, 0.0) < 0.0
    patience.took(KIND, 0.02, SOON)
    assert patience.until(KIND, 0.0) == pytest.approx(0.02 - MARGIN_S), "it had been believed too long"
    patience.took(KIND, 0.03, 0.0)
    patience.took(KIND, 0.04, SOON)
    assert patience.until(KIND, 0.0) == pytest.approx(0.02 - MARGIN_S), "the host had been slow: what was known stays"


def test_a_host_slower_than_the_device_never_waits() -> None:
    patience = Patience()
    for _ in range(30):
        patience.took(KIND, 0.05, 0.0)
        assert patience.until(KIND, 0.0) < 0.0
    assert patience.late == 30


def test_the_host_gets_more_than_it_needs_on_average() -> None:
    patience = Patience()
    for _ in range(2):
        patience.took(KIND, 0.02, SOON)
    for _ in range(100):
        for seconds in (0.001, 0.002):
            patience.launched(seconds)
    assert 0.0025 < patience.lead - MARGIN_S < 0.004
    for _ in range(500):
        patience.launched(0.001)
    assert patience.lead - MARGIN_S == pytest.approx(0.001, abs=1e-5)
    for _ in range(100):
        patience.launched(0.03)
    assert patience.until(KIND, 0.0) < 0.0, "a host slower than the device launches at once"


def _busy() -> Timeline:
    """Two streams, and steps that are known."""
    line = Timeline(DEVICE)
    for _ in range(2):
        line.ask("", 8, 2000)
    line.run(10 * STEP_S)
    return line


@pytest.mark.parametrize("part", [0.05, 0.3, 0.6, 0.9])
def test_who_comes_while_the_device_is_busy_is_in_the_next_step(part: float) -> None:
    line = _busy()
    for number in range(20):  # every newcomer makes one step of another kind
        begin = 1.0 + number * 10 * STEP_S
        line.open_loop("", iter([begin + part * STEP_S]), 8, 2)
    line.run(6.0)
    newcomers = [asked for asked in line.asked.values() if len(asked.times) == 2]
    assert len(newcomers) == 20
    # The rest of the step in progress, and one's own.
    assert all(asked.ttft <= (2.0 - part) * STEP_S + 2 * MARGIN_S for asked in newcomers[1:])


def test_a_first_step_that_takes_much_longer_holds_up_nobody_but_those_in_it() -> None:
    """As the first one after a start does. Believed, it would make every lone request wait for so long: its next
    step is launched when the device is thought to be nearly through, and its token collected then."""
    line = Timeline(DEVICE)
    runner: Any = line.engine.runner
    seconds, more = runner.seconds, iter([5 * STEP_S])

    def slow_at_first(batch: Batch) -> float:
        return float(seconds(batch) + (next(more, 0.0) if batch.num_tokens > 1 else 0.0))

    runner.seconds = slow_at_first
    line.closed_loop("", 1, 512, 8)
    line.run(60 * STEP_S)
    first, *others = [asked.ttft for asked in line.of("")]
    assert first == pytest.approx(6 * STEP_S)
    assert len(others) >= 5
    assert others == [pytest.approx(STEP_S)] * len(others)


def test_waiting_costs_the_device_nothing() -> None:
    line = _busy()
    before, at = sum(line.tokens().values()), line.now
    line.run(at + 100 * STEP_S)
    assert sum(line.tokens().values()) - before >= 2 * 99


def test_an_engine_that_has_launched_nothing_has_nothing_to_wait_for() -> None:
    line = _busy()
    assert line.engine.spare > STEP_S / 2
    line.engine.drop_client(b"")
    while line.engine.step():
        pass
    assert line.engine.spare == 0.0
    without = Timeline(Options(step_s=STEP_S))
    without.ask("", 8, 20)
    without.run(5 * STEP_S)
    assert without.engine.spare == 0.0, "who computes steps itself launches when it can"

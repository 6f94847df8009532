"""The counters of tenants' limits: exact over processes, whatever becomes of them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from service.limits import PROCESSES, RETRY_RUNNING_S, WINDOW, Limiter, LimitReached, TenantLimits

from .inference_helpers import ROOT

PROCESS = """
import sys
from pathlib import Path
from service.limits import Limiter, LimitReached, TenantLimits
limiter = Limiter(Path(sys.argv[1]), lambda: 1000.5)
limits = TenantLimits(**{sys.argv[2]: int(sys.argv[3])})
print("here", flush=True)
sys.stdin.readline()
admitted = 0
for _ in range(int(sys.argv[4])):
    try:
        limiter.begin(7, limits)
    except LimitReached:
        continue
    try:
        limiter.reserve(7, limits, sequences=1, tokens=5)
        admitted += 1
    except LimitReached:
        limiter.end(7, 0)
print(admitted, flush=True)
sys.stdin.readline()
"""


class Clock:
    now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def limiter(tmp_path: Path, clock: Clock) -> Iterator[Limiter]:
    made = Limiter(tmp_path / "limits", clock)
    yield made
    made.close()


def process(folder: Path, limit: str, value: int, tries: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PROCESS, str(folder), limit, str(value), str(tries)]
    started = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert started.stdout is not None
    assert started.stdout.readline() == "here\n"
    return started


def go(started: subprocess.Popen[str]) -> None:
    assert started.stdin is not None
    started.stdin.write("\n")
    started.stdin.flush()


def admitted(started: subprocess.Popen[str]) -> int:
    assert started.stdout is not None
    return int(started.stdout.readline())


@pytest.mark.parametrize(
    ("limit", "value"), [("requests_per_minute", 1000), ("concurrent_requests", 1000), ("tokens_per_minute", 5004)]
)
def test_processes_together_admit_exactly_the_limit(tmp_path: Path, limit: str, value: int) -> None:
    processes = [process(tmp_path, limit, value, 600) for _ in range(3)]
    try:
        for each in processes:
            go(each)
        counts = [admitted(each) for each in processes]
        assert sum(counts) == 1000
    finally:
        for each in processes:
            each.kill()
            each.wait()
            each.stdin and each.stdin.close()
            each.stdout and each.stdout.close()


def test_what_a_killed_process_was_running_is_taken_off(tmp_path: Path) -> None:
    limits = TenantLimits(concurrent_requests=5)
    limiter = Limiter(tmp_path, lambda: 1000.5)
    dead = process(tmp_path, "concurrent_requests", 5, 9)
    go(dead)
    assert admitted(dead) == 5
    with pytest.raises(LimitReached) as caught:
        limiter.begin(7, limits)
    assert (caught.value.name, caught.value.limit) == ("concurrent_requests", 5)
    assert limiter.used(7)["tokens_reserved"] == 25
    dead.kill()
    dead.wait()
    for _ in range(5):
        limiter.begin(7, limits)
    with pytest.raises(LimitReached):
        limiter.begin(7, limits)
    assert limiter.used(7)["tokens_reserved"] == 0
    # And a process that takes the dead one's place begins with nothing.
    limiter.close()
    again = Limiter(tmp_path, lambda: 1000.5)
    assert again.used(7)["concurrent_requests"] == 0
    again.close()
    assert dead.stdin is not None
    assert dead.stdout is not None
    dead.stdin.close()
    dead.stdout.close()


def test_never_more_requests_in_any_sixty_seconds(limiter: Limiter, clock: Clock) -> None:
    """One try every 0.7 s for ten minutes: no 60 seconds have more than the limit, and hardly fewer."""
    limits = TenantLimits(requests_per_minute=20)
    times: list[float] = []
    waits: list[float] = []
    for _ in range(900):
        clock.now += 0.7
        try:
            limiter.begin(1, limits)
        except LimitReached as refused:
            waits.append(refused.retry_after_s)
        else:
            limiter.end(1, 0)
            times.append(clock.now)
    most = max(sum(start <= other < start + 60 for other in times) for start in times)
    assert most == 20
    assert len(times) >= 20 * 10
    assert 0 < min(waits) <= max(waits) <= WINDOW


def test_retry_after_is_when_there_is_room_and_not_before(limiter: Limiter, clock: Clock) -> None:
    limits = TenantLimits(requests_per_minute=2)
    clock.now = 5000.25
    limiter.begin(1, limits)
    clock.now = 5010.75
    limiter.begin(1, limits)
    with pytest.raises(LimitReached) as refused:
        limiter.begin(1, limits)
    clock.now += refused.value.retry_after_s - 0.5
    with pytest.raises(LimitReached):
        limiter.begin(1, limits)
    clock.now += 0.5
    limiter.begin(1, limits)


def test_tokens_are_reserved_and_given_back(limiter: Limiter, clock: Clock) -> None:
    limits = TenantLimits(tokens_per_minute=100)
    for _ in range(3):
        limiter.begin(3, limits)
    limiter.reserve(3, limits, sequences=1, tokens=60)
    with pytest.raises(LimitReached) as refused:
        limiter.reserve(3, limits, sequences=1, tokens=41)
    assert (refused.value.name, refused.value.retry_after_s) == ("tokens_per_minute", RETRY_RUNNING_S)
    limiter.reserve(3, limits, sequences=2, tokens=40)
    with pytest.raises(LimitReached):  # nothing is left: it is not even read
        limiter.begin(3, limits)
    assert limiter.used(3) == {
        "requests_per_minute": 3, "tokens_per_minute": 0, "tokens_reserved": 100, "concurrent_requests": 4,
    }  # fmt: skip
    limiter.end(3, 10, sequences=1, reserved=60)
    limiter.end(3, 40, sequences=2, reserved=40)
    limiter.end(3, 0)  # one that was refused
    assert limiter.used(3) == {
        "requests_per_minute": 3, "tokens_per_minute": 50, "tokens_reserved": 0, "concurrent_requests": 0,
    }  # fmt: skip
    limiter.begin(3, limits)
    clock.now += 1
    with pytest.raises(LimitReached) as refused:
        limiter.reserve(3, limits, sequences=1, tokens=51)
    assert refused.value.retry_after_s == WINDOW - 1  # used, so that it has to leave the window
    clock.now += WINDOW - 1
    limiter.reserve(3, limits, sequences=1, tokens=51)


def test_what_is_larger_than_a_limit_never_fits(limiter: Limiter) -> None:
    for limits, name in (
        (TenantLimits(tokens_per_minute=100, concurrent_requests=9), "tokens_per_minute"),
        (TenantLimits(concurrent_requests=1), "concurrent_requests"),
    ):
        limiter.begin(4, limits)
        with pytest.raises(LimitReached) as refused:
            limiter.reserve(4, limits, sequences=2, tokens=101)
        assert (refused.value.name, refused.value.retry_after_s) == (name, None)
        limiter.end(4, 0)
        assert limiter.used(4)["concurrent_requests"] == limiter.used(4)["tokens_reserved"] == 0


def test_tenants_do_not_share_counters(limiter: Limiter) -> None:
    limits = TenantLimits(requests_per_minute=1)
    for tenant in (1, 2, 63, 64, 65, 1000):
        limiter.begin(tenant, limits)
    for tenant in (1, 2, 63, 64, 65, 1000):
        with pytest.raises(LimitReached):
            limiter.begin(tenant, limits)
        assert limiter.used(tenant)["concurrent_requests"] == 1


def test_a_clock_that_is_set_back(limiter: Limiter, clock: Clock) -> None:
    limits = TenantLimits(requests_per_minute=1)
    limiter.begin(1, limits)
    clock.now -= 30
    with pytest.raises(LimitReached):
        limiter.begin(1, limits)
    clock.now -= 3600
    limiter.begin(1, limits)
    with pytest.raises(LimitReached):
        limiter.begin(1, limits)


def test_a_limit_of_nothing_admits_nobody(limiter: Limiter) -> None:
    for name in ("requests_per_minute", "tokens_per_minute", "concurrent_requests"):
        with pytest.raises(LimitReached):
            limiter.begin(1, TenantLimits(**{name: 0}))


def test_every_process_has_its_slot(tmp_path: Path) -> None:
    limiters = [Limiter(tmp_path) for _ in range(PROCESSES)]
    with pytest.raises(OSError, match="slots"):
        Limiter(tmp_path)
    for each in limiters:
        each.close()

"""service/usage.py: every token is written once, whatever fails in between."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping
from dataclasses import dataclass

import pytest

from service import usage
from service.store.usage import COUNTS, HOUR_S, Counts, Key, Owner
from service.usage import UsageRecorder

A, B, LATER_A = Owner(1, "a"), Owner(2, "b"), Owner(3, "a")


@dataclass
class Tokens:
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0


class Rows:
    """Where sums go; fails as long as `away`."""

    def __init__(self) -> None:
        self.rows: dict[Key, Counts] = {}
        self.away = False
        self.writes = 0
        self.written = asyncio.Event()

    async def write(self, sums: Mapping[Key, Counts]) -> None:
        self.writes += 1
        await asyncio.sleep(0)
        if self.away:
            raise OSError("no route to the database")
        for key, counts in sums.items():
            self.rows.setdefault(key, Counts()).add(counts)
        self.written.set()

    def total(self) -> Counts:
        total = Counts()
        for counts in self.rows.values():
            total.add(counts)
        return total


ONE = Counts(requests=1, first_tokens=1, first_token_ms=10.0)
"""What `answered` adds."""


def answered(recorder: UsageRecorder, owner: Owner, key: str, adapter: str) -> None:
    meter = recorder.open(owner, key, adapter)
    meter.first_token(0.01)
    recorder.close_meter(meter)


async def test_a_stream_is_written_as_it_goes() -> None:
    rows = Rows()
    recorder = UsageRecorder(rows.write, clock=lambda: 7250.0)
    tokens = Tokens()
    meter = recorder.open(Owner(1, "acme"), "k1", "pirate")
    meter.tokens = tokens
    await recorder.flush()
    assert not rows.writes, "it may still be refused"
    meter.first_token(0.25)
    tokens.prompt_tokens, tokens.cached_tokens, tokens.completion_tokens = 100, 64, 1
    await recorder.flush()
    tokens.completion_tokens = 9
    await recorder.flush()
    await recorder.flush()
    recorder.close_meter(meter)
    await recorder.flush()
    assert rows.rows == {
        (7200, Owner(1, "acme"), "k1", "pirate"): Counts(1, 100, 64, 9, first_tokens=1, first_token_ms=250.0),
    }
    assert rows.writes == 2, "nothing new is not written"


async def test_hours_and_names_are_rows_of_their_own() -> None:
    rows, now = Rows(), [HOUR_S - 1.0]
    recorder = UsageRecorder(rows.write, clock=lambda: now[0])
    for moment in (HOUR_S - 1.0, HOUR_S + 1.0):
        now[0] = moment
        for owner, key, adapter in ((A, "k", ""), (A, "k", "x"), (B, "k", "x"), (LATER_A, "k", "x")):
            answered(recorder, owner, key, adapter)
    recorder.add(A, "", "x", Counts(loads=2, byte_hours=0.5))
    await recorder.flush()
    assert len(rows.rows) == 9
    assert rows.rows[HOUR_S, A, "", "x"] == Counts(loads=2, byte_hours=0.5)
    assert rows.rows[0, A, "k", "x"] == ONE


async def test_nothing_is_lost_or_counted_twice_while_the_database_comes_and_goes() -> None:
    draw = random.Random(5)
    rows = Rows()
    recorder = UsageRecorder(rows.write)
    expected = Counts()
    meters: list[usage.Meter] = []
    for _ in range(500):
        rows.away = draw.random() < 0.4
        if draw.random() < 0.4:
            meter = recorder.open(A, "k", draw.choice("abc"))
            meter.tokens = Tokens()
            meters.append(meter)
        for meter in meters:
            tokens = meter.tokens
            assert isinstance(tokens, Tokens)
            if draw.random() < 0.5:
                if not tokens.completion_tokens:
                    meter.first_token(0.0)
                    expected.requests += 1
                    expected.first_tokens += 1
                    tokens.prompt_tokens = draw.randrange(1, 50)
                    expected.prompt_tokens += tokens.prompt_tokens
                tokens.completion_tokens += 3
                expected.completion_tokens += 3
        if meters and draw.random() < 0.3:
            recorder.close_meter(meters.pop(draw.randrange(len(meters))))
        if draw.random() < 0.5:
            await recorder.flush()
    for meter in meters:
        recorder.close_meter(meter)
    rows.away = False
    await recorder.close()
    assert rows.total() == expected


async def test_requests_count_from_their_first_answers_first_token_on() -> None:
    rows = Rows()
    recorder = UsageRecorder(rows.write)
    recorder.close_meter(recorder.open(A, "k", ""))  # refused, or left
    several = recorder.open(A, "k", "")
    for _ in range(3):
        several.first_token(0.01)
        await recorder.flush()
    recorder.close_meter(several)
    await recorder.flush()
    assert (rows.total().requests, rows.total().first_tokens) == (1, 3)


async def test_it_writes_by_itself_and_at_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(usage, "INTERVAL_S", 0.01)
    rows = Rows()
    recorder = UsageRecorder(rows.write)
    recorder.start()
    answered(recorder, A, "", "")
    await asyncio.wait_for(rows.written.wait(), 30)
    answered(recorder, A, "", "")
    await recorder.close()
    assert rows.total().requests == 2


async def test_the_log_says_once_that_the_database_is_away(caplog: pytest.LogCaptureFixture) -> None:
    rows = Rows()
    recorder = UsageRecorder(rows.write)
    rows.away = True
    answered(recorder, A, "", "")
    for _ in range(3):
        await recorder.flush()
    assert len(caplog.records) == 1
    assert "no route to the database" in caplog.text
    rows.away = False
    await recorder.flush()
    assert rows.total() == ONE


def test_counts_know_whether_there_is_something() -> None:
    assert not Counts()
    for name in COUNTS:
        assert Counts(**{name: 1})

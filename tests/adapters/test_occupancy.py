"""adapters/occupancy.py against a plain sum over a random history."""

from __future__ import annotations

import random

import pytest

from adapters.occupancy import Occupancy


@pytest.mark.parametrize("seed", range(20))
def test_every_load_and_byte_second_is_given_once(seed: int) -> None:
    draw, now = random.Random(seed), [0.0]
    account = Occupancy(lambda: now[0])
    there: dict[str, int] = {}
    loads: dict[str, int] = {}
    byte_seconds: dict[str, float] = {}
    given: dict[str, tuple[int, float]] = {}

    def take() -> None:
        for digest, (count, amount) in account.take().items():
            assert count or amount
            before = given.get(digest, (0, 0.0))
            given[digest] = (before[0] + count, before[1] + amount)

    for _ in range(400):
        passed = draw.choice([0.0, 0.5, 2.0])
        now[0] += passed
        for digest, nbytes in there.items():
            byte_seconds[digest] = byte_seconds.get(digest, 0.0) + nbytes * passed
        digest = draw.choice("abcde")
        if digest in there:
            del there[digest]
            account.left(digest)
        elif draw.random() < 0.8:
            there[digest] = draw.randrange(1, 100)
            loads[digest] = loads.get(digest, 0) + 1
            account.arrived(digest, there[digest])
        if draw.random() < 0.2:
            take()
    take()
    assert account.take() == {}
    assert {digest: count for digest, (count, _) in given.items()} == loads
    assert {digest: amount for digest, (_, amount) in given.items() if amount} == pytest.approx(
        {digest: amount for digest, amount in byte_seconds.items() if amount}
    )

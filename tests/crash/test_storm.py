"""200 kills under traffic, at random moments, in four storms: whatever was acknowledged is there, to the byte."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.crash.storm import Storm
from tests.crash.world import World

KILLS = 50


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("seed", "api_workers"), [(1, 1), (2, 2), (3, 1), (4, 2)])
def test_nothing_acknowledged_is_lost(seed: int, api_workers: int, make_world: Callable[..., World]) -> None:
    world = make_world("--unhealthy-s", "1", api_workers=api_workers)
    storm = Storm(world, seed)
    storm.run(kills=KILLS)
    print(storm.figures.report(storm.ledger))
    assert storm.figures.kills.total() >= KILLS
    assert storm.ledger.acknowledged > KILLS
    assert storm.figures.answers["200"] > KILLS
    assert "Timeout (" not in "".join(world.logs), "a process had to be broken off at its end"

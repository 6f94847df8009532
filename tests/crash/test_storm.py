"""120 kills under traffic, at random moments, in four storms: whatever was acknowledged is there, to the byte."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.crash.storm import Storm
from tests.crash.world import World
from tests.real_parts import S3, Postgres

KILLS = 30
"""In each; `make soak` goes on for an hour."""


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("seed", "api_workers"), [(1, 1), (2, 2)])
def test_nothing_acknowledged_is_lost(seed: int, api_workers: int, make_world: Callable[..., World]) -> None:
    """The engine of the second prepares its steps ahead, as one on a GPU does."""
    engine = '{"ahead": true}' if api_workers == 2 else "{}"
    survive(Storm(make_world("--unhealthy-s", "1", api_workers=api_workers, engine=engine), seed))


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("seed", "instances"), [(3, 1), (4, 2)])
def test_nothing_acknowledged_is_lost_in_postgresql_and_s3(
    seed: int, instances: int, make_world: Callable[..., World], postgres: Postgres, s3: S3
) -> None:
    """With two instances every request goes to any of them, and both have to agree."""
    state = {"database": postgres.create(), "blobs_url": s3.create()}
    worlds = [make_world("--unhealthy-s", "1", **state) for _ in range(instances)]
    survive(Storm(worlds[0], seed, *worlds[1:], settle=lambda: postgres.settle(state["database"])))


def survive(storm: Storm) -> None:
    storm.run(kills=KILLS)
    print(storm.figures.report(storm.ledger))
    assert storm.figures.kills.total() >= KILLS
    assert storm.ledger.acknowledged > KILLS
    assert storm.figures.answers["200"] > KILLS
    logs = "".join(log for world in storm.worlds for log in world.logs)
    assert "Timeout (" not in logs, "a process had to be broken off at its end"

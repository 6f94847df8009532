"""The pace of a merge: it has what nobody else wants, and little of what others want."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from service.children import Child
from service.pace import MAX_PAUSE_S, SHARE, keep_pace, measurable, pause_s
from tests.service.launch import wait_for

SPIN = "while True: pass"


def test_who_never_waits_is_never_stopped() -> None:
    assert pause_s(ran=0.05, waited=0.0, elapsed=0.05) == 0
    assert pause_s(ran=0.05, waited=0.004, elapsed=0.055) == 0
    assert pause_s(ran=0.0, waited=0.0, elapsed=0.05) == 0  # it waits for the disk


def test_who_waits_gets_its_share_of_the_time() -> None:
    for ran in (0.01, 0.025, 0.05):
        pause = pause_s(ran, waited=0.02, elapsed=0.07)
        assert ran / (0.07 + pause) == pytest.approx(SHARE)
    assert pause_s(ran=0.001, waited=0.049, elapsed=0.05) == 0  # it has less than its share
    assert pause_s(ran=10.0, waited=10.0, elapsed=20.0) == MAX_PAUSE_S


@pytest.fixture
def crowd() -> Iterator[None]:
    """Two that want the processor on which this process is, and nothing else, from now on."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    others = [subprocess.Popen([sys.executable, "-c", SPIN]) for _ in range(2)]
    os.sched_setaffinity(0, before)
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


@pytest.mark.skipif(not measurable(), reason="this kernel does not say how long processes wait")
@pytest.mark.usefixtures("crowd")
async def test_a_process_beside_others_gets_on_but_is_held_back(tmp_path: Path) -> None:
    """It is stopped again and again, and goes on when nobody keeps it."""
    (tmp_path / "spin.py").write_text(f"print(end='', flush=True)\n{SPIN}\n")
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    child = await Child.start("spin", "spin", env=env)
    keeper = asyncio.create_task(keep_pace(child))
    try:
        os.sched_setaffinity(child.pid, {min(os.sched_getaffinity(0))})
        process = psutil.Process(child.pid)

        def stopped() -> bool:
            return process.status() == psutil.STATUS_STOPPED

        for _ in range(3):
            await asyncio.to_thread(wait_for, stopped, 120)
            await asyncio.to_thread(wait_for, lambda: not stopped(), 120)
        await asyncio.to_thread(wait_for, stopped, 120)
        keeper.cancel()
        await asyncio.gather(keeper, return_exceptions=True)
        assert not stopped()
        assert child.running
    finally:
        keeper.cancel()
        await child.kill()


async def test_it_ends_with_the_process() -> None:
    child = await Child.start("short", "this", env=dict(os.environ))
    await asyncio.wait_for(asyncio.gather(child.wait(), keep_pace(child)), 60)
    assert not child.running

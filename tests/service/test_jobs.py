"""The worker processes: results, exceptions, and workers that are killed at work."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from adapters.errors import AdapterRefused
from adapters.inspection import inspect_upload
from adapters.manifest import Manifest
from service.job_worker import import_modules
from service.jobs import Workers, WorkersUnavailable
from tests.service.launch import ROOT

DIE = "__import__('os').kill(__import__('os').getpid(), 9)"


@pytest.fixture
async def workers() -> AsyncIterator[Workers]:
    pool = Workers(1)
    yield pool
    await pool.close()


async def test_jobs_run_elsewhere_without_torch(workers: Workers) -> None:
    await workers.run(import_modules, "adapters.inspection", "service.jobs")
    assert await workers.run(os.getpid) != os.getpid()
    assert await workers.run(eval, "'torch' in __import__('sys').modules") is False
    assert await workers.run(os.nice, 0) == min(19, os.nice(0) + 10)


async def test_failures_come_back_whole(workers: Workers, tmp_path: Path) -> None:
    (tmp_path / "config").write_bytes(b"{}")
    (tmp_path / "weights").write_bytes(b"nothing")
    manifest = Manifest("f", "A", "a", "float32", 1, 1, ())
    with pytest.raises(AdapterRefused) as caught:
        await workers.run(inspect_upload, tmp_path / "config", {"a.safetensors": tmp_path / "weights"}, None, manifest)
    assert len(caught.value.reasons) >= 2
    assert all(isinstance(reason, str) for reason in caught.value.reasons)


async def test_a_killed_worker_costs_nothing(workers: Workers, tmp_path: Path) -> None:
    once = f"open({str(tmp_path / 'mark')!r}, 'x').close() or {DIE}"
    code = f"'done' if __import__('os').path.exists({str(tmp_path / 'mark')!r}) else ({once})"
    assert await workers.run(eval, code) == "done"
    results = await asyncio.gather(*(workers.run(abs, -i) for i in range(20)))
    assert results == list(range(20))


async def test_no_job_pays_for_another_that_always_kills_its_worker(tmp_path: Path) -> None:
    """Every time: the jobs that were at work or in the queue beside it."""
    pool = Workers(2)
    try:
        slow = "__import__('time').sleep(0.2) or 7"
        outcomes = await asyncio.gather(
            *(pool.run(eval, code) for _ in range(4) for code in (DIE, slow)), return_exceptions=True
        )
        assert outcomes[1::2] == [7] * 4
        assert all(isinstance(outcome, WorkersUnavailable) for outcome in outcomes[::2])
    finally:
        await pool.close()


async def test_closing_does_not_wait_for_jobs(workers: Workers) -> None:
    assert await workers.run(abs, -1) == 1
    (pid,) = workers.pids
    hung = asyncio.ensure_future(workers.run(eval, "__import__('time').sleep(3600)"))
    await asyncio.sleep(0.05)
    await asyncio.wait_for(workers.close(), 20)
    hung.cancel()
    await asyncio.gather(hung, return_exceptions=True)
    for _ in range(400):
        if not _alive(pid):
            return
        await asyncio.sleep(0.05)
    raise AssertionError("the worker is still there")


@pytest.mark.parametrize(
    "jobs", ["", "abs, -1", "eval, \"__import__('time').sleep(3600)\""], ids=["no", "idle", "hung"]
)
def test_nothing_of_the_pool_is_left_to_the_exit(jobs: str) -> None:
    """An API process ends by a signal, with no handlers at exit: what is still held then, Python's resource tracker
    finds and reports on stderr, which is where the log goes."""
    script = f"""
import asyncio, os, signal
from service.jobs import Workers

async def main():
    workers = Workers(2)
    await workers.run(abs, -1)
    jobs = [asyncio.ensure_future(workers.run({jobs or "abs, -1"})) for _ in range({5 if jobs else 0})]
    await asyncio.sleep(0.1)
    await workers.close()
    await asyncio.gather(*jobs, return_exceptions=True)
    os.kill(os.getpid(), signal.SIGTERM)

asyncio.run(main())
"""
    # Until the tracker has ended too: it has the pipe as its stderr.
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (-signal.SIGTERM, "")


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


async def test_a_job_that_always_kills_its_worker(workers: Workers) -> None:
    with pytest.raises(WorkersUnavailable):
        await workers.run(eval, DIE)
    assert await workers.run(abs, -1) == 1

"""Work on processors, off the event loop: a small pool of low-priority processes that never import torch."""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import ParamSpec, TypeVar

from service.engine import logs
from service.job_worker import become_worker

log = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")


class WorkersUnavailable(Exception):  # noqa: N818 - the name says what happened
    """This job's worker process died twice; the job was not done."""


class Workers:
    """A pool of processes, started with the first job. `count`: how many; by default 2, or 1 on a single core."""

    def __init__(self, count: int | None = None) -> None:
        self._count = count or min(2, os.cpu_count() or 1)
        self._pool: ProcessPoolExecutor | None = None
        self._alone: set[ProcessPoolExecutor] = set()
        self._closed = False
        self._second_tries = asyncio.Semaphore(self._count)

    async def run(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """The result of a module-level function, or the exception it raised.

        A job whose worker was killed (by the kernel for memory, by hand) is done once more, so it has to bear being
        repeated. All jobs of a pool fail when one of its workers dies, so the second try has a worker of its own: no
        job pays for what another one does twice. Raises WorkersUnavailable if that worker dies as well.
        """
        pool = self._started()
        try:
            return await asyncio.wrap_future(pool.submit(function, *args, **kwargs))
        except BrokenProcessPool:
            if not self._closed:
                log.warning("a worker process died; starting new ones")
            self._discard(pool)
        async with self._second_tries:
            if self._closed:
                raise WorkersUnavailable("The server is shutting down.")
            pool = self._new_pool(1)
            self._alone.add(pool)
            try:
                return await asyncio.wrap_future(pool.submit(function, *args, **kwargs))
            except BrokenProcessPool:
                raise WorkersUnavailable("The worker process died twice over this.") from None
            finally:
                self._alone.discard(pool)
                pool.shutdown(wait=False)

    def _started(self) -> ProcessPoolExecutor:
        if self._pool is None:
            self._pool = self._new_pool(self._count)
        return self._pool

    @staticmethod
    def _new_pool(count: int) -> ProcessPoolExecutor:
        # Not fork: this process has threads, and a loop with open sockets.
        context = multiprocessing.get_context("spawn")
        return ProcessPoolExecutor(count, mp_context=context, initializer=become_worker, initargs=logs.current())

    def _discard(self, pool: ProcessPoolExecutor) -> None:
        # All jobs of a broken pool fail together; the first to notice replaces it, the others find the new one.
        if self._pool is pool:
            self._pool = None
            pool.shutdown(wait=False)

    async def close(self) -> None:
        """Ends the workers at once. They only read, so there is nothing to finish; who waits for a job is cancelled.

        Returns when the pools have given back what they had of the system. An API process ends by a signal (uvicorn
        raises again the one that it was told to stop with), so nothing at its exit would remove the five semaphores of
        a pool: they would stay in /dev/shm, or multiprocessing's resource tracker would find them and say so in
        the log, in words that are no JSON."""
        pools = [*self._alone, *([self._pool] if self._pool is not None else [])]
        self._pool, self._closed = None, True
        for pool in pools:
            for process in list((getattr(pool, "_processes", None) or {}).values()):
                process.kill()
        await asyncio.gather(*(asyncio.to_thread(pool.shutdown, cancel_futures=True) for pool in pools))

    @property
    def pids(self) -> tuple[int, ...]:
        """Process ids of the workers that run."""
        return tuple(getattr(self._pool, "_processes", None) or ())

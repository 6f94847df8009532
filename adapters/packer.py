"""Packing blocks in a worker process of low priority, so that neither the step loop nor its GIL notices. No torch."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from adapters.blobs import Blobs
from adapters.block import pack
from adapters.block_files import sweep_unfinished
from adapters.errors import AdapterUnavailable
from adapters.manifest import Manifest

ATTEMPTS = 2
NICE = 10


class Packer:
    """One worker, started when first needed, and again when it has died (the kernel's out-of-memory killer, say)."""

    def __init__(self, store: Blobs, manifest: Manifest, cache_dir: Path) -> None:
        self._arguments = (store, manifest, Path(cache_dir))
        self._pool: ProcessPoolExecutor | None = None
        self._lock = threading.Lock()
        self._closed = False
        sweep_unfinished(self._arguments[2])

    def pack(self, digest: str) -> None:
        """Waits until the block file exists. One call at a time, so that a worker's death has one culprit.

        Raises what adapters.block.pack raises, and AdapterUnavailable when the worker dies twice on it."""
        store, manifest, cache_dir = self._arguments
        for _ in range(ATTEMPTS):
            with self._lock:
                if self._closed:
                    break
                if self._pool is None:
                    context = multiprocessing.get_context("spawn")
                    self._pool = ProcessPoolExecutor(max_workers=1, mp_context=context, initializer=_start_worker)
                pool = self._pool
            try:
                # Submitting to a pool whose worker has died since raises too.
                pool.submit(pack, digest, store, manifest, cache_dir).result()
                return
            except BrokenProcessPool:
                with self._lock:
                    if self._pool is pool:
                        self._pool = None
                pool.shutdown(wait=False)
            except RuntimeError:
                if not self._closed:
                    raise
                break
        reason = "the packer is closed" if self._closed else f"the packing process died {ATTEMPTS} times"
        raise AdapterUnavailable(digest, reason)

    @property
    def worker_pids(self) -> tuple[int, ...]:
        """Process ids of the worker, if one is running."""
        pool = self._pool
        processes = getattr(pool, "_processes", None) or {}
        return tuple(processes)

    def close(self) -> None:
        """Ends the worker at once: block files appear atomically, so nothing half-made can be found."""
        with self._lock:
            self._closed = True
            pool, self._pool = self._pool, None
        if pool is None:
            return
        processes = list((getattr(pool, "_processes", None) or {}).values())
        pool.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.terminate()
        for process in processes:
            process.join(timeout=5)


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.nice(NICE)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """An idle pool worker holds both ends of its own queue, so it would outlive a parent that was killed."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)

"""What a worker process of service/jobs.py is made of, and no more: one starts with every API process."""

from __future__ import annotations

import importlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading

from service.engine import logs

NICENESS = 10  # the engine and the API go first


def import_modules(*names: str) -> None:
    """A job that does nothing but start a worker and import there what later jobs need."""
    for name in names:
        importlib.import_module(name)


def become_worker(log_level: str, log_format: str) -> None:
    logs.configure(log_level, log_format, quiet=True)
    os.nice(NICENESS)
    # Ctrl-C goes to the whole terminal; it is the parent that ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_die_with, args=(parent.sentinel,), daemon=True).start()


def _die_with(sentinel: int) -> None:
    """A worker waits for jobs on a pipe that it holds open itself, so it would outlive a parent that was killed."""
    multiprocessing.connection.wait([sentinel])
    os._exit(1)

"""The process that does one merge and ends with it: `python -m service.merge_job FD TASK`. It loads torch.

It has one thread, and gives way to everything else as the setting merge_priority says (pace.py). What it has to say
goes to the file descriptor FD, one JSON object (Said) a line; TASK is the path of a Task as JSON.

What it imports counts: beside busy processors a second is 25. torch takes 1.3 s; settings and catalogue
would be 1 s more.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import time
from pathlib import Path
from typing import BinaryIO

import msgspec

from adapters.blobs import Blobs
from adapters.merge_request import MergeOptions
from service.engine import logs
from service.engine.leaving import Leaving
from service.merge_task import Priority, Said, Task, explain, held

log = logging.getLogger(__name__)

REPORT_S = 0.25
"""The shortest time between two reports of progress."""


class Voice:
    """Writes to the merger. When that has ended the kernel kills this process, so nobody talks to himself for long."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._last = 0.0

    def say(self, said: Said) -> None:
        self._stream.write(msgspec.json.encode(said) + b"\n")
        self._stream.flush()
        self._last = time.monotonic()

    def progress(self, share: float) -> None:
        if time.monotonic() - self._last >= REPORT_S:
            self.say(Said("merging", share))


def stand_back(priority: Priority) -> None:
    """From now on everything else goes first (idle), or a little before (low: the merger sees to the rest)."""
    if priority == "normal":
        return
    os.nice(5 if priority == "low" else 19)
    if priority == "idle" and hasattr(os, "SCHED_IDLE"):
        with contextlib.suppress(OSError):  # not allowed in some containers: then nice has to do
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    # Where Linux groups processes by session (sched_autogroup_enabled), shares are the groups' and what a process asks
    # for counts inside its own alone. This process leads a session.
    with contextlib.suppress(OSError):  # no such groups here
        for _ in range(10):
            try:
                Path("/proc/self/autogroup").write_text("5" if priority == "low" else "19")
                return
            except BlockingIOError:  # one change in a tenth of a second, on the whole machine
                time.sleep(0.2)


def work(task: Task, voice: Voice, blobs: Blobs) -> None:
    """Raises what the merge raises."""
    voice.say(Said("reading"))
    sources = [source.fetch(blobs) for source in task.sources]

    import torch

    from adapters.checkpoint import merge_checkpoint
    from adapters.merge import merge_adapters

    torch.set_num_threads(1)
    options = MergeOptions(**task.options)  # type: ignore[arg-type]  # they are checked, and were before
    out = Path(task.out)
    voice.say(Said("merging"))
    files: list[dict[str, str | int]] = []
    if task.target == "adapter":
        merge_adapters(sources, task.manifest, out, options, voice.progress)
    else:
        merged = merge_checkpoint(sources, Path(task.model), task.manifest, out, options, voice.progress)
        files = [{"name": file.name, "bytes": file.bytes, "sha256": file.sha256} for file in merged]
    voice.say(Said(done=True, files=files))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m service.merge_job", description="One merge of loraplex.")
    parser.add_argument("fd", type=int, help="where to report")
    parser.add_argument("task", type=Path, help="what to do, as JSON")
    arguments = parser.parse_args()
    task = msgspec.json.decode(arguments.task.read_bytes(), type=Task)
    logs.configure(*task.log, quiet=True)
    stand_back(task.priority)
    with os.fdopen(arguments.fd, "wb") as stream:
        voice = Voice(stream)
        try:
            blobs = task.open_blobs()
            with held(task.sources, blobs):
                work(task, voice, blobs)
        except Exception as error:
            log.exception("a merge failed")
            voice.say(Said(error=explain(error)))


if __name__ == "__main__":
    leaving = Leaving()
    main()
    leaving.with_code(0)

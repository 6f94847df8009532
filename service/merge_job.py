"""The process that does one merge and ends with it: `python -m service.merge_job FD TASK`. It loads torch.

It has one thread, and gives way to everything else as the setting merge_priority says (pace.py). What it has to say
goes to the file descriptor FD, one JSON object (Said) a line; TASK is the path of a Task as JSON.

What it imports counts: beside busy processors a second is half a minute. torch takes 1.3 s; settings and catalogue
would be 1 s more.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import logging
import os
import time
from pathlib import Path
from typing import BinaryIO, Literal

import msgspec

from adapters.blobs import INDEX_SUFFIX, Blobs, open_blobs
from adapters.manifest import Manifest
from adapters.merge_request import MergeOptions, MergeSource
from adapters.peft_config import CONFIG_NAME
from service.engine import logs

Priority = Literal["idle", "low", "normal"]

BLOBS_URL = "LORAPLEX_BLOBS_URL"
"""It comes by the environment, not in the task: it may hold a secret, and the task is a file."""

log = logging.getLogger(__name__)

REPORT_S = 0.25
"""The shortest time between two reports of progress."""


class StoredSource(msgspec.Struct, frozen=True):
    """A source by its files' hashes. `name` is for messages, `files`: (name, sha256)."""

    name: str
    files: tuple[tuple[str, str], ...]
    weight: float

    def fetch(self, blobs: Blobs) -> MergeSource:
        """Local files, checked. AdapterMissing, BlobDamaged, StoreUnavailable."""
        paths = {name: blobs.fetch(sha) for name, sha in self.files}
        index = next((path for name, path in paths.items() if name.endswith(INDEX_SUFFIX)), None)
        weights = {name: path for name, path in paths.items() if name.endswith(".safetensors")}
        return MergeSource(self.name, paths[CONFIG_NAME], weights, index, self.weight)


class Task(msgspec.Struct, frozen=True):
    """What to merge into the folder `out`. `options`: fields of adapters.merge_request.MergeOptions; blobs_dir,
    cache_dir and cache_bytes: arguments of adapters.blobs.open_blobs; log: level and format."""

    target: Literal["adapter", "checkpoint"]
    sources: list[StoredSource]
    manifest: Manifest
    model: str
    out: str
    options: dict[str, str | int | float]
    blobs_dir: str
    cache_dir: str
    cache_bytes: int
    priority: Priority
    log: tuple[str, str]

    def open_blobs(self) -> Blobs:
        """Where the sources' files lie."""
        return open_blobs(Path(self.blobs_dir), Path(self.cache_dir), self.cache_bytes, os.environ.get(BLOBS_URL, ""))


class Said(msgspec.Struct, frozen=True, omit_defaults=True):
    """`phase` and `progress` while it goes on; in the end `done` (with the files of a checkpoint) or `error`."""

    phase: str = ""
    progress: float = 0.0
    done: bool = False
    files: list[dict[str, str | int]] = []
    error: str = ""


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


def explain(error: Exception) -> str:
    """For whoever asked for the merge."""
    from adapters.errors import AdapterRefused, LoraplexAdapterError

    match error:
        case AdapterRefused():
            return "The merge is impossible: " + "; ".join(str(reason) for reason in error.reasons)
        case LoraplexAdapterError():
            return f"A source cannot be read: {error}"
        case OSError() if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return "The server's disk is full."
        case MemoryError():
            return "The server has not enough memory for this merge."
    return "Internal error. The server's log has the details."


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m service.merge_job", description="One merge of loraplex.")
    parser.add_argument("fd", type=int, help="where to report")
    parser.add_argument("task", type=Path, help="what to do, as JSON")
    arguments = parser.parse_args()
    task = msgspec.json.decode(arguments.task.read_bytes(), type=Task)
    logs.configure(*task.log)
    stand_back(task.priority)
    with os.fdopen(arguments.fd, "wb") as stream:
        voice = Voice(stream)
        try:
            work(task, voice, task.open_blobs())
        except Exception as error:
            log.exception("a merge failed")
            voice.say(Said(error=explain(error)))


if __name__ == "__main__":
    main()

"""/v1/merges: jobs that make an adapter, or a whole checkpoint, out of adapters."""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from service.wire import adapters, downloads
from service.wire.errors import BadRequest, ConnectionFailed, MergeFailed, ProtocolError, TimedOut, Unavailable
from service.wire.files import Progress, Remote
from service.wire.flows import Flow, PageOf, Sleep, json_of, pages
from service.wire.records import Merge, MergeFile, MergeState

_ROOT = "/v1/merges"
OUTAGE_S = 60.0
"""How long a server that is waited on may be away: merges survive its restart."""
_POLL_S = 0.2, 2.0

Sources = Mapping[str, float] | Sequence[str]
"""Weights by adapter (`name`, `name@3`, `name@alias`), or adapters that all weigh 1."""


def weights(sources: Sources) -> list[dict[str, Any]]:
    """[{"adapter", "weight"}]. Raises BadRequest for a weight that JSON has no number for."""
    pairs = list(sources.items()) if isinstance(sources, Mapping) else [(name, 1.0) for name in sources]
    for name, weight in pairs:
        if isinstance(weight, float) and not math.isfinite(weight):
            raise BadRequest(400, f"The weight of {name!r} is not a finite number (value {weight}).", param="weight")
    return [{"adapter": name, "weight": weight} for name, weight in pairs]


def create(
    name: str,
    sources: Sources,
    *,
    method: str = "linear",
    into: Literal["adapter", "checkpoint"] = "adapter",
    density: float | None = None,
    majority_sign_method: Literal["total", "frequency"] | None = None,
    svd_rank: int | None = None,
    seed: int | None = None,
    description: str | None = None,
    max_shard_bytes: int | None = None,
    idempotency_key: str | None = None,
) -> Flow[Merge]:
    """Queues a merge; `wait` follows it. Refused if the sources do not fit each other or the method. With an
    `idempotency_key` of your own, the same call made twice is one merge, across processes too."""
    options: dict[str, Any] = {
        "density": density, "majority_sign_method": majority_sign_method, "svd_rank": svd_rank, "seed": seed,
        "description": description, "max_shard_bytes": max_shard_bytes,
    }  # fmt: skip
    body: dict[str, Any] = {"name": name, "sources": weights(sources), "method": method, "into": into}
    body |= {key: value for key, value in options.items() if value is not None}
    # The key is what makes it safe to send this again.
    key = idempotency_key or uuid.uuid4().hex
    return Merge.read((yield from json_of("POST", _ROOT, json=body, headers={"Idempotency-Key": key})))


def every(*, state: MergeState | None = None) -> PageOf[Merge]:
    """All merges, the newest first; or those in one state."""
    return pages(_ROOT, Merge.read, limit=adapters.PAGE, state=state)


def get(id: str) -> Flow[Merge]:
    return Merge.read((yield from json_of("GET", adapters.at(id, root=_ROOT))))


def wait(id: str, *, progress: Callable[[Merge], None] | None = None, timeout_s: float | None = None) -> Flow[Merge]:
    """Until the merge has succeeded; `progress` is called with each state seen. Raises MergeFailed if it fails or is
    cancelled, TimedOut after `timeout_s`. A server that is away for less than a minute is waited for."""
    started = seen = time.monotonic()
    pause, most = _POLL_S
    while True:
        try:
            job = yield from get(id)
        except (ConnectionFailed, Unavailable):
            if time.monotonic() - seen > OUTAGE_S:
                raise
        else:
            seen = time.monotonic()
            if progress is not None:
                progress(job)
            if job.state == "succeeded":
                return job
            if job.finished:
                raise MergeFailed(job)
        if timeout_s is not None and time.monotonic() - started > timeout_s:
            raise TimedOut(f"the merge {id} has not ended within {timeout_s:g} s")
        yield Sleep(pause)
        pause = min(most, pause * 1.2)


def delete(id: str) -> Flow[Merge | None]:
    """Cancels a merge that is queued or running, and returns it. One that has ended is deleted with the files of its
    checkpoint, and None returned; an adapter that it made stays."""
    body = yield from json_of("DELETE", adapters.at(id, root=_ROOT))
    return Merge.read(body) if isinstance(body, dict) and "state" in body else None


def files(id: str) -> Flow[tuple[MergeFile, ...]]:
    """The files of a merge into a checkpoint."""
    path = adapters.at(id, "files", root=_ROOT)
    body = yield from json_of("GET", path)
    if not isinstance(body, dict) or not isinstance(body.get("data"), list):
        raise ProtocolError(f"{path} did not answer with a list")
    return tuple(MergeFile.read(_named(file)) for file in body["data"])


def _named(file: Any) -> Any:
    """Lists of files elsewhere in this API say `filename`."""
    return {"name": file.get("filename"), **file} if isinstance(file, dict) else file


def download(
    id: str, folder: str | Path, *, overwrite: bool = False, progress: Progress | None = None
) -> Flow[list[Path]]:
    """The checkpoint that a merge made (a Hugging Face folder) into `folder`, checked and resumed as
    `adapters.download` does."""
    found = yield from files(id)
    remotes = [Remote(file.name, file.bytes, file.sha256) for file in found]
    root = adapters.at(id, "files", root=_ROOT)
    return (yield from downloads.fetch_all(root, remotes, Path(folder), overwrite, progress))

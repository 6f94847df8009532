"""Folders of files from the server, resumed where they were cut."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import quote

from service.wire.errors import ApiError, ConnectionFailed, LocalFileError, ServerError, Unavailable
from service.wire.files import FileSink, Progress, Remote
from service.wire.flows import Flow, Request, Save, Sleep, run

FRUITLESS = 5
"""Attempts in a row that may bring not a byte."""
_READ_TIMEOUT_S = 60.0


def fetch_all(
    root: str,
    remotes: Sequence[Remote],
    folder: Path,
    overwrite: bool,
    progress: Progress | None,
    params: Mapping[str, str | None] | None = None,
) -> Flow[list[Path]]:
    """The files below the path `root` into `folder`; `params`: of every request. Raises LocalFileError,
    DamagedFile, and what requests raise."""
    total, before = sum(remote.bytes for remote in remotes), 0

    def report(size: int) -> None:
        if progress is not None:
            progress(before + size, total)

    sinks = [FileSink(folder, remote, report) for remote in remotes]
    missing = []
    for sink in sinks:
        if (yield from run(sink.present)):
            continue
        if sink.path.exists() and not overwrite:
            raise LocalFileError(f"{sink.path} exists with other content; it is not overwritten unless told so")
        missing.append(sink)
    for sink, remote in zip(sinks, remotes, strict=True):
        if sink in missing:
            with sink:
                yield from _fetch(f"{root}/{quote(remote.name)}", params or {}, sink)
        before += remote.bytes
        report(0)
    return [sink.path for sink in sinks]


def _fetch(path: str, params: Mapping[str, str | None], sink: FileSink) -> Flow[None]:
    fruitless = 0
    had = yield from run(sink.open)
    while not sink.complete:
        request = Request(
            path=path, params=params, headers={"Range": f"bytes={sink.size}-"} if sink.size else {},
            timeout_s=_READ_TIMEOUT_S,
        )  # fmt: skip
        try:
            yield Save(request, sink)
        except (ConnectionFailed, Unavailable) as error:
            fruitless = 0 if sink.size > had else fruitless + 1
            # A file that is gone, a key that is refused: nothing that waiting would mend.
            if fruitless == FRUITLESS:
                raise
            had = sink.size
            pause = error.retry_after if isinstance(error, Unavailable) and error.retry_after else 0.2 * 2**fruitless
            yield Sleep(min(pause, 30.0))
        except ApiError as error:
            if error.status == 416 and sink.size:  # there is no such part any more
                yield from run(sink.restart)
                continue
            raise
        else:
            if not sink.complete:
                fruitless = 0 if sink.size > had else fruitless + 1
                if fruitless == FRUITLESS:
                    raise ServerError(500, f"{path} ends after {sink.size} bytes of its announced size")
                had = sink.size
    yield from run(sink.commit)

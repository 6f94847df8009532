"""Which ranges of a file are asked for (RFC 9110, section 14), and downloads out of a store that is elsewhere."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping

from fastapi import Request
from fastapi.responses import Response, StreamingResponse

from service.api.failure import ApiError

PART_BYTES = 8 << 20
"""What is asked of the store at once: a client may read as slowly as it likes, no connection to the store waits."""

_RANGE = re.compile(r"\s*(\d{0,18})-(\d{0,18})\s*")

Read = Callable[[int, int], Awaitable[bytes]]
"""The bytes from the first offset to before the second."""


def wanted(request: Request, size: int, etag: str) -> tuple[int, int] | None:
    """[start, end) of the one range that is asked for; None: all of it, also where several ranges are asked for or the
    file is another one than the client has a part of (If-Range). Raises ApiError 416."""
    ranges = _asked(request, size, etag)
    if len(ranges) != 1:
        return None
    start, end = ranges[0]
    if start >= end:
        header = request.headers["range"]
        raise ApiError(
            416,
            f"The range {header[:100]!r} is outside of the file, which has {size} bytes.",
            code="range_not_satisfiable",
            param="Range",
            headers={"Content-Range": f"bytes */{size}"},
        )
    return start, end


def check(request: Request, size: int, etag: str) -> None:
    """Before a FileResponse, which would refuse what it does not understand in words of its own: then the header is as
    if it were not there, and all of the file is sent. Raises ApiError 416 as `wanted` does."""
    if wanted(request, size, etag) is not None:
        return
    several = _asked(request, size, etag)
    if not several or any(start >= end for start, end in several):
        request.scope["headers"] = [pair for pair in request.scope["headers"] if pair[0] != b"range"]


def _asked(request: Request, size: int, etag: str) -> list[tuple[int, int]]:
    """[start, end) of each range of the header; end is not above start where the file has none of it. Empty: nothing
    that is to be obeyed."""
    unit, _, text = request.headers.get("range", "").strip().partition("=")
    if unit != "bytes" or request.headers.get("if-range", etag) != etag:
        return []
    ranges = []
    for part in text.split(","):
        found = _RANGE.fullmatch(part)
        if found is None or found.groups() == ("", ""):
            return []
        first, last = found.groups()
        if not first:
            ranges.append((max(0, size - int(last)), size))
        elif last and int(last) < int(first):
            return []
        else:
            ranges.append((int(first), min(int(last) + 1 if last else size, size)))
    return ranges


async def download(request: Request, read: Read, size: int, headers: Mapping[str, str], media_type: str) -> Response:
    """`headers`: with the ETag. The first part is read before the answer begins, so that what `read` raises can still
    be answered; what it raises later ends the connection."""
    part = wanted(request, size, headers["ETag"])
    start, end = part or (0, size)
    first = await read(start, min(end, start + PART_BYTES)) if end > start else b""

    async def body() -> AsyncIterator[bytes]:
        yield first
        for offset in range(start + PART_BYTES, end, PART_BYTES):
            yield await read(offset, min(end, offset + PART_BYTES))

    more = {"Accept-Ranges": "bytes", "Content-Length": str(end - start)}
    if part is not None:
        more["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
    return StreamingResponse(body(), 206 if part else 200, {**headers, **more}, media_type)

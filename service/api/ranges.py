"""Downloads out of a store that is elsewhere, whole or one range of them (RFC 9110, section 14)."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping

from fastapi import Request
from fastapi.responses import Response, StreamingResponse

from service.api.failure import ApiError

PART_BYTES = 8 << 20
"""What is asked of the store at once: a client may read as slowly as it likes, no connection to the store waits."""

_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")

Read = Callable[[int, int], Awaitable[bytes]]
"""The bytes from the first offset to before the second."""


def wanted(request: Request, size: int, etag: str) -> tuple[int, int] | None:
    """[start, end) of the one range that is asked for; None: all of it, also where several ranges are asked for or the
    file is another one than the client has a part of (If-Range). Raises ApiError 416."""
    header = request.headers.get("range", "").strip()
    if not header or request.headers.get("if-range", etag) != etag:
        return None
    found = _RANGE.fullmatch(header)
    if found is None or found.groups() == ("", ""):
        return None
    first, last = found.groups()
    if first:
        start, end = int(first), min(int(last) + 1 if last else size, size)
        if last and int(last) < int(first):
            return None  # not a range
    else:
        start, end = max(0, size - int(last)), size
    if start >= size or start >= end:
        raise ApiError(
            416,
            f"The range {header[:100]!r} is outside of the file, which has {size} bytes.",
            code="range_not_satisfiable",
            param="Range",
            headers={"Content-Range": f"bytes */{size}"},
        )
    return start, end


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

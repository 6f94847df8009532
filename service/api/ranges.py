"""Which ranges of a file are asked for (RFC 9110, section 14), and downloads out of a store that is elsewhere."""

from __future__ import annotations

import re
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping

from fastapi import Request
from fastapi.responses import FileResponse, Response, StreamingResponse

from service.api.failure import ApiError

PART_BYTES = 8 << 20
"""What is asked of the store at once: a client may read as slowly as it likes, no connection to the store waits."""

_RANGE = re.compile(r"\s*([0-9]*)-([0-9]*)\s*")

Read = Callable[[int, int], Awaitable[bytes]]
"""The bytes from the first offset to before the second."""


def wanted(request: Request, size: int, etag: str) -> tuple[int, int] | None:
    """[start, end) of the one range that is asked for; None: all of it, also where several ranges are asked for or the
    file is another one than the client has a part of (If-Range). Raises ApiError 416."""
    ranges = _asked(request, size)
    if len(ranges) != 1 or request.headers.get("if-range", etag) != etag:
        return None
    if not _inside(ranges[0]):
        raise _outside(request, size)
    return ranges[0]


def check(request: Request, size: int) -> None:
    """Before a FileResponse, which knows ranges and If-Range, but refuses what it does not like in words of its own: so
    it finds what it likes. A header that names no range, or several of which some are outside, is as if it were not
    there, and all of the file is sent. Raises ApiError 416 if all are outside."""
    ranges = _asked(request, size)
    if ranges and not any(map(_inside, ranges)) and "if-range" not in request.headers:
        raise _outside(request, size)
    headers = [pair for pair in request.scope["headers"] if pair[0] != b"range"]
    if ranges and all(map(_inside, ranges)):
        plain = ",".join(f"{start}-{end - 1}" for start, end in ranges)
        headers.append((b"range", f"bytes={plain}".encode()))
    request.scope["headers"] = headers


def _asked(request: Request, size: int) -> list[tuple[int, int]]:
    """[start, end) of each range of the header; empty: nothing that is to be obeyed."""
    unit, _, text = request.headers.get("range", "").strip().partition("=")
    if unit.lower() != "bytes" or text.count(",") >= FileResponse.max_ranges:
        return []
    ranges = []
    for part in filter(str.strip, text.split(",")):
        found = _RANGE.fullmatch(part)
        if found is None or found.groups() == ("", ""):
            return []
        first, last = found.groups()
        if not first:
            ranges.append((max(0, size - _number(last)), size))
        elif last and _number(last) < _number(first):
            return []
        else:
            ranges.append((_number(first), min(_number(last) + 1 if last else size, size)))
    return ranges


def _number(digits: str) -> int:
    """At most as large as any file."""
    return int(digits) if len(digits) <= 18 else sys.maxsize


def _inside(part: tuple[int, int]) -> bool:
    return part[0] < part[1]


def _outside(request: Request, size: int) -> ApiError:
    return ApiError(
        416,
        f"The range {request.headers['range'][:100]!r} is outside of the file, which has {size} bytes.",
        code="range_not_satisfiable",
        param="Range",
        headers={"Content-Range": f"bytes */{size}"},
    )


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

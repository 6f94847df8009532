"""A completion asked over HTTP at the least cost to the process that asks: a connection of its own, nothing parsed.

httpx keeps hundreds of connections in a list that it walks at every turn: with 600 requests in flight it was seen to
take 30 s of processor at once, in which nothing was asked of the server.
"""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any


async def complete(port: int, body: dict[str, Any], times: list[float], key: str = "") -> None:
    """`times`: when it was sent, then when each event came, or the answer where body has no `stream`. RuntimeError if
    it fails."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
    try:
        payload = json.dumps({"temperature": 0, "ignore_eos": True, **body}).encode()
        head = "POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nConnection: close"
        if key:
            head += f"\r\nAuthorization: Bearer {key}"
        writer.write(f"{head}\r\nContent-Length: {len(payload)}\r\n\r\n".encode() + payload)
        times.append(time.perf_counter())
        status = await reader.readline()
        if b" 200 " not in status:
            raise RuntimeError((status + await reader.read()).decode())
        if not body.get("stream"):
            answer = await reader.read()
            times.append(time.perf_counter())
            if b'"finish_reason"' not in answer:
                raise RuntimeError(f"an answer of {body['model']} broke off: {answer[-200:]!r}")
            return
        ended = False
        async for line in reader:
            if line.startswith(b"data: {"):
                times.append(time.perf_counter())
            elif line.startswith(b"event: error"):
                raise RuntimeError((await reader.read()).decode())
            ended = ended or line.startswith(b"data: [DONE]")
        if not ended or len(times) < 2:
            raise RuntimeError(f"a stream of {body['model']} broke off after {len(times) - 1} events")
    finally:
        writer.close()

"""Completions asked over HTTP at the least cost to the process that asks, and floods of them from one of its own.

Each has a connection of its own, and nothing is parsed. httpx keeps connections in a list that it walks at every turn:
with 600 requests in flight it was seen to take 30 s of processor at once, in which nothing was asked of the server.
Nothing here imports torch: a full collection of all that it brings takes 0.15 s, which would seem to be the server's.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import multiprocessing
import random
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Event
from typing import Any


async def complete(
    port: int, body: dict[str, Any], times: list[float], key: str = "", headers: Mapping[str, str] | None = None
) -> None:
    """`times`: when it was sent, then when each event came, or the answer where body has no `stream`. RuntimeError if
    it fails."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
    try:
        payload = json.dumps({"temperature": 0, "ignore_eos": True, **body}).encode()
        head = "POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nConnection: close"
        if key:
            head += f"\r\nAuthorization: Bearer {key}"
        head += "".join(f"\r\n{name}: {value}" for name, value in (headers or {}).items())
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


@dataclass
class Load:
    """How requests are made: all alike, but for their prompts, of which none finds another's in the prefix cache."""

    port: int
    vocabulary: int
    prompt: int
    output: int
    seed: int
    rng: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)

    async def ask(self, key: str, *, stream: bool = True) -> tuple[float, list[float]]:
        """(seconds to the first token, seconds between two events after it). RuntimeError if it fails. stream False:
        the answer comes in one piece, which costs this process least."""
        body = {
            "model": "base",
            "prompt": [self.rng.randrange(3, self.vocabulary) for _ in range(self.prompt)],
            "max_tokens": self.output,
            "stream": stream,
        }
        times: list[float] = []
        await complete(self.port, body, times, key)
        return times[1] - times[0], [b - a for a, b in itertools.pairwise(times[1:])]


@contextmanager
def flooding(load: Load, key: str, count: int, *, stream: bool = True) -> Iterator[list[float]]:
    """`count` requests in flight, from a process of its own, until the block ends; those that then run are broken off.
    The list holds the seconds between events when all has ended. RuntimeError, then, if a request has failed."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    stop = context.Event()
    process = context.Process(target=_flood, args=(load, key, count, stream, stop, sender))
    process.start()
    sender.close()
    gaps: list[float] = []
    try:
        receiver.recv()  # it has begun
        yield gaps
    finally:
        stop.set()
        try:
            found = receiver.recv()
        except EOFError:
            found = "the flood's process ended"
        process.join()
    if isinstance(found, str):
        raise RuntimeError(found)
    gaps += found


def _flood(load: Load, key: str, count: int, stream: bool, stop: Event, sender: Connection) -> None:
    gaps: list[float] = []

    async def one() -> None:
        while True:
            gaps.extend((await load.ask(key, stream=stream))[1])

    async def keep() -> None:
        tasks = [asyncio.create_task(one()) for _ in range(count)]
        ended: set[asyncio.Task[None]] = set()
        while not stop.is_set() and not ended:  # only failed ones end by themselves
            ended, _ = await asyncio.wait(tasks, timeout=0.05, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        for result in results:
            if not isinstance(result, asyncio.CancelledError):
                raise RuntimeError(f"a request of the flood failed: {result}")

    sender.send(None)
    try:
        asyncio.run(keep())
    except RuntimeError as error:
        sender.send(str(error))
        return
    sender.send(gaps)

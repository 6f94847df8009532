"""Clients that keep streams open and cost little: one over HTTP, one on the engine's own socket without HTTP.

Each runs in a process of its own, so that its CPU time can be told apart from the server's.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import random
import time
import uuid
from dataclasses import dataclass, field
from typing import Any

import uvloop

_EVENT, _DONE, _END = b"data: {", b"data: [DONE]", b"\r\n0\r\n\r\n"
_KEEP = 12
"""Bytes of the last read that are looked at again with the next one: no pattern is longer than one more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """`streams` clients at once, each sending its next request when its last one is answered, `requests` in all."""

    streams: int
    requests: int
    tokens: int
    """Generated per request."""
    prompt_tokens: int
    vocabulary: int
    model: str
    path: str = "/v1/completions"
    text: bool = False
    """The prompt is text, which the server has to tokenise, rather than ids."""
    seed: int = 0

    def prompts(self) -> list[list[int]]:
        rng = random.Random(self.seed)
        return [[rng.randrange(100, self.vocabulary) for _ in range(self.prompt_tokens)] for _ in range(self.requests)]

    def body(self, ids: list[int]) -> bytes:
        # About one token for each: a word with its space, from a handful that no tokeniser splits.
        words = ("the", "time", "people", "world", "house", "water", "name", "light")
        text = " ".join(words[id % len(words)] for id in ids)
        chat = self.path.endswith("chat/completions")
        prompt = {"messages": [{"role": "user", "content": text}]} if chat else {"prompt": text if self.text else ids}
        body = {
            "model": self.model, **prompt, "max_tokens": self.tokens, "temperature": 0, "ignore_eos": True,
            "stream": True, "stream_options": {"include_usage": True},
        }  # fmt: skip
        return json.dumps(body, separators=(",", ":")).encode()


@dataclass(slots=True)
class Sample:
    """What a client saw. Seconds; `itl`: between two arrivals of a stream."""

    wall_s: float = 0.0
    cpu_s: float = 0.0
    arrivals: int = 0
    errors: list[str] = field(default_factory=list)
    ttft: list[float] = field(default_factory=list)
    itl: list[float] = field(default_factory=list)


class _Client(asyncio.Protocol):
    """One connection with one request at a time. Reads no JSON: it counts events and notes when they came."""

    def __init__(self, head: bytes, bodies: list[bytes], sample: Sample) -> None:
        self._head, self._bodies, self._sample = head, bodies, sample
        self.finished = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: Any = transport
        self._next()

    def _next(self) -> None:
        if not self._bodies:
            self._transport.close()
            return
        body = self._bodies.pop()
        self._tail, self._last, self._done = b"", 0.0, False
        self._sent = time.perf_counter()
        self._transport.write(self._head % len(body) + body)

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        data = self._tail + data
        # A pattern that lay in the old tail as a whole has been counted.
        if events := data.count(_EVENT) - self._tail.count(_EVENT):
            if self._last:
                self._sample.itl.append(now - self._last)
            else:
                self._sample.ttft.append(now - self._sent)
            self._last = now
            self._sample.arrivals += events
        self._done = self._done or _DONE in data
        if data.endswith(_END):
            if not self._done:
                self._sample.errors.append(data[-200:].decode(errors="replace"))
            self._next()
        elif not data.startswith(b"HTTP/1.1 200") and not self._last:
            self._sample.errors.append(data[-300:].decode(errors="replace"))
            self._transport.close()
        else:
            self._tail = data[-_KEEP:]

    def connection_lost(self, exc: Exception | None) -> None:
        if exc is not None or not self._transport.is_closing():
            self._sample.errors.append(repr(exc))
        self.finished.set_result(None)


async def _over_http(load: Load, port: int) -> Sample:
    sample = Sample()
    head = (
        f"POST {load.path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    ).encode()
    bodies = [load.body(ids) for ids in load.prompts()]
    loop = asyncio.get_running_loop()
    cpu, begin = time.process_time(), time.perf_counter()
    clients = [
        (await loop.create_connection(lambda: _Client(head, bodies, sample), "127.0.0.1", port))[1]
        for _ in range(load.streams)
    ]
    await asyncio.gather(*(client.finished for client in clients))
    sample.wall_s, sample.cpu_s = time.perf_counter() - begin, time.process_time() - cpu
    sample.arrivals -= load.requests  # the usage events
    return sample


async def _direct(load: Load, address: str) -> Sample:
    from service.engine.client import EngineClient
    from service.engine.messages import SamplingParams, Submit

    sample = Sample()
    prompts = load.prompts()
    sampling = SamplingParams(temperature=0.0, max_tokens=load.tokens)
    client = EngineClient(address)
    await client.connect()
    await client.wait_ready(60)
    cpu, begin = time.process_time(), time.perf_counter()

    async def stream() -> None:
        while prompts:
            last, sent = 0.0, time.perf_counter()
            submit = Submit(request_id=uuid.uuid4().hex, prompts=[prompts.pop()], sampling=sampling)
            async with client.submit(submit) as deltas:
                async for _ in deltas:
                    now = time.perf_counter()
                    if last:
                        sample.itl.append(now - last)
                    else:
                        sample.ttft.append(now - sent)
                    last = now
                    sample.arrivals += 1

    await asyncio.gather(*(stream() for _ in range(load.streams)))
    sample.wall_s, sample.cpu_s = time.perf_counter() - begin, time.process_time() - cpu
    await client.close()
    return sample


def _child(pipe: Any, load: Load, target: int | str) -> None:
    work = _over_http(load, target) if isinstance(target, int) else _direct(load, target)
    pipe.send(uvloop.run(work))


def run(load: Load, target: int | str) -> Sample:
    """`target`: the port to send requests to, or the address of the engine's socket."""
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(send, load, target))
    process.start()
    send.close()
    try:
        sample: Sample = receive.recv()
    finally:
        process.join()
    return sample

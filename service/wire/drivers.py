"""Who runs flows: blocking, or in an event loop. With streams.py, all that differs between the two clients."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any, TypeVar

import anyio
import httpx
from anyio import to_thread

from service.wire.errors import LoraplexError, ProtocolError, api_error
from service.wire.files import CHUNK, FileSink
from service.wire.flows import Flow, Open, PageOf, Reply, Request, Run, Save, Send, Sleep, Step, Streamed, with_retries
from service.wire.server import Server, sending, translated
from service.wire.streams import AsyncStream, Stream

T = TypeVar("T")


class SyncDriver:
    """Runs flows with a httpx.Client; several threads may share one."""

    def __init__(self, server: Server, transport: httpx.BaseTransport | None) -> None:
        self.server = server
        self.http = httpx.Client(**server.options(), transport=transport)

    def run(self, flow: Flow[T]) -> T:
        flow = with_retries(flow, self.server.max_retries)
        try:
            step = next(flow)
            while True:
                try:
                    result = self._take(step)
                except LoraplexError as error:
                    step = flow.throw(error)
                else:
                    step = flow.send(result)
        except StopIteration as done:
            value: T = done.value
            return value
        finally:
            flow.close()

    def stream(self, flow: Flow[Streamed]) -> Stream:
        return Stream(self.run(flow).response, self.server.url)

    def pages(self, page_of: PageOf[T]) -> Iterator[T]:
        after: str | None = None
        while True:
            page = self.run(page_of(after))
            yield from page.items
            if (after := page.after) is None:
                return

    def _take(self, step: Step) -> Any:
        match step:
            case Sleep():
                time.sleep(step.seconds)
            case Run():
                return step.work()
            case Open():
                return self._open(step.request)
            case Send():
                response = self._open(step.request)
                with translated(self.server.url), contextlib.closing(response):
                    return Reply(response.status_code, response.headers, response.read())
            case Save():
                response = self._open(step.request)
                with translated(self.server.url), contextlib.closing(response):
                    _begin(response, step.sink)
                    for piece in response.iter_bytes(CHUNK):
                        step.sink.write(piece)
                        step.sink.report()
        return None

    def _open(self, request: Request) -> httpx.Response:
        with translated(self.server.url):
            with sending(self.server.build(self.http, request)) as built:
                response = self.http.send(built, stream=True)
            if not response.is_success:
                with contextlib.closing(response):
                    raise api_error(response.status_code, response.headers, response.read())
            return response

    def close(self) -> None:
        self.http.close()


class AsyncDriver:
    """Runs flows with a httpx.AsyncClient, on asyncio or trio; files are read and written in threads."""

    def __init__(self, server: Server, transport: httpx.AsyncBaseTransport | None) -> None:
        self.server = server
        self.http = httpx.AsyncClient(**server.options(), transport=transport)

    async def run(self, flow: Flow[T]) -> T:
        flow = with_retries(flow, self.server.max_retries)
        try:
            step = next(flow)
            while True:
                try:
                    result = await self._take(step)
                except LoraplexError as error:
                    step = flow.throw(error)
                else:
                    step = flow.send(result)
        except StopIteration as done:
            value: T = done.value
            return value
        finally:
            flow.close()

    async def stream(self, flow: Flow[Streamed]) -> AsyncStream:
        return AsyncStream((await self.run(flow)).response, self.server.url)

    async def pages(self, page_of: PageOf[T]) -> AsyncIterator[T]:
        after: str | None = None
        while True:
            page = await self.run(page_of(after))
            for item in page.items:
                yield item
            if (after := page.after) is None:
                return

    async def _take(self, step: Step) -> Any:
        match step:
            case Sleep():
                await anyio.sleep(step.seconds)
            case Run():
                return await to_thread.run_sync(step.work)
            case Open():
                return await self._open(step.request)
            case Send():
                response = await self._open(step.request)
                with translated(self.server.url):
                    async with contextlib.aclosing(response):
                        return Reply(response.status_code, response.headers, await response.aread())
            case Save():
                response = await self._open(step.request)
                with translated(self.server.url):
                    async with contextlib.aclosing(response):
                        _begin(response, step.sink)
                        async for piece in response.aiter_bytes(CHUNK):
                            await to_thread.run_sync(step.sink.write, piece)
                            step.sink.report()
        return None

    async def _open(self, request: Request) -> httpx.Response:
        with translated(self.server.url):
            with sending(self.server.build(self.http, request)) as built:
                response = await self.http.send(built, stream=True)
            if not response.is_success:
                async with contextlib.aclosing(response):
                    raise api_error(response.status_code, response.headers, await response.aread())
            return response

    async def close(self) -> None:
        await self.http.aclose()


def _begin(response: httpx.Response, sink: FileSink) -> None:
    """Where in the file the body belongs."""
    if response.status_code != 206:
        sink.restart()
        return
    span = response.headers.get("content-range", "")
    if not span.startswith(f"bytes {sink.size}-"):
        raise ProtocolError(f"asked for the bytes from {sink.size} on, got {span[:100]!r}")

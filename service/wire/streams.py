"""Answers that are read while they are being made."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from types import TracebackType

import httpx

from service.wire.errors import ProtocolError, StreamCut, stream_error
from service.wire.records import Chunk, read_chunk
from service.wire.server import translated
from service.wire.sse import Decoder, Event


class _Events:
    """What both streams share: from bytes to chunks, and whether all came."""

    def __init__(self, response: httpx.Response, url: str) -> None:
        self._response = response
        self._url = url
        self._decoder = Decoder()
        self._done = False
        self.adapter: str | None = response.headers.get("x-loraplex-adapter")
        """Which versions answer (`name@version`, several separated by commas); None: the base."""
        self.request_id: str | None = response.headers.get("x-request-id")

    def _chunks(self, piece: bytes) -> Iterator[Chunk]:
        for event in self._decoder.feed(piece):
            if self._done:
                return
            if event.data == "[DONE]":
                self._done = True
                return
            yield self._chunk(event)

    def _chunk(self, event: Event) -> Chunk:
        if event.name == "error":
            raise stream_error(event.data)
        try:
            return read_chunk(json.loads(event.data))
        except ValueError:
            raise ProtocolError(f"an event that is not JSON: {event.data[:100]!r}") from None

    def _check_end(self) -> None:
        if not self._done:
            raise StreamCut(f"the stream from {self._url} ended before its end")


class Stream(_Events):
    """The chunks of an answer as they come. Closing it, or leaving its `with` block, ends the generation."""

    def __iter__(self) -> Iterator[Chunk]:
        try:
            with translated(self._url):
                for piece in self._response.iter_bytes():
                    yield from self._chunks(piece)
                    if self._done:
                        break
            self._check_end()
        finally:
            self.close()

    def close(self) -> None:
        self._response.close()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


class AsyncStream(_Events):
    """Like Stream, for `async for` and `async with`."""

    async def __aiter__(self) -> AsyncIterator[Chunk]:
        try:
            with translated(self._url):
                async for piece in self._response.aiter_bytes():
                    for chunk in self._chunks(piece):
                        yield chunk
                    if self._done:
                        break
            self._check_end()
        finally:
            await self.close()

    async def close(self) -> None:
        await self._response.aclose()

    async def __aenter__(self) -> AsyncStream:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.close()

"""uvicorn's HTTP protocol with limits, so that no client holds a connection, and what hangs on it, by doing nothing.

uvicorn itself knows one: an idle connection is closed between requests (timeout_keep_alive). Added here are, each per
connection and out of Settings:

- header_timeout_s: for the whole head of a request, from its first byte or from the connection's start. 408.
- body_timeout_s: in each such span a body has to gain MIN_BODY_RATE bytes for every second, or be complete. Time in
  which the application does not take what has come does not count. 408. After the answer, what is left of an unread
  body gets no more than the span at hand.
- write_timeout_s: what has been written must flow off. The transport's buffer may stay above its high-water mark, or
  non-empty after the end of the connection, for so long; then the connection is aborted, which ends its request as any
  disconnect does.
- MAX_HEAD_BYTES for a head, and for what comes in the place of a body's next piece (trailers). 431.
- MAX_PIPELINED requests, of MAX_WAITING_BYTES together, behind the one that is being answered. 400.
- max_connections: beyond it a request is answered 503.

Peers that vanished without a word are the kernel's business: `tune_listener`.
"""

from __future__ import annotations

import asyncio
import math
import resource
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from typing import Any, NoReturn, cast

import msgspec
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from service.api.deps import WRITE
from service.api.failure import ApiError
from service.settings import Settings

MIN_BODY_RATE = 500
"""Bytes a second; slower than any line that somebody still uses."""
MAX_HEAD_BYTES = 64 << 10
MAX_PIPELINED = 16
"""uvicorn itself stops reading behind the first, but only after all that came with it: thousands of requests, each with
its scope, and again as many with every answer."""
KEEPALIVE_IDLE_S, KEEPALIVE_INTERVAL_S, KEEPALIVE_PROBES = 30, 10, 3
"""TCP's: a peer that vanished while nothing was being sent is noticed after 60 s."""
MAX_WAITING_BYTES = 256 << 10
"""Nobody has looked yet at whose they are."""
_SPARE_FILES = 256
"""File descriptors for everything but connections."""
_MOST_FILES = 1 << 16
_SPARE_CONNECTIONS = 64
"""So many above max_connections are still told why they are not served."""


@dataclass(frozen=True, slots=True)
class Limits:
    header_s: float
    body_s: float
    write_s: float
    connections: int


def protocol_class(settings: Settings) -> type[LimitedProtocol]:
    """For uvicorn.Config(http=...). Raises this process's limit of open files, if it may."""

    class Configured(LimitedProtocol):
        limits = Limits(
            settings.header_timeout_s,
            settings.body_timeout_s,
            settings.write_timeout_s,
            min(settings.max_connections, max(1, _raised_file_limit() - _SPARE_FILES)),
        )

    return Configured


def _raised_file_limit() -> int:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, _MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        soft = wanted
    return _MOST_FILES if soft == resource.RLIM_INFINITY else soft


def tune_listener(listener: socket.socket, settings: Settings) -> None:
    """What every accepted connection inherits: the kernel gives up on a peer that acknowledges nothing, or lets nothing
    in, for write_timeout_s, and asks after one that is silent. Linux; elsewhere the system's own values hold."""
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (
        ("TCP_KEEPIDLE", KEEPALIVE_IDLE_S),
        ("TCP_KEEPINTVL", KEEPALIVE_INTERVAL_S),
        ("TCP_KEEPCNT", KEEPALIVE_PROBES),
        ("TCP_USER_TIMEOUT", math.ceil(settings.write_timeout_s * 1000)),
    ):
        if hasattr(socket, option):
            listener.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


class LimitedProtocol(HttpToolsProtocol):
    """One connection. At any time at most two timers run: `_reading` while a request is awaited or incomplete,
    `_writing` while the client does not take what was written."""

    limits: Limits

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._reading: asyncio.TimerHandle | None = None
        self._writing: asyncio.TimerHandle | None = None
        self._awaits_head = False
        self._unread = 0  # bytes since the last that ended a head or belonged to a body
        self._gained = 0  # bytes of body in the span at hand
        self._asked = False  # whether the application took all that came when the span began
        self._running: RequestResponseCycle | None = None  # the request being answered; self.cycle is the newest
        self._waiting: dict[RequestResponseCycle, int] = {}  # bytes of those behind it
        self._waiting_bytes = 0
        self._error: ApiError | None = None  # what send_400_response is to say instead

    # ------------------------------------------------------------ the transport's calls

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.limits.connections + _SPARE_CONNECTIONS:
            transport.abort()
        else:
            self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_reading_timer()
        if self._writing is not None:
            self._writing.cancel()
            self._writing = None
        super().connection_lost(exc)
        # uvicorn tells the newest request alone, which may be one that waits behind the one that runs.
        self.pipeline.clear()
        self._waiting.clear()
        if self._running is not None and not self._running.response_complete:
            self._running.disconnected = True
            self._running.message_event.set()

    def data_received(self, data: bytes) -> None:
        if self._reading is None:
            self._await_head()
        self._unread += len(data)
        super().data_received(data)
        if self._unread > MAX_HEAD_BYTES and not self.transport.is_closing():
            self._refuse(_head_too_large())

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_writing()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._writing is not None:
            self._writing.cancel()
            self._writing = None
        self._watch_closing()

    # ------------------------------------------------------------ the parser's calls

    def on_message_begin(self) -> None:
        super().on_message_begin()
        if not self._awaits_head:  # pipelined
            self._await_head()

    def on_headers_complete(self) -> None:
        size = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
        if size > MAX_HEAD_BYTES:
            self._stop(_head_too_large())
        if len(self.pipeline) >= MAX_PIPELINED:
            self._stop(_too_many_pipelined())
        if len(self.connections) > self.limits.connections:
            self.app = _too_many_connections
        super().on_headers_complete()
        if self.pipeline and self.pipeline[0][0] is self.cycle:
            self._waiting[self.cycle] = 0
            self._wait(size)
        if self.cycle is not None and self.cycle.scope is self.scope:  # its application starts in the next iteration
            extensions = cast(dict[str, Any], self.scope.setdefault("extensions", {}))
            extensions[WRITE] = partial(_write, self.cycle)
        self._unread = 0
        self._awaits_head = False
        self._start_span()

    def on_body(self, body: bytes) -> None:
        self._unread = 0
        self._gained += len(body)
        super().on_body(body)
        if self.cycle in self._waiting:
            self._wait(len(body))

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._unread = 0
        self._stop_reading_timer()

    def _wait(self, more: int) -> None:
        """The newest request waits, with so many bytes more. uvicorn has paused reading for it; it goes on, so that it
        is seen when the client leaves."""
        self._waiting[self.cycle] += more
        self._waiting_bytes += more
        if self._waiting_bytes > MAX_WAITING_BYTES:
            self._stop(_too_many_pipelined())
        self.flow.resume_reading()

    def _stop(self, error: ApiError) -> NoReturn:
        """Makes the parser stop; uvicorn then calls send_400_response."""
        self._error = error
        raise ValueError(error.message)

    # ------------------------------------------------------------ uvicorn's own steps

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        self._waiting_bytes -= self._waiting.pop(cycle, 0)
        super()._start_asgi_task(cycle, app)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch_closing()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._watch_closing()

    def shutdown(self) -> None:
        super().shutdown()
        self._watch_closing()

    def send_400_response(self, msg: str) -> None:
        """Also what is no HTTP is answered in the shape of all errors."""
        error, self._error = self._error, None
        self._refuse(error or ApiError(400, msg, code="invalid_http"))

    def _unsupported_upgrade_warning(self) -> None:
        """Requests that offer another protocol are answered in this one, which is nothing to warn of."""

    # ------------------------------------------------------------ reading

    def _await_head(self) -> None:
        self._awaits_head = True
        self._start_reading_timer(self.limits.header_s, self._head_late)

    def _head_late(self) -> None:
        if self._answering:  # bytes after a request whose answer is not complete: no reason to break that off
            self._await_head()
        elif self._unread:
            self._refuse(ApiError(408, "The head of the request took too long.", code="request_timeout"))
        else:
            self._close()

    def _start_span(self) -> None:
        self._gained = 0
        self._asked = self._application_waits
        self._start_reading_timer(self.limits.body_s, self._span_over)

    def _span_over(self) -> None:
        if self.cycle.response_complete:
            self._close()
        elif self._asked and self._application_waits and self._gained < MIN_BODY_RATE * self.limits.body_s:
            self._refuse(ApiError(408, "The body of the request stalled, or came too slowly.", code="request_timeout"))
        else:
            self._start_span()

    @property
    def _application_waits(self) -> bool:
        """Whether more of the body can only come from the client."""
        waits = self.cycle is self._running
        return waits and not (self.flow.read_paused or self.cycle.body or self.cycle.waiting_for_100_continue)

    @property
    def _answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _start_reading_timer(self, seconds: float, callback: Callable[[], None]) -> None:
        if self._reading is not None:
            self._reading.cancel()
        self._reading = self.loop.call_later(seconds, callback)

    def _stop_reading_timer(self) -> None:
        self._awaits_head = False
        if self._reading is not None:
            self._reading.cancel()
            self._reading = None

    def _refuse(self, error: ApiError) -> None:
        """Says why, unless an answer is under way already, and ends the connection."""
        running = self._running
        if running is not None and running.response_started and not running.response_complete:
            self.transport.abort()
            return
        status = HTTPStatus(error.status)
        body = msgspec.json.encode(error.body())
        head = (
            f"HTTP/1.1 {status.value} {status.phrase}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode("ascii") + body)
        self._close()

    # ------------------------------------------------------------ writing

    def _close(self) -> None:
        self._stop_reading_timer()
        self.transport.close()
        self._watch_closing()

    def _watch_closing(self) -> None:
        """A transport that was closed lives on until its buffer is empty."""
        if self.transport.is_closing() and self.transport.get_write_buffer_size():
            self._watch_writing()

    def _watch_writing(self) -> None:
        if self._writing is None:
            self._writing = self.loop.call_later(self.limits.write_s, self._reset)

    def _reset(self) -> None:
        """Ends the connection, and what the kernel still has of it: the client must not take what it reads of that for
        a whole answer, nor keep the kernel's memory by reading on slowly."""
        if (connection := self.transport.get_extra_info("socket")) is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.transport.abort()


async def _write(cycle: RequestResponseCycle, data: bytes) -> None:
    """What `cycle.send` does with a piece of the body once the head is sent."""
    if not cycle.chunked_encoding or cycle.response_complete:
        await cycle.send({"type": "http.response.body", "body": data, "more_body": True})
        return
    if cycle.flow.write_paused and not cycle.disconnected:
        await cycle.flow.drain()
    if data and not cycle.disconnected:
        cycle.transport.write(b"%x\r\n%b\r\n" % (len(data), data))


def _too_many_pipelined() -> ApiError:
    message = (
        f"More than {MAX_PIPELINED} requests, or {MAX_WAITING_BYTES} bytes of them, wait on this connection for the "
        "answer to another."
    )
    return ApiError(400, message, code="too_many_pipelined")


def _head_too_large() -> ApiError:
    return ApiError(431, f"The head of the request is larger than {MAX_HEAD_BYTES} bytes.", code="head_too_large")


async def _too_many_connections(scope: Scope, receive: Receive, send: Send) -> None:
    error = ApiError(503, "The server has too many connections.", code="too_many_connections", retry_after_s=1.0)
    error.headers["Connection"] = "close"
    await error.response()(scope, receive, send)

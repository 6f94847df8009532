"""Calls without input and output of their own.

A flow is a generator that yields steps and is sent their results: whoever drives it (service/wire/drivers.py) does the
waiting, blocking or in an event loop. So paging, polling, retrying and resuming are written once.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import httpx

from service.wire.errors import LoraplexError, ProtocolError, RateLimited, StreamCut, Unavailable
from service.wire.files import FileSink, Upload

T = TypeVar("T")

MAX_PAUSE_S = 30.0
"""A server that asks for a longer pause is not waited for: the error says how long."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """`repeatable`: to send it twice does what sending it once does, so that it may be tried again."""

    method: str = "GET"
    path: str
    params: Mapping[str, str | int | float | bool | None] = field(default_factory=dict)
    """Those that are None are not sent."""
    json: Any = None
    headers: Mapping[str, str] = field(default_factory=dict)
    upload: Upload | None = None
    repeatable: bool = True
    timeout_s: float | None = None
    """Of every single wait; None: the client's."""

    @property
    def forgets_itself(self) -> bool:
        """Whether it is answered alike where the server has carried it out already: a second deletion finds nothing,
        and an etag is another one then."""
        return self.method != "DELETE" and "If-Match" not in self.headers


@dataclass(frozen=True, slots=True)
class Reply:
    """A successful answer that has been read."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        try:
            return json.loads(self.body)
        except ValueError:
            start = self.body[:100].decode("utf-8", "replace")
            raise ProtocolError(f"the answer is not JSON: {start!r}; is this a loraplex server?") from None


@dataclass(frozen=True, slots=True)
class Send:
    """-> Reply. Raises ApiError unless the answer is a success."""

    request: Request


@dataclass(frozen=True, slots=True)
class Open:
    """-> the open httpx.Response, whose body is still to come."""

    request: Request


@dataclass(frozen=True, slots=True)
class Save:
    """-> None; the body is in the sink."""

    request: Request
    sink: FileSink


@dataclass(frozen=True, slots=True)
class Run:
    """-> what `work` returns; it may take long, and uses files."""

    work: Callable[[], Any]


@dataclass(frozen=True, slots=True)
class Sleep:
    """-> None"""

    seconds: float


Step = Send | Open | Save | Run | Sleep
Flow = Generator[Step, Any, T]


def send(request: Request) -> Flow[Reply]:
    reply: Reply = yield Send(request)
    return reply


def run(work: Callable[[], T]) -> Flow[T]:
    result: T = yield Run(work)
    return result


def json_of(method: str, path: str, **more: Any) -> Flow[Any]:
    """One request; the JSON of its answer."""
    reply = yield from send(Request(method=method, path=path, **more))
    return reply.json()


@dataclass(frozen=True, slots=True)
class Streamed:
    """What a flow of a streaming call returns: the response whose events are to be read."""

    response: httpx.Response


@dataclass(frozen=True, slots=True)
class Page(Generic[T]):
    """A part of a list; `after` asks for the next one, None: this is the last."""

    items: list[T]
    after: str | None


PageOf = Callable[[str | None], Flow[Page[T]]]
"""The page behind a cursor."""


def pages(path: str, read: Callable[[Any], T], *, first: str | None = None, **params: Any) -> PageOf[T]:
    """The pages of the list at `path`; only what is behind the cursor `first`."""

    def page(after: str | None) -> Flow[Page[T]]:
        body = yield from json_of("GET", path, params={**params, "after": after or first})
        try:
            items, more, last = body["data"], body["has_more"], body["last_id"]
        except (TypeError, KeyError):
            raise ProtocolError(f"{path} did not answer with a list") from None
        return Page([read(item) for item in items], last if more and items else None)

    return page


def with_retries(flow: Flow[T], most: int) -> Flow[T]:
    """The same flow, but repeatable requests that were put off or lost are sent again, up to `most` times each."""
    try:
        step = next(flow)
        while True:
            try:
                result = yield from _attempts(step, most)
            except LoraplexError as error:
                step = flow.throw(error)
            else:
                step = flow.send(result)
    except StopIteration as done:
        value: T = done.value
        return value
    finally:
        flow.close()


def _attempts(step: Step, most: int) -> Flow[Any]:
    attempt = 0
    while True:
        try:
            return (yield step)
        except LoraplexError as error:
            pause = _pause(step, error, attempt)
            if pause is None or attempt == most:
                raise
        attempt += 1
        yield Sleep(pause)


def _pause(step: Step, error: LoraplexError, attempt: int) -> float | None:
    """Seconds until the next attempt; None: there is none.

    429 and 503 only where the server says when to come back: a 503 without that will not mend itself. A connection
    that was cut is most often one that the server closed as this request was sent. One that was refused is not tried
    again: whoever waits for a server to start calls wait_until_ready.
    """
    if not isinstance(step, Send | Open) or not step.request.repeatable:
        return None
    if isinstance(error, RateLimited | Unavailable):
        if error.retry_after is None or error.retry_after > MAX_PAUSE_S:
            return None
        return error.retry_after + random.uniform(0, 0.1)
    if isinstance(error, StreamCut) and step.request.forgets_itself:
        return 0.1 * 2.0**attempt
    return None

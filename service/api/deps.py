"""What routes are handed, and what happens around a request: its id, its log line, its end when the client leaves."""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated

import structlog
from fastapi import Depends, Request
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service import log
from service.api.departure import Departure
from service.api.errors import ClientGone, as_api_error
from service.engine.client import EngineClient
from service.metrics import Metrics
from service.settings import Settings
from service.store.catalogue import Catalogue
from service.store.usage import UsageTable
from service.tokenizer import Tokenizer
from service.tracing import Traces
from service.usage import UsageRecorder

_REQUEST_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}")
_access = log.get("service.access")

WRITE = "loraplex.write"
"""Extension of the ASGI scope (http_protocol.py), may be absent: writes a piece of a body whose length was not said. It
does what `send` does, without the four middlewares through which each event would pass though none looks at it."""


SECURITY_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
)
"""Of every answer: it is what its Content-Type says, no page of others shows it, and no address goes to other sites."""


@dataclass(slots=True)
class Services:
    """What the inference routes use; made by app.py, found at `request.app.state.services`."""

    settings: Settings
    base_name: str
    tokenizer: Tokenizer
    engine: EngineClient
    catalogue: Catalogue
    metrics: Metrics
    recorder: UsageRecorder
    usage: UsageTable
    traces: Traces | None = None
    started_at: float = field(default_factory=time.time)
    """Seconds since the epoch."""


async def get_services(request: Request) -> Services:
    # Not a plain function: FastAPI would call that in a thread.
    services: Services = request.app.state.services
    return services


ServicesDep = Annotated[Services, Depends(get_services)]


class EventStream(Response):
    """Server-sent events, written as the generator makes them. When the client leaves, the generator is closed at once.
    However it ends, `finish` is called once, before the last byte goes out.

    Starlette's StreamingResponse notices a client that left only when it next writes. The generator's own end would not
    do for `finish`: one that is closed before it has begun runs nothing of itself.
    """

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        headers: Mapping[str, str],
        departure: Departure,
        finish: Callable[[], Awaitable[None]],
    ) -> None:
        # no-transform and X-Accel-Buffering keep proxies from gathering events.
        super().__init__(
            None,
            200,
            {**headers, "cache-control": "no-cache, no-transform", "x-accel-buffering": "no"},
            "text/event-stream",
        )
        del self.headers["content-length"]
        self._events = events
        self._departure = departure
        self._finish: Callable[[], Awaitable[None]] | None = finish

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with self._departure.interrupts():
                await self._write(send, scope.get("extensions", {}).get(WRITE))
        except ClientGone:
            scope["state"]["disconnected"] = True
        finally:
            self._departure.close()
            await self._end()

    async def _end(self) -> None:
        finish, self._finish = self._finish, None
        if finish is not None:
            try:
                await self._events.aclose()
            finally:
                await finish()

    async def _write(self, send: Send, write: Callable[[bytes], Awaitable[None]] | None) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})

        async def through_middlewares(event: bytes) -> None:
            await send({"type": "http.response.body", "body": event, "more_body": True})

        write = write or through_middlewares
        async for event in self._events:
            await write(event)
        await self._end()
        await send({"type": "http.response.body", "body": b"", "more_body": False})


class RequestScope:
    """ASGI middleware: a request id in, the same out; one access line and the HTTP metrics when the answer is complete.

    Routes add what they know to `request.state`: `adapter`, `prompt_tokens`, `completion_tokens`. `job` is what the
    engine calls the request in its own log lines and spans.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        state = scope["state"] = {**scope.get("state", {}), "request_id": request_id}
        status = 0

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
                message["headers"] = [*message["headers"], *SECURITY_HEADERS]
            await send(message)

        services: Services | None = getattr(scope["app"].state, "services", None) if "app" in scope else None
        metrics = services.metrics if services is not None else None
        trace = None
        structlog.contextvars.clear_contextvars()
        structlog.contextvars.bind_contextvars(request_id=request_id)
        if services is not None and services.traces is not None:
            trace = services.traces.begin(scope, request_id)
            if trace is not None:
                state["trace"] = trace
                structlog.contextvars.bind_contextvars(trace_id=trace.id)
        started = time.perf_counter()
        if metrics is not None:
            metrics.in_progress.inc()
        try:
            await self._app(scope, receive, answer)
        except Exception as exc:
            # What no handler took. Answered here, not by Starlette's outermost layer, which knows no request id.
            _access.error("request failed", exc_info=exc)
            if status == 0:
                error = as_api_error(exc)
                state["error_code"] = error.code
                await error.response()(scope, receive, answer)
        finally:
            seconds = time.perf_counter() - started
            route = _route(scope)
            if state.get("disconnected"):
                status = 499
            if metrics is not None:
                metrics.in_progress.dec()
                metrics.requests.labels(route, str(status)).inc()
                metrics.request_seconds.labels(route).observe(seconds)
                if status == 499:
                    metrics.disconnects.inc()
            if trace is not None:
                trace.end(scope["method"], route, status, state)
            known = {key: state[key] for key in _LOGGED if state.get(key) is not None}
            # Probes; 503 is what /ready says while the engine starts, twice a second to whoever waits for it.
            quiet = route in ("/health", "/ready", "/metrics") and (status < 400 or status == 503)
            (_access.debug if quiet else _access.info)(
                "request", method=scope["method"], route=route, status=status, ms=round(seconds * 1000, 1), **known
            )


_LOGGED = ("tenant", "key", "model", "adapter", "job", "prompt_tokens", "completion_tokens", "error_code")


def _route(scope: Scope) -> str:
    """The route's template: metrics have as many labels as there are routes, and logs hold nothing of URLs."""
    return getattr(scope.get("route"), "path", None) or "unknown"

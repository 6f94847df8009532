"""How large a request's body may be. One limit for every route; uploads, which are streamed to disk, have their own."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.failure import ApiError

_KEY = "max_body_bytes"


class BodyLimit:
    """ASGI middleware: ApiError 413 where the body is read, as soon as more is announced or comes than may come.

    Routes that read no body answer whatever is sent along.
    """

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        state = scope.setdefault("state", {})
        state[_KEY] = self._max_bytes
        declared = Headers(scope=scope).get("content-length", "")
        announced = int(declared) if declared.isdigit() and len(declared) < 20 else 0
        received = 0

        async def limited() -> Message:
            nonlocal received
            limit = state[_KEY]
            if announced > limit:
                raise _too_large(announced, limit)
            message = await receive()
            received += len(message.get("body", b""))
            if received > limit:
                raise _too_large(received, limit)
            return message

        await self._app(scope, limited, send)


def set_body_limit(scope: Scope, max_bytes: int) -> None:
    """Another limit for this request, from inside its route."""
    scope.setdefault("state", {})[_KEY] = max_bytes


def _too_large(size: int, limit: int) -> ApiError:
    message = f"The body has {size} bytes or more; at most {limit} are accepted (LORAPLEX_MAX_BODY_BYTES)."
    return ApiError(413, message, code="body_too_large")

"""The failure that a client is told of, and what its message shows of a request. Without FastAPI, which takes 0.3 s to
import: the merger, whose checks are those of an upload, starts without it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    from starlette.responses import Response

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    409: "conflict_error",
    412: "conflict_error",
    413: "invalid_request_error",
    422: "invalid_request_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
}
_SHOWN = 200


class ApiError(Exception):
    """An answer other than success. `reasons`: every single one, where there may be several."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after_s: float | None = None,
        reasons: list[str] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.reasons = reasons
        self.headers = dict(headers or {})
        if retry_after_s is not None:
            self.headers["Retry-After"] = str(max(1, math.ceil(retry_after_s)))

    def body(self) -> dict[str, Any]:
        error: dict[str, Any] = {
            "message": self.message,
            "type": _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error"),
            "code": self.code,
            "param": self.param,
        }
        if self.reasons is not None:
            error["reasons"] = self.reasons
        return {"error": error}

    def response(self) -> Response:
        from starlette.responses import Response  # whoever has nobody to answer does without

        return Response(msgspec.json.encode(self.body()), self.status, self.headers, "application/json")


def invalid(param: str, message: str, code: str | None = None) -> ApiError:
    """400: a field whose value cannot be used; `message` names both."""
    return ApiError(400, message, code=code, param=param)


def shown(value: object) -> str:
    """A value from a request, short enough for a message."""
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)  # JSON has no such number
    try:
        text = msgspec.json.encode(value).decode()
    except (TypeError, ValueError, OverflowError, RecursionError, msgspec.MsgspecError):
        try:
            text = ascii(value)
        except (ValueError, RecursionError):  # an integer of thousands of digits; nested too deeply
            text = f"of type {type(value).__name__}"
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."

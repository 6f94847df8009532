"""Everything that the client raises.

LoraplexError
 ├── ConnectionFailed       no answer: refused, reset, unknown host, TLS
 │    ├── TimedOut          it took too long
 │    └── StreamCut         an answer or a stream ended before its end
 ├── ProtocolError          an answer that is not the API's: another server, a proxy's page
 ├── LocalFileError         a folder or file on this machine that cannot be used
 ├── DamagedFile            downloaded bytes that are not those announced
 ├── MergeFailed            a merge that was waited for failed or was cancelled
 └── ApiError               the server said no: status, code, param, message, reasons, request_id, retry_after
      ├── BadRequest        400, and every other 4xx; and what the client refuses by itself, sending nothing
      ├── Unauthorized      401
      ├── Forbidden         403
      ├── NotFound          404
      ├── Conflict          409, 412
      ├── TooLarge          413
      ├── Refused           422: the adapter does not fit; `reasons` has every one
      ├── RateLimited       429
      ├── ServerError       5xx
      └── Unavailable       502, 503, 504: not now
"""

# ruff: noqa: N818 - the names say what happened
from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from service.wire.records import Merge


class LoraplexError(Exception):
    """Whatever went wrong between this client and the server."""


class ConnectionFailed(LoraplexError):
    """No answer. Whether the server has seen the request is not known."""


class TimedOut(ConnectionFailed):
    """No answer in time."""


class StreamCut(ConnectionFailed):
    """What came so far is valid, but it is not all."""


class ProtocolError(LoraplexError):
    """The answer does not have the shape that the API promises."""


class LocalFileError(LoraplexError):
    """A file or folder of this machine; the message names it."""


class DamagedFile(LoraplexError):
    """The bytes of a download do not have the announced sha256; they were deleted."""


class MergeFailed(LoraplexError):
    """`merge` is the job as it ended."""

    def __init__(self, merge: Merge) -> None:
        super().__init__(f"the merge {merge.name!r} ({merge.id}) {merge.state}: {merge.error or 'no reason given'}")
        self.merge = merge


class ApiError(LoraplexError):
    """An answer other than success. `reasons`: every single one, where the server gives several. `request_id` finds
    the request in the server's log. `retry_after`: seconds."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        reasons: tuple[str, ...] = (),
        request_id: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param
        self.message = message
        self.reasons = reasons
        self.request_id = request_id
        self.retry_after = retry_after

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, (type(self), self.status, self.message, self.__dict__)


def _restore(kind: type[ApiError], status: int, message: str, state: dict[str, Any]) -> ApiError:
    error = kind(status, message)
    error.__dict__.update(state)
    return error


class BadRequest(ApiError):
    pass


class Unauthorized(ApiError):
    pass


class Forbidden(ApiError):
    pass


class NotFound(ApiError):
    pass


class Conflict(ApiError):
    pass


class TooLarge(ApiError):
    pass


class Refused(ApiError):
    pass


class RateLimited(ApiError):
    pass


class ServerError(ApiError):
    pass


class Unavailable(ApiError):
    pass


_BY_STATUS: dict[int, type[ApiError]] = {
    401: Unauthorized,
    403: Forbidden,
    404: NotFound,
    409: Conflict,
    412: Conflict,
    413: TooLarge,
    422: Refused,
    429: RateLimited,
    502: Unavailable,
    503: Unavailable,
    504: Unavailable,
}
# In a stream that has begun, the type of the error event has to say what the status would have been.
_STATUS_BY_TYPE = {"rate_limit_error": 429, "service_unavailable_error": 503, "invalid_request_error": 400}
_SHOWN = 200


def api_error(status: int, headers: Mapping[str, str], body: bytes) -> ApiError:
    """The error that an answer stands for. Bodies that are not the API's (a proxy's page) are quoted briefly."""
    try:
        error = json.loads(body)["error"]
        message = str(error["message"])
    except (ValueError, TypeError, KeyError):
        error = {}
        text = " ".join(body.decode("utf-8", "replace").split())
        message = f"HTTP {status}: {text[:_SHOWN] or 'an empty answer'}"
        if "location" in headers:
            message = f"HTTP {status}: a redirect to {headers['location'][:_SHOWN]}; give that address instead"
    return _error(status, error, message, headers)


def stream_error(data: str) -> ApiError | ProtocolError:
    """The error that an `error` event of a stream stands for."""
    try:
        error = json.loads(data)["error"]
        message, kind = str(error["message"]), error.get("type")
    except (ValueError, TypeError, KeyError, AttributeError):
        return ProtocolError(f"an error event that cannot be read: {data[:_SHOWN]!r}")
    return _error(_STATUS_BY_TYPE.get(kind, 500), error, message, {})


def _error(status: int, error: Mapping[str, Any], message: str, headers: Mapping[str, str]) -> ApiError:
    kind = _BY_STATUS.get(status, ServerError if status >= 500 else BadRequest)
    reasons = error.get("reasons")
    try:
        retry_after = max(0.0, float(headers["retry-after"]))
    except (KeyError, ValueError):  # a date is allowed too, but this API sends seconds
        retry_after = None
    return kind(
        status,
        message,
        code=error.get("code"),
        param=error.get("param"),
        reasons=tuple(map(str, reasons)) if isinstance(reasons, list) else (),
        request_id=headers.get("x-request-id"),
        retry_after=retry_after,
    )

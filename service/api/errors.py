"""Every failure as OpenAI-shaped JSON: {"error": {"message", "type", "code", "param"}} and the status a client expects.

`ApiError` (failure.py) is what routes raise. Failures of other layers are turned into one by `as_api_error`, in one
place.
"""

from __future__ import annotations

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from adapters.errors import (
    AccountTooSmall,
    AdapterMissing,
    AdapterRefused,
    AdapterTooLarge,
    BlobDamaged,
    LoraplexAdapterError,
    StoreUnavailable,
)
from service import log
from service.api.failure import ApiError, shown
from service.engine.errors import EngineCallFailed, EngineCallTimedOut, EngineError, EngineRefused, EngineUnavailable
from service.store.errors import (
    CatalogueError,
    CatalogueUnavailable,
    CatalogueUnusable,
    Conflict,
    NotFound,
    PreconditionFailed,
    QuotaReached,
    UnstorableText,
)

FIELD_ERROR = "field"
"""Type of a validation error whose context names the field (schemas.py), as a whole request's have no location."""
RETRY_AFTER_S = 1.0
"""What a client is told to wait where nothing better is known."""


class ClientGone(Exception):  # noqa: N818 - it says what happened
    """The client closed the connection; there is nobody to answer."""


def as_api_error(exc: Exception) -> ApiError:
    """The answer to a failure of any layer. What is not known here is a 500 that gives nothing away."""
    match exc:
        case ApiError():
            return exc
        case RequestValidationError():
            return _malformed(exc)
        case HTTPException():
            return _from_starlette(exc)
        case CatalogueError():
            status = 404 if isinstance(exc, NotFound) else 409 if isinstance(exc, Conflict) else 500
            status = 412 if isinstance(exc, PreconditionFailed) else 400 if isinstance(exc, UnstorableText) else status
            if isinstance(exc, CatalogueUnavailable):
                return ApiError(exc.status, str(exc), code=exc.code, retry_after_s=exc.retry_after_s)
            status = exc.status if isinstance(exc, QuotaReached) else status
            return ApiError(status, str(exc), code=exc.code, param=exc.param)
        case EngineRefused():
            return _from_refusal(exc)
        case EngineUnavailable():
            message = f"The engine is not available: {exc}. Try again."
            return ApiError(503, message, code="engine_unavailable", retry_after_s=RETRY_AFTER_S)
        case EngineCallTimedOut():
            return ApiError(503, f"{exc}.", code="engine_timeout", retry_after_s=RETRY_AFTER_S)
        case EngineCallFailed(code="resident_limit"):
            return _resident_limit(str(exc))
        case EngineCallFailed(code="too_large"):
            return ApiError(400, str(exc), code="too_large")
        case EngineCallFailed():
            return ApiError(503, f"The engine could not do it: {exc}", code="engine_call_failed")
        case EngineError():
            return ApiError(500, "The engine failed.", code="engine_error")
        case AdapterRefused():
            reasons = [str(reason) for reason in exc.reasons]
            message = "The adapter does not fit: " + "; ".join(reasons)
            return ApiError(422, message, code="adapter_refused", reasons=reasons)
        case AdapterTooLarge():
            return ApiError(400, str(exc), code="too_large")
        case AccountTooSmall():
            return _resident_limit(str(exc))
        case AdapterMissing():
            return ApiError(404, str(exc), code="adapter_missing")
        case BlobDamaged():
            message = (
                f"The server's copy of the file {exc.digest} is damaged: {exc.detail}. Uploading the adapter again "
                "repairs it."
            )
            return ApiError(500, message, code="file_damaged")
        case StoreUnavailable():
            message = "The store of the adapters' files does not answer. Try again."
            return ApiError(503, message, code="storage_unavailable", retry_after_s=5.0)
        case LoraplexAdapterError():
            return ApiError(503, str(exc), code="adapter_unavailable", retry_after_s=RETRY_AFTER_S)
    return ApiError(500, "Internal error. The server's log has the details.", code="internal_error")


def _from_refusal(exc: EngineRefused) -> ApiError:
    wait = exc.retry_after_s if exc.retry_after_s is not None else RETRY_AFTER_S
    match exc.code:
        case "queue_full":
            return ApiError(429, exc.message, code=exc.code, retry_after_s=wait)
        case "too_large":
            return ApiError(400, exc.message, code=exc.code)
        case "not_finite":
            return ApiError(422, exc.message, code=exc.code)
        case "resident_limit":
            return _resident_limit(exc.message)
        case "adapter_failed" | "shutting_down" | "out_of_memory" | "engine_unavailable":
            return ApiError(503, exc.message, code=exc.code, retry_after_s=wait)
    return ApiError(500, exc.message, code=exc.code)


def _resident_limit(detail: str) -> ApiError:
    """As service/api/auth.py says that a limit of the tenant is in the way."""
    message = f"The limit resident_bytes is too small: {detail}."
    return ApiError(413, message, code="limit_exceeded", param="resident_bytes")


def _from_starlette(exc: HTTPException) -> ApiError:
    match exc.__cause__:  # what FastAPI met when it read the body
        case ApiError() as error:
            return error
        case RecursionError():
            return ApiError(400, "The body is not valid JSON: it is nested too deeply.", code="invalid_json")
        case UnicodeDecodeError() as error:
            what = f"byte {error.start} is not {error.encoding.upper()}"
            return ApiError(400, f"The body is not valid JSON: {what}.", code="invalid_json")
        case ValueError():
            what = "it has a number of too many digits"
            return ApiError(400, f"The body is not valid JSON: {what}.", code="invalid_json")
    codes = {404: "unknown_url", 405: "method_not_allowed", 413: "too_large"}
    message = {404: "There is no such URL; GET /docs lists them.", 405: "This URL does not take that method."}
    text = message.get(exc.status_code, exc.detail) if exc.detail in ("Not Found", "Method Not Allowed") else exc.detail
    status = 400 if exc.status_code == 422 else exc.status_code
    return ApiError(status, str(text), code=codes.get(status), headers=exc.headers)


def _malformed(exc: RequestValidationError) -> ApiError:
    """FastAPI's 422 as a 400 that names each field and its value; `param` is the first field's path."""
    lines: list[str] = []
    first: str | None = None
    unknown = False
    for error in exc.errors():
        kind = error["type"]
        path = _path(error["loc"])
        if kind == FIELD_ERROR:
            # Of the whole request or of one of its objects.
            outer, field = path.removeprefix("body"), error["ctx"]["field"]
            path = f"{outer}.{field}" if outer else field
        first = path if first is None else first
        if kind == "json_invalid":
            reason = (error.get("ctx") or {}).get("error", "it cannot be parsed")
            return ApiError(400, f"The body is not valid JSON: {reason}.", code="invalid_json")
        if isinstance(error["input"], bytes):
            message = "The body should be a JSON object, sent with Content-Type: application/json."
            return ApiError(400, message, code="invalid_json")
        if kind == "extra_forbidden":
            unknown = True
            lines.append(f"unknown field {path!r} (value {shown(error['input'])})")
        elif kind == FIELD_ERROR:
            lines.append(f"{path!r} {error['ctx']['reason']} (value {error['ctx']['value']})")
        elif kind == "missing":
            lines.append(f"{path!r} is required")
        else:
            message = error["msg"].removeprefix("Value error, ").removeprefix("Input ")
            between = " " if message.startswith("should") else ": "
            lines.append(f"{path!r}{between}{message} (value {shown(error['input'])})")
        if len(lines) == 10:
            lines.append("...")
            break
    text = "; ".join(lines)
    return ApiError(400, text[:1].upper() + text[1:] + ".", code="unknown_field" if unknown else None, param=first)


def _path(location: tuple[int | str, ...] | list[int | str]) -> str:
    """`messages[0].content` of ("body", "messages", 0, "content"). Tags of unions, which are no fields, stay."""
    parts = list(location)
    if len(parts) > 1 and parts[0] in ("body", "query", "path", "header"):
        del parts[0]
    path = ""
    for part in parts:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else str(part)
    return path


def _is_gone(exc: Exception) -> bool:
    return isinstance(exc, ClientGone) or isinstance(exc.__cause__, ClientDisconnect)


def status_of(exc: Exception) -> int:
    """Of the answer to it."""
    return 499 if _is_gone(exc) else as_api_error(exc).status


async def answer(request: Request, exc: Exception) -> Response:
    """The exception handler of the application."""
    if _is_gone(exc):
        return Response(status_code=499)
    error = as_api_error(exc)
    if error.status == 500:
        log.get(__name__).error("request failed", exc_info=exc)
    elif isinstance(exc, (CatalogueUnusable, StoreUnavailable)):
        reason = exc.reason if isinstance(exc, CatalogueUnusable) else exc.detail
        log.get(__name__).warning("what keeps the adapters cannot be used", reason=reason)
    request.scope.setdefault("state", {})["error_code"] = error.code
    return error.response()


def install(app: FastAPI) -> None:
    """Every failure that the service knows is answered here, others by deps.RequestScope."""
    known = (ApiError, ClientGone, RequestValidationError, HTTPException, CatalogueError, EngineError)
    for kind in (*known, LoraplexAdapterError):
        app.add_exception_handler(kind, answer)

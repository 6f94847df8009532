"""What was used: GET /v1/usage, as JSON or CSV."""

from __future__ import annotations

import csv
import io
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from service.api.auth import CallerDep, Route, allow
from service.api.deps import ServicesDep
from service.api.failure import ApiError, invalid
from service.store.usage import COUNTS, GROUPS, HOUR_S, total

router = APIRouter(tags=["usage"], route_class=Route)

DEFAULT_RANGE = timedelta(days=30)
MAX_CSV_ROWS = 1_000_000
SUMS = tuple(name for name in COUNTS if not name.startswith("first_token"))


@router.get("/v1/usage", summary="Requests, tokens and adapter loads")
@allow("manage")
async def get_usage(
    request: Request,
    services: ServicesDep,
    caller: CallerDep,
    start: Annotated[datetime | None, Query(alias="from", description="First hour; 30 days before `to`.")] = None,
    end: Annotated[datetime | None, Query(alias="to", description="End, exclusive; now.")] = None,
    group_by: Annotated[
        str, Query(max_length=64, description=f"Some of {', '.join(GROUPS)}, with commas; empty: one sum.")
    ] = "day",
    format: Annotated[str, Query(pattern="^(json|csv)$", description="Or by the Accept header, text/csv.")] = "json",
    limit: Annotated[int, Query(ge=1, le=10_000)] = 1000,
    after: Annotated[int, Query(ge=0, le=10**9, description="Rows to pass over: the `last_id` before.")] = 0,
    tenant_number: Annotated[
        int | None, Query(ge=0, lt=2**31, description="For the admin: one tenant, also a deleted one, by its number.")
    ] = None,
) -> Any:
    """Sums over whole hours (UTC): a range is widened to them. A request counts from its first token on; `ttft_ms` is
    the mean time to that; `loads` counts how often an adapter was brought to the device, `byte_hours` its bytes there
    times hours. Figures are at most a second old. A tenant sees its own use, the admin everybody's, or one tenant's
    with `tenant`.

    Use outlives its tenant, and a new tenant of the same name begins with none: to the admin, rows by tenant also have
    `tenant_number`, which is never given twice, and `tenant_deleted`."""
    if (caller.namespace != caller.tenant or tenant_number is not None) and not caller.admin:
        raise ApiError(403, "A key shows the use of its own tenant only.", code="not_your_tenant", param="tenant")
    groups = [name for name in group_by.split(",") if name]
    if (wrong := [name for name in groups if name not in GROUPS]) or len(set(groups)) != len(groups):
        given = wrong[0] if wrong else group_by
        raise invalid("group_by", f"'group_by' should be some of {', '.join(GROUPS)}, each once (value {given!r}).")
    until = _utc("to", end) if end is not None else datetime.now(UTC)
    since = _utc("from", start) if start is not None else until - DEFAULT_RANGE
    if since > until:
        raise invalid("from", f"'from' {since.isoformat()} is after 'to' {until.isoformat()}.")
    first = int(since.timestamp()) // HOUR_S * HOUR_S
    last = -(-int(until.timestamp()) // HOUR_S) * HOUR_S
    as_csv = format == "csv" or "text/csv" in request.headers.get("accept", "")
    whose = tenant_number if caller.viewer is None else caller.tenant_id
    query = {"start": first, "end": last, "tenant": whose, "group_by": groups}
    # How many tenants there have been is no tenant's business.
    extra = _WHICH if caller.admin and "tenant" in groups else ()
    if as_csv:
        rows = [_shown(row, extra) for row in await services.usage.read(**query, limit=MAX_CSV_ROWS)]
        return Response(_csv([*groups, *extra, *_COLUMNS], rows), media_type="text/csv; charset=utf-8")
    rows = await services.usage.read(**query, limit=limit + 1, offset=after)
    page = rows[:limit]
    return {
        "object": "list",
        "from": _iso(first),
        "to": _iso(last),
        "group_by": groups,
        "data": [_shown(row, extra) for row in page],
        "first_id": str(after) if page else None,
        "last_id": str(after + len(page)) if page else None,
        "has_more": len(rows) > limit,
    }


_WHICH = ("tenant_number", "tenant_deleted")
_COLUMNS = ("requests", "prompt_tokens", "cached_tokens", "completion_tokens", "ttft_ms", "loads", "byte_hours")


def _shown(row: dict[str, Any], extra: tuple[str, ...]) -> dict[str, Any]:
    sums = total([row])
    shown = {name: row[name] for name in (*GROUPS, *extra) if name in row}
    if "hour" in row:
        shown["hour"] = _iso(row["hour"])
    if "day" in row:
        shown["day"] = _iso(row["day"])[:10]
    mean = sums.first_token_ms / sums.first_tokens if sums.first_tokens else None
    figures = {name: getattr(sums, name) for name in SUMS} | {"ttft_ms": mean}
    return shown | {name: figures[name] for name in _COLUMNS}


def _csv(columns: list[str], rows: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\r\n")  # RFC 4180
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _utc(field: str, moment: datetime) -> datetime:
    """A time without a zone is UTC. Raises ApiError 400 for one at which no server ran."""
    if not 1971 <= moment.year <= 9000:
        raise invalid(field, f"'{field}' should lie between the years 1971 and 9000 (value {moment.isoformat()}).")
    return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)


def _iso(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")

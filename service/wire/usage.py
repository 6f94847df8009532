"""/v1/usage: what was used."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date
from typing import Any, Literal

from service.wire.flows import Flow, PageOf, Request, pages, send
from service.wire.tenant_records import UsageRow

Group = Literal["hour", "day", "tenant", "key", "adapter"]
PAGE = 1000


def usage(
    *,
    start: date | str | None = None,
    end: date | str | None = None,
    group_by: Sequence[Group] = ("day",),
    tenant: str | None = None,
    tenant_number: int | None = None,
) -> PageOf[UsageRow]:
    """Sums over whole hours from `start` (30 days before `end`) to `end` (now, exclusive), one row for each combination
    of `group_by`; without any, one row. A date, a datetime or ISO 8601 text; without a zone it is UTC. A tenant's key
    with the scope "manage" shows its own use, the admin's everybody's, or that of one `tenant`. `tenant_number`
    means a deleted one too."""
    return pages("/v1/usage", UsageRow.read, limit=PAGE, **_query(start, end, group_by, tenant, tenant_number))


def usage_csv(
    *,
    start: date | str | None = None,
    end: date | str | None = None,
    group_by: Sequence[Group] = ("day",),
    tenant: str | None = None,
    tenant_number: int | None = None,
) -> Flow[str]:
    """`usage` as CSV (RFC 4180) with a header line."""
    query = {**_query(start, end, group_by, tenant, tenant_number), "format": "csv"}
    reply = yield from send(Request(path="/v1/usage", params=query))
    return reply.body.decode()


def _query(
    start: date | str | None, end: date | str | None, groups: Sequence[Group], tenant: str | None, number: int | None
) -> Any:
    return {
        "from": start.isoformat() if isinstance(start, date) else start,  # every datetime is a date
        "to": end.isoformat() if isinstance(end, date) else end,
        "group_by": ",".join(groups),
        "tenant": tenant,
        "tenant_number": number,
    }

"""usage and audit."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from service.commands.connect import Json, administers, talks
from service.commands.output import moment, table, write_json

if TYPE_CHECKING:
    from service.client import Loraplex, UsageRow

app = typer.Typer(rich_markup_mode=None)


@app.command()
@talks
def usage(
    client: Loraplex,
    start: Annotated[
        str | None,
        typer.Option("--from", metavar="WHEN", help="2026-11-01 or 2026-11-01T08:00 (UTC). [30 days before the end]"),
    ] = None,
    end: Annotated[str | None, typer.Option("--to", metavar="WHEN", help="Exclusive. [now]")] = None,
    group_by: Annotated[
        str, typer.Option(metavar="GROUPS", help="Some of hour, day, tenant, key, adapter, with commas; '': one sum.")
    ] = "day",
    csv: Annotated[bool, typer.Option("--csv", help="The server's CSV, with a header.")] = False,
    json: Json = False,
) -> None:
    """What was used, in whole hours. A tenant sees its own use; the admin everybody's, or with --tenant one's. Piped:
    the groups, requests, prompt tokens, cached ones of them, completion tokens, ms to the first token, adapter loads,
    byte hours."""
    if csv and json:
        raise typer.BadParameter("only one of them", param_hint="--csv, --json")
    groups: Any = [group for group in (part.strip() for part in group_by.split(",")) if group]
    if csv:
        sys.stdout.write(client.usage_csv(start=start, end=end, group_by=groups))
        return
    rows = client.usage(start=start, end=end, group_by=groups)
    if json:
        write_json([dict(row.raw) for row in rows])
        return
    head = (*groups, "requests", "prompt", "cached", "completion", "ttft ms", "loads", "byte hours")
    table(head, _rows(rows, groups))


def _rows(rows: Iterator[UsageRow], groups: Sequence[str]) -> Iterator[tuple[str, ...]]:
    for row in rows:
        yield (
            *(str(row.raw.get(group, "")) for group in groups),
            str(row.requests),
            str(row.prompt_tokens),
            str(row.cached_tokens),
            str(row.completion_tokens),
            "" if row.ttft_ms is None else f"{row.ttft_ms:.0f}",
            str(row.loads),
            f"{row.byte_hours:.0f}",
        )


@app.command()
@administers
def audit(
    client: Loraplex,
    tenant: Annotated[
        str | None, typer.Option(metavar="TENANT", help="As this tenant alone.", show_default=False)
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="How many.")] = 50,
    json: Json = False,
) -> None:
    """What was changed by whom, the newest first. Needs the admin key, where there is one. Piped: time, actor, tenant,
    action, target, state, HTTP status."""
    actions = itertools.islice(client.audit(tenant=tenant), limit)
    if json:
        write_json([dict(action.raw) for action in actions])
        return
    rows = (
        (moment(each.at), each.actor, each.tenant, each.action, each.target, each.state, str(each.status or ""))
        for each in actions
    )
    table(("time", "actor", "tenant", "action", "target", "state", "status"), rows)

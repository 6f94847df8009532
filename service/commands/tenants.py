"""tenants: list, create, show, set, delete; keys: list, create, delete. With the admin key."""

from __future__ import annotations

import enum
import re
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated, Any

import typer

from service.commands.connect import Json, Key, Url, administers
from service.commands.output import facts, line, moment, note, table, write_json

if TYPE_CHECKING:
    from service.client import Loraplex, Tenant, TenantKey

app = typer.Typer(rich_markup_mode=None)
tenants = typer.Typer(rich_markup_mode=None)
app.add_typer(tenants, name="tenants")
keys = typer.Typer(rich_markup_mode=None, no_args_is_help=True)
app.add_typer(keys, name="keys")

Name = Annotated[str, typer.Argument(metavar="TENANT", help="The tenant.", show_default=False)]
Weight = Annotated[
    float | None,
    typer.Option(help="Share of the device while tenants compete; 1 at first.", show_default=False),
]
Limits = Annotated[
    list[str] | None,
    typer.Option(
        "--limit", metavar="NAME=NUMBER", show_default=False,
        help="requests_per_minute, tokens_per_minute, concurrent_requests, adapters, stored_bytes, resident_bytes,"
        " max_rank or max_tokens; 5k, 2M, 10G, 1T; none: no limit. May be given again.",
    ),
]  # fmt: skip
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]

_UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def limits_of(texts: list[str] | None) -> dict[str, int | None] | None:
    """Limits by name of NAME=NUMBER; None where none is given."""
    if texts is None:
        return None
    limits: dict[str, int | None] = {}
    for text in texts:
        name, _, value = text.partition("=")
        name = name.replace("-", "_")
        number = re.fullmatch(r"([0-9]+)([kMGT]?)", value)
        if not name or (number is None and value != "none"):
            raise typer.BadParameter(f"{text!r} is not NAME=NUMBER (5000, 5k, 2M, 10G, 1T, none)", param_hint="--limit")
        limits[name] = None if number is None else int(number[1]) * _UNITS[number[2]]
    return limits


# ---------------------------------------------------------------- tenants


@tenants.callback(invoke_without_command=True)
def _tenants(ctx: typer.Context, json: Json = False, url: Url = None, key: Key = None) -> None:
    """List the tenants; or, by a command, create, show, set or delete one. Needs the admin key."""
    if ctx.invoked_subcommand is None:
        list_tenants(ctx, url=url, key=key, json=json)


@tenants.command("list")
@administers
def list_tenants(client: Loraplex, json: Json = False) -> None:
    """List the tenants. Piped: name, weight, active or disabled, limits."""
    found = client.tenants.list()
    if json:
        write_json([dict(tenant.raw) for tenant in found])
        return
    table(("tenant", "weight", "state", "limits"), map(_tenant_row, found))


def _tenant_row(tenant: Tenant) -> tuple[str, ...]:
    limits = ", ".join(f"{name}={value}" for name, value in tenant.limits.items() if value is not None)
    return tenant.name, f"{tenant.weight:g}", _state(tenant), limits


def _state(what: Tenant | TenantKey) -> str:
    return "disabled" if what.disabled else "active"


@tenants.command()
@administers
def create(client: Loraplex, tenant: Name, weight: Weight = None, limit: Limits = None, json: Json = False) -> None:
    """Create a tenant; its name is its adapters' namespace. `loraplex keys create` lets it in."""
    made = client.tenants.create(tenant, weight=weight, limits=limits_of(limit))
    _shown(made, json)


@tenants.command()
@administers
def show(client: Loraplex, tenant: Name, json: Json = False) -> None:
    """Show a tenant, with what it uses of its limits now."""
    _shown(client.tenants.get(tenant), json)


@tenants.command("set")
@administers
def set_(
    client: Loraplex,
    tenant: Name,
    weight: Weight = None,
    limit: Limits = None,
    disable: Annotated[bool, typer.Option("--disable", help="Refuse its keys; what it has is kept.")] = False,
    enable: Annotated[bool, typer.Option("--enable", help="Let it in again.")] = False,
    json: Json = False,
) -> None:
    """Set a tenant's weight and limits, disable or enable it. What is not given stays."""
    if disable and enable:
        raise typer.BadParameter("only one of them", param_hint="--disable, --enable")
    disabled = disable if disable or enable else None
    limits = limits_of(limit)
    if weight is None and limits is None and disabled is None:
        raise typer.BadParameter("one of them is needed", param_hint="--weight, --limit, --disable, --enable")
    _shown(client.tenants.update(tenant, weight=weight, limits=limits, disabled=disabled), json)


@tenants.command()
@administers
def delete(client: Loraplex, tenant: Name, yes: Yes = False) -> None:
    """Delete a tenant with its keys, adapters and merges. Asks on a terminal."""
    _sure(f"Delete {tenant} with its keys, adapters and merges?", yes)
    count = client.tenants.delete(tenant)
    line(f"{tenant}  deleted ({count} adapters)")


def _sure(question: str, yes: bool) -> None:
    if not yes and sys.stdin.isatty() and sys.stderr.isatty():
        typer.confirm(question, abort=True, err=True)


def _shown(tenant: Tenant, json: bool) -> None:
    if json:
        write_json(dict(tenant.raw))
        return
    about: dict[str, object] = {"tenant": tenant.name, "weight": f"{tenant.weight:g}", "state": _state(tenant)}
    used = tenant.used or {}
    for name in {**tenant.limits, **used}:
        limit = tenant.limits.get(name)
        if name in used:
            about[name] = f"{used[name]}{'' if limit is None else f' of {limit}'}"
        elif limit is not None:
            about[name] = f"at most {limit}"
    facts({**about, "created": moment(tenant.created)})


# ---------------------------------------------------------------- keys


@keys.callback()
def _keys(url: Url = None, key: Key = None) -> None:
    """List, create, change and delete the keys of a tenant. Needs the admin key."""


KeyId = Annotated[str, typer.Argument(metavar="ID", help="As `loraplex keys list` shows it.", show_default=False)]


class Scope(enum.StrEnum):
    infer = "infer"
    upload = "upload"
    manage = "manage"


@keys.command("list")
@administers
def list_keys(client: Loraplex, tenant: Name, json: Json = False) -> None:
    """List a tenant's keys, without the secrets. Piped: id, scopes, expiry, last use, description, state."""
    found = client.keys.list(tenant)
    if json:
        write_json([dict(key.raw) for key in found])
        return
    table(("id", "scopes", "expires", "last used", "description", "state"), _key_rows(found))


def _key_rows(found: Iterator[TenantKey]) -> Iterator[tuple[str, ...]]:
    for key in found:
        scopes = ",".join(key.scopes)
        expires, used = moment(key.expires_at) or "never", moment(key.last_used_at) or "never"
        yield key.id, scopes, expires, used, key.description, _state(key)


@keys.command("create")
@administers
def create_key(
    client: Loraplex,
    tenant: Name,
    scope: Annotated[
        list[Scope],
        typer.Option(
            show_default=False,
            help="infer: ask models. upload: adapters and merges. manage: change and delete them, see the use. May be"
            " given again.",
        ),
    ],
    expires: Annotated[
        str | None,
        typer.Option(metavar="WHEN", help="90d, 12h, or a date or time as 2027-01-31 (UTC).", show_default=False),
    ] = None,
    description: Annotated[str | None, typer.Option(help="What it is for.", show_default=False)] = None,
    json: Json = False,
) -> None:
    """Create a key. It is shown this once: piped, the key alone is written."""
    expires_at = None if expires is None else expiry(expires, datetime.now(UTC))
    scopes: Any = [each.value for each in scope]
    made = client.keys.create(tenant, scopes, expires_at=expires_at, description=description)
    if json:
        write_json(dict(made.raw))
        return
    line(made.key)
    note(f"(key {made.id} of {tenant}, for {', '.join(made.scopes)}; it is not shown again)")


def expiry(text: str, now: datetime) -> datetime:
    """Of 90d, 12h, 2027-01-31 or 2027-01-31T12:00; without a zone it is UTC."""
    if span := re.fullmatch(r"([1-9][0-9]{0,5})([dh])", text):
        return now + timedelta(**{"days" if span[2] == "d" else "hours": int(span[1])})
    try:
        given = datetime.fromisoformat(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not like 90d, 12h or 2027-01-31", param_hint="--expires") from None
    return given if given.tzinfo is not None else given.replace(tzinfo=UTC)


@keys.command("set")
@administers
def set_key(
    client: Loraplex,
    tenant: Name,
    id: KeyId,
    disable: Annotated[bool, typer.Option("--disable", help="Refuse it until it is enabled again.")] = False,
    enable: Annotated[bool, typer.Option("--enable", help="Let it in again.")] = False,
    expires: Annotated[
        str | None, typer.Option(metavar="WHEN", help="As for `create`, or never.", show_default=False)
    ] = None,
    description: Annotated[str | None, typer.Option(help="What it is for.", show_default=False)] = None,
    json: Json = False,
) -> None:
    """Disable a key or enable it, within a second everywhere; change when it expires. What is not given stays."""
    if disable and enable:
        raise typer.BadParameter("only one of them", param_hint="--disable, --enable")
    if not (disable or enable) and expires is None and description is None:
        raise typer.BadParameter("one of them is needed", param_hint="--disable, --enable, --expires, --description")
    ends: Any = expires if expires in (None, "never") else expiry(expires, datetime.now(UTC))
    disabled = disable if disable or enable else None
    changed = client.keys.update(tenant, id, disabled=disabled, expires_at=ends, description=description)
    if json:
        write_json(dict(changed.raw))
        return
    line(f"{changed.id}  {_state(changed)}  expires {moment(changed.expires_at) or 'never'}")


@keys.command("delete")
@administers
def delete_key(
    client: Loraplex,
    tenant: Name,
    id: KeyId,
    yes: Yes = False,
) -> None:
    """Delete a key: within a second it is refused everywhere. Asks on a terminal."""
    _sure(f"Delete the key {id} of {tenant}?", yes)
    client.keys.delete(tenant, id)
    line(f"{id}  deleted")

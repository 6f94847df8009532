"""How commands get at the server: --url and --key on each of them, and before them; and --tenant."""

from __future__ import annotations

import asyncio
import functools
import inspect
import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Annotated, Any, get_type_hints

import typer

Url = Annotated[
    str | None,
    typer.Option(
        "--url", metavar="URL", help="The server. [LORAPLEX_URL, else http://127.0.0.1:8000]", show_default=False
    ),
]
Key = Annotated[
    str | None,
    typer.Option(
        "--key", metavar="KEY", show_default=False,
        help="The key to it. [LORAPLEX_KEY, which unlike this flag other users of this machine cannot see]",
    ),
]  # fmt: skip
Tenant = Annotated[
    str | None,
    typer.Option(
        "--tenant", metavar="TENANT", show_default=False,
        help="Of this tenant: for the admin on its behalf, for others what it shares.",
    ),
]  # fmt: skip
Json = Annotated[bool, typer.Option("--json", help="The server's JSON, for scripts.")]


_OPTIONS = {"url": Url, "key": Key, "tenant": Tenant}


def options_of(ctx: typer.Context, given: dict[str, Any]) -> dict[str, Any]:
    """What was said after the command counts, then what was said before it; then the environment, for the client."""
    found = {name: given.get(name) for name in _OPTIONS}
    above = ctx.parent
    while above is not None:
        found = {name: value or above.params.get(name) for name, value in found.items()}
        above = above.parent
    return found


def talks(command: Callable[..., Any], *, tenant: bool = True) -> Callable[..., None]:
    """Makes a command of a function whose first parameter is a client: a Loraplex, or for a coroutine an AsyncLoraplex.
    Adds --url, --key and, unless told not to, --tenant."""
    offered = {name: kind for name, kind in _OPTIONS.items() if tenant or name != "tenant"}
    signature = inspect.signature(command)
    first, *others = signature.parameters.values()
    # The client's type is known to type checkers alone: importing it here would make every --help slow.
    annotations = {name: kind for name, kind in command.__annotations__.items() if name not in (first.name, "return")}
    hints = get_type_hints(
        SimpleNamespace(__annotations__=annotations), globalns=command.__globals__, include_extras=True
    )
    hints = {"ctx": typer.Context, **hints, **offered}

    @functools.wraps(command)
    def run(ctx: typer.Context, **given: Any) -> None:
        from service.client import AsyncLoraplex, Loraplex

        options = options_of(ctx, {name: given.pop(name) for name in offered})
        if not tenant:
            del options["tenant"]
        if inspect.iscoroutinefunction(command):

            async def talk() -> None:
                async with usable(AsyncLoraplex, options) as client:
                    await command(client, **given)

            asyncio.run(talk())
            return
        with usable(Loraplex, options) as client:
            command(client, **given)

    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters = [
        inspect.Parameter("ctx", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context),
        *(p.replace(annotation=hints[p.name], kind=keyword) for p in others),
        *(inspect.Parameter(name, keyword, default=None, annotation=kind) for name, kind in offered.items()),
    ]
    del run.__wrapped__  # its signature is another
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = hints
    return run


administers = functools.partial(talks, tenant=False)
"""For what has no tenant, or names it as an argument."""


def usable(kind: Callable[..., Any], options: dict[str, Any], **more: Any) -> Any:
    """A client; wrong options are wrong usage."""
    try:
        return kind(**options, **more)
    except ValueError as exc:
        raise typer.BadParameter(str(exc), param_hint="--url or --key") from None


def complete_adapters(ctx: typer.Context, incomplete: str) -> list[str]:
    """Names for the shell that begin so: one request, of which the shell is not told if it fails."""
    from service.client import Loraplex, LoraplexError

    owner, slash, begin = incomplete.rpartition("/")
    # Names come sorted and have no character beyond `z`: this is what comes right before the first one wanted.
    before = f"{owner}{slash}{begin[:-1]}{chr(ord(begin[-1]) - 1)}~" if begin else None
    try:
        with Loraplex(**options_of(ctx, ctx.params), timeout_s=1.0, max_retries=0) as client:
            adapters = itertools.islice(client.adapters.list(owner=owner or None, after=before), 100)
            names = [adapter.id or adapter.name for adapter in adapters]
            return [name for name in names if name.startswith(incomplete)]
    except (LoraplexError, ValueError):
        return []

"""How commands get at the server: --url and --key on each of them, and before them."""

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
Json = Annotated[bool, typer.Option("--json", help="The server's JSON, for scripts.")]


def options_of(ctx: typer.Context, url: str | None, key: str | None) -> dict[str, Any]:
    """What was said after the command counts, then what was said before it; then the environment, for the client."""
    above = ctx.parent
    while above is not None:
        url, key, above = url or above.params.get("url"), key or above.params.get("key"), above.parent
    return {"url": url, "key": key}


def talks(command: Callable[..., Any]) -> Callable[..., None]:
    """Makes a command of a function whose first parameter is a client: a Loraplex, or for a coroutine an AsyncLoraplex.
    Adds --url and --key."""
    signature = inspect.signature(command)
    first, *others = signature.parameters.values()
    # The client's type is known to type checkers alone: importing it here would make every --help slow.
    annotations = {name: kind for name, kind in command.__annotations__.items() if name not in (first.name, "return")}
    hints = get_type_hints(
        SimpleNamespace(__annotations__=annotations), globalns=command.__globals__, include_extras=True
    )
    hints = {"ctx": typer.Context, **hints, "url": Url, "key": Key}

    @functools.wraps(command)
    def run(ctx: typer.Context, *, url: str | None = None, key: str | None = None, **given: Any) -> None:
        from service.client import AsyncLoraplex, Loraplex

        options = options_of(ctx, url, key)
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
        inspect.Parameter("url", keyword, default=None, annotation=Url),
        inspect.Parameter("key", keyword, default=None, annotation=Key),
    ]
    del run.__wrapped__  # its signature is another
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = hints
    return run


def usable(kind: Callable[..., Any], options: dict[str, Any], **more: Any) -> Any:
    """A client; wrong options are wrong usage."""
    try:
        return kind(**options, **more)
    except ValueError as exc:
        raise typer.BadParameter(str(exc), param_hint="--url or --key") from None


def complete_adapters(ctx: typer.Context, incomplete: str) -> list[str]:
    """Names for the shell that begin so: one request, of which the shell is not told if it fails."""
    from service.client import Loraplex, LoraplexError

    # Names come sorted and have no character beyond `z`: this is what comes right before the first one wanted.
    before = f"{incomplete[:-1]}{chr(ord(incomplete[-1]) - 1)}~" if incomplete else None
    try:
        options = options_of(ctx, ctx.params.get("url"), ctx.params.get("key"))
        with Loraplex(**options, timeout_s=1.0, max_retries=0) as client:
            adapters = itertools.islice(client.adapters.list(after=before), 100)
            return [a.name for a in itertools.takewhile(lambda a: a.name.startswith(incomplete), adapters)]
    except (LoraplexError, ValueError):
        return []

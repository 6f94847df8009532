"""run and compare."""

from __future__ import annotations

import asyncio
import math
import secrets
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from service.commands.connect import Json, complete_adapters, talks
from service.commands.output import clean, console, line, note, write_json

if TYPE_CHECKING:
    from service.client import AsyncLoraplex, Loraplex

app = typer.Typer(rich_markup_mode=None)

BASE = "base"
"""Here always the base model, whatever the server calls it; an adapter of this name is `base@1`."""

MODEL = "`base`, NAME, NAME@3 or NAME@ALIAS."
System = Annotated[str | None, typer.Option(help="The system message.", show_default=False)]
MaxTokens = Annotated[int | None, typer.Option(min=1, help="Longest answer.", show_default=False)]
Temperature = Annotated[float | None, typer.Option(min=0, max=2, help="0: always the likeliest.", show_default=False)]
TopP = Annotated[float | None, typer.Option(min=0, max=1, show_default=False)]
Seed = Annotated[int | None, typer.Option(help="The same seed gives the same answer.", show_default=False)]
Raw = Annotated[bool, typer.Option("--raw", help="Continue the prompt as it is, without the chat template.")]


def weighted(texts: list[str], option: str) -> dict[str, float]:
    """Weights by name of NAME=WEIGHT, or NAME alone, which weighs 1."""
    weights: dict[str, float] = {}
    for text in texts:
        name, number = text.rsplit("=", 1) if "=" in text else (text, "1")
        try:
            weight = float(number)
        except ValueError:
            weight = math.nan
        if not name or not math.isfinite(weight):
            raise typer.BadParameter(f"{text!r} is not NAME=WEIGHT", param_hint=option)
        if name in weights:
            raise typer.BadParameter(f"{name!r} is given twice", param_hint=option)
        weights[name] = weight
    return weights


def prompt_of(given: str | None) -> str:
    """The argument, or stdin for `-` or none."""
    if given is not None and given != "-":
        return given
    if given is None and sys.stdin.isatty():
        raise typer.BadParameter("give it as an argument or through a pipe", param_hint="PROMPT")
    try:
        text = sys.stdin.buffer.read().decode()
    except UnicodeDecodeError:
        raise typer.BadParameter("what stdin brings is not UTF-8", param_hint="PROMPT") from None
    if not text.strip():
        raise typer.BadParameter("it is empty", param_hint="PROMPT")
    return text.removesuffix("\n")


def _options(**options: Any) -> Any:
    return {key: value for key, value in options.items() if value is not None}


@app.command()
@talks
def run(
    client: Loraplex,
    model: Annotated[str, typer.Argument(help=MODEL, autocompletion=complete_adapters, show_default=False)],
    prompt: Annotated[str | None, typer.Argument(help="Or from stdin.", show_default=False)] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[=WEIGHT]", help="With MODEL `base`: mix these adapters for this request. May be given again."
        ),
    ] = None,
    system: System = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    seed: Seed = None,
    raw: Raw = False,
    json: Json = False,
) -> None:
    """Ask a model; the answer is written as it comes."""
    text = prompt_of(prompt)
    adapters = weighted(adapter, "--adapter") if adapter else None
    if raw and system is not None:
        raise typer.BadParameter("has no place in a raw prompt", param_hint="--system")
    options = _options(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)
    options |= {"model": None if model == BASE else model, "adapters": adapters}
    if json:
        answer = client.complete(text, **options) if raw else client.chat(text, system=system, **options)
        write_json({**answer.raw, "adapter": answer.adapter})
        return
    terminal = sys.stdout.isatty()
    last, finish = "", None
    opened = client.complete_stream(text, **options) if raw else client.chat_stream(text, system=system, **options)
    with opened as chunks:
        for chunk in chunks:
            if chunk.text:
                last = clean(chunk.text) if terminal else chunk.text
                sys.stdout.write(last)
                sys.stdout.flush()
            finish = chunk.finish_reason or finish
    if not last.endswith("\n"):
        sys.stdout.write("\n")
    if finish == "length":
        note("(cut at the length limit; --max-tokens sets it)")


@app.command()
@talks
async def compare(
    client: AsyncLoraplex,
    models: Annotated[
        list[str], typer.Argument(metavar="MODEL...", help=MODEL, autocompletion=complete_adapters, show_default=False)
    ],
    prompt: Annotated[str, typer.Argument(help="`-`: from stdin.", show_default=False)],
    system: System = None,
    max_tokens: MaxTokens = 128,
    temperature: Temperature = None,
    top_p: TopP = None,
    seed: Seed = None,
    raw: Raw = False,
    json: Json = False,
) -> None:
    """Ask the base model and adapters the same, with the same seed, and show the answers side by side."""
    text = prompt_of(prompt)
    seed = secrets.randbelow(2**31) if seed is None else seed
    options = _options(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)
    base = await client.base_model()
    names = list(dict.fromkeys([base, *(base if model == BASE else model for model in models)]))
    texts = dict.fromkeys(names, "")

    async def ask(name: str) -> None:
        if raw:
            opened = await client.complete_stream(text, model=name, **options)
        else:
            opened = await client.chat_stream(text, model=name, system=system, **options)
        async with opened as chunks:
            async for chunk in chunks:
                texts[name] += chunk.text

    await _shown_meanwhile(names, texts, asyncio.gather(*map(ask, names)), live=not json)
    if json:
        write_json({"seed": seed, "answers": [{"model": name, "text": texts[name]} for name in names]})
        return
    if not sys.stdout.isatty():
        for name in names:
            line(f"== {name}")
            sys.stdout.write(texts[name].removesuffix("\n") + "\n\n")
    note(f"(seed {seed})")


async def _shown_meanwhile(names: list[str], texts: dict[str, str], work: Any, *, live: bool) -> None:
    """Waits for `work`; on a terminal the answers grow in columns."""
    screen = console()
    if not live or not screen.is_terminal:
        await work
        return
    from rich.live import Live
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    # Side by side as long as a column holds a readable line.
    across = max(1, min(len(names), screen.width // 30))

    def picture() -> Table:
        grid = Table.grid(expand=True)
        for _ in range(across):
            grid.add_column(ratio=1)
        panels = [Panel(Text(clean(texts[name])), title=Text(clean(name)), title_align="left") for name in names]
        for start in range(0, len(panels), across):
            grid.add_row(*panels[start : start + across])
        return grid

    with Live(picture(), console=screen, auto_refresh=False, vertical_overflow="visible") as view:
        waiting = asyncio.ensure_future(work)
        try:
            while not (await asyncio.wait([waiting], timeout=0.1))[0]:
                view.update(picture(), refresh=True)
        finally:
            waiting.cancel()
        view.update(picture(), refresh=True)
    await waiting

"""version and ready."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from service import __version__
from service.commands.connect import administers
from service.commands.output import line

if TYPE_CHECKING:
    from service.client import Loraplex

app = typer.Typer(rich_markup_mode=None)


@app.command()
def version() -> None:
    """Print the version."""
    line(__version__)


@app.command()
@administers
def ready(
    client: Loraplex,
    wait: Annotated[float, typer.Option(min=0, metavar="SECONDS", help="How long it may take to become ready.")] = 0,
) -> None:
    """Is the server ready to answer? Exit code 0 if so; 3 or 4 if not."""
    client.wait_until_ready(wait)
    line("ready")

"""What mkdocs takes from the code at every build, so that it cannot go out of date: every setting, every command, every
route. A page says where with a line {{settings}}, {{commands}} or {{routes}}."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import typer.main
from openapidocs.mk.v3 import OpenAPIV3DocumentationHandler
from typer.cli import get_docs_for_click

from service.app import create_app
from service.cli import HELP, app
from service.settings import PREFIX, SECRETS, Settings


def settings() -> str:
    """A table of service/settings.py with the help texts of the command line."""
    rows = ["| variable | flag | default | what it is |", "| --- | --- | --- | --- |"]
    for name, field in Settings.model_fields.items():
        default = "" if field.default in ("", 0) or name in SECRETS else f"`{field.default}`"
        # Whoever may list processes reads their flags, so secrets have none.
        flag = "" if name in SECRETS else f"`--{name.replace('_', '-')}`"
        rows.append(f"| `{PREFIX}{name.upper()}` | {flag} | {default} | {HELP[name]} |")
    return "\n".join(rows)


def commands() -> str:
    """The command line, one heading down."""
    command = typer.main.get_command(app)
    with command.make_context("loraplex", [], resilient_parsing=True) as context:
        text = get_docs_for_click(obj=command, ctx=context, name="loraplex")
    # The reference of `serve` would repeat the whole table of settings.
    return re.sub(
        r"^\* `--(?!examples|help)[^\n]*\(LORAPLEX_[A-Z_]+\)\n", "", text.partition("\n")[2], flags=re.MULTILINE
    )


def routes() -> str:
    """The OpenAPI document as a page."""
    document = create_app(Settings(model="SmolLM2-135M-Instruct")).openapi()
    text = str(OpenAPIV3DocumentationHandler(document, style="MKDOCS").write())
    return text[text.index("\n## ") :]  # after its own title


GENERATED: dict[str, Callable[[], str]] = {"settings": settings, "commands": commands, "routes": routes}


def on_page_markdown(markdown: str, **_: Any) -> str:
    """mkdocs' event for the text of each page."""
    for name, generate in GENERATED.items():
        line = f"{{{{{name}}}}}"
        if line in markdown:
            markdown = markdown.replace(line, generate())
    return markdown

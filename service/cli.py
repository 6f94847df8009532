"""The command line: which commands there are, and how each of them ends.

The list is here, the commands are in service/commands/, and a module is imported when one of its commands is used: so
that --help and the shell's completion are quick, and that the client's commands work where the server is not installed.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from service.commands import output
from service.commands.connect import Key, Url
from service.commands.flags import HELP

__all__ = ["HELP", "app", "main"]


@dataclass(frozen=True, slots=True)
class Listed:
    """A command: the module of service/commands/ that has it, and its line in `loraplex --help`."""

    module: str
    help: str


COMMANDS = {
    "serve": Listed("serve", "Serve the base model and its adapters over HTTP."),
    "ready": Listed("operation", "Is the server ready to answer?"),
    "version": Listed("operation", "Print the version."),
    "upload": Listed("adapters", "Upload an adapter, or a new version of one."),
    "list": Listed("adapters", "List the adapters."),
    "show": Listed("adapters", "Show an adapter, or one version of it."),
    "share": Listed("adapters", "Share an adapter with other tenants, or no longer."),
    "download": Listed("adapters", "Download an adapter's files, as they were uploaded."),
    "delete": Listed("adapters", "Delete an adapter, or one version of it."),
    "load": Listed("adapters", "Bring an adapter to the device."),
    "unload": Listed("adapters", "Drop an adapter from memory."),
    "run": Listed("inference", "Ask a model; the answer is written as it comes."),
    "compare": Listed("inference", "Ask the base and adapters the same, side by side."),
    "merge": Listed("merges", "Merge adapters into a new one, or into the base model."),
    "merges": Listed("merges", "List merges; show, download or delete one."),
    "tenants": Listed("tenants", "List tenants; create, show, set or delete one (admin)."),
    "keys": Listed("tenants", "List, create and delete the keys of a tenant (admin)."),
    "usage": Listed("usage", "What was used: requests, tokens, adapter loads."),
    "audit": Listed("usage", "What was changed by whom, the newest first (admin)."),
}

# Of the extra `server`. That one of them is there does not mean that all are.
_SERVER = ("torch", "transformers", "fastapi", "uvicorn", "sqlalchemy", "zmq", "pydantic_settings")


def _load(name: str) -> Any:
    """The command itself. Raises typer.Exit where it cannot run here."""
    if name == "serve" and (missing := [module for module in _SERVER if importlib.util.find_spec(module) is None]):
        output.problem(f"this is the client alone; to serve: pip install 'loraplex[server]' (no {', '.join(missing)})")
        raise typer.Exit(output.REFUSED)
    module = importlib.import_module(f"service.commands.{COMMANDS[name].module}")
    return typer.main.get_group(module.app).commands[name]


class Commands(TyperGroup):
    """Knows COMMANDS by name and help; imports one when it is used. Turns failures into exit codes."""

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        self._brief = False
        self.commands.update({name: TyperCommand(name, help=listed.help) for name, listed in COMMANDS.items()})

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        return _load(cmd_name) if cmd_name in COMMANDS and not self._brief else super().get_command(ctx, cmd_name)

    @contextlib.contextmanager
    def _briefly(self) -> Iterator[None]:
        """Names and help are enough meanwhile."""
        self._brief = True
        try:
            yield
        finally:
            self._brief = False

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        with self._briefly():
            super().format_commands(ctx, formatter)

    def shell_complete(self, ctx: Any, incomplete: str) -> Any:
        with self._briefly():
            return super().shell_complete(ctx, incomplete)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise typer.Exit(output.INTERRUPTED) from None
        except BrokenPipeError:
            # What is still buffered goes nowhere, or Python would complain at its end.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(output.BROKEN_PIPE) from None
        except Exception as exc:
            # Not by name: the client, and with it httpx, would be imported for every --help.
            if "service.wire.errors" in sys.modules and isinstance(
                exc, sys.modules["service.wire.errors"].LoraplexError
            ):
                raise typer.Exit(output.fail(exc)) from None
            raise


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    rich_markup_mode=None,
    # Its tracebacks would show the values of variables, keys among them.
    pretty_exceptions_enable=False,
)


def _version(wanted: bool) -> None:
    if wanted:
        from service import __version__

        output.line(__version__)
        raise typer.Exit


@app.callback(epilog=output.EXIT_CODES)
def _root(
    url: Url = None,
    key: Key = None,
    version: bool = typer.Option(False, "--version", is_eager=True, callback=_version, help="Print the version."),
) -> None:
    """One base model, thousands of LoRA adapters beside it, different ones in every batch."""


def main() -> None:
    """The `loraplex` command."""
    # Output that goes into a file or a pipe arrives line by line.
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(line_buffering=True)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    app()


if __name__ == "__main__":
    main()

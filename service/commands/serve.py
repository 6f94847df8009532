"""`loraplex serve`. Every setting is a flag as well as a LORAPLEX_* variable."""

from __future__ import annotations

import asyncio
import inspect
import os
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any, get_type_hints

import typer

from service.commands.flags import HELP
from service.settings import PREFIX, SECRETS, Settings, SettingsError

app = typer.Typer(rich_markup_mode=None)


def _with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Gives `command` one option per setting in place of its **settings. All are passed on as text: service/settings.py
    validates flags and variables alike."""
    signature = inspect.signature(command)
    parameters = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    hints: dict[str, Any] = get_type_hints(command)
    del hints["settings"], hints["return"]
    for name, field in Settings.model_fields.items():
        if name in SECRETS:
            continue  # command lines can be read by others: a variable only
        flag = "--" + name.replace("_", "-")
        default = "" if field.default in ("", 0, False) else f" [default: {field.default}]"
        text = f"{HELP.get(name, '')}{default} ({PREFIX}{name.upper()})".strip()
        kind: Any = bool | None if field.annotation is bool else str | None
        if field.annotation is bool:
            option = typer.Option(f"{flag}/--no-{flag[2:]}", help=text, show_default=False)
        else:
            option = typer.Option(flag, help=text, show_default=False, metavar="VALUE")
        option.default = None
        hints[name] = kind
        parameters.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=option, annotation=kind))
    command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    command.__annotations__ = hints
    return command


@app.command()
@_with_settings
def serve(
    *,
    examples: bool = typer.Option(False, "--examples", help="Upload the example adapters on the first start."),
    simulated: str = typer.Option("", hidden=True, help="JSON: no model, a simulated engine with these options."),
    unhealthy_s: float = typer.Option(0.0, hidden=True, help="Seconds after which a silent engine is replaced."),
    integrity_s: float = typer.Option(-1.0, hidden=True, help="Seconds between an idle engine's integrity checks."),
    **settings: Any,
) -> None:
    """Serve the base model and its adapters over HTTP."""
    from service.display import Display, LoggedDisplay

    display = Display()
    try:
        loaded = Settings.load(**settings)
    except SettingsError as exc:
        for problem in exc.problems:
            display.error(problem)
        raise typer.Exit(2) from None
    if loaded.log_format == "json":
        display = LoggedDisplay(loaded)
    for variable in Settings.unknown_variables():
        display.line(f"loraplex: {variable} is set, but there is no such setting; it is ignored", "yellow")
    raise typer.Exit(_run(loaded, display, examples, simulated or None, unhealthy_s, integrity_s))


def _run(
    settings: Settings, display: Any, examples: bool, simulated: str | None, unhealthy_s: float, integrity_s: float
) -> int:
    # Imported late, so that --help and a wrong value answer at once.
    from service.gguf_model import ModelError
    from service.startup_checks import StartError
    from service.supervisor import SILENT_S, Stopped, Supervisor

    # Until the supervisor's loop takes over, SIGTERM ends the process the way Ctrl-C does.
    signal.signal(signal.SIGTERM, _interrupt)

    async def run() -> None:
        supervisor = Supervisor(
            settings,
            display,
            examples=examples,
            simulated=simulated,
            silent_s=unhealthy_s or SILENT_S,
            integrity_interval_s=integrity_s if integrity_s >= 0 else None,
        )
        await supervisor.run()

    try:
        asyncio.run(run())
    except Stopped as stopped:
        display.line("loraplex has stopped.")
        if stopped.held_up:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)
        return 0
    except KeyboardInterrupt:
        return 130
    except (StartError, ModelError) as exc:
        display.error(str(exc), exc.hint)
        return 1
    return 0


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt

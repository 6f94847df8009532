"""The command line: `loraplex serve`, `loraplex version`. Every setting is a flag as well as a LORAPLEX_* variable."""

from __future__ import annotations

import asyncio
import importlib.metadata
import inspect
import os
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any, get_type_hints

import typer

from service.settings import PREFIX, SECRETS, Settings, SettingsError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    help="One base model, thousands of LoRA adapters beside it.",
)

HELP = {
    "model": "Base model: Hugging Face folder, .gguf file or hub id (org/name[@revision]); unset: the embedded one.",
    "served_name": "Name that the base model answers to. Default: the name of its folder.",
    "host": "Address to listen on.",
    "port": "Port to listen on; 0: any free one.",
    "allow_public": "Without an admin key: listen on an address that others can reach all the same.",
    "cors_origins": "Origins, separated by commas, whose pages may call the API from a browser; *: all.",
    "data_dir": "Folder of all state: adapters, catalogue, caches, the embedded model.",
    "device": "auto, cpu or cuda.",
    "dtype": "auto, float32, bfloat16 or float16.",
    "api_workers": "API processes.",
    "log_level": "debug, info, warning or error.",
    "log_format": "console or json.",
    "max_positions": "Longest sequence in tokens; 0: the model's own limit.",
    "kv_pages": "Pages of the KV cache; 0: as many as fit.",
    "max_sequences": "Sequences that run at once.",
    "max_tokens_per_step": "Token budget of an engine step; 0: chosen by device.",
    "max_queue": "Sequences that may wait; beyond it requests get 429.",
    "arena_bytes": "Device memory for adapters, like 8GiB; 0: chosen by device.",
    "host_cache_bytes": "Host memory for adapters; 0: chosen by machine.",
    "max_resident_adapters": "Adapters on the device at once.",
    "max_upload_bytes": "Largest upload.",
    "max_body_bytes": "Largest body of any other request.",
    "max_uploads": "Uploads at once per API process; beyond it they get 429.",
    "max_connections": "Connections per API process; beyond it requests get 503.",
    "keep_alive_s": "Seconds until a connection without a request is closed.",
    "header_timeout_s": "Seconds that the head of a request may take.",
    "body_timeout_s": "Seconds until a body that does not come on gets 408.",
    "write_timeout_s": "Seconds until a client that does not read is disconnected.",
    "threads": "CPU threads of the engine; 0: all cores.",
    "deterministic": "Tokens do not depend on what else is in the batch (CPU only so far).",
    "eager": "CUDA: no compiled layers and no graphs; starts sooner, decodes several times slower.",
    "prefix_caching": "Keep the KV pages of prompts for the next request that starts the same.",
}


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


@app.callback()
def _root() -> None:
    """One base model, thousands of LoRA adapters beside it, different ones in every batch."""


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(importlib.metadata.version("loraplex"))


@app.command()
@_with_settings
def serve(
    *,
    examples: bool = typer.Option(False, "--examples", help="Upload the example adapters on the first start."),
    simulated: str = typer.Option("", hidden=True, help="JSON: no model, a simulated engine with these options."),
    unhealthy_s: float = typer.Option(0.0, hidden=True, help="Seconds after which a silent engine is replaced."),
    **settings: Any,
) -> None:
    """Serve the base model and its adapters over HTTP."""
    from service.display import Display

    display = Display()
    try:
        loaded = Settings.load(**settings)
    except SettingsError as exc:
        for problem in exc.problems:
            display.error(problem)
        raise typer.Exit(2) from None
    for variable in Settings.unknown_variables():
        display.line(f"loraplex: {variable} is set, but there is no such setting; it is ignored", "yellow")
    raise typer.Exit(_run(loaded, display, examples, simulated or None, unhealthy_s))


def _run(settings: Settings, display: Any, examples: bool, simulated: str | None, unhealthy_s: float) -> int:
    # Imported late, so that --help and a wrong value answer at once.
    from service.gguf_model import ModelError
    from service.supervisor import SILENT_S, StartError, Stopped, Supervisor

    # Until the supervisor's loop takes over, SIGTERM ends the process the way Ctrl-C does.
    signal.signal(signal.SIGTERM, _interrupt)

    async def run() -> None:
        supervisor = Supervisor(
            settings, display, examples=examples, simulated=simulated, silent_s=unhealthy_s or SILENT_S
        )
        await supervisor.run()

    try:
        asyncio.run(run())
    except Stopped:
        display.line("loraplex has stopped.")
        return 0
    except KeyboardInterrupt:
        return 130
    except (StartError, ModelError) as exc:
        display.error(str(exc), exc.hint)
        return 1
    return 0


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main() -> None:
    """The `loraplex` command."""
    # Output that goes into a file or a pipe arrives line by line.
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(line_buffering=True)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    app()


if __name__ == "__main__":
    main()

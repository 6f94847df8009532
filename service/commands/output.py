"""What commands print, and the code that they end with. Results go to stdout, everything else to stderr; bars, tables
and colours only to a terminal (NO_COLOR: no colours there either).

A script can go by the exit code:
"""

from __future__ import annotations

import contextlib
import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from service.wire.errors import ApiError, LoraplexError
    from service.wire.records import Merge

OK = 0
REFUSED = 1
"""The server said no: unknown name, adapter that does not fit, wrong key. Or a merge failed."""
USAGE = 2
"""Wrong arguments, or a file of this machine that cannot be used."""
UNREACHABLE = 3
"""No answer, or none of a loraplex server; or the connection was lost."""
LATER = 4
"""Too busy, or not ready yet (429, 502, 503, 504): the same command may work later."""
INTERRUPTED = 130
"""Ctrl-C."""
BROKEN_PIPE = 141
"""Whoever read the output has stopped to."""

EXIT_CODES = (
    "Exit codes: 0 done, 1 the server said no, 2 wrong usage, 3 not reachable, 4 busy or not ready, 130 Ctrl-C."
)

# C0 and C1 but for tab and newline: what a model or another tenant writes must not steer the terminal.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def clean(text: str) -> str:
    return _CONTROL.sub("", text)


def console(*, stderr: bool = False) -> Console:
    from rich.console import Console

    return Console(stderr=stderr, highlight=False, markup=False, emoji=False)


def problem(text: str, *more: str) -> None:
    """On stderr: what is wrong on one line, then further lines, indented."""
    out = console(stderr=True)
    out.print(f"loraplex: {clean(text)}", style="bold red", soft_wrap=True)
    for line in more:
        out.print(f"  {clean(line)}", soft_wrap=True)


def note(text: str) -> None:
    """On stderr, for somebody who watches."""
    if sys.stderr.isatty():
        console(stderr=True).print(clean(text), style="dim", soft_wrap=True)


def line(text: str) -> None:
    """A line of the result."""
    sys.stdout.write(clean(text).replace("\n", " ") + "\n")


def write_json(value: Any) -> None:
    """The server's own JSON, for scripts."""
    json.dump(value, sys.stdout, ensure_ascii=False, indent=2 if sys.stdout.isatty() else None)
    sys.stdout.write("\n")


def table(head: Sequence[str], rows: Iterator[Sequence[str]]) -> None:
    """On a terminal a table; else one line per row with tabs between the fields, no header, nothing cut off."""
    if not sys.stdout.isatty():
        for row in rows:
            line("\t".join(field.replace("\t", " ").replace("\n", " ") for field in row))
        return
    from rich.table import Table
    from rich.text import Text

    shown = Table(box=None, pad_edge=False, header_style="bold")
    for name in head:
        shown.add_column(name.upper(), overflow="ellipsis", no_wrap=name not in ("description", "sources"))
    for row in rows:
        shown.add_row(*(Text(clean(field)) for field in row))
    console().print(shown)


def facts(pairs: Mapping[str, object]) -> None:
    """`key: value` lines; empty values are left out."""
    for key, value in pairs.items():
        if value not in (None, "", (), {}):
            line(f"{key}: {value}")


def moment(seconds: float | None) -> str:
    """Seconds since 1970 in local time; "" for None."""
    return "" if seconds is None else time.strftime("%Y-%m-%d %H:%M:%S %Z", time.localtime(seconds))


def size(nbytes: int) -> str:
    """4900000 -> "4.9 MB" """
    if nbytes < 1000:
        return f"{nbytes} B"
    power = min(4, (len(str(nbytes)) - 1) // 3)
    return f"{nbytes / 1000**power:.1f} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"


# ---------------------------------------------------------------- bars


@contextlib.contextmanager
def transfer(what: str, then: str = "") -> Iterator[Callable[[int, int], None]]:
    """A bar for bytes with their rate; it is told (done, total). `then`: what is waited for once all is sent."""
    bar = console(stderr=True)
    if not bar.is_terminal:
        yield lambda done, total: None
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()
    with Progress(*columns, TimeRemainingColumn(), console=bar, transient=True) as progress:
        task = progress.add_task(what, total=None)

        def report(done: int, total: int) -> None:
            text = then if then and done >= total else what
            progress.update(task, completed=done, total=total, description=text)

        yield report


@contextlib.contextmanager
def merging() -> Iterator[Callable[[Merge], None]]:
    """A bar for a merge; without a terminal a line for each new state."""
    bar = console(stderr=True)
    if not bar.is_terminal:
        seen: list[str] = []

        def say(merge: Merge) -> None:
            if seen[-1:] != [merge.state]:
                seen.append(merge.state)
                bar.print(f"{merge.id}: {merge.state}", soft_wrap=True)

        yield say
        return
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn()
    with Progress(*columns, console=bar, transient=True) as progress:
        task = progress.add_task("merging", total=1.0)
        yield lambda merge: progress.update(
            task, completed=merge.progress, description=clean(merge.phase or merge.state)
        )


# ---------------------------------------------------------------- errors


def fail(error: LoraplexError) -> int:
    """Says what went wrong and what helps; the exit code."""
    from service.wire import errors

    match error:
        case errors.ApiError():
            return _api_failure(error)
        case errors.ConnectionFailed():
            problem(str(error), "hint: `loraplex serve` starts a server; --url or LORAPLEX_URL names another one")
            return UNREACHABLE
        case errors.ProtocolError() | errors.DamagedFile():
            problem(str(error))
            return UNREACHABLE
        case errors.LocalFileError():
            problem(str(error))
            return USAGE
    problem(str(error))
    return REFUSED


def _api_failure(error: ApiError) -> int:
    from service.wire import errors

    lines = [f"- {reason}" for reason in error.reasons] if len(error.reasons) > 1 else []
    # The message repeats the reasons in one line, where they are hard to read.
    message = error.message.partition(error.reasons[0])[0].rstrip(" :") + ":" if lines else error.message
    hint = ""
    match error:
        case errors.Unauthorized():
            hint = "LORAPLEX_KEY (or --key) gives the key"
        case errors.Forbidden() if error.code == "admin_only":
            hint = "LORAPLEX_KEY (or --key) has to be the admin key here"
        case errors.NotFound() if error.code == "tenant_not_found":
            hint = "`loraplex tenants` shows which there are"
        case errors.NotFound() if error.code in ("adapter_not_found", "version_not_found", "model_not_found"):
            hint = "`loraplex list` shows what there is"
        case errors.RateLimited() | errors.Unavailable():
            hint = f"try again in {error.retry_after or 1:g} s"
        case errors.ServerError() if error.request_id:
            hint = f"the server's log has more, under the request id {error.request_id}"
        case errors.BadRequest() if error.code == "chat_template_error":
            hint = "--raw continues the prompt as it is, without the chat template"
    problem(message, *lines, *([f"hint: {hint}"] if hint else []))
    return LATER if isinstance(error, errors.RateLimited | errors.Unavailable) else REFUSED

"""What the supervisor shows: steps and their progress while starting, then how to reach the service."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from rich.console import Console

from service.settings import Settings

if TYPE_CHECKING:
    from rich.progress import Progress


class Display:
    """On a terminal a bar with the time that has passed; in a log one line per step. Has the shape of a Report."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False)
        self._progress: Progress | None = None
        self._last = ""

    @contextlib.contextmanager
    def steps(self) -> Iterator[None]:
        """Steps can be reported inside this block."""
        if self.console.is_terminal:
            from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

            columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
            self._progress = Progress(*columns, console=self.console, transient=True)
            self._progress.start()
        try:
            yield
        finally:
            if self._progress is not None:
                self._progress.stop()
                self._progress = None
            self._last = ""

    def __call__(self, step: str, fraction: float | None = None) -> None:
        if self._progress is not None:
            from rich.markup import escape

            if step != self._last:
                for task in self._progress.task_ids:
                    self._progress.remove_task(task)
                self._progress.add_task(escape(step), total=None)
            total = None if fraction is None else 1.0
            self._progress.update(self._progress.task_ids[0], total=total, completed=fraction or 0.0)
        elif step != self._last:
            self.line(f"{step} ...")
        self._last = step

    def line(self, text: str, style: str | None = None) -> None:
        """One line, never wrapped or coloured by its content."""
        self.console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    def error(self, problem: str, hint: str = "") -> None:
        self.line(f"loraplex: {problem}", "bold red")
        if hint:
            self.line(f"  hint: {hint}")

    def ready(self, url: str, base: str, device: str, adapters: list[str], seconds: float) -> None:
        """The URL, the models, and a request to copy. Ends the steps."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
        model = "pirate" if "pirate" in adapters else adapters[0] if adapters else base
        body: dict[str, Any] = {"model": model, "messages": [{"role": "user", "content": "What is a river?"}]}
        body |= {"max_tokens": 48, "temperature": 0}
        self.line("")
        self.line(f"loraplex is ready after {seconds:.1f} s: {url}  (reference: {url}/docs)", "bold green")
        self.line(f"  base model  {base} on {device}")
        self.line(f"  adapters    {_listed(adapters)}")
        self.line(f"  try         curl -s {url}/v1/chat/completions -H 'Content-Type: application/json' \\")
        self.line(f"                -d '{json.dumps(body)}'")
        self.line("Ctrl-C stops it.")


class LoggedDisplay(Display):
    """The same as log lines, for who reads all output of the service as JSON."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        from service import log

        log.configure(settings)
        self._log = log.get("service.supervisor")

    @contextlib.contextmanager
    def steps(self) -> Iterator[None]:
        yield
        self._last = ""

    def line(self, text: str, style: str | None = None) -> None:
        if text.strip():
            (self._log.info if style is None else self._log.warning)(text.strip())

    def error(self, problem: str, hint: str = "") -> None:
        self._log.critical(problem, hint=hint)

    def ready(self, url: str, base: str, device: str, adapters: list[str], seconds: float) -> None:
        self._log.info(
            "loraplex is ready", url=url, base=base, device=device, adapters=len(adapters), seconds=round(seconds, 1)
        )


def _listed(names: list[str], most: int = 12) -> str:
    if not names:
        return "none yet: POST /v1/adapters"
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more

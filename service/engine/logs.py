"""One line per log record, JSON or for the eye: the same in every process of the service.

Processes that multiprocessing starts for this one (service/jobs.py) call `configure(*current())`.
"""

from __future__ import annotations

import logging
import sys
import threading
from functools import cached_property
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from structlog.typing import EventDict, Processor

_current: list[tuple[str, str]] = [("info", "console")]
_NOISY = ("uvicorn.access", "aiosqlite", "alembic", "httpx", "httpcore", "urllib3")
"""The access line is our own; and these tell every statement, migration and connection."""


def _without_colours(_: Any, __: str, event: EventDict) -> EventDict:
    """uvicorn adds its message once more, with colours."""
    event.pop("color_message", None)
    return event


def shared() -> list[Processor]:
    """What every event goes through, whoever's it is."""
    import structlog

    return [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.add_log_level,
        structlog.stdlib.ExtraAdder(),
        _without_colours,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]


class _Lines(logging.Formatter):
    """Makes the lines, with structlog: with the first of them that takes a sixth of a second to import."""

    def __init__(self, format: str) -> None:
        super().__init__()
        self._format = format

    def format(self, record: logging.LogRecord) -> str:
        return self.formatter.format(record)

    @cached_property
    def formatter(self) -> logging.Formatter:
        import structlog

        tail: list[Processor]
        if self._format == "json":
            # Both without the variables of each frame, which they show by default: prompts and keys are among them.
            exceptions = structlog.tracebacks.ExceptionDictTransformer(show_locals=False)
            tail = [
                structlog.processors.ExceptionRenderer(exceptions),
                structlog.processors.JSONRenderer(ensure_ascii=False),
            ]
        else:
            plain = structlog.dev.plain_traceback
            tail = [structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), exception_formatter=plain)]
        remove = structlog.stdlib.ProcessorFormatter.remove_processors_meta
        return structlog.stdlib.ProcessorFormatter(foreign_pre_chain=shared(), processors=[remove, *tail])


def current() -> tuple[str, str]:
    """(level, format) of this process, to hand on."""
    return _current[0]


def configure(level: str, format: str, *, quiet: bool = False) -> None:
    """Routes all logging of this process to stderr, warnings and what ends it included. May be called again.

    `level`: as logging's, in any case; `format`: json or console; `quiet`: of a process that most often ends without a
    line, and is ready for one when it comes."""
    _current[0] = (level, format)
    if format == "json":
        sys.excepthook = _end
        threading.excepthook = _thread_end
    lines = _Lines(format)
    if not quiet:
        _ = lines.formatter
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(lines)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    logging.captureWarnings(True)
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
    for name in _NOISY:
        logging.getLogger(name).setLevel(max(logging.WARNING, root.level))


def _end(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if not issubclass(kind, KeyboardInterrupt):
        logging.getLogger("service").critical("the process ends: %s", error, exc_info=(kind, error, trace))


def _thread_end(arguments: threading.ExceptHookArgs) -> None:
    error = arguments.exc_value
    if error is not None and not isinstance(error, SystemExit):
        logging.getLogger("service").critical("a thread ends: %s", error, exc_info=error)

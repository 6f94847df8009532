"""Structured logs: one line per event, JSON or for the eye, with the id of the request that it belongs to.

uvicorn's and every library's records go the same way. uvicorn has to be started with `**uvicorn_options(settings)`, or
it would set up its own handlers and write a second access line.
"""

from __future__ import annotations

import logging
import sys
from typing import Any

import structlog

from service.settings import Settings


def _without_colours(_: Any, __: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    """uvicorn adds its message once more, with colours."""
    event.pop("color_message", None)
    return event


_SHARED: list[structlog.typing.Processor] = [
    structlog.contextvars.merge_contextvars,
    structlog.stdlib.add_logger_name,
    structlog.stdlib.add_log_level,
    structlog.stdlib.ExtraAdder(),
    _without_colours,
    structlog.processors.TimeStamper(fmt="iso", utc=True),
]


def configure(settings: Settings) -> None:
    """Route all logging of this process to stderr. May be called again."""
    tail: list[structlog.typing.Processor]
    if settings.log_format == "json":
        tail = [structlog.processors.dict_tracebacks, structlog.processors.JSONRenderer(ensure_ascii=False)]
    else:
        tail = [structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())]
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=_SHARED,
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *tail],
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(settings.log_level.upper())
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
    # Ours is the access line; and these tell every statement, migration and connection.
    for name in ("uvicorn.access", "aiosqlite", "alembic", "httpx", "httpcore"):
        logging.getLogger(name).setLevel(max(logging.WARNING, root.level))
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *_SHARED,
            structlog.stdlib.PositionalArgumentsFormatter(),
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )


def get(name: str) -> Any:
    """A logger whose calls take an event and key=value pairs."""
    return structlog.stdlib.get_logger(name)


def uvicorn_options(settings: Settings) -> dict[str, Any]:
    """Keyword arguments for uvicorn.run or uvicorn.Config that leave logging to this module."""
    return {"log_config": None, "access_log": False, "log_level": settings.log_level}

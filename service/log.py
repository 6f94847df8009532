"""Structured logs: one line per event, JSON or for the eye, with the id of the request that it belongs to.

uvicorn's and every library's records go the same way (service/engine/logs.py). uvicorn has to be started with
`**uvicorn_options(settings)`, or it would set up its own handlers and write a second access line.
"""

from __future__ import annotations

from typing import Any

import structlog

from service.engine import logs
from service.settings import Settings


def configure(settings: Settings) -> None:
    """Route all logging of this process to stderr. May be called again."""
    logs.configure(settings.log_level, settings.log_format)
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *logs.shared(),
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

"""Can it serve, and what is it."""

from __future__ import annotations

import time

from service.wire.errors import ConnectionFailed, TimedOut, Unavailable
from service.wire.flows import Flow, Request, Sleep, json_of, send
from service.wire.records import ServerVersion


def ready() -> Flow[bool]:
    """Whether requests would be served now; False while the server starts, and where none answers."""
    return (yield from _unready()) is None


def _unready() -> Flow[ConnectionFailed | Unavailable | None]:
    try:
        yield from send(Request(path="/ready", repeatable=False, timeout_s=10.0))
    except (ConnectionFailed, Unavailable) as error:
        return error
    return None


def wait_until_ready(timeout_s: float = 300.0) -> Flow[None]:
    """Raises TimedOut with the last reason."""
    until = time.monotonic() + timeout_s
    while (error := (yield from _unready())) is not None:
        if time.monotonic() > until:
            raise TimedOut(f"the server is not ready after {timeout_s:g} s: {error}")
        yield Sleep(0.2)


def version() -> Flow[ServerVersion]:
    """What is running there."""
    return ServerVersion.read((yield from json_of("GET", "/version")))

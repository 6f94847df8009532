"""Server-sent events out of bytes. Not by lines of text: to httpx (and str.splitlines) U+2028 ends a line, and JSON may
have it inside a string."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Event:
    name: str
    """`message` where the server gives none."""
    data: str


class Decoder:
    """Lines may end in LF or CRLF; comments and fields other than `event` and `data` are passed over."""

    def __init__(self) -> None:
        self._rest = b""
        self._name = ""
        self._data: list[str] = []

    def feed(self, piece: bytes) -> Iterator[Event]:
        """The events that this piece completes."""
        *lines, self._rest = (self._rest + piece).split(b"\n")
        for raw in lines:
            line = raw.removesuffix(b"\r").decode("utf-8", "replace")
            if not line:
                if self._data:
                    yield Event(self._name or "message", "\n".join(self._data))
                self._name, self._data = "", []
                continue
            key, _, value = line.partition(":")
            value = value.removeprefix(" ")
            if key == "data":
                self._data.append(value)
            elif key == "event":
                self._name = value

"""Who took up the device's memory: how often each adapter was brought there, and its bytes there times seconds."""

from __future__ import annotations

from collections.abc import Callable


class Occupancy:
    """An account that is taken away in pieces: every load and every byte-second is in exactly one of them."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._loads: dict[str, int] = {}
        self._byte_seconds: dict[str, float] = {}
        self._there: dict[str, tuple[int, float]] = {}
        """Bytes, and since when they are not yet in the account."""

    def arrived(self, digest: str, nbytes: int) -> None:
        self._loads[digest] = self._loads.get(digest, 0) + 1
        self._there[digest] = (nbytes, self._clock())

    def left(self, digest: str) -> None:
        self._settle(digest)
        del self._there[digest]

    def take(self) -> dict[str, tuple[int, float]]:
        """{digest: (loads, byte-seconds)} since the last call; adapters without either are left out."""
        for digest in self._there:
            self._settle(digest)
        taken = {
            digest: (self._loads.get(digest, 0), self._byte_seconds.get(digest, 0.0))
            for digest in self._loads.keys() | self._byte_seconds.keys()
        }
        self._loads, self._byte_seconds = {}, {}
        return taken

    def _settle(self, digest: str) -> None:
        nbytes, since = self._there[digest]
        now = self._clock()
        self._there[digest] = (nbytes, now)
        if now > since:
            self._byte_seconds[digest] = self._byte_seconds.get(digest, 0.0) + nbytes * (now - since)

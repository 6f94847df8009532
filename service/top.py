"""Which names have a label of their own in the metrics: a few that are much used, so that there are never more series.

A label stands as long as the service runs, since a counter that is taken away and comes back would seem to have
fallen. So the first names are those most used in the last DAYS, as the table of usage says at the start; places that
are left go to the names that first reach ENOUGH requests in one process. All else, and what came before a name had its
place, is `other`. API processes share one choice, in a file of the folder that they share for metrics.
"""

from __future__ import annotations

import fcntl
import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec

log = logging.getLogger(__name__)

OTHER = "other"
DAYS = 7
ENOUGH = 10
_MOST_COUNTED = 10_000


class TopNames:
    """At most `places` names. `path`: None where there is a single process. A name that is OTHER itself never has a
    place, nor is its use told from the others'."""

    def __init__(self, places: int, path: Path | None = None) -> None:
        self._places = places
        self._path = path
        self._counts: dict[str, int] = {}
        self._chosen: frozenset[str] = frozenset()

    def seed(self, names: Iterable[str]) -> None:
        """The names that had most use before, most first. Only the first process of a start is heard."""
        self._choose(list(names), first=True)

    def label(self, name: str) -> str:
        """Counts a request of `name`; what to call it."""
        if name in self._chosen:
            return name
        if len(self._chosen) >= self._places:
            return OTHER
        count = self._counts.get(name, 0) + 1
        if count < ENOUGH:
            if len(self._counts) >= _MOST_COUNTED:
                self._counts.clear()
            self._counts[name] = count
            return OTHER
        self._choose([name])
        self._counts.pop(name, None)
        return name if name in self._chosen else OTHER

    def _choose(self, names: list[str], *, first: bool = False) -> None:
        names = [name for name in dict.fromkeys(names) if name != OTHER]
        if self._path is None:
            self._chosen = frozenset([*self._chosen, *names[: max(0, self._places - len(self._chosen))]])
        else:
            self._chosen = frozenset(self._agreed(self._path, names, first))
        if len(self._chosen) >= self._places:
            self._counts.clear()

    def _agreed(self, path: Path, names: list[str], first: bool) -> list[str]:
        """The choice of all processes, with `names` added while there are places (`first`: if it is the first word)."""
        try:
            with path.open("a+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                file.seek(0)
                text = file.read()
                known = msgspec.json.decode(text, type=list[str]) if text else []
                if first and text:
                    return known
                new = [name for name in names if name not in known]
                chosen = known + new[: max(0, self._places - len(known))]
                if chosen != known or not text:
                    file.truncate(0)
                    file.write(msgspec.json.encode(chosen))
                return chosen
        except (OSError, msgspec.DecodeError) as error:
            log.warning("the names that have figures of their own cannot be agreed on: %s", error)
            return list(self._chosen)


def most_used(rows: Iterable[Mapping[str, Any]], name: str, places: int) -> list[str]:
    """`rows`: sums of the table of usage, each with its `name`. Those with most requests, most first."""
    requests: Counter[str] = Counter()  # tenants of one name, and adapters of those, have rows of their own
    for row in rows:
        requests[row[name]] += row["requests"]
    ranked = sorted(((-count, label) for label, count in requests.items() if count), key=lambda each: each)
    return [label for _, label in ranked[:places]]

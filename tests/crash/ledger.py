"""What the service has promised: for every adapter name the states that it may be in.

The rules of names, versions and aliases are written down here a second time, as functions from a state to the answer
and the next state. An operation that was answered moves its name to the next state; one whose connection broke leaves
two states possible, until somebody looks.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class Adapter:
    """`versions`: number -> content, as sorted pairs."""

    versions: tuple[tuple[int, int], ...]
    default: int
    description: str = ""
    aliases: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class State:
    """`last`: the highest version number that this name has ever had; never reused, not even after a deletion."""

    adapter: Adapter | None = None
    last: int = 0


Outcome = tuple[int, State]
"""(HTTP status, state after)"""
Operation = Callable[[State], Outcome]


def put(content: int, default: bool | None) -> Operation:
    def apply(state: State) -> Outcome:
        adapter, number = state.adapter, state.last + 1
        if adapter is None:
            return 201, State(Adapter(((number, content),), number), number)
        known = [n for n, c in adapter.versions if c == content]
        if known:
            return 200, replace(state, adapter=replace(adapter, default=known[0]) if default else adapter)
        new = replace(
            adapter,
            versions=(*adapter.versions, (number, content)),
            default=adapter.default if default is False else number,
        )
        return 201, State(new, number)

    return apply


def post(content: int, description: str) -> Operation:
    def apply(state: State) -> Outcome:
        if state.adapter is None:
            status, after = put(content, None)(state)
            if after.adapter is None:
                raise RuntimeError("put makes an adapter")
            return status, replace(after, adapter=replace(after.adapter, description=description))
        return (200 if content in dict(state.adapter.versions).values() else 409), state

    return apply


def change(description: str | None = None, default: int | None = None) -> Operation:
    def apply(state: State) -> Outcome:
        adapter = state.adapter
        if adapter is None or (default is not None and default not in dict(adapter.versions)):
            return 404, state
        if description is not None:
            adapter = replace(adapter, description=description)
        return 200, replace(state, adapter=adapter if default is None else replace(adapter, default=default))

    return apply


def set_alias(alias: str, number: int) -> Operation:
    def apply(state: State) -> Outcome:
        adapter = state.adapter
        if adapter is None or number not in dict(adapter.versions):
            return 404, state
        before = dict(adapter.aliases)
        after = tuple(sorted({**before, alias: number}.items()))
        return (200 if alias in before else 201), replace(state, adapter=replace(adapter, aliases=after))

    return apply


def remove_alias(alias: str) -> Operation:
    def apply(state: State) -> Outcome:
        adapter = state.adapter
        if adapter is None or alias not in dict(adapter.aliases):
            return 404, state
        rest = tuple(pair for pair in adapter.aliases if pair[0] != alias)
        return 200, replace(state, adapter=replace(adapter, aliases=rest))

    return apply


def remove_version(number: int) -> Operation:
    def apply(state: State) -> Outcome:
        adapter = state.adapter
        if adapter is None or number not in dict(adapter.versions):
            return 404, state
        if number in dict(adapter.aliases).values():
            return 409, state
        if len(adapter.versions) == 1:
            return 200, replace(state, adapter=None)
        if number == adapter.default:
            return 409, state
        rest = tuple(pair for pair in adapter.versions if pair[0] != number)
        return 200, replace(state, adapter=replace(adapter, versions=rest))

    return apply


def remove(state: State) -> Outcome:
    return (200, replace(state, adapter=None)) if state.adapter is not None else (404, state)


@dataclass
class Ledger:
    """Of all names. Each name is changed by one client at a time; anybody may read."""

    possible: dict[str, tuple[State, ...]] = field(default_factory=dict)
    published: dict[tuple[str, int], set[int]] = field(default_factory=dict)
    """(name, version) -> contents that it may have: one, once somebody has looked."""
    acknowledged: int = 0
    uncertain: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def certain(self, name: str) -> State | None:
        """The state of `name`, unless a broken connection left it open."""
        states = self.possible.get(name, (State(),))
        return states[0] if len(states) == 1 else None

    def sending(self, name: str, after: State) -> None:
        """An operation is about to be asked for: what it publishes may be met from now on."""
        with self._lock:
            self._publish(name, after)

    def answered(self, name: str, after: State) -> None:
        with self._lock:
            self.possible[name] = (after,)
            self.acknowledged += 1

    def broken(self, name: str, before: State, after: State) -> None:
        with self._lock:
            self.possible[name] = (before,) if before == after else (before, after)
            self.uncertain += 1

    def seen(self, name: str, adapter: Adapter | None) -> None:
        """What is there now. Raises AssertionError unless it is one of the states that may be."""
        with self._lock:
            states = self.possible.get(name, (State(),))
            matching = tuple(state for state in states if state.adapter == adapter)
            if not matching:
                raise AssertionError(f"{name} is {adapter}, but it may only be one of {states}")
            self.possible[name] = matching[:1]
            for number, content in adapter.versions if adapter is not None else ():
                self.published[name, number] = {content}

    def current(self) -> list[tuple[str, int]]:
        """(name, version) of what there is, as far as that is certain."""
        with self._lock:
            states = {name: found[0].adapter for name, found in self.possible.items() if len(found) == 1}
        return [(name, number) for name, found in states.items() if found is not None for number, _ in found.versions]

    def contents_of(self, name: str, number: int) -> frozenset[int]:
        with self._lock:
            return frozenset(self.published.get((name, number), ()))

    def _publish(self, name: str, state: State) -> None:
        for number, content in state.adapter.versions if state.adapter is not None else ():
            self.published.setdefault((name, number), set()).add(content)

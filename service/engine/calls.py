"""Control calls on adapters: hints, loads and unloads, and when they are answered. No torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from adapters.errors import AccountTooSmall, AdapterTooLarge, LoraplexAdapterError
from adapters.keys import digest_of
from adapters.residency import Residency, Unload
from service.engine.messages import (
    FromEngine,
    LoadAdapter,
    Prefetch,
    QueryResidency,
    Reply,
    TakeOccupancy,
    UnloadAdapter,
)

MAX_HINTS = 1024
_CODES = {AccountTooSmall: "resident_limit", AdapterTooLarge: "too_large"}
"""Of loads that can never succeed as things are."""

Call = Prefetch | LoadAdapter | UnloadAdapter | QueryResidency | TakeOccupancy


class Calls:
    """The calls of all API processes that are not answered yet."""

    def __init__(self, residency: Residency, send: Callable[[bytes, FromEngine], None]) -> None:
        self.residency = residency
        self._send = send
        self._loads: list[tuple[bytes, LoadAdapter]] = []
        self._unloads: list[tuple[bytes, str, Unload]] = []
        self._forgets: list[tuple[bytes, UnloadAdapter]] = []
        """Of deleted adapters, while accepted requests still name them."""
        self._hinted: set[str] = set()

    def handle(self, client: bytes, message: Call) -> None:
        match message:
            case Prefetch(digests, limits):
                self.limit(limits)
                self.residency.prefetch(digests)
                self._hinted.update(digests)
                if len(self._hinted) > MAX_HINTS:
                    self._forget_hints()
            case LoadAdapter():
                self.limit(message.resident_limits)
                self._loads.append((client, message))
            case UnloadAdapter(call_id, digest, forget):
                if forget:
                    self._forgets.append((client, message))
                else:
                    self._unloads.append((client, call_id, self.residency.unload(digest)))
            case QueryResidency(call_id, digests):
                self._send(client, Reply(call_id, value={each: self.residency.state(each) for each in digests}))
            case TakeOccupancy(call_id):
                self._send(client, Reply(call_id, value=dict(self.residency.take_occupancy())))

    def limit(self, limits: Mapping[str, int | None]) -> None:
        """`resident_limits` of a message."""
        for owner, nbytes in limits.items():
            self.residency.limit(owner, nbytes)

    @property
    def expecting(self) -> bool:
        """Something waits for the loader."""
        self._forget_hints()
        return bool(self._loads or self._unloads or self._hinted)

    def answer(self, named: Callable[[], Iterable[str]]) -> None:
        """Everything that is done. `named`: digests that accepted requests still name; asked only if need be."""
        self._loads = [load for load in self._loads if not self._loaded(*load)]
        if self._forgets:
            self._forget_unnamed(set(named()))
        for client, call_id, unload in self._unloads:
            if unload.done:
                self._send(client, Reply(call_id))
        self._unloads = [each for each in self._unloads if not each[2].done]

    def drop_client(self, client: bytes) -> None:
        """The API process is gone: nobody reads the answers. What it asked to delete is left to the start's sweep."""
        for owner, call in self._loads:
            if owner == client:
                self.residency.cancel_wait(call.call_id)
        self._loads = [load for load in self._loads if load[0] != client]
        self._unloads = [unload for unload in self._unloads if unload[0] != client]
        self._forgets = [forget for forget in self._forgets if forget[0] != client]

    def _loaded(self, client: bytes, call: LoadAdapter) -> bool:
        """A lease proves that the adapter is there; it stays, as the most recently used, when the lease is gone."""
        try:
            lease = self.residency.try_lease((call.digest,), ticket=call.call_id)
        except LoraplexAdapterError as error:
            code = next((code for kind, code in _CODES.items() if isinstance(error, kind)), "")
            self._send(client, Reply(call.call_id, error=str(error), code=code))
            return True
        if lease is None:
            return False
        self.residency.release(lease)
        self._send(client, Reply(call.call_id))
        return True

    def _forget_unnamed(self, named: set[str]) -> None:
        """Unloads the deleted adapters that no accepted request names any more. One that waits its turn may not have
        its lease yet, and needs the adapter's files until it has; files are one for all owners of a content."""
        held, self._forgets = self._forgets, []
        named = {digest_of(key) for key in named}
        for client, call in held:
            if digest_of(call.digest) in named:
                self._forgets.append((client, call))
            else:
                self._unloads.append((client, call.call_id, self.residency.unload(call.digest, forget=True)))

    def _forget_hints(self) -> None:
        """Those that are no longer on their way."""
        self._hinted = {digest for digest in self._hinted if self.residency.state(digest) == "loading"}

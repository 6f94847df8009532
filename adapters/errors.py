"""Everything that can go wrong with an adapter.

    LoraplexAdapterError
    ├── AdapterRefused      the upload does not fit this base: every reason
    ├── AdapterMissing      no such record or blob
    ├── BlobDamaged         stored bytes are not the bytes that were stored
    ├── AdapterTooLarge     can never fit the arena
    ├── AccountTooSmall     can never fit what its account may take up
    ├── AdapterUnavailable  loading failed
    └── StoreUnavailable    where the files lie cannot be reached, or refuses

All of them can be pickled, since they cross process boundaries.
"""

from __future__ import annotations

from collections.abc import Iterable

MAX_REASONS = 50
"""Reasons listed by `capped`: an adapter made for another model easily has thousands."""


class LoraplexAdapterError(Exception):
    """Root of all adapter failures."""


class AdapterRefused(LoraplexAdapterError):  # noqa: N818
    """The adapter does not fit the base model or uses something that is not served.

    `reasons`: one sentence each, naming the field, tensor or file, its value, and what would be accepted."""

    def __init__(self, reasons: list[str]) -> None:
        super().__init__(reasons)
        self.reasons = reasons

    def __str__(self) -> str:
        return "; ".join(self.reasons)


class AdapterMissing(LoraplexAdapterError):  # noqa: N818
    """The store holds nothing under this digest."""

    def __init__(self, digest: str) -> None:
        super().__init__(digest)
        self.digest = digest

    def __str__(self) -> str:
        return f"nothing is stored under {self.digest}"


class BlobDamaged(LoraplexAdapterError):  # noqa: N818
    """Stored bytes differ from those that were stored: wrong hash, wrong size, unreadable."""

    def __init__(self, digest: str, detail: str) -> None:
        super().__init__(digest, detail)
        self.digest = digest
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.digest} is damaged: {self.detail}"


class AdapterTooLarge(LoraplexAdapterError):  # noqa: N818
    """The block (`nbytes`) is larger than the whole arena (`capacity`, bytes)."""

    def __init__(self, digest: str, nbytes: int, capacity: int) -> None:
        super().__init__(digest, nbytes, capacity)
        self.digest = digest
        self.nbytes = nbytes
        self.capacity = capacity

    def __str__(self) -> str:
        return f"adapter {self.digest} needs {self.nbytes} bytes, the arena holds {self.capacity}"


class AccountTooSmall(LoraplexAdapterError):  # noqa: N818
    """The blocks of one account that are needed at once (`nbytes`) are more than it may have on the device: `limit`."""

    def __init__(self, account: str, nbytes: int, limit: int) -> None:
        super().__init__(account, nbytes, limit)
        self.account = account
        self.nbytes = nbytes
        self.limit = limit

    def __str__(self) -> str:
        return f"{self.nbytes} bytes of adapters are needed on the device at once, their owner may have {self.limit}"


class AdapterUnavailable(LoraplexAdapterError):  # noqa: N818
    """The adapter is stored and was accepted, but could not be loaded."""

    def __init__(self, digest: str, reason: str) -> None:
        super().__init__(digest, reason)
        self.digest = digest
        self.reason = reason

    def __str__(self) -> str:
        return f"adapter {self.digest} could not be loaded: {self.reason}"


class StoreUnavailable(LoraplexAdapterError):  # noqa: N818
    """The store of the files does not answer, or not in time. `detail` is for the operator."""

    def __init__(self, detail: str) -> None:
        super().__init__(detail)
        self.detail = detail

    def __str__(self) -> str:
        return f"the store of the adapters' files cannot be used: {self.detail}"


def capped(reasons: Iterable[str], limit: int = MAX_REASONS) -> list[str]:
    """The first `limit` distinct reasons, then how many more there are."""
    unique = list(dict.fromkeys(reasons))
    if len(unique) <= limit:
        return unique
    return [*unique[:limit], f"and {len(unique) - limit} more"]


def shown(value: object, limit: int = 120) -> str:
    """`value` for a message: untrusted text is escaped and shortened."""
    text = ascii(value)
    return text if len(text) <= limit else f"{text[: limit - 1]}…"

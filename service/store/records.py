"""Rows of the catalogue as the rest of the service sees them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from adapters.keys import key_of
from service.store.errors import WrongBase

T = TypeVar("T")


def engine_key(digest: str, owner: int | None) -> str:
    """What the engine knows the content as, as this tenant's; where there are none, as the digest alone."""
    return key_of(digest, "" if owner is None else str(owner))


@dataclass(frozen=True, slots=True)
class Resolved:
    """The adapter version that a model string means at this moment."""

    tenant: str
    name: str
    version: int
    digest: str
    fingerprint: str
    """The base model it was made for."""
    max_rank: int
    bytes: int
    created_at: int
    owner: int | None = None
    """Number of its tenant, where there are tenants."""
    resident_limit: int | None = None
    """Its owner's limit resident_bytes."""

    @property
    def key(self) -> str:
        """What the engine knows it by."""
        return engine_key(self.digest, self.owner)

    @property
    def resident_limits(self) -> dict[str, int | None]:
        """Of its owner, as service/engine/messages.py has them."""
        return {} if self.owner is None else {str(self.owner): self.resident_limit}

    def fits(self, *fingerprints: str) -> bool:
        """Whether it was made for the base that is known by these fingerprints (Manifest.fingerprints)."""
        return self.fingerprint in fingerprints

    def require_base(self, *fingerprints: str) -> None:
        """Raises WrongBase unless it was made for the base that is known by these fingerprints."""
        if not self.fits(*fingerprints):
            raise WrongBase(self.name, self.version)


@dataclass(frozen=True, slots=True)
class File:
    """One uploaded file, stored as the blob `sha256`."""

    filename: str
    sha256: str
    bytes: int


@dataclass(frozen=True, slots=True)
class Version:
    """An immutable version. `spec`: rank, alpha, ... for display. `files` is only filled where it says so."""

    id: int
    number: int
    digest: str
    fingerprint: str
    bytes: int
    max_rank: int
    spec: dict[str, Any]
    created_at: int
    files: tuple[File, ...] = ()
    aliases: tuple[str, ...] = ()
    owner: int | None = None
    """Number of its tenant, where there are tenants."""

    @property
    def key(self) -> str:
        """What the engine knows it by."""
        return engine_key(self.digest, self.owner)


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter with its default version."""

    id: int
    tenant: str
    name: str
    description: str
    pinned: bool
    default_version: int
    revision: int
    created_at: int
    updated_at: int
    versions: tuple[int, ...]
    aliases: dict[str, int]
    labels: dict[str, str]
    default: Version
    visibility: str = "private"
    shared_with: tuple[str, ...] = ()

    @property
    def etag(self) -> str:
        """Changes with every change of the adapter, and never comes back, not even for a later one of that name."""
        return etag_of(self.id, self.revision)


def etag_of(adapter_id: int, revision: int) -> str:
    return f'"{adapter_id}.{revision}"'


@dataclass(frozen=True, slots=True)
class Page(Generic[T]):
    """A part of a list, in order; `has_more` tells that there is something after its last item."""

    items: list[T]
    has_more: bool


@dataclass(frozen=True, slots=True)
class NewVersion:
    """What publishing writes: the inspected upload."""

    digest: str
    fingerprint: str
    max_rank: int
    spec: dict[str, Any]
    files: tuple[File, ...]

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files)


@dataclass(frozen=True, slots=True)
class Removed:
    """What a deletion took away. Blobs stay until somebody deletes those in `unused`."""

    digests: dict[int, str]
    """Of the versions that went, by number."""
    unused: frozenset[str]
    """Blobs (records and files) that no version needs any more."""
    freed_files: int
    freed_bytes: int
    adapter_gone: bool = False
    owner: int | None = None
    """Number of the tenant whose they were."""

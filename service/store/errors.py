"""Failures of the catalogue.

CatalogueError
├── NotFound
│   ├── AdapterNotFound      no adapter of that name
│   ├── VersionNotFound      the adapter exists, that version does not
│   ├── AliasNotFound        the adapter exists, that alias does not
│   ├── TenantNotFound       no tenant of that name
│   └── KeyNotFound          the tenant has no such key
├── Conflict
│   ├── AdapterExists        the name is taken by an adapter with other content
│   ├── TenantExists         the name is taken by another tenant
│   ├── TenantReserved       no tenant may be called so, or this one cannot be deleted
│   ├── VersionInUse         the version is the default, or an alias points to it
│   └── WrongBase            the version was made for another base model
├── PreconditionFailed       If-Match / If-None-Match does not hold
├── QuotaReached             a limit of the tenant is in the way
├── UnstorableText           text that the database cannot hold
└── CatalogueUnavailable
    ├── CatalogueFull        the disk is full
    ├── CatalogueBusy        another process has held the lock too long
    ├── ClaimLost            an upload took so long, or was cut off so long, that it was taken for dead
    ├── CatalogueDamaged     the database file is damaged
    ├── CatalogueTooNew      a newer version of this service has changed its schema
    └── CatalogueUnusable    it cannot be opened, read or written
"""

from __future__ import annotations


class CatalogueError(Exception):
    """Root. `code` is the machine-readable code of the HTTP error, `param` the field it is about."""

    code = "catalogue_error"
    param: str | None = None


class NotFound(CatalogueError):  # noqa: N818 - these names say what happened
    """What was asked for does not exist (HTTP 404)."""

    code = "not_found"


class AdapterNotFound(NotFound):
    code = "adapter_not_found"

    def __init__(self, name: str) -> None:
        super().__init__(f"There is no adapter named {name!r}.")
        self.name = name


class VersionNotFound(NotFound):
    code = "version_not_found"

    def __init__(self, name: str, selector: str | int) -> None:
        super().__init__(f"Adapter {name!r} has no version {selector!r}.")
        self.name = name
        self.selector = selector


class AliasNotFound(NotFound):
    code = "alias_not_found"

    def __init__(self, name: str, alias: str) -> None:
        super().__init__(f"Adapter {name!r} has no alias {alias!r}.")


class TenantNotFound(NotFound):
    code = "tenant_not_found"

    def __init__(self, tenant: str) -> None:
        super().__init__(f"There is no tenant {tenant!r}.")


class KeyNotFound(NotFound):
    code = "key_not_found"

    def __init__(self, tenant: str, key_id: str) -> None:
        super().__init__(f"Tenant {tenant!r} has no key {key_id!r}.")


class Conflict(CatalogueError):  # noqa: N818
    """The request contradicts the present state (HTTP 409)."""

    code = "conflict"


class AdapterExists(Conflict):
    code = "adapter_exists"
    param = "name"

    def __init__(self, name: str) -> None:
        super().__init__(f"Adapter {name!r} exists with other content. PUT adds a version; or use another name.")


class TenantExists(Conflict):
    code = "tenant_exists"
    param = "name"

    def __init__(self, tenant: str) -> None:
        super().__init__(f"There is a tenant {tenant!r} already.")


class TenantReserved(Conflict):
    """The name means something else, or the tenant cannot be done without."""

    code = "tenant_reserved"
    param = "name"

    def __init__(self, tenant: str) -> None:
        super().__init__(f"{tenant!r} is reserved: no tenant may be given this name, nor may it be deleted.")


class VersionInUse(Conflict):
    code = "version_in_use"


class WrongBase(Conflict):
    code = "adapter_incompatible"
    param = "model"

    def __init__(self, name: str, version: int) -> None:
        super().__init__(
            f"Version {version} of adapter {name!r} was made for another base model than the one served now; "
            "it is kept, but it cannot be used here."
        )


class PreconditionFailed(CatalogueError):  # noqa: N818
    """HTTP 412."""

    code = "precondition_failed"


class UnstorableText(CatalogueError):  # noqa: N818
    """HTTP 400."""

    code = "invalid_text"

    def __init__(self) -> None:
        super().__init__("A text of the request has the character U+0000, which cannot be stored.")


class QuotaReached(CatalogueError):  # noqa: N818
    """A limit of the tenant (service/limits.py) is in the way. `status`: of the HTTP error; `param`: the limit."""

    code = "limit_exceeded"

    def __init__(self, name: str, limit: int, detail: str, *, status: int = 413) -> None:
        super().__init__(f"This would exceed the tenant's limit {name} of {limit}: {detail}.")
        self.param = name
        self.status = status


class CatalogueUnavailable(CatalogueError):  # noqa: N818
    """The database itself fails. `status`: of the HTTP error."""

    code = "catalogue_unavailable"
    status = 503
    retry_after_s: float | None = 5.0


class CatalogueFull(CatalogueUnavailable):
    code = "insufficient_storage"
    status = 507

    def __init__(self) -> None:
        super().__init__("The server's disk is full.")


class CatalogueBusy(CatalogueUnavailable):
    def __init__(self) -> None:
        super().__init__("The catalogue is busy. Try again.")


class ClaimLost(CatalogueUnavailable):
    def __init__(self) -> None:
        super().__init__("The server lost its connection to the catalogue during the upload. Try again.")


class CatalogueDamaged(CatalogueUnavailable):
    code = "catalogue_damaged"
    status = 500
    retry_after_s = None

    def __init__(self, detail: str) -> None:
        super().__init__(f"The server's catalogue is damaged ({detail}); its operator has to restore it.")


class CatalogueTooNew(CatalogueUnavailable):
    retry_after_s = None

    def __init__(self, revision: str) -> None:
        super().__init__(
            f"The catalogue's schema has revision {revision}, which is newer than this version of the service knows."
        )
        self.revision = revision


class CatalogueUnusable(CatalogueUnavailable):
    """`reason`: what only the operator should read."""

    def __init__(self, detail: str, reason: str = "") -> None:
        super().__init__(f"The server's catalogue cannot be used at present: {detail}.")
        self.reason = reason or detail

"""Failures of the catalogue.

CatalogueError
├── NotFound
│   ├── AdapterNotFound      no adapter of that name
│   ├── VersionNotFound      the adapter exists, that version does not
│   └── AliasNotFound        the adapter exists, that alias does not
├── Conflict
│   ├── AdapterExists        the name is taken by an adapter with other content
│   ├── VersionInUse         the version is the default, or an alias points to it
│   └── WrongBase            the version was made for another base model
├── PreconditionFailed       If-Match / If-None-Match does not hold
└── CatalogueUnavailable
    ├── CatalogueFull        the disk is full
    ├── CatalogueBusy        another process has held the lock too long
    ├── CatalogueDamaged     the database file is damaged
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


class Conflict(CatalogueError):  # noqa: N818
    """The request contradicts the present state (HTTP 409)."""

    code = "conflict"


class AdapterExists(Conflict):
    code = "adapter_exists"
    param = "name"

    def __init__(self, name: str) -> None:
        super().__init__(f"Adapter {name!r} exists with other content. PUT adds a version; or use another name.")


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


class CatalogueDamaged(CatalogueUnavailable):
    code = "catalogue_damaged"
    status = 500
    retry_after_s = None

    def __init__(self, detail: str) -> None:
        super().__init__(f"The server's catalogue is damaged ({detail}); its operator has to restore it.")


class CatalogueUnusable(CatalogueUnavailable):
    def __init__(self, detail: str) -> None:
        super().__init__(f"The server's catalogue cannot be used at present: {detail}.")

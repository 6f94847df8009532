"""The catalogue: names, versions and aliases of adapters, in SQLite or PostgreSQL.

Read catalogue.py first (what there is), then edits.py (how it changes). Files' bytes are in adapters/blobs.py.
"""

from service.store.catalogue import Catalogue
from service.store.errors import (
    AdapterExists,
    AdapterNotFound,
    AliasNotFound,
    CatalogueError,
    Conflict,
    NotFound,
    PreconditionFailed,
    VersionInUse,
    VersionNotFound,
    WrongBase,
)
from service.store.records import Adapter, File, NewVersion, Page, Resolved, Version

__all__ = [
    "Adapter",
    "AdapterExists",
    "AdapterNotFound",
    "AliasNotFound",
    "Catalogue",
    "CatalogueError",
    "Conflict",
    "File",
    "NewVersion",
    "NotFound",
    "Page",
    "PreconditionFailed",
    "Resolved",
    "Version",
    "VersionInUse",
    "VersionNotFound",
    "WrongBase",
]

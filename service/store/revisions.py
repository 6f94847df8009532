"""The revisions of the catalogue's schema: what the files of migrations/versions are named by."""

from __future__ import annotations

from pathlib import Path

from service.store.errors import CatalogueTooNew

MIGRATIONS = Path(__file__).parent / "migrations"
REVISIONS = tuple(sorted(path.name.partition("_")[0] for path in (MIGRATIONS / "versions").glob("[0-9]*_*.py")))
REVISION = REVISIONS[-1]
TABLE = "alembic_version"
QUERY = f"SELECT version_num FROM {TABLE}"
"""Where a database says which it has."""


def require_known(revision: str | None) -> None:
    """Raises CatalogueTooNew for one that this version does not know. None: there is no schema yet."""
    if revision is not None and revision not in REVISIONS:
        raise CatalogueTooNew(revision)

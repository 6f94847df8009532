"""Opens the database: pool, transactions, schema. SQLite by default, PostgreSQL by URL.

SQLite: WAL with synchronous=FULL, so a committed row survives a power cut; writers take the lock at BEGIN (IMMEDIATE),
because a transaction that upgrades from read to write in the middle can fail with "database is locked" at once.
PostgreSQL: writers serialise on one advisory lock. Uploads and management calls are rare next to inference, which only
reads, and the order lets a writer move or delete blobs inside its transaction without racing another.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from service.store.errors import CatalogueBusy, CatalogueDamaged, CatalogueFull, CatalogueUnusable

REVISION = "0002"
"""The newest one in migrations/versions."""
WRITERS_LOCK = 0x10_7A_91  # key of the advisory lock; any constant of this project's own
BUSY_TIMEOUT_MS = 30_000


def sqlite_url(path: Path) -> str:
    """URL of a database file."""
    return f"sqlite+aiosqlite:///{path}"


class Database:
    """A pool of connections to one database, whose schema is at the newest revision."""

    def __init__(self, engine: AsyncEngine) -> None:
        self.engine = engine
        self._is_sqlite = engine.dialect.name == "sqlite"
        # Writers of this process queue here in order; SQLite's own waiting is polling, and unfair.
        self._writers = asyncio.Lock()

    @classmethod
    async def open(cls, url: str) -> Database:
        """Connects and brings the schema up to date.

        `url`: sqlite+aiosqlite:///path (plain sqlite:/// is taken as that) or postgresql+asyncpg://...
        """
        parsed = sa.make_url(url)
        if parsed.drivername == "sqlite":
            parsed = parsed.set(drivername="sqlite+aiosqlite")
        elif parsed.drivername in ("postgresql", "postgres"):
            parsed = parsed.set(drivername="postgresql+asyncpg")
        options: dict[str, Any] = {"pool_size": 4, "max_overflow": 12}
        if parsed.get_backend_name() == "sqlite":
            # isolation_level=None: the driver starts no transactions of its own.
            options["connect_args"] = {"isolation_level": None, "timeout": BUSY_TIMEOUT_MS / 1000}
        engine = create_async_engine(parsed, **options)
        if parsed.get_backend_name() == "sqlite":
            sa.event.listen(engine.sync_engine, "connect", _configure_sqlite)
        database = cls(engine)
        try:
            async with database.write() as connection:
                await connection.run_sync(_migrate)
        except BaseException:
            await engine.dispose()
            raise
        return database

    @asynccontextmanager
    async def read(self) -> AsyncIterator[AsyncConnection]:
        """A connection for one SELECT (each statement sees the newest committed rows)."""
        with _translated():
            async with self.engine.connect() as connection:
                yield connection

    @asynccontextmanager
    async def snapshot(self) -> AsyncIterator[AsyncConnection]:
        """A connection whose SELECTs all see the same state."""
        with _translated():
            async with self.engine.connect() as connection:
                if self._is_sqlite:
                    await connection.exec_driver_sql("BEGIN")
                else:
                    await connection.execution_options(isolation_level="REPEATABLE READ")
                yield connection

    @asynccontextmanager
    async def write(self) -> AsyncIterator[AsyncConnection]:
        """The only writer, until the block ends: then the rows are committed and durable, or rolled back on error."""
        async with self._writers:
            with _translated():
                async with self.engine.connect() as connection:
                    if self._is_sqlite:
                        await connection.exec_driver_sql("BEGIN IMMEDIATE")
                    else:
                        await connection.execute(sa.select(sa.func.pg_advisory_xact_lock(WRITERS_LOCK)))
                    yield connection
                    await connection.commit()

    async def close(self) -> None:
        await self.engine.dispose()


@contextmanager
def _translated() -> Iterator[None]:
    """Failures of the database itself as CatalogueUnavailable; mistakes in statements stay what they are."""
    try:
        yield
    except DBAPIError as error:
        name = getattr(error.orig, "sqlite_errorname", "")
        detail = str(error.orig)
        if name in ("SQLITE_FULL", "SQLITE_IOERR_WRITE", "SQLITE_IOERR_SHMSIZE"):
            raise CatalogueFull from error
        if name.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB")):
            raise CatalogueDamaged(detail) from error
        if name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
            raise CatalogueBusy from error
        if name.startswith(("SQLITE_IOERR", "SQLITE_CANTOPEN", "SQLITE_READONLY")) or error.connection_invalidated:
            raise CatalogueUnusable(detail) from error
        raise


def _configure_sqlite(connection: Any, _record: Any) -> None:
    cursor = connection.cursor()
    for pragma in (
        f"busy_timeout = {BUSY_TIMEOUT_MS}",
        "journal_mode = WAL",
        "synchronous = FULL",
        "foreign_keys = ON",
    ):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _migrate(connection: sa.Connection) -> None:
    """Brings the schema to the newest revision. Alembic takes a third of a second to import: only if it is needed."""
    if (
        sa.inspect(connection).has_table("alembic_version")
        and connection.scalar(sa.text("SELECT version_num FROM alembic_version")) == REVISION
    ):
        return
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    config.attributes["connection"] = connection
    command.upgrade(config, "head")

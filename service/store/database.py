"""Opens the database: pool, transactions, schema. SQLite by default, PostgreSQL by URL.

SQLite: WAL with synchronous=FULL, so a committed row survives a power cut; writers take the lock at BEGIN (IMMEDIATE),
because a transaction that upgrades from read to write in the middle can fail with "database is locked" at once.
PostgreSQL: writers of all instances serialise on one advisory lock. Uploads and management calls are rare next to
inference, which only reads, and hold it for rows alone: bytes are stored before, under a claim (blob_book.py). Reads of
one statement run without a transaction, which saves two round trips.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError, InterfaceError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from service.store.errors import (
    CatalogueBusy,
    CatalogueDamaged,
    CatalogueError,
    CatalogueFull,
    CatalogueUnusable,
    UnstorableText,
)
from service.store.revisions import MIGRATIONS, QUERY, REVISION, TABLE, require_known

WRITERS_LOCK = 0x10_7A_91  # key of the advisory lock; any constant of this project's own
BUSY_TIMEOUT_MS = 30_000
CONNECT_TIMEOUT_S = 5.0
STATEMENT_TIMEOUT_S = 60.0
"""Of one statement on PostgreSQL, waiting for the writers' lock included: a server that hangs is found out."""


def sqlite_url(path: Path) -> str:
    """URL of a database file."""
    return f"sqlite+aiosqlite:///{path}"


class Database:
    """A pool of connections to one database, whose schema is at the newest revision."""

    def __init__(self, engine: AsyncEngine) -> None:
        self.engine = engine
        self._reading = engine
        if engine.dialect.name != "sqlite":
            self._reading = engine.execution_options(isolation_level="AUTOCOMMIT")
        self.is_sqlite = engine.dialect.name == "sqlite"
        self._here: sa.Connection | None = None
        """To SQLite, without a thread of its own."""
        # Writers of this process queue here in order; SQLite's own waiting is polling, and unfair.
        self._writers = asyncio.Lock()

    @classmethod
    def unmigrated(cls, url: str) -> Database:
        """Nothing is asked or changed by this."""
        return cls(_engine(url))

    @classmethod
    async def open(cls, url: str) -> Database:
        """Connects and brings the schema up to date.

        `url`: sqlite+aiosqlite:///path (plain sqlite:/// is taken as that) or postgresql+asyncpg://...
        """
        database = cls(_engine(url))
        try:
            async with database.write() as connection:
                await connection.run_sync(_migrate)
        except BaseException:
            await database.close()
            raise
        return database

    @asynccontextmanager
    async def read(self) -> AsyncIterator[AsyncConnection]:
        """A connection for one SELECT (each statement sees the newest committed rows)."""
        async with self._connected(self._reading) as connection:
            yield connection

    async def ask(self, statement: sa.Select[Any], values: dict[str, Any]) -> sa.Row[Any] | None:
        """The only row of a short SELECT over indices, as every request has some; None if there is none.

        SQLite is read right here, in the event loop: 0.1 ms, where a connection of the pool takes 1 to 2 for its
        thread's turns (connect, execute, rollback). Readers wait for no writer (WAL)."""
        if self.is_sqlite:
            try:
                if self._here is None:
                    self._here = _connection_here(self.engine.url)
                return self._here.execute(statement, values).one_or_none()
            except SQLAlchemyError:
                self._leave()  # and whoever asks in earnest finds out what is wrong, and waits if need be
        async with self.read() as connection:
            found: sa.Row[Any] | None = (await connection.execute(statement, values)).one_or_none()
            return found

    def _leave(self) -> None:
        if self._here is not None:
            self._here.close()
            self._here.engine.dispose()
            self._here = None

    @asynccontextmanager
    async def snapshot(self) -> AsyncIterator[AsyncConnection]:
        """A connection whose SELECTs all see the same state."""
        async with self._connected(self.engine) as connection:
            if self.is_sqlite:
                await connection.exec_driver_sql("BEGIN")
            else:
                await connection.execution_options(isolation_level="REPEATABLE READ")
            yield connection

    @asynccontextmanager
    async def write(self) -> AsyncIterator[AsyncConnection]:
        """The only writer, until the block ends: then the rows are committed and durable, or rolled back on error."""
        async with self._writers, self._connected(self.engine) as connection:
            if self.is_sqlite:
                await connection.exec_driver_sql("BEGIN IMMEDIATE")
            else:
                await connection.execute(sa.select(sa.func.pg_advisory_xact_lock(WRITERS_LOCK)))
            yield connection
            await connection.commit()

    @asynccontextmanager
    async def _connected(self, engine: AsyncEngine) -> AsyncIterator[AsyncConnection]:
        with _translated():
            connection = engine.connect()
            try:
                await connection.start()
            except (SQLAlchemyError, CatalogueError):
                raise
            except Exception as error:  # the driver's own, as there is no connection yet: refused, no such host
                raise _unreachable(error) from error
            try:
                yield connection
            finally:
                await connection.close()

    async def close(self) -> None:
        self._leave()
        await self.engine.dispose()


def _engine(url: str) -> AsyncEngine:
    parsed = sa.make_url(url)
    if parsed.drivername == "sqlite":
        parsed = parsed.set(drivername="sqlite+aiosqlite")
    elif parsed.drivername in ("postgresql", "postgres"):
        parsed = parsed.set(drivername="postgresql+asyncpg")
    options: dict[str, Any] = {"pool_size": 4, "max_overflow": 12}
    if parsed.get_backend_name() == "sqlite":
        # isolation_level=None: the driver starts no transactions of its own.
        options["connect_args"] = {"isolation_level": None, "timeout": BUSY_TIMEOUT_MS / 1000}
    else:
        options["connect_args"] = {
            "timeout": CONNECT_TIMEOUT_S,
            "command_timeout": STATEMENT_TIMEOUT_S,
            "server_settings": {"application_name": "loraplex", "lock_timeout": str(BUSY_TIMEOUT_MS)},
        }
        # The connections used last are used first, so that those of a quiet time are let go by whoever counts them.
        options |= {"pool_use_lifo": True, "pool_recycle": 1800}
    engine = create_async_engine(parsed, hide_parameters=True, **options)
    if parsed.get_backend_name() == "sqlite":
        sa.event.listen(engine.sync_engine, "connect", _configure_sqlite)
    return engine


def _connection_here(url: sa.URL) -> sa.Connection:
    """To a SQLite file, to be used in this thread; it waits for nobody, and writes nothing."""
    engine = sa.create_engine(
        sa.URL.create("sqlite", database=url.database),
        hide_parameters=True,
        poolclass=sa.NullPool,
        connect_args={"isolation_level": None, "timeout": 0.0, "check_same_thread": False},
    )
    connection = engine.connect()
    connection.exec_driver_sql("PRAGMA query_only = ON")
    return connection


async def check(url: str) -> None:
    """Raises CatalogueUnavailable unless the database answers, CatalogueTooNew if this version does not know its
    schema; changes nothing."""
    found = Database.unmigrated(url)
    try:
        async with found.read() as connection:
            await connection.run_sync(_revision)
    finally:
        await found.close()


@contextmanager
def _translated() -> Iterator[None]:
    """Failures of the database itself as CatalogueUnavailable; mistakes in statements stay what they are."""
    try:
        yield
    except DBAPIError as error:
        name = getattr(error.orig, "sqlite_errorname", "")
        state = str(getattr(error.orig, "sqlstate", None) or "")
        detail = str(error.orig)
        if name in ("SQLITE_FULL", "SQLITE_IOERR_WRITE", "SQLITE_IOERR_SHMSIZE") or state == "53100":
            raise CatalogueFull from error
        if name.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB")):
            raise CatalogueDamaged(detail) from error
        if name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")) or state in _BUSY:
            raise CatalogueBusy from error
        if name.startswith(("SQLITE_IOERR", "SQLITE_CANTOPEN", "SQLITE_READONLY")):
            raise CatalogueUnusable(detail) from error
        if state == "22021":  # no text of PostgreSQL may hold U+0000
            raise UnstorableText from error
        if error.connection_invalidated or state.startswith(_GONE) or _says_gone(error):
            raise _unreachable(error.orig or error) from error
        raise
    except sa.exc.TimeoutError as error:  # every connection of the pool is taken
        raise CatalogueBusy from error
    except TimeoutError as error:
        raise _unreachable(error) from error


_BUSY = ("55P03", "40001", "40P01", "57014")  # lock not available, serialisation, deadlock, cancelled
_GONE = ("08", "28", "3D", "57P", "53", "25006", "58", "XX")
"""SQLSTATE classes: connection failed, not let in, no such database, shutdown, out of resources, a standby that takes
no writes, system failures."""


def _says_gone(error: DBAPIError) -> bool:
    return isinstance(error, InterfaceError) and "connection" in str(error.orig).lower()


def _unreachable(error: BaseException) -> CatalogueUnusable:
    """What the driver says (addresses, names of users) is for the operator, not for clients."""
    reason = " ".join(str(error).split()) or type(error).__name__
    return CatalogueUnusable("the database does not answer", reason)


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


def _revision(connection: sa.Connection) -> str | None:
    """The schema's; None: there is no schema yet. CatalogueTooNew for one that is not known here."""
    if not sa.inspect(connection).has_table(TABLE):
        return None
    found: str | None = connection.scalar(sa.text(QUERY))
    require_known(found)
    return found


def _migrate(connection: sa.Connection) -> None:
    """Brings the schema to the newest revision. Alembic takes a third of a second to import: only if it is needed."""
    if _revision(connection) == REVISION:
        return
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    config.attributes["connection"] = connection
    command.upgrade(config, "head")

"""What has to be true before the service starts: an address, a data folder, a catalogue and a database that it may use,
each checked before a model is fetched. Otherwise StartError, which says what to do. No torch, and SQLAlchemy only where
the catalogue is in PostgreSQL.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from service.engine import otlp
from service.settings import PREFIX, Settings
from service.store import backup
from service.store.errors import CatalogueTooNew, CatalogueUnavailable, CatalogueUnusable

TOO_NEW_HINT = "start the version of loraplex that last used it, or restore a backup from before: docs/operations.md"


class StartError(Exception):
    """The service cannot start, or cannot go on. str(): one line; `hint`: what to do."""

    def __init__(self, problem: str, hint: str = "") -> None:
        super().__init__(problem)
        self.hint = hint


@contextlib.contextmanager
def data_folder(settings: Settings) -> Iterator[None]:
    """Creates the data folder and holds it: one service per folder. The lock goes with the process.

    What is created is for this user alone: the catalogue has the tenants' descriptions and usage, the blobs their
    adapters. A folder that is there keeps its mode, which somebody may have chosen."""
    folders = [settings.data_dir, settings.blobs_dir, settings.cache_dir, settings.uploads_dir, settings.run_dir]
    folders.append(Path(settings.engine_socket.removeprefix("ipc://")).parent)
    try:
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = (settings.run_dir / "lock").open("a+")
    except OSError as exc:
        raise _unwritable(settings, exc) from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise StartError(
                f"{settings.data_dir} is in use by another loraplex (process {lock.read().strip() or 'unknown'})",
                "stop that one, or choose another data folder with --data-dir",
            ) from None
        try:
            lock.truncate(0)
            lock.write(f"{os.getpid()}\n")
            lock.flush()
        except OSError as exc:
            raise _unwritable(settings, exc) from None
        yield


def _unwritable(settings: Settings, exc: OSError) -> StartError:
    where = f" ({exc.filename})" if exc.filename else ""
    hint = "choose a folder that can be written, with --data-dir"
    if exc.errno in (errno.ENOSPC, errno.EDQUOT):
        hint = "free some space on its disk, or choose another folder with --data-dir"
    return StartError(f"{PREFIX}DATA_DIR={settings.data_dir}: {exc.strerror}{where}", hint)


def check_address(settings: Settings) -> None:
    """Raises StartError where anybody could do anything: an address that others can reach, and no keys."""
    if not settings.is_loopback and not settings.multi_tenant and not settings.allow_public:
        raise StartError(
            f"{PREFIX}HOST={settings.host}: whoever reaches this address could use and delete everything",
            f"set {PREFIX}ADMIN_KEY, so that every request needs a key, or {PREFIX}ALLOW_PUBLIC=true if something else "
            "keeps strangers out",
        )


def check_traces(settings: Settings) -> None:
    """Raises StartError where spans are asked for and OpenTelemetry is not installed."""
    if settings.traces_url and otlp.missing():
        raise StartError(
            f"{PREFIX}TRACES_URL={settings.traces_url}: OpenTelemetry is not installed",
            "install the extra: pip install 'loraplex[traces]'",
        )


def check_catalogue(settings: Settings) -> None:
    """Raises StartError unless the catalogue in the data folder can be read and this version knows its schema; copies
    it to its backup (docs/operations.md). A PostgreSQL server looks after its own."""
    if not settings.private_catalogue:
        return
    try:
        backup.check_and_copy(settings.catalogue_path, settings.blobs_dir)
    except backup.Damaged as exc:
        raise StartError(str(exc), "docs/operations.md says how to restore it: A damaged catalogue") from None
    except backup.Missing as exc:
        raise StartError(str(exc), "docs/operations.md says how to restore it: A catalogue that is gone") from None
    except CatalogueTooNew as exc:
        raise StartError(f"{settings.catalogue_path}: {exc}", TOO_NEW_HINT) from None
    except OSError as exc:
        raise _unwritable(settings, exc) from None


async def check_database(settings: Settings) -> None:
    """Raises StartError unless PostgreSQL answers, where the catalogue is there, and this version knows its schema."""
    if settings.private_catalogue:
        return
    from service.store import database

    where = f"{PREFIX}DATABASE_URL"
    try:
        await database.check(settings.database_address())
    except CatalogueTooNew as exc:
        raise StartError(f"{where}: {exc}", TOO_NEW_HINT) from None
    except CatalogueUnusable as exc:
        hint = "is PostgreSQL running, and are host, port, database, user and password right?"
        raise StartError(f"{where}: the database cannot be used: {exc.reason}", hint) from None
    except CatalogueUnavailable as exc:
        raise StartError(f"{where}: {exc}", "is something else using it? docs/operations.md") from None


async def check_neighbours(settings: Settings) -> None:
    """Raises StartError where services on one PostgreSQL would not find each other's files."""
    if settings.private_catalogue:
        return
    from service.store.blob_book import LEASE_S
    from service.store.instances import apart, instance_id

    files_at = settings.open_blobs().shared_at
    try:
        found = await apart(settings.database_address(), instance_id(settings.uploads_dir), files_at)
    except CatalogueUnavailable as exc:
        raise StartError(f"{PREFIX}DATABASE_URL: {exc}", "start again when the database answers") from None
    if found:
        raise StartError(
            f"{PREFIX}DATABASE_URL: another loraplex uses this database, and neither would find the other's files",
            f"give both the same {PREFIX}BLOBS_URL (s3://...), give this one a database of its own, or stop the other "
            f"one (if it was killed, it counts for {LEASE_S} s)",
        )


def bind(settings: Settings) -> socket.socket:
    """The service's TCP socket, not listening yet: while the base model is being fetched, connections are refused."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except socket.gaierror as exc:
        raise StartError(f"{PREFIX}HOST={settings.host}: {exc.strerror}", "give an address of this machine") from None
    bound = socket.socket(family, kind, protocol)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind(address)
    except OSError as exc:
        bound.close()
        raise unusable(settings, exc) from None
    return bound


def unusable(settings: Settings, exc: OSError) -> StartError:
    """Of an address that could not be bound, or not be listened on."""
    return StartError(
        f"{settings.host}:{settings.port} cannot be used: {exc.strerror}",
        "is another loraplex running? choose a port with --port, 0 for any free one",
    )

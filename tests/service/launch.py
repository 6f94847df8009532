"""Starts the service as an operator does, `python -m service ...`, and looks at its processes from outside."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx
import psutil

from service.settings import Settings
from tests.soundness import check_engine

ROOT = Path(__file__).resolve().parent.parent.parent
SIMULATED = '{"vocab_size": 49152}'
UNSOUND = "engine.errors.IntegrityError"
"""In the log of a service whose engine has found itself unsound, and was replaced."""
START_S = 180.0
"""Generous: a busy machine may take many times what an idle one does."""
PLAIN: dict[str, Any] = {"trust_env": False, "verify": False}
"""For httpx, where a client is made again and again for a service without TLS: loading certificates takes 28 ms of
processor each time, as much as the service needs for ten answers."""


def wait_for(condition: Callable[[], object], seconds: float = 60.0) -> None:
    """Raises TimeoutError if `condition` does not become true."""
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            raise TimeoutError(f"not within {seconds:g} s")
        time.sleep(0.05)


def run(*flags: str, timeout: float = 60.0, **env: str) -> subprocess.CompletedProcess[str]:
    """A start that is expected to end by itself; stdout and stderr together in `stdout`."""
    return subprocess.run(
        [sys.executable, "-m", "service", *flags],
        cwd=ROOT, env={**os.environ, **env}, text=True, timeout=timeout, check=False,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


class Launched:
    """One running service; `with` stops it. Output goes to `log`. `prefix`: a command that runs the service's."""

    def __init__(self, data_dir: Path, port: int, *flags: str, prefix: Sequence[str] = (), **env: str) -> None:
        self.data_dir = data_dir
        self.url = f"http://127.0.0.1:{port}"
        self.log = data_dir / "output.log"
        self.http = httpx.Client(base_url=self.url, timeout=120.0, **PLAIN)
        command = [*prefix, sys.executable, "-m", "service", "--port", str(port), "--data-dir", str(data_dir)]
        command += ["--integrity-s", "0", *flags]
        with self.log.open("w") as output:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env={**os.environ, **env},
                stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
            )  # fmt: skip
        self._seen: list[psutil.Process] = []

    def __enter__(self) -> Launched:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        try:
            if kind is None:
                self.check()
        finally:
            self._stop()

    def check(self) -> None:
        """That its engine, if it has one to ask, is sound, and that none before it was not."""
        if self.process.poll() is None and self.ready():
            with self._engine_address() as address:
                check_engine(address)
        assert UNSOUND not in self.log.read_text()

    @contextmanager
    def _engine_address(self) -> Iterator[str]:
        """Also where its data folder is a disk that this process does not see (tests/crash/confined.py). A link leads
        there: the way through /proc may be longer than a socket's path can be."""
        path = Path(Settings.load(data_dir=self.data_dir).engine_socket.removeprefix("ipc://"))
        inside = Path(f"/proc/{self.process.pid}/root{path}")
        with tempfile.TemporaryDirectory() as folder:
            if inside.exists() and not path.exists():
                link = Path(folder, "run")
                link.symlink_to(inside.parent)
                path = link / path.name
            yield f"ipc://{path}"

    def _stop(self) -> None:
        self.http.close()
        self.process.terminate()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def ready(self) -> bool:
        try:
            return self.http.get("/ready").status_code == 200
        except httpx.TransportError:
            return False

    def wait_announced(self) -> None:
        """Until the service has said that it is ready (after the examples were uploaded)."""

        def announced() -> bool:
            if self.process.poll() is not None:
                raise RuntimeError(f"the service ended:\n{self.log.read_text()}")
            return "loraplex is ready" in self.log.read_text()

        try:
            wait_for(announced, START_S)
        except TimeoutError as exc:
            raise RuntimeError(f"{exc}:\n{self.log.read_text()}") from None
        self.family()

    def family(self) -> list[psutil.Process]:
        """Every process of the service, itself included; remembered for `survivors`."""
        own = psutil.Process(self.process.pid)
        found = [own, *own.children(recursive=True)]
        self._seen += [process for process in found if process not in self._seen]
        return found

    def child(self, module: str) -> psutil.Process:
        """The running child that was started as `python -m module`."""
        return next(process for process in self.children(module))

    def children(self, module: str) -> Iterator[psutil.Process]:
        for process in self.family():
            try:
                if module in process.cmdline():
                    yield process
            except (psutil.NoSuchProcess, psutil.ZombieProcess):
                continue

    def survivors(self) -> list[psutil.Process]:
        """Those of the processes ever seen that still run."""
        return [p for p in self._seen if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]

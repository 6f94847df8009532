"""The process that the operator starts. It resolves the base model, binds the port, starts one engine process and the
API processes, replaces those that die or hang, and ends them all in the right order. It never loads torch, and
SQLAlchemy only where the catalogue is in PostgreSQL.

    supervisor ── engine process        python -m service.engine.process
              ├── API process(es)       python -m service.api_worker, all on one listening socket
              └── merger                python -m service.merger, from the first merge on
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import httpx
import msgspec

from adapters.errors import StoreUnavailable
from service import api_worker
from service.children import Child
from service.display import Display
from service.engine.client import EngineClient
from service.engine.config import CANNOT_START, EXIT_CANNOT_START
from service.examples import load_examples
from service.gguf_model import stop_helpers
from service.model_source import resolve_model
from service.settings import PREFIX, Settings
from service.startup_checks import (
    StartError,
    bind,
    check_address,
    check_catalogue,
    check_database,
    check_neighbours,
    check_traces,
    data_folder,
    unusable,
)
from service.store.errors import CatalogueUnavailable
from service.store.merges_due import merges_due

API_STOP_S = api_worker.GRACE_S + 5.0
ENGINE_STOP_S = 10.0
"""The engine is told to stop after the API processes have ended, so nothing is left for it to finish."""
RESOLVE_STOP_S = 5.0
"""What the search for the base model gets to end in order once its helpers were broken off."""
LEAVE_S = 5.0
"""What it may take to tell the database that this service has ended; it is found out anyway."""
SILENT_S = 5.0
"""An engine is killed when, for so long, it counts as silent (client.HEARTBEAT_TIMEOUT_S without an answer): some ten
seconds after it began to hang, so that service is back within half a minute. One whose step hangs does answer: it is
killed after client.STEP_TIMEOUT_S."""
CHECK_S = 0.2
BACKOFF_S = (0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
"""Pauses after ends in a row before a process was of any use."""
USEFUL_BACKOFF_S = 1.0
"""The longest pause after the end of one that had been of use."""
MERGES_CHECK_S = 0.5
"""So often it is asked whether there is a merge to do, while there is no merger yet."""
STEADY_S = 60.0
"""A process that ran this long starts its back-off anew."""


class Stopped(Exception):  # noqa: N818 - not an error
    """A signal asked for the end. `held_up`: a thread goes on that nothing can break off, as one that downloads; Python
    would wait for it."""

    held_up = False


class Supervisor:
    """One run of the service, from start to stop.

    `simulated`: JSON options of the simulated engine, or None for the real one. `examples`: upload the example
    adapters on the first start. `integrity_interval_s`: the engine's (engine/config.py), if not its own.
    """

    def __init__(
        self,
        settings: Settings,
        display: Display,
        *,
        examples: bool = False,
        simulated: str | None = None,
        silent_s: float = SILENT_S,
        integrity_interval_s: float | None = None,
    ) -> None:
        self._settings = settings
        self._display = display
        self._examples = examples
        self._simulated = simulated
        self._silent_s = silent_s
        self._integrity_interval_s = integrity_interval_s
        self._env: dict[str, str] = {}
        self._engine_arguments: list[str] = []
        self._children: set[Child] = set()
        self._announced = False
        self._stop = asyncio.Event()
        self._started = time.monotonic()

    async def run(self) -> None:
        """Serves until SIGINT or SIGTERM. Raises StartError, ModelError."""
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self._on_signal)
        loop.add_signal_handler(signal.SIGINT, self._on_signal)
        check_address(self._settings)
        check_traces(self._settings)
        with data_folder(self._settings), bind(self._settings) as listener:
            check_catalogue(self._settings)
            await check_database(self._settings)
            await check_neighbours(self._settings)
            await self._check_store()
            with self._display.steps():
                model = await self._resolved()
            self._prepare(model)
            # A start may have the process ids of an earlier one, as it always has in a container: figures of processes
            # that were killed then would count as those of the new ones.
            shutil.rmtree(self._settings.metrics_dir, ignore_errors=True)
            try:
                listener.listen(2048)
            except OSError as exc:  # two sockets may bind one port as long as neither listens
                raise unusable(self._settings, exc) from None
            client = EngineClient(self._settings.engine_socket)
            await client.connect()
            try:
                await self._serve(client, listener)
            finally:
                await self._end(client, listener)

    async def _check_store(self) -> None:
        """Says so if the files of adapters cannot be reached; what is packed already can be served all the same."""
        try:
            await asyncio.to_thread(self._settings.open_blobs().check)
        except StoreUnavailable as exc:
            self._display.line(f"{PREFIX}BLOBS_URL: {exc}; uploads and adapters not used yet will fail", "yellow")

    def _on_signal(self) -> None:
        if self._stop.is_set():  # the second time it is meant
            for child in self._children:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)
        else:
            self._stop.set()
            self._display.line("\nStopping: running requests are finished first, press Ctrl-C again to break them off.")

    async def _resolved(self) -> Path:
        source = self._settings.model, self._settings.data_dir, self._display
        threads = ThreadPoolExecutor(1)  # not the loop's own, which it waits for at its end
        work = threads.submit(resolve_model, *source)
        threads.shutdown(wait=False)
        try:
            await self._or_stop(asyncio.wrap_future(work))
        except Stopped as stopped:
            stop_helpers()
            await asyncio.to_thread(wait, [work], RESOLVE_STOP_S)
            stopped.held_up = not work.done()
            raise
        return work.result()

    def _prepare(self, model: Path) -> None:
        settings = self._settings
        hub_name = settings.model.partition("@")[0].rpartition("/")[2] if not Path(settings.model).exists() else ""
        inherited = {key: value for key, value in os.environ.items() if not key.startswith(PREFIX)}
        self._env = {**inherited, **settings.environment(), f"{PREFIX}MODEL": str(model)}
        self._env.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # they would write across the supervisor's own
        if "OMP_WAIT_POLICY" not in self._env:
            # Threads that wait for each other spin. OpenMP's own default makes answers several times slower where other
            # processes want the cores too; figures in ARCHITECTURE.md.
            self._env.setdefault("GOMP_SPINCOUNT", "2000")
        # After a process that was killed, Python's resource tracker removes the semaphores of its pool, as it should,
        # and warns of it on stderr: two lines in a log that may be JSON, about what the log says already.
        warnings = self._env.get("PYTHONWARNINGS")
        self._env["PYTHONWARNINGS"] = f"{warnings + ',' if warnings else ''}ignore:resource_tracker"
        if hub_name and not settings.served_name:
            self._env[f"{PREFIX}SERVED_NAME"] = hub_name  # the folder's name is a commit
        config = settings.engine_config(model)
        if self._integrity_interval_s is not None:
            config = msgspec.structs.replace(config, integrity_interval_s=self._integrity_interval_s)
        self._engine_arguments = [msgspec.json.encode(config).decode()]
        if self._simulated is not None:
            self._engine_arguments += ["--simulated", self._simulated]

    # ------------------------------------------------------------ running

    async def _serve(self, client: EngineClient, listener: socket.socket) -> None:
        engine = asyncio.create_task(self._keep_engine(client))
        workers = [asyncio.create_task(self._keep_api(n, listener)) for n in range(self._settings.api_workers)]
        tasks = [engine, *workers]
        try:
            with self._display.steps():
                self._display("loading the base model")
                await self._or_stop(asyncio.create_task(client.wait_ready()), *tasks)
                self._display("starting the API")
                await self._or_stop(asyncio.create_task(self._announce(client, listener)), *tasks)
            tasks.append(asyncio.create_task(self._keep_merger()))  # only now: it would slow the others' start
            await self._or_stop(asyncio.create_task(asyncio.Event().wait()), *tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _or_stop(self, work: asyncio.Future[Any], *watched: asyncio.Task[Any]) -> None:
        """Until `work` is done. Raises Stopped on a signal, and what a watched task raises."""
        stop = asyncio.create_task(self._stop.wait())
        try:
            await asyncio.wait([work, stop, *watched], return_when=asyncio.FIRST_COMPLETED)
            if stop.done():
                raise Stopped
            for task in (*watched, work):
                if task.done():
                    task.result()
        finally:
            stop.cancel()
            if not work.done():
                work.cancel()

    async def _keep_engine(self, client: EngineClient) -> None:
        """One engine process at any time. Raises StartError if the first one never becomes ready."""
        failures, ever_ready = 0, False
        while True:
            started = time.monotonic()
            async with self._child("engine", "service.engine.process", *self._engine_arguments) as child:
                was_ready = await self._watch_engine(child, client)
            ever_ready |= was_ready
            if not ever_ready:
                if child.process.returncode == EXIT_CANNOT_START:
                    reason = self._settings.cache_dir / CANNOT_START
                    raise StartError(*msgspec.json.decode(reason.read_bytes(), type=tuple[str, str]))
                raise StartError(
                    f"the engine {child.outcome} before it was ready", "its own messages above say what is wrong"
                )
            failures = 0 if time.monotonic() - started > STEADY_S else failures + 1
            await self._back_off("the engine", child, failures, USEFUL_BACKOFF_S if was_ready else BACKOFF_S[-1])

    async def _watch_engine(self, child: Child, client: EngineClient) -> bool:
        """Until the process has ended; kills it when it hangs. Returns whether it was ever ready."""
        ended = asyncio.create_task(child.wait())
        before, was_ready, checked_at = client.last_ready, False, time.monotonic()
        answered_at = checked_at
        try:
            while not ended.done():
                await asyncio.wait([ended], timeout=CHECK_S)
                late, checked_at = time.monotonic() - checked_at - CHECK_S, time.monotonic()
                if client.last_ready is not before:  # the hello of this process, not of the one before it
                    was_ready = True
                if late > 1.0:
                    answered_at += late  # this process was held up itself: what the engine said has not been read yet
                if client.answers:
                    answered_at = checked_at
                if was_ready and checked_at - answered_at > self._silent_s:
                    self._display.line(f"the engine has not answered for {self._silent_s:g} s: killing it", "yellow")
                    await child.kill()
                elif was_ready and client.stuck:
                    self._display.line(
                        f"the engine is stuck in a step of {client.step_age_s:.0f} s: killing it", "yellow"
                    )
                    await child.kill()
        finally:
            ended.cancel()
        return was_ready

    async def _keep_api(self, number: int, listener: socket.socket) -> None:
        """One API process at any time. Raises StartError if it ends by itself several times in a row, or in any way
        before the service was ready."""
        failures = ended = 0
        fd = listener.fileno()
        while True:
            started = time.monotonic()
            async with self._child(f"API process {number}", "service.api_worker", str(fd), fd=fd) as child:
                await child.wait()
            killed = self._announced and child.killed
            if time.monotonic() - started > STEADY_S:
                failures = ended = 0
            failures, ended = failures + 1, 0 if killed else ended + 1
            if ended > 3:
                raise StartError(
                    f"API process {number} {child.outcome}, {ended} times in a row",
                    "its own messages above say what is wrong",
                )
            await self._back_off(child.name, child, failures, USEFUL_BACKOFF_S if killed else BACKOFF_S[-1])

    async def _keep_merger(self) -> None:
        """One merger at any time, from when there is something for it to do. Nobody's requests depend on it, so its
        ends never end the service."""
        await self._merger_wanted()
        failures = 0
        while True:
            started = time.monotonic()
            async with self._child("the merger", "service.merger") as child:
                await child.wait()
            failures = 1 if time.monotonic() - started > STEADY_S else failures + 1
            await self._back_off(child.name, child, failures, USEFUL_BACKOFF_S if child.killed else BACKOFF_S[-1])

    async def _merger_wanted(self) -> None:
        """Until there is a merge to do, or something in its folder, which may be left over. Most services never merge,
        and a merger costs 1.4 s of processor and 90 MB."""
        settings = self._settings
        if not settings.private_catalogue:
            return  # it takes up what other services have left as well
        with contextlib.suppress(OSError):
            if any(path.name != "work" or any(path.iterdir()) for path in settings.merges_dir.iterdir()):
                return
        while True:
            if await asyncio.to_thread(merges_due, settings.catalogue_path):
                return
            await asyncio.sleep(MERGES_CHECK_S)

    @contextlib.asynccontextmanager
    async def _child(self, name: str, module: str, *arguments: str, fd: int | None = None) -> AsyncIterator[Child]:
        child = await Child.start(name, module, *arguments, env=self._env, pass_fds=[] if fd is None else [fd])
        self._children.add(child)
        yield child
        # Not in a finally: a cancelled watcher leaves its child to _end.
        self._children.discard(child)

    async def _back_off(self, what: str, child: Child, failures: int, longest: float) -> None:
        pause = min(longest, BACKOFF_S[min(failures, len(BACKOFF_S)) - 1]) if failures else 0.0
        self._display.line(f"{what} {child.outcome}; starting another one in {pause:g} s", "yellow")
        await asyncio.sleep(pause)

    async def _announce(self, client: EngineClient, listener: socket.socket) -> None:
        """Waits until the service is ready, uploads the examples, says where it is."""
        host, port = listener.getsockname()[:2]
        local = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
        url = f"http://[{local}]:{port}" if ":" in local else f"http://{local}:{port}"
        key = self._settings.admin_key.get_secret_value()
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        # verify=False: there is no TLS here, and the certificates that it would load take 30 ms of processor.
        async with httpx.AsyncClient(
            base_url=url, headers=headers, timeout=60.0, trust_env=False, verify=False
        ) as http:
            while True:
                found = await self._what_is_there(http)
                if found is not None:
                    break
                await asyncio.sleep(0.1)
        problems, models = found
        for problem in problems:
            self._display.line(problem, "yellow")
        ready = client.last_ready
        device = f"{ready.device}, {ready.manifest.dtype}" if ready else "unknown"
        seconds = time.monotonic() - self._started
        self._announced = True
        self._display.ready(url, models[0], device, models[1:], seconds)

    async def _what_is_there(self, http: httpx.AsyncClient) -> tuple[list[str], list[str]] | None:
        """(a line for each example that was not taken, names of the models). None if the service is not ready, or was
        not to the end: an API process that is killed in between is replaced like any other, and the next one asked."""
        with contextlib.suppress(httpx.HTTPError):
            if (await http.get("/ready")).status_code != 200:
                return None
            problems: list[str] = []
            if self._examples and not self._settings.model:  # they are made for the embedded model
                problems = await load_examples(http, self._settings.data_dir, self._display)
            listed = await http.get("/v1/models")
            if listed.status_code != 503:
                return problems, [model["id"] for model in listed.json()["data"]]
        return None

    # ------------------------------------------------------------ stopping

    async def _end(self, client: EngineClient, listener: socket.socket) -> None:
        """API processes first (they stop accepting and drain), then the engine, which has nothing left to do."""
        listener.close()
        engines = [child for child in self._children if child.name == "engine"]
        others = [child for child in self._children if child.name != "engine"]
        await asyncio.gather(*(child.stop(API_STOP_S) for child in others))
        await client.close()
        await asyncio.gather(*(child.stop(ENGINE_STOP_S) for child in engines))
        self._children.clear()
        if not self._settings.private_catalogue:
            from service.store.instances import instance_id, leave

            with contextlib.suppress(CatalogueUnavailable, TimeoutError):
                async with asyncio.timeout(LEAVE_S):
                    await leave(self._settings.database_address(), instance_id(self._settings.uploads_dir))

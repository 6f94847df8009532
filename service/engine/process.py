"""The engine process: `python -m service.engine.process '<EngineConfig as JSON>' [--simulated '<JSON>']`.

Two threads. The main thread runs the steps. The I/O thread reads the ROUTER socket: it answers Pings itself, so that
heartbeats tell of a step that hangs, and hands everything else over. What passes between them lies in two
queue.SimpleQueue; each side sleeps on its own wake-up (the queue itself, a socket pair in the poller).

Between two steps the main thread sends on the socket itself, under a lock. The I/O thread would have to win the
interpreter's lock for it, several times and up to 5 ms each, from a main thread that prepares the next step.

SIGTERM and SIGINT drain: new requests are refused, those accepted get DRAIN_S seconds, then the process exits with 0.
It does the same when its parent ends. Exit code 1: the engine is broken and should be started again; 2: this model is
not served, and starting again will not help.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import logging
import os
import queue
import secrets
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec
import zmq

from service.engine import context, lean, logs
from service.engine.config import CANNOT_START, EXIT_CANNOT_START, EngineConfig
from service.engine.core import Engine
from service.engine.errors import CannotStart, EngineBroken, IntegrityError
from service.engine.leaving import Leaving
from service.engine.messages import FromEngine, Heartbeat, Ping, Ready, Submit, ToEngine, decode_to_engine, encode
from service.engine.otlp import Spans
from service.engine.tracing import SequenceTracer

log = logging.getLogger("service.engine")

DRAIN_S = 20.0
"""What accepted requests get to finish after SIGTERM."""
CLIENT_TIMEOUT_S = 10.0
"""An API process not heard of for so long is gone; it pings every second."""
EXIT_GRACE_S = 5.0
"""After the drain time the main thread gets so long to end its step; then the process exits without it."""
LOADER_POLL_S = 0.01
"""While nothing runs and adapters are on their way, or the process drains; their first token may be late by this."""
STATS_INTERVAL_S = 0.25
IDLE_S = 1.0
"""After a step so long ago the books may be checked: 9 ms with 40,000 pages, for which who comes then has to wait. In
the short rest between one request and the next of the same client, it was always that next one."""
OVERDUE = 10
"""So many intervals after the last check the next rest will do, however short."""


@dataclass(frozen=True, slots=True)
class _Gone:
    """This client has not been heard of for CLIENT_TIMEOUT_S."""


@dataclass(frozen=True, slots=True)
class _Loaded:
    """The loader has finished something: poll it."""


@dataclass(frozen=True, slots=True)
class _Stop:
    """Drain and exit."""

    reason: str


Inbox = queue.SimpleQueue[tuple[bytes, ToEngine | _Gone | _Loaded | _Stop]]
Outbox = queue.SimpleQueue[tuple[bytes, FromEngine]]
Build = Callable[[EngineConfig, Callable[[bytes, FromEngine], None], Callable[[], None]], tuple[Engine, dict[str, str]]]
"""(configuration, send, wake) -> the engine and the versions to report. `wake` may be called on any thread."""


class Postman(threading.Thread):
    """The I/O thread, and its socket, on which the main thread sends as well (flush)."""

    def __init__(self, address: str, hello: Ready, inbox: Inbox, client_timeout_s: float, drain_s: float) -> None:
        super().__init__(name="engine-io", daemon=True)
        self.stats: dict[str, float] = {}
        """Replaced, never changed, by the main thread."""
        self.step_started: Callable[[], float | None] = lambda: None
        self.stop_at: float | None = None
        """time.monotonic() after which the process must not exist any more."""
        self._hello = hello
        self._inbox = inbox
        self._outbox: Outbox = queue.SimpleQueue()
        self._client_timeout_s = client_timeout_s
        self._drain_s = drain_s
        self._last_heard: dict[bytes, float] = {}
        self._greeted: set[bytes] = set()
        self._parent = os.getppid()
        self._parent_gone = False
        self._closing = False
        self._wake_in, self._wake_out = socket.socketpair()
        self._wake_in.setblocking(False)
        self._wake_out.setblocking(False)
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        # No high-water mark: beyond it a ROUTER drops messages in silence. A reader that hangs is given up after
        # client_timeout_s, and its queue with it.
        self._socket.sndhwm = self._socket.rcvhwm = 0
        self._socket.bind(address)
        # For the socket, and who was heard of. A ZeroMQ socket may pass between threads, not be used by two at once.
        self._lock = threading.Lock()

    def send(self, client: bytes, message: FromEngine) -> None:
        """From any thread; goes out with the next flush()."""
        self._outbox.put((client, message))

    def flush(self) -> None:
        """Sends what was put."""
        if self._outbox.empty():
            return
        with self._lock:
            self._send_all()
            # Sending may have swallowed the signal that something came; the thread waits for the next one.
            missed = int(self._socket.get(zmq.EVENTS)) & zmq.POLLIN
        if missed:
            self._wake()

    def close(self) -> None:
        """Send what is left and end the thread."""
        self._closing = True
        self._wake()
        self.join()
        # Not by the thread itself: it may see that it is to end before it is woken up for that.
        self._wake_in.close()
        self._wake_out.close()

    def _wake(self) -> None:
        # A full pair has woken the thread already.
        with contextlib.suppress(BlockingIOError):
            self._wake_in.send(b"\0")

    def run(self) -> None:
        try:
            self._loop()
        except Exception:
            log.exception("the engine's I/O thread failed")
            os._exit(1)  # deaf and mute, the process is of no use; the main thread may be in a long step
        finally:
            self._socket.close(linger=1000)
            self._context.term()

    def _loop(self) -> None:
        poller = select.poll()
        # Not the socket, which the main thread may be using, but its descriptor: readable when something has happened
        # since the socket was last used, so everything is taken each time.
        poller.register(int(self._socket.get(zmq.FD)), select.POLLIN)
        poller.register(self._wake_out, select.POLLIN)
        next_check = 0.0
        while True:
            poller.poll(1000)
            closing = self._closing  # before emptying the outbox: what was put before close() goes out
            with contextlib.suppress(BlockingIOError):
                while self._wake_out.recv(4096):
                    pass
            with self._lock:
                self._send_all()
                if closing:
                    return
                self._receive_all()
                if time.monotonic() >= next_check:
                    self._check()
                    next_check = time.monotonic() + 1.0

    def _send_all(self) -> None:
        while True:
            try:
                client, message = self._outbox.get_nowait()
            except queue.Empty:
                return
            self._socket.send_multipart((client, encode(message)))

    def _receive_all(self) -> None:
        while True:
            try:
                client, data = self._socket.recv_multipart(zmq.DONTWAIT)
            except zmq.Again:
                return
            except ValueError:
                log.warning("a message that is not of two frames was dropped")
                continue
            try:
                message = decode_to_engine(data)
            except msgspec.MsgspecError as error:
                log.warning("an unreadable message was dropped: %s", error)
                continue
            self._last_heard[client] = time.monotonic()
            if not isinstance(message, Ping):
                if isinstance(message, Submit) and message.trace:
                    message.received_ns = time.time_ns()
                self._inbox.put((client, message))
            elif client in self._greeted:
                self._socket.send_multipart((client, encode(self._heartbeat())))
            else:
                self._greeted.add(client)
                self._socket.send_multipart((client, encode(self._hello)))

    def _heartbeat(self) -> Heartbeat:
        started = self.step_started()
        return Heartbeat(self._hello.engine_id, time.monotonic() - started if started else 0.0, self.stats)

    def _check(self) -> None:
        """Once a second: who has gone?"""
        now = time.monotonic()
        for client, heard in list(self._last_heard.items()):
            if now - heard > self._client_timeout_s:
                del self._last_heard[client]
                self._greeted.discard(client)
                self._inbox.put((client, _Gone()))
        if os.getppid() != self._parent and not self._parent_gone:
            self._parent_gone = True
            self.stop_at = now + self._drain_s + EXIT_GRACE_S  # even if the main thread never hears of it
            self._inbox.put((b"", _Stop("the parent process ended")))
        if self.stop_at is not None and now > self.stop_at:
            log.error("the step in progress did not end; exiting without it")
            os._exit(1)


def check_at(checked: float, worked: float, interval: float) -> float:
    """When the books are to be checked, if nothing is done until then. checked, worked: the time of the last check, and
    of the last step's end."""
    rested = worked + min(IDLE_S, interval)
    return max(checked + interval, min(rested, checked + OVERDUE * interval))


class EngineProcess:
    """The main thread's half."""

    def __init__(
        self,
        config: EngineConfig,
        build: Build,
        *,
        client_timeout_s: float = CLIENT_TIMEOUT_S,
        drain_s: float = DRAIN_S,
    ) -> None:
        self.inbox: Inbox = queue.SimpleQueue()
        self._drain_s = drain_s
        self._drain_until: float | None = None
        self._integrity_interval_s = config.integrity_interval_s
        self._checked = time.monotonic()
        self._checks = 0
        self._worked = 0.0
        """time.monotonic() of the last step's end."""
        self._published = 0.0
        # The model is loaded before the address exists: a client's first Ping is answered by an engine that can serve.
        self.engine, versions = build(
            config,
            lambda client, message: self._postman.send(client, message),
            lambda: self.inbox.put((b"", _Loaded())),
        )
        if config.traces_url:
            self.engine.tracer = SequenceTracer(Spans(config.traces_url, "engine"))
        hello = Ready(secrets.token_hex(8), self.engine.manifest, self.engine.limits, config.device, versions)
        self._postman = Postman(config.socket, hello, self.inbox, client_timeout_s, drain_s)
        self._postman.step_started = lambda: self.engine.step_started

    def run(self) -> int:
        """Serve until told to stop; the exit code. Signals must only put _Stop into the inbox."""
        self._postman.start()
        log.info("engine ready: %s", self.engine.manifest.architecture)
        try:
            while not self._drained():
                self._handle_all()
                self._postman.flush()  # refusals need not wait for the step
                self._listen()
                worked = self.engine.step()
                self._postman.flush()
                if not worked:
                    self._sleep()
                    continue
                self._worked = time.monotonic()
                if self._worked - self._published > STATS_INTERVAL_S:
                    self._publish()
        except (EngineBroken, IntegrityError) as error:
            log.critical("the engine must be replaced: %s", error, exc_info=error)
            self.engine.refuse_all("engine_unavailable", "the engine failed and is being started again")
            return 1
        finally:
            self._postman.close()
            self.engine.close()
            if self.engine.tracer is not None:
                self.engine.tracer.close()
        log.info("engine stopped")
        return 0

    def stop(self, reason: str) -> None:
        """Drain and exit. Callable from a signal handler."""
        self.inbox.put((b"", _Stop(reason)))

    def _handle_all(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                self._handle(*self.inbox.get_nowait())

    def _listen(self) -> None:
        """While the device is busy and needs no further step: who comes now is in the next one."""
        with contextlib.suppress(queue.Empty):
            while (spare := self.engine.spare) > 0.0:
                self._handle(*self.inbox.get(timeout=spare))
                self.engine.advance_loads()
                self._postman.flush()

    def _handle(self, client: bytes, message: ToEngine | _Gone | _Loaded | _Stop) -> None:
        if isinstance(message, _Gone):
            log.warning("an API process has gone; its requests are aborted")
            self.engine.drop_client(client)
        elif isinstance(message, _Loaded):
            pass  # whoever handles messages advances the loads
        elif isinstance(message, _Stop):
            if self._drain_until is None:
                log.info("draining for at most %g s: %s", self._drain_s, message.reason)
                self._drain_until = time.monotonic() + self._drain_s
                self._postman.stop_at = self._drain_until + EXIT_GRACE_S
                self.engine.draining = True
        else:
            self.engine.handle(client, message)

    def _drained(self) -> bool:
        if self._drain_until is None:
            return False
        if self.engine.busy and time.monotonic() < self._drain_until:
            return False
        self.engine.refuse_all("shutting_down", "the engine is shutting down")
        return True

    def _sleep(self) -> None:
        """Until a message comes, or the loader may have brought something."""
        timeout: float | None = LOADER_POLL_S
        now = time.monotonic()
        # Who drains looks for the end: the stop may have been handled before the step, and no message comes after it.
        if not self.engine.expecting and self._drain_until is None:
            timeout = check_at(self._checked, self._worked, self._integrity_interval_s) - now
            if timeout <= 0.0:
                self.engine.check_integrity()
                self._checked, timeout = now, None
                self._checks += 1
        if not self.engine.expecting or now - self._published > STATS_INTERVAL_S:
            self._publish()
        with contextlib.suppress(queue.Empty):
            self._handle(*self.inbox.get(timeout=timeout))

    def _publish(self) -> None:
        # An engine whose check fails ends: the counter tells that all went well so often.
        self._postman.stats = {**self.engine.stats(), "integrity_checks_total": self._checks}
        self._published = time.monotonic()


def _process(config: EngineConfig, simulated_options: str | None) -> EngineProcess:
    if simulated_options is None:
        if config.device == "cuda":
            context.make_beside()
        if config.device == "cuda" and not config.deterministic:
            # As build_engine would ask for later, but torch warns of its function at every start.
            os.environ.setdefault("TORCH_BLAS_PREFER_CUBLASLT", "1")
            # Or that products leave multiprocessors free (adapters/kernels/side.py).
            os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        # torch: only from here on
        lean.import_losses()
        from service.engine.build import build_engine

        # Modules stay. Without them the collection at the end of the start takes 0.08 s instead of 0.5. Garbage among
        # them is never freed: the process had 458 MB with and without (two shared cores).
        gc.freeze()
        return EngineProcess(config, build_engine)
    from service.engine import simulated

    options = msgspec.json.decode(simulated_options, type=simulated.Options)
    return EngineProcess(
        config,
        lambda config, send, wake: simulated.build_engine(config, send, options, wake=wake),
        client_timeout_s=options.client_timeout_s,
        drain_s=options.drain_s,
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m service.engine.process", description="The loraplex engine.")
    parser.add_argument("config", help="EngineConfig as JSON")
    parser.add_argument("--simulated", metavar="JSON", help="no model: a simulation with these options (simulated.py)")
    arguments = parser.parse_args(argv)
    config = msgspec.json.decode(arguments.config, type=EngineConfig)
    logs.configure(config.log_level, config.log_format)
    gc.disable()  # while everything is imported and made, there is nothing to collect: a fifth of the imports' time
    try:
        process = _process(config, arguments.simulated)
    except CannotStart as error:
        log.critical("cannot start: %s", error)
        # For the supervisor, which says it as the last line of the start.
        reason = Path(config.cache_dir) / CANNOT_START
        reason.parent.mkdir(parents=True, exist_ok=True)
        reason.write_bytes(msgspec.json.encode((str(error), error.hint)))
        return EXIT_CANNOT_START
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: process.stop(signal.Signals(number).name))
    # What is there now stays. A full collection would look at all of it: 390,000 objects with torch, 0.2 s of a step.
    gc.collect()
    gc.freeze()
    gc.enable()
    return process.run()


if __name__ == "__main__":
    leaving = Leaving()
    sys.exit(leaving.with_code(main()))

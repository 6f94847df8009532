"""The API process's end of the engine: asyncio, no torch.

    client = EngineClient(address)
    await client.connect()
    ready = await client.wait_ready(timeout_s=60)
    async with client.submit(Submit(...)) as stream:
        async for delta in stream: ...

Leaving the `async with`, closing the stream or cancelling the task that waits on it sends Abort.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import msgspec
import zmq
import zmq.asyncio
from zmq.utils.monitor import recv_monitor_message

from adapters.manifest import Manifest
from service.engine.errors import EngineCallFailed, EngineCallTimedOut, EngineError, EngineRefused, EngineUnavailable
from service.engine.messages import (
    Abort,
    Delta,
    FromEngine,
    Heartbeat,
    Limits,
    LoadAdapter,
    Outputs,
    Ping,
    Prefetch,
    QueryResidency,
    Ready,
    Refused,
    Reply,
    Submit,
    TakeOccupancy,
    ToEngine,
    UnloadAdapter,
    decode_from_engine,
    encode,
)

log = logging.getLogger(__name__)

PING_INTERVAL_S = 1.0
HEARTBEAT_TIMEOUT_S = 5.0
"""An engine not heard of for so long is taken for lost."""
STEP_TIMEOUT_S = 60.0
"""A step that runs longer is taken for a hang."""

LAST_WORDS_S = 0.05
"""After the connection breaks: what the engine sent before it ended is read first."""


class Stream:
    """The deltas of one request, as an async iterator; ends when every sequence has its finish reason.

    Deltas that the reader has not taken yet are merged per sequence, so a slow reader holds at most one delta
    (of at most max_tokens tokens) per sequence and loses none. Raises EngineRefused or EngineUnavailable; the
    deltas received before that are dropped, since the request has failed as a whole.
    """

    def __init__(self, client: EngineClient, request_id: str, sequences: int) -> None:
        self._client = client
        self.request_id = request_id
        self._open = set(range(sequences))
        self._pending: dict[int, Delta] = {}
        self._error: EngineError | None = None
        self._closed = False
        self._waiter: asyncio.Future[None] | None = None
        """Of the reader, while it waits. An asyncio.Event would make the same future for every token, and queue it."""

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> Delta:
        try:
            while True:
                if self._error is not None:
                    error, self._error = self._error, None
                    self._closed = True
                    raise error
                if self._pending:
                    return self._pending.pop(next(iter(self._pending)))
                if self._closed or not self._open:
                    self._end()
                    raise StopAsyncIteration
                self._waiter = asyncio.get_running_loop().create_future()
                await self._waiter
        except asyncio.CancelledError:
            self.close()
            raise

    def close(self) -> None:
        """Abort what still runs. Idempotent; later reads end the iteration."""
        self._pending.clear()
        self._error = None
        self._end()

    async def aclose(self) -> None:
        self.close()

    async def __aenter__(self) -> Stream:
        return self

    async def __aexit__(self, *error: object) -> None:
        self.close()

    def __del__(self) -> None:
        # A reader that forgot the stream must not keep a sequence running on the device.
        if not self._closed and self._open:
            self._client._forget(self, abort=True)

    def _end(self) -> None:
        if not self._closed:
            self._closed = True
            self._client._forget(self, abort=bool(self._open))
        self._wake()

    def _wake(self) -> None:
        if (waiter := self._waiter) is not None:
            self._waiter = None
            if not waiter.done():
                waiter.set_result(None)

    def _push(self, delta: Delta) -> None:
        if delta.index not in self._open:
            return
        waiting = self._pending.get(delta.index)
        self._pending[delta.index] = delta if waiting is None else _merged(waiting, delta)
        if delta.finish_reason is not None:
            self._open.discard(delta.index)
        self._wake()

    def _drop(self, index: int | None) -> None:
        """The reader aborted one sequence, or all."""
        for each in [index] if index is not None else list(self._open):
            self._open.discard(each)
            self._pending.pop(each, None)
        self._wake()

    def _fail(self, error: EngineError) -> None:
        self._error = error
        self._pending.clear()
        self._open.clear()
        self._wake()


def _merged(first: Delta, then: Delta) -> Delta:
    first.token_ids.extend(then.token_ids)
    first.finish_reason = then.finish_reason
    if then.logprobs is not None:
        first.logprobs = [*(first.logprobs or []), *then.logprobs]
    return first


class EngineClient:
    """One connection to the engine. All methods belong to the event loop that called connect()."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.ready = asyncio.Event()
        """Set while there is an engine to submit to."""
        self.last_ready: Ready | None = None
        """The engine's last hello; stays after the engine is lost, so that uploads can still be validated."""
        self.on_hello: list[Callable[[Ready], None]] = []
        """Called with each new engine's hello: at the start, and after every restart."""
        self.stats: dict[str, float] = {}
        self.step_age_s = 0.0
        self._heard = 0.0
        self._engine_id: str | None = None
        self._connected = False
        # Weak, so that a stream dropped by its reader is collected, which aborts it.
        self._streams: weakref.WeakValueDictionary[str, Stream] = weakref.WeakValueDictionary()
        self._calls: dict[str, asyncio.Future[dict[str, Any] | None]] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._context: zmq.asyncio.Context | None = None
        self._socket: zmq.asyncio.Socket | None = None
        self._monitor: zmq.asyncio.Socket | None = None

    # ------------------------------------------------------------ life cycle

    async def connect(self) -> None:
        """Start talking; returns at once, whether there is an engine or not (it may start later)."""
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.linger = 0
        self._socket.sndhwm = self._socket.rcvhwm = 0
        self._monitor = self._socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED)
        self._socket.connect(self.address)
        self._tasks = [
            asyncio.create_task(self._receive(self._socket)),
            asyncio.create_task(self._ping()),
            asyncio.create_task(self._watch(self._monitor)),
        ]

    async def wait_ready(self, timeout_s: float | None = None) -> Ready:
        """Wait for the engine's hello. Raises EngineUnavailable after `timeout_s` seconds."""
        try:
            await asyncio.wait_for(self.ready.wait(), timeout_s)
        except TimeoutError:
            raise EngineUnavailable(f"the engine was not ready within {timeout_s:g} s") from None
        return self._hello()

    async def close(self) -> None:
        """Abort everything and disconnect."""
        for stream in list(self._streams.values()):
            stream.close()
        self._lost("the connection to the engine was closed")
        for task in self._tasks:
            task.cancel()
        for task in self._tasks:
            with contextlib.suppress(asyncio.CancelledError):
                await task
        self._tasks = []
        self._connected = False
        if self._socket is not None and self._monitor is not None and self._context is not None:
            self._socket.disable_monitor()
            self._monitor.close()
            # Not term(): it waits, on the event loop, for sockets that a cancelled task may still hold.
            self._context.destroy(linger=200)  # lets the last aborts leave
            self._socket = self._monitor = self._context = None

    # ------------------------------------------------------------ what is known of the engine

    @property
    def healthy(self) -> bool:
        """There is an engine, it answers, and its current step is not stuck."""
        return self.answers and not self.stuck

    @property
    def answers(self) -> bool:
        """There is an engine, and it was heard of lately. The age of its last heartbeat alone would not do: a process
        that is busy itself (2,000 requests at once) has not read the newest one yet; `_ping` takes care of that."""
        return self.ready.is_set() and self._connected

    @property
    def stuck(self) -> bool:
        """The engine answers, but its current step does not end."""
        return self.answers and self.step_age_s >= STEP_TIMEOUT_S

    @property
    def heartbeat_age_s(self) -> float:
        return time.monotonic() - self._heard

    @property
    def manifest(self) -> Manifest:
        """Of the last engine seen. Raises EngineUnavailable before the first."""
        return self._hello().manifest

    @property
    def limits(self) -> Limits:
        """Of the last engine seen. Raises EngineUnavailable before the first."""
        return self._hello().limits

    def _hello(self) -> Ready:
        if self.last_ready is None:
            raise EngineUnavailable("the engine has not started yet")
        return self.last_ready

    # ------------------------------------------------------------ requests

    def submit(self, request: Submit) -> Stream:
        """Send a request; tokens come from the returned stream. Raises EngineUnavailable (at once or from the
        stream) and, from the stream, EngineRefused. A generated stop token id is part of the last delta."""
        if request.request_id in self._streams:
            raise ValueError(f"request id {request.request_id!r} is in use")
        if not self.ready.is_set():
            raise EngineUnavailable("the engine is not ready")
        self._send(request)
        stream = Stream(self, request.request_id, len(request.prompts) * request.n)
        self._streams[request.request_id] = stream
        return stream

    def abort(self, request_id: str, index: int | None = None) -> None:
        """Free a request's sequences, or one of them (it then has no more deltas). Unknown ids are ignored."""
        stream = self._streams.get(request_id)
        if stream is None:
            return
        with contextlib.suppress(EngineUnavailable):
            self._send(Abort(request_id, index))
        stream._drop(index)

    def end_all(self, code: str, message: str) -> None:
        """Aborts every request that is not through yet, and has its reader, and whoever waits for a call, end with
        EngineRefused."""
        for stream in list(self._streams.values()):
            if stream._open:
                self._forget(stream, abort=True)
                stream._fail(EngineRefused(code, message))
        for answer in list(self._calls.values()):
            if not answer.done():
                answer.set_exception(EngineRefused(code, message))

    def prefetch(self, digests: Iterable[str], resident_limits: Mapping[str, int | None] | None = None) -> None:
        """Hint that these adapters are about to be used. `resident_limits`: of their owners, as in messages.py."""
        with contextlib.suppress(EngineUnavailable):
            self._send(Prefetch(tuple(digests), dict(resident_limits or {})))

    # ------------------------------------------------------------ control calls

    async def load(
        self, digest: str, timeout_s: float = 120.0, resident_limits: Mapping[str, int | None] | None = None
    ) -> None:
        """Bring an adapter to the device; returns when it lies there. `resident_limits`: as for `prefetch`."""
        await self._call(LoadAdapter(_call_id(), digest, dict(resident_limits or {})), timeout_s)

    async def unload(self, digest: str, forget: bool = False, timeout_s: float = 120.0) -> None:
        """Drop an adapter from device and host memory; returns when no lease holds it any more."""
        await self._call(UnloadAdapter(_call_id(), digest, forget), timeout_s)

    async def residency(self, digests: Iterable[str], timeout_s: float = 10.0) -> dict[str, str]:
        """{digest: "absent" | "loading" | "host" | "device" | "failed"}."""
        return await self._call(QueryResidency(_call_id(), tuple(digests)), timeout_s) or {}

    async def take_occupancy(self, timeout_s: float = 10.0) -> dict[str, tuple[int, float]]:
        """{digest: (loads to the device, bytes there times seconds)} since anybody last asked."""
        taken = await self._call(TakeOccupancy(_call_id()), timeout_s) or {}
        return {digest: (loads, seconds) for digest, (loads, seconds) in taken.items()}

    async def _call(
        self, message: LoadAdapter | UnloadAdapter | QueryResidency | TakeOccupancy, timeout_s: float
    ) -> dict[str, Any] | None:
        """Raises EngineCallFailed, EngineCallTimedOut, EngineUnavailable."""
        if not self.ready.is_set():
            raise EngineUnavailable("the engine is not ready")
        answer: asyncio.Future[dict[str, Any] | None] = asyncio.get_running_loop().create_future()
        self._calls[message.call_id] = answer
        try:
            self._send(message)
            return await asyncio.wait_for(answer, timeout_s)
        except TimeoutError:
            raise EngineCallTimedOut(f"the engine did not answer within {timeout_s:g} s") from None
        finally:
            self._calls.pop(message.call_id, None)

    # ------------------------------------------------------------ the wire

    def _send(self, message: ToEngine) -> None:
        if self._socket is None or not self._connected:
            raise EngineUnavailable("there is no engine to talk to")
        self._write(self._socket, message)

    def _write(self, socket: zmq.asyncio.Socket, message: ToEngine) -> None:
        """Without a peer, ZeroMQ keeps the message for an engine that starts later."""
        socket.send(encode(message), zmq.DONTWAIT)  # without a high-water mark this is done at once

    def _forget(self, stream: Stream, abort: bool) -> None:
        if self._streams.get(stream.request_id) is stream:  # a finished request's id may be in use again
            del self._streams[stream.request_id]
        if abort:
            with contextlib.suppress(EngineUnavailable):
                self._send(Abort(stream.request_id))

    async def _receive(self, socket: zmq.asyncio.Socket) -> None:
        while True:
            data = await socket.recv()
            try:
                self._handle(decode_from_engine(data))
            except msgspec.MsgspecError:
                log.exception("an unreadable message from the engine was dropped")

    def _handle(self, message: FromEngine) -> None:
        self._heard = time.monotonic()
        match message:
            case Outputs(deltas):
                # Readers wake in this order, and each takes some 50 us. First tokens come last in a step, and are
                # waited for most.
                for delta in reversed(deltas):
                    if (stream := self._streams.get(delta.request_id)) is not None:
                        stream._push(delta)
                        if not stream._open:
                            self._streams.pop(delta.request_id, None)
            case Heartbeat():
                self.step_age_s = message.step_age_s
                self.stats = message.stats
                if message.engine_id == self._engine_id:
                    self.ready.set()  # again, if it was only slow to answer
            case Refused():
                if (stream := self._streams.pop(message.request_id, None)) is not None:
                    stream._fail(EngineRefused(message.code, message.message, message.retry_after_s))
            case Reply():
                answer = self._calls.get(message.call_id)
                if answer is not None and not answer.done():
                    if message.error is None:
                        answer.set_result(message.value)
                    else:
                        answer.set_exception(EngineCallFailed(message.error, message.code))
            case Ready():
                # A hello says that the engine knows nothing of us: it has restarted, or had given us up for dead.
                self._lost("the engine was restarted")
                self.last_ready = message
                self._engine_id = message.engine_id
                self.step_age_s = 0.0
                self.ready.set()
                for listener in self.on_hello:
                    listener(message)

    async def _ping(self) -> None:
        while True:
            with contextlib.suppress(EngineUnavailable):
                self._send(Ping())
            asked = time.monotonic()
            await asyncio.sleep(PING_INTERVAL_S)
            if time.monotonic() - asked > 2 * PING_INTERVAL_S:
                continue  # this process was held up itself, and may not have read what the engine has answered
            if self.ready.is_set() and self.heartbeat_age_s >= HEARTBEAT_TIMEOUT_S:
                self._lost(f"the engine was not heard of for {self.heartbeat_age_s:.0f} s")

    async def _watch(self, monitor: zmq.asyncio.Socket) -> None:
        """The kernel tells at once that the engine's socket is there, or gone; heartbeats would take seconds."""
        while True:
            event = await recv_monitor_message(monitor)
            self._connected = event["event"] == zmq.EVENT_HANDSHAKE_SUCCEEDED
            if self._connected:
                self._send(Ping())
                continue
            gone = self._engine_id
            await asyncio.sleep(LAST_WORDS_S)
            if self._engine_id == gone:
                self._engine_id = None
                self._lost("the engine process ended")

    def _lost(self, reason: str) -> None:
        self.ready.clear()
        streams = list(self._streams.values())
        self._streams.clear()
        for stream in streams:
            if self._socket is not None:
                # Even without a peer: what was submitted as the engine ended may reach the next one.
                self._write(self._socket, Abort(stream.request_id))
            stream._fail(EngineUnavailable(reason))
        for answer in list(self._calls.values()):
            if not answer.done():
                answer.set_exception(EngineUnavailable(reason))


def _call_id() -> str:
    return uuid.uuid4().hex

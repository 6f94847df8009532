"""Clients that send too slowly, do not read, or stop in the middle: each is let go in time, with what it held."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks.load import completion, post, request_bytes
from service.http_protocol import KEEPALIVE_IDLE_S, MAX_HEAD_BYTES, tune_listener
from service.settings import Settings
from tests.service.inference_helpers import BASE, InferenceServer

LIMIT = 1.0
"""Every time limit of the server here, in seconds."""
SLACK = 20.0
"""A busy machine may be late by so much; a limit that does not hold is late for ever."""


@pytest.fixture(scope="module")
def patient(base_model_dir: Path) -> Iterator[InferenceServer]:
    server = InferenceServer(
        base_model_dir,
        engine_options={"step_s": 0.002},
        max_positions=4096,
        kv_pages=4096,
        header_timeout_s=LIMIT,
        body_timeout_s=LIMIT,
        write_timeout_s=LIMIT,
        keep_alive_s=1,
        log_level="warning",
    )
    # A connection that is kept may be used again at the very moment at which the server ends it for being idle.
    server.http.headers["Connection"] = "close"
    try:
        yield server.start()
    finally:
        server.stop()


class Client:
    """A connection, byte by byte."""

    def __init__(self, server: InferenceServer, *, receive_buffer: int = 0) -> None:
        self.socket = socket.socket()
        if receive_buffer:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
            # Small segments, so that the kernel on the other side sends as soon as a little was read.
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 536)
        self.socket.settimeout(LIMIT + SLACK)
        self.socket.connect(("127.0.0.1", server.settings.port))
        self.started = time.monotonic()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *error: object) -> None:
        self.socket.close()

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def trickle(self, data: bytes, pause_s: float) -> bytes:
        """Sends byte by byte until the server answers or hangs up; all that it said."""
        self.socket.setblocking(False)
        for at in range(len(data)):
            try:
                self.socket.send(data[at : at + 1])
                said = self.socket.recv(65536)
            except BlockingIOError:
                time.sleep(pause_s)
            except ConnectionError:
                return b""
            else:
                self.socket.settimeout(LIMIT + SLACK)
                return said + self.rest()
        raise AssertionError("the server took it all")

    def rest(self) -> bytes:
        """All until the server hangs up."""
        pieces = []
        try:
            while piece := self.socket.recv(65536):
                pieces.append(piece)
        except ConnectionError:
            pass
        return b"".join(pieces)

    def end_by(self) -> None:
        assert time.monotonic() - self.started < LIMIT + SLACK


def parsed(answer: bytes) -> tuple[int, dict[str, Any]]:
    """(status, the error object)."""
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"connection: close" in head.lower()
    return int(head.split()[1]), json.loads(body)["error"]


def test_a_head_that_is_never_finished(patient: InferenceServer) -> None:
    with Client(patient) as silent, Client(patient) as begun, Client(patient) as trickling:
        begun.send(b"GET /health HTTP/1.1\r\nHost: lo")
        answer = trickling.trickle(b"GET /health HTTP/1.1\r\nX-Long: " + b"y" * 10000, 0.05)
        for status, error in (parsed(answer), parsed(begun.rest())):
            assert (status, error["code"]) == (408, "request_timeout")
            assert "head" in error["message"]
        assert silent.rest() == b""  # nothing was asked, so nothing is answered
        silent.end_by()


def test_a_second_request_whose_head_is_never_finished(patient: InferenceServer) -> None:
    """uvicorn's own timer for idle connections ends with the first byte of the next request."""
    with Client(patient) as client:
        client.send(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert client.socket.recv(65536).startswith(b"HTTP/1.1 200")
        client.send(b"\r\n")
        assert parsed(client.rest())[0] == 408
        client.end_by()


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/adapters/slow", "/v1/adapters/slow/load"])
def test_a_body_that_stalls_or_trickles(patient: InferenceServer, path: str) -> None:
    kind = "multipart/form-data; boundary=xx" if path == "/v1/adapters/slow" else "application/json"
    method = "PUT" if path == "/v1/adapters/slow" else "POST"
    head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\n".encode()
    with Client(patient) as stalled, Client(patient) as trickling, Client(patient) as chunked:
        stalled.send(head + b"Content-Length: 5000\r\n\r\n--xx\r\n")
        chunked.send(head + b"Transfer-Encoding: chunked\r\n\r\n6\r\n--xx\r\n\r\n")
        trickling.send(head + b"Content-Length: 100000\r\n\r\n")
        answers = [trickling.trickle(b'--xx\r\nContent-Disposition: form-data; name="config"' + b"y" * 9000, 0.02)]
        answers += [stalled.rest(), chunked.rest()]
        for answer in answers:
            if path.endswith("/load"):  # reads no body, so it has answered; what counts is that the connection ends
                assert b"HTTP/1.1 404" in answer
                continue
            status, error = parsed(answer)
            assert (status, error["code"]) == (408, "request_timeout")
        stalled.end_by()
    patient.wait_until_idle()


def test_a_body_that_comes_steadily_may_take_longer_than_the_limit(patient: InferenceServer) -> None:
    body = json.dumps(completion(1, BASE, 2) | {"user": "x" * 6000}).encode()
    with Client(patient) as client:
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\nConnection: close\r\n"
        )
        client.send(head.encode() + b"Content-Type: application/json\r\n\r\n")
        for at in range(0, len(body), 300):
            client.send(body[at : at + 300])
            time.sleep(0.15)  # 2000 bytes a second
        assert time.monotonic() - client.started > 2 * LIMIT
        assert client.rest().startswith(b"HTTP/1.1 200")


def test_heads_have_a_limit(patient: InferenceServer) -> None:
    with Client(patient) as client:
        client.send(b"GET /health HTTP/1.1\r\nX-Long: ")
        try:
            for _ in range(2 * MAX_HEAD_BYTES // 8192):
                client.send(b"y" * 8192)
                time.sleep(0.005)
            client.send(b"\r\n\r\n")
        except ConnectionError:
            pass
        answer = client.rest()
    # The kernel throws the answer away if more came than the server has read.
    assert answer == b"" or parsed(answer)[0] == 431
    with Client(patient) as client:
        client.send(b"GET /health HTTP/1.1\r\n" + b"X-Long: yyyyyyyyyyyy\r\n" * 4000 + b"\r\n")
        status, error = parsed(client.rest())
    assert (status, error["code"]) == (431, "head_too_large")


def test_what_is_no_http_is_answered_as_all_errors_are(patient: InferenceServer) -> None:
    for junk in (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", b"HELLO\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n"):
        with Client(patient) as client:
            client.send(junk)
            status, error = parsed(client.rest())
            assert (status, error["code"]) == (400, "invalid_http")


@pytest.mark.parametrize("sip", [0, 2000])
async def test_a_reader_that_hardly_reads_is_disconnected_and_its_sequences_end(
    patient: InferenceServer, sip: int
) -> None:
    """With `sip` it reads on, so that the kernel sees nothing wrong. Logprobs make more than the kernel's buffers take,
    so that the server's own fills."""
    body = completion(1, BASE, 4000) | {"n": 8, "logprobs": 5, "stream": True}
    before = await asyncio.to_thread(patient.metrics)
    with Client(patient, receive_buffer=4096) as client:
        client.send(request_bytes("/v1/completions", body))
        client.socket.recv(100)
        reading = asyncio.create_task(_sips(client, sip))

        async def since(name: str) -> float:
            return (await asyncio.to_thread(patient.metrics))[name] - before[name]

        deadline = time.monotonic() + 60
        while await since("loraplex_client_disconnects_total") < 1:
            assert time.monotonic() < deadline, "it is still connected"
            await asyncio.sleep(0.2)
        await asyncio.to_thread(patient.wait_until_idle)
        assert await since("loraplex_engine_generated_tokens_total") < 8 * 4000  # it was broken off
        reading.cancel()


def test_a_slow_but_steady_reader_gets_everything(patient: InferenceServer) -> None:
    body = completion(2, BASE, 3000) | {"n": 8, "logprobs": 5, "stream": True}
    with Client(patient, receive_buffer=1 << 16) as client:
        client.send(request_bytes("/v1/completions", body))
        taken, last = 0, b""
        while piece := client.socket.recv(1 << 16):
            taken, last = taken + len(piece), (last + piece)[-100:]
            time.sleep(len(piece) / 1e6)
        assert time.monotonic() - client.started > 3 * LIMIT
        assert last.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
        assert taken > 5e6  # more than the kernel's buffers take


async def _sips(client: Client, sip: int) -> None:
    """Reads `sip` bytes five times a second, which is less than the stream brings, until the connection is reset."""
    client.socket.setblocking(False)
    with contextlib.suppress(ConnectionError):
        while sip and await asyncio.get_running_loop().sock_recv(client.socket, sip):  # noqa: ASYNC110
            await asyncio.sleep(0.2)


def test_an_answer_that_nobody_takes_does_not_keep_the_connection(patient: InferenceServer) -> None:
    """The answer is complete and less than the high-water mark is left of it: nothing but a limit ends that."""
    assert patient.api is not None
    api = psutil.Process(patient.api.pid)
    before = len(api.net_connections("tcp"))
    clients = [Client(patient, receive_buffer=4096) for _ in range(5)]
    try:
        for client in clients:
            client.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_WINDOW_CLAMP, 4096)
            with contextlib.suppress(ConnectionError):  # ended while more was being asked: this process was held up
                for _ in range(60):
                    client.send(b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n")
        deadline = time.monotonic() + LIMIT + SLACK
        while len(api.net_connections("tcp")) > before:
            assert time.monotonic() < deadline
            time.sleep(0.1)
    finally:
        for client in clients:
            client.socket.close()


async def test_a_request_that_waits_in_the_queue_ends_with_its_client(patient: InferenceServer) -> None:
    """A reset, as a client's machine sends one that knows nothing of the connection."""
    port = patient.settings.port
    clients = [Client(patient) for _ in range(20)]
    for number, client in enumerate(clients):
        client.send(request_bytes("/v1/completions", completion(number, BASE, 3000) | {"stream": number % 2 == 0}))
    await asyncio.to_thread(patient.wait_for_engine, "sequences_running", 10)
    for client in clients:
        client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.socket.close()
    await asyncio.to_thread(patient.wait_until_idle)
    assert (await post(port, "/v1/completions", completion(1, BASE, 8))).complete


def test_more_connections_than_allowed(base_model_dir: Path) -> None:
    """A server of its own: LIMIT would have ended the first of them before the last is there, on a busy machine."""
    server = InferenceServer(base_model_dir, max_connections=20)
    try:
        server.start(engine=False)
        clients = [Client(server) for _ in range(25)]
        try:
            last = clients[-1]
            last.send(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            answer = last.rest()
            status, error = parsed(answer)
            assert (status, error["code"]) == (503, "too_many_connections")
            assert b"retry-after: 1" in answer.lower()
        finally:
            for client in clients:
                client.socket.close()
        server.wait_for("/health")
    finally:
        server.stop()


def test_vanished_peers_are_the_kernels_business() -> None:
    """What tune_listener sets holds for every connection that is accepted."""
    with socket.socket() as listener, socket.socket() as client:
        tune_listener(listener, Settings.load(write_timeout_s=7.5))
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        client.connect(listener.getsockname())
        accepted, _ = listener.accept()
        with accepted:
            assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == KEEPALIVE_IDLE_S
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 7500

"""Requests sent on one connection before the one before them is answered: in order, and not without limit."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from service.http_protocol import MAX_PIPELINED, MAX_WAITING_BYTES
from tests.service.inference_helpers import BASE, InferenceServer

HEALTH = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
pytestmark = pytest.mark.xdist_group("pipelining")


@pytest.fixture(scope="module")
def slow(base_model_dir: Path) -> Iterator[InferenceServer]:
    server = InferenceServer(base_model_dir, engine_options={"step_s": 0.01}, max_positions=4096)
    try:
        server.start()
        yield server
    finally:
        server.stop()


def connect(server: InferenceServer) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.settings.port), timeout=60)


def completion(tokens: int, *, stream: bool) -> bytes:
    body = {"model": BASE, "prompt": [7] * 10, "max_tokens": tokens, "ignore_eos": True, "stream": stream}
    payload = json.dumps(body).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(payload)}"
    )
    return head.encode() + b"\r\n\r\n" + payload


def everything(connection: socket.socket) -> bytes:
    """Until the server closes the connection, however it does."""
    received = b""
    try:
        while piece := connection.recv(1 << 16):
            received += piece
    except ConnectionResetError:
        pass
    return received


def test_they_are_answered_in_their_order(slow: InferenceServer) -> None:
    with connect(slow) as connection:
        last = HEALTH.replace(b"Host", b"Connection: close\r\nHost")
        connection.sendall(completion(5, stream=False) + HEALTH * (MAX_PIPELINED - 1) + last)
        answers = everything(connection)
    assert answers.count(b"HTTP/1.1 200") == MAX_PIPELINED + 1
    assert answers.index(b'"text_completion"') < answers.index(b'"status":"ok"')


@pytest.mark.parametrize("first", [HEALTH, completion(50, stream=False), completion(50, stream=True)])
def test_so_many_that_they_would_fill_the_memory_end_the_connection(slow: InferenceServer, first: bytes) -> None:
    assert slow.api is not None
    process = psutil.Process(slow.api.pid)
    before = process.memory_info().rss
    with connect(slow) as connection:
        connection.sendall(first)
        if b'stream": true' in first:
            assert connection.recv(1).startswith(b"H")  # its answer is under way: nothing can be said into it
        try:
            for _ in range(20):
                connection.sendall(HEALTH * 20000)
        except OSError:
            pass  # refused while it was still being sent
        answers = everything(connection)
    assert answers.count(b"HTTP/1.1 200") <= MAX_PIPELINED + 1
    assert process.memory_info().rss - before < 64 << 20
    slow.wait_until_idle()
    assert slow.http.get("/health").status_code == 200


def test_what_is_too_much_is_said(slow: InferenceServer) -> None:
    with connect(slow) as connection:
        connection.sendall(HEALTH * (MAX_PIPELINED + 2))
        answers = everything(connection)
    assert b"HTTP/1.1 400" in answers
    assert b"too_many_pipelined" in answers


def post(size: int) -> bytes:
    head = f"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {size}"
    return head.encode() + b"\r\n\r\n"


def test_waiting_bodies_have_a_limit_of_their_own(slow: InferenceServer) -> None:
    with connect(slow) as connection:
        connection.sendall(completion(400, stream=False))
        slow.wait_for_engine("sequences_running", 1)
        body = b'{"prompt": "' + b"a" * 60000 + b'"}'
        try:
            for _ in range(MAX_WAITING_BYTES // len(body) + 1):
                connection.sendall(post(len(body)) + body)
        except OSError:
            pass  # refused while it was still being sent
        answers = everything(connection)
    assert b"too_many_pipelined" in answers
    assert b"HTTP/1.1 200" not in answers


def test_a_body_that_comes_late_breaks_off_no_answer_before_it(base_model_dir: Path) -> None:
    """Its time counts from when the application could take it."""
    server = InferenceServer(base_model_dir, engine_options={"step_s": 0.01}, max_positions=4096, body_timeout_s=1.0)
    try:
        server.start()
        with connect(server) as connection:
            connection.sendall(completion(300, stream=True))
            server.wait_for_engine("sequences_running", 1)
            body = b'{"prompt": "a"}'
            connection.sendall(post(len(body)).replace(b"Host", b"Connection: close\r\nHost"))
            received = b""
            while b"data: [DONE]" not in received:
                received += connection.recv(1 << 16)
            connection.sendall(body)
            received += everything(connection)
        assert received.count(b"HTTP/1.1 200") == 2
        assert b'"tokens"' in received
    finally:
        server.stop()


@pytest.mark.parametrize("stream", [True, False])
def test_who_leaves_has_left_though_another_request_waits(slow: InferenceServer, stream: bool) -> None:
    slow.wait_until_idle()
    before = slow.metrics()
    with connect(slow) as connection:
        connection.sendall(completion(2000, stream=stream))
        slow.wait_for_engine("sequences_running", 1)
        connection.sendall(HEALTH + post(150000) + b"a" * 100000)
    slow.wait_until_idle()
    after = slow.metrics()
    assert after["loraplex_client_disconnects_total"] == before["loraplex_client_disconnects_total"] + 1
    name = "loraplex_engine_generated_tokens_total"
    assert 0 < after[name] - before[name] < 1900
    assert "Traceback" not in slow.log_path.read_text()

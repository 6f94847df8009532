"""One thing at a time goes wrong under traffic: who waits is told at once, and everything comes back."""

from __future__ import annotations

import contextlib
import json
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.crash.world import API, BASE, ENGINE, Content, World
from tests.ports import unused_port
from tests.service.launch import PLAIN, wait_for

OUT_OF_MEMORY = 13
"""A token; a step that computes it fails."""


@pytest.fixture(scope="module")
def shared_world() -> Iterator[World]:
    options = {"step_s": 0.01, "out_of_memory": OUT_OF_MEMORY}
    with tempfile.TemporaryDirectory(prefix="lp-crash-") as folder:  # short, for the paths of sockets
        world = World(
            Path(folder) / "0", unused_port(), "--max-sequences", "4", api_workers=2, engine=json.dumps(options)
        )
        try:
            world.start()
            yield world
        finally:
            world.close()


@pytest.fixture
def world(shared_world: World) -> Iterator[World]:
    """One service for all: each test has to leave it at work, as it found it."""
    yield shared_world
    assert shared_world.ready()
    with httpx.Client(base_url=shared_world.url, timeout=60, **PLAIN) as http:
        for entry in http.get("/v1/adapters").json()["data"]:
            assert http.delete(f"/v1/adapters/{entry['name']}").status_code == 200
    wait_for(lambda: shared_world.blobs() == set(), 30)


class Asked:
    """A completion asked for in a thread of its own, streamed or not."""

    def __init__(self, world: World, tokens: int, *, model: str = BASE, stream: bool = True, first: int = 1) -> None:
        self.status = 0
        self.code: str | None = None
        self.retry_after: str | None = None
        self.text = ""
        self.done = False
        """The answer came to its regular end."""
        self.port = 0
        self._began = threading.Event()
        self._body = {
            "model": model, "prompt": [first, 2, 3], "max_tokens": tokens, "temperature": 0, "ignore_eos": True,
            "stream": stream,
        }  # fmt: skip
        self._url = world.url
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def began(self) -> Asked:
        """Waits for the first event."""
        assert self._began.wait(60)
        return self

    def ended(self, seconds: float = 60) -> Asked:
        self._thread.join(seconds)
        assert not self._thread.is_alive(), f"no end within {seconds} s"
        return self

    def _run(self) -> None:
        with httpx.Client(timeout=90, **PLAIN) as http:
            try:
                with http.stream("POST", f"{self._url}/v1/completions", json=self._body) as answer:
                    self.port = answer.extensions["network_stream"].get_extra_info("client_addr")[1]
                    self.status, self.retry_after = answer.status_code, answer.headers.get("retry-after")
                    if answer.status_code == 200 and self._body["stream"]:
                        for line in answer.iter_lines():
                            if line.startswith("data: "):
                                self._take(line.removeprefix("data: "))
                                self._began.set()
                    else:
                        body = json.loads(answer.read())
                        self.done = answer.status_code == 200
                        self.code = None if self.done else body["error"]["code"]
            except httpx.TransportError as error:
                self.code = type(error).__name__
            finally:
                self._began.set()

    def _take(self, event: str) -> None:
        if event == "[DONE]":
            self.done = True
            return
        body = json.loads(event)
        if "error" in body:
            self.code = body["error"]["code"]
        else:
            self.text += body["choices"][0]["text"]


def api_of(world: World, port: int) -> psutil.Process:
    """The API process at the other end of a client's connection."""
    for api in world.running.children(API):
        if any(each.raddr and each.raddr.port == port for each in api.net_connections("tcp")):
            return api
    raise AssertionError("nobody has that connection")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_requests_of_an_engine_that_dies_or_hangs_are_told(number: signal.Signals, world: World) -> None:
    running = [Asked(world, 2000).began() for _ in range(4)]
    waiting = [Asked(world, 5, stream=stream) for stream in (True, False)]
    time.sleep(0.3)
    engine = world.running.child(ENGINE)
    started = time.monotonic()
    engine.send_signal(number)
    for each in running:
        each.ended(15)
        assert (each.status, each.code, each.done) == (200, "engine_unavailable", False)
        assert world.answer([1, 2, 3], 2000, None).startswith(each.text.strip())
    for each in waiting:
        each.ended(15)
        assert (each.status, each.code) == (503, "engine_unavailable")
        assert each.retry_after
    wait_for(lambda: not engine.is_running() and world.ready(), 30)
    assert time.monotonic() - started < 30
    assert Asked(world, 3, stream=False).ended().done


def test_a_step_out_of_memory_fails_its_requests_alone(world: World) -> None:
    engine = world.running.child(ENGINE)
    stream = Asked(world, 2000).began()
    refused = Asked(world, 5, stream=False, first=OUT_OF_MEMORY).ended()
    assert (refused.status, refused.code) == (503, "out_of_memory")
    assert refused.retry_after
    stream.ended()  # it was in the same step
    assert (stream.status, stream.code) == (200, "out_of_memory")
    assert Asked(world, 3, stream=False).ended().done
    assert world.running.child(ENGINE) == engine


def test_a_killed_api_process_takes_only_its_own_requests(world: World) -> None:
    streams = [Asked(world, 300).began() for _ in range(4)]
    victim = api_of(world, streams[0].port)
    mine = [stream for stream in streams if api_of(world, stream.port) == victim]
    victim.kill()
    for stream in streams:
        stream.ended()
        assert stream.done == (stream not in mine)
        assert (stream.code is None) == stream.done
    wait_for(world.ready, 30)
    assert Asked(world, 3, stream=False).ended().done


def test_a_restarted_api_process_leaves_alone_what_requests_still_need(world: World) -> None:
    """The files of a deleted adapter stay while a request that was accepted before runs, whichever process of the
    service dies meanwhile but the request's own; then they go."""
    content = Content.make(1, rank=4)
    assert httpx.put(f"{world.url}/v1/adapters/a", files=content.form, timeout=60).status_code == 201
    stream = Asked(world, 1600, model="a").began()
    victim = next(api for api in world.running.children(API) if api != api_of(world, stream.port))
    assert httpx.delete(f"{world.url}/v1/adapters/a", timeout=60).status_code == 200
    victim.kill()
    wait_for(lambda: not victim.is_running() and world.ready(), 30)
    time.sleep(2.5)
    assert not stream.done, "the request was meant to last longer"
    assert world.blobs() == content.blobs
    stream.ended()
    assert stream.done
    assert stream.text.strip() == world.answer([1, 2, 3], 1600, content.digest)
    wait_for(lambda: world.blobs() == set(), 30)


def test_pinned_adapters_are_fetched_again_by_a_new_engine(world: World) -> None:
    with httpx.Client(base_url=world.url, timeout=60, **PLAIN) as http:
        for name, pinned in (("pinned", True), ("other", False)):
            content = Content.make(len(name), rank=4)
            assert http.put(f"/v1/adapters/{name}", files=content.form).status_code == 201
            assert http.patch(f"/v1/adapters/{name}", json={"pinned": pinned}).status_code == 200
        engine = world.running.child(ENGINE)
        engine.kill()
        wait_for(lambda: not engine.is_running() and world.ready(), 30)
        wait_for(lambda: http.get("/v1/adapters/pinned").json()["residency"] == "device", 60)
        assert http.get("/v1/adapters/other").json()["residency"] == "absent"


def test_api_processes_that_are_told_to_stop_always_end(make_world: Callable[..., World], tmp_path: Path) -> None:
    """Many times, at any moment, in the middle of uploads, completions, broken streams and deletions. The supervisor
    starts another one each time."""
    world = make_world(api_workers=2, engine='{"step_s": 0.002}')
    world.start()
    stop = threading.Event()
    with ThreadPoolExecutor(3) as pool:
        clients = [pool.submit(_hammer, world, number, stop) for number in range(3)]
        try:
            for turn in range(16):
                time.sleep(0.1 * (turn % 7))
                api = next(world.running.children(API))
                started = time.monotonic()
                api.terminate()
                wait_for(lambda api=api: not api.is_running(), 20)  # type: ignore[misc]
                assert time.monotonic() - started < 15
                wait_for(world.ready, 30)
        finally:
            stop.set()
        for client in clients:
            client.result()
    assert world.stop() == 0
    assert "Timeout (" not in world.logs[-1], world.logs[-1]
    assert "Traceback" not in world.logs[-1], world.logs[-1]


def _hammer(world: World, number: int, stop: threading.Event) -> None:
    """Uploads, completions, streams that are left half-way."""
    content = Content.make(number, rank=64)
    body: dict[str, Any] = {"model": BASE, "prompt": [1, 2], "max_tokens": 40, "ignore_eos": True}
    with httpx.Client(base_url=world.url, timeout=60, **PLAIN) as http:
        while not stop.is_set():
            for step in _steps(http, number, content, body):
                with contextlib.suppress(httpx.TransportError):
                    assert step() in (200, 201, 404, 503)
                time.sleep(0.02)


def _steps(http: httpx.Client, number: int, content: Content, body: dict[str, Any]) -> Iterator[Callable[[], int]]:
    def leave() -> int:
        with http.stream("POST", "/v1/completions", json={**body, "stream": True}) as answer:
            next(answer.iter_lines(), None)
            return answer.status_code

    yield lambda: http.put(f"/v1/adapters/s{number}", files=content.form).status_code
    yield leave
    yield lambda: http.post("/v1/completions", json=body).status_code
    yield lambda: http.delete(f"/v1/adapters/s{number}").status_code

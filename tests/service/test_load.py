"""Many clients at once, clients that leave at any moment, and a server that is full: nothing lost, nothing leaked."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import resource
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from benchmarks import load
from benchmarks.load import Answer, Memory, Round, completion, grown, open_streams, post, request_bytes
from service.engine.messages import SamplingParams
from service.engine.simulated import expected
from tests.service.inference_helpers import BASE, VOCABULARY, InferenceServer

STREAMS = 500
TOKENS = 32
GROWTH = 8 << 20
"""Bytes that a process may gain after its first rounds."""


@pytest.fixture(scope="module")
def loaded(base_model_dir: Path) -> Iterator[InferenceServer]:
    """One that runs 500 sequences at once."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard), hard))  # for the clients in this process
    server = InferenceServer(
        base_model_dir,
        engine_options={"step_s": 0.005},
        max_sequences=STREAMS,
        max_queue=STREAMS,
        max_tokens_per_step=8192,
        kv_pages=5 * STREAMS,
        log_level="warning",
    )
    try:
        yield server.start()
    finally:
        server.stop()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def processes(server: InferenceServer) -> list[psutil.Process]:
    assert server.api is not None
    assert server.engine is not None
    return [psutil.Process(server.api.pid), psutil.Process(server.engine.pid)]


def expected_text(server: InferenceServer, prompt: list[int]) -> str:
    """What a stream of benchmarks.load.completion says: nothing ends it but its length. Without half characters, of
    which the simulated engine makes many, and which depend on the prompt's end."""
    sampling = SamplingParams(temperature=0.0, max_tokens=TOKENS)
    return whole(server.tokenizer.decode(expected(prompt, sampling, vocab_size=VOCABULARY)))


def whole(text: str) -> str:
    return text.replace("\N{REPLACEMENT CHARACTER}", "")


async def test_500_streams_lose_nothing_and_memory_stays_flat(loaded: InferenceServer) -> None:
    memory = Memory(processes(loaded))

    async def run(number: int) -> Round:
        bodies = [completion(number * STREAMS + i, BASE, TOKENS) for i in range(STREAMS)]
        done = await open_streams(loaded.settings.port, bodies)
        assert done.lost == []
        texts = [answer.text() for answer in done.answers]
        # Each has its own prompt, so that another's tokens would be noticed.
        assert len(set(texts)) == STREAMS
        for i in range(0, STREAMS, 20):
            assert whole(texts[i]) == expected_text(loaded, bodies[i]["prompt"])
        return done

    for number in range(2):  # what a process keeps of its first rounds differs by megabytes
        await run(number)
    warm = memory.now()
    async with memory.sampled():
        for number in range(2, 5):
            await run(number)
    loaded.wait_until_idle()
    grown = [after - before for before, after in zip(warm, memory.now(), strict=True)]
    peaks = [after - before for before, after in zip(warm, memory.peak, strict=True)]
    assert max(grown) < GROWTH, (warm, memory.now())
    assert max(peaks) < 2 * GROWTH, (warm, memory.peak)


def test_memory_that_grows_is_said() -> None:
    flat = [[100, 50], [104, 51], [130, 52], [103, 53]]
    assert grown(flat, 10) == [], "one round may be caught with what it still holds"
    leak = [[100, 50 + 4 * number] for number in range(6)]
    assert [line.partition(":")[0] for line in grown(leak, 10)] == ["engine"]
    assert grown(leak, 12) == []
    assert len(grown([[0, 0], [20, 20]], 10)) == 2


@pytest.mark.parametrize(("bound", "code"), [("16", 0), ("-1000", 1)])
def test_the_soak_ends_as_its_memory_says(
    bound: str, code: int, base_model_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What `make soak-streams` runs, with few streams; no memory can have shrunk by a gigabyte."""
    monkeypatch.setattr(load, "ensure_default_model", lambda _: base_model_dir)
    flags = ["--streams", "20", "--rounds", "2", "--tokens", "8", "--max-growth-mb", bound]
    monkeypatch.setattr("sys.argv", ["load", *flags])
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (150, limits[1]))
        assert load.main() == code
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == 20 + load.SPARE_FILES
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert ("memory has grown" in capsys.readouterr().out) == bool(code)


async def test_a_full_server_says_429_and_when_to_come_back(base_model_dir: Path) -> None:
    """Every request is answered, one way or the other, and what was turned away is served when it comes again."""
    engine_options = {"step_s": 0.01}
    server = InferenceServer(base_model_dir, engine_options=engine_options, max_sequences=4, max_queue=8)
    try:
        port = server.start().settings.port
        for streamed in (True, False):
            bodies = [completion(i, BASE, 16) | {"stream": streamed} for i in range(100)]
            async with asyncio.timeout(60):
                answers = await asyncio.gather(*(post(port, "/v1/completions", body) for body in bodies))
            assert set(statuses(answers)) == {200, 429}
            # What the queue holds; four more run only if the engine takes a step before all have arrived.
            assert statuses(answers)[200] >= 8
            for answer in answers:
                if answer.status == 429:
                    assert int(answer.headers["retry-after"]) >= 1
                    assert json.loads(answer.body)["error"]["code"] == "queue_full"
            waiting = [body for body, answer in zip(bodies, answers, strict=True) if answer.status == 429]
            async with asyncio.timeout(60):
                for body in waiting[:5]:
                    assert (await post(port, "/v1/completions", body)).status == 200
        server.wait_until_idle()
    finally:
        server.stop()


def statuses(answers: list[Answer]) -> Counter[int]:
    return Counter(answer.status for answer in answers)


async def test_uploads_have_a_limit_at_once(base_model_dir: Path) -> None:
    server = InferenceServer(base_model_dir, max_uploads=2)
    try:
        port = server.start().settings.port
        head = (
            b"PUT /v1/adapters/a HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=xx\r\n"
            b"Content-Length: 1000\r\n\r\n--xx\r\n"
        )
        held = [await asyncio.open_connection("127.0.0.1", port) for _ in range(2)]
        for _, writer in held:
            writer.write(head)
        spool = server.settings.uploads_dir
        await until(lambda: sum(path.is_dir() for path in spool.glob("*/*")) == 2)
        files = {"config": ("adapter_config.json", b"{}"), "weights": ("adapter_model.safetensors", b"")}
        refused = await asyncio.to_thread(server.http.put, "/v1/adapters/b", files=files)
        assert refused.status_code == 429
        assert refused.json()["error"]["code"] == "too_many_uploads"
        assert int(refused.headers["retry-after"]) >= 1
        held[0][1].close()
        await until(lambda: server.http.put("/v1/adapters/b", files=files).status_code == 422)
        held[1][1].close()
        await until(lambda: not any(path.is_dir() for path in spool.glob("*/*")))
    finally:
        server.stop()


async def until(condition: Callable[[], object], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not await asyncio.to_thread(condition):
        assert time.monotonic() < deadline
        await asyncio.sleep(0.05)


# ---------------------------------------------------------------- clients that leave

REQUESTS = 800
AT_ONCE = 30
MOMENTS = ("connect", "head", "body", "first byte", "stream", "reset")


def upload_bytes(draw: random.Random) -> bytes:
    """An upload of any name, whole; its weights are no adapter, which the inspection finds out if it gets that far."""
    weights = draw.randbytes(draw.randrange(200_000))
    body = (
        b'--xx\r\nContent-Disposition: form-data; name="config"; filename="adapter_config.json"\r\n\r\n{}\r\n'
        b'--xx\r\nContent-Disposition: form-data; name="weights"; filename="a.safetensors"\r\n\r\n'
        + weights + b"\r\n--xx--\r\n"
    )  # fmt: skip
    head = (
        f"PUT /v1/adapters/gone-{draw.randrange(10)} HTTP/1.1\r\nHost: localhost\r\n"
        f"Content-Type: multipart/form-data; boundary=xx\r\nContent-Length: {len(body)}\r\n"
        "Connection: close\r\n\r\n"
    )
    return head.encode() + body


def any_request(draw: random.Random, adapters: list[str]) -> bytes:
    if draw.random() < 0.2:
        return upload_bytes(draw)
    body = completion(draw.randrange(5), draw.choice([BASE, *adapters]), draw.randrange(1, 60))
    body |= {"stream": draw.random() < 0.7, "n": draw.choice([1, 1, 3])}
    if draw.random() < 0.3:
        content = {key: body[key] for key in ("model", "max_tokens", "stream", "n", "ignore_eos")}
        return request_bytes("/v1/chat/completions", content | {"messages": [{"role": "user", "content": "The sea"}]})
    return request_bytes("/v1/completions", body)


async def leave(port: int, draw: random.Random, adapters: list[str]) -> str:
    """One request that is broken off at some moment; which moment it was."""
    moment = draw.choice(MOMENTS)
    data = any_request(draw, adapters)
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        if moment == "connect":
            await asyncio.sleep(draw.random() * 0.01)
            return moment
        head = data.index(b"\r\n\r\n") + 4
        cut = draw.randrange(1, head) if moment == "head" else draw.randrange(head, len(data))
        writer.write(data[:cut] if moment in ("head", "body") else data)
        with contextlib.suppress(ConnectionError):
            if moment in ("head", "body", "reset"):
                await asyncio.sleep(draw.random() * 0.1)
            else:
                await reader.read(1)
            if moment == "stream":
                for _ in range(draw.randrange(20)):
                    await reader.read(400)
    finally:
        if moment == "reset" or draw.random() < 0.3:
            writer.transport.abort()
        else:
            writer.close()
    return moment


async def test_clients_that_leave_at_any_moment_leak_nothing(loaded: InferenceServer, tmp_path: Path) -> None:
    port = loaded.settings.port
    adapters = ["left", "right"]
    for number, name in enumerate(adapters):
        await asyncio.to_thread(loaded.upload, name, tmp_path, number)
    api, engine = processes(loaded)
    draw = random.Random(4)

    async def wave(count: int) -> Counter[str]:
        seen: Counter[str] = Counter()
        seeds = [draw.randrange(2**32) for _ in range(count)]

        async def client(mine: list[int]) -> None:
            for seed in mine:
                seen[await leave(port, random.Random(seed), adapters)] += 1

        await asyncio.gather(*(client(seeds[i::AT_ONCE]) for i in range(AT_ONCE)))
        await asyncio.to_thread(loaded.wait_until_idle, 60)
        return seen

    await wave(100)
    spool = loaded.settings.uploads_dir
    await until(lambda: not any(path.is_dir() for path in spool.glob("*/*")))
    files = [api.num_fds(), engine.num_fds()]
    seen = await wave(REQUESTS)
    assert set(seen) == set(MOMENTS)
    await until(lambda: not any(path.is_dir() for path in spool.glob("*/*")))
    # A worker's pipe may come and go, and the database's pool keeps up to four connections, of three files each.
    await until(lambda: api.num_fds() <= files[0] + 4 + 12 and engine.num_fds() <= files[1] + 1)
    figures = await asyncio.to_thread(loaded.metrics)
    assert figures["loraplex_requests_in_progress"] == 1  # the one that asks
    answer = await post(port, "/v1/completions", completion(1, BASE, TOKENS))
    assert answer.complete
    assert whole(answer.text()) == expected_text(loaded, completion(1, BASE, TOKENS)["prompt"])
    names = [adapter["name"] for adapter in (await asyncio.to_thread(loaded.http.get, "/v1/adapters")).json()["data"]]
    assert names == adapters
    assert "Traceback" not in loaded.log_path.read_text()

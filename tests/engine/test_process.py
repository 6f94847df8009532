"""The engine process and its client over real ZeroMQ: a real subprocess that runs the simulated engine."""

from __future__ import annotations

import asyncio
import queue
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
import zmq
import zmq.asyncio

from adapters.manifest import Manifest
from service.engine import client as client_module
from service.engine.client import EngineClient
from service.engine.config import EngineConfig
from service.engine.errors import (
    EngineCallFailed,
    EngineCallTimedOut,
    EngineRefused,
    EngineUnavailable,
)
from service.engine.messages import (
    AdapterRef,
    Delta,
    Limits,
    Ping,
    Ready,
    SamplingParams,
    Submit,
    decode_from_engine,
    encode,
)
from service.engine.process import IDLE_S, OVERDUE, EngineProcess, Postman, check_at
from service.engine.simulated import Options, build_engine, expected
from tests.soundness import check_engine, checking

ROOT = Path(__file__).parents[2]
GREEDY = SamplingParams(temperature=0.0, max_tokens=8)
ENDLESS = SamplingParams(temperature=0.0, max_tokens=3000)
SLOW = Options(step_s=0.01)

Start = Callable[..., subprocess.Popen[bytes]]


@pytest.fixture
def address(tmp_path: Path) -> str:
    return f"ipc://{tmp_path}/engine.ipc"


@pytest.fixture
def start(address: str, tmp_path: Path) -> Iterator[Start]:
    """Starts an engine process; all end with the test. One that has not ended by then, and is not to load an adapter
    for the rest of it, has to be sound."""
    processes: list[subprocess.Popen[bytes]] = []
    checked: list[subprocess.Popen[bytes]] = []

    def start(options: Options | None = None, **settings: Any) -> subprocess.Popen[bytes]:
        config = checking(
            EngineConfig(model_path="", blobs_dir=str(tmp_path), cache_dir=str(tmp_path), socket=address, **settings)
        )
        command = [sys.executable, "-m", "service.engine.process", msgspec.json.encode(config).decode()]
        command += ["--simulated", msgspec.json.encode(options or Options()).decode()]
        processes.append(subprocess.Popen(command, cwd=ROOT))
        if (options or Options()).load_s < 100:
            checked.append(processes[-1])
        return processes[-1]

    yield start
    try:
        if any(process.poll() is None for process in checked):
            check_engine(address)
    finally:
        for process in processes:
            process.kill()
            process.wait()


@pytest.fixture
async def client(address: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[EngineClient]:
    monkeypatch.setattr(client_module, "PING_INTERVAL_S", 0.1)  # fresh statistics, so that tests need not wait
    client = EngineClient(address)
    await client.connect()
    yield client
    await client.close()


def request(name: str, *prompts: list[int], **more: Any) -> Submit:
    return Submit(request_id=name, prompts=list(prompts), **({"sampling": GREEDY} | more))


async def collect(client: EngineClient, submit: Submit) -> dict[int, list[Delta]]:
    deltas: dict[int, list[Delta]] = {}
    async with client.submit(submit) as stream:
        async for delta in stream:
            deltas.setdefault(delta.index, []).append(delta)
    return deltas


def tokens(deltas: list[Delta]) -> list[int]:
    return [token for delta in deltas for token in delta.token_ids]


async def until(condition: Callable[[], object]) -> None:
    """Waits for what the next heartbeat or message brings; the test's own time limit ends it."""
    while not condition():  # noqa: ASYNC110 - there is no event to wait for
        await asyncio.sleep(0.02)


async def exhaust(stream: AsyncIterator[Delta]) -> None:
    async for _ in stream:
        pass


async def idle(client: EngineClient) -> None:
    """Until a heartbeat tells that the engine holds nothing."""
    client.stats = {}
    await until(lambda: client.stats.get("kv_pages_used") == 0 and not client.stats["sequences_running"])


async def test_requests_stream_side_by_side(start: Start, client: EngineClient) -> None:
    start()
    ready = await client.wait_ready(60)
    assert ready.manifest.architecture == "Simulated"
    assert client.limits.page_size == 16
    submits = [
        request(f"r{i}", [i, 1, 2], [i, 3], n=2, adapters=(AdapterRef(f"a{i % 3}", 0.5),) if i % 2 else ())
        for i in range(8)
    ]
    for submit, answer in zip(submits, await asyncio.gather(*(collect(client, s) for s in submits)), strict=True):
        assert sorted(answer) == [0, 1, 2, 3]
        for index, deltas in answer.items():
            prompt = submit.prompts[index // 2]
            assert tokens(deltas) == expected(prompt, GREEDY, submit.adapters, vocab_size=1000)
            assert [delta.finish_reason for delta in deltas][-1] == "length"
    await idle(client)
    assert client.healthy


async def least_tokens_meanwhile(client: EngineClient, act: Callable[[str], Awaitable[object]], few: int) -> int:
    """How many tokens a stream got from beginning to end of `act`, the least of ten times, each with a name of its own;
    done when it was so few. A busy machine makes most of them more. The stream's first steps are of a kind that is new,
    and launched when they can be. What has not ended by the stream's last token does not count."""
    found: list[int] = []
    async with client.submit(request("other", [1, 2, 3], sampling=ENDLESS)) as stream:
        seen = 0

        async def timed(name: str) -> None:
            before = seen
            await act(name)
            found.append(seen - before)

        waiting: list[asyncio.Task[None]] = []
        async for _ in stream:
            seen += 1
            if min(found, default=few + 1) <= few or seen > 40:
                break
            if seen % 4 == 0:
                waiting.append(asyncio.create_task(timed(f"after {seen}")))
        least = min(found, default=seen)
        await asyncio.gather(*waiting)
    return least


async def test_who_comes_while_the_device_is_busy_is_in_the_next_step(start: Start, client: EngineClient) -> None:
    """Its first token comes with the other's next but one: the step after the one in progress."""
    start(Options(step_s=0.4, ahead=True))
    await client.wait_ready(60)
    one = SamplingParams(temperature=0.0, max_tokens=1)
    assert await least_tokens_meanwhile(client, lambda n: collect(client, request(n, [4, 5], sampling=one)), few=1) <= 1


async def test_a_load_takes_no_step_of_those_beside_it_for_each_of_its_stages(
    start: Start, client: EngineClient
) -> None:
    """The device is busy with the same step from first to last: what comes next is begun when something has ended."""
    start(Options(step_s=0.5, ahead=True))
    await client.wait_ready(60)
    assert await least_tokens_meanwhile(client, client.load, few=0) == 0


async def test_a_slow_reader_loses_nothing_and_holds_little(start: Start, client: EngineClient) -> None:
    start()
    await client.wait_ready(60)
    submit = request("slow", [1, 2, 3], [4, 5], sampling=ENDLESS)
    stream = client.submit(submit)
    other = await collect(client, request("other", [1], sampling=ENDLESS))
    assert len(tokens(other[0])) == 3000
    await idle(client)
    got = [delta async for delta in stream]
    assert len(got) == 2
    for delta in got:
        assert delta.token_ids == expected(submit.prompts[delta.index], ENDLESS, vocab_size=1000)
        assert delta.finish_reason == "length"


async def test_leaving_the_stream_frees_the_sequence(start: Start, client: EngineClient) -> None:
    start(SLOW)
    await client.wait_ready(60)
    async with client.submit(request("left", [1, 2, 3], n=2, sampling=ENDLESS)) as stream:
        await anext(stream)
    await idle(client)

    async def read() -> None:
        await collect(client, request("cancelled", [1, 2, 3], sampling=ENDLESS))

    task = asyncio.create_task(read())
    await until(lambda: client.stats.get("sequences_running") == 1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await idle(client)

    forgotten = client.submit(request("forgotten", [1, 2, 3], sampling=ENDLESS))
    await anext(forgotten)
    del forgotten
    await idle(client)


async def test_reading_a_finished_stream_to_its_end_leaves_the_next_of_its_name_alone(
    start: Start, client: EngineClient
) -> None:
    start(SLOW)
    await client.wait_ready(60)
    first = client.submit(request("r", [1]))
    await until(lambda: client.stats.get("generated_tokens_total", 0) > 0)
    await idle(client)
    second = client.submit(request("r", [2]))
    assert len([delta async for delta in first]) == 1
    del first
    assert [token async for delta in second for token in delta.token_ids] == expected([2], GREEDY, vocab_size=1000)


async def test_one_choice_can_be_aborted_and_the_others_go_on(start: Start, client: EngineClient) -> None:
    start(SLOW)
    await client.wait_ready(60)
    got: dict[int, list[Delta]] = {0: [], 1: []}
    sampling = SamplingParams(temperature=0.0, max_tokens=300)
    async with client.submit(request("r", [1], [2], sampling=sampling)) as stream:
        async for delta in stream:
            got[delta.index].append(delta)
            if delta.index == 0 and len(tokens(got[0])) >= 3:
                client.abort("r", 0)
    assert len(tokens(got[0])) < 200  # more than three where this process is held up: what waits comes in one piece
    assert tokens(got[1]) == expected([2], sampling, vocab_size=1000)
    await idle(client)


async def test_what_the_engine_refuses_is_raised_from_the_stream(start: Start, client: EngineClient) -> None:
    start(Options(poison=13), kv_pages=4, max_queue=2)
    await client.wait_ready(60)
    for name, submit, code in (
        ("large", request("large", [1] * 60), "too_large"),
        ("queue", request("queue", [1], n=3), "too_large"),
        ("adapter", request("adapter", [1], adapters=(AdapterRef("broken"),)), "adapter_failed"),
        ("poison", request("poison", [13]), "engine_error"),
    ):
        with pytest.raises(EngineRefused) as refused:
            await collect(client, submit)
        assert refused.value.code == code, name
    assert len(await collect(client, request("after", [1]))) == 1
    with pytest.raises(EngineRefused):
        await collect(client, request("large", [1] * 60))  # a failed request's id is free again
    keep = client.submit(request("twice", [1], sampling=SamplingParams(max_tokens=50)))
    with pytest.raises(ValueError, match="in use"):
        client.submit(request("twice", [1]))
    keep.close()


async def test_a_full_queue_says_when_to_come_back(start: Start, client: EngineClient) -> None:
    start(SLOW, max_sequences=1, max_queue=2)
    await client.wait_ready(60)
    running = client.submit(request("running", [1], sampling=ENDLESS))
    await anext(running)
    waiting = client.submit(request("waiting", [1], n=2, sampling=ENDLESS))
    with pytest.raises(EngineRefused) as refused:
        await collect(client, request("refused", [1]))
    assert refused.value.code == "queue_full"
    assert refused.value.retry_after_s
    running.close()
    waiting.close()
    await idle(client)


async def test_control_calls(start: Start, client: EngineClient) -> None:
    start(Options(load_s=0.2))
    await client.wait_ready(60)
    assert await client.residency(["a"]) == {"a": "absent"}
    await client.load("a")
    assert await client.residency(["a", "b"]) == {"a": "device", "b": "absent"}
    with pytest.raises(EngineCallFailed, match="it is broken"):
        await client.load("broken")
    with pytest.raises(EngineCallTimedOut):
        await client.load("c", timeout_s=0.01)
    await client.unload("a", forget=True)
    assert await client.residency(["a"]) == {"a": "absent"}
    client.prefetch(["hint"])
    await until(lambda: client.stats["adapters_on_device"] == 2)  # and the one that came too late
    assert await client.residency(["hint"]) == {"hint": "device"}


async def test_a_killed_engine_fails_those_who_wait_and_another_takes_over(
    start: Start, client: EngineClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "HEARTBEAT_TIMEOUT_S", 60.0)
    process = start(Options(step_s=0.01, load_s=1000))
    first = await client.wait_ready(60)
    stream = client.submit(request("r", [1], sampling=ENDLESS))
    await anext(stream)
    call = asyncio.create_task(client.load("never"))
    waiting = asyncio.create_task(collect(client, request("w", [1], adapters=(AdapterRef("never"),))))
    await asyncio.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    async with asyncio.timeout(client_module.HEARTBEAT_TIMEOUT_S / 2):  # without waiting for a heartbeat to fail
        with pytest.raises(EngineUnavailable, match="ended"):
            await exhaust(stream)
        with pytest.raises(EngineUnavailable, match="ended"):
            await call
        with pytest.raises(EngineUnavailable, match="ended"):
            await waiting
    assert not client.healthy
    assert client.manifest == first.manifest
    with pytest.raises(EngineUnavailable):
        client.submit(request("s", [1]))
    with pytest.raises(EngineUnavailable):
        await client.residency(["a"])
    start()
    second = await client.wait_ready(60)
    assert second.engine_id != first.engine_id
    assert len(await collect(client, request("r", [1]))) == 1
    assert client.healthy


async def test_a_hung_engine_is_taken_for_lost_and_found_again(
    start: Start, client: EngineClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = start(SLOW)
    await client.wait_ready(60)
    stream = client.submit(request("r", [1], sampling=ENDLESS))
    await anext(stream)
    process.send_signal(signal.SIGSTOP)
    with monkeypatch.context() as patch:  # only now: one that is merely late is not to be given up
        patch.setattr(client_module, "HEARTBEAT_TIMEOUT_S", 1.5)
        with pytest.raises(EngineUnavailable, match="not heard of"):
            await exhaust(stream)
    assert not client.healthy
    process.send_signal(signal.SIGCONT)
    await client.wait_ready(60)
    await idle(client)
    assert len(await collect(client, request("r", [1]))) == 1


async def test_a_step_that_hangs_shows_in_the_heartbeat(
    start: Start, client: EngineClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "STEP_TIMEOUT_S", 0.5)
    start(Options(step_s=4.0))
    await client.wait_ready(60)
    assert client.healthy
    stream = client.submit(request("r", [1], sampling=SamplingParams(max_tokens=1)))
    await until(lambda: client.step_age_s > 0.5)
    assert client.ready.is_set()
    assert not client.healthy
    await anext(stream)
    await until(lambda: client.healthy)


async def test_a_dead_api_process_loses_its_sequences(start: Start, client: EngineClient, address: str) -> None:
    start(Options(step_s=0.01, client_timeout_s=5.0))  # less, and a busy machine's living client counts as dead
    await client.wait_ready(60)
    context = zmq.asyncio.Context()
    with context, context.socket(zmq.DEALER) as other:
        other.linger = 0
        other.connect(address)
        await other.send(encode(Ping()))
        assert isinstance(decode_from_engine(await other.recv()), Ready)
        await other.send(encode(request("theirs", [1] * 40, sampling=ENDLESS)))
        mine = client.submit(request("mine", [1], sampling=ENDLESS))
        await until(lambda: client.stats.get("sequences_running") == 2)
        await until(lambda: client.stats["sequences_running"] == 1)
        # Heard of again, it is told that the engine knows nothing of it.
        while other.poll(0) and await other.poll(0):
            await other.recv()
        await other.send(encode(Ping()))
        assert isinstance(decode_from_engine(await other.recv()), Ready)
    assert len((await anext(mine)).token_ids) > 0
    mine.close()


async def test_garbage_on_the_socket_harms_nobody(start: Start, client: EngineClient, address: str) -> None:
    start()
    await client.wait_ready(60)
    context = zmq.asyncio.Context()
    with context, context.socket(zmq.DEALER) as other:
        other.linger = 0
        other.connect(address)
        await other.send(b"\xff")
        await other.send_multipart([b"too", b"many", b"frames"])
        await other.send(encode(Ping()))
        assert isinstance(decode_from_engine(await other.recv()), Ready)
    assert len(await collect(client, request("r", [1]))) == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_drains(start: Start, client: EngineClient, number: signal.Signals) -> None:
    process = start(SLOW)
    await client.wait_ready(60)
    sampling = SamplingParams(temperature=0.0, max_tokens=100)
    stream = client.submit(request("r", [1], sampling=sampling))
    got = list((await anext(stream)).token_ids)
    process.send_signal(number)

    async def knock() -> None:
        while True:  # the signal takes a moment to arrive
            await collect(client, request("late", [1], sampling=SamplingParams(max_tokens=1)))

    with pytest.raises(EngineRefused) as refused:
        await knock()
    assert refused.value.code == "shutting_down"
    async for delta in stream:
        got += delta.token_ids
    assert got == expected([1], sampling, vocab_size=1000)
    assert await asyncio.to_thread(process.wait, 30) == 0


async def test_draining_has_an_end(start: Start, client: EngineClient) -> None:
    process = start(Options(step_s=0.01, load_s=1000, drain_s=0.5))
    await client.wait_ready(60)
    stream = client.submit(request("r", [1], sampling=ENDLESS))
    await anext(stream)
    fetching = asyncio.create_task(collect(client, request("f", [1], adapters=(AdapterRef("never"),))))
    await asyncio.sleep(0.1)
    process.terminate()
    for read in (exhaust(stream), fetching):
        with pytest.raises(EngineRefused) as refused:
            await read
        assert refused.value.code == "shutting_down"
    assert await asyncio.to_thread(process.wait, 30) == 0


def test_the_io_thread_may_have_ended_before_it_is_woken_up_for_it(address: str) -> None:
    """It looks each time that it wakes up, whatever for, and every second anyway."""
    manifest = Manifest("f", "A", "a", "float32", 100, 64, ())
    hello = Ready("engine", manifest, Limits(64, 8, 16, 16, 100, 8, 512, 1 << 20), "cpu", {})
    postman = Postman(address, hello, queue.SimpleQueue(), 10.0, 20.0)
    postman.start()
    postman._closing = True
    postman.join()
    postman.close()


def test_the_books_are_checked_where_nobody_is_about_to_come() -> None:
    assert check_at(100.0, 0.0, 30.0) == 130.0
    assert check_at(100.0, 129.9, 30.0) == 129.9 + IDLE_S, "whoever was just answered may go on"
    assert check_at(100.0, 100.0 + 31 * OVERDUE, 30.0) == 100.0 + 30 * OVERDUE, "in any rest, if no long one came"
    assert check_at(100.0, 100.2, 0.25) == 100.45
    assert check_at(100.0, 105.0, 0.0) == 100.0, "at once and always"


async def test_an_idle_engine_stops_at_once(start: Start, client: EngineClient) -> None:
    process = start()
    await client.wait_ready(60)
    process.terminate()
    assert await asyncio.to_thread(process.wait, 10) == 0


def test_a_stop_from_before_the_first_step_is_heard(address: str, tmp_path: Path) -> None:
    """Nothing comes after it that would wake an idle engine."""
    config = EngineConfig(model_path="", blobs_dir=str(tmp_path), cache_dir=str(tmp_path), socket=address)
    engine = EngineProcess(config, lambda config, send, wake: build_engine(config, send, Options(), wake=wake))
    engine.stop("SIGTERM")
    running = threading.Thread(target=engine.run, daemon=True)
    running.start()
    running.join(10)
    assert not running.is_alive()


async def test_an_engine_that_keeps_failing_exits_with_an_error(start: Start, client: EngineClient) -> None:
    process = start(Options(poison=13))
    await client.wait_ready(60)
    for i in range(3):
        with pytest.raises(EngineRefused) as refused:
            await collect(client, request(f"r{i}", [13]))
        assert refused.value.code == "engine_error"
    assert await asyncio.to_thread(process.wait, 30) == 1
    await until(lambda: not client.healthy)


async def test_the_engine_ends_with_its_parent(client: EngineClient, address: str) -> None:
    config = EngineConfig(model_path="", blobs_dir="", cache_dir="", socket=address)
    engine = [sys.executable, "-m", "service.engine.process", msgspec.json.encode(config).decode(), "--simulated", "{}"]
    wait = "import subprocess, sys; subprocess.run(sys.argv[1:])"
    parent = await asyncio.create_subprocess_exec(sys.executable, "-c", wait, *engine, cwd=ROOT)
    await client.wait_ready(60)
    (child,) = psutil.Process(parent.pid).children()
    parent.kill()
    await parent.wait()
    await until(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)
    await until(lambda: not client.healthy)


async def test_without_an_engine_nothing_waits_for_ever(client: EngineClient) -> None:
    with pytest.raises(EngineUnavailable, match="not ready within"):
        await client.wait_ready(0.2)
    with pytest.raises(EngineUnavailable):
        client.submit(request("r", [1]))
    with pytest.raises(EngineUnavailable):
        _ = client.manifest
    client.prefetch(["a"])
    assert not client.healthy


def test_neither_the_client_nor_the_simulated_engine_loads_torch() -> None:
    code = """
        import sys
        import service.engine.client
        assert not {"torch", "transformers", "peft", "numpy"} & set(sys.modules), "client"
        import service.engine.process, service.engine.simulated
        assert not {"torch", "transformers", "peft"} & set(sys.modules), "process"
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, check=True)

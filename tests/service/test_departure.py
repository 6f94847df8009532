"""A client that leaves ends what is awaited for it, and nothing else."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from starlette.types import Message

from service.api.departure import Departure
from service.api.deps import EventStream
from service.api.errors import ClientGone


class Client:
    def __init__(self) -> None:
        self.left = asyncio.Event()
        self.pieces = 2
        """Of a body that nobody wants."""

    async def receive(self) -> dict[str, object]:
        if self.pieces:
            self.pieces -= 1
            return {"type": "http.request", "body": b"", "more_body": bool(self.pieces)}
        await self.left.wait()
        return {"type": "http.disconnect"}


async def test_it_interrupts_what_is_awaited() -> None:
    client = Client()
    departure = Departure(client.receive)
    asyncio.get_running_loop().call_later(0.01, client.left.set)
    with pytest.raises(ClientGone), departure.interrupts():
        await asyncio.sleep(60)
    assert await _still_works()


async def test_it_is_noticed_by_the_next_block_too() -> None:
    client = Client()
    departure = Departure(client.receive)
    with departure.interrupts():
        await asyncio.sleep(0)
    client.left.set()
    await asyncio.sleep(0.01)
    with pytest.raises(ClientGone), departure.interrupts():
        await asyncio.sleep(60)
    assert await _still_works()


async def test_what_ends_in_time_ends_as_ever() -> None:
    client = Client()
    departure = Departure(client.receive)
    with departure.interrupts():
        assert await asyncio.sleep(0.001, "done") == "done"
    client.left.set()  # outside, nobody is interrupted
    assert await asyncio.sleep(0.01, "done") == "done"
    with pytest.raises(KeyError), departure.interrupts():
        raise KeyError
    departure.close()
    departure.close()
    assert await _still_works()


async def test_another_cancellation_stays_one() -> None:
    departure = Departure(Client().receive)

    async def wait() -> None:
        with departure.interrupts():
            await asyncio.sleep(60)

    task = asyncio.create_task(wait())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(wait(), 0.01)
    departure.close()


async def test_a_departure_while_another_cancellation_is_under_way_stays_that_one() -> None:
    client = Client()
    departure = Departure(client.receive)

    async def wait() -> None:
        with departure.interrupts():
            try:
                await asyncio.sleep(60)
            finally:
                client.left.set()
                await asyncio.sleep(0.01)

    task = asyncio.create_task(wait())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def _still_works() -> bool:
    """No cancellation is left behind."""
    task = asyncio.current_task()
    return await asyncio.sleep(0, task is not None and not task.cancelling())


@pytest.mark.parametrize("blocked", ["head", "event", "end", "nothing"])
async def test_a_stream_is_finished_once_wherever_it_is_broken_off(blocked: str) -> None:
    """Also where its client leaves before anything could be written: a generator that has not begun has no end."""
    client, finished, closed = Client(), [], []
    departure = Departure(client.receive)

    async def events() -> AsyncGenerator[bytes, None]:
        try:
            yield b"data: 1\n\n"
        finally:
            closed.append(1)

    async def finish() -> None:
        finished.append(list(closed))

    async def send(message: Message) -> None:
        body = message["type"] == "http.response.body"
        if {"head": not body, "event": body and message["more_body"], "end": body and not message["more_body"]}.get(
            blocked
        ):
            client.left.set()
            await asyncio.sleep(60)

    scope: dict[str, Any] = {"state": {}}
    await EventStream(events(), {}, departure, finish)(scope, client.receive, send)
    assert finished == [[] if blocked == "head" else [1]]
    assert scope["state"] == ({} if blocked == "nothing" else {"disconnected": True})
    assert await _still_works()

"""When the client closes the connection before it has its answer: what its request awaits is cancelled."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from starlette.types import Receive

from service.api.errors import ClientGone


class Departure:
    """Watches for it, from the moment the body has been read until `close`. One task for the whole of a request: what
    is interrupted runs in the request's own, so that a token has no turn of the event loop to wait for on its way."""

    def __init__(self, receive: Receive) -> None:
        self._watch = asyncio.ensure_future(_left(receive))

    @contextmanager
    def interrupts(self) -> Iterator[None]:
        """Around awaits of the current task: ClientGone out of them as soon as the client has left. As asyncio.timeout
        does it: a cancellation that comes from elsewhere stays one."""
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("there is no task to interrupt")
        before = task.cancelling()
        inside, left = True, False

        def leave(watch: asyncio.Task[None]) -> None:
            nonlocal left
            if inside and not watch.cancelled():  # called a turn late, when the block may have been left
                left = True
                task.cancel()

        self._watch.add_done_callback(leave)
        try:
            yield
        except asyncio.CancelledError:
            if left and task.uncancel() <= before:
                raise ClientGone from None
            raise
        finally:
            inside = False
            self._watch.remove_done_callback(leave)

    def close(self) -> None:
        """Idempotent."""
        self._watch.cancel()


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass

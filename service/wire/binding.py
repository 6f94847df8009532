"""Methods of the clients out of the functions that make flows: same arguments, types and documentation."""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any, Generic, ParamSpec, TypeVar, cast

from service.wire.drivers import AsyncDriver, SyncDriver
from service.wire.flows import Flow, PageOf, Streamed
from service.wire.streams import AsyncStream, Stream

P = ParamSpec("P")
T = TypeVar("T")


class SyncPart:
    """A group of calls, `client.adapters` say."""

    def __init__(self, driver: SyncDriver) -> None:
        self._driver = driver


class AsyncPart:
    def __init__(self, driver: AsyncDriver) -> None:
        self._driver = driver


class _Method(Generic[P, T]):
    """A flow's function as a method: same arguments, same documentation."""

    def __init__(self, flow: Callable[P, T]) -> None:
        self._flow = flow
        self.__doc__ = flow.__doc__

    def _bound(self, run: Callable[[T], Any]) -> Any:
        @functools.wraps(self._flow)
        def method(*args: P.args, **kwargs: P.kwargs) -> Any:
            return run(self._flow(*args, **kwargs))

        return method


class call(_Method[P, Flow[T]]):  # noqa: N801 - used as a decorator is
    def __get__(self, part: SyncPart, owner: type[SyncPart] | None = None) -> Callable[P, T]:
        return cast("Callable[P, T]", self if part is None else self._bound(part._driver.run))


class listing(_Method[P, PageOf[T]]):  # noqa: N801
    def __get__(self, part: SyncPart, owner: type[SyncPart] | None = None) -> Callable[P, Iterator[T]]:
        return cast("Callable[P, Iterator[T]]", self if part is None else self._bound(part._driver.pages))


class streaming(_Method[P, Flow[Streamed]]):  # noqa: N801
    def __get__(self, part: SyncPart, owner: type[SyncPart] | None = None) -> Callable[P, Stream]:
        return cast("Callable[P, Stream]", self if part is None else self._bound(part._driver.stream))


class acall(_Method[P, Flow[T]]):  # noqa: N801
    def __get__(self, part: AsyncPart, owner: type[AsyncPart] | None = None) -> Callable[P, Awaitable[T]]:
        return cast("Callable[P, Awaitable[T]]", self if part is None else self._bound(part._driver.run))


class alisting(_Method[P, PageOf[T]]):  # noqa: N801
    def __get__(self, part: AsyncPart, owner: type[AsyncPart] | None = None) -> Callable[P, AsyncIterator[T]]:
        return cast("Callable[P, AsyncIterator[T]]", self if part is None else self._bound(part._driver.pages))


class astreaming(_Method[P, Flow[Streamed]]):  # noqa: N801
    def __get__(self, part: AsyncPart, owner: type[AsyncPart] | None = None) -> Callable[P, Awaitable[AsyncStream]]:
        return cast("Callable[P, Awaitable[AsyncStream]]", self if part is None else self._bound(part._driver.stream))

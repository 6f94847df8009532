"""The Python client: `Loraplex`, and `AsyncLoraplex` for asyncio and trio. It needs httpx alone.

    from service.client import Loraplex

    with Loraplex() as client:                                  # LORAPLEX_URL, LORAPLEX_KEY
        client.adapters.upload("pirate", "outputs/pirate")      # what PEFT's save_pretrained wrote
        print(client.chat("What is a river?", model="pirate", max_tokens=48).text)
        with client.chat_stream("What is glass?", adapters={"pirate": 0.7, "headline": 0.5}) as chunks:
            for chunk in chunks:
                print(chunk.text, end="", flush=True)

What goes wrong is a LoraplexError; service/wire/errors.py draws the tree. Requests that can be repeated without harm
are sent again, `max_retries` times at most, where the server says 429 or 503 with a Retry-After, or the connection was
cut. For chats and completions OpenAI's own client works as well.
"""

from __future__ import annotations

from types import TracebackType

import httpx

from service.wire import adapters, inference, merges, operation, tenants
from service.wire import usage as metering
from service.wire.binding import AsyncPart, SyncPart, acall, alisting, astreaming, call, listing, streaming
from service.wire.drivers import AsyncDriver, SyncDriver
from service.wire.errors import (
    ApiError,
    BadRequest,
    Conflict,
    ConnectionFailed,
    DamagedFile,
    Forbidden,
    LocalFileError,
    LoraplexError,
    MergeFailed,
    NotFound,
    ProtocolError,
    RateLimited,
    Refused,
    ServerError,
    StreamCut,
    TimedOut,
    TooLarge,
    Unauthorized,
    Unavailable,
)
from service.wire.records import (
    Adapter,
    AdapterVersion,
    Alias,
    Answer,
    Choice,
    Chunk,
    Merge,
    MergeFile,
    MergeSource,
    Model,
    Removed,
    Residency,
    ServerVersion,
    Spec,
    StoredFile,
    Tokens,
    Uploaded,
    Usage,
)
from service.wire.server import DEFAULT_URL, Server
from service.wire.streams import AsyncStream, Stream
from service.wire.tenant_records import AuditAction, NewKey, Tenant, TenantKey, UsageRow

TIMEOUT_S = 600.0
MAX_RETRIES = 3


class Adapters(SyncPart):
    """`client.adapters`"""

    upload = call(adapters.upload)
    create = call(adapters.create)
    list = listing(adapters.every)
    get = call(adapters.get)
    versions = listing(adapters.versions)
    version = call(adapters.version)
    files = call(adapters.files)
    download = call(adapters.download)
    update = call(adapters.update)
    set_alias = call(adapters.set_alias)
    delete_alias = call(adapters.delete_alias)
    delete = call(adapters.delete)
    delete_version = call(adapters.delete_version)
    load = call(adapters.load)
    unload = call(adapters.unload)


class Merges(SyncPart):
    """`client.merges`"""

    create = call(merges.create)
    wait = call(merges.wait)
    list = listing(merges.every)
    get = call(merges.get)
    delete = call(merges.delete)
    cancel = call(merges.delete)
    files = call(merges.files)
    download = call(merges.download)


class Tenants(SyncPart):
    """`client.tenants`, with the admin key"""

    create = call(tenants.create)
    list = listing(tenants.every)
    get = call(tenants.get)
    update = call(tenants.update)
    delete = call(tenants.delete)


class Keys(SyncPart):
    """`client.keys`, of tenants, with the admin key"""

    create = call(tenants.create_key)
    list = listing(tenants.keys)
    get = call(tenants.get_key)
    update = call(tenants.update_key)
    delete = call(tenants.delete_key)


class Loraplex(SyncPart):
    """A client that blocks. Several threads may share it.

    url: default LORAPLEX_URL, else http://127.0.0.1:8000. key: default LORAPLEX_KEY; sent as Authorization: Bearer.
    tenant: for the admin, on whose behalf; for others, whose adapters a plain name means (what that tenant shares).
    timeout_s: the longest wait for the server's next bytes; a whole answer is one such wait. Raises ValueError for a
    URL or a key that cannot be one.
    """

    def __init__(
        self,
        url: str | None = None,
        key: str | None = None,
        *,
        tenant: str | None = None,
        timeout_s: float = TIMEOUT_S,
        max_retries: int = MAX_RETRIES,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        super().__init__(SyncDriver(Server(url, key, timeout_s, max_retries, tenant), transport))
        self.url = self._driver.server.url
        self.adapters = Adapters(self._driver)
        self.merges = Merges(self._driver)
        self.tenants = Tenants(self._driver)
        self.keys = Keys(self._driver)

    complete = call(inference.complete)
    complete_stream = streaming(inference.complete_stream)
    chat = call(inference.chat)
    chat_stream = streaming(inference.chat_stream)
    models = listing(inference.models)
    model = call(inference.model)
    base_model = call(inference.base_model)
    tokenize = call(inference.tokenize)
    detokenize = call(inference.detokenize)
    ready = call(operation.ready)
    wait_until_ready = call(operation.wait_until_ready)
    version = call(operation.version)
    usage = listing(metering.usage)
    usage_csv = call(metering.usage_csv)
    audit = listing(tenants.audit)

    def close(self) -> None:
        self._driver.close()

    def __enter__(self) -> Loraplex:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


class AsyncAdapters(AsyncPart):
    """`client.adapters`"""

    upload = acall(adapters.upload)
    create = acall(adapters.create)
    list = alisting(adapters.every)
    get = acall(adapters.get)
    versions = alisting(adapters.versions)
    version = acall(adapters.version)
    files = acall(adapters.files)
    download = acall(adapters.download)
    update = acall(adapters.update)
    set_alias = acall(adapters.set_alias)
    delete_alias = acall(adapters.delete_alias)
    delete = acall(adapters.delete)
    delete_version = acall(adapters.delete_version)
    load = acall(adapters.load)
    unload = acall(adapters.unload)


class AsyncMerges(AsyncPart):
    """`client.merges`"""

    create = acall(merges.create)
    wait = acall(merges.wait)
    list = alisting(merges.every)
    get = acall(merges.get)
    delete = acall(merges.delete)
    cancel = acall(merges.delete)
    files = acall(merges.files)
    download = acall(merges.download)


class AsyncTenants(AsyncPart):
    """`client.tenants`, with the admin key"""

    create = acall(tenants.create)
    list = alisting(tenants.every)
    get = acall(tenants.get)
    update = acall(tenants.update)
    delete = acall(tenants.delete)


class AsyncKeys(AsyncPart):
    """`client.keys`, of tenants, with the admin key"""

    create = acall(tenants.create_key)
    list = alisting(tenants.keys)
    get = acall(tenants.get_key)
    update = acall(tenants.update_key)
    delete = acall(tenants.delete_key)


class AsyncLoraplex(AsyncPart):
    """Like Loraplex, for asyncio and trio: calls are awaited, lists and streams are read with `async for`, and
    `await client.chat_stream(...)` gives the stream."""

    def __init__(
        self,
        url: str | None = None,
        key: str | None = None,
        *,
        tenant: str | None = None,
        timeout_s: float = TIMEOUT_S,
        max_retries: int = MAX_RETRIES,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        super().__init__(AsyncDriver(Server(url, key, timeout_s, max_retries, tenant), transport))
        self.url = self._driver.server.url
        self.adapters = AsyncAdapters(self._driver)
        self.merges = AsyncMerges(self._driver)
        self.tenants = AsyncTenants(self._driver)
        self.keys = AsyncKeys(self._driver)

    complete = acall(inference.complete)
    complete_stream = astreaming(inference.complete_stream)
    chat = acall(inference.chat)
    chat_stream = astreaming(inference.chat_stream)
    models = alisting(inference.models)
    model = acall(inference.model)
    base_model = acall(inference.base_model)
    tokenize = acall(inference.tokenize)
    detokenize = acall(inference.detokenize)
    ready = acall(operation.ready)
    wait_until_ready = acall(operation.wait_until_ready)
    version = acall(operation.version)
    usage = alisting(metering.usage)
    usage_csv = acall(metering.usage_csv)
    audit = alisting(tenants.audit)

    async def close(self) -> None:
        await self._driver.close()

    async def __aenter__(self) -> AsyncLoraplex:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.close()


__all__ = [
    "DEFAULT_URL", "Adapter", "AdapterVersion", "Adapters", "Alias", "Answer", "ApiError", "AsyncAdapters", "AsyncKeys",
    "AsyncLoraplex", "AsyncMerges", "AsyncStream", "AsyncTenants", "AuditAction", "BadRequest", "Choice", "Chunk",
    "Conflict", "ConnectionFailed", "DamagedFile", "Forbidden", "Keys", "LocalFileError", "Loraplex", "LoraplexError",
    "Merge", "MergeFailed", "MergeFile", "MergeSource", "Merges", "Model", "NewKey", "NotFound", "ProtocolError",
    "RateLimited", "Refused", "Removed", "Residency", "ServerError", "ServerVersion", "Spec", "StoredFile", "Stream",
    "StreamCut", "Tenant", "TenantKey", "Tenants", "TimedOut", "Tokens", "TooLarge", "Unauthorized", "Unavailable",
    "Uploaded", "Usage", "UsageRow",
]  # fmt: skip

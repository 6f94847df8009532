"""Where the server is, and how httpx speaks to it."""

from __future__ import annotations

import contextlib
import ipaddress
import os
from collections.abc import Iterator
from typing import IO, Any, cast

import httpx

from service import __version__
from service.wire.errors import BadRequest, ConnectionFailed, StreamCut, TimedOut
from service.wire.files import UploadBody
from service.wire.flows import Request

DEFAULT_URL = "http://127.0.0.1:8000"
CONNECT_TIMEOUT_S = 10.0


class Server:
    """Where the server is and how to speak to it; checked once.

    url: None: LORAPLEX_URL, or this machine's port 8000. key: None: LORAPLEX_KEY, or none. tenant: whose adapters,
    merges and use requests are about, unless they say so themselves.
    timeout_s: of every wait for the server's next bytes; a long answer that is not streamed is one such wait.
    Raises ValueError for a URL or a key that cannot be one.
    """

    def __init__(
        self, url: str | None, key: str | None, timeout_s: float, max_retries: int, tenant: str | None = None
    ) -> None:
        self.url = _checked_url(url or os.environ.get("LORAPLEX_URL") or DEFAULT_URL)
        self._key = key or os.environ.get("LORAPLEX_KEY") or None
        if self._key is not None and not (self._key.isascii() and self._key.isprintable() and " " not in self._key):
            raise ValueError("the key has characters that no key has (LORAPLEX_KEY)")
        self.timeout_s = timeout_s
        self.max_retries = max_retries
        self.tenant = tenant

    def options(self) -> dict[str, Any]:
        """For httpx's clients."""
        headers = {"User-Agent": f"loraplex/{__version__} httpx/{httpx.__version__}"}
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key}"
        # A proxy of the environment is for the network; it could not reach this machine's own addresses.
        direct = _is_loopback(httpx.URL(self.url).host)
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=20, keepalive_expiry=5.0)
        return {
            "base_url": self.url, "headers": headers, "limits": limits, "trust_env": not direct,
            "timeout": self._timeout(self.timeout_s),
        }  # fmt: skip

    @staticmethod
    def _timeout(seconds: float) -> httpx.Timeout:
        return httpx.Timeout(seconds, connect=min(CONNECT_TIMEOUT_S, seconds), pool=None)

    def build(self, client: httpx.Client | httpx.AsyncClient, request: Request) -> httpx.Request:
        """The request as httpx wants it. Raises LocalFileError, and BadRequest for what cannot be written."""
        options: dict[str, Any] = {"headers": dict(request.headers)}
        params = {key: value for key, value in request.params.items() if value is not None}
        if self.tenant is not None:
            params.setdefault("tenant", self.tenant)
        if params:
            options["params"] = params
        if request.json is not None:
            options["json"] = request.json
        if request.timeout_s is not None:
            options["timeout"] = self._timeout(request.timeout_s)
        if request.upload is None:
            try:
                return client.build_request(request.method, request.path, **options)
            except ValueError as exc:  # no finite number, half a surrogate pair
                raise BadRequest(400, f"The request cannot be written: {exc}.") from exc
        parts = request.upload.open()
        files = [
            (field, (part.name, cast("IO[bytes]", part))) for field, part in parts
        ]  # all that httpx asks of a file
        form = client.build_request(
            request.method, request.path, data=dict(request.upload.fields), files=files, **options
        )
        size = int(form.headers["content-length"])
        body = UploadBody(cast("Any", form.stream), [part for _, part in parts], size, request.upload.progress)
        return httpx.Request(form.method, form.url, headers=form.headers, stream=body, extensions=form.extensions)


def _checked_url(url: str) -> str:
    try:
        parsed = httpx.URL(url.strip())
    except (httpx.InvalidURL, ValueError) as exc:
        raise ValueError(f"{url!r} is not a URL: {exc}") from None
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise ValueError(f"{url!r} is not the URL of a server; it should be like {DEFAULT_URL}")
    # OpenAI's clients want the address with /v1; who has set that one gets along with it here too.
    return str(parsed).rstrip("/").removesuffix("/v1")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@contextlib.contextmanager
def sending(request: httpx.Request) -> Iterator[httpx.Request]:
    """Leaves no file of an upload open, however the sending ends."""
    try:
        yield request
    finally:
        if isinstance(request.stream, UploadBody):
            request.stream.close()


@contextlib.contextmanager
def translated(url: str) -> Iterator[None]:
    """httpx's failures as this client's."""
    try:
        yield
    except httpx.TimeoutException as exc:
        what = "no connection" if isinstance(exc, httpx.ConnectTimeout) else "no answer"
        raise TimedOut(f"{what} from {url} in time") from exc
    except (httpx.ConnectError, httpx.UnsupportedProtocol, httpx.ProxyError) as exc:
        raise ConnectionFailed(f"cannot reach {url}: {exc or type(exc).__name__}") from exc
    except (httpx.RemoteProtocolError, httpx.ReadError, httpx.WriteError, httpx.CloseError) as exc:
        raise StreamCut(f"the connection to {url} was cut: {exc or type(exc).__name__}") from exc
    except (httpx.TransportError, httpx.DecodingError, httpx.StreamError) as exc:
        raise ConnectionFailed(f"the exchange with {url} failed: {exc or type(exc).__name__}") from exc

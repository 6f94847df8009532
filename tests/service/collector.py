"""An OpenTelemetry collector, as small as can be: OTLP over HTTP, decoded with the protocol's own classes."""

from __future__ import annotations

import gzip
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span as WireSpan

from tests.service.launch import wait_for


@dataclass
class Span:
    service: str
    name: str
    trace: str
    id: str
    parent: str
    start: int
    end: int
    failed: bool
    attributes: dict[str, Any] = field(default_factory=dict)


class Collector:
    """Listens at `url` inside `with`. `hang`: it takes connections and bodies, and never answers."""

    def __init__(self, *, hang: bool = False, port: int = 0) -> None:
        self.spans: list[Span] = []
        self.requests = 0
        self.paths: set[str] = set()
        self._release = threading.Event()
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                collector.requests += 1
                if hang:
                    collector._release.wait()
                    return
                collector.paths.add(self.path)
                if self.headers.get("content-encoding") == "gzip":
                    body = gzip.decompress(body)
                collector._take(ExportTraceServiceRequest.FromString(body))
                self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})

    def _take(self, request: ExportTraceServiceRequest) -> None:
        for resource in request.resource_spans:
            service = _values(resource.resource.attributes)["service.name"]
            for scope in resource.scope_spans:
                self.spans += [_span(service, span) for span in scope.spans]

    def wait_for(self, count: int, **said: Any) -> list[Span]:
        """The spans of the newest trace whose request has these attributes, once there are `count` of them."""
        found: list[Span] = []

        def complete() -> bool:
            nonlocal found
            roots = [span for span in list(self.spans) if said.items() <= span.attributes.items()]
            found = [span for span in list(self.spans) if roots and span.trace == roots[-1].trace]
            return len(found) >= count

        try:
            wait_for(complete, 30)
        except TimeoutError:
            raise AssertionError(f"{len(found)} of {count}: {found or self.spans[-10:]}") from None
        return sorted(found, key=lambda span: (span.start, -span.end))

    def __enter__(self) -> Collector:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._release.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def _values(attributes: Any) -> dict[str, Any]:
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in attributes}


def _span(service: str, span: WireSpan) -> Span:
    return Span(
        service,
        span.name,
        span.trace_id.hex(),
        span.span_id.hex(),
        span.parent_span_id.hex(),
        span.start_time_unix_nano,
        span.end_time_unix_nano,
        span.status.code == 2,
        _values(span.attributes),
    )

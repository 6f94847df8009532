"""Spans to an OpenTelemetry collector: what the API processes and the engine share of it (the extra `traces`).

Nothing of OpenTelemetry is imported before a Spans is made. Spans are sent by a thread of their own, in batches. A
collector that is away, hangs or refuses them costs spans, never a request: beyond MAX_WAITING they are dropped.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
import os
import socket
import threading
from typing import Any

log = logging.getLogger(__name__)

FLUSH_S = 1.5
"""What sending the last spans may take when a process ends."""
MAX_WAITING = 8192
BATCH = 128
"""Encoding one takes 43 us of Python, so a batch holds up a step by 5 ms at most."""
INTERVAL_MS = 1000.0
SEND_TIMEOUT_S = 5.0
_NEEDED = ("opentelemetry.sdk.trace", "opentelemetry.exporter.otlp.proto.http.trace_exporter")


def missing() -> bool:
    """Whether the extra `traces` is not installed."""
    try:
        return any(importlib.util.find_spec(name) is None for name in _NEEDED)
    except ImportError:
        return True


class Spans:
    """Makes spans, by `tracer`, and sends them. `process`: api or engine. `ratio`: of the traces that begin here, which
    are kept; of those that a client has begun, the client has decided. Raises ImportError where `missing()`."""

    def __init__(self, url: str, process: str, ratio: float = 1.0) -> None:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)  # a line for every batch; _Forgiving says it once
        version = _version()
        resource = Resource.create(
            {
                "service.name": f"loraplex-{process}",
                "service.namespace": "loraplex",
                "service.version": version,
                "service.instance.id": f"{socket.gethostname()}:{os.getpid()}",
            }
        )
        exporter: Any = _Forgiving(OTLPSpanExporter(endpoint=url, timeout=SEND_TIMEOUT_S), url)
        self._processor = BatchSpanProcessor(
            exporter, max_queue_size=MAX_WAITING, schedule_delay_millis=INTERVAL_MS, max_export_batch_size=BATCH
        )
        # Not shutdown_on_exit: it would wait for a collector that hangs.
        provider = TracerProvider(
            sampler=ParentBased(TraceIdRatioBased(ratio)), resource=resource, shutdown_on_exit=False
        )
        provider.add_span_processor(self._processor)
        self.tracer = provider.get_tracer("loraplex", version)
        self._propagator = TraceContextTextMapPropagator()

    def parent(self, traceparent: str, tracestate: str = "") -> Any:
        """The context that W3C's headers name; an empty one where they name none."""
        from opentelemetry.context import Context

        carrier = {"traceparent": traceparent, "tracestate": tracestate}
        return self._propagator.extract(carrier, context=Context())

    def close(self) -> None:
        """Sends what is left, for at most FLUSH_S."""
        closing = threading.Thread(target=self._processor.shutdown, name="traces-close", daemon=True)
        closing.start()
        closing.join(FLUSH_S)


class _Forgiving:
    """A SpanExporter that says once that spans are lost, and once that they no longer are."""

    def __init__(self, exporter: Any, url: str) -> None:
        self._exporter = exporter
        self._url = url
        self._failing = False

    def export(self, spans: Any) -> Any:
        result = self._exporter.export(spans)
        failed = result.name != "SUCCESS"
        if failed and not self._failing:
            log.warning("spans cannot be sent to %s, they are dropped until it takes them", self._url)
        elif self._failing and not failed:
            log.info("spans are taken again by %s", self._url)
        self._failing = failed
        return result

    def shutdown(self) -> None:
        self._exporter.shutdown()

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        return bool(self._exporter.force_flush(timeout_millis))


def _version() -> str:
    try:
        return importlib.metadata.version("loraplex")
    except importlib.metadata.PackageNotFoundError:
        return ""

"""The API's spans: one for each request, with a child for what it does before the engine has it. The engine's are
children of the same one (service/engine/tracing.py): its traceparent goes with Submit.

A request that is traced has a RequestTrace at `state["trace"]`. No span holds a prompt, an answer or a key.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from starlette.datastructures import Headers

from service.engine.otlp import Spans
from service.settings import Settings

PROBES = frozenset({"/health", "/ready", "/metrics"})
"""Not traced: they come every few seconds and tell nothing."""
_NOTHING = nullcontext()
_ATTRIBUTES = {
    "tenant": "loraplex.tenant",
    "model": "gen_ai.request.model",
    "adapter": "loraplex.adapter",
    "prompt_tokens": "gen_ai.usage.input_tokens",
    "completion_tokens": "gen_ai.usage.output_tokens",
    "error_code": "error.type",
    "job": "loraplex.job",
}
"""What routes have put into the state of a request, and what its span calls it."""


class Traces:
    """Of one API process. `open` gives None where nothing is to be traced."""

    def __init__(self, spans: Spans) -> None:
        self._spans = spans

    @classmethod
    def open(cls, settings: Settings) -> Traces | None:
        if not settings.traces_url:
            return None
        return cls(Spans(settings.traces_endpoint, "api", settings.traces_ratio))

    def close(self) -> None:
        """Sends what is left, for at most FLUSH_S."""
        self._spans.close()

    def begin(self, scope: Mapping[str, Any], request_id: str) -> RequestTrace | None:
        """None for a request that is not to be traced: a probe, or not one of the sample."""
        if scope["path"] in PROBES:
            return None
        from opentelemetry.trace import SpanKind

        headers = Headers(raw=scope["headers"])
        parent = self._spans.parent(headers.get("traceparent", ""), headers.get("tracestate", ""))
        attributes = {"http.request.method": scope["method"], "loraplex.request_id": request_id}
        span = self._spans.tracer.start_span(scope["method"], parent, SpanKind.SERVER, attributes)
        return RequestTrace(self._spans.tracer, span) if span.is_recording() else None


class RequestTrace:
    """The span of one request. `id`: the trace's, as collectors show it."""

    def __init__(self, tracer: Any, span: Any) -> None:
        self._tracer = tracer
        self._span = span
        context = span.get_span_context()
        self.id = f"{context.trace_id:032x}"
        self.traceparent = f"00-{self.id}-{context.span_id:016x}-01"

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        from opentelemetry.trace import set_span_in_context

        child = self._tracer.start_span(name, context=set_span_in_context(self._span))
        try:
            yield
        finally:
            child.end()

    def end(self, method: str, route: str, status: int, state: Mapping[str, Any]) -> None:
        """`state`: what the routes know (_ATTRIBUTES)."""
        from opentelemetry.trace import Status, StatusCode

        span = self._span
        span.update_name(f"{method} {route}")
        span.set_attributes({"http.route": route, "http.response.status_code": status})
        known = {name: state.get(key) for key, name in _ATTRIBUTES.items()}
        span.set_attributes({name: value for name, value in known.items() if value is not None})
        # A stream that fails has said 200 long before.
        if status >= 500 or (status < 400 and state.get("error_code")):
            span.set_status(Status(StatusCode.ERROR, state.get("error_code") or ""))
        span.end()


def part(state: MutableMapping[str, Any], name: str) -> AbstractContextManager[None]:
    """A child of the request's span while the block runs, if there is one."""
    trace: RequestTrace | None = state.get("trace")
    return _NOTHING if trace is None else trace.part(name)


def traceparent(state: MutableMapping[str, Any]) -> str:
    """For Submit.trace; empty where the request is not traced."""
    trace: RequestTrace | None = state.get("trace")
    return "" if trace is None else trace.traceparent

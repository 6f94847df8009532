"""What a traced sequence waited for, and when: spans under the span of the API's request (Submit.trace).

    sequence                    from the arrival of the request to the last token
    ├── queue                   until a step first computes something of it
    │   └── fetch               while its adapters were on their way, if they were not there
    ├── prefill                 until its first token
    └── decode                  until its end

The step loop notes times alone. Spans are made of them on a thread of their own, which costs some 150 us a sequence.
Sequences without Submit.trace have no Timeline, and cost a look whether there is one: for each chunk of a prompt, each
look at a waiting sequence, the first token and the end, nothing for a token that is decoded.
"""

from __future__ import annotations

import queue
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from service.engine.otlp import FLUSH_S, MAX_WAITING, Spans

if TYPE_CHECKING:
    from service.engine.request import Sequence


@dataclass(slots=True, eq=False)
class Timeline:
    """Nanoseconds since 1970; 0: not yet. What happens again after a preemption is not noted again."""

    parent: str
    """W3C traceparent."""
    arrived: int = field(default_factory=time.time_ns)
    asked: int = 0
    """It would have come in, had its adapters been there."""
    fetched: int = 0
    started: int = 0
    first_token: int = 0
    code: str = ""
    """Of the Refused that ended it."""

    def adapters(self, there: bool) -> None:
        if not there:
            self.asked = self.asked or time.time_ns()
        elif self.asked and not self.fetched:
            self.fetched = time.time_ns()

    def begun(self, step_started: float | None) -> None:
        """`step_started`: time.monotonic() of the step that first computed something of it."""
        if not self.started:
            age = 0.0 if step_started is None else time.monotonic() - step_started
            self.started = max(time.time_ns() - int(age * 1e9), self.fetched, self.arrived)

    def token(self) -> None:
        self.first_token = self.first_token or time.time_ns()


class SequenceTracer:
    """Takes sequences that have ended; `close` sends what it has."""

    def __init__(self, spans: Spans) -> None:
        self._spans = spans
        self._ended: queue.SimpleQueue[tuple[Sequence, Timeline, int] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="traces", daemon=True)
        self._thread.start()

    def ended(self, seq: Sequence, timeline: Timeline) -> None:
        """`seq` changes no more, but for what it held."""
        if self._ended.qsize() < MAX_WAITING:
            self._ended.put((seq, timeline, time.time_ns()))

    def close(self) -> None:
        self._ended.put(None)
        self._thread.join(FLUSH_S)
        self._spans.close()

    def _run(self) -> None:
        while (each := self._ended.get()) is not None:
            self._emit(*each)

    def _emit(self, seq: Sequence, line: Timeline, end: int) -> None:
        from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context

        tracer = self._spans.tracer

        def span(name: str, start: int, stop: int, parent: Any, **attributes: str | int) -> None:
            named = {f"loraplex.{key}": value for key, value in attributes.items()}
            tracer.start_span(name, context=parent, start_time=start, attributes=named).end(stop)

        whole = tracer.start_span(
            "sequence",
            context=self._spans.parent(line.parent),
            kind=SpanKind.SERVER,
            start_time=line.arrived,
            attributes=_attributes(seq, line),
        )
        if line.code and line.code != "shutting_down":
            whole.set_status(Status(StatusCode.ERROR, line.code))
        inside = set_span_in_context(whole)
        waited = line.started or end
        queued = tracer.start_span("queue", context=inside, start_time=line.arrived)
        if line.asked:
            span("fetch", line.asked, line.fetched or waited, set_span_in_context(queued), adapters=len(seq.adapters))
        queued.end(waited)
        if line.started:
            first = line.first_token or end
            span("prefill", line.started, first, inside, tokens=seq.num_prompt, cached_tokens=seq.cached_tokens)
            if line.first_token:
                span("decode", first, end, inside, tokens=seq.num_generated)
        whole.end(end)


def _attributes(seq: Sequence, line: Timeline) -> dict[str, str | int]:
    attributes: dict[str, str | int] = {
        "loraplex.job": seq.request_id,
        "loraplex.index": seq.index,
        "loraplex.prompt_tokens": seq.num_prompt,
        "loraplex.cached_tokens": seq.cached_tokens,
        "loraplex.completion_tokens": seq.num_generated,
        "loraplex.preemptions": seq.preemptions,
        "loraplex.adapters": len(seq.adapters),
        "loraplex.adapter_bytes": seq.adapter_bytes,
        "loraplex.finish_reason": seq.finish_reason or "",
    }
    if line.code:
        attributes["error.type"] = line.code
    return attributes

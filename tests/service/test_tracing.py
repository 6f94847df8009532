"""Spans of requests, from the real API process and an engine process to a collector that decodes what they send."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from service.engine.otlp import FLUSH_S
from tests.service.collector import Collector, Span
from tests.service.inference_helpers import BASE, ROOT, InferenceServer
from tests.service.launch import run, wait_for

SECRET = "the quick brown fox"


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with Collector() as collector:
        yield collector


@pytest.fixture(scope="module")
def traced(
    base_model_dir: Path, collector: Collector, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[InferenceServer]:
    """An adapter takes the engine 2 s to load: much longer than a prompt takes to come after the hint."""
    options = {"step_s": 0.001, "load_s": 2.0}
    server = InferenceServer(base_model_dir, engine_options=options, traces_url=collector.url)
    try:
        server.start()
        server.upload("pirate", tmp_path_factory.mktemp("uploads"), 1)
        yield server
    finally:
        server.stop()


def complete(server: InferenceServer, request_id: str, headers: dict[str, str] | None = None, **body: object) -> None:
    sent = {"model": BASE, "prompt": SECRET, "max_tokens": 5, "temperature": 0} | body
    answer = server.http.post("/v1/completions", json=sent, headers={"x-request-id": request_id, **(headers or {})})
    assert answer.status_code == 200, answer.text


def children(spans: list[Span], parent: Span) -> list[str]:
    return [span.name for span in spans if span.parent == parent.id]


def test_one_trace_holds_the_request_and_its_sequence(traced: InferenceServer, collector: Collector) -> None:
    # What the upload has begun to load would be there by the time that a busy machine asks for it.
    for verb in ("load", "unload"):
        assert traced.http.post(f"/v1/adapters/pirate/{verb}?wait=true").status_code == 200
    complete(traced, "one", model="pirate")
    spans = collector.wait_for(7, **{"loraplex.request_id": "one"})
    by_name = {span.name: span for span in spans}
    assert len(by_name) == len(spans) == 7
    request, sequence, queue = by_name["POST /v1/completions"], by_name["sequence"], by_name["queue"]
    assert request.parent == ""
    assert children(spans, request) == ["tokenise", "sequence"]
    assert children(spans, sequence) == ["queue", "prefill", "decode"]
    assert children(spans, queue) == ["fetch"]
    assert (request.service, sequence.service) == ("loraplex-api", "loraplex-engine")

    by_id = {span.id: span for span in spans}
    for span in spans:
        assert span.start <= span.end, span
        if span.parent:
            assert by_id[span.parent].start <= span.start <= span.end <= by_id[span.parent].end, span
    assert by_name["tokenise"].end <= sequence.start
    assert queue.start == sequence.start
    assert queue.end == by_name["prefill"].start
    assert by_name["prefill"].end == by_name["decode"].start
    assert by_name["decode"].end == sequence.end
    assert by_name["fetch"].end > by_name["fetch"].start

    known = request.attributes
    assert known["http.route"] == "/v1/completions"
    assert known["http.request.method"] == "POST"
    assert known["http.response.status_code"] == 200
    assert known["gen_ai.request.model"] == "pirate"
    assert known["loraplex.adapter"] == "pirate@1"
    assert known["gen_ai.usage.input_tokens"] == sequence.attributes["loraplex.prompt_tokens"] > 1
    assert known["gen_ai.usage.output_tokens"] == sequence.attributes["loraplex.completion_tokens"] == 5
    assert known["loraplex.job"] == sequence.attributes["loraplex.job"]
    assert sequence.attributes["loraplex.adapters"] == 1
    assert sequence.attributes["loraplex.finish_reason"] == "length"
    assert by_name["decode"].attributes["loraplex.tokens"] == 5
    assert not any(span.failed for span in spans)
    assert SECRET not in repr(spans)
    assert collector.paths == {"/v1/traces"}

    line = next(line for line in log_lines(traced) if line.get("request_id") == "one" and line["event"] == "request")
    assert line["trace_id"] == request.trace
    assert line["job"] == known["loraplex.job"]


def test_every_sequence_of_a_stream_has_its_spans(traced: InferenceServer, collector: Collector) -> None:
    body = {"model": BASE, "messages": [{"role": "user", "content": SECRET}], "n": 2, "max_tokens": 4, "stream": True}
    answer = traced.http.post("/v1/chat/completions", json=body, headers={"x-request-id": "two"})
    assert answer.text.endswith("data: [DONE]\n\n")
    spans = collector.wait_for(10, **{"loraplex.request_id": "two"})
    (request,) = [span for span in spans if not span.parent]
    assert children(spans, request) == ["tokenise", "sequence", "sequence"]
    sequences = [span for span in spans if span.name == "sequence"]
    assert {span.attributes["loraplex.index"] for span in sequences} == {0, 1}
    for sequence in sequences:
        assert children(spans, sequence) == ["queue", "prefill", "decode"]
    # The second finds the first one's prompt in the prefix cache, or computed it too where that is short.
    assert request.attributes["gen_ai.usage.output_tokens"] == 8


def test_the_callers_trace_goes_on_and_its_decision_counts(traced: InferenceServer, collector: Collector) -> None:
    trace, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    complete(traced, "unwanted", {"traceparent": f"00-{'1' * 32}-{parent}-00"})
    complete(traced, "three", {"traceparent": f"00-{trace}-{parent}-01"})
    spans = collector.wait_for(6, **{"loraplex.request_id": "three"})
    assert {span.trace for span in spans} == {trace}
    (request,) = [span for span in spans if span.name.startswith("POST")]
    assert request.parent == parent
    assert not [span for span in collector.spans if span.trace == "1" * 32]


def test_errors_and_requests_that_are_broken_off(traced: InferenceServer, collector: Collector) -> None:
    body = {"model": "nobody", "prompt": SECRET}
    answer = traced.http.post("/v1/completions", json=body, headers={"x-request-id": "four"})
    assert answer.status_code == 404
    (request,) = collector.wait_for(1, **{"loraplex.request_id": "four"})
    assert request.attributes["http.response.status_code"] == 404
    assert request.attributes["error.type"] == "model_not_found"
    assert not request.failed  # the caller's mistake

    body = {"model": BASE, "prompt": SECRET, "max_tokens": 400, "stream": True, "ignore_eos": True}
    with traced.http.stream("POST", "/v1/completions", json=body, headers={"x-request-id": "five"}) as stream:
        next(stream.iter_lines())
    spans = collector.wait_for(6, **{"loraplex.request_id": "five"})
    (sequence,) = [span for span in spans if span.name == "sequence"]
    assert sequence.attributes["loraplex.finish_reason"] == "abort"
    (request,) = [span for span in spans if span.name.startswith("POST")]
    assert request.attributes["http.response.status_code"] == 499


def test_probes_are_not_traced(traced: InferenceServer, collector: Collector) -> None:
    for path in ("/health", "/ready", "/metrics"):
        assert traced.http.get(path).status_code == 200
    complete(traced, "after")
    collector.wait_for(6, **{"loraplex.request_id": "after"})
    assert not {span.attributes.get("http.route") for span in collector.spans} & {"/health", "/ready", "/metrics"}


def test_the_last_spans_are_sent_when_the_processes_end(base_model_dir: Path) -> None:
    with Collector() as collector:
        server = InferenceServer(base_model_dir, traces_url=f"{collector.url}/v1/traces")
        try:
            server.start()
            complete(server, "last")
            assert server.engine is not None
            assert server.api is not None
            for process in (server.api, server.engine):
                process.send_signal(signal.SIGTERM)
                process.wait(30)
            # Both have ended, so whatever was going to be sent has been received.
            names = {span.name for span in collector.spans}
            assert {"POST /v1/completions", "tokenise", "sequence", "queue", "prefill", "decode"} <= names
        finally:
            server.stop()


@pytest.mark.parametrize("how", ["away", "hangs"])
def test_a_collector_that_takes_nothing_does_not_matter(base_model_dir: Path, free_port, how: str) -> None:
    with contextlib.ExitStack() as stack:
        if how == "hangs":
            collector = stack.enter_context(Collector(hang=True))
            url = collector.url
        else:
            url = f"http://127.0.0.1:{free_port()}"
        server = InferenceServer(base_model_dir, traces_url=url)
        try:
            server.start()
            for i in range(20):
                complete(server, f"r{i}")

            def warnings() -> list[str]:
                return [line["event"] for line in log_lines(server) if "spans cannot be sent" in line["event"]]

            wait_for(warnings)
            for i in range(20):
                complete(server, f"s{i}")
            assert server.api is not None
            assert server.engine is not None
            started = time.monotonic()
            for process in (server.api, server.engine):
                process.send_signal(signal.SIGTERM)
            assert server.api.wait(30) == -signal.SIGTERM  # uvicorn's way of ending in order
            assert server.engine.wait(30) == 0
            assert time.monotonic() - started < 20 + FLUSH_S
            assert len(warnings()) == 1
            assert not [line for line in log_lines(server) if line["level"] in ("error", "critical")]
        finally:
            server.stop()


def test_without_the_setting_nothing_is_imported(server: InferenceServer) -> None:
    """Newer FastAPI imports the interface of OpenTelemetry by itself, but nothing that makes or sends spans."""
    script = """
import asyncio, sys
from service.app import from_environment
async def main():
    app = from_environment()
    async with app.router.lifespan_context(app):
        assert app.state.services.traces is None
        print([name for name in sys.modules if name.startswith(("opentelemetry.sdk", "opentelemetry.exporter"))])
asyncio.run(main())
"""
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=ROOT, env=server.environment, capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1:] == ["[]"], done.stderr
    script = "import sys, service.engine.process, service.engine.simulated; "
    script += "print([name for name in sys.modules if name.startswith('opentelemetry')])"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines() == ["[]"], done.stderr


def test_a_missing_extra_is_one_line_and_a_hint(tmp_path: Path, base_model_dir: Path) -> None:
    (tmp_path / "empty" / "opentelemetry").mkdir(parents=True)
    (tmp_path / "empty" / "opentelemetry" / "__init__.py").touch()  # found first, and has none of what is needed
    flags = (
        "--traces-url",
        "http://127.0.0.1:4318",
        "--model",
        str(base_model_dir),
        "--data-dir",
        str(tmp_path / "data"),
    )
    done = run(*flags, "--port", "0", PYTHONPATH=str(tmp_path / "empty"))
    assert done.returncode == 1
    problem, hint = done.stdout.splitlines()
    assert problem == "loraplex: LORAPLEX_TRACES_URL=http://127.0.0.1:4318: OpenTelemetry is not installed"
    assert hint == "  hint: install the extra: pip install 'loraplex[traces]'"


@pytest.mark.parametrize("url", ["collector:4318", "ftp://collector", "http://", "http://user:secret@collector"])
def test_a_wrong_url_is_one_line(url: str) -> None:
    done = run("--traces-url", url)
    assert done.returncode == 2
    assert done.stdout.startswith("loraplex: traces_url=")


def log_lines(server: InferenceServer) -> list[dict[str, object]]:
    return [json.loads(line) for line in server.log_path.read_text().splitlines()]

"""With LORAPLEX_LOG_FORMAT=json every line that any process of the service writes is a JSON object, and those about a
request carry its id."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.service.launch import ROOT, Launched, run, wait_for
from tests.service.tenant_helpers import upload

POISON = 4242
SECRET = "the moon over the harbour"
ENGINE = json.dumps({"vocab_size": 49152, "poison": POISON})


def lines(text: str) -> list[dict[str, Any]]:
    found = []
    for line in text.splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            raise AssertionError(f"no JSON: {line!r} in\n{text}") from None
        assert {"event", "level", "timestamp", "logger"} <= record.keys(), record
        found.append(record)
    return found


def test_every_line_of_every_process_is_json(
    base_model_dir: Path, tmp_path: Path, free_port: Callable[[], int]
) -> None:
    """Uploads, a completion, refusals, steps that fail, a merge, processes that are killed, the end."""
    flags = "--model", str(base_model_dir), "--served-name", "base", "--simulated", ENGINE, "--log-format", "json"
    with Launched(tmp_path, free_port(), *flags, PYTHONWARNINGS="default") as service:
        service.wait_announced()
        http = service.http
        for name, seed in (("first", 1), ("second", 2)):
            assert upload(http, name, seed).status_code == 201
        body = {"model": "first", "prompt": SECRET, "max_tokens": 3}
        assert http.post("/v1/completions", json=body, headers={"x-request-id": "good"}).status_code == 200
        assert http.post("/v1/completions", json={**body, "model": "nobody"}).status_code == 404
        poisoned = {**body, "prompt": [POISON, POISON]}
        answer = http.post("/v1/completions", json=poisoned, headers={"x-request-id": "poisoned"})
        assert answer.status_code == 500
        unfit = {**body, "prompt": SECRET * 2000, "max_tokens": 10**6}
        assert http.post("/v1/completions", json=unfit).status_code == 400
        stream = http.post(
            "/v1/completions", json={**poisoned, "stream": True}, headers={"x-request-id": "poisoned-stream"}
        )
        assert stream.status_code == 500

        sources = [{"adapter": "first", "weight": 1.0}, {"adapter": "second", "weight": 1.0}]
        job = http.post("/v1/merges", json={"name": "both", "sources": sources, "into": "adapter"})
        assert job.status_code == 202, job.text

        wait_for(lambda: "merge started" in service.log.read_text())
        service.child("service.engine.process").send_signal(signal.SIGKILL)
        wait_for(lambda: "starting another one" in service.log.read_text())
        wait_for(service.ready)
        # Python's resource tracker cleans up after it, and has things to say.
        api = service.child("service.api_worker")
        left = [child for child in api.children() if "resource_tracker" in " ".join(child.cmdline())]
        assert left
        api.send_signal(signal.SIGKILL)
        wait_for(lambda: service.log.read_text().count("starting another one") == 2)
        wait_for(service.ready)
        wait_for(lambda: not any(process.is_running() for process in left))
        service.process.terminate()
        assert service.process.wait(60) == 0
        text = service.log.read_text()
        records = lines(text)

    assert SECRET not in text
    assert '"locals"' not in text  # of a traceback's frames
    loggers = {record["logger"] for record in records}
    assert {"service.supervisor", "service.app", "service.engine", "service.access"} <= loggers
    by_id = {name: [each for each in records if each.get("request_id") == name] for name in ("good", "poisoned")}
    (good,) = by_id["good"]
    assert good["logger"] == "service.access"
    assert (good["status"], good["adapter"]) == (200, "first@1")
    (failed,) = [each for each in by_id["poisoned"] if each["logger"] == "service.access"]
    assert failed["status"] == 500
    # The engine does not know the client's id: the access line says what the engine calls the request.
    steps = [each for each in records if each["event"].startswith("step of ")]
    assert failed["job"] in [job for step in steps for job in step["jobs"]]
    assert any(step.get("exception") for step in steps)
    for record in records:
        if record["logger"] == "service.access":
            assert record.get("request_id"), record
    assert records[-1]["event"] == "loraplex has stopped."


def test_a_start_that_fails_is_a_line_of_json(tmp_path: Path) -> None:
    done = run("--log-format", "json", "--model", "/no/such/model", "--data-dir", str(tmp_path), "--port", "0")
    assert done.returncode == 1
    last = lines(done.stdout)[-1]
    assert last["level"] == "critical"
    assert last["event"].startswith("LORAPLEX_MODEL=/no/such/model: ")
    assert last["hint"]


def test_an_engine_that_ends_badly_says_so_in_json(tmp_path: Path, base_model_dir: Path) -> None:
    flags = "--simulated", "not JSON", "--model", str(base_model_dir), "--port", "0", "--data-dir", str(tmp_path)
    done = run(*flags, "--log-format", "json")
    assert done.returncode == 1
    records = lines(done.stdout)
    (end,) = [record for record in records if record["event"].startswith("the process ends")]
    assert end["exception"]


@pytest.mark.parametrize("format", ["json", "console"])
def test_tracebacks_do_not_show_what_variables_hold(format: str) -> None:
    script = f"""
import logging
from service.engine import logs
logs.configure("info", {format!r})
def handle(prompt):
    raise ValueError("wrong")
try:
    handle(chr(113) * 20)
except ValueError:
    logging.getLogger("x").exception("failed")
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert "ValueError" in done.stderr
    assert "handle" in done.stderr
    assert "q" * 20 not in done.stderr

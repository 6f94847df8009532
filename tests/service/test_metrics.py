"""/metrics counts what was served, and adds up all API processes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from service.metrics import Metrics
from service.settings import Settings
from tests.service.inference_helpers import BASE, ROOT, InferenceServer


def test_requests_tokens_and_times_are_counted(server: InferenceServer) -> None:
    before = server.metrics()
    server.openai.completions.create(model=BASE, prompt="Hello there", max_tokens=9, temperature=0)
    list(server.openai.completions.create(model=BASE, prompt="Hello there", max_tokens=9, temperature=0, stream=True))
    server.http.post("/v1/completions", json={"model": "nobody", "prompt": "x"})
    after = server.metrics()

    def grown(name: str) -> float:
        return after[name] - before.get(name, 0.0)

    assert grown('loraplex_requests_total{route="/v1/completions",status="200"}') == 2
    assert grown('loraplex_requests_total{route="/v1/completions",status="404"}') == 1
    assert grown('loraplex_request_seconds_count{route="/v1/completions"}') == 3
    assert grown("loraplex_prompt_tokens_total") == 4
    assert grown("loraplex_generated_tokens_total") == 18
    assert grown("loraplex_time_to_first_token_seconds_count") == 2
    assert grown("loraplex_time_per_output_token_seconds_count") == 2
    assert grown("loraplex_time_to_first_token_seconds_sum") > 0
    assert after["loraplex_requests_in_progress"] == 1  # the scrape itself


def test_the_engines_figures_are_passed_on(server: InferenceServer) -> None:
    metrics = server.metrics()
    assert metrics["loraplex_engine_up"] == 1
    for name in ("sequences_waiting", "kv_pages_used", "kv_pages", "adapters_on_device", "adapter_loads_total"):
        assert f"loraplex_engine_{name}" in metrics
    text = server.http.get("/metrics").text
    assert "# TYPE loraplex_engine_adapter_loads_total counter" in text
    assert "# TYPE loraplex_engine_kv_pages_used gauge" in text


def test_the_documentation_has_every_metric_and_no_other(server: InferenceServer) -> None:
    text = (ROOT / "docs" / "observability.md").read_text()
    documented: set[str] = set()
    for cell in re.findall(r"^\| (`loraplex_[^|]*) \|", text, re.MULTILINE):
        first, *others = re.findall(r"`(\w+)`", cell)
        prefix = "loraplex_engine" if first.startswith("loraplex_engine_") else "loraplex_adapter"
        documented |= {first, *(prefix + other for other in others)}
    shown = set(re.findall(r"^# TYPE (\w+) ", server.http.get("/metrics").text, re.MULTILINE))
    assert documented - {name for name in documented if name.startswith("loraplex_adapter_")} == shown


def test_metrics_of_one_process_need_no_files(tmp_path: Path) -> None:
    metrics = Metrics(Settings.load(data_dir=tmp_path), lambda: {"steps_total": 3.0}, lambda: False)
    metrics.generated_tokens.inc(5)
    metrics.tokens_done(1, 1.0)  # a single token has no time between tokens
    page = metrics.expose()[0].decode()
    assert "loraplex_generated_tokens_total 5.0" in page
    assert "loraplex_engine_steps_total 3.0" in page
    assert "loraplex_engine_up 0.0" in page
    assert "loraplex_time_per_output_token_seconds_count 0.0" in page
    assert not list(tmp_path.iterdir())


WORKER = """
import sys
from service.metrics import Metrics
from service.settings import Settings
metrics = Metrics(Settings.load(data_dir=sys.argv[1], api_workers=2), lambda: {"kv_pages": 7.0}, lambda: True)
metrics.requests.labels("/x", "200").inc()
metrics.generated_tokens.inc(int(sys.argv[2]))
metrics.first_token(0.2)
metrics.in_progress.inc()
print("counted", flush=True)
if sys.stdin.readline() == "show\\n":
    print(metrics.expose()[0].decode(), flush=True)
metrics.close()
"""


def test_several_processes_are_added_up(tmp_path: Path) -> None:
    old = tmp_path / "run" / "metrics" / "4000000"  # of a start whose process is gone
    old.mkdir(parents=True)
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(tmp_path), str(tokens)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for tokens in (3, 4, 5)
    ]
    for worker in workers:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "counted\n"
    # One that starts is just making its file.
    (tmp_path / "run" / "metrics" / str(os.getpid()) / "counter_4000000.db").touch()
    # One ends in order, one is killed: what they counted stays.
    workers[0].communicate("end\n", timeout=30)
    workers[1].kill()
    workers[1].communicate()
    page, _ = workers[2].communicate("show\n", timeout=30)
    assert "loraplex_generated_tokens_total 12.0" in page
    assert 'loraplex_requests_total{route="/x",status="200"} 3.0' in page
    assert "loraplex_time_to_first_token_seconds_count 3.0" in page
    # The engine is one, whoever is asked.
    assert "loraplex_engine_kv_pages 7.0" in page
    assert not old.exists()


def test_two_api_processes_behind_one_port(base_model_dir: Path) -> None:
    server = InferenceServer(base_model_dir, api_workers=2)
    server.environment["WEB_CONCURRENCY"] = "2"  # uvicorn's own
    try:
        server.start()
        for _ in range(12):
            # A connection each, so that both processes get some.
            import httpx

            body = {"model": BASE, "prompt": "Hello", "max_tokens": 3}
            assert httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).status_code == 200
        counted = server.metrics()
        assert counted['loraplex_requests_total{route="/v1/completions",status="200"}'] == 12
        assert counted["loraplex_prompt_tokens_total"] == 12
    finally:
        server.stop()

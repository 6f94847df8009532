"""Figures by adapter and tenant: as many labels as were asked for, counters that never fall, all requests counted."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
from hypothesis import given, settings
from hypothesis import strategies as st

from service.top import ENOUGH, OTHER, TopNames, most_used
from tests.service.inference_helpers import BASE, InferenceServer
from tests.service.launch import SIMULATED, Launched
from tests.service.tenant_helpers import upload

SERIES = re.compile(r'loraplex_(adapter|tenant)_requests_total\{\w+="([^"]*)"\} (\S+)')


def requests(http: httpx.Client, what: str = "adapter") -> dict[str, float]:
    found = SERIES.findall(http.get("/metrics").text)
    return {label: float(value) for kind, label, value in found if kind == what}


def complete(server: InferenceServer, model: str, times: int = 1, **body: Any) -> None:
    for _ in range(times):
        # A connection each: with several API processes all of them get some.
        with httpx.Client(base_url=server.url, timeout=60) as http:
            answer = http.post("/v1/completions", json={"model": model, "prompt": "Hi", "max_tokens": 2} | body)
        assert answer.status_code == 200, answer.text


def test_there_are_none_unless_they_are_asked_for(server: InferenceServer) -> None:
    server.openai.completions.create(model=BASE, prompt="Hi", max_tokens=2)
    text = server.http.get("/metrics").text
    assert "loraplex_adapter_" not in text
    assert "loraplex_tenant_" not in text


def test_the_first_that_are_used_enough_have_labels_the_rest_is_other(base_model_dir: Path, tmp_path: Path) -> None:
    server = InferenceServer(base_model_dir, metrics_top_adapters=2, metrics_top_tenants=1)
    try:
        server.start()
        for seed, name in enumerate(("a", "b", "c")):
            server.upload(name, tmp_path, seed)
        complete(server, "a", ENOUGH + 2)
        complete(server, "b", ENOUGH - 1)
        complete(server, "c", ENOUGH)
        complete(server, "b", ENOUGH)
        complete(server, BASE, 3)
        complete(server, BASE, 1, adapters=[{"name": "a", "weight": 0.5}, {"name": "c", "weight": 0.5}])
        # The mix is a name of its own, for which there was no place left.
        assert requests(server.http) == {BASE: 3, "a": 3, "c": 1, OTHER: 45 - 3 - 3 - 1}
        assert requests(server.http, "tenant") == {OTHER: 9, "default": 45 - 9}
        figures = server.metrics()
        assert figures['loraplex_adapter_generated_tokens_total{adapter="a"}'] == 6
        assert figures['loraplex_adapter_prompt_tokens_total{adapter="a"}'] == 3
        assert figures['loraplex_adapter_time_to_first_token_seconds_count{adapter="a"}'] == 3
        assert figures['loraplex_adapter_time_to_first_token_seconds_sum{adapter="a"}'] > 0
    finally:
        server.stop()


def test_processes_agree_and_a_start_begins_with_the_most_used(
    base_model_dir: Path, tmp_path: Path, free_port: Callable[[], int]
) -> None:
    flags = "--model", str(base_model_dir), "--simulated", SIMULATED, "--served-name", BASE, "--api-workers", "2"

    def use(service: Launched, name: str, times: int) -> None:
        for _ in range(times):  # a connection each, so that both processes get some
            body = {"model": name, "prompt": "Hi", "max_tokens": 2}
            assert httpx.post(f"{service.url}/v1/completions", json=body, timeout=60).status_code == 200

    with Launched(tmp_path, free_port(), *flags) as service:
        service.wait_announced()
        for seed, name in enumerate(("a", "b", "c")):
            assert upload(service.http, name, seed).status_code == 201
        for name, times in (("b", 2), ("c", 5), ("a", 1)):
            use(service, name, times)
        service.process.terminate()
        assert service.process.wait(60) == 0
    with Launched(tmp_path, free_port(), *flags, "--metrics-top-adapters", "2") as service:
        service.wait_announced()
        for name in ("a", "b", "c"):
            use(service, name, ENOUGH + 1)
        assert requests(service.http) == {"b": ENOUGH + 1, "c": ENOUGH + 1, OTHER: ENOUGH + 1}


@settings(max_examples=60, deadline=None)
@given(
    places=st.integers(1, 3),
    uses=st.lists(st.tuples(st.integers(0, 2), st.sampled_from(["a", "b", "c", "d", "other"])), max_size=200),
    seeds=st.lists(st.sampled_from(["a", "b", "c", "d"]), max_size=4),
)
def test_labels_are_few_and_stay(
    tmp_path_factory: Any, places: int, uses: list[tuple[int, str]], seeds: list[str]
) -> None:
    """Of three processes with one file, in any order of use."""
    path = tmp_path_factory.mktemp("top") / "adapters.json"
    processes = [TopNames(places, path) for _ in range(3)]
    for each in processes:
        each.seed(seeds)
    told: Counter[str] = Counter()
    own: dict[tuple[int, str], bool] = {}
    for process, name in uses:
        label = processes[process].label(name)
        assert label in (name, OTHER)
        assert label == name or not own.get((process, name))  # who has a label keeps it
        own[process, name] = label == name != OTHER
        told[label] += 1
    labels = set(told) - {OTHER}
    assert len(labels) <= places
    assert told.total() == len(uses)
    assert set(list(dict.fromkeys(seeds))[:places]) & {name for _, name in uses} <= labels


def test_a_single_process_needs_no_file_and_a_lost_folder_does_not_matter(tmp_path: Path) -> None:
    top = TopNames(1)
    assert [top.label("a") for _ in range(ENOUGH + 1)] == [OTHER] * (ENOUGH - 1) + ["a", "a"]
    assert [top.label("b") for _ in range(ENOUGH + 1)] == [OTHER] * (ENOUGH + 1)
    lost = TopNames(1, tmp_path / "gone" / "adapters.json")
    assert {lost.label("a") for _ in range(3 * ENOUGH)} == {OTHER}


def test_the_most_used_come_first() -> None:
    rows = [{"adapter": name, "requests": count} for name, count in (("a", 1), ("b", 0), ("c", 5), ("d", 1))]
    assert most_used(rows, "adapter", 2) == ["c", "a"]
    assert most_used(rows, "adapter", 9) == ["c", "a", "d"]

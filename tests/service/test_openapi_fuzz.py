"""The whole OpenAPI document against the real application: schemathesis makes requests out of it, examples, corner
cases, random ones and chains of linked ones. No crash, no 5xx (not even 503), nothing that the document does not tell.

FUZZ multiplies the number of examples (`make fuzz`).
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from service.library import FIELDS

from .inference_helpers import ROOT, InferenceServer

pytestmark = pytest.mark.xdist_group("openapi")

EXAMPLES = 20 * int(os.environ.get("FUZZ", "1"))
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
    "unsupported_method",
    "use_after_free",
)


@pytest.fixture(scope="module")
def fuzzed(base_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[InferenceServer]:
    options = {"integrity_interval_s": 0.0}
    server = InferenceServer(base_model_dir, engine_options=options, max_body_bytes="1MiB", max_upload_bytes="32MiB")
    try:
        server.start()
        folder = tmp_path_factory.mktemp("adapters")
        for seed, name in enumerate(("pirate", "headline")):
            server.upload(name, folder, seed)
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="module")
def document(fuzzed: InferenceServer) -> dict[str, Any]:
    found: dict[str, Any] = fuzzed.http.get("/openapi.json").json()
    return found


def operations(document: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    return [(method, path, item[method]) for path, item in document["paths"].items() for method in item]


def test_every_example_is_answered(fuzzed: InferenceServer, document: dict[str, Any]) -> None:
    """What /docs shows works as it stands."""
    tried = 0
    for method, path, operation in operations(document):
        body = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
        parameters = {each["name"]: each.get("example") for each in operation["parameters"] if each["in"] == "path"}
        assert None not in parameters.values(), path
        if "application/json" in operation.get("requestBody", {}).get("content", {}):
            assert body["examples"], path
        for example in body.get("examples", {}).values():
            answer = fuzzed.http.request(method, path.format(**parameters), json=example["value"])
            assert answer.status_code in (200, 201, 202), (path, example, answer.text)
            tried += 1
    assert tried >= 12
    for path in ("/docs", "/redoc"):
        assert fuzzed.http.get(path).status_code == 200


def test_the_document_is_complete(document: dict[str, Any]) -> None:
    errors = {"$ref": "#/components/schemas/Error"}
    names = set()
    for _, path, operation in operations(document):
        names.add(operation["operationId"])
        for status, response in operation["responses"].items():
            if status >= "400" and operation["operationId"] != "ready":
                assert response["content"]["application/json"]["schema"] == errors, (path, status)
        form = operation.get("requestBody", {}).get("content", {}).get("multipart/form-data")
        if form is not None:
            assert form["schema"]["properties"].keys() == FIELDS.keys()
            links = operation["responses"]["201"]["links"].values()
            assert len(links) >= 10
            assert {link["operationId"] for link in links} <= {each["operationId"] for *_, each in operations(document)}
    assert len(names) == len(operations(document))
    assert "HTTPValidationError" not in document["components"]["schemas"]


def test_nothing_crashes(fuzzed: InferenceServer, tmp_path: Path) -> None:
    seed = os.environ.get("FUZZ_SEED", "1")
    run = subprocess.run(
        [
            str(Path(sys.executable).with_name("schemathesis")), "run", f"{fuzzed.url}/openapi.json",
            "--checks", ",".join(CHECKS), "--max-examples", str(EXAMPLES), "--seed", seed,
            "--generation-database", "none", "--continue-on-failure", "--no-color", "--warnings", "off",
        ],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "SCHEMATHESIS_HOOKS": "tests.service.openapi_hooks"},
        capture_output=True,
        text=True,
        timeout=280 * (EXAMPLES // 20),
        check=False,
    )  # fmt: skip
    report = run.stdout[-6000:] + run.stderr[-2000:]
    assert run.returncode == 0, report
    counted = re.search(r"(\d+) generated, (\d+) passed", run.stdout)
    linked = re.search(r"API Links:\s+(\d+) covered", run.stdout)
    assert counted is not None, report
    assert linked is not None, report
    print(f"schemathesis: {counted[0]}, {linked[1]} links followed, seed {seed}")
    assert int(counted[1]) == int(counted[2]) >= 1000
    assert int(linked[1]) >= 3

    answered = {key: value for key, value in fuzzed.metrics().items() if key.startswith("loraplex_requests_total")}
    print("statuses:", _by_status(answered))
    assert not [key for key in answered if re.search(r'status="5\d\d"', key)]
    log = fuzzed.log_path.read_text().splitlines()
    assert not [line for line in log if '"level": "error"' in line or not line.startswith("{")]

    fuzzed.wait_until_idle()
    checks = fuzzed.metrics()["loraplex_engine_integrity_checks_total"]
    assert fuzzed.http.post("/v1/adapters/headline/load?wait=true").status_code == 200
    fuzzed.wait_for_engine("integrity_checks_total", checks + 1)
    assert fuzzed.engine is not None
    assert fuzzed.engine.poll() is None


def _by_status(answered: dict[str, float]) -> dict[str, int]:
    """Requests by status."""
    counts: dict[str, int] = {}
    for key, value in answered.items():
        status = key.split('status="')[1][:3]
        counts[status] = counts.get(status, 0) + int(value)
    return dict(sorted(counts.items()))

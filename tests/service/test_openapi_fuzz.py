"""The whole OpenAPI document against the real application: schemathesis makes requests out of it, examples, corner
cases, random ones and chains of linked ones. No crash, no 5xx (not even 503), nothing that the document does not tell.

FUZZ multiplies the number of examples (`make fuzz`; tests/service/fuzzing.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from service.library import FIELDS

from .fuzzing import EXAMPLES, PHASES, fuzz, no_server_errors
from .inference_helpers import InferenceServer
from .tenant_helpers import ADMIN, TenantServer, upload

pytestmark = pytest.mark.xdist_group("openapi")


@pytest.fixture(scope="module")
def fuzzed(base_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[InferenceServer]:
    server = InferenceServer(base_model_dir, max_body_bytes="1MiB", max_upload_bytes="32MiB")
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
    requests, links = fuzz(f"{fuzzed.url}/openapi.json", fuzzed.url, tmp_path, EXAMPLES)
    assert requests >= 1000
    assert links >= 3
    no_server_errors(fuzzed)

    fuzzed.wait_until_idle()
    checks = fuzzed.metrics()["loraplex_engine_integrity_checks_total"]
    assert fuzzed.http.post("/v1/adapters/headline/load?wait=true").status_code == 200
    fuzzed.wait_for_engine("integrity_checks_total", checks + 1)
    assert fuzzed.engine is not None
    assert fuzzed.engine.poll() is None


def test_nothing_crashes_with_keys(base_model_dir: Path, tmp_path: Path) -> None:
    """A server with tenants, first with a tenant's key, then with the admin key: few requests each in the suite, where
    the phase that has most of them (every boundary of every field) is left to `make fuzz`."""
    phases = "examples,fuzzing,stateful" if EXAMPLES == 20 else PHASES
    # To the admin an unknown ?tenant is 404 before it matters that there is no such method.
    but = ("unsupported_method",)
    server = TenantServer(base_model_dir, max_body_bytes="1MiB", max_upload_bytes="32MiB")
    try:
        server.start()
        document = tmp_path / "openapi.json"
        document.write_bytes(server.http.get("/openapi.json").content)
        operation_count = len(operations(server.http.get("/openapi.json").json()))
        server.tenant("acme")
        with server.member() as (_, client):
            for seed, name in enumerate(("pirate", "headline")):
                assert upload(client, name, seed).status_code == 201
            key = client.headers["authorization"].removeprefix("Bearer ")
            for each in (key, ADMIN):
                found, links = fuzz(
                    str(document), server.url, tmp_path, EXAMPLES // 4, key=each, but=but, phases=phases
                )
                assert found >= 3 * operation_count
                # A quarter of the examples follow fewer links than above; none would be a phase that does nothing.
                assert links >= (1 if EXAMPLES == 20 else 3)
            assert server.http.get("/v1/models").status_code == 200
        no_server_errors(server)
        server.wait_until_idle()
    finally:
        server.stop()

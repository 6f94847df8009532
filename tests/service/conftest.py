"""Servers that several modules use; one of each per pytest process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.service.inference_helpers import InferenceServer
from tests.service.tenant_helpers import TenantServer


@pytest.fixture(scope="session")
def server(base_model_dir: Path) -> Iterator[InferenceServer]:
    """The application with a simulated engine whose steps take 1 ms."""
    server = InferenceServer(base_model_dir, engine_options={"step_s": 0.001}, max_queue=64)
    try:
        yield server.start()
    finally:
        server.stop()


@pytest.fixture(scope="session")
def slow(base_model_dir: Path) -> Iterator[InferenceServer]:
    """One whose steps take 20 ms: 500 tokens take it 10 s, and its heartbeats tell what runs."""
    server = InferenceServer(base_model_dir, engine_options={"step_s": 0.02}, max_sequences=8)
    try:
        yield server.start()
    finally:
        server.stop()


@pytest.fixture(scope="session")
def adapters(server: InferenceServer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Digest by name of the adapters `first` (versions 1 and 2, alias `old` for 1) and `second` (version 1)."""
    folder = tmp_path_factory.mktemp("uploads")
    digests = {
        "first@1": server.upload("first", folder, 1),
        "first@2": server.upload("first", folder, 2),
        "second@1": server.upload("second", folder, 3),
    }
    assert server.http.put("/v1/adapters/first/aliases/old", json={"version": 1}).status_code in (200, 201)
    return digests


@pytest.fixture(scope="session")
def tenants(base_model_dir: Path) -> Iterator[TenantServer]:
    """The application with an admin key."""
    server = TenantServer(base_model_dir)
    try:
        server.start()
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="session")
def slow_tenants(base_model_dir: Path) -> Iterator[TenantServer]:
    """The same with an engine whose steps take 20 ms."""
    server = TenantServer(base_model_dir, engine_options={"step_s": 0.02})
    try:
        server.start()
        yield server
    finally:
        server.stop()

"""A server with tenants, over HTTP: the admin's client, tenants and keys, and clients that use them."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from safetensors.numpy import save

from .inference_helpers import ROOT, InferenceServer
from .launch import PLAIN

ADMIN = "the-admin-key-of-these-tests"


def wait_for(condition: Callable[[], object], seconds: float = 60.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            raise TimeoutError(f"not within {seconds:g} s")
        time.sleep(0.05)


class TenantServer(InferenceServer):
    """`http` is the admin's client, `bare` one without a key."""

    def __init__(self, model: Path, **settings: Any) -> None:
        super().__init__(model, admin_key=ADMIN, **settings)
        self.http.headers["Authorization"] = f"Bearer {ADMIN}"
        self.bare = httpx.Client(base_url=self.url, timeout=60, **PLAIN)

    def stop(self) -> int:
        self.bare.close()
        return super().stop()

    def tenant(self, name: str | None = None, **fields: Any) -> str:
        """A new tenant; its id."""
        given = name or f"t-{uuid.uuid4().hex[:10]}"
        answer = self.http.post("/v1/tenants", json={"name": given, **fields})
        assert answer.status_code == 201, answer.text
        return given

    def key(self, tenant: str, *scopes: str, **fields: Any) -> str:
        """A new key with these scopes; none: with all."""
        body = {"scopes": list(scopes or ("infer", "upload", "manage")), **fields}
        answer = self.http.post(f"/v1/tenants/{tenant}/keys", json=body)
        assert answer.status_code == 201, answer.text
        text: str = answer.json()["key"]
        return text

    def client(self, key: str, url: str | None = None) -> httpx.Client:
        headers = {"Authorization": f"Bearer {key}"}
        return httpx.Client(base_url=url or self.url, headers=headers, timeout=60, **PLAIN)

    @contextlib.contextmanager
    def member(self, **fields: Any) -> Iterator[tuple[str, httpx.Client]]:
        """A new tenant with a client of its own that may do everything."""
        tenant = self.tenant(**fields)
        with self.client(self.key(tenant)) as client:
            yield tenant, client

    @contextlib.contextmanager
    def another_process(self) -> Iterator[str]:
        """The address of one more API process of this service."""
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            listener.listen(128)
            port = listener.getsockname()[1]
            command = [sys.executable, "-m", "service.api_worker", str(listener.fileno())]
            process = subprocess.Popen(
                command, cwd=ROOT, env=self.environment, stderr=subprocess.DEVNULL, pass_fds=[listener.fileno()]
            )
        url = f"http://127.0.0.1:{port}"
        try:
            wait_for(lambda: process.poll() is not None or _ready(url))
            assert process.poll() is None
            yield url
        finally:
            process.terminate()
            process.wait(30)


def _ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/ready", timeout=60, **PLAIN).status_code == 200
    except httpx.TransportError:
        return False


def key_id(key: str) -> str:
    return key.split("_")[1]


def adapter_files(seed: int, rank: int = 4) -> dict[str, tuple[str, bytes]]:
    """The `files` of an upload: a small adapter for the simulated base."""
    generator = np.random.default_rng(seed)
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors = {
        f"{module}.lora_A.weight": generator.standard_normal((rank, 16)).astype(np.float32),
        f"{module}.lora_B.weight": generator.standard_normal((16, rank)).astype(np.float32),
    }
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 8, "target_modules": ["q_proj"]}
    return {
        "config": ("adapter_config.json", json.dumps(config).encode()),
        "weights": ("adapter_model.safetensors", save(tensors)),
    }


def upload(client: httpx.Client, name: str, seed: int, rank: int = 4, **query: str) -> httpx.Response:
    return client.put(f"/v1/adapters/{name}", files=adapter_files(seed, rank), params=query)


def complete(client: httpx.Client, model: str, **fields: Any) -> httpx.Response:
    body = {"model": model, "prompt": "one two", "max_tokens": 3, "temperature": 0, **fields}
    return client.post("/v1/completions", json=body)


def environment_without_settings() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if not key.startswith("LORAPLEX_")}

"""The real application under uvicorn beside a simulated engine process, driven over HTTP."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import msgspec
import numpy as np
import openai
from safetensors.numpy import save_file

from service.engine.messages import AdapterRef, SamplingParams
from service.engine.simulated import expected
from service.settings import Settings
from service.tokenizer import Tokenizer
from tests.ports import unused_port
from tests.service.launch import PLAIN
from tests.soundness import check_engine, checking

ROOT = Path(__file__).resolve().parents[2]
VOCABULARY = 49152  # SmolLM2's
BASE = "base-model"


class InferenceServer:
    """One API process and its engine. `engine_options`: simulated.Options; `settings`: service.settings."""

    def __init__(self, model: Path, *, engine_options: dict[str, Any] | None = None, **settings: Any) -> None:
        # A socket's path must be short; pytest's folders are not.
        self._folder = tempfile.TemporaryDirectory(prefix="lp-")
        port = unused_port()
        defaults = {"max_positions": 512, "device": "cpu", "log_format": "json", "served_name": BASE}
        self.settings = Settings.load(**(defaults | settings), data_dir=self._folder.name, model=str(model), port=port)
        self.settings.run_dir.mkdir()
        self.tokenizer = Tokenizer.load(model)
        self.url = f"http://127.0.0.1:{port}"
        self.http = httpx.Client(base_url=self.url, timeout=60, **PLAIN)
        self.openai = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)
        self._engine_options = {"vocab_size": VOCABULARY} | (engine_options or {})
        self.environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        self.environment |= self.settings.environment()
        self.log_path = Path(self._folder.name) / "api.log"
        self.engine: subprocess.Popen[bytes] | None = None
        self.api: subprocess.Popen[bytes] | None = None

    def start(self, *, engine: bool = True) -> InferenceServer:
        if engine:
            self.start_engine()
        with socket.socket() as listener, self.log_path.open("wb") as log:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(("127.0.0.1", self.settings.port))
            listener.listen(2048)
            fd = listener.fileno()
            command = [sys.executable, "-m", "service.api_worker", str(fd)]
            self.api = subprocess.Popen(command, cwd=ROOT, env=self.environment, stderr=log, pass_fds=[fd])
        self.wait_for("/ready" if engine else "/health")
        if engine:
            self.wait_for_engine("kv_pages", 1)  # its figures come with its first heartbeat
        return self

    def start_engine(self) -> None:
        config = msgspec.json.encode(checking(self.settings.engine_config(self.settings.model))).decode()
        command = [sys.executable, "-m", "service.engine.process", config, "--simulated"]
        self.engine = subprocess.Popen(
            [*command, json.dumps(self._engine_options)], cwd=ROOT, env=self.environment, stderr=subprocess.DEVNULL
        )

    def kill_engine(self) -> None:
        if self.engine is not None:
            assert self.engine.poll() != 1, "the engine has ended: it was broken, or found itself unsound"
            self.engine.kill()
            self.engine.wait()
            self.engine = None

    def wait_for(self, path: str, status: int = 200, seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            try:
                if self.http.get(path).status_code == status:
                    return
            except httpx.TransportError:
                pass
            if self.api is not None and self.api.poll() is not None:
                raise RuntimeError(f"the API process ended: {self.log_path.read_text()}")
            time.sleep(0.05)
        raise RuntimeError(f"{path} did not answer {status}: {self.log_path.read_text()}")

    def wait_until_idle(self, seconds: float = 20) -> None:
        """Until the engine has no sequence and holds no adapter."""
        deadline = time.monotonic() + seconds
        stats: dict[str, float] = {}
        while time.monotonic() < deadline:
            stats = self.metrics()
            if all(stats[f"loraplex_engine_{name}"] == 0 for name in _BUSY):
                return
            time.sleep(0.1)
        raise AssertionError({name: stats[f"loraplex_engine_{name}"] for name in _BUSY})

    def wait_for_engine(self, name: str, least: float, seconds: float = 20) -> None:
        """Until the engine's heartbeat says that `name` is at least so much."""
        deadline = time.monotonic() + seconds
        while self.metrics().get(f"loraplex_engine_{name}", -1) < least:
            if time.monotonic() > deadline:
                raise AssertionError(f"{name} did not reach {least}")
            time.sleep(0.05)

    def metrics(self) -> dict[str, float]:
        lines = self.http.get("/metrics").text.splitlines()
        return {key: float(value) for key, _, value in (line.rpartition(" ") for line in lines if line[:1] != "#")}

    def stop(self) -> int:
        """SIGTERM; the API's exit code (uvicorn's: minus the signal)."""
        code = 0
        if self.api is not None:
            self.api.send_signal(signal.SIGTERM)
            try:
                code = self.api.wait(30)
            finally:
                self.api.kill()
                self.api.wait()
        try:
            if self.engine is not None and self.engine.poll() is None:
                check_engine(self.settings.engine_socket)
        finally:
            self._clean_up()
        return code

    def _clean_up(self) -> None:
        self.kill_engine()
        self.http.close()
        self.openai.close()
        self._folder.cleanup()

    # ------------------------------------------------------------ what it should answer

    def expected_ids(self, prompt: list[int] | str, count: int, adapters: dict[str, float] | None = None) -> list[int]:
        """Greedy tokens of the simulated engine."""
        ids = self.tokenizer.encode_now([prompt])[0] if isinstance(prompt, str) else prompt
        sampling = SamplingParams(temperature=0.0, max_tokens=count, stop_token_ids=self.tokenizer.eos_token_ids)
        refs = [AdapterRef(digest, weight) for digest, weight in (adapters or {}).items()]
        return expected(ids, sampling, refs, vocab_size=VOCABULARY)

    def expected_text(self, prompt: list[int] | str, count: int, adapters: dict[str, float] | None = None) -> str:
        return self.tokenizer.decode(self.expected_ids(prompt, count, adapters))

    def upload(self, name: str, folder: Path, seed: int) -> str:
        """A small adapter for the simulated base; its digest."""
        rng = np.random.default_rng(seed)
        module = "base_model.model.model.layers.0.self_attn.q_proj"
        tensors = {
            f"{module}.lora_A.weight": rng.standard_normal((4, 16)).astype(np.float32),
            f"{module}.lora_B.weight": rng.standard_normal((16, 4)).astype(np.float32),
        }
        path = folder / f"{name}-{seed}.safetensors"
        save_file(tensors, path)
        config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
        files = {
            "config": ("adapter_config.json", json.dumps(config).encode()),
            "weights": ("adapter_model.safetensors", path.read_bytes()),
        }
        answer = self.http.put(f"/v1/adapters/{name}", files=files)
        assert answer.status_code in (200, 201), answer.text
        version = answer.json()["version"]
        digest: str = self.http.get(f"/v1/adapters/{name}/versions/{version}").json()["spec"]["sha256"]
        return digest


_BUSY = ("sequences_running", "sequences_waiting", "sequences_fetching", "kv_pages_used", "adapter_leases")


def events(body: str) -> list[str]:
    """The data of each server-sent event."""
    return [line.removeprefix("data: ") for line in body.splitlines() if line.startswith("data: ")]

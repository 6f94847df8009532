"""A real server over HTTP with a simulated engine, and real PEFT adapters for its base."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import httpx
import msgspec
import numpy as np
import tokenizers
from safetensors.numpy import load_file, save_file

from service.settings import Settings
from tests.service.launch import PLAIN
from tests.soundness import check_engine, checking

ROOT = Path(__file__).resolve().parents[2]
BASE = "base-model"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


class Engine:
    """A simulated engine process for the service that has this data folder."""

    def __init__(self, data: Path, **options: Any) -> None:
        settings = Settings.load(data_dir=data)
        config = checking(settings.engine_config(""))
        self._socket = config.socket
        Path(config.socket.removeprefix("ipc://")).parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        command = [sys.executable, "-m", "service.engine.process", msgspec.json.encode(config).decode()]
        self._process = subprocess.Popen(
            [*command, "--simulated", json.dumps(options)], cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.DEVNULL
        )

    def stop(self) -> None:
        """Raises AssertionError if it is not sound."""
        try:
            if self._process.poll() is None:
                check_engine(self._socket)
            assert self._process.poll() != 1, "the engine has ended: it was broken, or found itself unsound"
        finally:
            self._process.kill()
            self._process.wait()


class Server:
    """The API process; `start` again after `kill` uses the same data folder and port. `options`: settings."""

    def __init__(self, data: Path, port: int, *, manifest: Path | None = None, **options: Any) -> None:
        self.data = data
        self._options: dict[str, Any] = {
            "settings": {
                "model": str(make_tokenizer(data.parent / "base-model")),
                "served_name": BASE,
                "data_dir": str(data),
                "port": port,
                "log_level": "warning",
                **options,
            }
        }
        if manifest is not None:
            self._options["manifest"] = str(manifest)
        self.url = f"http://127.0.0.1:{port}"
        self.client = httpx.Client(base_url=self.url, timeout=60, **PLAIN)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        if self._process is None:
            raise RuntimeError("not started")
        return self._process.pid

    def start(self, *, ready: bool = True) -> Server:
        command = [sys.executable, "-m", "tests.service.adapter_server", json.dumps(self._options)]
        self._process = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise RuntimeError(f"the server ended with {self._process.returncode}")
            try:
                if self.client.get("/probe").json()["ready"] or not ready:
                    return self
            except httpx.TransportError:
                pass
            time.sleep(0.05)
        raise RuntimeError("the server did not start")

    def kill(self) -> None:
        """SIGKILL, as a power cut would."""
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()
            self._process = None

    def stop(self) -> int:
        """SIGTERM; the exit code."""
        if self._process is None:
            return 0
        self._process.send_signal(signal.SIGTERM)
        code = self._process.wait(30)
        self._process = None
        return code

    def close(self) -> None:
        self.kill()
        self.client.close()

    def spooled(self) -> list[str]:
        """Every file and folder of uploads in progress."""
        spool = self.data / "uploads"
        return sorted(
            str(path.relative_to(spool)) for path in spool.rglob("*") if path.name != "lock" and path.parent != spool
        )

    def blobs(self) -> dict[str, int]:
        """Every stored blob with its size."""
        return {path.name: path.stat().st_size for path in (self.data / "blobs").rglob("*") if len(path.name) == 64}


def make_tokenizer(folder: Path) -> Path:
    """What the API process reads of a base model: here a tokenizer of a few words."""
    if not folder.exists():
        folder.mkdir(parents=True)
        words = {word: number for number, word in enumerate(["<unk>", "one", "two", "three"])}
        tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
        tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def make_peft_adapter(folder: Path, *, rank: int = 4, seed: int = 0, targets: tuple[str, ...] = ("q_proj",)) -> Path:
    """An adapter that PEFT itself writes, for the base that the simulated engine says it has."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(targets), init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's and transformers' business
        get_peft_model(LlamaForCausalLM(config), lora).save_pretrained(folder)
    return folder


def vary(source: Path, folder: Path, seed: int) -> Path:
    """Another adapter of the same shapes, made without PEFT, which takes seconds to import."""
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_bytes((source / "adapter_config.json").read_bytes())
    tensors = load_file(source / "adapter_model.safetensors")
    generator = np.random.default_rng(seed)
    changed = {key: generator.standard_normal(value.shape).astype(value.dtype) for key, value in tensors.items()}
    save_file(changed, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


def files_of(folder: Path) -> list[tuple[str, tuple[str, bytes]]]:
    """The `files` of an upload with httpx."""
    return [
        ("config", ("adapter_config.json", (folder / "adapter_config.json").read_bytes())),
        ("weights", ("adapter_model.safetensors", (folder / "adapter_model.safetensors").read_bytes())),
    ]

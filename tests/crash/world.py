"""A service that can be killed in every way: a base model of a thousand words, adapters for it, processes by kind."""

from __future__ import annotations

import contextlib
import hashlib
import json
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
import psutil
import tokenizers
from safetensors.numpy import save

from adapters.blobs import AdapterRecord
from adapters.peft_config import CONFIG_NAME
from service.engine.messages import AdapterRef, SamplingParams
from service.engine.simulated import expected
from service.tokenizer import Tokenizer
from tests.real_parts import bucket_names
from tests.service.launch import PLAIN, UNSOUND, Launched, wait_for

WORDS = 1000
BASE = "base"
WEIGHTS = "adapter_model.safetensors"
ENGINE, API, MERGER = "service.engine.process", "service.api_worker", "service.merger"


def make_base(folder: Path) -> Path:
    """A base model as far as anything but the (simulated) engine reads it."""
    folder.mkdir(parents=True)
    words = {f"w{number}": number for number in range(WORDS)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps({"architectures": ["Simulated"], "model_type": "simulated"}))
    (folder / "model.safetensors").write_bytes(b"")
    return folder


@dataclass(frozen=True)
class Content:
    """The two files of an adapter, and the digest that the engine knows them by."""

    config: bytes
    weights: bytes
    digest: str

    @classmethod
    def make(cls, seed: int, rank: int) -> Content:
        rng = np.random.default_rng(seed)
        module = "base_model.model.model.layers.0.self_attn.q_proj"
        weights = save(
            {
                f"{module}.lora_A.weight": rng.standard_normal((rank, 16)).astype(np.float32),
                f"{module}.lora_B.weight": rng.standard_normal((16, rank)).astype(np.float32),
            }
        )
        config = json.dumps({"peft_type": "LORA", "r": rank, "lora_alpha": 8, "target_modules": ["q_proj"]}).encode()
        files = ((CONFIG_NAME, _sha256(config), len(config)), (WEIGHTS, _sha256(weights), len(weights)))
        return cls(config, weights, AdapterRecord(files).digest)

    @property
    def files(self) -> dict[str, bytes]:
        return {CONFIG_NAME: self.config, WEIGHTS: self.weights}

    @property
    def blobs(self) -> set[str]:
        """Every blob that it needs: its files and their record."""
        return {self.digest, *map(_sha256, self.files.values())}

    @property
    def form(self) -> list[tuple[str, tuple[str, bytes]]]:
        """The `files` of an upload with httpx."""
        return [("config", (CONFIG_NAME, self.config)), ("weights", (WEIGHTS, self.weights))]


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class World:
    """The data folder of one service, and the service while it runs. `database`, `blobs_url`: where its state lies, if
    not there."""

    def __init__(
        self,
        folder: Path,
        port: int,
        *flags: str,
        api_workers: int = 1,
        engine: str = "{}",
        database: str = "",
        blobs_url: str = "",
    ) -> None:
        self._env = {"LORAPLEX_DATABASE_URL": database, "LORAPLEX_BLOBS_URL": blobs_url}
        self._blobs_url = blobs_url
        self.folder = folder
        self.data = folder / "data"
        self.data.mkdir(parents=True, exist_ok=True)
        self.base = folder / BASE if (folder / BASE).exists() else make_base(folder / BASE)
        self.tokenizer = Tokenizer.load(self.base)
        self.port = port
        self.api_workers = api_workers
        self._flags = (
            "--simulated", engine, "--model", str(self.base), "--api-workers", str(api_workers), "--max-queue", "64",
            "--log-level", "warning", *flags,
        )  # fmt: skip
        self.service: Launched | None = None
        self.logs: list[str] = []

    @property
    def running(self) -> Launched:
        if self.service is None:
            raise RuntimeError("the service does not run")
        return self.service

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self, prefix: Sequence[str] = (), **env: str) -> None:
        self.service = Launched(self.data, self.port, *self._flags, prefix=prefix, **self._env, **env)
        wait_for(self.ready, 120)
        self.running.family()

    def ready(self) -> bool:
        """Every process of the service is there and can serve."""
        service = self.running
        if service.process.poll() is not None:
            raise RuntimeError(f"the service ended by itself:\n{service.log.read_text()}")
        try:
            if httpx.get(f"{self.url}/ready", timeout=10, **PLAIN).status_code != 200:
                return False
        except httpx.TransportError:
            return False
        # An engine that was killed just now may count as ready for a moment yet.
        return len(self.pids(API)) == self.api_workers and bool(self.pids(ENGINE))

    def pids(self, module: str) -> list[int]:
        return [process.pid for process in self.running.children(module)]

    def workers(self) -> Iterator[psutil.Process]:
        """The processes that inspect uploads: children of API processes."""
        for api in self.running.children(API):
            with contextlib.suppress(psutil.NoSuchProcess):  # zombies included
                for child in api.children():
                    if "spawn_main" in " ".join(child.cmdline()):
                        yield child

    def kill_everything(self) -> None:
        """As a power cut would, as far as processes go: SIGKILL for the supervisor; the kernel then kills the rest."""
        service = self.running
        service.family()
        service.process.kill()
        service.process.wait()
        wait_for(lambda: not service.survivors(), 30)
        self._ended()

    def stop(self) -> int:
        """SIGTERM; the exit code."""
        service = self.running
        service.check()
        service.process.terminate()
        code = service.process.wait(60)
        wait_for(lambda: not service.survivors(), 60)
        self._ended()
        return code

    def close(self) -> None:
        if self.service is not None:
            self.service.__exit__(None, None, None)
            self._ended()

    def _ended(self) -> None:
        self.running.http.close()
        self.logs.append(self.running.log.read_text())
        assert UNSOUND not in self.logs[-1]
        self.service = None

    # ------------------------------------------------------------ what lies on the disk

    def blobs(self) -> set[str]:
        if self._blobs_url:
            return bucket_names(self._blobs_url)
        return {path.name for path in (self.data / "blobs").glob("??/*")}

    def leftovers(self) -> list[Path]:
        """What is left of uploads and writes that did not end."""
        spool = [path for path in (self.data / "uploads").glob("*/*") if path.name != "lock"]
        stores = (self.data / "blobs", self.data / "cache" / "blobs")
        return [*spool, *(path for store in stores for path in store.glob("tmp/*"))]

    def spools(self) -> list[Path]:
        """Folders that uploads are received in: one for each API process and the merger, none of those that died."""
        return [path for path in (self.data / "uploads").iterdir() if path.is_dir()]

    def answer(self, prompt: list[int], count: int, digest: str | None) -> str:
        """What the service has to answer with temperature 0."""
        refs = [AdapterRef(digest)] if digest is not None else []
        sampling = SamplingParams(temperature=0.0, max_tokens=count)
        return self.tokenizer.decode(expected(prompt, sampling, refs, vocab_size=WORDS))


def send(process: psutil.Process, number: signal.Signals) -> bool:
    """False if it has gone already."""
    try:
        process.send_signal(number)
    except psutil.NoSuchProcess:
        return False
    return True

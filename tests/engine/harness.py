"""The real engine inside the test's own process: same parts as the engine process, without sockets."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adapters.blobs import BlobStore
from adapters.inspection import inspect_upload
from adapters.manifest import Manifest
from service.engine.build import build_engine
from service.engine.config import EngineConfig
from service.engine.messages import (
    AdapterRef,
    FromEngine,
    LoadAdapter,
    Outputs,
    Refused,
    Reply,
    SamplingParams,
    Submit,
    TokenLogprob,
    UnloadAdapter,
)

CLIENT = b"test"


@dataclass
class Stream:
    """What came back for one sequence."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=list)
    finish_reason: str | None = None
    cached_tokens: int = 0


class Harness:
    """`ask` queues requests, `run` steps the engine until all are answered and checks its integrity after each step."""

    def __init__(self, base: Path, folder: Path, adapters: dict[str, Path] | None = None, **config: Any) -> None:
        self.store = BlobStore(folder / "blobs")
        self.streams: dict[tuple[str, int], Stream] = {}
        self.refused: dict[str, Refused] = {}
        self.replies: dict[str, Reply] = {}
        self.max_running = 0
        options: dict[str, Any] = {"kv_pages": 256, "arena_bytes": 8 << 20, "max_sequences": 64}
        if config.get("device", "cpu") != "cpu":  # else 8 GiB of pinned memory in each of several test processes
            options["host_cache_bytes"] = 256 << 20
        options |= config
        self.config = EngineConfig(
            model_path=str(base),
            blobs_dir=str(folder / "blobs"),
            cache_dir=str(folder / "cache"),
            socket="",
            **options,
        )
        self.engine, _ = build_engine(self.config, self._receive)
        self.digests = {name: self.upload(path) for name, path in (adapters or {}).items()}

    @property
    def manifest(self) -> Manifest:
        return self.engine.manifest

    def upload(self, folder: Path) -> str:
        """Validates and stores a PEFT folder as the service does; the version's digest."""
        weights = {path.name: path for path in sorted(folder.glob("*.safetensors"))}
        index = next(folder.glob("*.index.json"), None)
        found = inspect_upload(folder / "adapter_config.json", weights, index, self.manifest)
        for path in [folder / "adapter_config.json", *weights.values(), *([index] if index else [])]:
            self.store.put(path, hashlib.sha256(path.read_bytes()).hexdigest())
        self.store.put_bytes(found.record.to_json())
        return found.record.digest

    def ask(
        self,
        name: str,
        prompt: list[int],
        mix: Iterable[tuple[str, float]] = (),
        *,
        n: int = 1,
        salt: str = "",
        **sampling: Any,
    ) -> None:
        params = SamplingParams(**({"temperature": 0.0, "max_tokens": 8} | sampling))
        refs = tuple(AdapterRef(self.digests[adapter], weight) for adapter, weight in mix)
        for index in range(n):
            self.streams[name, index] = Stream()
        self.engine.handle(
            CLIENT, Submit(request_id=name, prompts=[prompt], n=n, adapters=refs, sampling=params, salt=salt)
        )

    def run(self, seconds: float = 120.0) -> None:
        """Until nothing is left to do."""
        until = time.monotonic() + seconds
        while self.engine.busy or self.engine.expecting:
            if not self.engine.step():
                time.sleep(0.002)
            self.max_running = max(self.max_running, len(self.engine.scheduler.running))
            self.engine.check_integrity()
            if time.monotonic() > until:
                raise TimeoutError(f"the engine did not finish in {seconds} s: {self.engine.stats()}")
        self.engine.step()
        self.engine.check_integrity()

    def answer(self, name: str, prompt: list[int], mix: Iterable[tuple[str, float]] = (), **options: Any) -> Stream:
        """One request alone."""
        self.ask(name, prompt, mix, **options)
        self.run()
        return self.streams[name, 0]

    def load(self, name: str) -> Reply:
        return self._call(LoadAdapter(f"load-{name}", self.digests[name]))

    def unload(self, name: str, *, forget: bool = False) -> Reply:
        return self._call(UnloadAdapter(f"unload-{name}", self.digests[name], forget))

    def _call(self, message: LoadAdapter | UnloadAdapter) -> Reply:
        self.engine.handle(CLIENT, message)
        until = time.monotonic() + 60.0
        while message.call_id not in self.replies:
            self.run()
            if time.monotonic() > until:
                raise TimeoutError(f"{message} was not answered")
            time.sleep(0.002)
        return self.replies.pop(message.call_id)

    def stats(self) -> dict[str, float]:
        return self.engine.stats()

    def close(self) -> None:
        self.engine.close()

    def _receive(self, client: bytes, message: FromEngine) -> None:
        if client != CLIENT:
            raise ValueError(f"a message for {client!r}")
        if isinstance(message, Outputs):
            for delta in message.deltas:
                stream = self.streams[delta.request_id, delta.index]
                stream.tokens += delta.token_ids
                stream.logprobs += delta.logprobs or []
                stream.prompt_logprobs += delta.prompt_logprobs or []
                stream.finish_reason = delta.finish_reason
                stream.cached_tokens += delta.cached_tokens
        elif isinstance(message, Refused):
            self.refused[message.request_id] = message
        elif isinstance(message, Reply):
            self.replies[message.call_id] = message

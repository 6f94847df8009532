"""An adapter of 1 GB is uploaded: the API process stays small, and hashing and scanning happen in the worker."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import msgspec
import psutil
import pytest

from adapters.manifest import Manifest, Module

from .adapter_helpers import Engine, Server
from .hostile import entry, safetensors

RANK = 512
FEATURES = 16384
MODULES = 16
PIECE = bytes(1 << 20)
LIMIT = 250 << 20
CONFIG = {"peft_type": "LORA", "r": RANK, "lora_alpha": 16, "target_modules": "all-linear"}
BASE = Manifest(
    fingerprint="wide",
    architecture="Wide",
    model_type="wide",
    dtype="float32",
    vocab_size=8,
    max_positions=8,
    modules=tuple(Module(f"model.layers.{i}.wide_proj", "linear", FEATURES, FEATURES) for i in range(MODULES)),
)


class Sampler:
    """Anonymous memory (RssAnon) of a process: the highest of many samples, in bytes. `with` starts and ends it."""

    def __init__(self, pid: int) -> None:
        self.peak = 0
        self._status = Path(f"/proc/{pid}/status")
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Sampler:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _run(self) -> None:
        while True:
            line = next(line for line in self._status.read_text().splitlines() if line.startswith("RssAnon"))
            self.peak = max(self.peak, 1024 * int(line.split()[1]))
            if self._end.wait(0.01):
                return


def body() -> tuple[int, Callable[[], Iterator[bytes]]]:
    """(length, generator) of a multipart body: weights of zeros that are nowhere whole, neither here nor on a disk."""
    header, position = {}, 0
    for module in BASE.linears:
        for side, shape in (("A", [RANK, FEATURES]), ("B", [FEATURES, RANK])):
            end = position + 4 * RANK * FEATURES
            header[f"base_model.model.{module.name}.lora_{side}.weight"] = entry(position, end, shape)
            position = end
    parts = [
        b'--xx\r\nContent-Disposition: form-data; name="name"\r\n\r\nhuge\r\n',
        b'--xx\r\nContent-Disposition: form-data; name="config"; filename="c"\r\n\r\n',
        json.dumps(CONFIG).encode(),
        b'\r\n--xx\r\nContent-Disposition: form-data; name="weights"; filename="w"\r\n\r\n',
        safetensors(header, b""),
    ]
    tail = b"\r\n--xx--\r\n"

    def pieces() -> Iterator[bytes]:
        yield b"".join(parts)
        for _ in range(position // len(PIECE)):
            yield PIECE
        yield tail

    return sum(map(len, parts)) + position + len(tail), pieces


@pytest.fixture(params=["local", "s3"])
def wide(
    request: pytest.FixtureRequest, tmp_path: Path, base_model_dir: Path, free_port: Callable[[], int]
) -> Iterator[Server]:
    data = tmp_path / "data"
    manifest = tmp_path / "manifest.json"
    manifest.write_bytes(msgspec.json.encode(BASE))
    engine = Engine(data)
    store = {"blobs_url": request.getfixturevalue("s3").create()} if request.param == "s3" else {}
    server = Server(data, free_port(), manifest=manifest, model=str(base_model_dir), **store)
    try:
        yield server.start()
    finally:
        server.close()
        engine.stop()
        for blob in data.rglob("*"):
            if blob.is_file() and len(blob.name) == 64:
                blob.unlink()  # pytest keeps the last runs' folders


def test_a_gigabyte(wide: Server) -> None:
    length, pieces = body()
    assert length > 1 << 30
    # The worker starts with the service and is the only one there.
    deadline = time.monotonic() + 30
    while not (workers := _workers(wide.pid)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    with Sampler(wide.pid) as before:
        time.sleep(0.2)
    read = _read_bytes(workers)
    started = time.perf_counter()
    headers = {"content-type": "multipart/form-data; boundary=xx", "content-length": str(length)}
    with Sampler(wide.pid) as api, Sampler(workers[0].pid) as worker:
        answer = httpx.post(f"{wide.url}/v1/adapters", content=pieces(), headers=headers, timeout=300)
    seconds = time.perf_counter() - started
    assert answer.status_code == 201, answer.text
    assert answer.json()["spec"]["bytes"] > 1 << 30
    print(
        f"{length} bytes in {seconds:.1f} s: API process {before.peak >> 20} MiB before, at most {api.peak >> 20} MiB; "
        f"worker at most {worker.peak >> 20} MiB"
    )
    assert api.peak < LIMIT
    assert worker.peak < LIMIT
    # Every byte went through the workers twice: once to look for NaN, once to be hashed.
    assert _read_bytes(_workers(wide.pid)) - read > 2 * (1 << 30)
    assert wide.spooled() == []


def _workers(pid: int) -> list[psutil.Process]:
    return [child for child in psutil.Process(pid).children() if "spawn_main" in " ".join(child.cmdline())]


def _read_bytes(workers: list[psutil.Process]) -> int:
    """What they have read from files."""
    return sum(worker.io_counters().read_chars for worker in workers)

"""The check that ends every test with an engine process can fail."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest
import zmq

from service.engine.config import EngineConfig
from service.engine.messages import SamplingParams, Submit, encode
from tests.soundness import check_engine, checking

ROOT = Path(__file__).parents[2]
LEAKING = """
import sys
from service.engine import process
from service.engine.kv_cache import PagePool

free = PagePool.free
def keep_one(self, seq):
    del seq.pages[0]
    free(self, seq)
if sys.argv.pop(1) == "leaking":
    PagePool.free = keep_one
sys.exit(process.main(sys.argv[1:]))
"""
"""An engine that loses a page with every sequence."""


@contextmanager
def engine(folder: Path, kind: str, alter: Callable[[EngineConfig], EngineConfig]) -> Iterator[str]:
    """Its address, once it has been sent a request."""
    address = f"ipc://{folder}/engine.ipc"
    config = alter(EngineConfig(model_path="", blobs_dir="", cache_dir=str(folder), socket=address))
    command = [sys.executable, "-c", LEAKING, kind, msgspec.json.encode(config).decode(), "--simulated", "{}"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    try:
        with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
            socket.connect(address)
            sampling = SamplingParams(temperature=0.0, max_tokens=4)
            socket.send(encode(Submit(request_id="r", prompts=[[1, 2, 3]], sampling=sampling)))
            assert socket.poll(60_000)
            yield address
    finally:
        process.kill()
        process.wait()


def test_a_sound_engine_passes(tmp_path: Path) -> None:
    with engine(tmp_path, "sound", checking) as address:
        check_engine(address)
        check_engine(address)


def test_one_that_loses_a_page_does_not(tmp_path: Path) -> None:
    with engine(tmp_path, "leaking", checking) as address, pytest.raises(AssertionError, match="does not answer"):
        check_engine(address, 3.0)


def test_nor_one_that_does_not_look(tmp_path: Path) -> None:
    def seldom(config: EngineConfig) -> EngineConfig:
        return msgspec.structs.replace(config, integrity_interval_s=1000.0)

    with engine(tmp_path, "leaking", seldom) as address, pytest.raises(AssertionError, match="not checked"):
        check_engine(address, 3.0)

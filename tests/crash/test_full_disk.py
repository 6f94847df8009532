"""A full disk under the real engine: what has to be packed, or fetched from S3 before, is refused; all else goes on."""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from adapters.blobs import AdapterRecord
from tests.crash.confined import Disk
from tests.crash.world import BASE, WORDS, make_base
from tests.engine.oracle import Recipe, make_adapter
from tests.real_parts import S3
from tests.service.launch import Launched, wait_for

pytestmark = pytest.mark.timeout(600)
DISK_BYTES = 64 << 20
ROOM_BYTES = 200_000
"""Left on the full disk: less than a block, more than the head of one."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two layers with the tokenizer of tests/crash/world.py."""
    folder = make_base(tmp_path_factory.mktemp("tiny") / BASE)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=WORDS, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(params=["folder", "s3"])
def blobs_url(request: pytest.FixtureRequest) -> str:
    if request.param == "folder":
        return ""
    store: S3 = request.getfixturevalue("s3")
    return store.create()


@pytest.fixture(params=[f"tmpfs={DISK_BYTES}", "limits"])
def service(
    request: pytest.FixtureRequest, model: Path, blobs_url: str, tmp_path: Path, free_port: Callable[[], int]
) -> Iterator[Launched]:
    data = tmp_path / "data"
    data.mkdir()
    confined = [sys.executable, "-m", "tests.crash.confined", request.param, str(data), "--"]
    prefix = confined if request.param != "limits" else ()
    flags = "--model", str(model), "--threads", "1", "--max-positions", "128"
    with Launched(data, free_port(), *flags, prefix=prefix, LORAPLEX_BLOBS_URL=blobs_url) as launched:
        launched.wait_announced()
        yield launched


def complete(service: Launched, name: str) -> httpx.Response:
    body = {"model": name, "prompt": [5, 6, 7], "max_tokens": 12, "temperature": 0, "ignore_eos": True}
    return service.http.post("/v1/completions", json=body)


def text(answer: httpx.Response) -> str:
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["text"])


def test_what_needs_room_on_a_full_disk_is_refused_and_nothing_else(
    service: Launched, blobs_url: str, model: Path, tmp_path: Path
) -> None:
    for seed, name in enumerate(("resident", "late", "twin")):
        made = make_adapter(model, tmp_path / name, Recipe(64), seed=min(seed, 1), strength=0.4)
        with (made / "adapter_model.safetensors").open("rb") as weights:
            files = {"config": (made / "adapter_config.json").read_bytes(), "weights": weights}
            service.http.post("/v1/adapters", data={"name": name}, files=files).raise_for_status()
    base, resident = text(complete(service, BASE)), text(complete(service, "resident"))
    assert base != resident

    disk = Disk(service.data_dir, service.family())
    cache = disk.folder / "cache"
    # An upload has its adapter packed at once: as if that were long ago, and the cache deleted since.
    for what in ("load", "unload"):
        service.http.post(f"/v1/adapters/late/{what}?wait=true").raise_for_status()
    files = tuple((path.name, path.read_bytes()) for path in sorted((tmp_path / "late").glob("adapter_*")))
    digest = AdapterRecord(tuple((name, hashlib.sha256(data).hexdigest(), len(data)) for name, data in files)).digest
    next(cache.rglob(f"{digest}.block")).unlink()
    if blobs_url:
        for copy in (cache / "blobs").glob("??/*"):
            copy.unlink()
    disk.fill(leave=ROOM_BYTES)
    for _ in range(2):
        refused = complete(service, "late")
        assert refused.status_code == 503, refused.text
        error = refused.json()["error"]
        assert error["code"] == "adapter_failed"
        assert "the server's disk is full" in error["message"]
        assert "Retry-After" in refused.headers
    assert text(complete(service, "resident")) == resident
    assert text(complete(service, BASE)) == base
    if blobs_url:
        refused = service.http.get("/v1/adapters/late/versions/1/files/adapter_model.safetensors")
        assert (refused.status_code, refused.json()["error"]["code"]) == (507, "insufficient_storage")
    else:
        whole = service.http.get("/v1/adapters/late/versions/1/files/adapter_model.safetensors")
        assert whole.content == (tmp_path / "late" / "adapter_model.safetensors").read_bytes()
    left = [path for path in cache.rglob("*") if path.suffix == ".tmp" or path.parent.name in ("incoming", "tmp")]
    assert left == []
    assert len(list(cache.rglob("*.block"))) == 1
    assert re.search(r"prepare of adapter \w{64} failed: \[Errno", service.log.read_text())

    disk.free()
    wait_for(lambda: complete(service, "late").status_code == 200, 60)
    late = text(complete(service, "late"))
    assert late not in (base, resident)
    assert text(complete(service, "twin")) == late

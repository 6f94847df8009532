"""Arena and loader on CUDA: copies, compaction, and their order against steps that are still running."""

from __future__ import annotations

import random
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from adapters import arena as arena_module
from adapters import block as block_module
from adapters import loader as loader_module
from adapters.arena import Arena
from adapters.blobs import BlobStore
from adapters.block import pack
from adapters.loader import BlockLoader
from adapters.residency import Lease, Residency
from adapters.slab import Slab
from adapters.tiers import RowEntries
from tests.adapters.stored_adapters import StoredAdapter, make_manifest, store_adapter

pytestmark = pytest.mark.gpu

SECONDS = 60
LONG = 200_000_000
"""Cycles that the device is kept busy for, so that what is queued behind is certainly not done yet."""


class Engine:
    def __init__(self, folder: Path, *, arena_bytes: int, host_bytes: int, dtype: str = "bfloat16") -> None:
        self.manifest = make_manifest(dtype)
        self.store, self.cache, self.folder = BlobStore(folder / "blobs"), folder / "cache", folder
        self.arena = Arena.for_manifest(self.manifest, device="cuda", nbytes=arena_bytes, rows=32)
        self.woken = threading.Semaphore(0)
        self.loader = BlockLoader(
            self.store, self.manifest, self.cache, self.arena, host=host_bytes, notify=self.woken.release
        )
        self.residency = Residency(self.arena, self.loader, compact_bytes=4096)

    def adapter(self, seed: int, rank: int = 4) -> StoredAdapter:
        """Stored, and packed beforehand."""
        adapter = store_adapter(self.store, self.manifest, self.folder, seed, rank)
        pack(adapter.digest, self.store, self.manifest, self.cache)
        return adapter

    def lease(self, *adapters: StoredAdapter) -> Lease:
        digests, ticket = tuple(adapter.digest for adapter in adapters), object()
        while True:
            lease = self.residency.try_lease(digests, ticket)
            if lease is not None:
                return lease
            if not self.residency.poll():
                assert self.woken.acquire(timeout=SECONDS)
                self.residency.poll()


def test_the_slab_is_pinned_to_the_byte() -> None:
    with Slab(1_000_003, pinned=True) as slab:
        assert len(slab.memory) == 1_000_003
        assert slab.tensor.is_pinned()
    assert not slab.tensor.is_pinned()


@pytest.mark.parametrize("host_bytes", [0, 16 << 10, 1 << 20])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_content_through_evictions_reloads_and_compactions(
    tmp_path: Path, host_bytes: int, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(block_module, "CHECKED_BYTES", 1000)
    monkeypatch.setattr(loader_module, "BOUNCE_BYTES", 1000)
    monkeypatch.setattr(arena_module, "BOUNCE_BYTES", 1024)
    rng = random.Random(host_bytes)
    engine = Engine(
        tmp_path, arena_bytes=(40 << 10) if dtype == "float32" else 20 << 10, host_bytes=host_bytes, dtype=dtype
    )
    adapters = [engine.adapter(seed, rng.choice([1, 3, 8])) for seed in range(10)]
    held: list[tuple[Lease, list[StoredAdapter]]] = []
    for _ in range(150):
        while len(held) > 1:
            engine.residency.release(held.pop(rng.randrange(len(held)))[0])
        chosen = rng.sample(adapters, rng.choice([1, 1, 2]))
        held.append((engine.lease(*chosen), chosen))
        engine.residency.check_integrity()
        for lease, owners in held:
            for adapter, row in zip(owners, lease.rows, strict=True):
                adapter.check(engine.arena, row)
    stats = engine.residency.stats()
    assert stats["adapter_evictions_device_total"] >= 10
    assert stats["adapter_moved_bytes_total"] > 0
    engine.loader.close()


def test_a_running_step_sees_the_table_and_the_bytes_as_they_were_at_its_launch() -> None:
    arena = Arena([(64, 64)], dtype=torch.bfloat16, device="cuda", nbytes=1 << 20, rows=4)
    layout = RowEntries(np.array([8], np.int32), np.array([[0, 512]], np.int64), np.ones(1, np.float32))
    first, second = arena.allocate(4096), arena.allocate(2048)
    assert first is not None
    assert second is not None
    values = torch.randn(1024, device="cuda").bfloat16()
    arena.data[second.offset // 2 : second.offset // 2 + 1024] = values
    arena.bind(0, first, layout)
    arena.bind(1, second, layout)
    torch.cuda._sleep(LONG)
    before = arena.offsets[1].clone()
    # All of this is decided while the step is still running; nothing below waits for it.
    arena.unbind(0)
    arena.free(first)
    assert arena.compact(1 << 20) == 2048
    after = arena.offsets[1].clone()
    moved = arena.data[:1024].clone()
    arena.unbind(1)
    arena.bind(2, second, layout)
    assert before.tolist() == [[2048, 2560]]
    assert after.tolist() == [[0, 512]]
    assert torch.equal(moved, values)
    assert arena.ranks.tolist() == [[0], [0], [8], [0]]
    arena.check_integrity()


@pytest.mark.parametrize("host_bytes", [0, 1 << 20])
def test_a_region_is_rewritten_only_after_the_steps_that_read_it(tmp_path: Path, host_bytes: int) -> None:
    engine = Engine(tmp_path, arena_bytes=8 << 10, host_bytes=host_bytes)  # room for one of them
    old, new = engine.adapter(0, 8), engine.adapter(2, 8)
    lease = engine.lease(old)
    begin = engine.arena.offsets_np[lease.rows[0], 0, 0]
    count = old.factors[0][0].numel()
    torch.cuda.synchronize()
    torch.cuda._sleep(LONG)
    step = engine.arena.data[begin : begin + count].clone()
    engine.residency.release(lease)
    # Evicts the old block, and the copy of the new one is begun, while the step has not read it yet.
    lease = engine.lease(new)
    assert engine.residency.state(old.digest) != "device"
    assert torch.equal(step.cpu(), old.factors[0][0].flatten().bfloat16())
    new.check(engine.arena, lease.rows[0])
    engine.loader.close()


def test_a_fence_is_done_when_the_device_has_passed_it() -> None:
    arena = Arena([(8, 8)], dtype=torch.float32, device="cuda", nbytes=4096, rows=1)
    torch.cuda._sleep(LONG)
    fence = arena.fence()
    assert fence is not None
    assert not fence.done()
    torch.cuda.synchronize()
    assert fence.done()

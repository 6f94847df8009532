"""The loader's real threads and its real packing process, real block files, CPU tensors."""

from __future__ import annotations

import operator
import os
import random
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from adapters import block
from adapters.arena import Arena
from adapters.blobs import BlobStore
from adapters.block import pack, read_header
from adapters.block_files import block_path
from adapters.errors import AdapterMissing, AdapterUnavailable, BlobDamaged
from adapters.loader import BlockLoader, Packing
from adapters.manifest import Manifest
from adapters.packer import Packer
from adapters.regions import Region
from adapters.residency import Lease, Residency
from adapters.tiers import Completion
from tests.adapters.stored_adapters import StoredAdapter, block_bytes, make_manifest, store_adapter

SECONDS = 60
"""Far more than anything here takes; only a failing test waits so long."""


@dataclass
class Engine:
    """A loader with its residency, and the wait for wake-ups that an engine's idle loop would do."""

    store: BlobStore
    manifest: Manifest
    cache: Path
    arena: Arena
    loader: BlockLoader
    residency: Residency
    woken: threading.Semaphore
    now: list[float] = field(default_factory=lambda: [0.0])

    def until(self, condition: Callable[[], bool]) -> None:
        """Polls once per wake-up, no oftener: a completion without a wake-up would hang here."""
        while True:
            while self.residency.poll():
                pass
            self.residency.check_integrity()
            if condition():
                return
            assert self.woken.acquire(timeout=SECONDS), "nothing woke the loop"

    def lease(self, *adapters: StoredAdapter) -> Lease:
        digests, ticket, got = tuple(adapter.digest for adapter in adapters), object(), []

        def ask() -> bool:
            lease = self.residency.try_lease(digests, ticket)
            while lease is None and self.residency.poll():
                lease = self.residency.try_lease(digests, ticket)
            if lease is not None:
                got.append(lease)
            return bool(got)

        if not ask():
            self.until(ask)
        for adapter, row in zip(adapters, got[0].rows, strict=True):
            adapter.check(self.arena, row)
        return got[0]


class InThread:
    """Packs without a process of its own: most tests are not about that."""

    def __init__(self, store: BlobStore, manifest: Manifest, cache: Path) -> None:
        self.arguments = store, manifest, cache
        self.packed: list[str] = []

    def pack(self, digest: str) -> None:
        self.packed.append(digest)
        pack(digest, *self.arguments)

    def close(self) -> None:
        pass


Make = Callable[..., Engine]


@pytest.fixture(autouse=True)
def _many_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Payloads of several pieces are read by four threads, whatever the machine has."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    engines: list[Engine] = []

    def build(
        *,
        arena_bytes: int = 1 << 20,
        host_bytes: int = 1 << 20,
        rows: int = 64,
        dtype: str = "float32",
        packer: Callable[[BlobStore, Manifest, Path], Packing] = InThread,
    ) -> Engine:
        manifest = make_manifest(dtype)
        store, cache = BlobStore(tmp_path / "blobs"), tmp_path / "cache"
        arena = Arena.for_manifest(manifest, device="cpu", nbytes=arena_bytes, rows=rows)
        woken = threading.Semaphore(0)
        loader = BlockLoader(
            store,
            manifest,
            cache,
            arena,
            host=host_bytes,
            notify=woken.release,
            packer=packer(store, manifest, cache),
        )
        now = [0.0]
        residency = Residency(arena, loader, compact_bytes=4096, clock=lambda: now[0])
        engines.append(Engine(store, manifest, cache, arena, loader, residency, woken, now))
        return engines[-1]

    yield build
    for engine in engines:
        engine.loader.close()
        engine.loader.close()
    left = [thread.name for thread in threading.enumerate() if thread.name.startswith("loraplex-")]
    assert not left


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_adapter_is_packed_by_the_worker_process_and_lands_in_the_arena(
    make: Make, tmp_path: Path, dtype: str
) -> None:
    engine = make(dtype=dtype, packer=Packer)
    adapter = store_adapter(engine.store, engine.manifest, tmp_path, seed=0)
    lease = engine.lease(adapter)
    assert block_path(engine.cache, adapter.digest, engine.manifest).exists()
    engine.residency.release(lease)
    assert engine.residency.stats()["adapter_loads_total"] == 1


@pytest.mark.parametrize("host_bytes", [0, 24 << 10, 1 << 20])
def test_content_stays_right_through_evictions_reloads_and_compactions(
    make: Make, tmp_path: Path, host_bytes: int
) -> None:
    rng = random.Random(host_bytes)
    engine = make(arena_bytes=40 << 10, host_bytes=host_bytes)
    adapters = [
        store_adapter(engine.store, engine.manifest, tmp_path, seed, rng.choice([1, 3, 8])) for seed in range(12)
    ]
    assert max(map(block_bytes, adapters)) > 8 << 10
    held: list[tuple[Lease, list[StoredAdapter]]] = []
    for _ in range(120):
        while len(held) > 1:
            engine.residency.release(held.pop(rng.randrange(len(held)))[0])
        chosen = rng.sample(adapters, rng.choice([1, 1, 2]))
        held.append((engine.lease(*chosen), chosen))
        for lease, owners in held:
            for adapter, row, generation in zip(owners, lease.rows, lease.generations, strict=True):
                adapter.check(engine.arena, row)
                assert engine.arena.generation[row] == generation
    stats = engine.residency.stats()
    assert stats["adapter_evictions_device_total"] > 30
    assert stats["adapter_moved_bytes_total"] > 0
    assert engine.arena.generation.max() > 3


def test_poll_returns_while_a_pack_is_stuck_and_resident_blocks_are_served(make: Make, tmp_path: Path) -> None:
    entered, may_go_on = threading.Event(), threading.Event()

    class Slow(InThread):
        def pack(self, digest: str) -> None:
            if digest == slow.digest:
                entered.set()
                assert may_go_on.wait(SECONDS)
            super().pack(digest)

    engine = make(packer=Slow)
    quick, slow, other = (store_adapter(engine.store, engine.manifest, tmp_path, seed) for seed in range(3))
    pack(other.digest, engine.store, engine.manifest, engine.cache)
    engine.residency.release(engine.lease(quick))
    assert engine.residency.try_lease((slow.digest,), "slow") is None
    assert entered.wait(SECONDS)
    # The pack is inside its call; everything else goes on, loads from existing block files included.
    engine.residency.poll()
    assert engine.residency.state(slow.digest) == "loading"
    engine.residency.release(engine.lease(quick))
    engine.residency.release(engine.lease(other))
    assert engine.residency.try_lease((slow.digest,), "slow") is None
    may_go_on.set()
    engine.until(lambda: engine.residency.try_lease((slow.digest,), "slow") is not None)


def test_an_existing_block_file_is_not_packed_again(make: Make, tmp_path: Path) -> None:
    engine = make()
    adapter = store_adapter(engine.store, engine.manifest, tmp_path, seed=0)
    pack(adapter.digest, engine.store, engine.manifest, engine.cache)
    engine.residency.release(engine.lease(adapter))
    assert engine.loader._packer.packed == []


@pytest.mark.parametrize("damage", ["cut", "other digest", "header"])
def test_a_damaged_block_file_is_built_again(make: Make, tmp_path: Path, damage: str) -> None:
    engine = make()
    adapter, other = (store_adapter(engine.store, engine.manifest, tmp_path, seed) for seed in (0, 1))
    path = pack(adapter.digest, engine.store, engine.manifest, engine.cache)
    if damage == "cut":
        os.truncate(path, path.stat().st_size - 10)
    elif damage == "other digest":
        path.write_bytes(pack(other.digest, engine.store, engine.manifest, engine.cache).read_bytes())
    else:
        data = bytearray(path.read_bytes())
        data[40] ^= 0xFF
        path.write_bytes(data)
    engine.residency.release(engine.lease(adapter))
    assert engine.loader._packer.packed == [adapter.digest]


def test_failures_have_their_message_and_can_be_retried_later(make: Make, tmp_path: Path) -> None:
    engine = make()
    with pytest.raises(AdapterMissing):
        engine.until(lambda: engine.residency.try_lease(("0" * 64,), "r") is not None)
    adapter = store_adapter(engine.store, engine.manifest, tmp_path, seed=0)
    path = pack(adapter.digest, engine.store, engine.manifest, engine.cache)
    path.unlink()
    path.parent.rmdir()
    path.parent.write_text("a file where a folder should be")
    with pytest.raises(AdapterUnavailable, match="Error"):
        engine.until(lambda: engine.residency.try_lease((adapter.digest,), "r") is not None)
    path.parent.unlink()
    with pytest.raises(AdapterUnavailable):
        engine.residency.try_lease((adapter.digest,), "too soon")
    engine.now[0] = 6.0
    engine.residency.release(engine.lease(adapter))


def test_a_block_file_that_vanishes_after_its_header_was_read_is_built_again(make: Make, tmp_path: Path) -> None:
    engine = make(arena_bytes=16 << 10, host_bytes=0)
    adapter, filler = (store_adapter(engine.store, engine.manifest, tmp_path, seed, 8) for seed in (0, 2))
    held = engine.lease(filler)
    assert engine.residency.try_lease((adapter.digest,), "r") is None
    path = block_path(engine.cache, adapter.digest, engine.manifest)
    engine.until(lambda: engine.residency.stats()["adapters_loading"] == 0)
    path.unlink()
    engine.residency.release(held)
    engine.residency.cancel_wait("r")
    engine.residency.release(engine.lease(adapter))
    assert engine.loader._packer.packed == [filler.digest, adapter.digest, adapter.digest]
    assert engine.residency.stats()["adapter_rebuilt_total"] == 0


PAYLOAD_DAMAGES: dict[str, Callable[[bytearray, int, int], None]] = {
    "first bit": lambda data, begin, end: operator.setitem(data, begin, data[begin] ^ 1),
    "a bit in the middle": lambda data, begin, end: operator.setitem(
        data, (begin + end) // 2, data[(begin + end) // 2] ^ 16
    ),
    "last bit": lambda data, begin, end: operator.setitem(data, end - 1, data[end - 1] ^ 128),
    "zeroed": lambda data, begin, end: operator.setitem(data, slice(begin + 4096, begin + 8192), bytes(4096)),
    "cut": lambda data, begin, end: operator.delitem(data, slice(end - 4096, end)),
    "empty": lambda data, begin, end: data.clear(),
    "unreadable": lambda data, begin, end: None,
}


@pytest.mark.parametrize("damage", PAYLOAD_DAMAGES)
@pytest.mark.parametrize("host_bytes", [0, 1 << 20])
@pytest.mark.parametrize("moment", ["before the header is read", "after"])
def test_a_damaged_payload_is_never_served_but_built_again(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    damage: str, host_bytes: int, moment: str,
) -> None:  # fmt: skip
    """Read into the slab, and streamed past it; the lease compares every value with what was uploaded."""
    monkeypatch.setattr(block, "CHECKED_BYTES", 4096)
    engine = make(arena_bytes=16 << 10, host_bytes=host_bytes)
    adapter, filler = (store_adapter(engine.store, engine.manifest, tmp_path, seed, 8) for seed in (0, 2))
    path = pack(adapter.digest, engine.store, engine.manifest, engine.cache)
    good = path.read_bytes()
    header, begin = read_header(path)

    def spoil() -> None:
        data = bytearray(good)
        PAYLOAD_DAMAGES[damage](data, begin, begin + header.payload_bytes)
        path.unlink()
        if damage == "unreadable":
            path.symlink_to("/proc/self/mem")
        else:
            path.write_bytes(data)

    if moment == "after":
        # With the slab's block out of the way, the header is known while the bytes have to be read.
        done: list[Completion] = []

        def next_completion() -> Completion:
            while not done:
                assert engine.woken.acquire(timeout=SECONDS)
                done.extend(engine.loader.completions())
            return done.pop()

        engine.loader.prepare(adapter.digest)
        info = next_completion().info
        assert info is not None
        spoil()
        region = Region(2048, info.nbytes)
        if host_bytes:
            engine.loader.read(adapter.digest, info, region)
            memory = engine.loader._slab.array
        else:
            engine.loader.stream(adapter.digest, info, region, None)
            memory = engine.arena.bytes.numpy()
        completion = next_completion()
        assert completion.error is None
        assert completion.rebuilt
        assert bytes(memory[2048 : 2048 + info.nbytes]) == good[begin:]
    else:
        spoil()
        engine.residency.release(engine.lease(adapter))
        assert engine.residency.stats()["adapter_rebuilt_total"] == 1
        assert engine.residency.stats()["adapter_damaged_total"] == 0, "no request failed for it"
    assert engine.loader._packer.packed == [adapter.digest]
    assert path.read_bytes() == good
    assert [record.levelname for record in caplog.records if adapter.digest in record.message] == ["WARNING"]
    engine.residency.release(engine.lease(filler))
    engine.residency.release(engine.lease(adapter))
    assert engine.loader._packer.packed == [adapter.digest, filler.digest], "sound again, and read as it is"


def test_a_block_that_is_damaged_again_once_built_fails_and_is_tried_later(make: Make, tmp_path: Path) -> None:
    class OnABadDisk(InThread):
        bad = True

        def pack(self, digest: str) -> None:
            super().pack(digest)
            if self.bad:
                path = block_path(self.arguments[2], digest, self.arguments[1])
                data = bytearray(path.read_bytes())
                data[-1] ^= 1
                path.write_bytes(data)

    engine = make(packer=OnABadDisk)
    adapter = store_adapter(engine.store, engine.manifest, tmp_path, seed=0)
    with pytest.raises(BlobDamaged, match="payload"):
        engine.until(lambda: engine.residency.try_lease((adapter.digest,), "r") is not None)
    assert len(engine.loader._packer.packed) == 2
    OnABadDisk.bad = False
    engine.now[0] = 6.0
    engine.residency.release(engine.lease(adapter))


def test_a_damaged_file_is_said_counted_and_after_its_repair_served(make: Make, tmp_path: Path) -> None:
    engine = make(packer=Packer)
    adapter = store_adapter(engine.store, engine.manifest, tmp_path, seed=0)
    sha = max(engine.store, key=engine.store.size)
    good = engine.store.path(sha).read_bytes()
    engine.store.path(sha).write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(BlobDamaged, match=sha):
        engine.until(lambda: engine.residency.try_lease((adapter.digest,), "r") is not None)
    assert engine.residency.stats()["adapter_damaged_total"] == 1
    engine.store.path(sha).write_bytes(good)
    engine.now[0] = 6.0
    engine.residency.release(engine.lease(adapter))
    assert engine.residency.stats()["adapter_damaged_total"] == 1


def test_forget_deletes_the_block_file(make: Make, tmp_path: Path) -> None:
    engine = make()
    adapter = store_adapter(engine.store, engine.manifest, tmp_path, seed=0)
    lease = engine.lease(adapter)
    path = block_path(engine.cache, adapter.digest, engine.manifest)
    assert path.exists()
    dropped = engine.residency.unload(adapter.digest, forget=True)
    engine.residency.release(lease)
    engine.until(lambda: dropped.done)
    assert not path.exists()
    assert engine.residency.state(adapter.digest) == "absent"


def test_accounts_share_the_file_of_equal_content_and_nothing_else(make: Make, tmp_path: Path) -> None:
    engine = make()
    adapter = store_adapter(engine.store, engine.manifest, tmp_path, seed=0)
    residency, path = engine.residency, block_path(engine.cache, adapter.digest, engine.manifest)
    leases: dict[str, Lease] = {}

    def ask(key: str) -> bool:
        if key not in leases and (lease := residency.try_lease((key,), key)) is not None:
            leases[key] = lease
        return key in leases

    first, second = f"{adapter.digest}@1", f"{adapter.digest}@2"
    engine.until(lambda: ask(first))
    engine.until(lambda: ask(second))
    assert engine.loader._packer.packed == [adapter.digest]
    for lease in leases.values():
        adapter.check(engine.arena, lease.rows[0])
    assert leases[first].rows != leases[second].rows
    dropped = residency.unload(adapter.digest, forget=True)
    residency.release(leases.pop(first))
    engine.until(lambda: residency.state(first) == "absent")
    adapter.check(engine.arena, leases[second].rows[0])
    assert path.exists()
    residency.release(leases.pop(second))
    engine.until(lambda: dropped.done)
    assert not path.exists()
    # Both at once, of which one makes the file.
    assert not ask(first)
    assert not ask(second)
    engine.until(lambda: ask(first))
    engine.until(lambda: ask(second))
    for lease in leases.values():
        adapter.check(engine.arena, lease.rows[0])
    residency.check_integrity()
    # What a user is told names the content, not whose it is.
    with pytest.raises(AdapterMissing, match=f"under {'0' * 64}$"):
        engine.until(lambda: residency.try_lease((f"{'0' * 64}@7",), "r") is not None)


def test_the_packing_process_may_die_once_per_block(make: Make, tmp_path: Path) -> None:
    engine = make(packer=Packer)
    first, second = (store_adapter(engine.store, engine.manifest, tmp_path, seed) for seed in range(2))
    engine.residency.release(engine.lease(first))
    packer = engine.loader._packer
    assert isinstance(packer, Packer)
    (pid,) = packer.worker_pids
    os.kill(pid, signal.SIGKILL)
    engine.residency.release(engine.lease(second))
    assert packer.worker_pids != (pid,)


def test_closing_with_a_pack_under_way_ends_the_process(make: Make, tmp_path: Path) -> None:
    engine = make(packer=Packer)
    adapter = store_adapter(engine.store, engine.manifest, tmp_path, seed=0)
    engine.residency.release(engine.lease(adapter))
    packer = engine.loader._packer
    assert isinstance(packer, Packer)
    (pid,) = packer.worker_pids
    engine.residency.prefetch(["1" * 64])
    engine.loader.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    with pytest.raises(AdapterUnavailable, match="closed"):
        packer.pack(adapter.digest)


def test_a_wake_up_call_that_fails_does_not_stop_the_loader(make: Make, tmp_path: Path) -> None:
    engine = make()
    calls = []

    def notify() -> None:
        calls.append(1)
        engine.woken.release()
        raise RuntimeError("no one is at home")

    engine.loader._notify = notify
    adapter = store_adapter(engine.store, engine.manifest, tmp_path, seed=0)
    engine.residency.release(engine.lease(adapter))
    assert len(calls) >= 3


@pytest.mark.parametrize("host_bytes", [0, 1 << 20])
def test_closing_waits_for_the_block_that_is_being_read_and_tells_nobody(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, host_bytes: int
) -> None:
    """Into the slab, which is given back then, and into the arena; another block waits behind it."""
    monkeypatch.setattr(block, "CHECKED_BYTES", 1024)
    engine = make(host_bytes=host_bytes)
    digests = [store_adapter(engine.store, engine.manifest, tmp_path, seed, 8).digest for seed in (0, 2)]
    infos = []
    for digest in digests:
        pack(digest, engine.store, engine.manifest, engine.cache)
        engine.loader.prepare(digest)
        assert engine.woken.acquire(timeout=SECONDS)
        infos += [completion.info for completion in engine.loader.completions()]
    all_read, may_go_on, order, preadv = threading.Barrier(5), threading.Event(), [], os.preadv

    def held(descriptor: int, buffers: list[memoryview], position: int) -> int:
        if not may_go_on.is_set():
            all_read.wait(SECONDS)
            assert may_go_on.wait(SECONDS)
        count = preadv(descriptor, buffers, position)
        order.append("written")
        return count

    monkeypatch.setattr(os, "preadv", held)
    for digest, info in zip(digests, infos, strict=True):
        assert info is not None
        if host_bytes:
            engine.loader.read(digest, info, Region(0, info.nbytes))
        else:
            engine.loader.stream(digest, info, Region(0, info.nbytes), None)
    all_read.wait(SECONDS)

    def close() -> None:
        engine.loader.close()
        order.append("closed")

    closing = threading.Thread(target=close)
    closing.start()
    assert engine.loader._closing.wait(SECONDS)
    # Long enough for closing to end too early, if that were possible.
    closing.join(0.3)
    may_go_on.set()
    closing.join(SECONDS)
    pieces = -(-infos[0].nbytes // 1024)
    assert pieces >= 8
    assert order == ["written"] * pieces + ["closed"], "the one behind it is not begun"
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("loraplex-")]
    assert list(engine.loader.completions()) == []
    assert not engine.woken.acquire(blocking=False)

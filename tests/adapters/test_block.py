from __future__ import annotations

import errno
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from adapters import block, disk
from adapters.blobs import BlobStore
from adapters.block import layout, pack, read_header, read_payload, verify_block
from adapters.block_files import block_path, delete_blocks, sweep_blocks, sweep_unfinished
from adapters.convert import STORAGE, convert, count_nonfinite, may_overflow
from adapters.errors import AdapterMissing, AdapterRefused, AdapterUnavailable, BlobDamaged
from adapters.inspection import inspect_upload
from adapters.manifest import Manifest
from adapters.peft_format import load_spec

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def stored(folder: Path, store: BlobStore, manifest: Manifest) -> str:
    """Accepts and stores an adapter; gives its digest."""
    weights = {path.name: path for path in folder.glob("*.safetensors")}
    config, index = folder / "adapter_config.json", folder / f"{WEIGHTS}.index.json"
    inspection = inspect_upload(config, weights, index if index.exists() else None, manifest)
    paths = {config.name: config, index.name: index, **weights}
    for name, sha, _ in inspection.record.files:
        store.put(paths[name], sha)
    store.put_bytes(inspection.record.to_json())
    return inspection.record.digest


@pytest.fixture
def store(tmp_path: Path) -> BlobStore:
    return BlobStore(tmp_path / "blobs")


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def as_torch(values: np.ndarray, dtype: str) -> torch.Tensor:
    return torch.from_numpy(values.view(np.int16 if values.itemsize == 2 else np.int32)).view(DTYPES[dtype])


# ---------------------------------------------------------------- conversion


def interesting(dtype: str) -> torch.Tensor:
    """All values of a 16-bit dtype; of float32 all upper halves with lower halves around every rounding decision."""
    if dtype != "float32":
        return torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(DTYPES[dtype])
    lower = torch.tensor(
        [0, 1, 0xFFF, 0x1000, 0x1001, 0x2FFF, 0x3000, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=torch.int64
    )
    bits = (torch.arange(1 << 16, dtype=torch.int64)[:, None] << 16) | lower
    return bits.where(bits < 1 << 31, bits - (1 << 32)).to(torch.int32).view(torch.float32).flatten()


@pytest.mark.parametrize("target", DTYPES)
@pytest.mark.parametrize("source", DTYPES)
def test_conversion_is_torch_s_bit_for_bit(source: str, target: str) -> None:
    values = interesting(source)
    integer = torch.int32 if source == "float32" else torch.int16
    array = values.view(integer).numpy().view(STORAGE[source])
    result = as_torch(convert(array, source, target), target)
    expected = values.to(DTYPES[target])
    assert torch.equal(result.isnan(), expected.isnan())
    integer = torch.int32 if target == "float32" else torch.int16
    number = ~expected.isnan()
    assert torch.equal(result.view(integer)[number], expected.view(integer)[number])
    # Which values are bad, before and after.
    assert count_nonfinite(array, source) == int((~values.isfinite()).sum())
    assert count_nonfinite(convert(array, source, target), target) == int((~expected.isfinite()).sum())
    assert may_overflow(source, target) is bool((~expected.isfinite() & values.isfinite()).any())


def test_conversion_of_unaligned_and_strided_arrays() -> None:
    raw = np.frombuffer(b"x" + np.arange(12, dtype="<f4").tobytes(), "<f4", 12, offset=1)
    values = raw.reshape(3, 4)[:, ::2]
    assert np.array_equal(convert(convert(values, "float32", "bfloat16"), "bfloat16", "float32"), values)


# ---------------------------------------------------------------- pack


@pytest.mark.parametrize("target", DTYPES)
@pytest.mark.parametrize("source", DTYPES)
def test_payload(
    source: str, target: str, make_adapter: Any, manifest: Manifest, store: BlobStore, cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(block, "CHUNK_BYTES", 500)  # so that tensors take several chunks, the last one shorter
    manifest = msgspec.structs.replace(manifest, dtype=target)
    folder = make_adapter(
        r=5, lora_alpha=3, target_modules="all-linear", use_rslora=True, dtype=DTYPES[source],
        rank_pattern={"k_proj": 1, r"layers\.2\.mlp.*": 7}, exclude_modules=["layers.1.self_attn.o_proj"],
    )  # fmt: skip
    digest = stored(folder, store, manifest)
    spec = load_spec(digest, store, manifest)
    path = pack(digest, store, manifest, cache)
    assert path == block_path(cache, digest, manifest)
    header, start = read_header(path)
    verify_block(path)
    planned = layout(spec, digest, manifest)
    assert header == msgspec.structs.replace(planned, checksums=header.checksums)
    assert len(header.checksums) == len(planned.checksums)
    assert start % 4096 == 0
    assert (header.digest, header.fingerprint, header.dtype) == (digest, manifest.fingerprint, target)
    assert path.stat().st_size == start + header.payload_bytes
    itemsize = STORAGE[target].itemsize
    payload = np.frombuffer(path.read_bytes()[start:], STORAGE[target])
    tensors = load_file(folder / WEIGHTS)
    position = 0
    seen = np.zeros(payload.size, bool)
    assert [(e.index, e.rank, e.scale) for e in header.entries] == [(t.index, t.rank, t.scale) for t in spec.targets]
    for entry in header.entries:
        module = manifest.linears[entry.index]
        for side, offset, columns in (
            ("A", entry.a_offset, module.in_features),
            ("B", entry.b_offset, module.out_features),
        ):
            assert offset >= position
            assert offset * itemsize % 16 == 0
            size = entry.rank * columns
            expected = tensors[f"{PREFIX}{module.name}.lora_{side}.weight"].to(DTYPES[target])
            if side == "B":
                expected = expected.T
            found = as_torch(payload[offset : offset + size].copy(), target).reshape(entry.rank, columns)
            assert torch.equal(found, expected)
            position = offset + size
            seen[offset:position] = True
    assert header.payload_bytes % 16 == 0
    assert header.payload_bytes - position * itemsize < 16
    assert not payload[~seen].any()
    assert (~seen).sum() * itemsize < 16 * 2 * len(header.entries)


def test_what_a_block_computes(
    make_adapter: Any, reloaded: Any, manifest: Manifest, store: BlobStore, cache: Path
) -> None:
    """scale · (x Aᵀ) B of every target equals the delta of PEFT's own layer."""
    folder = make_adapter(r=6, lora_alpha=10, target_modules="all-linear", alpha_pattern={"v_proj": 3})
    path = pack(stored(folder, store, manifest), store, manifest, cache)
    header, start = read_header(path)
    payload = torch.from_numpy(np.frombuffer(path.read_bytes()[start:], np.float32).copy())
    modules = dict(reloaded(folder).named_modules())
    for entry in header.entries:
        target = manifest.linears[entry.index]
        a = payload[entry.a_offset :][: entry.rank * target.in_features].reshape(entry.rank, -1)
        b = payload[entry.b_offset :][: entry.rank * target.out_features].reshape(entry.rank, -1)
        torch.testing.assert_close(entry.scale * b.T @ a, modules[PREFIX + target.name].get_delta_weight("default"))


def test_shards(make_adapter: Any, manifest: Manifest, store: BlobStore, cache: Path, adapter: Path) -> None:
    whole = pack(stored(adapter, store, manifest), store, manifest, cache)
    tensors = load_file(adapter / WEIGHTS)
    (adapter / WEIGHTS).unlink()
    files = {name: f"part-{number % 2}.safetensors" for number, name in enumerate(tensors)}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in files if files[name] == file}, adapter / file)
    (adapter / f"{WEIGHTS}.index.json").write_bytes(msgspec.json.encode({"weight_map": files}))
    digest = stored(adapter, store, manifest)
    parts = pack(digest, store, manifest, cache)
    assert parts != whole
    (_, a), (_, b) = read_header(whole), read_header(parts)
    assert whole.read_bytes()[a:] == parts.read_bytes()[b:]


def test_idempotent_and_keyed(adapter: Path, manifest: Manifest, store: BlobStore, cache: Path) -> None:
    digest = stored(adapter, store, manifest)
    path = pack(digest, store, manifest, cache)
    before = path.stat().st_ino, path.stat().st_mtime_ns
    assert pack(digest, store, manifest, cache) == path
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == before
    others = [
        msgspec.structs.replace(manifest, fingerprint="other"),
        msgspec.structs.replace(manifest, dtype="float16"),
        msgspec.structs.replace(manifest, fingerprint="../../.."),
    ]
    paths = {pack(digest, store, other, cache) for other in others} | {path}
    assert len(paths) == 4
    assert all(cache in found.parents for found in paths)
    assert not list(cache.rglob("*.tmp"))


def damage(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "cut":
        del data[-1:]
    elif how == "cut to the header":
        del data[4096:]
    elif how == "cut inside the header":
        del data[40:]
    elif how == "longer":
        data += b"x"
    elif how == "empty":
        data.clear()
    else:
        data[int(how)] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "how",
    ["cut", "cut to the header", "cut inside the header", "longer", "empty", "0", "8", "12", "15", "16", "30", "60"],
)
def test_a_damaged_block_is_found_and_built_again(
    how: str, adapter: Path, manifest: Manifest, store: BlobStore, cache: Path
) -> None:
    digest = stored(adapter, store, manifest)
    path = pack(digest, store, manifest, cache)
    good = path.read_bytes()
    damage(path, how)
    with pytest.raises(BlobDamaged) as caught:
        read_header(path)
    assert caught.value.digest == digest
    assert pack(digest, store, manifest, cache) == path
    assert path.read_bytes() == good


def swapped(data: bytearray, one: int, other: int, count: int) -> None:
    data[one : one + count], data[other : other + count] = data[other : other + count], data[one : one + count]


@pytest.mark.parametrize("piece", [8, 4088, 4096, 8192 + 24, 1 << 30])
def test_a_damaged_payload_is_found_by_reading_it_and_built_again(
    piece: int, make_adapter: Any, manifest: Manifest, store: BlobStore, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With pieces that are shorter than a row of the sum, one row, with words left over, and longer than all."""
    monkeypatch.setattr(block, "CHECKED_BYTES", piece)
    digest = stored(make_adapter(r=16, target_modules="all-linear"), store, manifest)
    path = pack(digest, store, manifest, cache)
    good = path.read_bytes()
    header, start = read_header(path)
    assert header.payload_bytes > 3 * 4096
    assert len(header.checksums) == 4 * -(-header.payload_bytes // piece)
    middle = start + header.payload_bytes // 2
    damages: list[bytearray] = []
    for position in (start, middle, len(good) - 17, start + 4087, start + 4088, start + 4095, start + 4096):
        for bit in (0, 7):
            damages.append(bytearray(good))
            damages[-1][position] ^= 1 << bit
    for begin, count in ((start, 4096), (middle, 512), (start + 64, 8)):
        damages.append(bytearray(good))
        damages[-1][begin : begin + count] = bytes(count)
    damages.append(bytearray(good))
    damages[-1][start + 4096 : start + 8192] = good[start : start + 4096]
    for one, other, count in ((start, start + 4096, 4096), (start, start + 8192, 512), (start, start + 8, 8)):
        damages.append(bytearray(good))
        swapped(damages[-1], one, other, count)
    for damaged in damages:
        assert damaged != good
        path.write_bytes(damaged)
        assert read_header(path) == (header, start)
        with pytest.raises(BlobDamaged, match="payload"):
            verify_block(path)
    assert pack(digest, store, manifest, cache) == path
    assert path.read_bytes() == good
    assert verify_block(path) == header


def test_checksums_are_the_same_whatever_the_pieces_that_are_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block, "CHECKED_BYTES", 8176)
    data = np.random.default_rng(0).bytes(5 * 8176)
    for size in (8, 4096, 8176, 3 * 8176, 5 * 8176 - 16):
        sums = block._Sums()
        for begin in range(0, size, 1000):
            sums.add(data[begin : min(begin + 1000, size)])
        assert sums.result() == block.checksums(memoryview(data)[:size])
        assert len(sums.result()) == 4 * -(-size // 8176)
        pieces = [data[begin : min(begin + 8176, size)] for begin in range(0, size, 8176)]
        found = [block.checksum_of(sums.result(), number) for number in range(len(pieces))]
        assert found == [block.checksums(memoryview(piece)) for piece in pieces]


def test_what_the_disk_cannot_read_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / f"{'0' * 64}.block"
    path.symlink_to("/proc/self/mem")  # reading its first page is EIO, as a bad sector is
    with pytest.raises(BlobDamaged, match="cannot be read"):
        read_header(path)
    with path.open("rb", buffering=0) as stream, pytest.raises(BlobDamaged, match="cannot be read"):
        read_payload(stream.fileno(), 0, memoryview(bytearray(16)), bytes(4), "0" * 64)


def test_no_block(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_header(tmp_path / "none")


# ---------------------------------------------------------------- failures


def test_packing_leaves_the_disk_its_reserve(
    adapter: Path, manifest: Manifest, store: BlobStore, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = stored(adapter, store, manifest)
    monkeypatch.setattr(disk, "RESERVE_BYTES", 1 << 62)
    with pytest.raises(OSError, match="No space left") as caught:
        pack(digest, store, manifest, cache)
    assert caught.value.errno == errno.ENOSPC
    assert not [path for path in cache.rglob("*") if path.is_file()]
    monkeypatch.setattr(disk, "RESERVE_BYTES", 0)
    assert pack(digest, store, manifest, cache).exists()


def test_values_too_large_for_the_dtype(adapter: Path, manifest: Manifest, store: BlobStore, cache: Path) -> None:
    """Accepted by a float32 base; a float16 base must not get infinities."""
    tensors = load_file(adapter / WEIGHTS)
    name = f"{PREFIX}model.layers.1.self_attn.v_proj.lora_B.weight"
    tensors[name][3, 1] = 65520.0
    save_file(tensors, adapter / WEIGHTS)
    digest = stored(adapter, store, manifest)
    pack(digest, store, manifest, cache)
    half = msgspec.structs.replace(manifest, dtype="float16")
    with pytest.raises(AdapterUnavailable, match=r"lora_B of model\.layers\.1\.self_attn\.v_proj"):
        pack(digest, store, half, cache)
    assert not block_path(cache, digest, half).exists()
    assert not list(cache.rglob("*.tmp"))


def test_missing_and_damaged_blobs(adapter: Path, manifest: Manifest, store: BlobStore, cache: Path) -> None:
    digest = stored(adapter, store, manifest)
    with pytest.raises(AdapterMissing):
        pack("0" * 64, store, manifest, cache)
    (weights,) = (path for sha in store if (path := store.path(sha)).stat().st_size > 2000)
    content = weights.read_bytes()
    weights.write_bytes(content[:-4])
    with pytest.raises(BlobDamaged) as caught:
        pack(digest, store, manifest, cache)
    assert caught.value.digest == weights.name
    weights.unlink()
    with pytest.raises(AdapterMissing):
        pack(digest, store, manifest, cache)
    with pytest.raises(BlobDamaged):  # a blob that is no record
        pack(store.put_bytes(b"hello"), store, manifest, cache)


@pytest.mark.parametrize("name", ["adapter_config.json", WEIGHTS])
def test_a_file_that_changed_on_the_disk_is_not_packed(
    name: str, adapter: Path, manifest: Manifest, store: BlobStore, cache: Path
) -> None:
    """One bit, which every check of sizes and headers lets through."""
    digest = stored(adapter, store, manifest)
    data = bytearray((adapter / name).read_bytes())
    path = next(store.path(sha) for sha in store if store.path(sha).read_bytes() == data)
    data[-1] ^= 1 if name == WEIGHTS else ord("}") ^ ord(" ")
    path.write_bytes(data)
    with pytest.raises(BlobDamaged) as caught:
        pack(digest, store, manifest, cache)
    assert caught.value.digest == path.name
    assert not block_path(cache, digest, manifest).exists()


def test_blocks_go_with_their_adapters(adapter: Path, manifest: Manifest, store: BlobStore, cache: Path) -> None:
    digest = stored(adapter, store, manifest)
    other_base = msgspec.structs.replace(manifest, dtype="bfloat16")
    delete_blocks(cache, digest)  # before there is any
    assert sweep_blocks(cache, set()) == 0
    for base in (manifest, other_base):
        path = pack(digest, store, base, cache)
        unfinished = path.with_suffix(".tmp")
        unfinished.write_bytes(b"half")
    sweep_unfinished(cache)
    assert not list(cache.rglob("*.tmp"))
    assert sweep_blocks(cache, {digest}) == 0
    delete_blocks(cache, "0" * 64)
    assert len(list(cache.rglob("*.block"))) == 2
    delete_blocks(cache, digest)
    assert not list(cache.rglob("*.block"))
    pack(digest, store, manifest, cache)
    assert sweep_blocks(cache, set()) == 1
    assert not list(cache.rglob("*.block"))


def test_another_base(adapter: Path, manifest: Manifest, store: BlobStore, cache: Path) -> None:
    digest = stored(adapter, store, manifest)
    modules = tuple(module for module in manifest.modules if "v_proj" not in module.name)
    with pytest.raises(AdapterRefused):
        pack(digest, store, msgspec.structs.replace(manifest, modules=modules), cache)


def test_concurrent_packing(adapter: Path, manifest: Manifest, store: BlobStore, cache: Path) -> None:
    digest = stored(adapter, store, manifest)
    failures: list[BaseException] = []

    def run() -> None:
        try:
            verify_block(pack(digest, store, manifest, cache))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert len([path for path in cache.rglob("*") if path.is_file()]) == 1


def test_memory_stays_small(tmp_path: Path) -> None:
    """A 240 MB adapter is inspected and packed by a process that may grow by a small part of that."""
    script = Path(__file__).with_name("pack_large.py")
    done = subprocess.run([sys.executable, str(script), str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    grown = int(done.stdout)
    assert grown < 80 << 20


def test_without_torch() -> None:
    code = "import sys, adapters.inspection, adapters.block; sys.exit('torch' in sys.modules or 'peft' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

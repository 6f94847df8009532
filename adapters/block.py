"""One adapter as one contiguous string of bytes in the compute dtype: what the loader copies to the device in one go.

Payload: for every target in order of its index, A [rank, in_features] and then B as [rank, out_features] (the file's B,
transposed), row-major; whole rows of true rank, no padding but to multiples of 16 bytes between tensors and at the end.
The file is a cache that can always be rebuilt from the adapter's own files; it is found by digest, base fingerprint,
dtype and layout version:

    prefix (struct _PREFIX) | BlockHeader as msgpack | zeros up to a multiple of 4096 | payload
"""

from __future__ import annotations

import hashlib
import os
import struct
import tempfile
import zlib
from collections.abc import Collection, Iterator
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO, Literal

import msgspec
import numpy as np

from adapters.blobs import Blobs, fsync_folder
from adapters.convert import SAFETENSORS, STORAGE, Array, convert, count_nonfinite
from adapters.errors import AdapterUnavailable, BlobDamaged
from adapters.manifest import Manifest
from adapters.peft_format import AdapterSpec, TargetSpec, load_record
from adapters.safetensors_header import TensorRef

LAYOUT_VERSION = 1
TENSOR_ALIGNMENT = 16
PAYLOAD_ALIGNMENT = 4096
"""The payload starts on a page, so that it can be mapped or read past the page cache."""
CHUNK_BYTES = 4 << 20

_MAGIC = b"LPBLOCK\n"
_PREFIX = struct.Struct("<8sIIII")  # magic, layout version, header bytes, header crc32, payload crc32


class BlockEntry(msgspec.Struct, frozen=True, array_like=True):
    """One target: y += scale · (x Aᵀ) B with A: [rank, in] and B: [rank, out] at these offsets (elements from the
    payload's start)."""

    index: int
    rank: int
    scale: float
    a_offset: int
    b_offset: int


class BlockHeader(msgspec.Struct, frozen=True):
    """What a block file says of its payload; `entries` are sorted by target index."""

    digest: str
    fingerprint: str
    dtype: Literal["float32", "bfloat16", "float16"]
    layout_version: int
    payload_bytes: int
    entries: tuple[BlockEntry, ...]


def block_path(cache_dir: Path, digest: str, manifest: Manifest) -> Path:
    """Where the block of adapter version `digest` for this base lies or would lie."""
    key = hashlib.sha256(f"{manifest.fingerprint}\n{manifest.dtype}\n{LAYOUT_VERSION}".encode()).hexdigest()[:16]
    return Path(cache_dir) / "blocks" / key / digest[:2] / f"{digest}.block"


def delete_blocks(cache_dir: Path, digest: str) -> None:
    """Deletes the blocks of an adapter version for every base that it was packed for."""
    for path in (Path(cache_dir) / "blocks").glob(f"*/{digest[:2]}/{digest}.block"):
        path.unlink(missing_ok=True)


def sweep_blocks(cache_dir: Path, keep: Collection[str]) -> int:
    """Deletes the blocks of adapter versions whose digest is not in `keep`; how many those were."""
    swept = 0
    for path in (Path(cache_dir) / "blocks").glob("*/*/*.block"):
        if path.stem not in keep:
            path.unlink(missing_ok=True)
            swept += 1
    return swept


def sweep_unfinished(cache_dir: Path) -> None:
    """Deletes what packers that were killed left behind. For the one process that packs, before it begins."""
    for path in (Path(cache_dir) / "blocks").glob("*/*/*.tmp"):
        path.unlink(missing_ok=True)


def layout(spec: AdapterSpec, digest: str, manifest: Manifest) -> BlockHeader:
    """Where every tensor of `spec` goes. No file is read."""
    itemsize = STORAGE[manifest.dtype].itemsize
    position, entries = 0, []
    for target in spec.targets:
        a_offset = position
        b_offset = _aligned(a_offset + target.rank * target.a.shape[1] * itemsize, TENSOR_ALIGNMENT)
        position = _aligned(b_offset + target.rank * target.b.shape[0] * itemsize, TENSOR_ALIGNMENT)
        entries.append(BlockEntry(target.index, target.rank, target.scale, a_offset // itemsize, b_offset // itemsize))
    return BlockHeader(digest, manifest.fingerprint, manifest.dtype, LAYOUT_VERSION, position, tuple(entries))


def pack(digest: str, store: Blobs, manifest: Manifest, cache_dir: Path) -> Path:
    """The block file of adapter version `digest`, built if it is absent or damaged; memory: a few MB and one B.

    Atomic and idempotent: concurrent calls give the same file. AdapterMissing, BlobDamaged (of the adapter's files),
    AdapterRefused (it does not fit this base), AdapterUnavailable (a value is too large for the compute dtype)."""
    path = block_path(cache_dir, digest, manifest)
    if _is_whole(path, digest, manifest):
        return path
    record, spec = load_record(digest, store, manifest)
    blobs = {name: sha for name, sha, _ in record.files}
    header = layout(spec, digest, manifest)
    encoded = msgspec.msgpack.encode(header)
    start = _aligned(_PREFIX.size + len(encoded), PAYLOAD_ALIGNMENT)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    try:
        with open(handle, "wb") as out:
            out.seek(start)
            crc = _write_payload(out, spec, header, blobs, store)
            out.seek(0)
            out.write(_PREFIX.pack(_MAGIC, LAYOUT_VERSION, len(encoded), zlib.crc32(encoded), crc))
            out.write(encoded)
            out.flush()
            os.fsync(out.fileno())
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)
    return path


def read_header(path: Path) -> tuple[BlockHeader, int]:
    """The header and the payload's offset in the file (a multiple of 4096).

    FileNotFoundError; BlobDamaged for a file that is cut off, too long, or whose header is damaged or of another
    layout version (`pack` then builds it again). The payload is not read: see `verify_block`."""
    header, start, _ = _read(path)
    return header, start


def verify_block(path: Path) -> None:
    """Reads the whole file. BlobDamaged if the payload is not what `pack` wrote; FileNotFoundError."""
    header, start, expected = _read(path)
    crc = 0
    with path.open("rb") as stream:
        stream.seek(start)
        while chunk := stream.read(CHUNK_BYTES):
            crc = zlib.crc32(chunk, crc)
    if crc != expected:
        raise BlobDamaged(header.digest, f"the payload of block file {path.name} is damaged")


def _read(path: Path) -> tuple[BlockHeader, int, int]:
    digest = path.stem
    with path.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        raw = stream.read(_PREFIX.size)
        if len(raw) != _PREFIX.size or not raw.startswith(_MAGIC):
            raise BlobDamaged(digest, f"{path.name} is no block file")
        _, version, length, header_crc, payload_crc = _PREFIX.unpack(raw)
        if version != LAYOUT_VERSION:
            raise BlobDamaged(digest, f"block file {path.name} has layout version {version}")
        encoded = stream.read(length) if length <= size else b""
    if len(encoded) != length or zlib.crc32(encoded) != header_crc:
        raise BlobDamaged(digest, f"the header of block file {path.name} is damaged")
    try:
        header = msgspec.msgpack.decode(encoded, type=BlockHeader)
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise BlobDamaged(digest, f"the header of block file {path.name} is damaged: {error}") from error
    start = _aligned(_PREFIX.size + length, PAYLOAD_ALIGNMENT)
    if size != start + header.payload_bytes:
        raise BlobDamaged(digest, f"block file {path.name} has {size} bytes instead of {start + header.payload_bytes}")
    return header, start, payload_crc


def _is_whole(path: Path, digest: str, manifest: Manifest) -> bool:
    try:
        header, _ = read_header(path)
    except (FileNotFoundError, BlobDamaged):
        return False
    return (header.digest, header.fingerprint, header.dtype) == (digest, manifest.fingerprint, manifest.dtype)


def _write_payload(out: BinaryIO, spec: AdapterSpec, header: BlockHeader, blobs: dict[str, str], store: Blobs) -> int:
    """Writes the payload from the stream's position on; gives its crc32."""
    crc = written = 0
    streams: dict[str, BufferedReader] = {}

    def emit(data: memoryview | bytes) -> None:
        nonlocal crc, written
        out.write(data)
        crc = zlib.crc32(data, crc)
        written += len(data)

    def tensor(target: TargetSpec, ref: TensorRef, transposed: bool) -> None:
        # Plain reads into small buffers, not a memory map: a file cut short while mapped would kill the process.
        stream = streams.get(ref.file)
        if stream is None:
            stream = streams[ref.file] = store.open(blobs[ref.file])
        rows, columns = ref.shape
        result = np.empty((columns, rows), STORAGE[header.dtype]) if transposed else None
        done = 0
        for chunk in read_rows(stream, ref, blobs[ref.file]):
            values = convert(chunk, SAFETENSORS[ref.dtype], header.dtype)
            if count_nonfinite(values, header.dtype):
                side = "lora_B" if transposed else "lora_A"
                raise AdapterUnavailable(
                    header.digest, f"{side} of {target.module} has values that are not finite in {header.dtype}"
                )
            if result is None:
                emit(np.ascontiguousarray(values).data.cast("B"))
            else:
                result[:, done : done + len(values)] = values.T
            done += len(values)
        if result is not None:
            emit(result.data.cast("B"))
        emit(bytes(_aligned(written, TENSOR_ALIGNMENT) - written))

    try:
        for target in spec.targets:
            tensor(target, target.a, transposed=False)
            tensor(target, target.b, transposed=True)
    finally:
        for stream in streams.values():
            stream.close()
    if written != header.payload_bytes:
        raise AdapterUnavailable(header.digest, f"packed {written} bytes instead of {header.payload_bytes}")
    return crc


def read_rows(stream: BufferedReader, ref: TensorRef, sha: str) -> Iterator[Array]:
    """A 2-D tensor in chunks of whole rows, [n, columns] each, a few MB, in its storage dtype. BlobDamaged when the
    file ends too early."""
    dtype = STORAGE[SAFETENSORS[ref.dtype]]
    rows, columns = ref.shape
    step = max(1, CHUNK_BYTES // (columns * dtype.itemsize))
    stream.seek(ref.begin)
    for first in range(0, rows, step):
        chunk = np.empty((min(step, rows - first), columns), dtype)
        if stream.readinto(chunk.data.cast("B")) != chunk.nbytes:
            raise BlobDamaged(sha, f"{ref.file} ends inside a tensor")
        yield chunk


def _aligned(position: int, alignment: int) -> int:
    return -(-position // alignment) * alignment

"""One adapter as one contiguous string of bytes in the compute dtype: what the loader copies to the device in one go.

Payload: for every target in order of its index, A [rank, in_features] and then B as [rank, out_features] (the file's B,
transposed), row-major; whole rows of true rank, no padding but to multiples of 16 bytes between tensors and at the end.
The file is a cache that can always be rebuilt from the adapter's own files; it is found by digest, base fingerprint,
dtype and layout version:

    prefix (struct _PREFIX) | BlockHeader as msgpack | zeros up to a multiple of 4096 | payload

Whoever reads a payload checks it (`checksums`), every time: a disk that loses bits does not lose them before the first
read only.
"""

from __future__ import annotations

import errno
import os
import struct
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO, Literal

import msgspec
import numpy as np

from adapters.blobs import Blobs, fsync_folder
from adapters.block_files import LAYOUT_VERSION, block_path
from adapters.convert import SAFETENSORS, STORAGE, Array, convert, count_nonfinite
from adapters.disk import require_space
from adapters.errors import AdapterUnavailable, BlobDamaged
from adapters.manifest import Manifest
from adapters.peft_format import AdapterSpec, TargetSpec, load_record
from adapters.safetensors_header import TensorRef

TENSOR_ALIGNMENT = 16
PAYLOAD_ALIGNMENT = 4096
"""The payload starts on a page, so that it can be mapped or read past the page cache."""
CHUNK_BYTES = 4 << 20
CHECKED_BYTES = 8 << 20
"""The payload has one checksum for each piece of this size, and one for the rest."""

_CHECKSUM_BYTES = 4
_COLUMNS = 511
_MAGIC = b"LPBLOCK\n"
_PREFIX = struct.Struct("<8sIII")  # magic, layout version, header bytes, header crc32


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
    checksums: bytes
    """`checksums` of the payload."""
    entries: tuple[BlockEntry, ...]


def checksums(data: memoryview | Array) -> bytes:
    """Four bytes for every CHECKED_BYTES of `data`, and for what is left; its size is a multiple of 8.

    The CRC-32 of the piece as rows of 511 little-endian 64-bit integers added up column by column, and of the words
    that fill no row. Additions run as fast as memory is read, in two calls without the interpreter's lock: 84 MB take
    5 to 7 ms here, zlib's CRC-32 of all of them 24, reading them from the page cache 15. One wrong word always changes
    its column's sum; 511 is odd, so that pages of 512 words that are swapped or written twice change columns too."""
    words, per_piece = np.frombuffer(data, "<u8"), CHECKED_BYTES // 8
    whole = len(words) // per_piece * per_piece
    result = bytearray()
    for pieces in (words[:whole].reshape(-1, per_piece), words[whole:].reshape(1, -1)):
        rows = pieces.shape[1] // _COLUMNS
        end = rows * _COLUMNS
        sums = np.add.reduce(pieces[:, :end].reshape(len(pieces), rows, _COLUMNS), axis=1)
        if pieces.size:
            for columns, rest in zip(sums, pieces[:, end:], strict=True):
                result += struct.pack("<I", zlib.crc32(rest.tobytes(), zlib.crc32(columns.tobytes())))
    return bytes(result)


def layout(spec: AdapterSpec, digest: str, manifest: Manifest) -> BlockHeader:
    """Where every tensor of `spec` goes. No file is read: the checksums are zeros."""
    itemsize = STORAGE[manifest.dtype].itemsize
    position, entries = 0, []
    for target in spec.targets:
        a_offset = position
        b_offset = _aligned(a_offset + target.rank * target.a.shape[1] * itemsize, TENSOR_ALIGNMENT)
        position = _aligned(b_offset + target.rank * target.b.shape[0] * itemsize, TENSOR_ALIGNMENT)
        entries.append(BlockEntry(target.index, target.rank, target.scale, a_offset // itemsize, b_offset // itemsize))
    unknown = bytes(_CHECKSUM_BYTES * pieces_of(position))
    return BlockHeader(digest, manifest.fingerprint, manifest.dtype, LAYOUT_VERSION, position, unknown, tuple(entries))


def pack(digest: str, store: Blobs, manifest: Manifest, cache_dir: Path) -> Path:
    """The block file of adapter version `digest`, built if it is absent or damaged, for which one that is there is read
    to its end; memory: some 20 MB and one B.

    Atomic and idempotent: concurrent calls give the same file. AdapterMissing, BlobDamaged (of the adapter's files),
    AdapterRefused (it does not fit this base), AdapterUnavailable (a value is too large for the compute dtype), OSError
    (ENOSPC: the disk would have less left than disk.RESERVE_BYTES)."""
    path = block_path(cache_dir, digest, manifest)
    if _is_whole(path, digest, manifest):
        return path
    record, spec = load_record(digest, store, manifest)
    blobs = {name: sha for name, sha, _ in record.files}
    header = layout(spec, digest, manifest)
    # The checksums come when the payload is written, and change nothing in the header's size.
    start = _aligned(_PREFIX.size + len(msgspec.msgpack.encode(header)), PAYLOAD_ALIGNMENT)
    path.parent.mkdir(parents=True, exist_ok=True)
    require_space(path.parent, start + header.payload_bytes)
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    try:
        with open(handle, "wb") as out:
            out.seek(start)
            sums = _write_payload(out, spec, header, blobs, store)
            encoded = msgspec.msgpack.encode(msgspec.structs.replace(header, checksums=sums))
            out.seek(0)
            out.write(_PREFIX.pack(_MAGIC, LAYOUT_VERSION, len(encoded), zlib.crc32(encoded)))
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

    FileNotFoundError; BlobDamaged for a file that is cut off, too long, or whose header is damaged, unreadable or of
    another layout version (`pack` then builds it again). The payload is not read: see `read_payload`."""
    digest = path.stem
    with unreadable_is_damaged(digest), path.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        raw = stream.read(_PREFIX.size)
        if len(raw) != _PREFIX.size or not raw.startswith(_MAGIC):
            raise BlobDamaged(digest, f"{path.name} is no block file")
        _, version, length, header_crc = _PREFIX.unpack(raw)
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
    return header, start


def read_payload(
    descriptor: int, position: int, memory: memoryview, expected: bytes, digest: str, *, following: int = 0
) -> None:
    """Fills `memory` from this position of the file on, and checks it: bytes of the payload of block `digest`, from a
    multiple of CHECKED_BYTES to another or to its end, and `expected` their checksums. The payload has `following`
    bytes more. Threads may share the descriptor.

    BlobDamaged if they cannot be read, end too early or differ: `memory` then holds nothing of use."""
    done = 0
    with unreadable_is_damaged(digest):
        while done < len(memory):
            count = os.preadv(descriptor, [memory[done:]], position + done)
            if not count:
                raise BlobDamaged(digest, f"its block file ends {len(memory) - done + following} bytes too early")
            done += count
    if checksums(memory) != expected:
        raise BlobDamaged(digest, "the payload of its block file is damaged")


def verify_block(path: Path) -> BlockHeader:
    """Reads the whole file; gives its header. BlobDamaged if it is not what `pack` wrote; FileNotFoundError."""
    header, start = read_header(path)
    buffer = memoryview(bytearray(min(CHECKED_BYTES, header.payload_bytes)))
    with path.open("rb", buffering=0) as file:
        for number in range(pieces_of(header.payload_bytes)):
            begin, end = piece_at(number, header.payload_bytes)
            expected = checksum_of(header.checksums, number)
            read_payload(file.fileno(), start + begin, buffer[: end - begin], expected, header.digest)
    return header


def pieces_of(nbytes: int) -> int:
    """How many pieces, each with a checksum, a payload of this size has."""
    return -(-nbytes // CHECKED_BYTES)


def piece_at(number: int, nbytes: int) -> tuple[int, int]:
    """Where the piece with this number, from 0, begins and ends in a payload of `nbytes`."""
    return number * CHECKED_BYTES, min((number + 1) * CHECKED_BYTES, nbytes)


def checksum_of(sums: bytes, piece: int) -> bytes:
    """The one of the piece with this number, from 0, among `checksums`."""
    return sums[piece * _CHECKSUM_BYTES : (piece + 1) * _CHECKSUM_BYTES]


@contextmanager
def unreadable_is_damaged(digest: str) -> Iterator[None]:
    """What the disk cannot give back (EIO) is as good as changed, and can be built again elsewhere."""
    try:
        yield
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        raise BlobDamaged(digest, f"its block file cannot be read: {error}") from error


def _is_whole(path: Path, digest: str, manifest: Manifest) -> bool:
    try:
        header = verify_block(path)
    except (FileNotFoundError, BlobDamaged):
        return False
    return (header.digest, header.fingerprint, header.dtype) == (digest, manifest.fingerprint, manifest.dtype)


class _Sums:
    """`checksums` of what comes in pieces of any size."""

    def __init__(self) -> None:
        self._buffer = memoryview(bytearray(CHECKED_BYTES))
        self._filled = 0
        self._done = bytearray()

    def add(self, data: memoryview | bytes) -> None:
        rest = memoryview(data)
        while rest:
            count = min(len(rest), CHECKED_BYTES - self._filled)
            self._buffer[self._filled : self._filled + count] = rest[:count]
            self._filled += count
            rest = rest[count:]
            if self._filled == CHECKED_BYTES:
                self._done += checksums(self._buffer)
                self._filled = 0

    def result(self) -> bytes:
        return bytes(self._done) + (checksums(self._buffer[: self._filled]) if self._filled else b"")


def _write_payload(out: BinaryIO, spec: AdapterSpec, header: BlockHeader, blobs: dict[str, str], store: Blobs) -> bytes:
    """Writes the payload from the stream's position on; gives its checksums."""
    written, sums = 0, _Sums()
    streams: dict[str, BufferedReader] = {}

    def emit(data: memoryview | bytes) -> None:
        nonlocal written
        out.write(data)
        sums.add(data)
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
    return sums.result()


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

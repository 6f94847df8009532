"""The header of a safetensors file, read from files that strangers upload.

Format (https://github.com/huggingface/safetensors#format): 8 bytes little-endian header length N, N bytes of JSON
{name: {"dtype", "shape", "data_offsets": [begin, end]}, "__metadata__": {str: str}}, then the data; offsets are
relative to the data, which they must cover from first to last byte without hole or overlap. Only the header is read,
so a file of any size costs the same, and no size it states is trusted before it is compared with the file's.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from adapters.errors import AdapterRefused, capped, shown

MAX_HEADER_BYTES = 8 << 20
"""The format allows 100 MB; an adapter of 126 layers and 7 targets needs 0.3 MB."""
MAX_NAME_CHARS = 1024
MAX_DIMENSIONS = 8

DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "F8_E8M0": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8, "C64": 8,
}  # fmt: skip


_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


class TensorRef(msgspec.Struct, frozen=True):
    """Where one tensor lies. `begin` and `end` are absolute byte offsets in `file`; row-major, little-endian."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class Header(msgspec.Struct, frozen=True):
    """The tensors of one file, in the order of their bytes."""

    file: str
    tensors: dict[str, TensorRef]
    metadata: dict[str, str]
    file_bytes: int


class DuplicateKeyError(ValueError):
    """The same key twice in one JSON object: readers disagree on which one counts."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise DuplicateKeyError(f"key {shown(key)} appears twice")
            seen.add(key)
    return result


def load_json(data: bytes) -> Any:
    """Untrusted JSON (UTF-8); NaN and Infinity are accepted as Python's writer makes them.

    ValueError for anything else: bad encoding, bad syntax, duplicate keys, nesting or numbers beyond the parser, and
    escapes of half a character, which Python alone accepts: no text with them can be written again."""
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_unique)
        if _SURROGATE.search(data):
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        return value
    except UnicodeEncodeError as error:
        raise ValueError("it has half of a surrogate pair") from error
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def read_header(path: Path, file: str | None = None) -> Header:
    """Reads and checks the header of the safetensors file at `path`; `file` is the name to use for it in messages and
    references. AdapterRefused with every reason if the file is not exactly what the format demands."""
    with path.open("rb") as stream:
        return read_header_from(stream, os.fstat(stream.fileno()).st_size, file if file is not None else path.name)


def read_header_from(stream: BinaryIO, file_bytes: int, file: str) -> Header:
    """As `read_header`, from a stream at its start; `file_bytes` is the size of the whole file."""
    prefix = stream.read(8)
    if len(prefix) < 8:
        raise AdapterRefused([f"{file}: {file_bytes} bytes is too short for a safetensors file"])
    length = int.from_bytes(prefix, "little")
    if length > file_bytes - 8:
        raise AdapterRefused([f"{file}: not a safetensors file, or cut off: it states a header of {length} bytes"])
    if length > MAX_HEADER_BYTES:
        raise AdapterRefused([f"{file}: its header has {length} bytes, at most {MAX_HEADER_BYTES} are accepted"])
    raw = stream.read(length)
    if len(raw) != length or not raw.startswith(b"{"):
        raise AdapterRefused([f"{file}: not a safetensors file: the header is no JSON object"])
    try:
        entries = load_json(raw)
    except ValueError as error:
        raise AdapterRefused([f"{file}: the header is not valid JSON: {shown(str(error), 200)}"]) from error
    return _check(entries, 8 + length, file_bytes, file)


def _check(entries: dict[str, Any], data_start: int, file_bytes: int, file: str) -> Header:
    reasons: list[str] = []
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        reasons.append(f"{file}: __metadata__ must map strings to strings")
    tensors: dict[str, TensorRef] = {}
    for name, entry in entries.items():
        fault = _entry_fault(name, entry)
        if fault:
            reasons.append(f"{file}: tensor {shown(name)}: {fault}")
            continue
        begin, end = entry["data_offsets"]
        tensors[name] = TensorRef(file, entry["dtype"], tuple(entry["shape"]), data_start + begin, data_start + end)
    if not reasons:
        tensors = dict(sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)))
        reasons = _layout_faults(tensors, data_start, file_bytes, file)
    if reasons:
        raise AdapterRefused(capped(reasons))
    return Header(file, tensors, metadata, file_bytes)


def _entry_fault(name: str, entry: Any) -> str | None:
    if not name or len(name) > MAX_NAME_CHARS:
        return f"its name must have 1 to {MAX_NAME_CHARS} characters"
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        return "its entry must have exactly dtype, shape and data_offsets"
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        return f"unknown dtype {shown(dtype)}"
    if not _naturals(shape) or len(shape) > MAX_DIMENSIONS:
        return f"shape {shown(shape)} is not a list of at most {MAX_DIMENSIONS} sizes"
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        return f"data_offsets {shown(offsets)} is not [begin, end]"
    nbytes = DTYPE_BYTES[dtype]
    for size in shape:
        nbytes *= size
        if nbytes >= 1 << 63:
            return f"shape {shown(shape)} overflows"
    if offsets[1] - offsets[0] != nbytes:
        return f"{dtype} {shape} needs {nbytes} bytes but data_offsets {offsets} give {offsets[1] - offsets[0]}"
    return None


def _naturals(value: Any) -> bool:
    # `type(...) is int`: a bool is an int to Python, but no size; 2**63 is what any reader's integers hold.
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 63 for item in value)


def _layout_faults(tensors: dict[str, TensorRef], data_start: int, file_bytes: int, file: str) -> list[str]:
    reasons = []
    position = data_start
    for name, ref in tensors.items():
        if ref.begin != position:
            kind = "overlaps the one before it" if ref.begin < position else "leaves a hole before it"
            reasons.append(f"{file}: tensor {shown(name)}: {kind} (begins at byte {ref.begin}, expected {position})")
        position = max(position, ref.end)
    if position != file_bytes:
        reasons.append(f"{file}: its tensors end at byte {position} but the file has {file_bytes} bytes")
    return reasons

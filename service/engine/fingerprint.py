"""What identifies a base model: adapters are made for one, and blocks are packed for one. Imports no torch.

A full hash of 16 GB would cost ten seconds at every start. So every tensor is sampled, each MiB of it in one place,
which sees a training that changes one number in a thousand, wherever it does; 16 GB take about 0.1 s where the kernel
has the pages, and 16,000 reads of one page where it has not, of files that are read whole meanwhile.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

STRIDE = 1 << 20
SAMPLE = 4096
"""A page: fewer bytes cost a disk as much. Of bfloat16 weights 2048 numbers."""
LEAST_SAMPLES = 3


def fingerprint(folder: Path) -> str:
    """Identity of a checkpoint: its config and, of every weight file, name, size, header and samples of every tensor.

    Raises OSError, and ValueError for a config.json that is no JSON object."""
    digest = _of_config(folder)
    digest.update(b"tensors")
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}".encode())
        handle = os.open(path, os.O_RDONLY)
        try:
            # Not read ahead: the pages between the samples would come as well.
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_RANDOM)
            header = _header(handle)
            digest.update(header)
            for begin, end in _tensors(header, size):
                for offset, count in _places(begin, end):
                    digest.update(os.pread(handle, count, offset))
        finally:
            os.close(handle)
    return digest.hexdigest()


def former_fingerprints(folder: Path) -> tuple[str, ...]:
    """What earlier versions of this code gave for the same checkpoint; adapters that they stored are known by it."""
    return (_of_16_samples(folder),)


def _of_16_samples(folder: Path) -> str:
    """16 samples of 64 KiB per file, which do not see every tensor. Do not change: it is stored in catalogues."""
    digest = _of_config(folder)
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}".encode())
        with path.open("rb") as file:
            digest.update(file.read(8 + int.from_bytes(file.read(8), "little")))
            for i in range(16):
                file.seek(size * i // 16)
                digest.update(file.read(65536))
    return digest.hexdigest()


def _of_config(folder: Path) -> Any:
    digest = hashlib.sha256()
    config = json.loads((folder / "config.json").read_text())
    for volatile in ("transformers_version", "_name_or_path", "torch_dtype", "dtype"):
        config.pop(volatile, None)
    digest.update(json.dumps(config, sort_keys=True).encode())
    return digest


def _header(handle: int) -> bytes:
    """Length and JSON, as they stand in the file."""
    length = int.from_bytes(os.pread(handle, 8, 0), "little")
    return os.pread(handle, 8 + min(length, os.fstat(handle).st_size), 0)


def _tensors(header: bytes, size: int) -> list[tuple[int, int]]:
    """Where each tensor begins and ends in the file; of a file that the model is not loaded from, and that may be
    anything, all that follows the header as one."""
    try:
        entries = json.loads(header[8:])
        spans = [entry["data_offsets"] for name, entry in entries.items() if name != "__metadata__"]
        return sorted((len(header) + int(begin), len(header) + int(end)) for begin, end in spans)
    except (ValueError, KeyError, TypeError, AttributeError):
        return [(len(header), size)]


def _places(begin: int, end: int) -> Iterator[tuple[int, int]]:
    """(offset, bytes) of the samples: the first and the last bytes, and as many between as there are strides."""
    count = max(LEAST_SAMPLES, -(-(end - begin) // STRIDE))
    if end - begin <= count * SAMPLE:
        yield begin, end - begin
        return
    for i in range(count):
        yield begin + (end - begin - SAMPLE) * i // (count - 1), SAMPLE

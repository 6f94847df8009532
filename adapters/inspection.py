"""All that is checked of an upload before it is accepted. Runs in a worker process; imports no torch.

The files are read twice: once to look for values that are not numbers, once to hash. The second reading comes from the
page cache, and a refused upload is not hashed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import msgspec

from adapters.blobs import INDEX_SUFFIX, AdapterRecord, is_file_name
from adapters.block import read_rows
from adapters.convert import SAFETENSORS, convert, count_nonfinite, may_overflow
from adapters.errors import AdapterRefused, capped, shown
from adapters.manifest import Manifest
from adapters.peft_config import CONFIG_NAME, MAX_CONFIG_BYTES
from adapters.peft_format import MAX_INDEX_BYTES, AdapterSpec, examine
from adapters.safetensors_header import Header, TensorRef, read_header

INDEX_NAME = f"adapter_model{INDEX_SUFFIX}"


class Inspection(msgspec.Struct, frozen=True):
    """An upload that fits: its files by hash, under the names they are given back with, and what they hold."""

    record: AdapterRecord
    spec: AdapterSpec


def inspect_upload(config: Path, weights: Mapping[str, Path], index: Path | None, manifest: Manifest) -> Inspection:
    """`config`: adapter_config.json; `weights`: uploaded file name -> file; `index`: the shards' index, if any.

    AdapterRefused with every reason: names, headers, configuration, binding to the base, NaN, infinities and values
    that the compute dtype cannot hold. Memory: a few MB."""
    reasons = [
        f"weights: {shown(name)} must be a plain name that ends in .safetensors (letters, digits, . _ -)"
        for name in weights
        if not is_file_name(name) or not name.endswith(".safetensors")
    ]
    headers: dict[str, Header] = {}
    if not reasons:
        for name, path in weights.items():
            try:
                headers[name] = read_header(path, name)
            except AdapterRefused as error:
                reasons += error.reasons
    # When a header is unreadable, its tensors would all be reported missing: check the configuration alone.
    readable = None if reasons else headers
    spec, faults = examine(
        _head(config, MAX_CONFIG_BYTES), readable, manifest, _head(index, MAX_INDEX_BYTES) if index else None
    )
    reasons += faults
    for name, header in headers.items():
        reasons += _bad_values(weights[name], header, manifest)
    if reasons or spec is None:
        raise AdapterRefused(capped(reasons))
    files = {CONFIG_NAME: config, **weights}
    if index is not None:
        files[INDEX_NAME] = index
    record = AdapterRecord(tuple(sorted((name, *_sha256(path)) for name, path in files.items())))
    return Inspection(record, spec)


def _head(path: Path, limit: int) -> bytes:
    """The file, or its first bytes if it is larger than anything that could be accepted."""
    with path.open("rb") as stream:
        return stream.read(limit + 1)


def _sha256(path: Path) -> tuple[str, int]:
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
        return digest, stream.tell()


def _bad_values(path: Path, header: Header, manifest: Manifest) -> list[str]:
    """Tensors with NaN or infinite values, or with values that the base's compute dtype cannot hold."""
    reasons = []
    with path.open("rb") as stream:
        for name, ref in header.tensors.items():
            if ref.dtype not in SAFETENSORS or len(ref.shape) != 2 or ref.begin == ref.end:
                continue  # refused for its dtype or shape
            source = SAFETENSORS[ref.dtype]
            bad = overflows = 0
            for chunk in read_rows(stream, _in_rows(ref), header.file):
                bad += count_nonfinite(chunk, source)
                if may_overflow(source, manifest.dtype):
                    overflows += count_nonfinite(convert(chunk, source, manifest.dtype), manifest.dtype)
            if bad:
                reasons.append(f"{ref.file}: tensor {shown(name, 200)}: {bad} values are NaN or infinite")
            elif overflows:
                reasons.append(
                    f"{ref.file}: tensor {shown(name, 200)}: {overflows} values are too large for {manifest.dtype},"
                    " the dtype in which this base runs"
                )
    return reasons


def _in_rows(ref: TensorRef) -> TensorRef:
    """The same bytes as short rows, so that a hostile shape such as [1, 2**30] is read in chunks too."""
    count = ref.shape[0] * ref.shape[1]
    width = next(width for width in (4096, 1024, 256, 64, 16, 4, 1) if count % width == 0)
    return TensorRef(ref.file, ref.dtype, (count // width, width), ref.begin, ref.end)

"""All that is checked of an upload before it is accepted. Runs in a worker process; imports no torch, and numpy only
there: an API process hands the function over, and has no use for it.

The files are read twice: once to look for values that are not numbers, once to hash. The second reading comes from the
page cache, and a refused upload is not hashed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import msgspec

from adapters.blobs import INDEX_SUFFIX, AdapterRecord, is_file_name
from adapters.errors import AdapterRefused, capped, shown
from adapters.manifest import Manifest
from adapters.peft_config import CONFIG_NAME, MAX_CONFIG_BYTES
from adapters.peft_format import MAX_INDEX_BYTES, AdapterSpec, examine
from adapters.safetensors_header import Header, read_header

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
    from adapters.values import bad_values

    for name, header in headers.items():
        reasons += bad_values(weights[name], header, manifest)
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

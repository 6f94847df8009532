"""What must hold of the parsers of uploaded bytes, whatever comes: they accept it or give reasons, and nothing else.

Each check gives whether the input was accepted. Anything that is raised is a fault of the parser.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping

import safetensors

from adapters.errors import AdapterRefused
from adapters.manifest import Manifest
from adapters.peft_config import MAX_RANK, read_config
from adapters.peft_format import examine, parse_adapter
from adapters.safetensors_header import Header, read_header_from

WEIGHTS = "adapter_model.safetensors"


def header_of(content: bytes, file: str = WEIGHTS) -> Header:
    """AdapterRefused."""
    return read_header_from(io.BytesIO(content), len(content), file)


def check_reasons(reasons: list[str]) -> None:
    assert reasons
    assert all(reason and reason.isprintable() for reason in reasons)


def check_config(config: bytes, headers: Mapping[str, Header], manifest: Manifest) -> bool:
    settings, faults = read_config(config)
    if settings is None:
        check_reasons(faults)
    else:
        assert 1 <= settings.r <= MAX_RANK
        assert math.isfinite(settings.lora_alpha)
    spec, reasons = examine(config, headers, manifest)
    if spec is None:
        check_reasons(reasons)
        return False
    assert not reasons
    for target in spec.targets:
        module = manifest.linears[target.index]
        assert target.a.shape == (target.rank, module.in_features)
        assert target.b.shape == (module.out_features, target.rank)
        assert math.isfinite(target.scale)
    return True


def check_file(content: bytes, config: bytes, manifest: Manifest) -> bool:
    """What is accepted, the reference implementation must read as the same tensors."""
    try:
        header = header_of(content)
    except AdapterRefused as error:
        check_reasons(error.reasons)
        return False
    reference = dict(safetensors.deserialize(content))
    assert reference.keys() == header.tensors.keys()
    for name, ref in header.tensors.items():
        assert tuple(reference[name]["shape"]) == ref.shape
        assert bytes(reference[name]["data"]) == content[ref.begin : ref.end]
    _parses(config, {header.file: header}, manifest, None)
    return True


def check_index(index: bytes, config: bytes, headers: Mapping[str, Header], manifest: Manifest) -> bool:
    return _parses(config, headers, manifest, index)


def _parses(config: bytes, headers: Mapping[str, Header], manifest: Manifest, index: bytes | None) -> bool:
    try:
        parse_adapter(config, headers, manifest, index)
    except AdapterRefused as error:
        check_reasons(error.reasons)
        return False
    return True


def encoded(entries: object, data: bytes) -> bytes:
    """A safetensors file with this header, if it is one."""
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text + data

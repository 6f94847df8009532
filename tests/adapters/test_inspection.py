from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file

from adapters.errors import AdapterRefused
from adapters.inspection import Inspection, inspect_upload
from adapters.manifest import Manifest
from adapters.peft_format import parse_adapter

WEIGHTS = "adapter_model.safetensors"
V1 = "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"


def inspect(folder: Path, manifest: Manifest, index: Path | None = None) -> Inspection:
    weights = {path.name: path for path in folder.glob("*.safetensors")}
    return inspect_upload(folder / "adapter_config.json", weights, index, manifest)


def reasons(folder: Path, manifest: Manifest, index: Path | None = None) -> list[str]:
    with pytest.raises(AdapterRefused) as caught:
        inspect(folder, manifest, index)
    return caught.value.reasons


def test_record_and_spec(adapter: Path, manifest: Manifest, headers_of: Any) -> None:
    found = inspect(adapter, manifest)
    config = (adapter / "adapter_config.json").read_bytes()
    weights = (adapter / WEIGHTS).read_bytes()
    assert found.record.files == (
        ("adapter_config.json", hashlib.sha256(config).hexdigest(), len(config)),
        (WEIGHTS, hashlib.sha256(weights).hexdigest(), len(weights)),
    )
    assert found.spec == parse_adapter(config, headers_of(adapter), manifest)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(found), type=Inspection) == found


def test_the_spooled_files_may_have_any_name(adapter: Path, manifest: Manifest, tmp_path: Path) -> None:
    (adapter / "adapter_config.json").rename(tmp_path / "0")
    (adapter / WEIGHTS).rename(tmp_path / "1")
    found = inspect_upload(tmp_path / "0", {"mine.safetensors": tmp_path / "1"}, None, manifest)
    assert [name for name, _, _ in found.record.files] == ["adapter_config.json", "mine.safetensors"]
    assert {target.a.file for target in found.spec.targets} == {"mine.safetensors"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [(0, 0), (15, 3)])
def test_values_that_are_not_numbers(
    adapter: Path, manifest: Manifest, dtype: torch.dtype, value: float, place: tuple[int, int]
) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(adapter / WEIGHTS).items()}
    tensors[V1][place] = value
    save_file(tensors, adapter / WEIGHTS)
    (reason,) = reasons(adapter, manifest)
    assert V1 in reason
    assert "1 values are NaN or infinite" in reason


@pytest.mark.parametrize(
    ("dtype", "value", "fits"),
    [
        ("float16", 65504.0, True), ("float16", 65519.9, True), ("float16", 65520.0, False), ("bfloat16", 1e38, True),
        ("bfloat16", 3.4e38, False), ("float32", 3.4e38, True),
    ],
)  # fmt: skip
def test_values_too_large_for_the_base(adapter: Path, manifest: Manifest, dtype: Any, value: float, fits: bool) -> None:
    tensors = load_file(adapter / WEIGHTS)
    tensors[V1][2, 2] = value
    save_file(tensors, adapter / WEIGHTS)
    base = msgspec.structs.replace(manifest, dtype=dtype)
    if fits:
        inspect(adapter, base)
    else:
        (reason,) = reasons(adapter, base)
        assert V1 in reason
        assert dtype in reason


def test_all_reasons_come_together(adapter: Path, manifest: Manifest) -> None:
    config = json.loads((adapter / "adapter_config.json").read_bytes())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "use_dora": True, "bias": "all"}))
    tensors = load_file(adapter / WEIGHTS)
    tensors[V1][0, 0] = float("nan")
    tensors["junk"] = torch.zeros(1)
    save_file(tensors, adapter / WEIGHTS)
    found = reasons(adapter, manifest)
    for word in ("use_dora", "bias", "junk", "NaN"):
        assert any(word in reason for reason in found), word


def test_a_broken_header_hides_no_other_reason(adapter: Path, manifest: Manifest) -> None:
    config = json.loads((adapter / "adapter_config.json").read_bytes())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "use_dora": True}))
    (adapter / WEIGHTS).write_bytes((adapter / WEIGHTS).read_bytes()[:-1])
    found = reasons(adapter, manifest)
    assert len(found) == 2
    assert any("use_dora" in reason for reason in found)
    assert any(WEIGHTS in reason for reason in found)


@pytest.mark.parametrize(
    "name",
    ["adapter_model.bin", "../x.safetensors", "a/b.safetensors", ".safetensors", "x\n.safetensors", "", "x" * 200],
)
def test_file_names(adapter: Path, manifest: Manifest, name: str) -> None:
    with pytest.raises(AdapterRefused, match=r"must be a plain name that ends in \.safetensors"):
        inspect_upload(adapter / "adapter_config.json", {name: adapter / WEIGHTS}, None, manifest)


def test_a_pickle_is_no_safetensors_file(adapter: Path, manifest: Manifest) -> None:
    torch.save({"x": torch.zeros(3)}, adapter / WEIGHTS)
    (reason,) = reasons(adapter, manifest)
    assert "not a safetensors file" in reason


def test_nothing_uploaded(adapter: Path, manifest: Manifest) -> None:
    with pytest.raises(AdapterRefused, match="no weights"):
        inspect_upload(adapter / "adapter_config.json", {}, None, manifest)


def test_huge_config_and_index(adapter: Path, manifest: Manifest, tmp_path: Path) -> None:
    config = adapter / "adapter_config.json"
    index = tmp_path / "index"
    index.write_bytes(b" " * (9 << 20))
    assert any("index: " in reason for reason in reasons(adapter, manifest, index))
    config.write_bytes(config.read_bytes() + b" " * (2 << 20))
    assert any("adapter_config.json: " in reason for reason in reasons(adapter, manifest))


def test_hostile_shapes_are_read_in_pieces(adapter: Path, manifest: Manifest) -> None:
    """One very long row: refused for its shape, having been scanned like any other."""
    tensors = load_file(adapter / WEIGHTS)
    tensors["junk"] = torch.full((1, 3_000_001), float("nan"))
    tensors["flat"] = torch.full((5,), float("nan"))
    tensors["none"] = torch.zeros((0, 5))
    save_file(tensors, adapter / WEIGHTS)
    assert any("3000001 values are NaN" in reason for reason in reasons(adapter, manifest))

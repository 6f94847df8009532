"""The identity of a base: any training changes it, nothing else does, and the one before it stays what it was."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from service.engine.fingerprint import SAMPLE, STRIDE, fingerprint, former_fingerprints

SHAPES = {
    "embed": (3000, 600), "layers.0.q": (512, 512), "layers.0.norm": (600,), "layers.1.q": (700, 1500),
    "layers.1.bias": (1,), "layers.1.norm": (5000,), "empty": (0, 4),
}  # fmt: skip


def write(folder: Path, tensors: dict[str, np.ndarray], **config: object) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"hidden_size": 4, **config}))
    half = len(tensors) // 2
    for number, names in enumerate((list(tensors)[:half], list(tensors)[half:]), 1):
        save_file({name: tensors[name] for name in names}, folder / f"model-{number}.safetensors")
    return folder


@pytest.fixture(scope="module")
def tensors() -> dict[str, np.ndarray]:
    """7 MB in float16, more than a stride and less, in two files."""
    rng = np.random.default_rng(3)
    return {name: rng.standard_normal(shape).astype(np.float16) for name, shape in SHAPES.items()}


def test_the_training_of_any_one_tensor_is_seen(tensors: dict[str, np.ndarray], tmp_path: Path) -> None:
    own = fingerprint(write(tmp_path / "base", tensors))
    assert fingerprint(write(tmp_path / "copy", tensors)) == own
    seen = {own}
    for name, tensor in tensors.items():
        if not tensor.size:
            continue
        # What a low learning rate does in 16 bits: one number in a hundred changes, by one unit in the last place.
        bits = tensor.view(np.uint16).copy()
        bits.reshape(-1)[7::100] ^= 1
        if tensor.size < 100:
            bits ^= 1
        seen.add(fingerprint(write(tmp_path / "copy", {**tensors, name: bits.view(np.float16)})))
    assert len(seen) == len(tensors), "some tensors may change unseen"


def test_the_first_and_the_last_bytes_of_a_tensor_count(tensors: dict[str, np.ndarray], tmp_path: Path) -> None:
    own = fingerprint(write(tmp_path / "base", tensors))
    for at in (0, -1):
        changed = tensors["embed"].copy()
        changed.reshape(-1)[at] += 1
        assert fingerprint(write(tmp_path / "base", {**tensors, "embed": changed})) != own


def test_a_mib_is_read_in_one_place_of_a_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cost at each start: 1/256 of what is large, little more of a tensor smaller than a stride."""
    read = 0

    def counted(handle: int, count: int, offset: int) -> bytes:
        nonlocal read
        read += count
        return pread(handle, count, offset)

    import service.engine.fingerprint as module

    pread = module.os.pread
    folder = write(tmp_path, {"a": np.zeros(40 * STRIDE, np.uint8), "b": np.zeros(STRIDE // 2, np.uint8)})
    monkeypatch.setattr(module.os, "pread", counted)
    fingerprint(folder)
    assert (40 + 3) * SAMPLE <= read <= (40 + 3) * SAMPLE + 1000


def test_what_is_no_weight_changes_nothing(tensors: dict[str, np.ndarray], tmp_path: Path) -> None:
    folder = write(tmp_path, tensors)
    own = fingerprint(folder)
    assert fingerprint(write(tmp_path, tensors, transformers_version="9", torch_dtype="float32")) == own
    (folder / "README.md").write_text("hello")
    assert fingerprint(folder) == own
    assert fingerprint(write(tmp_path, tensors, rope_theta=5.0)) != own


def test_a_weight_file_that_nothing_loads_may_be_anything(tensors: dict[str, np.ndarray], tmp_path: Path) -> None:
    folder = write(tmp_path, tensors)
    seen = {fingerprint(folder)}
    for content in (b"", b"x", b"\xff" * 9, b"\x02" + b"\0" * 7 + b"[]", b"\x02" + b"\0" * 7 + b"{}1", b"\0" * 100):
        (folder / "extra.safetensors").write_bytes(content)
        seen.add(fingerprint(folder))
    assert len(seen) == 7


def test_names_of_tensors_and_files_count(tensors: dict[str, np.ndarray], tmp_path: Path) -> None:
    own = fingerprint(write(tmp_path, tensors))
    renamed = {("layers.9.q" if name == "layers.1.q" else name): tensor for name, tensor in tensors.items()}
    assert fingerprint(write(tmp_path, renamed)) != own
    folder = write(tmp_path, tensors)
    assert load_file(folder / "model-1.safetensors").keys() | load_file(folder / "model-2.safetensors").keys() == set(
        tensors
    )
    assert fingerprint(folder) == own
    (folder / "model-1.safetensors").rename(folder / "model-3.safetensors")
    assert fingerprint(folder) != own


def test_what_catalogues_hold_of_earlier_versions(tmp_path: Path) -> None:
    """The numbers are what the function gave when adapters were stored with it: it may never give others."""
    (tmp_path / "config.json").write_text('{"b": 1, "a": [2], "dtype": "float32"}')
    header = b'{"x":{"dtype":"U8","shape":[200000],"data_offsets":[0,200000]}}'
    data = bytes(i * i % 251 for i in range(200_000))
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data)
    assert former_fingerprints(tmp_path) == ("8620ea964ba72b1cc4cb79847a13b250e5f91689f4921b51546acd42244ae600",)

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import SafetensorError, deserialize, safe_open
from safetensors.numpy import save_file

from adapters.errors import AdapterRefused
from adapters.safetensors_header import MAX_HEADER_BYTES, read_header


def raw_file(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(begin: int, end: int, dtype: Any = "F32", shape: Any = None) -> dict[str, Any]:
    return {"dtype": dtype, "shape": [(end - begin) // 4] if shape is None else shape, "data_offsets": [begin, end]}


def refusal(path: Path) -> str:
    with pytest.raises(AdapterRefused) as caught:
        read_header(path)
    assert path.name in str(caught.value)
    return str(caught.value)


def test_reads_what_safetensors_writes(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    arrays = {"x": np.arange(12, dtype=np.float32).reshape(3, 4), "y": np.ones((2, 5), np.float16), "z": np.zeros(0)}
    save_file(arrays, path, metadata={"format": "np"})
    header = read_header(path)
    assert header.metadata == {"format": "np"}
    assert header.file_bytes == path.stat().st_size
    assert header.tensors.keys() == arrays.keys()
    content = path.read_bytes()
    for name, array in arrays.items():
        ref = header.tensors[name]
        assert ref.file == "a.safetensors"
        assert ref.shape == array.shape
        assert content[ref.begin : ref.end] == array.tobytes()


def test_the_name_given_is_the_name_reported(tmp_path: Path) -> None:
    path = raw_file(tmp_path / "spooled", {"x": entry(0, 8)}, bytes(8))
    assert read_header(path, "shard.safetensors").tensors["x"].file == "shard.safetensors"


@pytest.mark.parametrize(
    ("header", "size", "said"),
    [
        ({"x": entry(0, 8), "y": entry(4, 12)}, 12, "overlaps"),
        ({"x": entry(0, 8), "y": entry(12, 20)}, 20, "hole"),
        ({"x": entry(4, 8)}, 8, "hole"),
        ({"x": entry(0, 8)}, 12, "end at byte"),
        ({"x": entry(0, 8)}, 4, "end at byte"),
        ({}, 1, "end at byte"),
        ({"x": entry(0, 8, shape=[3])}, 8, "needs 12 bytes"),
        ({"x": entry(8, 0, shape=[0])}, 8, "data_offsets"),
        ({"x": entry(0, 8, shape=[-2])}, 8, "shape"),
        ({"x": entry(0, 4, shape=[True])}, 4, "shape"),
        ({"x": entry(0, 4, shape=[1.0])}, 4, "shape"),
        ({"x": entry(0, 4, shape=[1] * 9)}, 4, "shape"),
        ({"x": entry(0, 0, shape=[2**40, 2**40, 0])}, 0, "overflows"),
        ({"x": entry(0, 2**70)}, 4, "shape"),
        ({"x": entry(0, 8, dtype="F31")}, 8, "unknown dtype"),
        ({"x": entry(0, 8, dtype=["F32"])}, 8, "unknown dtype"),
        ({"x": {**entry(0, 8), "extra": 1}}, 8, "exactly"),
        ({"x": {"dtype": "F32", "shape": [2]}}, 8, "exactly"),
        ({"x": [1, 2]}, 8, "exactly"),
        ({"": entry(0, 8)}, 8, "name"),
        ({"x" * 2000: entry(0, 8)}, 8, "name"),
        ({"__metadata__": {"a": 1}, "x": entry(0, 8)}, 8, "__metadata__"),
        ({"__metadata__": [], "x": entry(0, 8)}, 8, "__metadata__"),
        (b'{"x":1,"x":2}', 0, "appears twice"),
        (b'{"x":{"dtype":"F32","dtype":"F16","shape":[],"data_offsets":[0,4]}}', 4, "appears twice"),
        (b"[1]", 0, "no JSON object"),
        (b' {"x":1}', 0, "no JSON object"),
        (b'{"x":', 0, "JSON"),
        (b'{"\xff":1}', 0, "JSON"),
        (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", 0, "JSON"),
        (b'{"a":' + b"9" * 10_000 + b"}", 0, "JSON"),
    ],
)
def test_refuses(tmp_path: Path, header: Any, size: int, said: str) -> None:
    assert said in refusal(raw_file(tmp_path / "bad.safetensors", header, bytes(size)))


def test_refuses_by_length(tmp_path: Path) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(b"\x01\x02")
    assert "too short" in refusal(path)
    assert "cut off" in refusal(raw_file(path, b"{}", length=2**63))
    with path.open("wb") as stream:  # sparse: a header that fits the file but not the limit
        stream.write((MAX_HEADER_BYTES + 1).to_bytes(8, "little"))
        stream.truncate(MAX_HEADER_BYTES * 2)
    assert "at most" in refusal(path)


def test_every_reason_and_hostile_names_escaped(tmp_path: Path) -> None:
    header = {"a\n\u202e": entry(0, 8, dtype="?"), "b": entry(0, 8, shape=[9]), "c": [1]}
    with pytest.raises(AdapterRefused) as caught:
        read_header(raw_file(tmp_path / "bad.safetensors", header, bytes(8)))
    assert len(caught.value.reasons) == 3
    assert all(reason.isascii() and reason.isprintable() for reason in caught.value.reasons)


@pytest.mark.parametrize("escape", [r"\ud800", r"\uDFff", r"\udc00\ud800", r"\\\ud83d"])
def test_half_a_character_is_refused_as_safetensors_does(escape: str, tmp_path: Path) -> None:
    for whole, accepted in ((escape, False), (r"\ud83d\ude00", True), (r"\\ud800", True)):
        text = json.dumps({"NAME": entry(0, 8)}).replace("NAME", whole).encode()
        path = raw_file(tmp_path / "file.safetensors", text, bytes(8))
        if accepted:
            assert len(read_header(path).tensors) == len(deserialize(path.read_bytes())) == 1
        else:
            assert "surrogate" in refusal(path)
            with pytest.raises(SafetensorError):
                deserialize(path.read_bytes())


def test_a_huge_file_costs_only_its_header(tmp_path: Path) -> None:
    path = raw_file(tmp_path / "huge.safetensors", {"x": entry(0, 1 << 40, shape=[1 << 38])})
    with path.open("r+b") as stream:
        stream.truncate(path.stat().st_size + (1 << 40))
    assert read_header(path).tensors["x"].end == path.stat().st_size


def test_nothing_is_accepted_that_safetensors_refuses(tmp_path: Path) -> None:
    """Random damage to a good file: what we accept, the reference implementation reads too."""
    good = tmp_path / "good.safetensors"
    save_file({"x": np.ones((3, 4), np.float32), "y": np.ones((2, 5), np.float16), "w": np.ones(7, np.uint8)}, good)
    content = good.read_bytes()
    header_end = 8 + int.from_bytes(content[:8], "little")
    rng = random.Random(0)
    path = tmp_path / "damaged.safetensors"
    accepted = 0
    for _ in range(3000):
        damaged = bytearray(content)
        for _ in range(rng.choice((1, 1, 2, 3))):
            position = rng.randrange(header_end)
            action = rng.random()
            if action < 0.7:
                damaged[position] = (
                    rng.choice(b'0123456789[]{},:" FxyU\x00\xff') if position >= 8 else rng.randrange(256)
                )
            elif action < 0.85:
                del damaged[position]
            else:
                damaged.insert(position, rng.choice(b"0123456789 "))
        path.write_bytes(damaged)
        try:
            header = read_header(path)
        except AdapterRefused:
            continue
        accepted += 1
        try:
            with safe_open(path, "np") as reference:
                assert set(reference.keys()) == header.tensors.keys()
                for name, ref in header.tensors.items():
                    assert tuple(reference.get_slice(name).get_shape()) == ref.shape
        except SafetensorError as error:
            pytest.fail(f"accepted {bytes(damaged[:header_end])!r}: {error}")
    assert accepted > 20

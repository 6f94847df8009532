"""Run by test_block.py in a process of its own: packs a large adapter and prints by how many bytes memory grew."""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path

from adapters.blobs import BlobStore
from adapters.block import pack, verify_block
from adapters.inspection import inspect_upload
from adapters.manifest import Manifest, Module

LAYERS, FEATURES, RANK = 6, 20_000, 256


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main(folder: Path) -> None:
    modules = tuple(Module(f"model.layers.{layer}.q_proj", "linear", FEATURES, FEATURES) for layer in range(LAYERS))
    manifest = Manifest("f", "X", "x", "bfloat16", 10, 10, modules)
    config = folder / "adapter_config.json"
    config.write_text(json.dumps({"peft_type": "LORA", "r": RANK, "lora_alpha": 1, "target_modules": ["q_proj"]}))
    tensors, position = {}, 0
    for module in modules:
        for side, shape in (("A", [RANK, FEATURES]), ("B", [FEATURES, RANK])):
            end = position + 4 * RANK * FEATURES
            name = f"base_model.model.{module.name}.lora_{side}.weight"
            tensors[name] = {"dtype": "F32", "shape": shape, "data_offsets": [position, end]}
            position = end
    header = json.dumps(tensors).encode()
    weights = folder / "adapter_model.safetensors"
    with weights.open("wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
        stream.truncate(8 + len(header) + position)
    store = BlobStore(folder / "blobs")
    before = peak()
    record = inspect_upload(config, {weights.name: weights}, None, manifest).record
    for (_, sha, _), path in zip(record.files, (config, weights), strict=True):
        store.put(path, sha, move=True)
    store.put_bytes(record.to_json())
    verify_block(pack(record.digest, store, manifest, folder / "cache"))
    sys.stdout.write(str(peak() - before))


main(Path(sys.argv[1]))

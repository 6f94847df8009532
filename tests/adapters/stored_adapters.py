"""Small adapters in a real blob store, and the bytes that their blocks must have, worked out here independently."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from adapters.arena import Arena
from adapters.blobs import BlobStore
from adapters.inspection import inspect_upload
from adapters.manifest import Manifest, Module

NAMES = ("q_proj", "k_proj", "down_proj")
SHAPES = ((32, 32), (32, 16), (64, 32))
"""(in, out) of each, in every one of two layers."""


def make_manifest(dtype: str = "float32", fingerprint: str = "tiny") -> Manifest:
    modules = tuple(
        Module(f"model.layers.{layer}.self_attn.{name}", "linear", k, d)
        for layer in range(2)
        for name, (k, d) in zip(NAMES, SHAPES, strict=True)
    )
    return Manifest(fingerprint, "LlamaForCausalLM", "llama", dtype, 64, 64, modules)


@dataclass
class StoredAdapter:
    digest: str
    rank: int
    factors: dict[int, tuple[torch.Tensor, torch.Tensor]]
    """target index -> lora_A [r, k], lora_B [d, r], float32."""

    def check(self, arena: Arena, row: int) -> None:
        """AssertionError unless the arena holds this adapter in `row`, as seen through the device's table."""
        for target in range(arena.ranks.shape[1]):
            rank = int(arena.ranks[row, target])
            if target not in self.factors:
                assert rank == 0
                continue
            a, b = self.factors[target]
            assert rank == self.rank
            begin_a, begin_b = arena.offsets[row, target].tolist()
            found_a = arena.data[begin_a : begin_a + a.numel()].view(a.shape)
            found_b = arena.data[begin_b : begin_b + b.numel()].view(b.shape[1], b.shape[0])
            assert torch.equal(found_a.cpu(), a.to(arena.data.dtype))
            assert torch.equal(found_b.cpu(), b.t().to(arena.data.dtype))
            assert float(arena.scales[row, target]) == 2.0


def store_adapter(store: BlobStore, manifest: Manifest, folder: Path, seed: int, rank: int = 4) -> StoredAdapter:
    """Puts a random adapter into the store as an upload would; odd seeds leave the down projections out."""
    generator = torch.Generator().manual_seed(seed)
    names = NAMES[:2] if seed % 2 else NAMES
    tensors, factors = {}, {}
    for index, module in enumerate(manifest.linears):
        if module.name.rsplit(".", 1)[1] not in names:
            continue
        a = torch.randn(rank, module.in_features, generator=generator)
        b = torch.randn(module.out_features, rank, generator=generator)
        factors[index] = a, b
        tensors[f"base_model.model.{module.name}.lora_A.weight"] = a
        tensors[f"base_model.model.{module.name}.lora_B.weight"] = b
    folder = folder / f"upload{seed}"
    folder.mkdir()
    config = folder / "adapter_config.json"
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 2 * rank}
    config.write_text(json.dumps({**settings, "target_modules": list(names), "bias": "none"}))
    weights = folder / "adapter_model.safetensors"
    save_file(tensors, weights, metadata={"format": "pt"})
    record = inspect_upload(config, {weights.name: weights}, None, manifest).record
    for name, sha, _ in record.files:
        store.put(folder / name, sha)
    store.put_bytes(record.to_json())
    return StoredAdapter(record.digest, rank, factors)


def block_bytes(adapter: StoredAdapter, dtype: str = "float32") -> int:
    size = np.dtype("f4").itemsize if dtype == "float32" else 2
    return sum(a.numel() + b.numel() for a, b in adapter.factors.values()) * size

"""Launch configurations of the LoRA kernels: tuned.json where it knows the case, a sane default elsewhere.

`python -m benchmarks.step_tuning` measures and writes tuned.json. A case is the size of the tiles, whether there are
few of them, and the rank bucket; nothing in it depends on the model's shapes.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from adapters.kernels.device_plan import WALKED, rank_block

TUNED = Path(__file__).with_name("tuned.json")
FEW = 8
"""Plans of at most so many entries leave most of the device idle: their items are smaller."""


@dataclass(frozen=True, slots=True)
class ShrinkConfig:
    """x [., k] A^T: an item is one tile, one target, `block_r` ranks and `share` elements of k, or more."""

    block_r: int
    block_k: int
    share: int
    num_warps: int
    num_stages: int
    programs: int
    """Programs per multiprocessor at most; where there are fewer than items, each walks several."""
    most_splits: int = 64
    """Where ranks are walked in blocks, expand holds every split of a block in shared memory, several times over."""

    def splits(self, k: int) -> int:
        """Items among which k is divided."""
        return max(1, min(self.most_splits, k // max(self.share, self.block_k)))


@dataclass(frozen=True, slots=True)
class ExpandConfig:
    """s [., r] B: an item is one tile and `chunk` columns of one target, `block_n` at a time; all of them at once for
    more than `block_r` ranks, which are walked, and for a tile of one token where each item has its own program."""

    block_r: int
    block_n: int
    chunk: int
    num_warps: int
    num_stages: int
    programs: int
    """As for shrink; 0: one for each item (expand_small_kernel), for ranks that fit one block."""
    registers: int = 0
    """Of a thread at most; 0: the compiler chooses."""


def key(kernel: str, entries: int, bucket: int, block_m: int) -> str:
    return f"{kernel}/m{block_m}/r{bucket}" + ("/few" if entries <= FEW else "")


@lru_cache(maxsize=1)
def _file() -> dict[str, dict[str, Any]]:
    try:
        return json.loads(TUNED.read_text())
    except FileNotFoundError:
        return {"measured": {}, "configs": {}}


def _table() -> dict[str, dict[str, int]]:
    return _file()["configs"]


def save(configs: dict[str, ShrinkConfig | ExpandConfig], note: dict[str, Any]) -> None:
    """Adds to tuned.json (same keys are replaced); note: where and with what versions these were measured."""
    known = {"measured": dict.fromkeys(configs, note), "configs": {name: asdict(c) for name, c in configs.items()}}
    merged = {part: dict(sorted((_file()[part] | new).items())) for part, new in known.items()}
    TUNED.write_text(json.dumps(merged, indent=1) + "\n")
    forget()


def forget() -> None:
    """Reads tuned.json again at the next question."""
    for cached in (_file, shrink_config, expand_config):
        cached.cache_clear()


@lru_cache(maxsize=4096)
def shrink_config(entries: int, bucket: int, block_m: int, element_size: int) -> ShrinkConfig:
    """entries: capacity of the plan; element_size: bytes of the compute dtype."""
    tuned = _table().get(key("shrink", entries, bucket, block_m)) if element_size == 2 else None
    if tuned is not None:
        return ShrinkConfig(**tuned)
    narrow = bucket <= WALKED
    block_r = bucket if narrow else rank_block(block_m)
    if block_m > 16:
        # Few splits: expand reads them all for each of many tokens.
        share = 1024 if narrow else 2048
        return ShrinkConfig(block_r, 128 // element_size, share, num_warps=4, num_stages=4, programs=8, most_splits=4)
    if narrow:
        share = 256 if entries <= FEW else 512
        return ShrinkConfig(block_r, 256 // element_size, share, num_warps=4, num_stages=3, programs=32)
    share = 512 if entries <= FEW else 1024
    return ShrinkConfig(block_r, 256 // element_size, share, num_warps=2, num_stages=3, programs=32, most_splits=8)


@lru_cache(maxsize=4096)
def expand_config(entries: int, bucket: int, block_m: int, element_size: int) -> ExpandConfig:
    """Arguments as for shrink_config."""
    tuned = _table().get(key("expand", entries, bucket, block_m)) if element_size == 2 else None
    if tuned is not None:
        return ExpandConfig(**tuned)
    columns = 512 // element_size
    if bucket > WALKED:
        if block_m > 16:
            return ExpandConfig(32, columns // 2, columns, num_warps=4, num_stages=2, programs=8)
        return ExpandConfig(16, columns, columns, num_warps=4, num_stages=3, programs=32)
    if block_m > 16:
        return ExpandConfig(bucket, 128, 512, num_warps=4, num_stages=3, programs=4)
    block_n = 256 if bucket * element_size <= 32 else 128
    return ExpandConfig(bucket, block_n, block_n if entries <= FEW else 4 * block_n, 4, 3, 32)

"""Launch configurations of the LoRA kernels: tuned.json where it knows the case, a sane default elsewhere.

`python -m benchmarks.kernels --sweep` measures and writes tuned.json. Keys name what decides the best choice: kernel,
in_features, out_features of the site (rounded up to a power of two), entries of the plan (likewise), rank bucket.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

TUNED = Path(__file__).with_name("tuned.json")


@dataclass(frozen=True, slots=True)
class ShrinkConfig:
    """x [., k] A^T: an item is one tile, one target, `block_r` ranks and a `splits`-th of k."""

    block_r: int
    block_k: int
    splits: int
    num_warps: int
    num_stages: int
    programs: int
    """Programs per multiprocessor; each walks several items."""
    rows: bool = False
    """Tiles of one entry are computed without tensor cores."""


@dataclass(frozen=True, slots=True)
class ExpandConfig:
    """s [., r] B: an item is one tile and `chunk` columns of one target, `block_n` at a time."""

    block_r: int
    block_n: int
    chunk: int
    num_warps: int
    num_stages: int
    programs: int
    rows: bool = False
    """As of ShrinkConfig."""


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n (n >= 1)."""
    return 1 << (max(1, n) - 1).bit_length()


def key(kernel: str, k: int, d: int, entries: int, bucket: int) -> str:
    return f"{kernel}/k{k}/d{power_of_two(d)}/p{power_of_two(entries)}/r{bucket}"


@lru_cache(maxsize=1)
def _table() -> dict[str, dict[str, int]]:
    try:
        return json.loads(TUNED.read_text())["configs"]
    except FileNotFoundError:
        return {}


def _tuned(kernel: str, k: int, d: int, entries: int, bucket: int, block_m: int) -> dict[str, int] | None:
    """The entry for this case, or for the nearest number of entries with the same kind of tiles."""
    sizes = [1 << i for i in range(10)] if block_m == 16 else [1 << i for i in range(10, 17)]
    wanted = power_of_two(entries).bit_length()
    for size in sorted(sizes, key=lambda s: (abs(s.bit_length() - wanted), -s)):
        found = _table().get(key(kernel, k, d, size, bucket))
        if found is not None:
            return found
    return None


def save(configs: dict[str, ShrinkConfig | ExpandConfig], note: dict[str, Any]) -> None:
    """Adds to tuned.json (same keys are replaced); note: where and with what versions they were measured."""
    known = dict(_table())
    known.update({name: asdict(config) for name, config in configs.items()})
    TUNED.write_text(json.dumps({"measured": note, "configs": dict(sorted(known.items()))}, indent=1) + "\n")
    forget()


def forget() -> None:
    """Reads tuned.json again at the next question."""
    for cached in (_table, shrink_config, expand_config):
        cached.cache_clear()


@lru_cache(maxsize=4096)
def shrink_config(k: int, d: int, entries: int, bucket: int, block_m: int, element_size: int) -> ShrinkConfig:
    """k, d: of the site; entries: capacity of the plan; element_size: bytes of the compute dtype."""
    tuned = _tuned("shrink", k, d, entries, bucket, block_m) if element_size == 2 else None
    if tuned is not None:
        return ShrinkConfig(**tuned)
    block_r = min(bucket, 64)
    # About 512 elements of k per item keep latency low for one token; more tiles bring parallelism of their own.
    if block_m > 16:
        block_k, splits, stages = 64, 1 if entries >= 4096 else 4, 3
    else:
        block_k, splits, stages = 128, 16 if entries <= 8 else 8 if entries <= 64 else 4, 4
    while splits > 1 and k < splits * 128:
        splits //= 2
    return ShrinkConfig(block_r, block_k * 2 // element_size, splits, num_warps=4, num_stages=stages, programs=4)


@lru_cache(maxsize=4096)
def expand_config(k: int, d: int, entries: int, bucket: int, block_m: int, element_size: int) -> ExpandConfig:
    """Arguments as for shrink_config."""
    tuned = _tuned("expand", k, d, entries, bucket, block_m) if element_size == 2 else None
    if tuned is not None:
        return ExpandConfig(**tuned)
    # Several blocks of ranks keep more in registers: these sizes compile without spills for sm_90.
    large = bucket > 64
    block_r = 32 if large else bucket
    if block_m > 16:
        return ExpandConfig(block_r, 128, 512, 8 if large else 4, 2 if large else 3, 4)
    block_n = 256 if block_r * element_size <= 32 else 128
    return ExpandConfig(block_r, block_n, block_n if entries <= 8 else 4 * block_n, 4, 2 if large else 3, 4)

"""Where the block files of adapters lie (adapters/block.py says what is in them), and how they go. No numpy: the API
processes delete blocks, and neither write nor read any."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from pathlib import Path

from adapters.manifest import Manifest

LAYOUT_VERSION = 2
"""Of block.py. Raised when the layout changes, so that no older file is found."""


def block_path(cache_dir: Path, digest: str, manifest: Manifest) -> Path:
    """Where the block of adapter version `digest` for this base lies or would lie."""
    key = hashlib.sha256(f"{manifest.fingerprint}\n{manifest.dtype}\n{LAYOUT_VERSION}".encode()).hexdigest()[:16]
    return Path(cache_dir) / "blocks" / key / digest[:2] / f"{digest}.block"


def delete_blocks(cache_dir: Path, digest: str) -> None:
    """Deletes the blocks of an adapter version for every base that it was packed for."""
    for path in (Path(cache_dir) / "blocks").glob(f"*/{digest[:2]}/{digest}.block"):
        path.unlink(missing_ok=True)


def sweep_blocks(cache_dir: Path, keep: Collection[str]) -> int:
    """Deletes the blocks of adapter versions whose digest is not in `keep`; how many those were."""
    swept = 0
    for path in (Path(cache_dir) / "blocks").glob("*/*/*.block"):
        if path.stem not in keep:
            path.unlink(missing_ok=True)
            swept += 1
    return swept


def sweep_unfinished(cache_dir: Path) -> None:
    """Deletes what packers that were killed left behind. For the one process that packs, before it begins."""
    for path in (Path(cache_dir) / "blocks").glob("*/*/*.tmp"):
        path.unlink(missing_ok=True)

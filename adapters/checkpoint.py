"""Adapters into the base: a full checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from adapters.manifest import Manifest
from adapters.merge_request import MergeOptions, MergeSource


@dataclass(frozen=True)
class MergedFile:
    """One file of a merged checkpoint."""

    name: str
    bytes: int
    sha256: str


def merge_checkpoint(
    sources: Sequence[MergeSource],
    model: Path,
    manifest: Manifest,
    out: Path,
    options: MergeOptions,
    progress: Callable[[float], None] = lambda _: None,
) -> list[MergedFile]:
    """W0 + Σ w·scale·B·A as a Hugging Face folder in `out`, which is emptied first; `model` is the base's folder and is only read.

    Weights are written first, then the shards' index, and config.json last of all: a folder without config.json is not
    complete. Gives all files with their hashes, sorted by name (all are plain files directly in `out`).
    AdapterRefused with every reason; `progress` as in `merge_adapters`, by bytes."""
    raise NotImplementedError

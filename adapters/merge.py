"""Adapters into one adapter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from adapters.manifest import Manifest
from adapters.merge_request import MergeOptions, MergeSource


def merge_adapters(
    sources: Sequence[MergeSource],
    manifest: Manifest,
    out: Path,
    options: MergeOptions,
    progress: Callable[[float], None] = lambda _: None,
) -> None:
    """Writes adapter_model.safetensors and then adapter_config.json into `out`, which is emptied first.

    AdapterRefused with every reason, as `check_merge` gives them, or when a merged value is not finite in the base's dtype.
    `progress` is called with shares from 0 to 1, which never fall."""
    raise NotImplementedError

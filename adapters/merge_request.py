"""What a merge is asked to do, and every reason why it cannot be done. Imports no torch.

The methods are those of PEFT 0.21's LoraModel.add_weighted_adapter. `check_merge` answers from the sources' headers alone, so
that a request can be refused before anything is queued.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from adapters.manifest import Manifest

Into = Literal["adapter", "checkpoint"]


@dataclass(frozen=True)
class MergeSource:
    """One adapter that takes part: the files as they were uploaded, under their uploaded names, and its weight.

    `name` is only for messages (`tone@2`). `weight` may be negative or zero. The same adapter may take part twice."""

    name: str
    config: Path
    weights: dict[str, Path]
    index: Path | None = None
    weight: float = 1.0


@dataclass(frozen=True)
class MergeOptions:
    """How to merge. None: not given; an option that the method does not read is refused, not ignored."""

    method: str = "linear"
    density: float | None = None
    """Share of the values that pruning keeps, above 0 and up to 1; ties*, dare_* and magnitude_prune* demand it."""
    majority_sign_method: str | None = None
    """"total" (when None) or "frequency"; ties*, dare_ties*."""
    svd_rank: int | None = None
    """Rank of the result of *svd; None: the largest rank in any source's configuration, as PEFT does."""
    seed: int | None = None
    """For dare_*; None is 0, so that a merge that is begun again gives the same adapter."""
    max_shard_bytes: int | None = None
    """For a checkpoint; None is DEFAULT_SHARD_BYTES."""


def check_merge(
    sources: Sequence[MergeSource],
    manifest: Manifest,
    options: MergeOptions,
    into: Into = "adapter",
    model: Path | None = None,
) -> list[str]:
    """Every reason why this merge is impossible; empty: it can be queued. Reads configurations and headers only.

    `model`: the base's Hugging Face folder; with into="checkpoint" its configuration and headers are checked too."""
    raise NotImplementedError

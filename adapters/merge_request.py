"""What a merge is asked to do, and every reason why it cannot be done. Imports no torch.

The methods are those of PEFT 0.21's LoraModel.add_weighted_adapter. `check_merge` answers from configurations and
headers alone, so that a request can be refused before anything is queued.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from adapters.checkpoint_layout import check_base
from adapters.errors import AdapterRefused, capped, shown
from adapters.manifest import Manifest, Module
from adapters.merge_memory import memory_bytes
from adapters.peft_config import FLOAT32_MAX, MAX_CONFIG_BYTES, MAX_RANK, LoraSettings, read_config
from adapters.peft_format import MAX_INDEX_BYTES, AdapterSpec, TargetSpec, examine
from adapters.safetensors_header import Header, read_header

Into = Literal["adapter", "checkpoint"]

MAX_SOURCES = 64
DEFAULT_SHARD_BYTES = 5_000_000_000
MIN_SHARD_BYTES = 65_536


class Method(NamedTuple):
    """What a method does to the sources' tensors before it adds them up."""

    prune: Literal["magnitude", "random"] | None
    elects_sign: bool
    """Only values whose sign is the majority's are averaged (TIES, arXiv:2306.01708)."""
    svd: bool
    """Works on the products B·A and factorises the result; otherwise on A and B each."""


METHODS: dict[str, Method] = {
    "linear": Method(None, False, False),
    "cat": Method(None, False, False),
    "svd": Method(None, False, True),
    "ties": Method("magnitude", True, False),
    "ties_svd": Method("magnitude", True, True),
    "dare_linear": Method("random", False, False),
    "dare_ties": Method("random", True, False),
    "dare_linear_svd": Method("random", False, True),
    "dare_ties_svd": Method("random", True, True),
    "magnitude_prune": Method("magnitude", False, False),
    "magnitude_prune_svd": Method("magnitude", False, True),
}
SIGN_METHODS = ("total", "frequency")


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


@dataclass(frozen=True)
class OpenedSource:
    """A source that fits the base: what its files say. `targets` by module name."""

    source: MergeSource
    spec: AdapterSpec
    settings: LoraSettings
    targets: dict[str, TargetSpec]

    @property
    def config_rank(self) -> int:
        """What PEFT takes for the adapter's rank: the largest that its configuration mentions."""
        return max(self.settings.r, *self.settings.rank_pattern.values(), 1)


def check_merge(
    sources: Sequence[MergeSource],
    manifest: Manifest,
    options: MergeOptions,
    into: Into = "adapter",
    model: Path | None = None,
    memory: int | None = None,
) -> list[str]:
    """Every reason why this merge is impossible; empty: it can be queued. Reads configurations and headers only.

    `model`: the base's Hugging Face folder; with into="checkpoint" its configuration and headers are checked too.
    `memory`: the bytes that the merge's process may take."""
    return open_checked(sources, manifest, options, into, model, memory)[1]


def open_sources(
    sources: Sequence[MergeSource],
    manifest: Manifest,
    options: MergeOptions,
    into: Into,
    model: Path | None = None,
) -> list[OpenedSource]:
    """The sources, read and checked. AdapterRefused with every reason that `check_merge` gives."""
    opened, reasons = open_checked(sources, manifest, options, into, model)
    if reasons:
        raise AdapterRefused(reasons)
    return opened


def needed_modules(opened: Sequence[OpenedSource], manifest: Manifest) -> list[Module]:
    """Those that some source adapts."""
    needed = {module for one in opened for module in one.targets}
    return [module for module in manifest.linears if module.name in needed]


def open_checked(
    sources: Sequence[MergeSource],
    manifest: Manifest,
    options: MergeOptions,
    into: Into,
    model: Path | None,
    memory: int | None = None,
) -> tuple[list[OpenedSource], list[str]]:
    """The sources that can be read, and what `check_merge` says."""
    reasons = _option_faults(options, into)
    if not 1 <= len(sources) <= MAX_SOURCES:
        reasons.append(f"sources: {len(sources)} adapters; give 1 to {MAX_SOURCES}")
    opened = []
    for source in sources[:MAX_SOURCES]:
        if not _is_number(source.weight):
            reasons.append(f"{source.name}: weight = {shown(source.weight)}: must be a finite number")
        one, faults = _open_one(source, manifest)
        reasons += [f"{source.name}: {fault}" for fault in faults]
        if one is not None:
            opened.append(one)
    if len(opened) == len(sources):
        reasons += _weight_faults(opened)
        if into == "adapter" and options.method in METHODS:
            reasons += _rank_faults(opened, options.method, manifest)
    if into == "checkpoint" and model is not None:
        reasons += check_base(model, manifest, needed_modules(opened, manifest))
    if memory is not None and len(opened) == len(sources) and options.method in METHODS:
        reasons += _memory_faults(opened, options.method, into, manifest, memory)
    return opened, capped(reasons)


def _open_one(source: MergeSource, manifest: Manifest) -> tuple[OpenedSource | None, list[str]]:
    headers: dict[str, Header] = {}
    reasons: list[str] = []
    for name, path in source.weights.items():
        try:
            headers[name] = read_header(path, name)
        except AdapterRefused as error:
            reasons += error.reasons
    config = _head(source.config, MAX_CONFIG_BYTES)
    index = _head(source.index, MAX_INDEX_BYTES) if source.index else None
    spec, faults = examine(config, None if reasons else headers, manifest, index)
    settings, _ = read_config(config)
    if spec is None or settings is None:
        return None, reasons + faults
    return OpenedSource(source, spec, settings, {target.module: target for target in spec.targets}), []


def _head(path: Path, limit: int) -> bytes:
    with path.open("rb") as stream:
        return stream.read(limit + 1)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _option_faults(options: MergeOptions, into: str) -> list[str]:
    reasons: list[str] = []
    if into not in ("adapter", "checkpoint"):
        reasons.append(f'into = {shown(into)}: "adapter" or "checkpoint"')
    method = METHODS.get(options.method)
    if method is None:
        reasons.append(f"method = {shown(options.method)}: unknown; one of {', '.join(METHODS)}")
    elif into == "checkpoint" and options.method != "linear":
        reasons.append(
            f"method = {shown(options.method)}: into a checkpoint only linear is possible, where the weighted sum of"
            " the adapters is exact; to use another method merge into an adapter first, and then that adapter"
        )
    else:
        reasons += _method_option_faults(options, method)
    if options.max_shard_bytes is not None:
        if into == "adapter":
            reasons.append(f"max_shard_bytes = {shown(options.max_shard_bytes)}: only for into = checkpoint")
        elif type(options.max_shard_bytes) is not int or options.max_shard_bytes < MIN_SHARD_BYTES:
            reasons.append(
                f"max_shard_bytes = {shown(options.max_shard_bytes)}: an integer of at least {MIN_SHARD_BYTES}"
            )
    return reasons


def _method_option_faults(options: MergeOptions, method: Method) -> list[str]:
    """Options that the method needs and lacks, does not read, or whose values it cannot use."""
    reasons = []
    name = f"method {options.method}"

    def unread(field: str, value: Any, read: bool, readers: str) -> bool:
        if value is not None and not read:
            reasons.append(f"{field} = {shown(value)}: {name} does not read it, only {readers}")
        return value is None or not read

    if not unread("density", options.density, method.prune is not None, "ties*, dare_* and magnitude_prune*"):
        if not _is_number(options.density) or not 0 < (options.density or 0) <= 1:
            reasons.append(
                f"density = {shown(options.density)}: the share of values to keep, more than 0 and at most 1"
            )
    elif method.prune is not None:
        reasons.append(f"density: {name} needs it: the share of values to keep, more than 0 and at most 1")
    sign = options.majority_sign_method
    if not unread("majority_sign_method", sign, method.elects_sign, "ties* and dare_ties*") and (
        sign not in SIGN_METHODS
    ):
        reasons.append(f"majority_sign_method = {shown(sign)}: {' or '.join(SIGN_METHODS)}")
    rank = options.svd_rank
    if not unread("svd_rank", rank, method.svd, "svd and *_svd") and (
        type(rank) is not int or not 1 <= rank <= MAX_RANK
    ):
        reasons.append(f"svd_rank = {shown(rank)}: ranks are integers from 1 to {MAX_RANK}")
    seed = options.seed
    if not unread("seed", seed, method.prune == "random", "dare_*") and (
        type(seed) is not int or not 0 <= seed < 1 << 63
    ):
        reasons.append(f"seed = {shown(seed)}: an integer from 0 to 2**63 - 1")
    return reasons


def _weight_faults(opened: list[OpenedSource]) -> list[str]:
    """Factors that float32, in which everything is computed, cannot hold."""
    reasons = []
    for one in opened:
        scale = max(abs(target.scale) for target in one.spec.targets)
        if _is_number(one.source.weight) and abs(one.source.weight) * scale > FLOAT32_MAX:
            reasons.append(
                f"{one.source.name}: weight = {shown(one.source.weight)}: times the adapter's scale {scale:g} it is"
                " beyond float32"
            )
    return reasons


def _rank_faults(opened: list[OpenedSource], method: str, manifest: Manifest) -> list[str]:
    if METHODS[method].svd:
        return []
    unequal: dict[tuple[tuple[str, int], ...], list[Module]] = defaultdict(list)
    reasons = []
    for module in manifest.linears:
        ranks = tuple((one.source.name, one.targets[module.name].rank) for one in opened if module.name in one.targets)
        if method != "cat" and len({rank for _, rank in ranks}) > 1:
            unequal[ranks].append(module)
        total = sum(rank for _, rank in ranks)
        if method == "cat" and total > MAX_RANK:
            reasons.append(
                f"method cat adds up the ranks: {module.name} would have rank {total}, at most {MAX_RANK} are served;"
                " use svd"
            )
    for ranks, modules in unequal.items():
        listed = ", ".join(f"{name} has rank {rank}" for name, rank in ranks)
        others = f" and {len(modules) - 1} more modules" if len(modules) > 1 else ""
        reasons.append(
            f"method {method} adds A to A and B to B, which needs equal ranks: in {modules[0].name}{others} {listed};"
            " use cat, svd or another *_svd method"
        )
    return reasons


def _memory_faults(opened: list[OpenedSource], method: str, into: Into, manifest: Manifest, memory: int) -> list[str]:
    """The module that needs most, if that is more than there may be."""
    worst, largest = 0, None
    for module in manifest.linears:
        if ranks := [one.targets[module.name].rank for one in opened if module.name in one.targets]:
            needed = memory_bytes(method, into, module.out_features, module.in_features, ranks)
            if needed > worst:
                worst, largest = needed, module
    if largest is None or worst <= memory:
        return []
    return [
        f"method {method} of {len(opened)} adapters needs up to {worst / 1e9:.1f} GB of memory for {largest.name}"
        f" ({largest.out_features} x {largest.in_features}), and a merge may take {memory / 1e9:.1f}"
        " (LORAPLEX_MERGE_MEMORY_BYTES); use another method, or fewer adapters at a time"
    ]

"""Adapters into the base: W0 + Σ w·scale·B A as a full checkpoint, in a Hugging Face folder of its own.

The sum is computed in float32 and rounded once, to the dtype in which the checkpoint stores the weight. All other
tensors are copied byte for byte, so tied weights, which a checkpoint stores once, stay tied.

Memory: a weight is read, changed and written in bands of rows (SUM_VALUES), so neither a large weight nor a shard is
ever in memory as a whole: besides torch itself the peak is A and B of one module of every source, and three bands. It
depends neither on the size of the base nor on that of its shards.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from adapters.checkpoint_layout import CONFIG_FILE, INDEX_FILE, plan_index, plan_shards, read_layout
from adapters.errors import AdapterRefused
from adapters.folders import emptied, write_synced
from adapters.manifest import Manifest
from adapters.merge_request import (
    DEFAULT_SHARD_BYTES,
    MergeOptions,
    MergeSource,
    OpenedSource,
    needed_modules,
    open_sources,
)
from adapters.safetensors_header import TensorRef
from adapters.safetensors_writer import SafetensorsWriter, TensorPlan, WrittenFile
from adapters.tensor_reader import TORCH_DTYPES, TensorReader, bytes_of

SUM_VALUES = 1 << 21
"""Values of a weight that are summed at once: 8 MB in float32. The allocator keeps buffers of that size; with 64 MB
every band took fresh pages from the kernel (16 s of system time for 4.7 GB, against 6 s)."""
COPY_BYTES = 8 << 20


@dataclass(frozen=True)
class MergedFile:
    """One file of a merged checkpoint. `name`: its path in the folder, with a slash for the one in a folder below."""

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
    """Writes the checkpoint into `out`, which is emptied first; `model`, the base's folder, is only read.

    Weights are written first, then the shards' index, the files beside them, and config.json last of all: a folder
    without config.json is not complete, and nothing loads it. Gives all files with their hashes, sorted by name.
    AdapterRefused with every reason that `check_merge` gives, or when a sum is beyond its dtype; ValueError when `out`
    contains the base or lies in it; `progress` as in `merge_adapters`, by bytes."""
    if _overlap(out.resolve(), model.resolve()):
        raise ValueError(f"out = {out} and the base's folder {model} must be apart")
    opened = open_sources(sources, manifest, options, "checkpoint", model)
    needed = {module for one in opened for module in one.targets}
    layout = read_layout(model, manifest, needed_modules(opened, manifest))
    changes = {
        layout.names[name]: [(i, name) for i, one in enumerate(opened) if name in one.targets] for name in needed
    }
    progress(0.0)
    emptied(out)
    done = 0
    written: list[WrittenFile] = []
    shards = plan_shards(layout, options.max_shard_bytes or DEFAULT_SHARD_BYTES)
    with ExitStack() as stack:
        base = stack.enter_context(TensorReader({ref.file: model / ref.file for ref in layout.tensors.values()}))
        summands = _Summands(opened, stack)
        for file, tensors in shards.items():
            with SafetensorsWriter(out / file, tensors) as writer:
                for tensor in tensors:
                    ref = layout.tensors[tensor.name]
                    change = changes.get(tensor.name)
                    parts = _copied(base, ref) if change is None else _summed(base, ref, tensor, summands.of(change))
                    for part in parts:
                        writer.write(part)
                        done += len(part)
                        progress(done / layout.tensor_bytes)
            written.append(writer.result())
    if len(shards) > 1:
        written.append(_write(out, INDEX_FILE, plan_index(shards, layout)))
    for path in layout.companions():
        written.append(_write(out, path.relative_to(model).as_posix(), path.read_bytes()))
    written.append(_write(out, CONFIG_FILE, (model / CONFIG_FILE).read_bytes()))
    progress(1.0)
    return [MergedFile(*file) for file in sorted(written)]


def _overlap(one: Path, other: Path) -> bool:
    return one == other or one in other.parents or other in one.parents


@dataclass(frozen=True)
class _Summand:
    """factor · b [d, r] a [r, k], float32."""

    a: Tensor
    b: Tensor
    factor: float


class _Summands:
    """Reads the factors of one module of every source that adapts it."""

    def __init__(self, opened: Sequence[OpenedSource], stack: ExitStack) -> None:
        self._opened = opened
        self._readers = [stack.enter_context(TensorReader(one.source.weights)) for one in opened]

    def of(self, change: Sequence[tuple[int, str]]) -> list[_Summand]:
        summands = []
        for i, module in change:
            target, reader = self._opened[i].targets[module], self._readers[i]
            factor = self._opened[i].source.weight * target.scale
            summands.append(_Summand(reader.tensor(target.a), reader.tensor(target.b), factor))
        return summands


def _summed(base: TensorReader, ref: TensorRef, tensor: TensorPlan, summands: list[_Summand]) -> Iterator[memoryview]:
    rows, columns = ref.shape
    step = max(1, SUM_VALUES // max(1, columns))
    for first in range(0, rows, step):
        count = min(step, rows - first)
        total = base.rows(ref, first, count)
        for one in summands:
            total.addmm_(one.b[first : first + count], one.a, alpha=one.factor)
        result = total.to(TORCH_DTYPES[ref.dtype])
        # NaN is passed on. A tenth of the time of isfinite().all(), which was a fifth of the whole merge.
        if not all(torch.isfinite(extreme) for extreme in torch.aminmax(result)):
            raise AdapterRefused([f"{tensor.name}: the sum is not finite in {ref.dtype}, the checkpoint's dtype"])
        yield bytes_of(result)


def _copied(base: TensorReader, ref: TensorRef) -> Iterator[memoryview]:
    size = ref.end - ref.begin
    for offset in range(0, size, COPY_BYTES):
        yield base.read(ref, offset, min(COPY_BYTES, size - offset)).numpy().data


def _write(folder: Path, name: str, data: bytes) -> WrittenFile:
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    write_synced(path, data)
    return WrittenFile(name, len(data), hashlib.sha256(data).hexdigest())

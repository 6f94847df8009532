"""The values of an upload's tensors: are they all numbers that can be served?"""

from __future__ import annotations

from pathlib import Path

from adapters.block import read_rows
from adapters.convert import SAFETENSORS, convert, count_nonfinite, may_overflow
from adapters.errors import shown
from adapters.manifest import Manifest
from adapters.safetensors_header import Header, TensorRef


def bad_values(path: Path, header: Header, manifest: Manifest) -> list[str]:
    """Tensors with NaN or infinite values, or with values that the base's compute dtype cannot hold."""
    reasons = []
    with path.open("rb") as stream:
        for name, ref in header.tensors.items():
            if ref.dtype not in SAFETENSORS or len(ref.shape) != 2 or ref.begin == ref.end:
                continue  # refused for its dtype or shape
            source = SAFETENSORS[ref.dtype]
            bad = overflows = 0
            for chunk in read_rows(stream, _in_rows(ref), header.file):
                bad += count_nonfinite(chunk, source)
                if may_overflow(source, manifest.dtype):
                    overflows += count_nonfinite(convert(chunk, source, manifest.dtype), manifest.dtype)
            if bad:
                reasons.append(f"{ref.file}: tensor {shown(name, 200)}: {bad} values are NaN or infinite")
            elif overflows:
                reasons.append(
                    f"{ref.file}: tensor {shown(name, 200)}: {overflows} values are too large for {manifest.dtype},"
                    " the dtype in which this base runs"
                )
    return reasons


def _in_rows(ref: TensorRef) -> TensorRef:
    """The same bytes as short rows, so that a hostile shape such as [1, 2**30] is read in chunks too."""
    count = ref.shape[0] * ref.shape[1]
    width = next(width for width in (4096, 1024, 256, 64, 16, 4, 1) if count % width == 0)
    return TensorRef(ref.file, ref.dtype, (count // width, width), ref.begin, ref.end)

"""Conversion between float32, float16 and bfloat16 with numpy alone, which has no bfloat16: it travels as uint16.

Rounding is to nearest, ties to even, so that results equal torch's bit for bit (but for the payload of a NaN).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

STORAGE: dict[str, np.dtype[Any]] = {
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype("<u2"),
}
"""numpy dtype that holds each torch dtype (by name)."""
SAFETENSORS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}

_EXPONENT: dict[str, Array] = {
    "float32": np.array(0x7F800000, "<u4"),
    "float16": np.array(0x7C00, "<u2"),
    "bfloat16": np.array(0x7F80, "<u2"),
}


def convert(values: Array, source: str, target: str) -> Array:
    """`values` (storage dtype of `source`) in the storage dtype of `target`; any shape. A value too large for `target`
    becomes infinite (`count_nonfinite` finds it). Same dtype: the array itself."""
    if source == target:
        return values
    if source == "bfloat16":
        wide = (values.astype("<u4") << 16).view("<f4")
    else:
        wide = values.astype("<f4", copy=False)  # exact for float16, subnormals included
    if target == "bfloat16":
        return _to_bfloat16(wide)
    with np.errstate(over="ignore", invalid="ignore"):
        return wide.astype(STORAGE[target], copy=False)


def count_nonfinite(values: Array, dtype: str) -> int:
    """How many of `values` (storage dtype of `dtype`) are NaN or infinite: all bits of the exponent are set."""
    mask = _EXPONENT[dtype]
    return int(np.count_nonzero((values.view(mask.dtype) & mask) == mask))


def may_overflow(source: str, target: str) -> bool:
    """Whether a finite value of `source` can become infinite in `target` (bfloat16 holds all of float16)."""
    return source != target and (target == "float16" or (source, target) == ("float32", "bfloat16"))


def _to_bfloat16(values: Array) -> Array:
    bits = np.ascontiguousarray(values).view("<u4")
    # Adding 0x7fff, and one more if the last kept bit is set, carries into the kept half exactly when rounding up.
    rounded = ((bits + np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))) >> 16).astype("<u2")
    # For a NaN the carry could run into the sign or leave an infinity.
    nan = (bits & np.uint32(0x7FFFFFFF)) > 0x7F800000
    if nan.any():
        rounded[nan] = 0x7FC0
    return rounded

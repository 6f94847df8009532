"""The frozen base product x W0ᵀ on CPU, with the weight packed once for oneDNN.

Decoding multiplies a few rows by every weight of the model. torch's float32 product of few rows goes to a BLAS that
repacks the weight each time; measured on two cores of an AMD EPYC over SmolLM2's layer shapes, 8 rows: 226 ms a
pass against 59 ms packed (other work ran beside it, so only the ratio counts).
"""

from __future__ import annotations

import torch
from torch import Tensor

ROWS_HINT = 8
"""Rows the packed layout is chosen for: decoding is what the packing is for."""


def can_pack(weight: Tensor) -> bool:
    """Packed products need oneDNN, and float32 on CPU: elsewhere torch's own path is as good or better."""
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and torch.backends.mkldnn.is_available()


class PackedWeight:
    """W0 [out, in] in oneDNN's layout; the plain tensor is not kept."""

    def __init__(self, weight: Tensor) -> None:
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), ROWS_HINT)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x [T, in] -> [T, out]"""
        return torch.ops.mkldnn._linear_pointwise(x, self._packed, bias, "none", [], "")

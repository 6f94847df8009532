"""Between host and device without waiting for the device.

A copy from ordinary host memory, or to it, makes the host wait until the device has come to it. Through pinned memory
it is queued like a kernel, so the host can go on preparing the next step.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def to_device(values: NDArray[np.generic], device: torch.device) -> Tensor:
    """A copy of `values` on the device, queued on the current stream. On CPU it shares their memory."""
    host = torch.from_numpy(values)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host


def column(values: Sequence[float] | Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """[n] of `values` on the device, queued likewise."""
    pinned = device.type == "cuda"
    return torch.tensor(values, dtype=dtype, pin_memory=pinned).to(device, non_blocking=pinned)


def fill_pending(ids: Tensor, drawn: Tensor) -> None:
    """Replaces every id of -1 - i by drawn[i], in place; both are [n] on the device. Where nothing could be drawn
    (draw.NOT_FINITE) it is 0: that sequence ends when the host comes to know of it."""
    ids.copy_(torch.where(ids < 0, drawn[(-1 - ids).clamp_(min=0).long()].clamp_(min=0), ids))


class Readback:
    """A device tensor on its way to the host: the copy is queued at once, `read` waits for it."""

    def __init__(self, tensor: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        self._host = tensor
        if tensor.is_cuda:
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def read(self) -> Tensor:
        """The values, on the host."""
        if self._event is not None:
            self._event.synchronize()
        return self._host

"""Host memory as one flat piece, pinned for copies to a CUDA device."""

from __future__ import annotations

from types import TracebackType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class Slab:
    """`nbytes` of host memory with three views of the same bytes: `tensor`, `array`, `memory` (all uint8, flat).

    PyTorch's pinned allocator rounds sizes up to a power of two, which for tens of gigabytes doubles them; here the
    memory is registered with CUDA instead, to the byte."""

    def __init__(self, nbytes: int, *, pinned: bool) -> None:
        """Raises RuntimeError when the memory cannot be pinned (too little of it, or the process's limit)."""
        self.array: NDArray[np.uint8] = np.empty(nbytes, np.uint8)
        self.tensor: Tensor = torch.from_numpy(self.array)
        self.memory = memoryview(self.array)  # type: ignore[arg-type]
        self._pinned = pinned and nbytes > 0
        if self._pinned:
            code = torch.cuda.cudart().cudaHostRegister(self.tensor.data_ptr(), nbytes, 0)
            if int(code) != 0:
                self._pinned = False
                raise RuntimeError(f"{nbytes} bytes of host memory cannot be pinned: CUDA error {int(code)}")

    def close(self) -> None:
        """Unpins the memory; no copy may be under way."""
        if self._pinned:
            self._pinned = False
            torch.cuda.cudart().cudaHostUnregister(self.tensor.data_ptr())

    def __enter__(self) -> Slab:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

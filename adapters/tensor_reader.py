"""Reading tensors out of safetensors files, one at a time or a part of one."""

from __future__ import annotations

from collections.abc import Mapping
from io import FileIO
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from adapters.errors import BlobDamaged
from adapters.safetensors_header import TensorRef

TORCH_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class TensorReader:
    """Files by the name that a TensorRef has for them; opened when first read.

    Plain reads, not a memory map: a mapped file counts as the process's memory, and one that is cut short while
    mapped kills the process."""

    def __init__(self, files: Mapping[str, Path]) -> None:
        self._files = files
        self._open: dict[str, FileIO] = {}

    def tensor(self, ref: TensorRef) -> Tensor:
        """The whole tensor in float32. BlobDamaged when the file ends too early."""
        return self.rows(ref, 0, ref.shape[0])

    def rows(self, ref: TensorRef, first: int, count: int) -> Tensor:
        """Rows [count, columns] of a 2-D tensor in float32."""
        columns = ref.shape[1]
        size = columns * TORCH_DTYPES[ref.dtype].itemsize
        values = self.read(ref, first * size, count * size).view(TORCH_DTYPES[ref.dtype])
        return values.view(count, columns).float()

    def read(self, ref: TensorRef, offset: int, count: int) -> Tensor:
        """`count` bytes of the tensor's from its byte `offset` on, uint8 [count]."""
        file = self._open.get(ref.file)
        if file is None:
            file = self._open[ref.file] = self._files[ref.file].open("rb", buffering=0)
        data = torch.empty(count, dtype=torch.uint8)
        view = data.numpy().data
        file.seek(ref.begin + offset)
        while len(view):
            got = file.readinto(view)
            if not got:
                raise BlobDamaged(ref.file, "the file ends inside a tensor")
            view = view[got:]
        return data

    def __enter__(self) -> TensorReader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        for file in self._open.values():
            file.close()


def bytes_of(tensor: Tensor) -> memoryview:
    """The tensor's values as they stand in a file."""
    # Flat first: [n, 1] counts as contiguous whatever its last stride, and then cannot be seen as bytes.
    return tensor.contiguous().flatten().view(torch.uint8).numpy().data

"""LoRA beside the base product: on a stream of its own, on multiprocessors that the product leaves free.

The library's products are persistent: each of their programs holds a whole multiprocessor, and there is one for each,
from the product's first moment to its last. LoRA's many short programs run where such a one has not begun yet or has
ended, before the product or behind it, hardly beside it. So cuBLASLt is told to leave some multiprocessors alone, and
begins first; LoRA has those meanwhile, and the others behind it. How many is measured for each product when the engine
starts (shares.py). Of those not measured: a large one would miss them for longer than LoRA can make use of them; beside
a small one LoRA is done as soon without.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import triton
from torch import Tensor

LEAST_TOKENS = 16
SHARES = ((512, 8), (1024, 16))
"""Up to so many tokens one in so many multiprocessors is left free (benchmarks/RESULTS.md)."""
MOST_TOKENS = SHARES[-1][0]
_CLUSTER = 8
"""A product's programs come in clusters of at most so many multiprocessors: what is left free is a multiple."""


def left_free(tokens: int, multiprocessors: int) -> int:
    """How many of the device's multiprocessors a product of so many tokens leaves to LoRA, if that was not measured."""
    if tokens < LEAST_TOKENS:
        return 0
    return next((multiprocessors // share // _CLUSTER * _CLUSTER for most, share in SHARES if tokens <= most), 0)


@triton.jit
def _pause_kernel(nothing):  # type: ignore[no-untyped-def]
    pass


class Side:
    """The stream on which LoRA runs."""

    def __init__(self, device: torch.device, *, leave_free: bool = True) -> None:
        """leave_free: products may leave multiprocessors free. They do where that was measured, on Hopper."""
        # Of high priority: its kernels are short, and what follows waits for them.
        self.stream = torch.cuda.Stream(device, priority=-1)
        known = torch.version.hip is None and torch.cuda.get_device_capability(device)[0] == 9
        possible = leave_free and known and hasattr(torch._C, "_set_sm_carveout_experimental")
        self._multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count if possible else 0
        """Of which some may be left free."""
        self.measured: dict[tuple[int, int, int], int] = {}
        """How many are left free by a product of (tokens, columns, k)."""
        self._nothing = torch.empty(0, dtype=torch.int32, device=device)
        self._pause()  # compiled and loaded now, as a graph may be captured next

    def choices(self) -> tuple[int, ...]:
        """Numbers of multiprocessors that a product may leave free; none where that is not known to be of use."""
        return tuple(range(0, self._multiprocessors // 4 + 1, _CLUSTER)) if self._multiprocessors else ()

    def left_free(self, tokens: int, columns: int, k: int) -> int:
        if not self._multiprocessors:
            return 0
        return self.measured.get((tokens, columns, k), left_free(tokens, self._multiprocessors))

    def beside(self, x: Tensor, columns: int, product: Callable[[], Tensor], deltas: Callable[[], None]) -> Tensor:
        """The product, with what `deltas` launches beside it, and done when the current stream goes on. x [T, k]: what
        both read; columns: of the product."""
        main, free = torch.cuda.current_stream(x.device), self.left_free(len(x), columns, x.shape[1])
        self.stream.wait_stream(main)
        try:
            if free:
                with _leaving(free):
                    y = product()
                with torch.cuda.stream(self.stream):
                    self._pause()
                    deltas()
                return y
            with torch.cuda.stream(self.stream):
                deltas()
            return product()
        finally:  # else what is freed after a failure might be given away while it is still written
            main.wait_stream(self.stream)

    def _pause(self) -> None:
        """A kernel of nothing: the product's programs are the first to be given multiprocessors, else LoRA's would take
        all of them."""
        _pause_kernel[(1,)](self._nothing)


@contextmanager
def _leaving(multiprocessors: int) -> Iterator[None]:
    before = torch._C._get_sm_carveout_experimental()
    torch._C._set_sm_carveout_experimental(multiprocessors)
    try:
        yield
    finally:
        torch._C._set_sm_carveout_experimental(before)

"""How many multiprocessors a product leaves to LoRA beside it (that it does: tests/gpu/test_kernels_cuda.py)."""

from __future__ import annotations

from itertools import pairwise

import pytest

from adapters.kernels.side import left_free


@pytest.mark.parametrize("multiprocessors", [16, 58, 108, 132, 148])
def test_a_product_keeps_most_multiprocessors_in_whole_clusters(multiprocessors: int) -> None:
    free = [left_free(tokens, multiprocessors) for tokens in range(2049)]
    assert all(n % 8 == 0 and n <= multiprocessors / 8 for n in free)
    assert all(later <= sooner for sooner, later in pairwise(free[16:])), (
        "the longer a product, the more they are missed"
    )


def test_neither_small_nor_large_products_leave_any() -> None:
    assert [left_free(tokens, 132) for tokens in (1, 15, 16, 512, 513, 1024, 1025)] == [0, 0, 16, 16, 8, 8, 0]

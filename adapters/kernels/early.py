"""Kernels that start before the one before them has ended: programmatic dependent launch (CUDA, from Hopper on).

Such a kernel is launched once every program of the one before has let it or has ended. Whatever was written before it
may be read only behind `gdc_wait`, which waits until the kernel before has ended. Before that it may read what no
kernel of a step writes: weights, the step's plan, adapters.

A kernel lets the next one start behind its own wait. That way all but the last kernel have ended when one starts,
which is what the compiler's kernels count on. Only where the next kernel is known to read nothing of a step before its
wait may it be let start at once (both kinds of shrink, whose next are `one_row` and `expand_small`).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch


@lru_cache(maxsize=16)
def can_start_early(device: torch.device) -> bool:
    """Whether the device knows programmatic dependent launch."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)


def options(early: bool) -> dict[str, Any]:
    """Of the launch of a Triton kernel; only where asked for, as Triton's interpreter knows nothing of it."""
    return {"launch_pdl": True} if early else {}

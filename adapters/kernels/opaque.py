"""Operators that torch.compile does not look into, at the least cost of a call.

torch.library.custom_op wraps each call in checks of aliasing and autograd: 47 us of host time, where what is
registered here takes 16 (torch 2.13, one CPU core). A decoder layer makes five such calls, for each of some 200 CUDA
graphs that are captured before the engine is ready. Tests run torch's own checks of each operator instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

NAMESPACE = "loraplex"
_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")


def opaque(fake: Callable[..., Any], mutates: Sequence[str] = ()) -> Callable[[Callable[..., Any]], Any]:
    """Registers the decorated function under its name, for inference on every device. fake: the same on tensors without
    data, for shapes and dtypes of what it returns, which may not share memory with its arguments. mutates: names of the
    arguments that it writes to. The schema is that of its annotations."""

    def register(function: Callable[..., Any]) -> Any:
        name = function.__name__
        schema = torch.library.infer_schema(function, mutates_args=tuple(mutates))
        _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)
        return getattr(getattr(torch.ops, NAMESPACE), name)

    return register

"""Whether a product's rows depend on their place among the others: what the deterministic engine on CUDA stands on.

All its products have the same number of rows, so the library picks one kernel for each weight. That this kernel sums
every row in the same order is usual, not promised (one that gives some tiles of the output to several programs and
others to one would not), so it is tried before the engine says that it is ready.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from adapters.layers import LoraLinear, OutputProduct
from service.engine.errors import CannotStart


def check_products(model: nn.Module, rows: int) -> None:
    """Tries each kind of weight once. Raises CannotStart, with the weight."""
    tried: set[tuple[object, ...]] = set()
    for name, module in model.named_modules():
        if not isinstance(module, LoraLinear | OutputProduct | nn.Linear) or module.weight is None:
            continue
        kind = (module.weight.shape, module.bias is None)
        if kind in tried:
            continue
        tried.add(kind)
        if not rows_are_independent(module.weight, module.bias, rows):
            raise CannotStart(
                f"LORAPLEX_DETERMINISTIC=true: the product of {rows} rows with {name} {list(module.weight.shape)} "
                "gives a row other bits at another place",
                "another number of tokens in a step (LORAPLEX_MAX_TOKENS_PER_STEP) may have a kernel that does not",
            )


@torch.inference_mode()
def rows_are_independent(weight: Tensor, bias: Tensor | None, rows: int) -> bool:
    """Bit for bit, for rows moved by several distances, and with other rows around them."""
    x = torch.randn(rows, weight.shape[1], dtype=weight.dtype, device=weight.device)
    y = functional.linear(x, weight, bias)
    for distance in (1, 8, rows // 3, rows // 2):
        if not torch.equal(functional.linear(x.roll(distance, 0), weight, bias), y.roll(distance, 0)):
            return False
    strangers = torch.cat((x[:1], torch.randn_like(x[1:])))
    return torch.equal(functional.linear(strangers, weight, bias)[0], y[0])

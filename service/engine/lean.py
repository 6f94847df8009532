"""transformers without packages that it would import for losses. Imports no model.

With the code of models come all losses, and with those of object detectors scipy and torchvision, wherever they are
installed. Nothing here computes a loss: scipy was 0.3 of 4 s of imports (two shared cores).
"""

from __future__ import annotations

from importlib import import_module

UNUSED = ("is_scipy_available", "is_torchvision_available")
"""By what the losses ask."""


def import_losses() -> None:
    """To be called before anything of transformers that imports them. Who asks for these packages later is told the
    truth, but not what losses import: transformers' own image code stays without torchvision, and nobody here has
    images."""
    utils = import_module("transformers.utils")
    asked = {name: getattr(utils, name) for name in UNUSED if hasattr(utils, name)}
    for name in asked:
        setattr(utils, name, lambda: False)
    try:
        import_module("transformers.loss.loss_utils")
    finally:
        for name, function in asked.items():
            setattr(utils, name, function)

"""What the engine process does before, and beside, its imports."""

from __future__ import annotations

import subprocess
import sys

import pytest

from service.engine import context

LEAN = """
import sys
from service.engine import lean
lean.import_losses()
import service.engine.build
from transformers import utils
print("scipy" in sys.modules, utils.is_scipy_available())
"""


def test_the_engine_does_without_packages_for_losses_and_hides_them_from_nobody_else() -> None:
    done = subprocess.run([sys.executable, "-c", LEAN], capture_output=True, text=True, check=True, timeout=240)
    assert done.stdout.split() == ["False", "True"], done.stderr  # scipy comes with the tests


@pytest.mark.parametrize("library", ["libcuda-of-no-machine.so.1", "libc.so.6"])
def test_without_a_driver_torch_is_left_to_say_so(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_MODULE_LOADING", "LAZY")  # and taken back
    monkeypatch.setattr(context, "DRIVER", library)
    thread = context.make_beside()  # an exception in a thread fails the test
    thread.join()

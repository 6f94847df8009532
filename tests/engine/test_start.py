"""What the engine process does before, and beside, its imports."""

from __future__ import annotations

import subprocess
import sys

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

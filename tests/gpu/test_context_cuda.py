"""The context that is made beside the imports is the one that torch uses."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = pytest.mark.gpu

MADE = """
import ctypes
from service.engine import context
context.make_beside().join()
driver = ctypes.CDLL(context.DRIVER)
flags, active, mine, current = ctypes.c_uint(), ctypes.c_int(), ctypes.c_void_p(), ctypes.c_void_p()
driver.cuDevicePrimaryCtxGetState(0, ctypes.byref(flags), ctypes.byref(active))
import torch
total = int(torch.arange(10, device="cuda").sum())
driver.cuDevicePrimaryCtxRetain(ctypes.byref(mine), 0)
driver.cuCtxGetCurrent(ctypes.byref(current))
print(active.value, total, mine.value == current.value)
"""


def test_torch_finds_its_context_made() -> None:
    done = subprocess.run([sys.executable, "-c", MADE], capture_output=True, text=True, check=True, timeout=240)
    assert done.stdout.split() == ["1", "45", "True"], done.stderr

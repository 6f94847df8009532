"""The CUDA context, made while torch is imported. No torch.

torch would ask the driver for it after its imports, and for as long as that takes hold the interpreter's lock. What the
driver is asked for here is the context that torch uses, the primary one of the first device; ctypes holds no lock
meanwhile. If it cannot be had nothing happens: torch asks again, and says what is wrong.
"""

from __future__ import annotations

import ctypes
import os
import threading

DRIVER = "libcuda.so.1"


def make_beside() -> threading.Thread:
    """Begins, and does not wait: the driver lets who asks for the context meanwhile wait for it."""
    # As torch sets it before it asks. Drivers before CUDA 12.2 would load the kernels of whole libraries.
    os.environ.setdefault("CUDA_MODULE_LOADING", "LAZY")
    thread = threading.Thread(target=_make, name="cuda-context", daemon=True)
    thread.start()
    return thread


def _make() -> None:
    device, context = ctypes.c_int(), ctypes.c_void_p()
    try:
        driver = ctypes.CDLL(DRIVER)
        if driver.cuInit(0) == 0 and driver.cuDeviceGet(ctypes.byref(device), 0) == 0:
            driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)
    except (OSError, AttributeError):  # no such library, or one without these functions
        return

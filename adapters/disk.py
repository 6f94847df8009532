"""What a disk has to keep free where files of adapters are written: nearly always it is the catalogue's too."""

from __future__ import annotations

import errno
import os
from pathlib import Path

RESERVE_BYTES = 32 << 20
"""The catalogue has to be able to grow, if only to delete."""


def require_space(folder: Path, nbytes: int) -> int:
    """Bytes that are free above the reserve. Raises OSError ENOSPC if `nbytes` more would not fit."""
    disk = os.statvfs(folder)
    free = disk.f_bavail * disk.f_frsize - RESERVE_BYTES
    if free < nbytes:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
    return free

"""Folders that appear file by file, and survive a power cut in that order."""

from __future__ import annotations

import os
import shutil
from pathlib import Path


def emptied(folder: Path) -> Path:
    """The folder, made if it is missing, with nothing in it: what an interrupted job has left is removed."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    return folder


def write_synced(path: Path, data: bytes) -> None:
    """Writes a small file, on the disk when it returns, its name too; never half there under its name."""
    part = path.with_name(f".{path.name}.part")
    with part.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    part.replace(path)
    handle = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

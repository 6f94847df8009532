"""Runs a command where a folder is a small disk, or cannot be written: `python -m tests.crash.confined HOW FOLDER --
COMMAND`. Only the command and what it starts see it so; nothing has to be cleaned up.

    tmpfs=BYTES     the folder is a disk of its own, of that size
    readonly        the folder is mounted read-only (EROFS)
    denied          the file modes hold even for root, who otherwise may write anywhere (EACCES)

The first two need the right to mount, or user namespaces. Where there is neither, tmpfs runs the command as it is (the
tests then limit file sizes instead, see Disk) and readonly does what denied does.
"""

from __future__ import annotations

import ctypes
import os
import resource
import sys
from pathlib import Path

import psutil

_CLONE_NEWNS, _CLONE_NEWUSER = 0x00020000, 0x10000000
_MS_RDONLY, _MS_REMOUNT, _MS_BIND, _MS_REC, _MS_PRIVATE = 1, 32, 4096, 16384, 1 << 18
_PR_CAPBSET_DROP = 24
_CAP_DAC_OVERRIDE, _CAP_DAC_READ_SEARCH = 1, 2


class Disk:
    """The disk of a confined service, to be filled and freed while it runs. `processes`: the service's."""

    def __init__(self, folder: Path, processes: list[psutil.Process]) -> None:
        self._processes = processes
        # The folder as those processes see it.
        inside = Path(f"/proc/{processes[0].pid}/root{folder}")
        self.folder = inside if inside.is_dir() else folder
        self.mounted = inside.is_dir() and inside.stat().st_dev != folder.stat().st_dev
        self._filler = self.folder / "filler"

    def fill(self, leave: int = 0) -> None:
        """Up to the last byte, but for `leave`; without a disk of its own, no file may be longer than that."""
        if not self.mounted:
            for process in self._processes:
                process.rlimit(psutil.RLIMIT_FSIZE, (max(1, leave), resource.RLIM_INFINITY))
            return
        with self._filler.open("ab", buffering=0) as filler:
            for size in (1 << 20, 1 << 12, 1):
                try:
                    while filler.write(bytes(size)) == size:
                        pass
                except OSError:
                    continue
            filler.truncate(max(0, filler.tell() - leave))

    def free(self) -> None:
        for process in self._processes:
            process.rlimit(psutil.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        self._filler.unlink(missing_ok=True)


def _enter_namespace(libc: ctypes.CDLL) -> bool:
    """Mounts made from now on are this process's own business. False if that is not allowed."""
    user, group = os.getuid(), os.getgid()
    if libc.unshare(_CLONE_NEWNS) != 0:
        if libc.unshare(_CLONE_NEWNS | _CLONE_NEWUSER) != 0:
            return False
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
        Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
    return libc.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None) == 0


def _confine(how: str, folder: str) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    path = folder.encode()
    name, _, size = how.partition("=")
    if name == "tmpfs":
        if _enter_namespace(libc):
            libc.mount(b"tmpfs", path, b"tmpfs", 0, f"size={size}".encode())
        return
    if name == "readonly" and _enter_namespace(libc) and libc.mount(path, path, None, _MS_BIND, None) == 0:
        libc.mount(None, path, None, _MS_BIND | _MS_REMOUNT | _MS_RDONLY, None)
        return
    for capability in (_CAP_DAC_OVERRIDE, _CAP_DAC_READ_SEARCH):
        libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0)  # of use only to root, and only root may
    for each in [Path(folder), *Path(folder).rglob("*")]:
        each.chmod(0o555 if each.is_dir() else 0o444)


def main() -> None:
    how, folder, _, *command = sys.argv[1:]
    _confine(how, folder)
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()

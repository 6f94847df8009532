"""Child processes of the supervisor: started so that none outlives it, and stopped within a time limit."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence

_PR_SET_PDEATHSIG = 1


class Child:
    """One running child, leader of its own process group, so that the terminal's Ctrl-C reaches the supervisor alone
    and the supervisor decides the order in which processes end."""

    def __init__(self, name: str, process: asyncio.subprocess.Process) -> None:
        self.name = name
        self.process = process

    @classmethod
    async def start(
        cls, name: str, module: str, *arguments: str, env: Mapping[str, str], pass_fds: Sequence[int] = ()
    ) -> Child:
        """`python -m module arguments`, with this process's stdout and stderr."""
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", module, *arguments,
            env=dict(env), pass_fds=tuple(pass_fds), stdin=asyncio.subprocess.DEVNULL,
            start_new_session=True, preexec_fn=_dies_with(os.getpid()),
        )  # fmt: skip
        return cls(name, process)

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def running(self) -> bool:
        return self.process.returncode is None

    @property
    def outcome(self) -> str:
        """How it ended, in words."""
        code = self.process.returncode
        if code is None:
            return "is running"
        return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"

    @property
    def killed(self) -> bool:
        """It was ended by a signal, rather than by itself."""
        return (self.process.returncode or 0) < 0

    async def wait(self) -> None:
        await self.process.wait()

    async def stop(self, grace_s: float) -> bool:
        """SIGTERM, then after `grace_s` seconds SIGKILL. True if the process ended by itself."""
        if self.running:
            self.process.terminate()
        try:
            await asyncio.wait_for(self.process.wait(), grace_s)
        except TimeoutError:
            await self.kill()
            return False
        self._kill_group()
        return True

    async def kill(self) -> None:
        """SIGKILL, to what the child has started as well."""
        self._kill_group()
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        await self.process.wait()

    def _kill_group(self) -> None:
        # The group id stays reserved while any member lives, so it cannot have become someone else's.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)


def _dies_with(parent: int) -> Callable[[], None] | None:
    """What the child runs before exec: the kernel kills it when the supervisor ends, however that ends. Linux only;
    elsewhere the processes notice by themselves, within a second."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl

    def ask_the_kernel() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)  # it ended between fork and prctl

    return ask_the_kernel

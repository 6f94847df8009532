"""The pace of a merge: what nobody else wants of a processor is its own, of what others want it takes a small share.

Neither of the kernel's means alone does both. A process under SCHED_IDLE never gets on where all processors are busy
(240 s of a machine with a load of 12 gave a merge less than the two seconds that it needed), and to raise it from
there takes a privilege (RLIMIT_NICE is 0 by default) that a container's user lacks; nice alone takes more the fewer
others there are. So a job runs slightly below everything else (nice 5), and is stopped for a while (SIGSTOP, SIGCONT)
whenever it had to wait for a processor: then somebody else wanted that processor too. How long it waited is
the kernel's own figure, /proc/PID/schedstat.

So long as anything else wants the processors a job has at most SHARE of one of them, and where up to seven others wait
for each of them it gets that much. Merging small adapters takes two to three seconds of processor there, most of it
the import of torch: about a minute.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
from pathlib import Path

from service.children import Child

SHARE = 0.02
"""Of one processor. Below the 5% that a merge may cost requests, since a step of the engine ends when the last of its
threads has ended: what one of them loses, all of them lose."""
SLICE_S = 0.05
"""How long it runs before it is looked at: what a request that comes may lose once."""
CONTENDED = 0.1
"""It waited for more than this share of the time for which it could have run."""
MAX_PAUSE_S = 5.0


def pause_s(ran: float, waited: float, elapsed: float) -> float:
    """How long to stop after `elapsed` seconds in which it ran and waited so long; 0 while nobody else is held up."""
    if waited <= CONTENDED * (ran + waited):
        return 0.0
    return min(MAX_PAUSE_S, max(0.0, ran / SHARE - elapsed))


def measurable() -> bool:
    """Whether this kernel says how long a process has waited for a processor."""
    return times("self") is not None


def times(pid: int | str) -> tuple[float, float] | None:
    """(seconds on a processor, seconds in wait for one) of a process's main thread; None where nobody knows."""
    try:
        ran, waited, _ = Path(f"/proc/{pid}/schedstat").read_text().split()
    except (OSError, ValueError):
        return None
    return int(ran) / 1e9, int(waited) / 1e9


async def keep_pace(child: Child) -> None:
    """Until the child has ended. It goes on when this is cancelled."""
    loop = asyncio.get_running_loop()
    while child.running:
        before, begin = times(child.pid), loop.time()
        await asyncio.sleep(SLICE_S)
        after = times(child.pid)
        if before is None or after is None:
            return
        pause = pause_s(after[0] - before[0], after[1] - before[1], loop.time() - begin)
        if pause:
            with contextlib.suppress(ProcessLookupError):
                child.process.send_signal(signal.SIGSTOP)
                try:
                    await asyncio.sleep(pause)
                finally:
                    child.process.send_signal(signal.SIGCONT)

"""How processes that have loaded torch end."""

from __future__ import annotations

import atexit
import logging
import os
import sys


class Leaving:
    """Ends the process once the handlers at exit have run, and leaves it to the kernel to take apart what torch has
    imported. Python needs a second and a half of a core for that: beside others that want the cores it took longer
    than the supervisor waits for an engine that has nothing left to do, and a merge that gets 3% of one spent most of
    a minute on it. Make it before anything else registers with atexit, so that it comes last."""

    def __init__(self) -> None:
        self._code: int | None = None
        atexit.register(self._leave)

    def with_code(self, code: int) -> int:
        """From now on the process ends in that way, with this exit code."""
        self._code = code
        return code

    def _leave(self) -> None:
        if self._code is None:  # an exception, which Python tells of by its own exit code
            return
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(self._code)

"""Ports for servers that tests start."""

from __future__ import annotations

import itertools
import os
import socket

# Below the range from which the kernel takes ports of outgoing connections (32768 on Linux): a port found free there
# could be taken by any client before its server binds it. Where each process begins is spread, so that those that run
# side by side seldom try the same.
_FIRST, _LAST = 10_240, 32_000
_candidates = itertools.count(os.getpid() * 61 % (_LAST - _FIRST))


def unused_port() -> int:
    """A TCP port of 127.0.0.1 that nothing listens on, and that this process has not been given before."""
    for step in _candidates:
        port = _FIRST + step % (_LAST - _FIRST)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise AssertionError("unreachable")

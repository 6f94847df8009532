"""Python imports this at each start when this folder is on PYTHONPATH: a process of the service that kills itself, or
the whole service, at a given moment. The product knows nothing of it: moments are Python's audit events.

$KILL_PLAN is a file, JSON: {"module": "service.merger", "event": "open", "part": "task.json", "nth": 1, "times": 1,
"whom": "self" | "service"}. In the process of that module, the nth event whose first argument contains `part` (ends
with it, if that ends with $) kills this process or its parent, so often as `times` says. Without the file nothing
happens.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import Any

PLAN = os.environ.get("KILL_PLAN", "")
EVENTS = ("open", "os.rename", "shutil.rmtree")

_counted: dict[str, int] = {}
_inside = False


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    global _inside
    if event not in EVENTS or _inside:
        return
    _inside = True  # reading the plan is an event too
    try:
        _consider(event, str(arguments[0]))
    finally:
        _inside = False


def _consider(event: str, subject: str) -> None:
    try:
        with open(PLAN) as file:
            text = file.read()
    except OSError:
        return
    plan = json.loads(text)
    part = plan["part"]
    found = subject.endswith(part[:-1]) if part.endswith("$") else part in subject
    if plan["module"] not in sys.orig_argv or plan["event"] != event or not found:
        return
    _counted[text] = _counted.get(text, 0) + 1
    if _counted[text] < plan["nth"]:
        return
    if plan["times"] == 1:
        os.unlink(PLAN)
    else:
        with open(PLAN + ".new", "w") as file:
            file.write(json.dumps({**plan, "times": plan["times"] - 1}))
        os.replace(PLAN + ".new", PLAN)
    whom = os.getppid() if plan["whom"] == "service" else os.getpid()
    os.kill(whom, signal.SIGKILL)
    while True:  # the kernel ends this process when its parent has ended
        signal.pause()


if PLAN and any(part.startswith("service.merge") for part in sys.orig_argv):
    sys.addaudithook(_hook)

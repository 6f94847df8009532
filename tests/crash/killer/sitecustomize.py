"""Python imports this at each start when this folder is on PYTHONPATH: a process of the service that signals itself, or
its parent, at a given moment. The product knows nothing of it: moments are Python's audit events.

$KILL_PLAN is a JSON file, a list of {"process": "service.merger", "event": "open", "part": "/task.json", "nth": 1,
"whom": "self" | "parent", "signal": 9}. In a process whose command line contains `process`, the nth event whose first
argument contains `part` (ends with it, if that ends with $) sends the signal. Then the next one of the list is waited
for; after the last one the file is gone. Without the file nothing happens.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import Any

PLAN = os.environ.get("KILL_PLAN", "")
EVENTS = ("open", "os.rename", "shutil.rmtree")
COMMAND = " ".join(sys.orig_argv)

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
    plan, *others = json.loads(text)
    part = plan["part"]
    found = subject.endswith(part[:-1]) if part.endswith("$") else part in subject
    if plan["process"] not in COMMAND or plan["event"] != event or not found:
        return
    _counted[text] = _counted.get(text, 0) + 1
    if _counted[text] < plan["nth"]:
        return
    if others:
        with open(PLAN + ".new", "w") as file:
            file.write(json.dumps(others))
        os.replace(PLAN + ".new", PLAN)
    else:
        os.unlink(PLAN)
    os.kill(os.getppid() if plan["whom"] == "parent" else os.getpid(), plan["signal"])
    while plan["signal"] == signal.SIGKILL:  # this process ends with its parent
        signal.pause()


if PLAN and any(name in COMMAND for name in ("service.merge", "spawn_main")):
    sys.addaudithook(_hook)

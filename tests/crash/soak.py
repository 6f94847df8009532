"""Storms for SOAK_MINUTES (60), one after the other, each with a seed of its own: `make soak`, or
`python -m tests.crash.soak [first seed]`. With SOAK_STATE=postgresql the state lies in PostgreSQL and S3, and there are
one service and two by turns. Ends with 1 and says the seed at the first thing that is wrong."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import tempfile
import time
import traceback
from pathlib import Path

from tests.crash.storm import Storm
from tests.crash.world import World
from tests.ports import unused_port
from tests.real_parts import S3, Postgres

STORM_S = 300.0
"""So long each storm takes; then a new data folder, another number of API processes."""


def storm(seed: int, seconds: float, parts: tuple[Postgres, S3] | None) -> bool:
    """Whether all was well. `parts`: where the state lies, else in the data folder."""
    with tempfile.TemporaryDirectory(prefix="lp-soak-", ignore_cleanup_errors=True) as folder:
        state, count, settle = {}, 1, lambda: None
        if parts is not None:
            database = parts[0].create()
            state, count = {"database": database, "blobs_url": parts[1].create()}, 1 + seed // 2 % 2
            settle = functools.partial(parts[0].settle, database)
        worlds = [
            World(Path(folder) / str(number), unused_port(), api_workers=1 + seed % 2, **state)
            for number in range(count)
        ]
        storm = Storm(worlds[0], seed, *worlds[1:], clients=2 + seed % 3, settle=settle)
        try:
            storm.run(seconds=seconds)
        except Exception:
            traceback.print_exc()
            for world in worlds:
                print("".join(world.logs[-2:]), world.service.log.read_text() if world.service is not None else "")
            print(f"seed {seed} failed after {storm.figures.report(storm.ledger)}", flush=True)
            return False
        finally:
            for world in worlds:
                world.close()
    print(f"seed {seed}: {storm.figures.report(storm.ledger)}", flush=True)
    return True


def main() -> int:
    minutes = float(os.environ.get("SOAK_MINUTES", "60"))
    seed = int(sys.argv[1]) if len(sys.argv) > 1 else int(time.time())
    end = time.monotonic() + 60.0 * minutes
    with contextlib.ExitStack() as stack:
        parts = None
        if os.environ.get("SOAK_STATE") == "postgresql":
            parts = Postgres(), S3()
            for part in parts:
                stack.callback(part.close)
        while (left := end - time.monotonic()) > 0:
            if not storm(seed, min(STORM_S, left), parts):
                return 1
            seed += 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

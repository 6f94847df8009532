"""Storms for SOAK_MINUTES (60), one after the other, each with a seed of its own: `make soak`, or
`python -m tests.crash.soak [first seed]`. Ends with 1 and says the seed at the first thing that is wrong."""

from __future__ import annotations

import os
import sys
import tempfile
import time
import traceback
from pathlib import Path

from tests.crash.storm import Storm
from tests.crash.world import World
from tests.ports import unused_port

STORM_S = 300.0
"""So long each storm takes; then a new data folder, another number of API processes."""


def storm(seed: int, seconds: float) -> bool:
    """Whether all was well."""
    with tempfile.TemporaryDirectory(prefix="lp-soak-", ignore_cleanup_errors=True) as folder:
        world = World(Path(folder), unused_port(), api_workers=1 + seed % 2)
        storm = Storm(world, seed, clients=2 + seed % 3)
        try:
            storm.run(seconds=seconds)
        except Exception:
            traceback.print_exc()
            print("".join(world.logs[-2:]), world.service.log.read_text() if world.service is not None else "")
            print(f"seed {seed} failed after {storm.figures.report(storm.ledger)}", flush=True)
            return False
        finally:
            world.close()
    print(f"seed {seed}: {storm.figures.report(storm.ledger)}", flush=True)
    return True


def main() -> int:
    minutes = float(os.environ.get("SOAK_MINUTES", "60"))
    seed = int(sys.argv[1]) if len(sys.argv) > 1 else int(time.time())
    end = time.monotonic() + 60.0 * minutes
    while (left := end - time.monotonic()) > 0:
        if not storm(seed, min(STORM_S, left)):
            return 1
        seed += 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Services on a data folder of their own."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.crash.world import World


@pytest.fixture
def make_world(free_port: Callable[[], int]) -> Iterator[Callable[..., World]]:
    """World(folder, port, ...) on a new folder, not started yet; what still runs at the end is stopped."""
    worlds: list[World] = []
    # Not tmp_path: the path of a socket has to be short.
    with tempfile.TemporaryDirectory(prefix="lp-crash-") as folder:

        def make(*flags: str, **options: Any) -> World:
            worlds.append(World(Path(folder) / str(len(worlds)), free_port(), *flags, **options))
            return worlds[-1]

        try:
            yield make
        finally:
            for world in worlds:
                world.close()

"""What a decode step costs the host: Python and numpy from the schedule to the replies, with no model behind.

    python -m benchmarks.host_step [--sequences 256] [--adapters 64] [--profile]

The real scheduler, pages, leases, batch plan, layout and replies; the forward pass is left out and the logits are a
constant, so that what is left is what the host does while a device would work. Measured on CPU: on a GPU the launches
themselves come on top (a replay and a few copies), and so does what the compiled kernels' launchers cost.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import statistics
import tempfile
import time
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from service.engine.config import EngineConfig
from service.engine.core import Engine
from service.engine.messages import AdapterRef, SamplingParams, Submit
from service.engine.runner import Runner
from service.engine.simulated import Options, build_engine

VOCABULARY = 1000


class HostRunner(Runner):
    """runner.Runner whose device does nothing."""

    def __init__(self, page_size: int) -> None:
        self.ahead = True
        self.page_size = page_size
        self.graphs = None
        self._device = torch.device("cpu")
        self._drawn = torch.empty(0, dtype=torch.int64)
        self._row_of = {}
        self._constant = torch.zeros(1, VOCABULARY)
        self._pages_of = {}

    def forward(self, ids: Any, positions: Any, layout: Any, plan: Any, wanted: NDArray[np.int64]) -> Tensor:
        return self._constant.expand(len(wanted), -1)


def engine(sequences: int, adapters: int, context: int) -> Engine:
    """An engine in which so many sequences decode, over so many adapters in turn."""
    folder = tempfile.mkdtemp()
    config = EngineConfig(
        model_path="", blobs_dir=folder, cache_dir=folder, socket="",
        max_sequences=sequences, max_queue=2 * sequences, kv_pages=sequences * (context // 16 + 64),
        max_positions=context + 2048, max_tokens_per_step=8192, arena_bytes=64 << 20,
    )  # fmt: skip
    built, _ = build_engine(config, lambda client, message: None, Options(vocab_size=VOCABULARY))
    built.runner = HostRunner(config.page_size)
    for number in range(sequences):
        request = Submit(
            request_id=f"r{number}",
            prompts=[[number % VOCABULARY, *range(1, context)]],
            adapters=(AdapterRef(f"adapter{number % adapters}"),) if adapters else (),
            sampling=SamplingParams(temperature=0.0, max_tokens=1024),
        )
        built.handle(b"bench", request)
    while (
        min((len(seq.tokens) for seq in built.scheduler.running), default=0) <= context or built.scheduler.num_waiting
    ):
        built.step()
    return built


PARTS = {
    "schedule": ("scheduler", "schedule"),
    "launch": ("runner", "launch"),
    "  order": ("runner", "_order"),
    "  layout": ("runner", "_layout"),
    "  ids": ("runner", "_tokens"),
    "  draw": ("runner", "_draw"),
    "advance": ("", "_advance"),
    "reply": ("", "_reply"),
}
"""What is timed: the engine's part, its method. The clock is the thread's own processor time, which other processes
hardly move."""


def phases(built: Engine, steps: int) -> dict[str, float]:
    """Medians in us of a whole step, and of its parts (timed apart: the clock costs something too)."""
    whole, parts = [], {name: [] for name in PARTS}
    for _ in range(steps):
        begin = time.thread_time()
        built.step()
        whole.append(time.thread_time() - begin)
    for name, (part, method) in PARTS.items():
        owner = getattr(built, part) if part else built
        _time(owner, method, parts[name])
    for _ in range(steps):
        built.step()
    return {name: statistics.median(times) * 1e6 for name, times in {"whole step": whole, **parts}.items()}


def _time(owner: Any, method: str, times: list[float]) -> None:
    function = getattr(owner, method)

    def timed(*arguments: Any) -> Any:
        begin = time.thread_time()
        result = function(*arguments)
        times.append(time.thread_time() - begin)
        return result

    setattr(owner, method, timed)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sequences", type=int, default=256)
    parser.add_argument("--adapters", type=int, default=64, help="0: the base alone")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--profile", action="store_true", help="print where the time of whole steps goes")
    args = parser.parse_args()
    torch.set_num_threads(1)
    built = engine(args.sequences, args.adapters, args.context)
    if args.profile:
        profile = cProfile.Profile()
        profile.enable()
        for _ in range(args.steps):
            built.step()
        profile.disable()
        pstats.Stats(profile).sort_stats("tottime").print_stats(25)
        return
    print(
        f"{args.sequences} sequences, {args.adapters} adapters, context {args.context}; medians of {args.steps}, in us"
    )
    for name, value in phases(built, args.steps).items():
        print(f"{name:12} {value:8.0f}")


if __name__ == "__main__":
    main()

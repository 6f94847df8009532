"""What a decode step costs the host: Python and numpy from the schedule to the encoded replies, with no model behind.

    python -m benchmarks.host_step [--sequences 64 256] [--adapters 64] [--answer 200] [--profile]

The real scheduler, pages, leases, batch plan, layout, sampler and replies; the forward pass is left out and the logits
are a constant, so that what is left is what the host does while a device would work. Measured on CPU: on a GPU the
launches themselves come on top (a replay and a few copies). By default the same sequences decode in every step; with
--answer they come and go, each with so many tokens to its answer, and their prompts ride along.
"""

from __future__ import annotations

import argparse
import cProfile
import itertools
import pstats
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adapters.kernels.device_plan import PlanShape, pack
from adapters.plan import LoraPlan, covering
from service.engine import draw, sampler
from service.engine.config import EngineConfig
from service.engine.core import Collect
from service.engine.messages import AdapterRef, FromEngine, Outputs, SamplingParams, Submit, encode
from service.engine.request import Batch
from service.engine.runner import Runner
from service.engine.sampler import Sampling
from service.engine.simulated import Options, build_engine
from service.engine.step_inputs import StepInputs

VOCABULARY = 1000
PAGE = 16
ENDLESS = 2000
"""Tokens of an answer that does not end while it is measured."""


class HostGraphs:
    """graphs.StepGraphs without its device: packs the LoRA plan for it, and knows the most probable tokens."""

    def __init__(self, sequences: int) -> None:
        self._shape = PlanShape.bounded(2048 + sequences, sequences + 1, 1, 16, 16)
        self._buffer = np.zeros(self._shape.size, dtype=np.int32)
        self._logits = torch.zeros(1, VOCABULARY)
        self._greedy = torch.zeros(sequences, dtype=torch.int64)

    deterministic = False

    def run(
        self,
        ids: NDArray[np.int64],
        positions: Any,
        layout: Any,
        plan: LoraPlan | None,
        wanted: Any,
        rules: Any,
        drawn: Any,
    ) -> tuple[Tensor, Tensor]:
        if plan is not None:
            pack(covering(plan, len(ids)), self._shape, self._buffer)
        return self._logits.expand(len(wanted), -1), self._greedy[: len(wanted)]


class HostRunner(Runner):
    """runner.Runner whose device does nothing."""

    def __init__(self, page_size: int, sequences: int) -> None:
        self.ahead = True
        self.page_size = page_size
        self.graphs = HostGraphs(sequences)  # type: ignore[assignment]
        self._device = torch.device("cpu")
        self._drawn = torch.empty(0, dtype=torch.int64)
        self._row_of = {}
        self._inputs = StepInputs(page_size)
        self._draw, self._lineup, self._sampling = draw.draw, None, Sampling([])
        self.collect: Callable[[Collect], Any] = lambda collect: collect()

    def launch(self, batch: Batch) -> Collect:
        collect = super().launch(batch)
        return lambda: self.collect(collect)


class Bench:
    """An engine in which so many sequences decode, over so many adapters in turn, each at another place of its page."""

    def __init__(self, sequences: int, adapters: int, context: int, answer: int) -> None:
        folder = tempfile.mkdtemp()
        config = EngineConfig(
            model_path="", blobs_dir=folder, cache_dir=folder, socket="", page_size=PAGE,
            max_sequences=sequences, max_queue=2 * sequences, kv_pages=sequences * (context + ENDLESS) // PAGE,
            max_positions=context + PAGE + ENDLESS, max_tokens_per_step=2048, arena_bytes=64 << 20,
        )  # fmt: skip
        self.engine, _ = build_engine(config, self._receive, Options(vocab_size=VOCABULARY))
        self.engine.runner = self.runner = HostRunner(PAGE, sequences)
        self.encode: Callable[[FromEngine], bytes] = encode
        self._adapters, self._context, self._answer = adapters, context, answer
        self._numbers = itertools.count()
        self._ended = 0
        for number in range(sequences):
            # The first answers are cut short, so that they do not all end at once.
            self._submit(answer * (number + 1) // sequences if answer else ENDLESS)
        while self.engine.scheduler.num_waiting or any(
            seq.num_computed < seq.num_prompt for seq in self.engine.scheduler.running
        ):
            self.step()
        for _ in range(3):
            self.step()

    def step(self) -> None:
        self.engine.step()
        while self._ended:
            self._ended -= 1
            self._submit(self._answer)

    def _submit(self, answer: int) -> None:
        number = next(self._numbers)
        request = Submit(
            request_id=f"chatcmpl-{number:020}",
            prompts=[[number % VOCABULARY, *range(1, self._context + number % PAGE)]],
            adapters=(AdapterRef(f"adapter{number % self._adapters}"),) if self._adapters else (),
            sampling=SamplingParams(temperature=0.0, max_tokens=max(1, answer), stop_token_ids=(VOCABULARY - 1,)),
        )
        self.engine.handle(b"bench", request)

    def _receive(self, client: bytes, message: FromEngine) -> None:
        self.encode(message)
        if self._answer and isinstance(message, Outputs):
            self._ended += sum(delta.finish_reason is not None for delta in message.deltas)

    def whole(self, steps: int) -> dict[str, float]:
        """Medians of a step, in us."""
        processor, wall = [], []
        for _ in range(steps):
            begin, began = time.thread_time(), time.perf_counter()
            self.step()
            processor.append(time.thread_time() - begin)
            wall.append(time.perf_counter() - began)
        return {"whole step": statistics.median(processor) * 1e6, "  by the clock": statistics.median(wall) * 1e6}

    def parts(self, steps: int) -> dict[str, float]:
        """Medians of the parts of a step, in us of processor time. Timed apart from the whole: the clock costs 1 us a
        part."""
        engine, runner = self.engine, self.runner
        times = {
            "schedule": _timed(engine.scheduler, "schedule"),
            "launch": _timed(runner, "launch"),
            "pack": _timed(runner.graphs, "run"),
            "sampler": _timed(sampler, "sample"),
            "readback": _timed(runner, "collect"),
            "assume": _timed(engine, "_assume"),
            "advance": _timed(engine, "_advance"),
            "reply": _timed(engine, "_reply"),
            "encode": _timed(self, "encode"),
        }
        for _ in range(steps):
            self.step()
        of = {name: np.array(taken[-steps:]) for name, taken in times.items()}
        found = {
            "schedule": of["schedule"],
            "arrays and plan": of["launch"] - of["pack"] - of["sampler"],
            "plan for device": of["pack"],
            "sampler": of["sampler"],
            "readback": of["readback"],
            "books": of["assume"] + of["advance"],
            "replies": of["reply"] - of["encode"],
            "encode": of["encode"],
        }
        return {name: float(np.median(taken)) * 1e6 for name, taken in found.items()}


def _timed(owner: Any, method: str) -> list[float]:
    """From now on, what each call takes."""
    function, times = getattr(owner, method), []

    def timed(*arguments: Any) -> Any:
        begin = time.thread_time()
        result = function(*arguments)
        times.append(time.thread_time() - begin)
        return result

    setattr(owner, method, timed)
    return times


def profile(bench: Bench, steps: int) -> None:
    profiler = cProfile.Profile()
    profiler.enable()
    for _ in range(steps):
        bench.step()
    profiler.disable()
    pstats.Stats(profiler).sort_stats("tottime").print_stats(25)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sequences", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--adapters", type=int, default=64, help="0: the base alone")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--answer", type=int, default=0, help="tokens after which sequences are replaced; 0: never")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--profile", action="store_true", help="print where the time of whole steps goes")
    args = parser.parse_args()
    torch.set_num_threads(1)
    columns = []
    for sequences in args.sequences:
        bench = Bench(sequences, args.adapters, args.context, args.answer)
        if args.profile:
            profile(bench, args.steps)
        else:
            columns.append(bench.whole(args.steps) | bench.parts(args.steps))
    if not columns:
        return
    print(f"{args.adapters} adapters, context {args.context}; medians of {args.steps} steps, in us of processor time")
    print(f"{'sequences':16}", *(f"{sequences:8}" for sequences in args.sequences))
    for name in columns[0]:
        print(f"{name:16}", *(f"{column[name]:8.0f}" for column in columns))


if __name__ == "__main__":
    main()

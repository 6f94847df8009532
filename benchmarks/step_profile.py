"""Where the time of a step goes: the engine's steps, timed, then taken apart into kernels. Without HTTP.

    python -m benchmarks.step_profile MODEL --adapters DIR --cases base:1,one:1,base:64,one:64,distinct:64

A case is `kind:concurrency` as in benchmarks/engine.py (base, one or distinct), or `kind:concurrency:sampled`, which
draws by --sampling. Of each: steps in which all sequences decode, and steps in which one prompt of --prompt tokens
rides with the others. Wall time is that from step to step while nothing else is measured; host time is that of a step
without its wait for the device; busy time is the sum of the kernels' times.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import msgspec

from benchmarks.engine import Driver, driving
from service.engine.messages import AdapterRef, SamplingParams, Submit
from service.engine.request import Batch


class Profiler:
    """Drives an engine, and notes what each step was and how long its parts took."""

    def __init__(self, driver: Driver, digests: list[str], prompt: int, sampled: SamplingParams) -> None:
        self.driver, self.engine = driver, driver.engine
        self.digests, self.prompt = digests, prompt
        self.number = 0
        self.sampling = self.greedy = SamplingParams(temperature=0.0)
        self.sampled = sampled
        self.steps: list[tuple[int, int, float, float]] = []
        """(prompt tokens, decoding sequences, seconds, of them waiting) of each step."""
        self._kind = (0, 0)
        self._waited = 0.0
        launch = self.engine.runner.launch

        def noting(batch: Batch) -> Callable:
            self._kind = (sum(i.count for i in batch.items if i.count > 1), sum(i.count == 1 for i in batch.items))
            collect = launch(batch)

            def waiting() -> list:
                begin = time.perf_counter()
                results = collect()
                self._waited += time.perf_counter() - begin
                return results

            return waiting

        self.engine.runner.launch = noting  # type: ignore[method-assign]

    def submit(self, kind: str, slot: int, tokens: int) -> None:
        digest = {"base": None, "one": self.digests[:1], "distinct": self.digests[slot % max(1, len(self.digests)) :]}
        chosen = digest[kind]
        self.number += 1
        vocabulary = self.engine.manifest.vocab_size // 2
        name = f"{self.number}/{slot}"
        self.driver.times[name] = []
        self.engine.handle(
            b"bench",
            Submit(
                request_id=name,
                prompts=[[(self.number * 7919 + i * 104729) % vocabulary for i in range(self.prompt)]],
                adapters=(AdapterRef(chosen[0]),) if chosen else (),
                sampling=msgspec.structs.replace(self.sampling, max_tokens=tokens),
            ),
        )

    def step(self) -> None:
        self._waited = 0.0
        begin = time.perf_counter()
        if not self.engine.step():
            time.sleep(0.0002)
            return
        self.steps.append((*self._kind, time.perf_counter() - begin, self._waited))

    def case(self, kind: str, streams: int, steps: int, top: int, *, sampled: bool) -> None:
        self.sampling = self.sampled if sampled else self.greedy
        kind_name = f"{kind}:{streams}{' sampled' if sampled else ''}"
        rides = max(3, steps // 4)
        for slot in range(streams):
            self.submit(kind, slot, 4096)
        while any(not times for times in self.driver.times.values()):
            self.step()
        self.timed(f"{kind_name} decode", steps, 0, top, lambda: None)
        if 1 < streams < self.engine.limits.max_sequences:  # else no prompt has room beside them

            def ride() -> None:
                if not self.engine.scheduler.num_waiting:
                    self.submit(kind, streams, 1)

            self.timed(f"{kind_name} with a prompt of {self.prompt}", rides, self.prompt, top, ride)
        self.engine.drop_client(b"bench")
        self.driver.times.clear()
        for _ in range(3):
            self.step()

    def timed(self, name: str, steps: int, prompt: int, top: int, before: Callable[[], None]) -> None:
        from torch.autograd.profiler_util import EventList
        from torch.cuda import is_available
        from torch.profiler import ProfilerActivity, profile

        activity = ProfilerActivity.CUDA if is_available() else ProfilerActivity.CPU

        for _ in range(3):
            before()
            self.step()
        self.steps.clear()
        while len(self.steps) < steps:
            before()
            self.step()
        mine = [(wall, waited) for tokens, _, wall, waited in self.steps if (tokens > 0) == (prompt > 0)]
        wall = statistics.median(w for w, _ in mine) * 1e3
        host = statistics.median(w - waited for w, waited in mine) * 1e3
        with profile(activities=[activity]) as profiler:
            for _ in range(4):
                before()
                self.step()
        self.steps.clear()
        events: EventList = profiler.events()
        spent: Counter[str] = Counter()
        count: Counter[str] = Counter()
        for event in events:
            if str(event.device_type).endswith("CUDA"):
                spent[event.name] += event.time_range.elapsed_us()
                count[event.name] += 1
        busy = sum(spent.values()) / 4e3
        print(
            f"{name}: wall {wall:.2f} ms, host {host:.2f} ms, kernels {busy:.2f} ms in {sum(count.values()) / 4:.0f} "
            f"launches ({len(mine)} steps)",
            flush=True,
        )
        for kernel, us in spent.most_common(top):
            print(
                f"    {us / 4e3:7.3f} ms {count[kernel] / 4:6.1f} x {us / count[kernel]:7.1f} us  {kernel[:90]}",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--adapters", type=Path)
    parser.add_argument("--count", type=int, default=64, help="adapters used, in order of name")
    parser.add_argument("--cases", default="base:1,one:1,base:64,one:64,distinct:64")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of each prompt")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--top", type=int, default=14, help="kernels named")
    parser.add_argument("--sampling", default='{"temperature": 0.8, "top_p": 0.9}', help="of sampled cases, JSON")
    parser.add_argument("--config", default="{}", help="EngineConfig fields as JSON")
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("service").setLevel(logging.INFO)  # how long warm-up and graphs took
    folders = sorted(args.adapters.iterdir())[: args.count] if args.adapters else []
    with driving(args.model, folders, {"device": "cuda"} | json.loads(args.config)) as (driver, digests):
        sampled = msgspec.json.decode(args.sampling, type=SamplingParams)
        profiler = Profiler(driver, digests, args.prompt, sampled)
        for case in args.cases.split(","):
            kind, streams, *drawn = case.split(":")
            profiler.case(kind, int(streams), args.steps, args.top, sampled=drawn == ["sampled"])


if __name__ == "__main__":
    main()

"""What a swap of adapters costs, asked of a real server over HTTP: the request that needs it, and those beside it.

    python -m benchmarks.swaps MODEL --adapters DIR --serve "--device cuda" --append

MODEL and DIR as benchmarks/random_base.py makes them. The server has places on the device for RESIDENT adapters only,
so that with every other one that comes the least recently used has to leave; it stays in host memory.

First, single requests, one after another, in turns: to an adapter that is on the device, to one that host memory alone
has, to one that is in no memory (its block file is in the page cache), and to one without a block file. The last stands
for one just uploaded: there the engine begins to pack at once, unasked, so here the block file of an older one is
deleted, and the request has to wait for all of it. Prompts are random ids: none finds another's prefix.

Then streams of the base model, alone and while a process of its own loads adapters at a fixed rate, whether the server
keeps up or not: from host memory, where each load is one request and drives another adapter out, and from the page
cache, where each is unloaded once it has come. A window with swaps lies between two without. The streams' contexts are
of all lengths at any time, so that no window has longer ones than another. On CPU there is no host memory between file
and device, and what needs it is left out.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import itertools
import json
import multiprocessing
import random
import re
import tempfile
import time
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import httpx

from adapters.block_files import delete_blocks
from benchmarks import report
from benchmarks.flood import percentile
from benchmarks.raw_client import complete
from benchmarks.throughput import adapters_of, running, upload

RESIDENT = 4
FEWEST = 2 * RESIDENT
STATS_S = 3.0
"""After so long /metrics shows what was."""
WARM_UP = 2
PLACES = {
    "device": "on the device",
    "host": "in host memory",
    "disk": "block file in the page cache",
    "packed": "first use: packed, then loaded",
}
ASKED = {"host": 5.0, "disk": 30.0}
"""Milliseconds that the first token may come later than from the device."""
ASKED_BESIDE = 1.05


async def move(http: httpx.AsyncClient, name: str, how: str) -> None:
    """`how`: load or unload. RuntimeError, which unlike httpx's can be sent between processes, if it fails."""
    answer = await http.post(f"/v1/adapters/{name}/{how}", params={"wait": "true"})
    if answer.status_code != 200:
        raise RuntimeError(f"{how} {name}: {answer.status_code}: {answer.text}")


@dataclass
class Server:
    """The server, and what is asked of it."""

    http: httpx.AsyncClient
    port: int
    cache: Path
    names: list[str]
    vocabulary: int
    rng: random.Random
    has_host: bool = False

    def prompt(self, length: int) -> list[int]:
        return [self.rng.randrange(3, self.vocabulary) for _ in range(length)]

    async def expect(self, name: str, *places: str) -> str:
        """The adapter's digest. RuntimeError if it is in none of these places."""
        answer = await self.http.get(f"/v1/adapters/{name}")
        answer.raise_for_status()
        found = answer.json()
        if found["residency"] not in places:
            raise RuntimeError(f"{name} is {found['residency']}, not {' or '.join(places)}: is --host-cache-bytes low?")
        return str(found["spec"]["sha256"])

    async def metric(self, name: str) -> float:
        await asyncio.sleep(STATS_S)
        text = (await self.http.get("/metrics")).text
        found = re.search(rf"^loraplex_engine_{name} (\S+)$", text, re.MULTILINE)
        if found is None:
            raise RuntimeError(f"/metrics has no {name}")
        return float(found[1])

    async def lay_out(self, turn: int) -> dict[str, str]:
        """{place: adapter that is there}, others with every turn."""
        shift = turn * len(PLACES) % len(self.names)
        device, host, disk, packed, *rest = self.names[shift:] + self.names[:shift]
        for name in (disk, packed):
            await move(self.http, name, "unload")
        for name in (host, *rest[: RESIDENT - 1], device):
            await move(self.http, name, "load")
        digest = await self.expect(disk, "absent")
        for path in self.cache.glob(f"blocks/*/*/{digest}.block"):
            path.read_bytes()  # into the page cache, should it have left it
        delete_blocks(self.cache, await self.expect(packed, "absent"))
        await self.expect(device, "device")
        found = {"device": device, "host": host, "disk": disk, "packed": packed}
        if self.has_host:
            await self.expect(host, "host")
        else:
            del found["host"]
        return found


async def first_tokens(server: Server, args: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds to the first token by where the adapter was."""
    seconds: dict[str, list[float]] = {}
    for turn in range(WARM_UP + args.requests):
        found = await server.lay_out(turn)
        await asyncio.sleep(args.settle)
        # The base first: what comes after a rest takes longer, and that is the fault of no adapter.
        for place, name in {"": "base", **found}.items():
            times: list[float] = []
            body = {"model": name, "prompt": server.prompt(args.prompt), "max_tokens": args.output}
            await complete(server.port, {**body, "stream": True}, times)
            if place and turn >= WARM_UP:
                seconds.setdefault(place, []).append(times[1] - times[0])
    return seconds


# ---------------------------------------------------------------- beside streams


@dataclass(frozen=True)
class Swaps:
    """What became of a window's loads."""

    begun: int
    late: int
    """Not begun, for the server was too far behind."""
    seconds: list[float]
    """From when it was due until its answer; of those answered within the window."""


async def _swap(url: str, names: list[str], rate: float, seconds: float, unload: bool) -> Swaps:
    took: list[float] = []
    late = 0
    # In order of their last use. RESIDENT of them stay here, so that the first has always been driven out.
    free = deque(names)
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits, trust_env=False) as http:

        async def one(name: str, due: float) -> None:
            await move(http, name, "load")
            if (now := time.perf_counter()) <= end:
                took.append(now - due)
            if unload:
                await move(http, name, "unload")
            free.append(name)

        begin = time.perf_counter()
        end = begin + seconds
        async with asyncio.TaskGroup() as tasks:
            for number in range(round(rate * seconds)):
                due = begin + number / rate
                await asyncio.sleep(max(0.0, due - time.perf_counter()))
                if len(free) > RESIDENT:
                    tasks.create_task(one(free.popleft(), due))
                else:
                    late += 1
            await asyncio.sleep(max(0.0, end - time.perf_counter()))
    return Swaps(round(rate * seconds) - late, late, took)


def swap(url: str, names: list[str], rate: float, seconds: float, unload: bool) -> Swaps:
    """Loads `names` in turn, `rate` of them a second. To be run in a process of its own."""
    return asyncio.run(_swap(url, names, rate, seconds, unload))


class Streams:
    """Streams of the base model that never end."""

    def __init__(self, server: Server, count: int, longest: int) -> None:
        self._server = server
        self._runs: list[list[float]] = []
        self._tasks = [asyncio.create_task(self._run(number * longest // count, longest)) for number in range(count)]

    async def _run(self, ahead: int, longest: int) -> None:
        """`ahead`: tokens of the first prompt, and fewer of its answer."""
        while True:
            times: list[float] = []
            self._runs.append(times)
            prompt = self._server.prompt(ahead + 16)
            await complete(
                self._server.port,
                {"model": "base", "prompt": prompt, "max_tokens": longest - ahead, "stream": True},
                times,
            )
            ahead = 0

    async def wait(self, seconds: float) -> None:
        """Raises what a stream has failed with."""
        done, _ = await asyncio.wait(self._tasks, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()

    async def begun(self) -> None:
        """Waits until every stream runs: the first prompts are long."""
        while len(self._runs) < len(self._tasks) or any(len(times) < 2 for times in self._runs[: len(self._tasks)]):
            await self.wait(0.1)

    def gaps(self, begin: float, seconds: float) -> list[float]:
        """Seconds between two events of a stream, of those that came within the window."""
        pairs = (pair for times in self._runs for pair in itertools.pairwise(times[1:]))
        found = [b - a for a, b in pairs if begin <= a and b <= begin + seconds]
        if not found:
            raise RuntimeError("the streams had no events in a window")
        return found

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


@dataclass(frozen=True)
class Window:
    what: str
    gaps: list[float]
    swaps: Swaps | None = None

    @property
    def p99(self) -> float:
        return percentile(self.gaps, 0.99)


async def beside(server: Server, url: str, args: argparse.Namespace) -> list[Window]:
    """Windows alone at even places, with swaps at odd ones."""
    positions = json.loads((args.model / "config.json").read_text())["max_position_embeddings"]
    streams = Streams(server, args.streams, min(args.longest, positions - 32))
    windows: list[Window] = []
    loop = asyncio.get_running_loop()

    async def alone() -> None:
        begin = time.perf_counter()
        await streams.wait(args.seconds)
        windows.append(Window("alone", streams.gaps(begin, args.seconds)))

    async def swapping(pool: ProcessPoolExecutor, place: str) -> None:
        for name in server.names:
            await move(server.http, name, "load" if place == "host" else "unload")
        wanted = ("device", "host") if place == "host" else ("absent",)
        for name in server.names:
            await server.expect(name, *wanted)
        before = await server.metric("adapter_loads_total")
        begin = time.perf_counter()
        given = (url, server.names, args.rate, args.seconds, place == "disk")
        running = loop.run_in_executor(pool, swap, *given)
        await streams.wait(args.seconds)
        swaps = await running
        gaps = streams.gaps(begin, args.seconds)
        loads = await server.metric("adapter_loads_total") - before
        for name in server.names:
            await server.expect(name, *wanted)
        if loads != swaps.begun:
            raise RuntimeError(f"{swaps.begun} loads were asked for, and the server counts {loads:.0f}")
        windows.append(Window(f"swaps, {PLACES[place]}", gaps, swaps))

    try:
        # A process that has imported all before it is timed.
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            await loop.run_in_executor(pool, swap, url, [], 1.0, 0.0, False)
            await streams.begun()
            await streams.wait(args.warm_up)
            gc.collect()
            gc.disable()
            await alone()
            for place in ("host", "disk") if server.has_host else ("disk",):
                await swapping(pool, place)
                await streams.wait(1)
                await alone()
    finally:
        gc.enable()
        await streams.close()
    return windows


# ---------------------------------------------------------------- what is said of it


def told_first(seconds: dict[str, list[float]], args: argparse.Namespace) -> list[str]:
    lines = [
        "| the adapter is | TTFT p50, ms | p99 | max | p50 later than from the device, ms | asked |",
        "|---|---|---|---|---|---|",
    ]
    base = median(seconds["device"])
    for place, values in seconds.items():
        figures = [median(values), percentile(values, 0.99), max(values)]
        later = "" if place == "device" else f"{(figures[0] - base) * 1e3:.1f}"
        asked = f"at most {ASKED[place]:g}" if place in ASKED else ""
        lines.append(f"| {PLACES[place]} | {' | '.join(f'{f * 1e3:.1f}' for f in figures)} | {later} | {asked} |")
    lines += ["", f"Single requests, {args.requests} each, {args.prompt} tokens in, {args.output} out, in turns."]
    if "host" not in seconds:
        lines[-1] += " This server keeps no adapters in host memory (on CPU files are read straight to their place)."
    return lines


def told_beside(windows: list[Window], args: argparse.Namespace) -> list[str]:
    lines = [
        f"| {args.streams} streams of the base, {args.seconds:g} s | between two events, p50, ms | p99 | max "
        "| p99, times that alone before and after |",
        "|---|---|---|---|---|",
    ]
    notes = []
    for number, window in enumerate(windows):
        figures = f"{median(window.gaps) * 1e3:.2f} | {window.p99 * 1e3:.2f} | {max(window.gaps) * 1e3:.2f}"
        ratio = ""
        if window.swaps is not None:
            neighbours = [windows[number - 1], windows[number + 1]]
            ratio = f"{window.p99 / percentile([g for each in neighbours for g in each.gaps], 0.99):.3f}"
            took = window.swaps.seconds
            reached = len(took) / args.seconds
            spent = f"p50 {median(took) * 1e3:.1f} ms, p99 {percentile(took, 0.99) * 1e3:.1f}" if took else "none ended"
            notes.append(
                f"- {window.what}: {args.rate:g} loads a second wanted, {reached:.1f} answered in the window "
                f"({window.swaps.late} not begun because the server was too far behind); a load took {spent}. "
                f"p99 alone, after / before: {neighbours[1].p99 / neighbours[0].p99:.3f}."
            )
        lines.append(f"| {window.what} | {figures} | {ratio} |")
    return [*lines, "", f"Asked is a ratio of at most {ASKED_BESIDE:g}.", "", *notes]


async def run(url: str, cache: Path, names: list[str], args: argparse.Namespace) -> list[str]:
    async with httpx.AsyncClient(base_url=url, timeout=600, trust_env=False) as http:
        vocabulary = json.loads((args.model / "config.json").read_text())["vocab_size"] // 2
        server = Server(http, args.port, cache, names, vocabulary, random.Random(args.seed))
        server.has_host = await server.metric("adapter_host_capacity_bytes") > 0
        first = await first_tokens(server, args)
        windows = await beside(server, url, args)
    return [
        f"`python -m benchmarks.swaps ... --requests {args.requests} --rate {args.rate:g} --seconds {args.seconds:g} "
        f"--serve {args.serve!r}`: {len(names)} adapters, places for {RESIDENT} on the device. {args.note}",
        "",
        *told_first(first, args),
        "",
        *told_beside(windows, args),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--adapters", type=Path, required=True, help=f"folder of at least {FEWEST} adapters")
    parser.add_argument("--prefix", default="all-")
    parser.add_argument("--requests", type=int, default=20, help="to adapters of each place")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--output", type=int, default=8)
    parser.add_argument("--settle", type=float, default=0.2, help="seconds of rest before each turn of requests")
    parser.add_argument("--streams", type=int, default=16, help="of the base model, beside the swaps")
    parser.add_argument("--longest", type=int, default=4096, help="tokens of such a stream, after which it begins anew")
    parser.add_argument("--warm-up", type=float, default=5.0, help="seconds of streams before the first window")
    parser.add_argument("--rate", type=float, default=50.0, help="swaps a second")
    parser.add_argument("--seconds", type=float, default=20.0, help="of a window")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--port", type=int, default=8320)
    parser.add_argument("--data", type=Path, help="data folder to keep (compile caches); default: a temporary one")
    parser.add_argument("--serve", default="--device cuda", help="further options of the server")
    parser.add_argument("--append", action="store_true", help="add the result to RESULTS.md")
    parser.add_argument("--note", default="", help="what to say of the machine")
    args = parser.parse_args()
    folders = adapters_of(args)
    if len(folders) < FEWEST:
        parser.error(f"{args.adapters} has {len(folders)} adapters {args.prefix}*, and {FEWEST} are needed")
    options = [*args.serve.split(), "--max-resident-adapters", str(RESIDENT)]
    url = f"http://127.0.0.1:{args.port}"
    with tempfile.TemporaryDirectory() as temporary:
        data = args.data or Path(temporary) / "data"
        with running(args.model, args.port, data, options):
            upload(url, folders)
            lines = asyncio.run(run(url, data / "cache", [folder.name for folder in folders], args))
    report.give("What a swap of adapters costs, over HTTP", lines, append_it=args.append)


if __name__ == "__main__":
    main()

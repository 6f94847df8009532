"""What one tenant's flood does to another, as benchmarks/fairness.py, but asked of a real server over HTTP.

    python -m benchmarks.flood MODEL --serve "--device cuda" --requests 60 --append

A server with tenants and keys. The quiet tenant sends requests alone, each after the last has ended; then one a second
while the other keeps --flood requests in flight. At the end three tenants of weights 1, 2 and 5 ask for more than there
is, and what each got is read from the server's own account (/v1/usage). Prompts are random ids: none finds another's
prefix.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import random
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import httpx

from benchmarks import report
from benchmarks.raw_client import complete
from benchmarks.throughput import running

ADMIN = "lp-admin-benchmark-0123456789abcdef0123456789abcdef"
WEIGHTS = {"w1": 1.0, "w2": 2.0, "w5": 5.0}
INTERVALS = 5


def percentile(values: list[float], share: float) -> float:
    """The smallest value that at least this share of `values` does not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, -(-int(share * 1000) * len(ordered) // 1000) - 1))]


@dataclass
class Load:
    """How requests are made."""

    http: httpx.AsyncClient
    """For all that is asked once."""
    port: int
    vocabulary: int
    prompt: int
    output: int
    rng: random.Random

    async def ask(self, key: str, *, stream: bool = True) -> tuple[float, list[float]]:
        """(seconds to the first token, seconds between two events after it). RuntimeError if it fails. stream False:
        the answer comes in one piece, which costs this process least."""
        body = {
            "model": "base",
            "prompt": [self.rng.randrange(3, self.vocabulary) for _ in range(self.prompt)],
            "max_tokens": self.output,
            "stream": stream,
        }
        times: list[float] = []
        await complete(self.port, body, times, key)
        return times[1] - times[0], [b - a for a, b in itertools.pairwise(times[1:])]

    async def keep(self, key: str, count: int, stop: asyncio.Event, gaps: list[float], *, stream: bool = True) -> int:
        """`count` requests in flight until `stop`; how many ended. Those in flight are then broken off."""
        done = 0

        async def one() -> None:
            nonlocal done
            while not stop.is_set():
                _, between = await self.ask(key, stream=stream)
                gaps.extend(between)
                done += 1

        tasks = [asyncio.create_task(one()) for _ in range(count)]
        waiting = asyncio.create_task(stop.wait())
        finished, _ = await asyncio.wait([*tasks, waiting], return_when=asyncio.FIRST_COMPLETED)
        for task in (*tasks, waiting):
            task.cancel()
        for task in finished - {waiting}:
            task.result()  # only a failed one ends before `stop`
        await asyncio.gather(*tasks, waiting, return_exceptions=True)
        return done


async def beside(
    load: Load, keys: dict[str, str], args: argparse.Namespace
) -> tuple[list[float], list[float], list[float]]:
    """(TTFT alone, TTFT beside the flood, the flood's gaps between events), in seconds."""
    for _ in range(2):
        await load.ask(keys["quiet"])
    alone = [(await load.ask(keys["quiet"]))[0] for _ in range(args.requests)]
    stop, gaps = asyncio.Event(), []
    flood = asyncio.create_task(load.keep(keys["flood"], args.flood, stop, gaps))
    await asyncio.sleep(args.settle)
    asked = []
    for _ in range(args.requests):
        asked.append(asyncio.create_task(load.ask(keys["quiet"])))
        await asyncio.sleep(args.every)
        if flood.done():
            flood.result()
    found = [(await each)[0] for each in asked]
    stop.set()
    await flood
    return alone, found, gaps


async def shares(load: Load, keys: dict[str, str], args: argparse.Namespace) -> list[dict[str, int]]:
    """Tokens, prompts' and generated ones, that each tenant of WEIGHTS got, in each of INTERVALS. Not streamed: a
    client that cannot keep up with 600 streams would ask for less than there is, and then nobody has to share."""

    async def used() -> dict[str, int]:
        answer = await load.http.get("/v1/usage?group_by=tenant", headers={"Authorization": f"Bearer {ADMIN}"})
        answer.raise_for_status()
        rows = answer.json()["data"]
        return {
            name: sum(r["prompt_tokens"] + r["completion_tokens"] for r in rows if r["tenant"] == name)
            for name in WEIGHTS
        }

    stop = asyncio.Event()
    tasks = [asyncio.create_task(load.keep(keys[name], args.flood, stop, [], stream=False)) for name in WEIGHTS]
    await asyncio.sleep(args.settle)
    readings = [await used()]
    begin = time.perf_counter()
    for i in range(INTERVALS):
        await asyncio.sleep(begin + (i + 1) * args.seconds / INTERVALS - time.perf_counter())
        readings.append(await used())
    stop.set()
    await asyncio.gather(*tasks)
    return [{name: b[name] - a[name] for name in WEIGHTS} for a, b in itertools.pairwise(readings)]


async def run(url: str, args: argparse.Namespace) -> list[str]:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits, trust_env=False) as http:
        admin = {"Authorization": f"Bearer {ADMIN}"}
        keys = {}
        for name, weight in {"quiet": 1.0, "flood": 1.0, **WEIGHTS}.items():
            made = await http.post("/v1/tenants", json={"name": name, "weight": weight}, headers=admin)
            made.raise_for_status()
            made = await http.post(f"/v1/tenants/{name}/keys", json={"scopes": ["infer"]}, headers=admin)
            made.raise_for_status()
            keys[name] = made.json()["key"]
        vocabulary = json.loads((args.model / "config.json").read_text())["vocab_size"] // 2
        load = Load(http, args.port, vocabulary, args.prompt, args.output, random.Random(args.seed))
        alone, found, gaps = await beside(load, keys, args)
        got = await shares(load, keys, args)
    ratio = percentile(found, 0.99) / percentile(alone, 0.99)
    lines = [
        f"| alone | {median(alone) * 1e3:.1f} | {percentile(alone, 0.99) * 1e3:.1f} | {max(alone) * 1e3:.1f} |",
        f"| beside {args.flood} requests in flight | {median(found) * 1e3:.1f} | {percentile(found, 0.99) * 1e3:.1f} "
        f"| {max(found) * 1e3:.1f} |",
    ]
    weights = sum(WEIGHTS.values())
    whole = {name: sum(each[name] for each in got) for name in WEIGHTS}
    tokens = sum(whole.values())
    told = ", ".join(f"{name} {whole[name] / tokens:.3f} (weight's {w / weights:.3f})" for name, w in WEIGHTS.items())
    told += "; in each fifth of the time " + "; ".join(
        f"{name} " + ", ".join(f"{each[name] / max(1, sum(each.values())):.3f}" for each in got) for name in WEIGHTS
    )
    return [
        f"`python -m benchmarks.flood ... --requests {args.requests} --serve {args.serve!r}`: {args.prompt} tokens in, "
        f"{args.output} out. {args.note}",
        "",
        "| the quiet tenant's time to first token, ms | p50 | p99 | max |",
        "|---|---|---|---|",
        *lines,
        "",
        f"- p99 beside the flood is {ratio:.2f} times that alone ({args.requests} requests each).",
        f"- Between two events of the flood: {median(gaps) * 1e3:.1f} ms, p99 {percentile(gaps, 0.99) * 1e3:.1f} ms.",
        f"- Shares of {tokens} tokens in {args.seconds:g} s of three floods: {told}.",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--requests", type=int, default=120, help="of the quiet tenant, alone and beside the flood")
    parser.add_argument("--every", type=float, default=1.0, help="seconds between two of them beside the flood")
    parser.add_argument("--flood", type=int, default=200, help="requests in flight")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--output", type=int, default=128)
    parser.add_argument("--settle", type=float, default=10.0, help="seconds of flood before anything is measured")
    parser.add_argument("--seconds", type=float, default=60.0, help="of the three floods")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--port", type=int, default=8310)
    parser.add_argument("--data", type=Path, help="data folder to keep (compile caches); default: a temporary one")
    parser.add_argument("--serve", default="--device cuda", help="further options of the server")
    parser.add_argument("--append", action="store_true", help="add the result to RESULTS.md")
    parser.add_argument("--note", default="", help="what to say of the machine")
    args = parser.parse_args()
    os.environ["LORAPLEX_ADMIN_KEY"] = ADMIN
    with running(args.model, args.port, args.data, args.serve.split()):
        lines = asyncio.run(run(f"http://127.0.0.1:{args.port}", args))
    report.give("A flood beside another tenant, over HTTP", lines, append_it=args.append)


if __name__ == "__main__":
    main()

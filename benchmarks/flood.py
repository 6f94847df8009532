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
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from statistics import median

import httpx

from benchmarks import report
from benchmarks.raw_client import Load, flooding
from benchmarks.throughput import running

ADMIN = "lp-admin-benchmark-0123456789abcdef0123456789abcdef"
WEIGHTS = {"w1": 1.0, "w2": 2.0, "w5": 5.0}
INTERVALS = 5


def percentile(values: list[float], share: float) -> float:
    """The smallest value that at least this share of `values` does not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, -(-int(share * 1000) * len(ordered) // 1000) - 1))]


async def beside(
    load: Load, keys: dict[str, str], args: argparse.Namespace
) -> tuple[list[float], list[float], list[float]]:
    """(TTFT alone, TTFT beside the flood, the flood's gaps between events), in seconds."""
    for _ in range(2):
        await load.ask(keys["quiet"])
    alone = [(await load.ask(keys["quiet"]))[0] for _ in range(args.requests)]
    with flooding(replace(load, seed=load.seed + 1), keys["flood"], args.flood) as gaps:
        await asyncio.sleep(args.settle)
        asked = []
        for _ in range(args.requests):
            asked.append(asyncio.create_task(load.ask(keys["quiet"])))
            await asyncio.sleep(args.every)
        found = [(await each)[0] for each in asked]
    return alone, found, gaps


async def shares(
    http: httpx.AsyncClient, load: Load, keys: dict[str, str], args: argparse.Namespace
) -> list[dict[str, int]]:
    """Tokens, prompts' and generated ones, that each tenant of WEIGHTS got, in each of INTERVALS. Not streamed: a
    client that cannot keep up with 600 streams would ask for less than there is, and then nobody has to share."""

    async def used() -> dict[str, int]:
        answer = await http.get("/v1/usage?group_by=tenant", headers={"Authorization": f"Bearer {ADMIN}"})
        answer.raise_for_status()
        rows = answer.json()["data"]
        return {
            name: sum(r["prompt_tokens"] + r["completion_tokens"] for r in rows if r["tenant"] == name)
            for name in WEIGHTS
        }

    with ExitStack() as floods:
        for i, name in enumerate(WEIGHTS):
            mine = replace(load, seed=load.seed + 2 + i)
            floods.enter_context(flooding(mine, keys[name], args.flood, stream=False))
        await asyncio.sleep(args.settle)
        readings = [await used()]
        begin = time.perf_counter()
        for i in range(INTERVALS):
            await asyncio.sleep(begin + (i + 1) * args.seconds / INTERVALS - time.perf_counter())
            readings.append(await used())
    return [{name: b[name] - a[name] for name in WEIGHTS} for a, b in itertools.pairwise(readings)]


async def run(url: str, args: argparse.Namespace) -> list[str]:
    async with httpx.AsyncClient(base_url=url, timeout=600, trust_env=False) as http:
        admin = {"Authorization": f"Bearer {ADMIN}"}
        keys = {}
        for name, weight in {"quiet": 1.0, "flood": 1.0, **WEIGHTS}.items():
            made = await http.post("/v1/tenants", json={"name": name, "weight": weight}, headers=admin)
            made.raise_for_status()
            made = await http.post(f"/v1/tenants/{name}/keys", json={"scopes": ["infer"]}, headers=admin)
            made.raise_for_status()
            keys[name] = made.json()["key"]
        vocabulary = json.loads((args.model / "config.json").read_text())["vocab_size"] // 2
        load = Load(args.port, vocabulary, args.prompt, args.output, args.seed)
        alone, found, gaps = await beside(load, keys, args)
        got = await shares(http, load, keys, args)
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
        f"- p90 {percentile(alone, 0.9) * 1e3:.1f} and {percentile(found, 0.9) * 1e3:.1f} ms; p99 beside the flood is "
        f"{ratio:.2f} times that alone ({args.requests} requests each).",
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

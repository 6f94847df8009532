"""Where the time to a first token goes, over HTTP: single requests, one after another, cut up by their own spans.

    python -m benchmarks.first_token MODEL --adapters DIR --serve "--device cuda" [--requests 40] [--append]
    python -m benchmarks.first_token MODEL --serve '--simulated {"vocab_size":49152,"step_s":0.005}'

MODEL and DIR as benchmarks/random_base.py makes them; without DIR only the base is asked. Prompts are random ids, none
finds another's prefix. Base and adapter in turns, on a connection of its own each. The parts of a request follow one
another and make up its whole time:

- in: from the client's last byte until the API process begins with it (its span `POST /v1/completions`)
- api: until the engine's I/O thread has read it (`sequence`): parsed, checked, adapters found
- engine: until a step with it is launched (`prefill`): placed, scheduled, the step's arrays built
- step: until its token is known to the engine: launching, and the device
- out: until the client has the event

The spans themselves cost the API process some 0.1 ms of each request, and both processes a thread that sends them.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import random
import secrets
import time
from pathlib import Path
from statistics import median

from benchmarks import report
from benchmarks.flood import percentile
from benchmarks.raw_client import complete
from benchmarks.throughput import adapters_of, running, upload
from tests.service.collector import Collector, Span
from tests.service.launch import wait_for

PARTS = ("in", "api", "engine", "step", "out")
NAMES = ("POST /v1/completions", "sequence", "prefill")
REST_S = 0.05
"""Between two requests: what the one before has left to do in the server is done."""
WARM_UP = 5


def parts(sent: int, first: int, spans: list[Span]) -> list[int]:
    """Nanoseconds of each of PARTS. sent, first: of the client, since 1970. RuntimeError if one of NAMES is missing or
    there twice."""
    of = {span.name: span for span in spans}
    if [sum(span.name == name for span in spans) for name in NAMES] != [1, 1, 1]:
        raise RuntimeError(f"a request has the spans {sorted(span.name for span in spans)}")
    request, sequence, prefill = (of[name] for name in NAMES)
    times = [sent, request.start, sequence.start, prefill.start, prefill.end, first]
    return [b - a for a, b in itertools.pairwise(times)]


async def ask(port: int, model: str, args: argparse.Namespace, rng: random.Random) -> tuple[str, int, int]:
    """(trace id, nanoseconds since 1970 when it was sent, and when its first token had come)."""
    trace = secrets.token_hex(16)
    prompt = [rng.randrange(3, args.vocabulary) for _ in range(args.prompt)]
    body = {"model": model, "prompt": prompt, "max_tokens": args.output, "stream": True}
    times: list[float] = []
    await complete(port, body, times, headers={"traceparent": f"00-{trace}-{secrets.token_hex(8)}-01"})
    since_1970 = time.time() - time.perf_counter()
    sent, first = (int((since_1970 + at) * 1e9) for at in times[:2])
    return trace, sent, first


async def ask_all(models: list[str], args: argparse.Namespace) -> dict[str, list[tuple[str, int, int]]]:
    rng = random.Random(args.seed)
    asked: dict[str, list[tuple[str, int, int]]] = {model: [] for model in models}
    for turn in range(WARM_UP + args.requests):
        for model in models:
            found = await ask(args.port, model, args, rng)
            if turn >= WARM_UP:
                asked[model].append(found)
            await asyncio.sleep(REST_S)
    return asked


def measure(models: list[str], collector: Collector, args: argparse.Namespace) -> dict[str, list[list[int]]]:
    """{model: the parts of each request, in ns}."""
    asked = asyncio.run(ask_all(models, args))
    by_trace: dict[str, list[Span]] = {}

    traces = [trace for each in asked.values() for trace, _, _ in each]

    def all_there() -> bool:
        by_trace.clear()
        for span in list(collector.spans):
            by_trace.setdefault(span.trace, []).append(span)
        return all({span.name for span in by_trace.get(trace, ())}.issuperset(NAMES) for trace in traces)

    wait_for(all_there, 30)
    return {model: [parts(sent, at, by_trace[trace]) for trace, sent, at in each] for model, each in asked.items()}


def told(found: dict[str, list[list[int]]], args: argparse.Namespace) -> list[str]:
    lines = [f"| ms, p50 (p90) | {' | '.join(PARTS)} | first token |", f"|---|{'---|' * (len(PARTS) + 1)}"]
    for model, requests in found.items():
        columns = [*zip(*requests, strict=True), [sum(each) for each in requests]]
        cells = [f"{median(column) / 1e6:.2f} ({percentile(column, 0.9) / 1e6:.2f})" for column in columns]
        lines.append(f"| {model} | {' | '.join(cells)} |")
    lines += ["", f"{args.requests} requests of each, {args.prompt} tokens in, {args.output} out, in turns."]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--adapters", type=Path, help="folder of adapters PREFIX0, ...; the first is asked")
    parser.add_argument("--prefix", default="all-")
    parser.add_argument("--serve", default="", help="more options of `loraplex serve`")
    parser.add_argument("--port", type=int, default=8300)
    parser.add_argument("--data", type=Path, help="the server's data folder; unset: a temporary one")
    parser.add_argument("--requests", type=int, default=40)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--output", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=30000, help="prompts have smaller ids")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--append", action="store_true", help="append to RESULTS.md")
    parser.add_argument("--note", default="", help="stands above the figures")
    args = parser.parse_args()
    with Collector() as collector:
        options = [*args.serve.split(), "--traces-url", collector.url]
        with running(args.model, args.port, args.data, options):
            models = ["base"]
            if args.adapters is not None:
                folder = adapters_of(args)[0]
                upload(f"http://127.0.0.1:{args.port}", [folder])
                models.append(folder.name)
            found = measure(models, collector, args)
    lines = [*([args.note, ""] if args.note else []), *told(found, args)]
    report.give("Where the time to a first token goes", lines, append_it=args.append)


if __name__ == "__main__":
    main()

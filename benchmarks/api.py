"""What the API processes cost: one simulated engine, driven on its own socket and over HTTP with streaming.

    python -m benchmarks.api [--streams 1,64,256] [--workers 1,2] [--repeats 3] [--against FOLDER] [--append]

The engine's steps take --step-ms (25, so that 256 streams get 10,240 tokens/s at most), its vocabulary is the embedded
model's, whose tokenizer the API process uses. --against runs the same on another checkout of the project, in turns.

Where client, API processes and engine share few cores, wall-clock figures are those of the machine, and the ones that
hold elsewhere are CPU seconds per 1,000 tokens: an API process can do no more than 1,000 tokens in so many seconds.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import psutil

from benchmarks.api_clients import Load, run
from benchmarks.report import append, commit
from service.default_model import ensure_default_model
from service.settings import Settings

ROOT = Path(__file__).resolve().parent.parent
API, ENGINE = "service.api_worker", "service.engine.process"


@dataclass(frozen=True, slots=True)
class Server:
    """A running service with the simulated engine."""

    port: int
    address: str
    """Of the engine's socket."""
    api: list[psutil.Process]
    engine: psutil.Process

    def cpu(self) -> tuple[list[float], float]:
        """CPU seconds so far: each API process's, the engine's."""
        return [_seconds(process) for process in self.api], _seconds(self.engine)


def _seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


@contextlib.contextmanager
def serving(tree: Path, model: Path, workers: int, options: argparse.Namespace) -> Iterator[Server]:
    streams = max(options.streams)
    with tempfile.TemporaryDirectory(prefix="lp-") as folder, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        simulated = {"vocab_size": options.vocabulary, "step_s": options.step_ms / 1e3}
        flags = {
            "port": port,
            "data-dir": folder,
            "model": model,
            "simulated": json.dumps(simulated),
            "api-workers": workers,
            "max-sequences": streams,
            "max-tokens-per-step": 8192,
            "kv-pages": streams * (3 + (options.prompt + options.tokens) // 16),
            "log-level": "warning",
        }
        command = [sys.executable, "-m", "service", "serve", *(f"--{key}={value}" for key, value in flags.items())]
        process = subprocess.Popen(command, cwd=tree, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            _wait(port, process)
            children = psutil.Process(process.pid).children(recursive=True)
            api = [child for child in children if API in child.cmdline()]
            engine = next(child for child in children if ENGINE in child.cmdline())
            yield Server(port, Settings(data_dir=Path(folder)).engine_socket, api, engine)
        finally:
            process.terminate()
            process.wait()


def _wait(port: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while True:
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"http://127.0.0.1:{port}/ready").status_code == 200:
                return
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError("the service did not start")
        time.sleep(0.1)


@dataclass(slots=True)
class Row:
    """One measurement; `name` says which row of the table it belongs to."""

    name: tuple[str, int]
    figures: dict[str, float]


def measure(server: Server, load: Load, name: str, *, direct: bool) -> Row:
    before_api, before_engine = server.cpu()
    sample = run(load, server.address if direct else server.port)
    after_api, after_engine = server.cpu()
    if sample.errors:
        raise RuntimeError(f"{name}: {len(sample.errors)} requests failed: {sample.errors[0]}")
    tokens = load.requests * load.tokens
    api = [b - a for a, b in zip(before_api, after_api, strict=True)]
    return Row(
        (name, load.streams),
        {
            "tok_s": tokens / sample.wall_s,
            "per_event": tokens / sample.arrivals,
            "ttft50": statistics.median(sample.ttft) * 1e3,
            "ttft99": _p99(sample.ttft) * 1e3,
            "itl99": _p99(sample.itl) * 1e3,
            "api": sum(api) / tokens * 1e6,
            "share": max(api) / (sum(api) or 1.0),
            "engine": (after_engine - before_engine) / tokens * 1e6,
            "client": sample.cpu_s / tokens * 1e6,
        },
    )


def _p99(values: list[float]) -> float:
    return statistics.quantiles(values, n=100)[98] if len(values) > 1 else values[0]


def table(rows: list[Row]) -> list[str]:
    """Medians over the repeats, with the range of what is compared."""
    lines = [
        "| driven | streams | tokens/s | of the engine alone | tokens per event | TTFT p50, p99 ms | ITL p99 ms "
        "| CPU s per 1,000 tokens: API (range) | engine | client | API processes for 10,000 tokens/s | busiest |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    names = list(dict.fromkeys(row.name for row in rows))
    for name, streams in names:
        found = [row.figures for row in rows if row.name == (name, streams)]
        mid = {key: statistics.median(each[key] for each in found) for key in found[0]}
        alone = [row.figures["tok_s"] for row in rows if row.name == ("engine alone", streams)]
        share = f"{mid['tok_s'] / statistics.median(alone):.3f}" if alone else "-"
        api = "-"
        if mid["api"] > 1.0:
            low, high = min(each["api"] for each in found), max(each["api"] for each in found)
            api = f"{mid['api'] / 1e3:.3f} ({low / 1e3:.3f} to {high / 1e3:.3f})"
        lines.append(
            f"| {name} | {streams} | {mid['tok_s']:,.0f} | {share} | {mid['per_event']:.2f} "
            f"| {mid['ttft50']:.1f}, {mid['ttft99']:.1f} | {mid['itl99']:.1f} | {api} | {mid['engine'] / 1e3:.3f} "
            f"| {mid['client'] / 1e3:.3f} | {mid['api'] / 100:.2f} | {mid['share']:.0%} |"
        )
    return lines


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--streams", type=numbers, default=[1, 64, 256])
    parser.add_argument("--workers", type=numbers, default=[1, 2], help="API processes")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2, help="requests per stream; a lone one: 20 of 16 tokens")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=128, help="generated per request")
    parser.add_argument("--step-ms", type=float, default=25.0)
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--model", type=Path, help="folder whose tokenizer is used; default: the embedded model")
    parser.add_argument("--path", default="/v1/completions")
    parser.add_argument("--text", action="store_true", help="prompts are text, which the server has to tokenise")
    parser.add_argument("--against", type=Path, help="another checkout, measured in turns with this one")
    parser.add_argument("--append", action="store_true", help="append to RESULTS.md")
    parser.add_argument("--note", default="", help="stands above the figures")
    options = parser.parse_args()
    model = options.model or ensure_default_model(ROOT / "data")
    trees = {"": ROOT} | ({"before: ": options.against.resolve()} if options.against else {})
    rows: list[Row] = []
    for repeat in range(options.repeats):
        for workers in options.workers:
            for label, tree in trees.items():
                with serving(tree, model, workers, options) as server:
                    for streams in options.streams:
                        load = Load(
                            streams=streams,
                            requests=20 if streams == 1 else streams * options.rounds,
                            tokens=16 if streams == 1 else options.tokens,
                            prompt_tokens=options.prompt,
                            vocabulary=options.vocabulary,
                            model=model.name,
                            path=options.path,
                            text=options.text,
                            seed=repeat,
                        )
                        warm = replace(load, requests=streams, tokens=8, seed=-1)
                        run(warm, server.port)
                        name = f"{label}{workers} API process{'es' if workers > 1 else ''}"
                        if not label and workers == options.workers[0]:
                            rows.append(measure(server, load, "engine alone", direct=True))
                            print(_line(rows[-1]), flush=True)
                        # Other prompts, or the prefix cache would have them.
                        load = replace(load, seed=load.seed + 1000 * workers + 100)
                        rows.append(measure(server, load, name, direct=False))
                        print(_line(rows[-1]), flush=True)
    _report(table(rows), options)


def _line(row: Row) -> str:
    return f"{row.name[0]:>24} {row.name[1]:>4} " + " ".join(f"{key}={value:.4g}" for key, value in row.figures.items())


def _report(lines: list[str], options: argparse.Namespace) -> None:
    skipped: dict[str, Any] = {"append": None, "note": None, "against": None, "model": None, "text": None}
    flags = " ".join(
        f"--{key.replace('_', '-')} {','.join(map(str, value)) if isinstance(value, list) else value}"
        for key, value in vars(options).items()
        if key not in skipped
    )
    lines = [
        f"`python -m benchmarks.api {flags}{' --text' if options.text else ''}`; Python {platform.python_version()}; "
        f"{os.cpu_count()} cores shared by client, API processes and engine. Medians of {options.repeats}.",
        *([options.note] if options.note else []),
        "",
        *lines,
    ]
    if options.append:
        append("What the API processes cost", lines)
    else:
        print(commit(), *lines, sep="\n")


if __name__ == "__main__":
    main()

"""Throughput over HTTP: starts the server, uploads adapters, runs an outside load generator row by row.

    python -m benchmarks.throughput MODEL --adapters DIR --loadgen PATH --rows none:1,none:64,identical:64,distinct:64

MODEL and DIR as benchmarks/random_base.py makes them. PATH is a closed-loop load generator that speaks the OpenAI API
(options --base-url --base-model --adapters --adapter-prefix --dist --concurrency --warmup --input-len --output-len
--vocab-low --vocab-high --seed --json); it is no part of this project, so that the same one can be run against other
servers. A row is `distribution:concurrency`, or `prefix/distribution:concurrency` for other adapters than those of
--prefix. --make attn:1000 adds adapters attn-0 to attn-999, made in memory, uploaded, loaded and removed, four at a
time: the disk holds only what the server keeps of each, its files and its packed block, both as large as it is. --url:
rows of a server that runs already. No two rows have the same prompts, so that none finds another's in the prefix cache.
Results go to RESULTS.md beside this file.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import httpx

from benchmarks import report


@contextmanager
def running(model: Path, port: int, data: Path | None, options: list[str]) -> Iterator[float]:
    """A server until the block ends, on a data folder of its own unless one is given; the seconds until /ready."""
    with tempfile.TemporaryDirectory() as temporary:
        server, ready = start(model, port, data or Path(temporary) / "data", options)
        try:
            yield ready
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(60)


def start(model: Path, port: int, data: Path, options: list[str]) -> tuple[subprocess.Popen[bytes], float]:
    """The server process and the seconds it took until /ready."""
    begin = time.perf_counter()
    command = [sys.executable, "-m", "service", "serve", "--model", str(model), "--served-name", "base"]
    command += ["--port", str(port), "--data-dir", str(data), "--log-level", "warning", *options]
    server = subprocess.Popen(command)
    while True:
        if server.poll() is not None:
            raise RuntimeError(f"the server ended with {server.returncode}")
        try:
            if httpx.get(f"http://127.0.0.1:{port}/ready", timeout=2).status_code == 200:
                return server, time.perf_counter() - begin
        except httpx.HTTPError:
            pass
        time.sleep(0.2)


def make(url: str, model: Path, targets: str, numbers: range) -> list[float]:
    """Uploads and loads adapters whose folders exist, in memory, for as long as that takes. Seconds of each, four at a
    time."""
    from benchmarks.random_base import AdapterMaker  # imports torch, which clients' processes are better without

    maker = AdapterMaker(model, targets)
    with httpx.Client(base_url=url, timeout=300) as client, tempfile.TemporaryDirectory(dir="/dev/shm") as temporary:

        def one(number: int) -> float:
            folder = maker.write(Path(temporary), number, 16)
            begin = time.perf_counter()
            with (folder / "adapter_model.safetensors").open("rb") as weights:
                files = {"config": (folder / "adapter_config.json").read_bytes(), "weights": weights}
                client.post("/v1/adapters", data={"name": folder.name}, files=files).raise_for_status()
            client.post(f"/v1/adapters/{folder.name}/load", params={"wait": "true"}).raise_for_status()
            seconds = time.perf_counter() - begin
            shutil.rmtree(folder)
            return seconds

        with ThreadPoolExecutor(4) as threads:
            return list(threads.map(one, numbers))


def upload(url: str, folders: list[Path]) -> list[float]:
    """Seconds of each upload."""
    seconds = []
    with httpx.Client(base_url=url, timeout=120) as client:
        for folder in folders:
            begin = time.perf_counter()
            with (folder / "adapter_model.safetensors").open("rb") as weights:
                files = {"config": (folder / "adapter_config.json").read_bytes(), "weights": weights}
                client.post("/v1/adapters", data={"name": folder.name}, files=files).raise_for_status()
            seconds.append(time.perf_counter() - begin)
        for folder in folders:
            client.post(f"/v1/adapters/{folder.name}/load", params={"wait": "true"}).raise_for_status()
    return seconds


def measure(url: str, row: str, args: argparse.Namespace) -> dict:
    """What the load generator says of one row."""
    distribution, concurrency = row.split(":")
    prefix, _, distribution = distribution.rpartition("/")
    prefix = prefix or args.prefix
    adapters = dict(args.make).get(prefix.rstrip("-")) or max(1, len(adapters_of(args, prefix)))
    args.seed += 1
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary) / "row.json"
        command = [sys.executable, str(args.loadgen), "--base-url", url, "--base-model", "base"]
        command += ["--adapters", str(adapters), "--adapter-prefix", prefix, "--dist", distribution]
        command += ["--concurrency", concurrency, "--warmup", concurrency, "--json", str(out)]
        command += ["--input-len", str(args.input_len), "--output-len", str(args.output_len)]
        command += ["--vocab-low", "3", "--vocab-high", str(args.vocabulary), "--seed", str(args.seed)]
        subprocess.run(command, check=False)  # 1: some requests failed, which the row says
        return json.loads(out.read_text())


def measured(url: str, args: argparse.Namespace) -> list[tuple[str, dict]]:
    """All rows, each said as soon as it is there."""
    rows = []
    for row in args.rows.split(","):
        rows.append((row, measure(url, row, args)))
        found = rows[-1][1]
        said = f"TTFT p50 {ms(found, 'ttft', 'p50')}, TPOT p50 {ms(found, 'tpot', 'p50')} ms"
        print(f"{row}: {found['output_tok_s']:.0f} tokens/s, {said}, {found['errors']} errors", flush=True)
    return rows


def options(description: str | None) -> argparse.ArgumentParser:
    """What every benchmark over HTTP asks for."""
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--adapters", type=Path, required=True)
    parser.add_argument("--prefix", default="all-")
    parser.add_argument("--loadgen", type=Path, required=True)
    parser.add_argument("--input-len", type=int, default=512)
    parser.add_argument("--output-len", type=int, default=128)
    parser.add_argument("--vocabulary", type=int, default=100000, help="prompts are of token ids below this")
    parser.add_argument("--seed", type=int, default=0, help="of the first row's prompts")
    parser.add_argument("--port", type=int, default=8300)
    parser.add_argument("--data", type=Path, help="data folder to keep (compile caches); default: a temporary one")
    parser.add_argument("--serve", default="--device cuda", help="further options of the server")
    parser.add_argument("--make", type=_made, action="append", default=[], metavar="TARGETS:COUNT")
    parser.add_argument("--note", default="", help="what to say of the machine in RESULTS.md")
    return parser


def _made(text: str) -> tuple[str, int]:
    targets, _, count = text.partition(":")
    return targets, int(count)


def adapters_of(args: argparse.Namespace, prefix: str = "") -> list[Path]:
    """The folders PREFIX0, PREFIX1, ..., by number."""
    prefix = prefix or args.prefix
    return sorted(args.adapters.glob(f"{prefix}*"), key=lambda path: int(path.name.removeprefix(prefix)))


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--url", help="a server that runs already, with its adapters")
    parser.add_argument("--rows", default="none:1,none:64,identical:64,distinct:64")
    args = parser.parse_args()
    prefixes = {row.partition("/")[0] if "/" in row else args.prefix for row in args.rows.split(",")}
    folders = [folder for prefix in sorted(prefixes) for folder in adapters_of(args, prefix)]
    if args.url:
        write(measured(args.url, args), None, len(folders), args)
        return
    url = f"http://127.0.0.1:{args.port}"
    with running(args.model, args.port, args.data, args.serve.split()) as ready:
        print(f"ready after {ready:.1f} s", flush=True)
        seconds = upload(url, folders)
        print(f"{len(folders)} adapters uploaded, {sum(seconds) / max(1, len(seconds)):.2f} s each", flush=True)
        for targets, count in args.make:
            seconds = make(url, args.model, targets, range(count))
            print(f"{count} {targets} adapters, {sum(seconds) / count:.2f} s each, four at a time", flush=True)
        rows = measured(url, args)
    write(rows, ready, len(folders), args)


def ms(row: dict, name: str, quantile: str) -> str:
    value = row[name][quantile]
    return "-" if value is None else f"{value:.2f}"


def write(rows: list[tuple[str, dict]], ready: float | None, count: int, args: argparse.Namespace) -> None:
    lines = [
        f"`python -m benchmarks.throughput ... --rows {args.rows}`; {count} adapters"
        + "".join(f" and {n} of {targets!r}" for targets, n in args.make)
        + (f"; ready after {ready:.1f} s. " if ready else ". ")
        + f"torch {version('torch')}, transformers {version('transformers')}. {args.note}",
        "",
        "| row | output tokens/s | TTFT p50 / p99 ms | TPOT p50 / p99 ms | ITL p99 ms | errors |",
        "|---|---|---|---|---|---|",
    ]
    for row, r in rows:
        lines.append(
            f"| {row} | {r['output_tok_s']:.0f} | {ms(r, 'ttft', 'p50')} / {ms(r, 'ttft', 'p99')} "
            f"| {ms(r, 'tpot', 'p50')} / {ms(r, 'tpot', 'p99')} | {ms(r, 'itl', 'p99')} | {r['errors']} |"
        )
    report.append("Throughput over HTTP", lines)


if __name__ == "__main__":
    main()

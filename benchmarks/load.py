"""Many open streams over one server with the simulated engine: tokens a second through the API process, memory of both
processes before and after, and whether any stream was lost.

    python -m benchmarks.load [--streams 500] [--rounds 4 | --minutes 30] [--tokens 64] [--step-s 0.01]

The engine's steps take 10 ms, so what is measured is everything but the model. Appends to RESULTS.md with --append.
Exit code 1 if a stream was lost, or if a process has more memory after the last rounds than after the first (`grown`).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import datetime
import itertools
import json
import os
import platform
import resource
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
import psutil

from service.default_model import ensure_default_model

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).with_name("RESULTS.md")
API, ENGINE = "service.api_worker", "service.engine.process"
MAX_GROWTH_MB = 16.0
"""Of one process, after the first round. Four rounds of 500 streams make 1 and 2 MB; a leak of 1 KB a stream makes 2 MB
of every round of `make soak-streams`, which has some ten in 30 minutes."""
SPARE_FILES = 200
"""What this process has open besides its connections, generously."""


@dataclass(slots=True)
class Answer:
    """One request's answer, read to its end."""

    status: int
    headers: dict[str, str]
    body: bytes
    first_s: float
    """Seconds to the first byte of the body."""
    total_s: float

    def events(self) -> list[str]:
        lines = self.body.decode().splitlines()
        return [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]

    def text(self) -> str:
        """Of a streamed completion's first choice."""
        chunks = [json.loads(event) for event in self.events() if event != "[DONE]"]
        return "".join(choice["text"] for chunk in chunks for choice in chunk["choices"])

    @property
    def complete(self) -> bool:
        """Whether the stream ended as streams do, and not with an error or in the middle."""
        events = self.events()
        return self.status == 200 and events[-1:] == ["[DONE]"] and '"error"' not in events[-2]


def request_bytes(path: str, body: dict[str, Any]) -> bytes:
    content = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(content)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + content


async def post(port: int, path: str, body: dict[str, Any]) -> Answer:
    """One request over a connection of its own. A client library would cost more than the server that is measured.

    Raises OSError and asyncio.IncompleteReadError where the answer is not whole."""
    started = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(request_bytes(path, body))
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:] if line)}
        pieces: list[bytes] = []
        first = 0.0
        async for piece in _body(reader, headers):
            first = first or time.perf_counter()
            pieces.append(piece)
    finally:
        writer.close()
    return Answer(int(head[0].split()[1]), headers, b"".join(pieces), first - started, time.perf_counter() - started)


async def _body(reader: asyncio.StreamReader, headers: dict[str, str]) -> AsyncIterator[bytes]:
    if headers.get("transfer-encoding") != "chunked":
        yield await reader.readexactly(int(headers["content-length"]))
        return
    while size := int(await reader.readline(), 16):
        yield (await reader.readexactly(size + 2))[:-2]


def rss_anon(process: psutil.Process) -> int:
    """Bytes of memory that belong to the process alone."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return next(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("RssAnon"))


@dataclass
class Memory:
    """RssAnon of processes, sampled while the `async with` lasts."""

    processes: list[psutil.Process]
    interval_s: float = 0.1
    peak: list[int] = field(default_factory=list)

    def now(self) -> list[int]:
        return [rss_anon(process) for process in self.processes]

    @contextlib.asynccontextmanager
    async def sampled(self) -> AsyncIterator[None]:
        self.peak = self.now()

        async def sample() -> None:
            while True:
                await asyncio.sleep(self.interval_s)
                self.peak = [max(pair) for pair in zip(self.peak, self.now(), strict=True)]

        task = asyncio.create_task(sample())
        try:
            yield
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task


@dataclass(slots=True)
class Round:
    """`lost`: what went wrong, a line each."""

    seconds: float
    answers: list[Answer]
    lost: list[str]


async def open_streams(port: int, bodies: list[dict[str, Any]]) -> Round:
    """All of them at once."""
    started = time.perf_counter()
    results = await asyncio.gather(*(post(port, "/v1/completions", body) for body in bodies), return_exceptions=True)
    seconds = time.perf_counter() - started
    answers = [result for result in results if isinstance(result, Answer)]
    lost = [repr(result) for result in results if not isinstance(result, Answer)]
    lost += [f"{answer.status} {answer.body[-200:]!r}" for answer in answers if not answer.complete]
    return Round(seconds, answers, lost)


def grown(after: list[list[int]], bound: float) -> list[str]:
    """A line for each process whose memory has grown by more than `bound` bytes since the first round. `after`: bytes
    of [API process, engine] after each round. The least of the last three counts: one round may end before what it
    held is given back."""
    lines = []
    for which, name in enumerate(("API process", "engine")):
        first, last = after[0][which], min(figures[which] for figures in after[1:][-3:])
        if last - first > bound:
            lines.append(f"{name}: {first / 1e6:.1f} MB after the first round, {last / 1e6:.1f} MB after the last ones")
    return lines


def allow_files(count: int) -> None:
    """Raises the soft limit of open files to that many, as far as the hard one lets it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count if hard == resource.RLIM_INFINITY else min(count, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def completion(number: int, model: str, tokens: int) -> dict[str, Any]:
    """A streamed request with a prompt that no other number has."""
    prompt = [1 + number % 40000, 1 + number // 40000, *range(100, 114)]
    return {
        "model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": True
    }  # fmt: skip


@contextlib.contextmanager
def service(streams: int, tokens: int, step_s: float = 0.01) -> Iterator[tuple[int, str, list[psutil.Process]]]:
    """(port, name of the base, [API process, engine]) of a service with the simulated engine."""
    with tempfile.TemporaryDirectory(prefix="lp-") as folder, socket.socket() as probe:
        model = ensure_default_model(ROOT / "data")
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        flags = {
            "port": port,
            "data-dir": folder,
            "model": model,
            "simulated": json.dumps({"vocab_size": 49152, "step_s": step_s}),
            "max-sequences": streams,
            "max-tokens-per-step": 8192,
            "max-queue": 2 * streams,
            # Few more than the streams need, so that the prefix cache is full after the first round.
            "kv-pages": streams * (2 + (16 + tokens) // 16),
            "log-level": "warning",
        }
        command = [sys.executable, "-m", "service", "serve", *(f"--{key}={value}" for key, value in flags.items())]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) as process:
            try:
                _wait(lambda: httpx.get(f"http://127.0.0.1:{port}/ready").status_code == 200, process)
                children = psutil.Process(process.pid).children(recursive=True)
                found = [next(p for p in children if module in p.cmdline()) for module in (API, ENGINE)]
                yield port, model.name, found
            finally:
                process.terminate()


def _wait(ready: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while True:
        with contextlib.suppress(httpx.TransportError):
            if ready():
                return
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError("the service did not start")
        time.sleep(0.1)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--streams", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--minutes", type=float, help="as many rounds as begin in this time")
    parser.add_argument("--step-s", type=float, default=0.01, help="of the simulated engine")
    parser.add_argument("--tokens", type=int, default=64, help="generated per stream")
    parser.add_argument(
        "--max-growth-mb", type=float, default=MAX_GROWTH_MB, help="of one process after the first round"
    )
    parser.add_argument("--append", action="store_true", help=f"append to {RESULTS.name}")
    parser.add_argument("--note", default="", help="stands above the figures")
    args = parser.parse_args()
    rows: list[str] = []
    after: list[list[int]] = []
    lost = 0
    allow_files(args.streams + SPARE_FILES)
    with service(args.streams, args.tokens, args.step_s) as (port, model, processes):
        memory = Memory(processes)
        numbers = itertools.count()
        rows.append(_row("start", None, memory.now(), memory.now(), args.tokens))
        until = None if args.minutes is None else time.monotonic() + 60 * args.minutes
        for number in itertools.count():
            if number >= args.rounds if until is None else time.monotonic() >= until:
                break
            bodies = [completion(next(numbers), model, args.tokens) for _ in range(args.streams)]

            async def run(bodies: list[dict[str, Any]] = bodies) -> Round:
                async with memory.sampled():
                    return await open_streams(port, bodies)

            result = asyncio.run(run())
            after.append(memory.now())
            rows.append(_row(str(number + 1), result, after[-1], memory.peak, args.tokens))
            print(rows[-1], flush=True)
            lost += len(result.lost)
            for line in result.lost[:5]:
                print("lost:", line)
    text = _report(rows, args)
    print(text)
    if args.append:
        with RESULTS.open("a", encoding="utf-8") as file:
            file.write(text)
    growth = grown(after, args.max_growth_mb * 1e6) if len(after) > 1 else []
    for line in growth:
        print(f"memory has grown by more than {args.max_growth_mb:g} MB: {line}")
    return 1 if lost or growth else 0


def _row(name: str, result: Round | None, after: list[int], peak: list[int], tokens: int) -> str:
    figures = ["", "", "", ""]
    if result is not None and result.answers:
        first = statistics.median(answer.first_s for answer in result.answers)
        rate = len(result.answers) * tokens / result.seconds
        figures = [str(len(result.lost)), f"{result.seconds:.1f}", f"{rate:,.0f}", f"{first * 1e3:.0f}"]
    memory = [f"{after[i] / 1e6:.1f} ({peak[i] / 1e6:.1f})" for i in range(2)]
    return f"| {' | '.join([name, *figures, *memory])} |"


def _report(rows: list[str], args: argparse.Namespace) -> str:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    packages = ", ".join(f"{name} {version(name)}" for name in ("uvicorn", "httptools", "uvloop", "fastapi", "pyzmq"))
    length = f"--rounds {args.rounds}" if args.minutes is None else f"--minutes {args.minutes:g}"
    command = (
        f"python -m benchmarks.load --streams {args.streams} {length} --tokens {args.tokens} --step-s {args.step_s:g}"
    )
    lines = [
        f"\n## {args.streams} open streams, simulated engine: {datetime.date.today()}\n",
        f"Commit {commit.strip()}; `{command}`; Python {platform.python_version()}, {packages}; "
        f"{os.cpu_count()} cores, shared with the client.\n",
        *([f"{args.note}\n"] if args.note else []),
        "| round | lost | s | tokens/s | median first token, ms | API RssAnon after (peak), MB | engine |",
        "|---|---|---|---|---|---|---|",
        *rows,
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())

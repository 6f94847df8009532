"""What a merge costs requests that run beside it, and what memory it takes.

    python -m benchmarks.merges [--kinds checkpoint,ties_svd] [--turns 4] [--seconds 30] [--streams 2] [--append]

Starts the service with the embedded model on the CPU and keeps `--streams` completions running over HTTP. Windows
alternate: one of `--seconds` without a merge, then one that is the whole life of a merge, from its POST until it has
succeeded (the start of its process, torch's import, reading, merging and publishing included). Each window with a merge
is compared with the mean of its two neighbours: tokens a second of all streams, and the time between two tokens of one
stream (p50, p99). As a measure of the noise, each window without is compared with its neighbours of the same kind in
the same way. Before, one merge of each kind runs with no requests beside it: its time, its peak memory.

A merge that has not ended after `--most` seconds is cancelled, and the figures are of what there was of it.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
import psutil

from benchmarks import report
from benchmarks.throughput import start, upload
from tests.engine.oracle import Recipe, make_adapter
from tests.ports import unused_port

JOB = "service.merge_job"
PROMPT = "The river runs from the mountains to"
POLL_S = 0.25
FEW = {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [0, 1, 2, 3]}
"""A dense SVD per module: all 210 would be minutes of processor, of which a merge beside requests has 2%."""
KINDS: dict[str, dict[str, Any]] = {
    "checkpoint": {"into": "checkpoint", "sources": [{"adapter": "one"}]},
    "svd": {"method": "svd", "svd_rank": 16, "sources": [{"adapter": "one"}, {"adapter": "two", "weight": 0.5}]},
    "ties_svd": {
        "method": "ties_svd", "density": 0.5, "svd_rank": 8,
        "sources": [{"adapter": "few-one"}, {"adapter": "few-two", "weight": 0.5}],
    },
}  # fmt: skip
RECIPES = {"one": Recipe(16), "two": Recipe(16), "few-one": Recipe(8, FEW), "few-two": Recipe(8, FEW)}


class Streams:
    """Completions without an end. `tokens`: (when it came, seconds since the one before it in its stream, or None)."""

    def __init__(self, url: str, count: int) -> None:
        self.tokens: list[tuple[float, float | None]] = []
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(url,), daemon=True) for _ in range(count)]
        for thread in self._threads:
            thread.start()

    def _run(self, url: str) -> None:
        body = {"model": "base", "prompt": PROMPT, "max_tokens": 900, "ignore_eos": True, "stream": True}
        with httpx.Client(base_url=url, timeout=120, trust_env=False) as http:
            while not self._stop.is_set():
                last = None
                with http.stream("POST", "/v1/completions", json=body) as answer:
                    for line in answer.iter_lines():
                        if line.startswith("data: {"):
                            now = time.perf_counter()
                            self.tokens.append((now, None if last is None else now - last))
                            last = now
                        if self._stop.is_set():
                            return

    def window(self, begin: float, end: float) -> Window:
        """What came in between."""
        came = [gap for moment, gap in self.tokens if begin <= moment < end]
        return Window(end - begin, len(came) / (end - begin), sorted(gap for gap in came if gap is not None))

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(60)


@dataclass
class Window:
    """`rate`: tokens a second of all streams. `gaps`: seconds between two tokens of a stream, ascending."""

    seconds: float
    rate: float
    gaps: list[float]

    def gap_ms(self, percent: float) -> float:
        if not self.gaps:
            return float("nan")
        return 1e3 * self.gaps[min(len(self.gaps) - 1, int(percent / 100 * len(self.gaps)))]

    def __str__(self) -> str:
        return f"{self.rate:.1f} tokens/s ({self.gap_ms(50):.0f}/{self.gap_ms(99):.0f} ms) in {self.seconds:.0f} s"


@dataclass
class Life:
    """One merge from its POST on. `phases`: seconds in each, as seen from outside every POLL_S; `peak_mb`, `cpu_s`: of
    its process."""

    state: str = ""
    seconds: float = 0.0
    peak_mb: float = 0.0
    cpu_s: float = 0.0
    size: int = 0
    phases: dict[str, float] = field(default_factory=lambda: defaultdict(float))


def job(server: int) -> psutil.Process | None:
    """The process that merges."""
    for process in psutil.Process(server).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if JOB in process.cmdline():
                return process
    return None


def look(process: psutil.Process, life: Life) -> None:
    """Notes what the process has taken so far; it may have ended."""
    with suppress(OSError, psutil.NoSuchProcess):
        life.cpu_s = max(life.cpu_s, sum(process.cpu_times()[:2]))
        lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
        life.peak_mb = max(
            [life.peak_mb, *(int(line.split()[1]) / 1000 for line in lines if line.startswith("VmHWM:"))]
        )


def live(http: httpx.Client, server: int, kind: str, name: str, most: float) -> Life:
    """From the POST until the merge has ended. RuntimeError if it failed."""
    life, begin = Life(), time.perf_counter()
    answer = http.post("/v1/merges", json={"name": name, **KINDS[kind]})
    answer.raise_for_status()
    url, process, before = f"/v1/merges/{answer.json()['id']}", None, begin
    while (state := http.get(url).json())["state"] in ("queued", "running"):
        process = process if process is not None and process.is_running() else job(server)
        if process is not None:
            look(process, life)
        now = time.perf_counter()
        life.phases[state["phase"]] += now - before
        before = now
        if now - begin > most:
            http.delete(url)
        time.sleep(POLL_S)
    if state["state"] == "failed":
        raise RuntimeError(f"the merge failed: {state['error']}")
    life.state, life.seconds = state["state"], time.perf_counter() - begin
    life.size = sum(file["bytes"] for file in state.get("files", ()))
    http.delete(url)
    return life


def measure(
    kind: str, arguments: argparse.Namespace, streams: Streams, http: httpx.Client, server: int
) -> tuple[list[Window], list[Window], list[Life]]:
    """(windows without, windows with, the merges of the latter)."""

    def quiet() -> Window:
        begin = time.perf_counter()
        time.sleep(arguments.seconds)
        return streams.window(begin, time.perf_counter())

    without, with_, lives = [quiet()], [], []
    for turn in range(arguments.turns):
        begin = time.perf_counter()
        lives.append(live(http, server, kind, f"{kind}-{turn}", arguments.most))
        with_.append(streams.window(begin, begin + lives[-1].seconds))
        without.append(quiet())
        print(f"{kind}: {without[-2]} | {with_[-1]}, {lives[-1].state} | {without[-1]}", flush=True)
    return without, with_, lives


def against_neighbours(values: list[float], others: list[float]) -> list[float]:
    """values[i] / mean(others[i], others[i + 1])."""
    return [value / statistics.mean(others[i : i + 2]) for i, value in enumerate(values)]


def noise(without: list[float]) -> list[float]:
    """Each window against the mean of the one before and the one after."""
    return [
        middle / statistics.mean((before, after))
        for before, middle, after in zip(without, without[1:], without[2:], strict=False)
    ]


def spread(ratios: list[float]) -> str:
    if len(ratios) < 2:
        return ", ".join(f"{ratio:.3f}" for ratio in ratios) or "not measured"
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    error = 1.25 * statistics.stdev(ratios) / len(ratios) ** 0.5
    return f"{middle:.3f} (quartiles {low:.3f} to {high:.3f}, standard error of the median {error:.3f})"


def told(kind: str, alone: Life, without: list[Window], with_: list[Window], lives: list[Life]) -> list[str]:
    """The lines of one kind."""

    def ratios(of: Any) -> tuple[list[float], list[float]]:
        return against_neighbours([of(w) for w in with_], [of(w) for w in without]), noise([of(w) for w in without])

    phases = ", ".join(
        f"{name} {statistics.median(life.phases.get(name, 0.0) for life in lives):.1f}" for name in lives[0].phases
    )
    done = sum(life.state == "succeeded" for life in lives)
    share = sum(life.cpu_s for life in lives) / sum(life.seconds for life in lives)
    lines = [
        f"- `{kind}`, {len(lives)} merges from POST to the end ({done} succeeded), median"
        f" {statistics.median(life.seconds for life in lives):.1f} s each (s: {phases}), {share:.1%} of one core:",
        f"  {statistics.median(w.rate for w in without):.1f} tokens/s without, "
        f"{statistics.median(w.rate for w in with_):.1f} with.",
    ]
    figures = (
        ("tokens/s", lambda w: w.rate),
        ("time between tokens, p50", lambda w: w.gap_ms(50)),
        ("p99", lambda w: w.gap_ms(99)),
    )
    for name, of in figures:
        ours, theirs = ratios(of)
        values = "" if name == "tokens/s" else (
            f"{statistics.median(of(w) for w in without):.0f} ms without,"
            f" {statistics.median(of(w) for w in with_):.0f} with; "
        )  # fmt: skip
        lines.append(f"  - {name}: {values}against the neighbours {spread(ours)}; noise {spread(theirs)}.")
    size = f"{alone.size / 1e6:.0f} MB in " if alone.size else ""
    lines.append(f"  - Alone: {size}{alone.seconds:.1f} s, peak resident memory of its process {alone.peak_mb:.0f} MB.")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kinds", default="checkpoint,ties_svd", help=f"of {', '.join(KINDS)}")
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=30.0, help="of a window without a merge")
    parser.add_argument("--most", type=float, default=600.0, help="seconds after which a merge is cancelled")
    parser.add_argument("--streams", type=int, default=2)
    parser.add_argument("--data", type=Path, default=Path("data"), help="where the embedded model lies or is put")
    parser.add_argument("--append", action="store_true", help="add the result to RESULTS.md")
    parser.add_argument("--note", default="", help="what to say of the machine")
    arguments = parser.parse_args()
    kinds = arguments.kinds.split(",")
    if unknown := set(kinds) - set(KINDS):
        parser.error(f"--kinds: {', '.join(sorted(unknown))}: one of {', '.join(KINDS)}")
    from service.default_model import ensure_default_model

    model = ensure_default_model(arguments.data)
    lines = [
        f"`{' '.join(['python -m benchmarks.merges', *sys.argv[1:]])}`: {model.name}, float32, CPU, "
        f"{os.cpu_count()} cores, torch {version('torch')}, Python {sys.version.split()[0]}, {arguments.streams} "
        f"streams over HTTP. {arguments.note}",
        "",
    ]
    with tempfile.TemporaryDirectory(prefix="lp-bench-") as folder:
        made = [
            make_adapter(model, Path(folder) / name, recipe, seed, 0.4)
            for seed, (name, recipe) in enumerate(RECIPES.items())
        ]
        port = unused_port()
        server, _ = start(model, port, Path(folder) / "data", ["--device", "cpu", "--max-positions", "1024"])
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120, trust_env=False) as http:
                upload(str(http.base_url), made)
                alone = {kind: live(http, server.pid, kind, f"{kind}-alone", arguments.most) for kind in kinds}
                for kind, life in alone.items():
                    print(f"{kind} alone: {life.seconds:.1f} s, peak {life.peak_mb:.0f} MB", flush=True)
                streams = Streams(str(http.base_url), arguments.streams)
                time.sleep(5.0)  # warm-up
                for kind in kinds:
                    lines += told(kind, alone[kind], *measure(kind, arguments, streams, http, server.pid))
                streams.stop()
        finally:
            server.terminate()
            with suppress(subprocess.TimeoutExpired):
                server.wait(60)
    print("\n".join(lines))
    if arguments.append:
        report.append("Merges beside requests, from POST to the end", lines)


if __name__ == "__main__":
    main()

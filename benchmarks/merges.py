"""What a merge costs requests that run beside it, and what memory it takes.

    python -m benchmarks.merges [--turns 12] [--seconds 6] [--streams 2] [--append]

Starts the service with the embedded model on the CPU, keeps `--streams` completions running over HTTP, and counts their
tokens in windows that alternate: a merge into a checkpoint is held, goes on, is held, ... (SIGSTOP, SIGCONT). Each
window with a merge is compared with the mean of its two neighbours; as a measure of the noise, each window without is
compared with its neighbours of the same kind in the same way. Before, one merge runs with no requests beside it: its
time, its peak memory.
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
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

import httpx
import psutil

from benchmarks import report
from benchmarks.throughput import start
from tests.engine.oracle import Recipe, make_adapter
from tests.ports import unused_port

JOB, MERGER = "service.merge_job", "service.merger"
PROMPT = "The river runs from the mountains to"


class Streams:
    """Completions without an end; `times`: when each token came."""

    def __init__(self, url: str, count: int) -> None:
        self.times: list[float] = []
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(url,), daemon=True) for _ in range(count)]
        for thread in self._threads:
            thread.start()

    def _run(self, url: str) -> None:
        body = {"model": "base", "prompt": PROMPT, "max_tokens": 900, "ignore_eos": True, "stream": True}
        with httpx.Client(base_url=url, timeout=120, trust_env=False) as http:
            while not self._stop.is_set():
                with http.stream("POST", "/v1/completions", json=body) as answer:
                    for line in answer.iter_lines():
                        if line.startswith("data: {"):
                            self.times.append(time.perf_counter())
                        if self._stop.is_set():
                            return

    def rate(self, seconds: float) -> float:
        """Tokens a second in a window that begins now."""
        begin = time.perf_counter()
        time.sleep(seconds)
        end = time.perf_counter()
        return sum(begin <= moment < end for moment in self.times) / (end - begin)

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(60)


def jobs(server: int, module: str = JOB) -> list[psutil.Process]:
    """The processes that merge."""
    found = []
    for process in psutil.Process(server).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if module in process.cmdline():
                found.append(process)
    return found


def submit(http: httpx.Client, name: str) -> str:
    body = {"name": name, "sources": [{"adapter": "one"}], "into": "checkpoint"}
    answer = http.post("/v1/merges", json=body)
    answer.raise_for_status()
    return str(answer.json()["id"])


class Merges:
    """Merges that follow each other; `stop` holds the one that is being computed, `go` lets it go on."""

    def __init__(self, http: httpx.Client, server: int, count: int) -> None:
        self._http = http
        self._server = server
        self._ids = [submit(http, f"merge-{number}") for number in range(count)]
        while self._http.get(f"/v1/merges/{self._ids[0]}").json()["phase"] != "merging":
            time.sleep(0.02)
        self.stop()

    def stop(self) -> None:
        for process in (*jobs(self._server, MERGER), *jobs(self._server)):  # the merger would let the job go on
            process.suspend()

    def go(self) -> None:
        for process in (*jobs(self._server), *jobs(self._server, MERGER)):
            process.resume()

    def cpu_s(self) -> float:
        """Seconds of processor of the one that is there now."""
        return sum(sum(job.cpu_times()[:2]) for job in jobs(self._server))

    def end(self) -> None:
        self.go()
        for identity in reversed(self._ids):
            self._http.delete(f"/v1/merges/{identity}")
        while jobs(self._server):
            time.sleep(0.05)


def measure(turns: int, seconds: float, streams: Streams, merges: Merges) -> tuple[list[float], ...]:
    """(tokens/s without, tokens/s with, seconds of processor that merges had in each window with)."""
    without, with_, cpu = [streams.rate(seconds)], [], []
    for _ in range(turns):
        merges.go()
        before = merges.cpu_s()
        with_.append(streams.rate(seconds))
        cpu.append(max(0.0, merges.cpu_s() - before))  # a merge that ended takes its own time with it
        merges.stop()
        without.append(streams.rate(seconds))
        print(f"{without[-2]:.1f} | {with_[-1]:.1f} | {without[-1]:.1f} tokens/s, merge {cpu[-1]:.2f} s", flush=True)
    return without, with_, cpu


def alone(http: httpx.Client, server: int) -> tuple[float, float, int]:
    """(seconds, peak resident MB, bytes written) of one merge with nothing beside it."""
    begin = time.perf_counter()
    identity, peak = submit(http, "alone"), 0
    while (job := http.get(f"/v1/merges/{identity}").json())["state"] in ("queued", "running"):
        for process in jobs(server):
            with suppress(OSError, psutil.NoSuchProcess):
                lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
                peak = max([peak, *(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))])
        time.sleep(0.02)
    if job["state"] != "succeeded":
        raise RuntimeError(f"the merge {job['state']}: {job['error']}")
    return time.perf_counter() - begin, peak / 1000, sum(file["bytes"] for file in job["files"])


def against_neighbours(values: list[float], others: list[float]) -> list[float]:
    """values[i] / mean(others[i], others[i + 1])."""
    return [value / statistics.mean(others[i : i + 2]) for i, value in enumerate(values)]


def spread(ratios: list[float]) -> str:
    low, middle, high = statistics.quantiles(ratios, n=4)
    error = 1.25 * statistics.stdev(ratios) / len(ratios) ** 0.5
    return f"{middle:.3f} (quartiles {low:.3f} to {high:.3f}, standard error of the median {error:.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--turns", type=int, default=12)
    parser.add_argument("--seconds", type=float, default=6.0)
    parser.add_argument("--streams", type=int, default=2)
    parser.add_argument("--data", type=Path, default=Path("data"), help="where the embedded model lies or is put")
    parser.add_argument("--append", action="store_true", help="add the result to RESULTS.md")
    parser.add_argument("--note", default="", help="what to say of the machine")
    arguments = parser.parse_args()
    from service.default_model import ensure_default_model

    model = ensure_default_model(arguments.data)
    with tempfile.TemporaryDirectory(prefix="lp-bench-") as folder:
        made = make_adapter(model, Path(folder) / "one", Recipe(16), seed=0, strength=0.4)
        port = unused_port()
        server, _ = start(model, port, Path(folder) / "data", ["--device", "cpu", "--max-positions", "1024"])
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120, trust_env=False) as http:
                with (made / "adapter_model.safetensors").open("rb") as weights:
                    files = {"config": (made / "adapter_config.json").read_bytes(), "weights": weights}
                    http.post("/v1/adapters", data={"name": "one"}, files=files).raise_for_status()
                seconds, peak, size = alone(http, server.pid)
                print(f"alone: {seconds:.1f} s, peak {peak:.0f} MB", flush=True)
                merges = Merges(http, server.pid, 30)
                streams = Streams(str(http.base_url), arguments.streams)
                streams.rate(5.0)  # warm-up
                without, with_, cpu = measure(arguments.turns, arguments.seconds, streams, merges)
                streams.stop()
                merges.end()
        finally:
            server.terminate()
            with suppress(subprocess.TimeoutExpired):
                server.wait(60)
    lines = [
        f"`{' '.join(['python -m benchmarks.merges', *sys.argv[1:]])}`: {model.name}, float32, CPU, "
        f"{os.cpu_count()} cores, torch {version('torch')}, Python {sys.version.split()[0]}. {arguments.note}",
        "",
        f"- {arguments.streams} streams over HTTP: {statistics.median(without):.1f} tokens/s without, "
        f"{statistics.median(with_):.1f} with a checkpoint merge (medians of windows of {arguments.seconds:g} s).",
        f"- With a merge against its neighbours without, {len(with_)} times: "
        f"{spread(against_neighbours(with_, without))}.",
        f"- Noise, without against its neighbours without: {spread(noise(without))}.",
        f"- The merge had {sum(cpu) / (len(cpu) * arguments.seconds):.1%} of one core in those windows.",
        f"- Alone: {size / 1e6:.0f} MB in {seconds:.1f} s, peak resident memory of its process {peak:.0f} MB.",
    ]
    print("\n".join(lines))
    if arguments.append:
        report.append("Merges beside requests", lines)


def noise(without: list[float]) -> list[float]:
    """Each window against the mean of the one before and the one after."""
    return [
        middle / statistics.mean((before, after))
        for before, middle, after in zip(without, without[1:], without[2:], strict=False)
    ]


if __name__ == "__main__":
    main()

"""What spans cost: CPU time for each request of an API process and the (simulated) engine, with and without them.

    python -m benchmarks.traces [--requests 400] [--repeats 3]

The same requests, one after the other, 16 tokens each, without LORAPLEX_TRACES_URL, with it and every request kept, and
with a tenth kept; in turns, so that what else the machine does falls on all of them. The collector is another process.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil

from service.default_model import ensure_default_model
from tests.service.inference_helpers import BASE, InferenceServer

COLLECTOR = """
import http.server
class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        self.rfile.read(int(self.headers["content-length"]))
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()
    def log_message(self, *_):
        pass
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
print(server.server_port, flush=True)
server.serve_forever()
"""


def cpu(pid: int) -> float:
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


def measure(server: InferenceServer, requests: int) -> tuple[float, float]:
    """CPU microseconds per request of API process and engine."""
    if server.api is None or server.engine is None:
        raise RuntimeError("the server has not been started")
    body = {"model": BASE, "prompt": "The sea is calm tonight", "max_tokens": 16, "ignore_eos": True}
    before = cpu(server.api.pid), cpu(server.engine.pid)
    for _ in range(requests):
        server.http.post("/v1/completions", json=body).raise_for_status()
    after = cpu(server.api.pid), cpu(server.engine.pid)
    return tuple((b - a) / requests * 1e6 for a, b in zip(before, after, strict=True))  # type: ignore[return-value]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=400)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--model", type=Path, help="folder of the tokenizer; unset: the embedded model's")
    arguments = parser.parse_args()
    model = arguments.model or ensure_default_model(Path(tempfile.gettempdir()) / "loraplex-benchmarks")
    collector = subprocess.Popen([sys.executable, "-c", COLLECTOR], stdout=subprocess.PIPE, text=True)
    servers: dict[str, InferenceServer] = {}
    try:
        port = collector.stdout.readline().strip() if collector.stdout is not None else ""
        url = f"http://127.0.0.1:{port}"
        for name, settings in (("off", {}), ("on", {"traces_url": url}), ("a tenth", {"traces_url": url})):
            more = {"traces_ratio": 0.1} if name == "a tenth" else {}
            servers[name] = InferenceServer(model, log_level="warning", **settings, **more)
            servers[name].start()
            measure(servers[name], 50)
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in servers}
        for _ in range(arguments.repeats):
            for name, server in servers.items():
                found[name].append(measure(server, arguments.requests))
        print("| spans | API process, us a request | engine, us a request |\n| --- | --- | --- |")
        for name, runs in found.items():
            cells = [
                f"{statistics.median(each):.0f} ({min(each):.0f} to {max(each):.0f})"
                for each in zip(*runs, strict=True)
            ]
            print(f"| {name} | {' | '.join(cells)} |")
    finally:
        for server in servers.values():
            server.stop()
        collector.kill()
        collector.wait()


if __name__ == "__main__":
    main()

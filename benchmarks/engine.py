"""The engine alone, driven in its own process without HTTP: closed loop of requests over a base and its adapters.

    python -m benchmarks.engine FOLDER --adapters DIR --rows base:1,base:64,one:64,distinct:64

FOLDER is a model (benchmarks/random_base.py makes one), DIR holds PEFT folders. A row is `kind:concurrency`, kind
one of base, one (a single adapter), distinct (each slot its own), uniform (drawn anew for each request). No two rows
have the same prompts, so that none finds another's in the prefix cache.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from adapters.blobs import BlobStore
from adapters.inspection import inspect_upload
from service.engine.config import EngineConfig
from service.engine.messages import AdapterRef, FromEngine, LoadAdapter, Outputs, Refused, SamplingParams, Submit


class Driver:
    """Keeps `concurrency` requests in flight and notes when each token came."""

    rows = 0
    """Driven so far."""

    def __init__(self, config: EngineConfig) -> None:
        # Here and not above: worker processes import this module again and need no torch.
        from service.engine.build import build_engine

        self.engine, self.versions = build_engine(config, self._receive)
        self.times: dict[str, list[float]] = {}
        self.finished: list[str] = []

    def _receive(self, _client: bytes, message: FromEngine) -> None:
        if isinstance(message, Refused):
            raise RuntimeError(message.message)
        if isinstance(message, Outputs):
            now = time.perf_counter()
            for delta in message.deltas:
                self.times[delta.request_id] += [now] * len(delta.token_ids)
                if delta.finish_reason:
                    self.finished.append(delta.request_id)

    def load(self, digests: list[str]) -> None:
        for digest in digests:
            self.engine.handle(b"bench", LoadAdapter(digest, digest))
        while self.engine.expecting:
            if not self.engine.step():
                time.sleep(0.001)

    def row(
        self, kind: str, concurrency: int, digests: list[str], *, requests: int, input_len: int, output_len: int
    ) -> dict[str, float]:
        if kind != "base" and not digests:
            raise ValueError(f"{kind}: there are no adapters; --adapters names their folder")
        requests = max(requests, concurrency)  # so many are begun at once, and the next row must find none of them
        rng = random.Random(self.rows)
        self.rows += 1
        vocabulary = self.engine.manifest.vocab_size
        sent: dict[str, float] = {}
        self.times, self.finished = {}, []
        before = self.engine.stats()

        def submit(number: int, slot: int) -> None:
            digest = {
                "base": None,
                "one": digests[0] if digests else None,
                "distinct": digests[slot % len(digests)] if digests else None,
                "uniform": rng.choice(digests) if digests else None,
            }[kind]
            name = f"{number}/{slot}"
            sent[name], self.times[name] = time.perf_counter(), []
            self.engine.handle(
                b"bench",
                Submit(
                    request_id=name,
                    prompts=[[rng.randrange(vocabulary // 2) for _ in range(input_len)]],
                    adapters=(AdapterRef(digest),) if digest else (),
                    sampling=SamplingParams(temperature=0.0, max_tokens=output_len),
                ),
            )

        begin = time.perf_counter()
        for slot in range(concurrency):
            submit(slot, slot)
        started, done = concurrency, 0
        while done < requests:
            if not self.engine.step():
                time.sleep(0.0005)
            for name in self.finished:
                done += 1
                if started < requests:
                    submit(started, int(name.split("/")[1]))
                    started += 1
            self.finished.clear()
        wall = time.perf_counter() - begin
        after = self.engine.stats()
        steps = after["steps_total"] - before["steps_total"]
        gaps = [b - a for times in self.times.values() for a, b in itertools.pairwise(times)]
        ttft = [self.times[name][0] - at for name, at in sent.items()]
        return {
            "output_tok_s": requests * output_len / wall,
            "ttft_ms_p50": statistics.median(ttft) * 1e3,
            "itl_ms_p50": statistics.median(gaps) * 1e3 if gaps else 0.0,
            "itl_ms_p99": statistics.quantiles(gaps, n=100)[98] * 1e3 if len(gaps) > 1 else 0.0,
            "steps": steps,
            "step_ms_mean": (after["step_seconds_total"] - before["step_seconds_total"]) / steps * 1e3,
            "wall_s": wall,
        }


def store_adapters(store: BlobStore, folders: list[Path], manifest) -> list[str]:
    digests = []
    for folder in folders:
        weights = {path.name: path for path in sorted(folder.glob("*.safetensors"))}
        found = inspect_upload(folder / "adapter_config.json", weights, None, manifest)
        for path in [folder / "adapter_config.json", *weights.values()]:
            store.put(path, hashlib.sha256(path.read_bytes()).hexdigest())
        store.put_bytes(found.record.to_json())
        digests.append(found.record.digest)
    return digests


@contextmanager
def driving(model: Path, folders: list[Path], options: dict[str, object]) -> Iterator[tuple[Driver, list[str]]]:
    """An engine with these adapters on its device, until the block ends, and their digests. Prints what that took.
    options: EngineConfig's fields; its folders are temporary ones unless they are among them."""
    with tempfile.TemporaryDirectory() as temporary:
        places = {"blobs_dir": f"{temporary}/blobs", "cache_dir": f"{temporary}/cache", "socket": ""}
        config = msgspec.convert({"model_path": str(model), **places, **options}, EngineConfig)
        begin = time.perf_counter()
        driver = Driver(config)
        ready = time.perf_counter()
        digests = store_adapters(BlobStore(Path(config.blobs_dir)), folders, driver.engine.manifest)
        stored = time.perf_counter()
        driver.load(digests)
        print(
            f"engine ready in {ready - begin:.1f} s {driver.versions}; {len(digests)} adapters stored in "
            f"{stored - ready:.1f} s, packed and loaded in {time.perf_counter() - stored:.1f} s",
            flush=True,
        )
        try:
            yield driver, digests
        finally:
            driver.engine.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--adapters", type=Path)
    parser.add_argument("--count", type=int, default=64, help="adapters used, in order of name")
    parser.add_argument("--rows", default="base:1,base:8")
    parser.add_argument("--requests", type=int, default=0, help="per row, the concurrency at least; 0: twice that")
    parser.add_argument("--input-len", type=int, default=512)
    parser.add_argument("--output-len", type=int, default=128)
    parser.add_argument("--config", default="{}", help="EngineConfig fields as JSON")
    args = parser.parse_args()
    folders = sorted(args.adapters.iterdir())[: args.count] if args.adapters else []
    with driving(args.model, folders, json.loads(args.config)) as (driver, digests):
        for row in args.rows.split(","):
            kind, concurrency = row.split(":")
            result = driver.row(
                kind,
                int(concurrency),
                digests,
                requests=args.requests or 2 * int(concurrency),
                input_len=args.input_len,
                output_len=args.output_len,
            )
            print(row, " ".join(f"{name}={value:.4g}" for name, value in result.items()), flush=True)


if __name__ == "__main__":
    main()

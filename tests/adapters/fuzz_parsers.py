"""Mutations of real adapter files against the parsers of uploaded bytes: `python -m tests.adapters.fuzz_parsers`.

Thousands a second, where hypothesis makes 90. Input number n of a seed is the same in every run, on any number of
processes; one that crashes a parser is written to a file, and said with the two numbers.

    python -m tests.adapters.fuzz_parsers --inputs 1000000 --seed 1 --jobs 2
    python -m tests.adapters.fuzz_parsers --only 123 --seed 1          that one again
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from adapters import patterns
from adapters.manifest import Manifest
from adapters.peft_config import CONFIG_NAME, FIELDS
from adapters.safetensors_header import DTYPE_BYTES, Header
from tests.adapters.parser_properties import WEIGHTS, check_config, check_file, check_index, header_of

PATIENCE_SECONDS = 0.02
"""For regular expressions, some of which will explode, instead of the server's 2 s."""
BATCH = 2000
RECIPES: tuple[dict[str, Any], ...] = (
    {"r": 4, "target_modules": ["q_proj", "v_proj"]},
    {"r": 4, "target_modules": "all-linear", "rank_pattern": {"k_proj": 1, r"layers\.2\.mlp.*": 7}, "use_rslora": True,
     "alpha_pattern": {"^model.layers.1.self_attn.v_proj": 3}, "exclude_modules": ["o_proj"]},
    {"r": 1, "lora_alpha": 3, "target_modules": r".*\.(0|2)\.self_attn\.(q|k)_proj", "dtype": "bfloat16"},
    {"r": 2, "target_modules": ["gate_proj", "down_proj"], "layers_to_transform": [1], "layers_pattern": "layers",
     "dtype": "float16"},
)  # fmt: skip
TOKENS = (
    b'"', b"{", b"}", b"[", b"]", b",", b":", b"null", b"true", b"NaN", b"-Infinity", b"1e999", b"-0", b"0", b"\\u0000",
    b"\\ud800", b"\xff", b"\xc3", b"\xef\xbb\xbf", b"\0", b" ", b"\n", b"[" * 1500, b'{"a":' * 300, b"9" * 4400,
    b"18446744073709551616", b"9223372036854775807", b"9223372036854775808", b"-1", b"1.0", b'"data_offsets"',
    b'"__metadata__"', b'"shape"', b".*", b"(?:", b"{e<=1}", b"(a+)+$", b"[[:alpha:]]", b"{1,99999}",
)  # fmt: skip
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 512, 513, 2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**63, 2**64, 10**400, -(2**63), 0.0,
    0.5, -0.0, 1e39, 5e-324, 1.7976931348623157e308, float("nan"), float("inf"), "", "q_proj", "all-linear", "layers",
    "lora_A", "LORA", "none", "gaussian", "F32", "BF16", "F64", "F4", "(", ".*", "(?i)Q_PROJ", "(a+)+$", "a{9}{9}{9}",
    "[[a]", "x{e<=1}", "(?:.*.*)*x", r"(\w+\.)*\d", "\0", "\u2028", "\ud800", "x" * 1100, "../../etc/passwd", [], {},
    [[]], [None], [0, 0], [0, 2**63], [-1, 1], [4, 32], ["q_proj"] * 3, {"": 1}, {"q_proj": 2}, {".*": 1}, {"(": 1},
)  # fmt: skip


class CrashError(Exception):
    """A parser raised what it must not, or accepted what it should not have."""


@dataclass(frozen=True)
class Seed:
    """One real adapter."""

    config: bytes
    weights: bytes
    index: bytes
    headers: dict[str, Header]


@dataclass(frozen=True)
class Corpus:
    """Real adapters, and the manifest of the base that they were made for."""

    seeds: list[Seed]
    manifest: Manifest

    @classmethod
    def make(cls, folder: Path) -> Corpus:
        """PEFT itself writes them, in `folder`. Not in the processes that fuzz: torch would be most of their memory."""
        import torch
        from safetensors.torch import load_file, save_file

        from tests.adapters.conftest import build_adapter, build_llama, build_manifest

        seeds = []
        for number, recipe in enumerate(RECIPES):
            dtype = getattr(torch, recipe.get("dtype", "float32"))
            made = build_adapter(folder / str(number), seed=number, **{**recipe, "dtype": dtype})
            config, weights = (made / CONFIG_NAME).read_bytes(), (made / WEIGHTS).read_bytes()
            tensors = load_file(made / WEIGHTS)
            shards = {name: f"part-{position % 2}.safetensors" for position, name in enumerate(sorted(tensors))}
            headers = {}
            for file in sorted(set(shards.values())):
                save_file({name: tensors[name] for name in shards if shards[name] == file}, made / file)
                headers[file] = header_of((made / file).read_bytes(), file)
            index = json.dumps({"metadata": {"total_size": len(weights)}, "weight_map": shards}).encode()
            seeds.append(Seed(config, weights, index, headers))
        return cls(seeds, build_manifest(build_llama()))


class Fuzzer:
    """Inputs by number, and what becomes of them."""

    def __init__(self, seed: int, corpus: Corpus) -> None:
        self.seed = seed
        self.manifest = corpus.manifest
        self.seeds = corpus.seeds
        self._single = [{WEIGHTS: header_of(each.weights)} for each in self.seeds]

    def input(self, number: int) -> tuple[str, int, bytes]:
        """(config, file or index; which of the seeds it belongs to; the bytes)."""
        rng = Random((self.seed << 40) + number)
        kind = rng.choices(("config", "file", "index"), (5, 5, 1))[0]
        chosen = rng.randrange(len(self.seeds))
        own, other = (self._bytes(kind, which) for which in (chosen, rng.randrange(len(self.seeds))))
        if rng.random() < 0.6:
            content = _with_json(kind, own, other, rng)
        else:
            content = own
        if content is own or rng.random() < 0.3:
            for _ in range(rng.choice((1, 1, 1, 2, 4, 8))):
                content = _mutated(content, other, rng)
        return kind, chosen, content

    def _bytes(self, kind: str, which: int) -> bytes:
        seed = self.seeds[which]
        return {"config": seed.config, "file": seed.weights, "index": seed.index}[kind]

    def check(self, kind: str, which: int, content: bytes) -> bool:
        """Whether it was accepted."""
        seed = self.seeds[which]
        if kind == "config":
            return check_config(content, self._single[which], self.manifest)
        if kind == "file":
            return check_file(content, seed.config, self.manifest)
        return check_index(content, seed.config, seed.headers, self.manifest)

    def run(self, numbers: Iterable[int]) -> Counter[str]:
        """How many of each kind were accepted and refused. CrashError at the first that did neither."""
        counts: Counter[str] = Counter()
        patience, patterns.BUDGET_SECONDS = patterns.BUDGET_SECONDS, PATIENCE_SECONDS
        try:
            for number in numbers:
                kind, which, content = self.input(number)
                try:
                    accepted = self.check(kind, which, content)
                except Exception as error:
                    message = f"input {number} of seed {self.seed} ({kind}, {len(content)} bytes): {error!r}"
                    raise CrashError(message) from error
                counts[f"{kind} {'accepted' if accepted else 'refused'}"] += 1
        finally:
            patterns.BUDGET_SECONDS = patience
        return counts


# ---------------------------------------------------------------- bytes


def _mutated(content: bytes, other: bytes, rng: Random) -> bytes:
    if not content:
        return rng.choice(TOKENS)
    # Most of a weights file is its numbers, about which no parser cares: half of the time look at the header.
    end = len(content) if rng.random() < 0.5 else min(len(content), 2000)
    at = rng.randrange(end)
    match rng.randrange(10):
        case 0:
            return content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :]
        case 1:
            return content[:at] + bytes([rng.randrange(256)]) + content[at + 1 :]
        case 2:
            return content[:at] + rng.choice(TOKENS) + content[at:]
        case 3:
            return content[:at] + rng.choice(TOKENS) + content[at + rng.randrange(1, 20) :]
        case 4:
            return content[:at] + content[at + rng.choice((1, 2, 8, 64, 512)) :]
        case 5:
            return content[:at]
        case 6:
            count = rng.choice((1, 8, 64, 512))
            return content[:at] + content[at : at + count] + content[at:]
        case 7:
            there = rng.randrange(len(other))
            return content[:at] + other[there:]
        case 8:
            there, count = rng.randrange(len(other)), rng.choice((8, 64, 512))
            return content[:at] + other[there : there + count] + content[at + count :]
        case _:
            # A number in binary: the header's length, mostly.
            size = rng.choice((1, 2, 4, 8))
            at = rng.choice((0, at))
            old = int.from_bytes(content[at : at + size], "little")
            new = rng.choice((old + 1, old - 1, old + 8, old * 2, rng.getrandbits(8 * size), 0, -1))
            return content[:at] + (new % (1 << 8 * size)).to_bytes(size, "little") + content[at + size :]


# ---------------------------------------------------------------- structure


def _with_json(kind: str, own: bytes, other: bytes, rng: Random) -> bytes:
    """With another field, tensor, number ... in its JSON, which for a weights file is the header."""
    if kind != "file":
        document, donor = json.loads(own), json.loads(other)
        for _ in range(rng.choice((1, 1, 2, 3))):
            document = _edited(document, donor, rng, kind)
        return _written(document, rng)
    length = int.from_bytes(own[:8], "little")
    document, data = json.loads(own[8 : 8 + length]), own[8 + length :]
    donor = json.loads(other[8 : 8 + int.from_bytes(other[:8], "little")])
    for _ in range(rng.choice((1, 1, 2, 3))):
        document = _edited(document, donor, rng, kind)
    if rng.random() < 0.5 and isinstance(document, dict):
        data = _laid_out(document, data)
    text = _written(document, rng)
    text += b" " * rng.choice((0, 0, -len(text) % 8))
    return (len(text) + rng.choice((0,) * 12 + (1, -1, 8))).to_bytes(8, "little") + text + data


def _laid_out(document: dict[str, Any], data: bytes) -> bytes:
    """Corrects the offsets where that is possible, so that more than the first check is reached; the data for it."""
    position = 0
    for name, entry in document.items():
        if name == "__metadata__" or not isinstance(entry, dict):
            continue
        size = DTYPE_BYTES.get(entry["dtype"]) if isinstance(entry.get("dtype"), str) else None
        shape = entry.get("shape")
        if size is None or not isinstance(shape, list) or not all(type(n) is int and 0 <= n < 4096 for n in shape):
            continue
        for each in shape:
            size *= each
        if size < 1 << 20:
            entry["data_offsets"] = [position, position + size]
            position += size
    return data[:position] + bytes(max(0, position - len(data)))


def _edited(document: Any, donor: Any, rng: Random, kind: str) -> Any:
    """One change somewhere; `document` may be changed in place."""
    if rng.random() < 0.02 or not document or not isinstance(document, (dict, list)):
        return _value(rng)
    if kind == "config" and rng.random() < 0.4 and isinstance(document, dict):
        document[rng.choice(sorted(FIELDS))] = _value(rng)
        return document
    holder = document
    while True:  # to a place at any depth
        keys: list[Any] = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
        key = rng.choice(keys)
        inner = holder[key]
        if not isinstance(inner, (dict, list)) or not inner or rng.random() < 0.3:
            break
        holder = inner
    changes: tuple[Callable[[], None], ...] = (
        lambda: _set(holder, key, _value(rng)),
        lambda: _set(holder, key, _near(inner, rng)),
        lambda: _set(holder, key, [inner] if rng.random() < 0.5 else {"x": inner}),
        lambda: _set(holder, key, holder[rng.choice(keys)]),
        lambda: _set(holder, key, donor.get(key) if isinstance(donor, dict) else donor),
        lambda: holder.__delitem__(key),
        lambda: _rename(holder, key, donor, rng),
    )
    rng.choice(changes)()
    return document


def _value(rng: Random) -> Any:
    """A copy, since it may be edited in turn: the next input must not depend on this one."""
    return copy.deepcopy(rng.choice(VALUES))


def _set(holder: Any, key: Any, value: Any) -> None:
    holder[key] = json.loads(json.dumps(value)) if isinstance(value, (dict, list)) else value


def _near(value: Any, rng: Random) -> Any:
    """Nearly the same."""
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, (int, float)):
        return rng.choice(
            (value + 1, value - 1, -value, value * 2, str(value)[:4000], value + 0.0 if value < 1e300 else 0.5)
        )
    if isinstance(value, str) and value:
        at = rng.randrange(len(value))
        return rng.choice(
            (value[:at], value[at:], value[:at] + rng.choice(".*(0\0é") + value[at:], value.upper(), value * 40)
        )
    return _value(rng)


def _rename(holder: Any, key: Any, donor: Any, rng: Random) -> None:
    if isinstance(holder, dict):
        names = [*donor, key + "x", "", "__metadata__"] if isinstance(donor, dict) else [key + "x"]
        holder[rng.choice(names)] = holder.pop(key)
    else:
        rng.shuffle(holder)


def _written(document: Any, rng: Random) -> bytes:
    style = rng.randrange(4)
    text = json.dumps(document, indent=2 if style == 1 else None, ensure_ascii=style != 2, sort_keys=False)
    if style == 3 and text.startswith("{"):
        # The first entry once more: readers differ about which one counts.
        first = text[1:].split(",", 1)[0]
        text = "{" + first + "," + text[1:] if rng.random() < 0.2 else text
    return text.encode("utf-8", "surrogatepass")


# ---------------------------------------------------------------- command


def _begin(fuzzer: Fuzzer) -> None:
    global _fuzzer
    _fuzzer = fuzzer


def _worker(numbers: range) -> tuple[Counter[str], list[tuple[str, int]]]:
    """The counts of a batch, and what crashed."""
    if _fuzzer is None:
        raise RuntimeError("this process has not begun")
    counts, crashes = Counter[str](), []
    for number in numbers:
        try:
            counts += _fuzzer.run(range(number, number + 1))
        except CrashError as crash:
            crashes.append((str(crash), number))
    return counts, crashes


_fuzzer: Fuzzer | None = None


def _said(counts: Counter[str]) -> str:
    return ", ".join(f"{name}: {count:,}" for name, count in sorted(counts.items()))


def main() -> int:
    """0 if nothing crashed."""
    parser = argparse.ArgumentParser(prog="python -m tests.adapters.fuzz_parsers")
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--only", type=int, help="the input with this number alone, with a traceback")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="lp-fuzz-"))
    fuzzer = Fuzzer(options.seed, Corpus.make(folder / "seeds"))
    if options.only is not None:
        print(fuzzer.run(range(options.only, options.only + 1)))
        return 0
    batches = [range(first, min(first + BATCH, options.inputs)) for first in range(0, options.inputs, BATCH)]
    counts, crashes, started, cpu = Counter[str](), 0, time.monotonic(), os.times()
    with multiprocessing.get_context("spawn").Pool(options.jobs, _begin, (fuzzer,)) as pool:
        for done, (batch, failed) in enumerate(pool.imap_unordered(_worker, batches), 1):
            counts += batch
            crashes += len(failed)
            for line, number in failed:
                kind, _, content = fuzzer.input(number)
                (folder / f"crash-{options.seed}-{number}.{kind}").write_bytes(content)
                print(line, flush=True)
            if done % 25 == 0:
                print(
                    f"{sum(counts.values()):,} inputs, {time.monotonic() - started:.0f} s: {_said(counts)}", flush=True
                )
        pool.close()
        pool.join()
    spent = os.times()
    print(
        f"seed {options.seed}: {sum(counts.values()) + crashes:,} inputs in {time.monotonic() - started:.0f} s "
        f"({spent.children_user + spent.children_system - cpu.children_user - cpu.children_system:.0f} s of processor, "
        f"{options.jobs} processes), {crashes} crashes; " + _said(counts)
    )
    if crashes:
        print(f"inputs that crashed: {folder}", file=sys.stderr)
    return 1 if crashes else 0


if __name__ == "__main__":
    sys.exit(main())

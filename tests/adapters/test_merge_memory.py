"""A merge's memory: what is promised holds in a real process however many sources there are, and what needs more than
there may be is refused before it is queued."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
import torch
from peft.utils import merge_utils
from safetensors.torch import save_file

from adapters.manifest import Manifest, Module
from adapters.merge import CONFIG_NAME, WEIGHTS_NAME
from adapters.merge_memory import PROCESS_BYTES, memory_bytes
from adapters.merge_methods import Factors, _combine_products
from adapters.merge_request import MAX_SOURCES, METHODS, MergeOptions, check_merge
from tests.adapters.merging import source_of

ROOT = Path(__file__).parents[2]
D, K, RANK, COUNT = 448, 640, 16, 24
FIRST_USE = 5_000_000
"""Code that the process reads from its libraries when it first needs it."""
MEASURED = [
    MergeOptions("ties_svd", 0.95),
    MergeOptions("dare_ties_svd", 0.5, "frequency"),
    MergeOptions("magnitude_prune_svd", 0.95),
    MergeOptions("svd"),  # out of the factors: 24 · 16 < 448
    MergeOptions("ties", 0.95),
    MergeOptions("cat"),
]
PROGRAM = """
import json, sys, msgspec, torch
from pathlib import Path
from adapters.manifest import Manifest
from adapters.merge import CONFIG_NAME, WEIGHTS_NAME, merge_adapters
from adapters.merge_request import MergeOptions, MergeSource

def kilobytes(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))

torch.set_num_threads(1)
manifest = msgspec.json.decode(sys.argv[1], type=Manifest)
out = Path(sys.argv[3])
torch.linalg.svd(torch.eye(3) @ torch.eye(3)), torch.linalg.qr(torch.eye(3, dtype=torch.float64))  # loads what it needs
for count, options in json.loads(sys.argv[4]):
    folders = [Path(sys.argv[2]) / str(i) for i in range(count)]
    sources = [
        MergeSource(f.name, f / CONFIG_NAME, {WEIGHTS_NAME: f / WEIGHTS_NAME}, None, 0.5) for f in folders
    ]
    before = kilobytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    merge_adapters(sources, manifest, out, MergeOptions(**options))
    print(before, kilobytes("VmHWM"))
"""


def one_module(d: int, k: int) -> Manifest:
    return Manifest("f", "One", "one", "float32", 8, 8, (Module("layers.0.q_proj", "linear", k, d),))


def save(folder: Path, d: int, k: int, rank: int, seed: int) -> None:
    folder.mkdir()
    generator = torch.Generator().manual_seed(seed)
    prefix = "base_model.model.layers.0.q_proj"
    tensors = {
        f"{prefix}.lora_A.weight": torch.randn(rank, k, generator=generator),
        f"{prefix}.lora_B.weight": torch.randn(d, rank, generator=generator),
    }
    save_file(tensors, folder / WEIGHTS_NAME)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": ["q_proj"]}
    (folder / CONFIG_NAME).write_text(json.dumps(config))


def test_a_process_stays_below_what_is_promised(tmp_path: Path) -> None:
    for i in range(2 * COUNT):
        save(tmp_path / str(i), D, K, RANK, i)
    # Of twice as many the factors of `svd` are larger than the matrix.
    runs = [(COUNT, options) for options in MEASURED if options.method != "cat"]
    runs += [(2 * COUNT, MergeOptions("svd")), (2 * COUNT, MEASURED[0]), (20, MEASURED[-1])]
    manifest = one_module(D, K)
    arguments = [
        msgspec.json.encode(manifest).decode(), str(tmp_path), str(tmp_path / "out"),
        json.dumps([(count, vars(options)) for count, options in runs]),
    ]  # fmt: skip
    # Large matrices are always given back at once when they are free; here they are small.
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", PROGRAM, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    figures = [tuple(1024 * int(part) for part in line.split()) for line in done.stdout.splitlines()]
    assert len(figures) == len(runs)
    for (count, options), (before, peak) in zip(runs, figures, strict=True):
        promised = memory_bytes(options.method, "adapter", D, K, [RANK] * count)
        assert before <= PROCESS_BYTES, (options, before)
        assert peak - before <= promised - PROCESS_BYTES + FIRST_USE, (options, count, peak - before)
    # And it is no empty promise: not far above what is needed.
    (_, (before, peak)) = (runs[0], figures[0])
    assert peak - before >= 0.5 * (memory_bytes("ties_svd", "adapter", D, K, [RANK] * COUNT) - PROCESS_BYTES)


@pytest.mark.parametrize("into", ["adapter", "checkpoint"])
@pytest.mark.parametrize("method", METHODS)
def test_any_merge_over_a_base_of_8b_takes_less_than_6_gb(method: str, into: str) -> None:
    """As many sources as there may be, of any rank that is served: the module is Llama-3.1-8B's largest."""
    for rank in (8, 64, 512):
        ranks = [rank] * (MAX_SOURCES if method != "cat" else 512 // rank)
        if into == "adapter" or method == "linear":
            assert memory_bytes(method, into, 4096, 14336, ranks) < 6_000_000_000, rank


@pytest.mark.parametrize("majority", ["total", "frequency"])
@pytest.mark.parametrize("method", ["ties_svd", "dare_ties_svd", "dare_linear_svd", "magnitude_prune_svd"])
def test_what_is_factorised_equals_pefts_matrix_bit_for_bit(method: str, majority: str) -> None:
    """Although PEFT has all products in memory and here they pass one by one: the same elections, the same sums."""
    kind = METHODS[method]
    for count in (2, 15, 16, 17, 40):
        generator = torch.Generator().manual_seed(count)
        sources = [
            Factors(torch.randn(3, 64, generator=generator), torch.randn(32, 3, generator=generator), 0.7, weight)
            for weight in torch.randn(count, generator=generator).tolist()
        ]
        sources[-1] = Factors(-sources[0].a, sources[0].b, 0.7, 0.3)  # votes that cancel
        options = MergeOptions(method, 0.6, majority if kind.elects_sign else None)
        actual = _combine_products(sources, kind, options, torch.Generator().manual_seed(5))
        products = [(one.b @ one.a) * one.scale for one in sources]
        weights = torch.tensor([one.weight for one in sources])
        torch.manual_seed(5)
        named = {"majority_sign_method": majority} if kind.elects_sign else {}
        expected = getattr(merge_utils, method.removesuffix("_svd"))(products, weights, density=0.6, **named)
        assert torch.equal(actual, expected), count


def test_what_needs_too_much_is_refused_by_name(tmp_path: Path) -> None:
    save(tmp_path / "one", 512, 1024, 4, 1)
    manifest = one_module(512, 1024)
    options = MergeOptions("ties_svd", 0.5)
    sources = [source_of(tmp_path / "one")] * 3
    needed = memory_bytes("ties_svd", "adapter", 512, 1024, [4] * 3)
    assert check_merge(sources, manifest, options, memory=needed) == []
    assert check_merge(sources, manifest, options, memory=needed - 1) == [
        f"method ties_svd of 3 adapters needs up to {needed / 1e9:.1f} GB of memory for layers.0.q_proj (512 x 1024),"
        f" and a merge may take {(needed - 1) / 1e9:.1f} (LORAPLEX_MERGE_MEMORY_BYTES); use another method, or fewer"
        " adapters at a time"
    ]
    # Whether there is enough is nobody's business where nobody set a limit: a job that was queued runs.
    assert check_merge(sources, manifest, options) == []

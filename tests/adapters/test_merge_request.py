"""What cannot be merged is refused with every reason, before anything is queued, and without torch."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from adapters.errors import AdapterRefused
from adapters.manifest import Manifest
from adapters.merge import CONFIG_NAME, WEIGHTS_NAME, merge_adapters
from adapters.merge_request import MAX_SOURCES, METHODS, MergeOptions, check_merge
from tests.adapters.merging import source_of

UNKNOWN = (
    "unknown; one of linear, cat, svd, ties, ties_svd, dare_linear, dare_ties, dare_linear_svd, dare_ties_svd,"
    + (" magnitude_prune, magnitude_prune_svd")
)
KEPT = "the share of values to keep, more than 0 and at most 1"
OPTIONS: dict[str, tuple[dict[str, Any], str, list[str]]] = {
    "method": ({"method": "slerp"}, "adapter", [f"method = 'slerp': {UNKNOWN}"]),
    "into": ({}, "model", ["""into = 'model': "adapter" or "checkpoint\""""]),
    "density missing": ({"method": "ties"}, "adapter", [f"density: method ties needs it: {KEPT}"]),
    "density zero": ({"method": "dare_ties", "density": 0.0}, "adapter", [f"density = 0.0: {KEPT}"]),
    "density above": ({"method": "ties_svd", "density": 1.5}, "adapter", [f"density = 1.5: {KEPT}"]),
    "density nan": ({"method": "ties", "density": math.nan}, "adapter", [f"density = nan: {KEPT}"]),
    "density bool": ({"method": "ties", "density": True}, "adapter", [f"density = True: {KEPT}"]),
    "density unread": (
        {"method": "linear", "density": 0.5},
        "adapter",
        ["density = 0.5: method linear does not read it, only ties*, dare_* and magnitude_prune*"],
    ),
    "sign": (
        {"method": "ties", "density": 0.5, "majority_sign_method": "most"},
        "adapter",
        ["majority_sign_method = 'most': total or frequency"],
    ),
    "sign unread": (
        {"method": "dare_linear", "density": 0.5, "majority_sign_method": "total"},
        "adapter",
        ["majority_sign_method = 'total': method dare_linear does not read it, only ties* and dare_ties*"],
    ),
    "svd_rank": ({"method": "svd", "svd_rank": 513}, "adapter", ["svd_rank = 513: ranks are integers from 1 to 512"]),
    "svd_rank zero": ({"method": "svd", "svd_rank": 0}, "adapter", ["svd_rank = 0: ranks are integers from 1 to 512"]),
    "svd_rank unread": (
        {"method": "cat", "svd_rank": 4},
        "adapter",
        ["svd_rank = 4: method cat does not read it, only svd and *_svd"],
    ),
    "seed": (
        {"method": "dare_ties_svd", "density": 0.5, "seed": -1},
        "adapter",
        ["seed = -1: an integer from 0 to 2**63 - 1"],
    ),
    "seed unread": ({"method": "ties", "density": 0.5, "seed": 7}, "adapter", [
        "seed = 7: method ties does not read it, only dare_*"
    ]),
    "checkpoint by another method": ({"method": "svd"}, "checkpoint", [
        "method = 'svd': into a checkpoint only linear is possible, where the weighted sum of the adapters is exact; to"
        " use another method merge into an adapter first, and then that adapter"
    ]),
    "shards of an adapter": ({"max_shard_bytes": 10**9}, "adapter", [
        "max_shard_bytes = 1000000000: only for into = checkpoint"
    ]),
    "tiny shards": ({"max_shard_bytes": 1}, "checkpoint", ["max_shard_bytes = 1: an integer of at least 65536"]),
    "everything at once": (
        {"method": "cat", "density": 2.0, "majority_sign_method": "x", "svd_rank": -1, "seed": 1, "max_shard_bytes": 0},
        "adapter",
        [
            "density = 2.0: method cat does not read it, only ties*, dare_* and magnitude_prune*",
            "majority_sign_method = 'x': method cat does not read it, only ties* and dare_ties*",
            "svd_rank = -1: method cat does not read it, only svd and *_svd",
            "seed = 1: method cat does not read it, only dare_*",
            "max_shard_bytes = 0: only for into = checkpoint",
        ],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", OPTIONS)
def test_options(case: str, adapter: Path, manifest: Manifest, tmp_path: Path) -> None:
    named, into, reasons = OPTIONS[case]
    sources = [source_of(adapter), source_of(adapter, -0.5)]
    assert check_merge(sources, manifest, MergeOptions(**named), into) == reasons  # type: ignore[arg-type]
    if into == "adapter":
        out = tmp_path / "out"
        with pytest.raises(AdapterRefused) as refused:
            merge_adapters(sources, manifest, out, MergeOptions(**named))
        assert refused.value.reasons == reasons
        assert not out.exists()


@pytest.mark.parametrize("method", METHODS)
def test_sound_requests_have_no_reasons(method: str, adapter: Path, manifest: Manifest) -> None:
    kind = METHODS[method]
    options = MergeOptions(
        method,
        density=0.5 if kind.prune else None,
        majority_sign_method="frequency" if kind.elects_sign else None,
        svd_rank=512 if kind.svd else None,
        seed=2**63 - 1 if kind.prune == "random" else None,
    )
    assert check_merge([source_of(adapter), source_of(adapter, 0.0)], manifest, options) == []
    # All of them have defaults but for the density.
    assert check_merge([source_of(adapter)], manifest, MergeOptions(method, options.density)) == []


@pytest.mark.parametrize("weight", [math.nan, math.inf, -math.inf, "1", True, None])
def test_weights_are_finite_numbers(weight: Any, adapter: Path, manifest: Manifest) -> None:
    reasons = check_merge([source_of(adapter, weight, "tone@2")], manifest, MergeOptions())
    assert reasons == [f"tone@2: weight = {weight!a}: must be a finite number"]


def test_a_weight_beyond_float32(make_adapter: Callable[..., Path], manifest: Manifest) -> None:
    strong = make_adapter(r=1, lora_alpha=1000, target_modules=["q_proj"])
    reasons = check_merge([source_of(strong, 1e36, "tone@2")], manifest, MergeOptions())
    assert reasons == ["tone@2: weight = 1e+36: times the adapter's scale 1000 it is beyond float32"]


def test_number_of_sources(adapter: Path, manifest: Manifest) -> None:
    assert check_merge([], manifest, MergeOptions()) == [f"sources: 0 adapters; give 1 to {MAX_SOURCES}"]
    assert check_merge([source_of(adapter)] * MAX_SOURCES, manifest, MergeOptions()) == []
    assert check_merge([source_of(adapter)] * (MAX_SOURCES + 1), manifest, MergeOptions()) == [
        f"sources: {MAX_SOURCES + 1} adapters; give 1 to {MAX_SOURCES}"
    ]


@pytest.mark.parametrize("method", ["linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"])
def test_unequal_ranks(method: str, make_adapter: Callable[..., Path], manifest: Manifest) -> None:
    one = source_of(make_adapter(r=4, target_modules=["q_proj", "v_proj"]), name="one@1")
    two = source_of(make_adapter(r=8, target_modules=["q_proj", "up_proj"], rank_pattern={"up_proj": 2}), name="two@3")
    density = 0.5 if METHODS[method].prune else None
    assert check_merge([one, two], manifest, MergeOptions(method, density)) == [
        f"method {method} adds A to A and B to B, which needs equal ranks: in model.layers.0.self_attn.q_proj and 2"
        " more modules one@1 has rank 4, two@3 has rank 8; use cat, svd or another *_svd method"
    ]
    assert check_merge([one, two], manifest, MergeOptions("cat")) == []
    assert check_merge([one, two], manifest, MergeOptions("svd")) == []
    assert check_merge([one, two], manifest, MergeOptions("linear"), "checkpoint") == []


def test_ranks_of_cat_add_up(make_adapter: Callable[..., Path], manifest: Manifest) -> None:
    wide = make_adapter(r=300, target_modules=["q_proj"], layers_to_transform=[1])
    narrow = make_adapter(r=212, target_modules=["q_proj", "v_proj"])
    both = [source_of(wide), source_of(narrow)]
    assert check_merge(both, manifest, MergeOptions("cat")) == []
    assert check_merge([*both, source_of(wide)], manifest, MergeOptions("cat")) == [
        "method cat adds up the ranks: model.layers.1.self_attn.q_proj would have rank 812, at most 512 are served; use"
        " svd"
    ]
    assert check_merge([*both, source_of(wide)], manifest, MergeOptions("svd")) == []


def test_sources_that_do_not_fit_give_all_reasons(
    adapter: Path, make_adapter: Callable[..., Path], manifest: Manifest
) -> None:
    """Made for another base, damaged since, of a kind that is not served: with those of the options."""
    broken = make_adapter(r=2, target_modules=["q_proj"])
    (broken / WEIGHTS_NAME).write_bytes(b"junk")
    dora = make_adapter(r=2, target_modules=["q_proj"])
    config = json.loads((dora / CONFIG_NAME).read_bytes()) | {"use_dora": True, "target_modules": ["k_proj"]}
    (dora / CONFIG_NAME).write_text(json.dumps(config))
    sources = [source_of(adapter, math.nan, "a"), source_of(broken, 1, "b"), source_of(dora, 1, "c")]
    reasons = check_merge(sources, manifest, MergeOptions("ties"))
    assert reasons[:3] == [
        "density: method ties needs it: " + KEPT,
        "a: weight = nan: must be a finite number",
        "b: adapter_model.safetensors: 4 bytes is too short for a safetensors file",
    ]
    assert reasons[3] == "c: adapter_config.json: use_dora = True: DoRA is not served; merge it or train with" + (
        " use_dora=false"
    )
    assert "c: lora_A of model.layers.0.self_attn.k_proj is missing; adapter_config.json adapts this module" in reasons


def test_checking_loads_no_torch() -> None:
    script = (
        "import sys, adapters.merge_request; print('torch' in sys.modules, 'adapters.merge_request' in sys.modules)"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["False", "True"], done.stderr

"""Merging adapters: every method against PEFT's add_weighted_adapter on the same files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from adapters.errors import AdapterRefused
from adapters.inspection import inspect_upload
from adapters.manifest import Manifest, Module
from adapters.merge import CONFIG_NAME, WEIGHTS_NAME, merge_adapters
from adapters.merge_methods import Factors, merge_module
from adapters.merge_plan import merged_rank
from adapters.merge_request import METHODS, MergeOptions
from tests.adapters.conftest import build_adapter, build_llama
from tests.adapters.merging import (
    assert_close,
    deltas,
    loaded_pairs,
    merged_by_peft,
    merged_by_us,
    pairs_of,
    source_deltas,
    source_of,
    with_sources,
)

SOUND = [method for method in METHODS if not METHODS[method].svd]
SVD = [method for method in METHODS if METHODS[method].svd]

RECIPES: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]},
    "scaled": {"r": 4, "lora_alpha": 3, "target_modules": ["q_proj", "v_proj", "down_proj"]},
    "stabilised": {"r": 4, "use_rslora": True, "target_modules": ["q_proj", "v_proj", "down_proj"]},
    "others": {"r": 4, "target_modules": ["v_proj", "up_proj"]},
    "all": {"r": 4, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]},
    "patterns": {
        "r": 4,
        "lora_alpha": 6,
        "target_modules": ["q_proj", "v_proj"],
        "rank_pattern": {"v_proj": 2, r"layers\.0\.self_attn\.q_proj": 3},
        "alpha_pattern": {"v_proj": 5},
    },
    "wide": {"r": 9, "lora_alpha": 4, "target_modules": ["q_proj", "up_proj"]},
    "narrow": {"r": 2, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    "one-layer": {"r": 4, "target_modules": ["q_proj", "k_proj"], "layers_to_transform": [1]},
    "regex": {"r": 4, "target_modules": r".*\.(1|2)\.self_attn\.(q|k)_proj"},
    "half": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "dtype": torch.bfloat16},
}
EQUAL_RANKS: dict[str, tuple[list[str], list[float]]] = {
    "two": (["plain", "scaled"], [0.7, 0.4]),
    "negative": (["plain", "scaled"], [1.0, -0.8]),
    "three": (["plain", "others", "all"], [0.5, -1.5, 2.0]),
    "patterns": (["patterns", "patterns"], [0.9, -0.3]),
    "stored in half": (["half", "plain"], [0.25, 1.0]),
    "stabilised second": (["plain", "stabilised"], [0.6, 0.6]),
    "stabilised first": (["stabilised", "plain"], [0.6, -0.6]),
}
UNEQUAL_RANKS: dict[str, tuple[list[str], list[float]]] = {
    "two": (["plain", "wide"], [0.7, -0.4]),
    "four": (["wide", "patterns", "narrow", "stabilised"], [1.0, 0.5, -0.25, 2.0]),
}


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Path]:
    """saved(recipe, seed) -> the folder that PEFT saved, made once."""
    root, made = tmp_path_factory.mktemp("sources"), dict[tuple[str, int], Path]()

    def save(recipe: str, seed: int) -> Path:
        if (recipe, seed) not in made:
            made[recipe, seed] = build_adapter(root / f"{recipe}-{seed}", seed=seed, **RECIPES[recipe])
        return made[recipe, seed]

    return save


@pytest.fixture
def sources(saved: Callable[[str, int], Path]) -> Callable[[list[str]], list[Path]]:
    """Folders of the recipes, each with random values of its own."""
    return lambda recipes: [saved(recipe, 10 + i) for i, recipe in enumerate(recipes)]


def options_of(method: str, density: float = 0.4, seed: int = 0, **more: Any) -> tuple[MergeOptions, dict[str, Any]]:
    """Ours, and PEFT's arguments that mean the same."""
    ours: dict[str, Any] = {"method": method, **more}
    theirs: dict[str, Any] = {"method": method, **more}
    if METHODS[method].prune:
        ours["density"] = theirs["density"] = density
    if METHODS[method].prune == "random":
        ours["seed"] = theirs["seed"] = seed
    return MergeOptions(**ours), theirs


@pytest.mark.parametrize("case", EQUAL_RANKS)
@pytest.mark.parametrize("method", SOUND)
def test_factors_equal_those_of_peft_bit_for_bit(
    method: str, case: str, sources: Callable[[list[str]], list[Path]], manifest: Manifest, tmp_path: Path
) -> None:
    recipes, weights = EQUAL_RANKS[case]
    folders = sources(recipes)
    ours, theirs = options_of(method, seed=len(case))
    expected = merged_by_peft(with_sources(build_llama(), folders), weights, **theirs)

    out = merged_by_us(folders, weights, manifest, tmp_path / "out", ours)
    inspect_upload(out / CONFIG_NAME, {WEIGHTS_NAME: out / WEIGHTS_NAME}, None, manifest)
    actual = loaded_pairs(build_llama(), out)

    assert actual.keys() == expected.keys()
    for name, (a, b) in expected.items():
        rank = actual[name][0].shape[0]
        # Only cat's are larger: PEFT fills up with zeros what rank_pattern makes smaller.
        assert not a[rank:].any(), name
        assert not b[:, rank:].any(), name
        assert torch.equal(actual[name][0], a[:rank]), name
        assert torch.equal(actual[name][1], b[:, :rank]), name


@pytest.mark.parametrize("case", [*EQUAL_RANKS, *(f"unequal {case}" for case in UNEQUAL_RANKS)])
@pytest.mark.parametrize("method", [*SVD, "cat"])
def test_deltas_equal_those_of_peft(
    method: str, case: str, sources: Callable[[list[str]], list[Path]], manifest: Manifest, tmp_path: Path
) -> None:
    recipes, weights = UNEQUAL_RANKS[case.removeprefix("unequal ")] if "unequal" in case else EQUAL_RANKS[case]
    folders = sources(recipes)
    ours, theirs = options_of(method, density=0.7, seed=len(case))
    expected = deltas(merged_by_peft(with_sources(build_llama(), folders), weights, **theirs))

    out = merged_by_us(folders, weights, manifest, tmp_path / "out", ours)
    inspect_upload(out / CONFIG_NAME, {WEIGHTS_NAME: out / WEIGHTS_NAME}, None, manifest)
    # PEFT in float32 itself is off by as much; the singular values are separated by far more.
    assert_close(deltas(loaded_pairs(build_llama(), out)), expected, tolerance=2e-5)


@pytest.mark.parametrize("seed", [0, 1, 2**40 + 5])
@pytest.mark.parametrize("method", [method for method in METHODS if METHODS[method].prune == "random"])
def test_random_pruning_follows_the_seed_as_peft_does(
    method: str, seed: int, sources: Callable[[list[str]], list[Path]], manifest: Manifest, tmp_path: Path
) -> None:
    folders, weights = sources(["plain", "all", "scaled"]), [0.5, 1.0, -0.7]
    ours, theirs = options_of(method, density=0.3, seed=seed)
    expected = deltas(merged_by_peft(with_sources(build_llama(), folders), weights, **theirs))
    actual = deltas(loaded_pairs(build_llama(), merged_by_us(folders, weights, manifest, tmp_path / "1", ours)))
    assert_close(actual, expected, tolerance=2e-5)

    again = merged_by_us(folders, weights, manifest, tmp_path / "1", ours)
    bytes_again = (again / WEIGHTS_NAME).read_bytes()
    torch.rand(5)  # the global generator plays no part
    assert (merged_by_us(folders, weights, manifest, tmp_path / "2", ours) / WEIGHTS_NAME).read_bytes() == bytes_again
    other, _ = options_of(method, density=0.3, seed=seed + 1)
    changed = deltas(loaded_pairs(build_llama(), merged_by_us(folders, weights, manifest, tmp_path / "3", other)))
    name = next(iter(actual))
    assert not torch.allclose(changed[name], actual[name])


@pytest.mark.parametrize("majority", ["total", "frequency"])
@pytest.mark.parametrize("density", [0.05, 0.5, 1.0])
@pytest.mark.parametrize("method", [method for method in METHODS if METHODS[method].elects_sign])
def test_sign_election_and_density(
    method: str,
    density: float,
    majority: str,
    sources: Callable[[list[str]], list[Path]],
    manifest: Manifest,
    tmp_path: Path,
) -> None:
    folders, weights = sources(["plain", "scaled", "all"]), [1.0, -0.5, 0.8]
    ours, theirs = options_of(method, density, 3, majority_sign_method=majority)
    expected = deltas(merged_by_peft(with_sources(build_llama(), folders), weights, **theirs))
    actual = deltas(loaded_pairs(build_llama(), merged_by_us(folders, weights, manifest, tmp_path / "out", ours)))
    assert_close(actual, expected, tolerance=2e-5)


@pytest.mark.parametrize("rank", [1, 3, 16])
@pytest.mark.parametrize("method", SVD)
def test_svd_rank(
    method: str, rank: int, sources: Callable[[list[str]], list[Path]], manifest: Manifest, tmp_path: Path
) -> None:
    folders, weights = sources(["plain", "wide"]), [1.0, 0.5]
    ours, theirs = options_of(method, svd_rank=rank)
    expected = deltas(merged_by_peft(with_sources(build_llama(), folders), weights, **theirs))
    pairs = loaded_pairs(build_llama(), merged_by_us(folders, weights, manifest, tmp_path / "out", ours))
    assert max(a.shape[0] for a, _ in pairs.values()) <= rank
    assert_close(deltas(pairs), expected, tolerance=2e-5)


def test_an_svd_rank_beyond_the_matrix_is_cut(
    sources: Callable[[list[str]], list[Path]], manifest: Manifest, tmp_path: Path
) -> None:
    """PEFT gives factors whose shapes do not fit together here."""
    folders = sources(["plain", "all"])
    options = MergeOptions(method="magnitude_prune_svd", density=1.0, svd_rank=40)
    out = merged_by_us(folders, [1.0, -0.5], manifest, tmp_path / "out", options)
    peft = with_sources(build_llama(), folders)
    one, other = source_deltas(peft, "s0"), source_deltas(peft, "s1")
    expected = {name: one.get(name, torch.zeros(())) - 0.5 * other[name] for name in other}
    pairs = loaded_pairs(build_llama(), out)
    ranks = {name.rpartition(".")[2]: a.shape[0] for name, (a, _) in pairs.items()}
    assert ranks == {"q_proj": 32, "k_proj": 16, "v_proj": 16, "o_proj": 32} | dict.fromkeys(
        ("gate_proj", "up_proj", "down_proj"), 32
    )
    assert_close(deltas(pairs), expected, tolerance=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_one_source_alone_is_merged_by_the_method(
    method: str, sources: Callable[[list[str]], list[Path]], manifest: Manifest, tmp_path: Path
) -> None:
    """PEFT takes linear for one source whatever was asked for; its own functions of each method are the oracle."""
    (folder,) = sources(["patterns"])
    ours, theirs = options_of(method, density=0.5, seed=4)
    if METHODS[method].svd:
        ours = MergeOptions(method, ours.density, None, 2, ours.seed)
    out = merged_by_us([folder], [-0.5], manifest, tmp_path / "out", ours)
    peft = with_sources(build_llama(), [folder])
    torch.manual_seed(4)
    expected = {}
    for module in manifest.linears:
        layer = peft.get_submodule(f"base_model.model.{module.name}")
        if "s0" not in getattr(layer, "lora_A", {}):
            continue
        arguments = {"target": layer, "density": theirs.get("density"), "majority_sign_method": "total"}
        if METHODS[method].svd:
            merge = peft.base_model._svd_generalized_task_arithmetic_weighted_adapter
            pair = merge(method, ["s0"], [-0.5], 2, target_lora_A=None, target_lora_B=None, **arguments)
        else:
            merge = peft.base_model._generalized_task_arithmetic_weighted_adapter
            pair = merge("linear" if method == "cat" else method, ["s0"], [-0.5], **arguments)
        expected[module.name] = tuple(pair)
    assert_close(deltas(loaded_pairs(build_llama(), out)), deltas(expected), tolerance=2e-5)


def test_exactly_the_modules_of_the_sources_are_adapted(
    sources: Callable[[list[str]], list[Path]], manifest: Manifest, tmp_path: Path
) -> None:
    """Layers that differ, a regular expression beside a list: PEFT fails, or drops what the first source leaves out."""
    folders = sources(["one-layer", "regex", "others"])
    for method in ("cat", "linear", "svd"):
        weights = [0.5, -1.0, 0.25]
        out = merged_by_us(folders, weights, manifest, tmp_path / method, MergeOptions(method))
        pairs = loaded_pairs(build_llama(), out)
        wanted = {
            name
            for name in (module.name for module in manifest.linears)
            if name.endswith(("v_proj", "up_proj"))
            or (name.endswith(("q_proj", "k_proj")) and ("layers.1." in name or "layers.2." in name))
        }
        assert pairs.keys() == wanted
        if method == "cat":
            peft = with_sources(build_llama(), folders)
            parts = [source_deltas(peft, f"s{i}") for i in range(3)]
            expected = {
                name: sum(w * part[name] for w, part in zip(weights, parts, strict=True) if name in part)
                for name in wanted
            }
            assert_close(deltas(pairs), expected)


def test_ranks_that_differ_only_between_modules_are_linear(
    saved: Callable[[str, int], Path], manifest: Manifest, tmp_path: Path
) -> None:
    """PEFT refuses adapters whose r differs even where no module has two of them, and cannot load what it saves."""
    one = build_adapter(tmp_path / "one", seed=1, r=8, target_modules=["o_proj"])
    other = build_adapter(tmp_path / "other", seed=2, r=4, target_modules=["v_proj"])
    out = merged_by_us([one, other], [2.0, -3.0], manifest, tmp_path / "out", MergeOptions("linear"))
    peft = with_sources(build_llama(), [one, other])
    expected = {name: 2 * delta for name, delta in source_deltas(peft, "s0").items()}
    expected |= {name: -3 * delta for name, delta in source_deltas(peft, "s1").items()}
    assert_close(deltas(loaded_pairs(build_llama(), out)), expected)


def test_the_folder(sources: Callable[[list[str]], list[Path]], manifest: Manifest, tmp_path: Path) -> None:
    """float32, scale 1, patterns written down, nothing left of an earlier attempt, progress that reaches 1."""
    out = tmp_path / "out"
    (out / "deep").mkdir(parents=True)
    (out / "deep" / "old").write_text("left behind")
    (out / CONFIG_NAME).write_text("left behind")
    shares: list[float] = []
    folders = sources(["patterns", "wide"])
    merge_adapters([source_of(f) for f in folders], manifest, out, MergeOptions("cat"), shares.append)
    assert sorted(path.name for path in out.iterdir()) == [CONFIG_NAME, WEIGHTS_NAME]
    assert shares == sorted(shares)
    assert (shares[0], shares[-1]) == (0.0, 1.0)
    tensors = load_file(out / WEIGHTS_NAME)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    config = json.loads((out / CONFIG_NAME).read_bytes())
    assert config["rank_pattern"] == config["alpha_pattern"]
    assert config["target_modules"] == ["q_proj", "v_proj", "up_proj"]
    spec = inspect_upload(out / CONFIG_NAME, {WEIGHTS_NAME: out / WEIGHTS_NAME}, None, manifest).spec
    assert {target.scale for target in spec.targets} == {1.0}
    ranks = {(t.module.split(".")[2], t.module.rpartition(".")[2]): t.rank for t in spec.targets}
    assert ranks["0", "q_proj"] == 3 + 9
    assert ranks["1", "q_proj"] == 4 + 9
    assert ranks["1", "v_proj"] == 2
    assert ranks["1", "up_proj"] == 9


def test_a_merged_adapter_can_be_merged_again(
    sources: Callable[[list[str]], list[Path]], manifest: Manifest, tmp_path: Path
) -> None:
    folders = sources(["patterns", "wide", "all"])
    first = merged_by_us(folders[:2], [1.0, 2.0], manifest, tmp_path / "first", MergeOptions("cat"))
    second = merged_by_us([first, folders[2]], [0.5, 1.0], manifest, tmp_path / "second", MergeOptions("cat"))
    at_once = merged_by_us(folders, [0.5, 1.0, 1.0], manifest, tmp_path / "once", MergeOptions("cat"))
    assert_close(deltas(loaded_pairs(build_llama(), second)), deltas(loaded_pairs(build_llama(), at_once)))


def test_values_beyond_the_dtype_of_the_base(
    sources: Callable[[list[str]], list[Path]], manifest: Manifest, tmp_path: Path
) -> None:
    half = Manifest(**{**{f: getattr(manifest, f) for f in manifest.__struct_fields__}, "dtype": "float16"})
    folders = sources(["plain", "scaled"])
    with pytest.raises(AdapterRefused) as refused:
        merged_by_us(folders, [1.0, 1e7], half, tmp_path / "out", MergeOptions("cat"))
    assert len(refused.value.reasons) == 9
    assert refused.value.reasons[0] == (
        "lora_A of model.layers.0.self_attn.q_proj: merged values are not finite in float16, in which this base runs;"
        " use smaller weights"
    )
    assert not (tmp_path / "out" / CONFIG_NAME).exists()


def test_names_that_end_alike_keep_their_own_ranks(tmp_path: Path) -> None:
    """`layers.0.q_proj` is also the end of `tower.layers.0.q_proj`: whole names, the longer one first."""
    from safetensors.torch import save_file

    modules = tuple(
        Module(f"{prefix}layers.{i}.{kind}_proj", "linear", 8, 8)
        for prefix in ("", "tower.")
        for i in (0, 1)
        for kind in "qv"
    )
    base = Manifest("f", "Towers", "towers", "float32", 8, 8, modules)
    for number, ranks in enumerate(({}, {"tower.layers.1.q_proj": 2})):
        folder = tmp_path / str(number)
        folder.mkdir()
        chosen = [module.name for module in modules if number == 0 or "tower" in module.name]
        tensors = {}
        for name in chosen:
            rank = ranks.get(name, 3)
            tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(rank, 8)
            tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(8, rank)
        save_file(tensors, folder / WEIGHTS_NAME)
        config = {"peft_type": "LORA", "r": 3, "target_modules": chosen, "rank_pattern": ranks}
        (folder / CONFIG_NAME).write_text(json.dumps(config))
    out = merged_by_us([tmp_path / "0", tmp_path / "1"], [1.0, 1.0], base, tmp_path / "out", MergeOptions("cat"))
    spec = inspect_upload(out / CONFIG_NAME, {WEIGHTS_NAME: out / WEIGHTS_NAME}, None, base).spec
    assert {target.module: target.rank for target in spec.targets} == {
        module.name: 3 if "tower" not in module.name else 5 if module.name == "tower.layers.1.q_proj" else 6
        for module in modules
    }


@st.composite
def _factor_lists(draw: st.DrawFn) -> list[Factors]:
    d, k = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    return [
        Factors(
            torch.randn(rank, k, generator=generator),
            torch.randn(d, rank, generator=generator),
            draw(st.floats(0.01, 8.0)),
            draw(st.floats(-3.0, 3.0)),
        )
        for rank in draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    ]


def _exact(sources: list[Factors]) -> torch.Tensor:
    return sum(
        (one.weight * one.scale * (one.b.double() @ one.a.double()) for one in sources),
        torch.zeros(sources[0].b.shape[0], sources[0].a.shape[1], dtype=torch.float64),
    )


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(_factor_lists())
def test_cat_and_svd_of_full_rank_are_the_sum_of_the_deltas(sources: list[Factors]) -> None:
    d, k = sources[0].b.shape[0], sources[0].a.shape[1]
    size = sum(float((one.weight * one.scale * (one.b @ one.a)).norm()) for one in sources) + 1e-6
    for options in (MergeOptions("cat"), MergeOptions("svd", svd_rank=512)):
        rank = merged_rank([one.a.shape[0] for one in sources], options, 512, d, k)
        a, b = merge_module(sources, options, rank, torch.Generator())
        assert a.shape == (rank, k)
        assert b.shape == (d, rank)
        assert float((b.double() @ a.double() - _exact(sources)).norm()) <= 1e-5 * size


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(_factor_lists(), st.lists(st.floats(0.0, 4.0), min_size=1, max_size=4))
def test_linear_of_equal_adapters_is_that_adapter(sources: list[Factors], weights: list[float]) -> None:
    """Square roots add up: Σ√w A · Σ√w B = (Σ√w)² B A."""
    one = sources[0]
    copies = [Factors(one.a, one.b, one.scale, weight) for weight in weights]
    a, b = merge_module(copies, MergeOptions("linear"), one.a.shape[0], torch.Generator())
    factor = sum((weight * one.scale) ** 0.5 for weight in weights) ** 2
    expected = factor * (one.b.double() @ one.a.double())
    assert float((b.double() @ a.double() - expected).norm()) <= 1e-5 * (float(expected.norm()) + 1e-6)


def test_pairs_of_sources_are_what_peft_loaded(saved: Callable[[str, int], Path]) -> None:
    """The oracle itself: PEFT holds the sources in float32, whatever dtype their files have."""
    peft = with_sources(build_llama(), [saved("half", 1)])
    assert {a.dtype for a, _ in pairs_of(peft, "s0").values()} == {torch.float32}

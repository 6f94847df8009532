"""Both parsers of uploaded bytes under hypothesis: whatever comes, they accept it or give reasons, and nothing else.

Inputs are valid files that were mutated (bytes, fields, entries) as well as garbage. What the header parser accepts,
the reference implementation must accept too. FUZZ multiplies the number of examples, which is printed, and FUZZ_SEED
chooses which those are (`make fuzz`).
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from adapters import patterns
from adapters.manifest import Manifest, Module
from adapters.peft_config import FIELDS
from adapters.peft_format import examine
from adapters.safetensors_header import DTYPE_BYTES
from tests.adapters import fuzz_parsers
from tests.adapters.fuzz_parsers import Corpus, Fuzzer
from tests.adapters.parser_properties import WEIGHTS, check_config, check_file, check_index, encoded, header_of

FACTOR = int(os.environ.get("FUZZ", "1"))
SEED = int(os.environ.get("FUZZ_SEED", "1"))


def fuzz(test: Callable[..., None]) -> Callable[..., None]:
    """For what `given` has made: always the same examples with the same FUZZ and FUZZ_SEED."""
    chosen = settings(
        max_examples=1000 * FACTOR, database=None, deadline=None, suppress_health_check=list(HealthCheck)
    )  # fmt: skip
    return seed(SEED)(chosen(test))


PREFIX = "base_model.model."
MANIFEST = Manifest(
    fingerprint="tiny",
    architecture="Tiny",
    model_type="tiny",
    dtype="float32",
    vocab_size=8,
    max_positions=8,
    modules=(
        Module("model.embed_tokens", "embedding", 8, 16),
        *(Module(f"model.layers.{i}.self_attn.{n}_proj", "linear", 16, 16) for i in range(2) for n in "qv"),
        Module("lm_head", "output", 16, 8),
    ),
)
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]}
COUNTS: Counter[str] = Counter()


@pytest.fixture(scope="module", autouse=True)
def _counts() -> Iterator[None]:
    yield
    print("\n" + ", ".join(f"{name}: {count}" for name, count in sorted(COUNTS.items())))


@pytest.fixture(autouse=True)
def _short_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Regular expressions that explode are part of the game."""
    monkeypatch.setattr(patterns, "BUDGET_SECONDS", 0.02)


def valid_file() -> tuple[dict[str, Any], bytes]:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for module in MANIFEST.linears:
        for side, shape in (("A", [2, 16]), ("B", [16, 2])):
            entries[f"{PREFIX}{module.name}.lora_{side}.weight"] = {
                "dtype": "F32", "shape": shape, "data_offsets": [position, position + 128],
            }  # fmt: skip
            position += 128
    return entries, bytes(position)


HEADERS = {WEIGHTS: header_of(encoded(*valid_file()))}
VERDICTS = {True: "accepted", False: "refused"}

# ---------------------------------------------------------------- inputs

numbers = st.one_of(
    st.integers(-(2**70), 2**70), st.integers(-3, 600), st.floats(), st.sampled_from([0, 1, 2**31, 2**63, 1e39])
)
words = st.one_of(
    st.text(max_size=20),
    st.sampled_from(["q_proj", "v_proj", "all-linear", "layers", "lm_head", "LORA", "none", "gaussian", "pissa"]),
    st.sampled_from([r".*\.q_proj", "(", r"(a+)+$", r"(?:.*.*)*x", "[[a]", "a{9}{9}{9}", "(?i)Q_PROJ", "{e<=1}"]),
    st.from_regex(r"[a-z.*+?()|\[\]{}\\0-9]{1,20}", fullmatch=True),
)  # fmt: skip
values = st.recursive(
    st.none() | st.booleans() | numbers | words,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(words, inner, max_size=4),
    max_leaves=8,
)


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """Bytes changed, removed, inserted, repeated, cut."""
    result = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(result) - 1)))
        match draw(st.sampled_from(("set", "drop", "insert", "cut", "repeat"))):
            case "set" if result:
                result[at] = draw(st.integers(0, 255))
            case "drop":
                del result[at : at + draw(st.integers(1, 16))]
            case "insert":
                result[at:at] = draw(st.binary(max_size=8) | st.sampled_from([b"[" * 2000, b"9" * 5000, b"\xff", b'"']))
            case "cut":
                del result[at:]
            case "repeat":
                result[at:at] = result[at : at + draw(st.integers(1, 64))]
    return bytes(result)


plausible = st.fixed_dictionaries(
    {},
    optional={
        "lora_alpha": st.floats(-100, 100) | st.integers(-100, 100),
        "use_rslora": st.booleans(),
        "rank_pattern": st.dictionaries(words, st.just(2), max_size=3),
        "alpha_pattern": st.dictionaries(words, st.integers(0, 9), max_size=3),
        "exclude_modules": st.lists(words, max_size=2) | words,
        "target_modules": st.just("all-linear")
        | st.lists(words, max_size=3).map(lambda more: ["q_proj", "v_proj", *more]),
        "layers_to_transform": st.just([0, 1]) | st.lists(st.integers(0, 3), max_size=3),
        **{name: values for name, field in FIELDS.items() if field.role == "harmless" and name != "init_lora_weights"},
    },
)
changed_fields = st.dictionaries(st.sampled_from(sorted(FIELDS)) | words, values, max_size=4)
configs = st.one_of(
    plausible.map(lambda fields: json.dumps({**CONFIG, **fields}).encode()),
    changed_fields.map(lambda fields: json.dumps({**CONFIG, **fields}).encode()),
    damaged(json.dumps({**CONFIG, "rank_pattern": {"q.*": 1}, "alpha_pattern": {}, "use_rslora": True}).encode()),
    values.map(lambda value: json.dumps(value).encode()),
    st.binary(max_size=200),
)

sizes = st.one_of(st.integers(-1, 600), st.integers(-(2**70), 2**70), values)
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(sorted(DTYPE_BYTES)) | values,
        "shape": st.lists(sizes, max_size=10) | values,
        "data_offsets": st.lists(sizes, max_size=3) | values,
    }
)
names = st.sampled_from(sorted(valid_file()[0])) | words


@st.composite
def fitting(draw: st.DrawFn) -> bytes:
    """Random tensors that cover the data as they should, in any order."""
    header: dict[str, Any] = {}
    position = 0
    for name in draw(st.lists(names.filter(lambda name: name != "__metadata__"), max_size=6, unique=True)):
        dtype = draw(st.sampled_from(sorted(DTYPE_BYTES)))
        shape = draw(st.lists(st.integers(0, 5), max_size=4))
        end = position + DTYPE_BYTES[dtype] * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, end]}
        position = end
    order = draw(st.permutations(sorted(header)))
    return encoded({name: header[name] for name in order}, bytes(position))


def _with(changes: dict[str, Any], cut: int) -> bytes:
    header, data = valid_file()
    return encoded(header | changes, data[: len(data) - cut])


files = st.one_of(
    st.builds(_with, st.dictionaries(names, entries | values, max_size=3), st.sampled_from([0, 0, 1, 500])),
    damaged(encoded(*valid_file())),
    fitting(),
    st.builds(encoded, st.dictionaries(names, entries, max_size=3), st.binary(max_size=64)),
    st.builds(lambda length, rest: struct.pack("<Q", length) + rest, st.integers(0, 2**64 - 1), st.binary(max_size=64)),
    st.binary(max_size=64),
)

# ---------------------------------------------------------------- properties


@fuzz
@given(configs)
def test_any_configuration_is_accepted_or_refused_with_reasons(config: bytes) -> None:
    COUNTS[f"configurations {VERDICTS[check_config(config, HEADERS, MANIFEST)]}"] += 1


@fuzz
@given(files)
def test_any_file_is_accepted_or_refused_with_reasons(content: bytes) -> None:
    COUNTS[f"files {VERDICTS[check_file(content, json.dumps(CONFIG).encode(), MANIFEST)]}"] += 1


@fuzz
@given(
    st.one_of(
        st.dictionaries(names, words, max_size=4).map(lambda shards: json.dumps({"weight_map": shards}).encode()),
        values.map(lambda value: json.dumps({"weight_map": value}).encode()),
        damaged(json.dumps({"weight_map": dict.fromkeys(valid_file()[0], WEIGHTS)}).encode()),
        st.binary(max_size=64),
    )
)
def test_any_index_is_accepted_or_refused_with_reasons(index: bytes) -> None:
    verdict = VERDICTS[check_index(index, json.dumps(CONFIG).encode(), HEADERS, MANIFEST)]
    COUNTS[f"indexes {verdict}"] += 1


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return Corpus.make(tmp_path_factory.mktemp("corpus"))


def test_the_files_that_are_mutated_are_accepted_as_they_are(corpus: Corpus) -> None:
    fuzzer = Fuzzer(SEED, corpus)
    for which, each in enumerate(corpus.seeds):
        for kind, content in (("config", each.config), ("file", each.weights), ("index", each.index)):
            assert fuzzer.check(kind, which, content), (which, kind)


def test_mutations_of_real_files_are_accepted_or_refused_with_reasons(corpus: Corpus) -> None:
    """The first of what `make fuzz-million` tries."""
    counts = Fuzzer(SEED, corpus).run(range(3000 * FACTOR))
    COUNTS.update({f"mutations: {name}": count for name, count in counts.items()})
    assert sum(counts.values()) == 3000 * FACTOR
    for kind in ("config", "file", "index"):
        assert min(counts[f"{kind} {verdict}"] for verdict in VERDICTS.values()) > 5


def test_a_mutation_comes_out_of_seed_and_number_alone(corpus: Corpus) -> None:
    fuzzers = [Fuzzer(seed, corpus) for seed in (1, 2)]
    first = [[fuzzer.input(number) for number in range(50)] for fuzzer in fuzzers]
    again = [fuzzers[0].input(number) for number in reversed(range(50))]
    assert first[0] == again[::-1]
    assert first[0] != first[1]
    assert len({content for _, _, content in first[0]}) > 40


def test_a_parser_that_fails_is_reported_with_its_input(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    fuzzer = Fuzzer(1, corpus)
    number = next(number for number in range(100) if fuzzer.input(number)[0] == "config")
    monkeypatch.setattr(fuzz_parsers, "check_config", lambda *_: {}["no such key"])
    with pytest.raises(fuzz_parsers.CrashError, match=f"input {number} of seed 1.*KeyError"):
        fuzzer.run(range(number, number + 1))


def test_the_valid_ones_are_accepted() -> None:
    """Else everything above would be refused for one and the same reason."""
    spec, reasons = examine(json.dumps(CONFIG).encode(), HEADERS, MANIFEST)
    assert spec is not None, reasons
    assert len(spec.targets) == 4

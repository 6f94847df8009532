"""Bad input of every kind, to a real server: each is refused with its status and a message that names field and value.

Afterwards the server answers as before, nothing that was refused is on the disk or in the catalogue, and the engine's
check of its own structures has passed.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest

from service.api.failure import shown

from . import hostile
from .hostile import CONFIG, Case, Q, call, cut, entry, header, post_json, raw, safetensors, upload, weights
from .inference_helpers import BASE, VOCABULARY, InferenceServer

pytestmark = pytest.mark.xdist_group("hostile")

MAX_BODY = 1 << 20
MAX_UPLOAD = 32 << 20
REFUSED = (422, "adapter_refused", None)
MULTIPART = (400, "invalid_multipart")
ADAPTERS = "/v1/adapters"
MERGES = "/v1/merges"
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
FORM = "Content-Type: multipart/form-data; boundary=xx"
JSON = "Content-Type: application/json"


@pytest.fixture(scope="module")
def hostile_server(base_model_dir: Path) -> Iterator[InferenceServer]:
    server = InferenceServer(base_model_dir, max_body_bytes=MAX_BODY, max_upload_bytes=MAX_UPLOAD)
    try:
        yield server.start()
    finally:
        server.stop()


@pytest.fixture(scope="module")
def before(hostile_server: InferenceServer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What is there before anything bad comes: the adapter `known` with its alias `prod`."""
    hostile_server.upload("known", tmp_path_factory.mktemp("known"), 1)
    hostile_server.http.put(f"{ADAPTERS}/known/aliases/prod", json={"version": 1})
    return state(hostile_server)


def state(server: InferenceServer) -> dict[str, Any]:
    """All that the service keeps. The catalogue's own pages may change, what it says may not."""
    data = server.settings.data_dir
    files = {
        str(path.relative_to(data)): path.stat().st_size
        for folder in ("blobs", "uploads", "cache")
        for path in (data / folder).rglob("*")
        if path.is_file() and path.name != "lock"
    }
    known = server.http.get(ADAPTERS).json()["data"]
    versions = server.http.get(f"{ADAPTERS}/known/versions").json()["data"]
    for listed in (*known, *versions):
        listed.pop("residency")
    return {"files": files, "adapters": known, "versions": versions}


def test_hostile_cases_are_many() -> None:
    assert len(CASES) >= 60
    assert len({case.name for case in CASES}) == len(CASES)


def with_field(path: str, field: str, value: Any) -> Any:
    body: dict[str, Any] = {"model": BASE, "max_tokens": 4}
    body |= {"prompt": "x"} if path == COMPLETIONS else {"messages": [{"role": "user", "content": "x"}]}
    return post_json(path, body | {field: value})


def bad_request(name: str, field: str, value: Any, *said: str, code: str | None = None, **options: Any) -> Case:
    """A completion that is sound but for one field."""
    path, param = options.get("path", COMPLETIONS), options.get("param", field)
    return Case(name, with_field(path, field, value), options.get("status", 400), code, param, said)


def bad_config(name: str, field: str, value: Any, *said: str) -> Case:
    return Case(name, upload(**{field: value}), *REFUSED, ("adapter_config.json", field, *said))


def bad_file(name: str, model: bytes, *said: str) -> Case:
    return Case(name, upload(model=model), *REFUSED, ("adapter_model.safetensors", *said))


def bad_name(name: str, value: str, *said: str) -> Case:
    return Case(name, upload(name=value), 400, "invalid_name", "name", ("name", *said))


def form(*parts: tuple[str, bytes]) -> bytes:
    """A whole multipart body with the boundary xx."""
    body = b"".join(
        f'--xx\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n'.encode() + data + b"\r\n"
        for name, data in parts
    )
    return body + b"--xx--\r\n"


A, B = f"{Q}.lora_A.weight", f"{Q}.lora_B.weight"
ONES = {A: np.ones((4, 16), "<f4"), B: np.ones((16, 4), "<f4")}
TWICE = json.dumps(header())[:-1] + f', "{A}": ' + json.dumps(entry(0, 256, [4, 16])) + "}"
DEEP = b'{"model": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
DEEP_BUT_PARSED = b'{"model": ' + b"[" * 900 + b"]" * 900 + b', "prompt": "x"}'
OTHER_TYPES = [kind.value for kind in peft.PeftType if kind.value != "LORA"]
GOOD = form(("name", b"refused"), ("config", json.dumps(CONFIG).encode()), ("weights", weights()))
SLOW = r"(?:(?:\w|\.|[a-z])+)+[!-+]"

FILES = [
    bad_file("a truncated file", weights()[:-1], "end at byte", "but the file has"),
    bad_file("a file cut inside its header", weights()[:40], "cut off", "header of"),
    bad_file("an empty file", b"", "0 bytes is too short"),
    bad_file("seven bytes", b"\1" * 7, "7 bytes is too short"),
    bad_file("a header longer than the file", safetensors(header(), bytes(512), 1 << 40), str(1 << 40)),
    bad_file("a header of 2^64 - 1", safetensors(header(), bytes(512), 2**64 - 1), str(2**64 - 1)),
    bad_file("a header of 20 MB", safetensors(b"{" + b" " * (20 << 20) + b"}", b""), str((20 << 20) + 2), "at most"),
    bad_file("a header that is not JSON", safetensors(b'{"a":', b""), "not valid JSON"),
    bad_file("a header that is a list", safetensors(b"[1, 2]", b""), "no JSON object"),
    bad_file("a header that is not UTF-8", safetensors(b'{"\xff": 1}', b""), "not valid JSON", "utf-8"),
    bad_file("a header nested deeply", safetensors(b'{"a":' + b"[" * 50_000 + b"]" * 50_000 + b"}", b""), "deeply"),
    bad_file("overlapping offsets", safetensors(header() | {B: entry(128, 384, [16, 4])}, bytes(384)), B, "overlaps"),
    bad_file("a hole between tensors", safetensors(header() | {B: entry(260, 516, [16, 4])}, bytes(516)), B, "hole"),
    bad_file("offsets beyond the file", safetensors(header(), bytes(100)), "end at byte", "has"),
    bad_file("offsets backwards", safetensors(header(data_offsets=[256, 0]), bytes(512)), A, "[256, 0]"),
    bad_file("negative offsets", safetensors(header(data_offsets=[-256, 0]), bytes(512)), A, "[-256, 0]"),
    bad_file("offsets of 2^70", safetensors(header(data_offsets=[0, 2**70]), bytes(512)), A, str(2**70)),
    bad_file("sizes that overflow", safetensors(header(shape=[2**40, 2**40]), bytes(512)), A, "overflows"),
    bad_file("a negative size", safetensors(header(shape=[-4, 16]), bytes(512)), A, "[-4, 16]"),
    bad_file("an unknown dtype", safetensors(header(dtype="F31"), bytes(512)), A, "unknown dtype 'F31'"),
    bad_file("the wrong dtype", weights(ONES | {A: np.ones((4, 16), "<f8")}), A, "F64", "BF16"),
    bad_file("integers", weights(ONES | {A: np.ones((4, 16), "|i1")}), A, "I8"),
    bad_file("shapes of another rank", weights(ONES | {A: np.ones((8, 16), "<f4")}), "lora_A", "[8, 16]", "[4, 16]"),
    bad_file("shapes transposed", weights(ONES | {B: np.ones((4, 16), "<f4")}), "lora_B", "[4, 16]", "[16, 4]"),
    bad_file("three dimensions", weights(ONES | {B: np.ones((16, 4, 1), "<f4")}), "lora_B", "[16, 4, 1]"),
    Case("a missing tensor", upload(model=weights({A: ONES[A]})), *REFUSED, ("lora_B of", "q_proj is missing")),
    bad_file("an extra tensor", weights(ONES | {"surprise": np.ones(1, "<f4")}), "surprise"),
    bad_file("the same tensor twice", safetensors(TWICE.encode(), bytes(512)), A, "appears twice"),
    bad_file(
        "the same tensor under two names",
        weights(ONES | {A.replace(".weight", ".default.weight"): ONES[A]}), "second lora_A", "q_proj",
    ),
    bad_file("layer 999", weights(ONES | {A.replace("layers.0", "layers.999"): ONES[A]}), "layers.999"),
    bad_file("an unknown module", weights(ONES | {A.replace("q_proj", "warp_drive"): ONES[A]}), "warp_drive", "q_proj"),
    bad_file("a bias", weights(ONES | {B.replace("weight", "bias"): np.ones(16, "<f4")}), "bias"),
    bad_file(
        "a tensor's name of 5000 characters", weights({"x" * 5000: np.ones(1, "<f4")}), "xxx", "1 to 1024 characters"
    ),
    bad_file("a tensor's name with control characters", weights(ONES | {"a\n\x1b[2J": np.ones(1, "<f4")}), r"a\n\x1b"),
    bad_file("a pickle", hostile.pickled(), "not a safetensors file"),
    bad_file("a zip bomb renamed", hostile.zip_bomb(), "not a safetensors file"),
    bad_file("a NaN", hostile.changed((3, 15), float("nan")), A, "1 values are NaN or infinite"),
    bad_file("an infinity", hostile.changed((0, 0), float("-inf")), A, "1 values are NaN or infinite"),
]  # fmt: skip

CONFIGS = [
    *[bad_config(f"PEFT type {kind}", "peft_type", kind, f"'{kind}'", '"LORA"') for kind in OTHER_TYPES],
    bad_config("an unknown PEFT type", "peft_type", "TELEPATHY", "'TELEPATHY'"),
    bad_config("a PEFT type that is no text", "peft_type", ["LORA"], "['LORA']"),
    bad_config("an unknown field", "a_field_of_the_future", 7, "unknown field", "7"),
    bad_config("an unknown module in the configuration", "target_modules", ["warp_drive"], "warp_drive", "q_proj"),
    bad_config("rank 0", "r", 0, "r = 0", "1 to 512"),
    bad_config("rank 10^9", "r", 10**9, "r = 1000000000", "1 to 512"),
    bad_config("rank -1", "r", -1, "r = -1"),
    bad_config("rank true", "r", True, "r = True"),
    bad_config("rank 4.5", "r", 4.5, "r = 4.5"),
    bad_config("rank 10^9 in rank_pattern", "rank_pattern", {"q_proj": 10**9}, "1000000000"),
    bad_config("alpha NaN", "lora_alpha", float("nan"), "lora_alpha = nan", "finite"),
    bad_config("alpha infinite", "lora_alpha", float("inf"), "lora_alpha = inf", "finite"),
    bad_config("alpha 10^400", "lora_alpha", 10**400, "lora_alpha = 1000", "finite"),
    bad_config("alpha NaN in alpha_pattern", "alpha_pattern", {"q_proj": float("nan")}, "nan"),
    bad_config("DoRA", "use_dora", True, "use_dora = True"),
    bad_config("layer 999 to transform", "layers_to_transform", [999], "[999]"),
    bad_config("an expression that explodes", "target_modules", SLOW, "took too long", "at most"),
    bad_config("an exploding key of rank_pattern", "rank_pattern", {SLOW: 4}, "took too long"),
    bad_config("an expression that needs all memory", "target_modules", "(?:a{50000}){50000}", "50000", "repeat"),
    bad_config("an expression that is none", "exclude_modules", "(", "'('"),
    Case("a configuration that is not JSON", upload(b"{"), *REFUSED, ("adapter_config.json", "not valid JSON")),
    Case("an empty configuration", upload(b""), *REFUSED, ("adapter_config.json", "not valid JSON")),
    Case("a configuration that is a list", upload(b"[]"), *REFUSED, ("adapter_config.json", "a JSON object")),
    Case("a configuration of nothing", upload(b"{}"), *REFUSED, ("adapter_config.json", "peft_type", "missing")),
    Case("a configuration nested deeply", upload(b"[" * 100_000), *REFUSED, ("adapter_config.json", "deeply")),
    Case("a configuration not in UTF-8", upload(b'{"r": "\xff"}'), *REFUSED, ("adapter_config.json", "utf-8")),
    Case("a field twice", upload(b'{"r": 4, "r": 8}'), *REFUSED, ("adapter_config.json", "'r' appears twice")),
    Case(
        "a configuration of 2 MB", upload(b" " * (2 << 20)), 413, "field_too_large", "config", ("'config'", "1048576")
    ),
]  # fmt: skip

NAMES = [
    bad_name("a path as name", "../../etc/passwd", "../../etc/passwd"),
    bad_name("dots as name", "..", '".."'),
    bad_name("a name with a backslash", "..\\windows", "windows"),
    bad_name("a name with a null byte", "a\0b", r"a\u0000b"),
    bad_name("a name with a line break", "a\nb", r"a\nb"),
    bad_name("a name with an escape sequence", "a\x1b[31m", r"a\u001b[31m"),
    bad_name("a name with a right-to-left mark", "a\u202eb", "a\u202eb"),
    bad_name("a name of 97 characters", "x" * 97, "x" * 97, "1 to 96"),
    bad_name("an empty name", "", '""'),
    bad_name("a name with an at sign", "pirate@3", "pirate@3"),
    Case("a name of 300 bytes", upload(name="x" * 300), 413, "field_too_large", "name", ("'name'", "256")),
    Case("a name that is not UTF-8",
         raw(f"POST {ADAPTERS} HTTP/1.1\n{FORM}\nContent-Length: {len(form(('name', b'?')))}", form(("name", b"\xff"))),
         *MULTIPART, "name", ("'name' is not UTF-8",)),
    Case("the base model's name", upload(name=BASE), 409, "name_reserved", "name", (f"'{BASE}'",)),
    Case("a name that is taken", upload(name="known"), 409, "adapter_exists", "name", ("'known'",)),
    Case("a path in the address",
         raw(f"PUT {ADAPTERS}/..%2f..%2fx HTTP/1.1\n{FORM}\nContent-Length: {len(GOOD)}", GOOD),
         404, "unknown_url", None, ("no such URL",)),
    Case("dots in the address",
         raw(f"PUT {ADAPTERS}/%2e%2e HTTP/1.1\n{FORM}\nContent-Length: {len(GOOD)}", GOOD),
         400, "invalid_name", "name", ('".."',)),
    Case("a null byte in the address",
         raw(f"PUT {ADAPTERS}/a%00b HTTP/1.1\n{FORM}\nContent-Length: {len(GOOD)}", GOOD),
         400, "invalid_name", "name", (r"a\u0000b",)),
    Case("another name in the form than in the address",
         raw(f"PUT {ADAPTERS}/other HTTP/1.1\n{FORM}\nContent-Length: {len(GOOD)}", GOOD),
         400, "invalid_name", "name", ("refused", "other")),
    Case("a file outside of the adapter", call("GET", f"{ADAPTERS}/known/versions/1/files/..%2f..%2fcatalogue.sqlite3"),
         404, "unknown_url", None, ("no such URL",)),
    Case("a file of that name", call("GET", f"{ADAPTERS}/known/versions/1/files/%2e%2e"),
         404, "file_not_found", None, ("'known'", '".."')),
    Case("an alias that is a number", call("PUT", f"{ADAPTERS}/known/aliases/3x", json={"version": 1}),
         400, "invalid_alias", "alias", ('"3x"', "beginning with a letter")),
    Case("an alias of 97 characters", call("PUT", f"{ADAPTERS}/known/aliases/{'x' * 97}", json={"version": 1}),
         400, "invalid_alias", "alias", ("x" * 97,)),
    Case("an alias of a version that is not there", call("PUT", f"{ADAPTERS}/known/aliases/next", json={"version": 99}),
         404, "version_not_found", None, ("'known'", "99")),
    Case("two files of one name",
         upload(filename="../a.safetensors", more=[
             ("weights", ("b/a.safetensors", weights())), ("index", ("i.json", b"{}"))]),
         *MULTIPART, "weights", ("weights", "a.safetensors")),
    Case("two files and no index", upload(more=[("weights", ("../../b.safetensors", weights()))]),
         *REFUSED, ("2 weights files but no index",)),
    Case("an index that is not JSON", upload(more=[("index", ("i.json", b"{"))]), *REFUSED, ("index: not valid JSON",)),
    Case("an index that names a path", upload(more=[("index", ("i.json", b'{"weight_map": {"a": "../../x"}}'))]),
         *REFUSED, ("'../../x'", "was not uploaded")),
    Case("labels that are a list",
         call("POST", ADAPTERS, data={"name": "refused", "labels": "[1]"}, files=[
             ("config", ("c", b"{}")), ("weights", ("w", b"x"))]),
         400, "invalid_labels", "labels", ("labels", "[1]")),
    Case("labels nested deeply", call("PATCH", f"{ADAPTERS}/known", json={"labels": {"a": [[[[1]]]]}}),
         400, "invalid_labels", "labels", ("labels", "[[[[1]]]]")),
    Case("a default version that is not there", call("PATCH", f"{ADAPTERS}/known", json={"default_version": 99}),
         404, "version_not_found", None, ("99",)),
    Case("a description that is a number", call("PATCH", f"{ADAPTERS}/known", json={"description": 5}),
         400, None, "description", ("'description'", "5")),
    Case("an unknown field of an adapter", call("PATCH", f"{ADAPTERS}/known", json={"colour": "red"}),
         400, "unknown_field", "colour", ("'colour'", '"red"')),
    Case("a limit of 10^9", call("GET", f"{ADAPTERS}?limit=1000000000"), 400, None, "limit", ("'limit'", "1000000000")),
    Case("a cursor that is none", call("GET", f"{ADAPTERS}/known/versions?after=x"),
         400, "invalid_cursor", "after", ('"x"',)),
]  # fmt: skip


def bad_merge(name: str, change: dict[str, Any], status: int, code: str | None, param: str | None, *said: str) -> Case:
    """A merge that is sound but for one field."""
    body = {"name": "refused", "sources": [{"adapter": "known", "weight": 1.0}], **change}
    return Case(name, post_json(MERGES, body), status, code, param, said)


def known(**source: Any) -> dict[str, Any]:
    return {"sources": [{"adapter": "known", **source}]}


MERGES_CASES = [
    bad_merge("a merge of nothing", {"sources": []}, 400, None, "sources", "'sources'"),
    bad_merge("a merge of 100,000 adapters", {"sources": [{"adapter": "known"}] * 20_000}, 400, None, "sources", "64"),
    bad_merge("a merge of text", {"sources": "known"}, 400, None, "sources", "'sources'", '"known"'),
    bad_merge("a merge with a weight that is text", known(weight="x"), 400, None, "sources[0].weight", '"x"'),
    bad_merge("a merge with a weight of 1e300", known(weight=1e300), 400, None, "sources[0].weight", "1000"),
    Case("a merge with a weight that is no number",
         post_json(MERGES, b'{"name": "refused", "sources": [{"adapter": "known", "weight": NaN}]}'),
         400, None, "sources[0].weight", ("finite",)),
    bad_merge("a merge of an unknown adapter", {"sources": [{"adapter": "../known"}]},
              404, "adapter_not_found", None, "../known"),
    bad_merge("a merge of an unknown version", {"sources": [{"adapter": "known@99"}]},
              404, "version_not_found", None, "99"),
    bad_merge("a merge into a path", {"name": "../../etc"}, 400, "invalid_name", "name", "../../etc"),
    bad_merge("a merge into the base model's name", {"name": BASE}, 409, "name_reserved", "name", BASE),
    bad_merge("a merge by an unknown method", {"method": "rm -rf"}, 400, None, "method", "rm -rf"),
    bad_merge("a merge with an unknown field", {"out": "/etc"}, 400, "unknown_field", "out", "/etc"),
    bad_merge("a merge of density 2", {"method": "ties", "density": 2}, 400, None, "density", "2"),
    bad_merge("a merge that lacks its density", {"method": "ties"}, 422, "merge_refused", None, "density"),
    bad_merge("a merge with what its method does not read", {"seed": 1, "density": 0.5}, 422, "merge_refused", None,
              "seed", "density"),
    bad_merge("a merge of rank 10^9", {"method": "svd", "svd_rank": 10**9}, 422, "merge_refused", None, "svd_rank"),
    bad_merge("a checkpoint in shards of a byte", {"into": "checkpoint", "max_shard_bytes": 1}, 400, None,
              "max_shard_bytes", "1"),
    Case("a merge with a key of 300 characters",
         call("POST", MERGES, json={"name": "refused", **known()}, headers={"idempotency-key": "k" * 300}),
         400, "invalid_idempotency_key", "Idempotency-Key", ("255",)),
    Case("a merge that is no object", post_json(MERGES, b"[1]"), 400, None, "body", ()),
    Case("a merge nested deeply", post_json(MERGES, DEEP), 400, "invalid_json", None, ("nested too deeply",)),
    Case("an unknown merge", call("GET", f"{MERGES}/{chr(120) * 500}"), 404, "merge_not_found", None, ()),
    Case("a merge's file outside", call("GET", f"{MERGES}/merge-0/files/%2e%2e"), 404, "merge_not_found", None, ()),
    Case("merges after one that is not there", call("GET", f"{MERGES}?after=x"), 404, "merge_not_found", None, ("x",)),
]  # fmt: skip

BODIES = [
    Case("no config", call("POST", ADAPTERS, data={"name": "refused"}, files=[("weights", ("w", weights()))]),
         400, "missing_field", "config", ("config",)),
    Case("no weights", call("POST", ADAPTERS, data={"name": "refused"}, files=[("config", ("c", b"{}"))]),
         400, "missing_field", "weights", ("weights",)),
    Case("no name", upload(name=None), 400, "missing_field", "name", ("name",)),
    Case("no parts", raw(f"POST {ADAPTERS} HTTP/1.1\n{FORM}\nContent-Length: 8", b"--xx--\r\n"),
         400, "missing_field", "name", ("name, config, weights",)),
    Case("an unknown part", upload(more=[("surprise", ("s", b"x"))]), *MULTIPART, "surprise", ("'surprise'",)),
    Case("a part twice", upload(more=[("config", ("c", b"{}"))]), *MULTIPART, "config", ("'config'", "twice")),
    Case("an upload that is text", call("POST", ADAPTERS, content=b"x", headers={"content-type": "text/plain"}),
         415, "unsupported_media_type", "Content-Type", ("text/plain", "multipart/form-data")),
    Case("an upload of no type", raw(f"POST {ADAPTERS} HTTP/1.1\nContent-Length: 1", b"x"),
         415, "unsupported_media_type", "Content-Type", ("multipart/form-data",)),
    Case("an upload without boundary",
         raw(f"POST {ADAPTERS} HTTP/1.1\nContent-Type: multipart/form-data\nContent-Length: 1", b"x"),
         *MULTIPART, "Content-Type", ("boundary",)),
    Case("a compressed upload",
         raw(f"POST {ADAPTERS} HTTP/1.1\n{FORM}\nContent-Encoding: gzip\nContent-Length: 1", b"x"),
         415, "unsupported_media_type", "Content-Encoding", ("gzip",)),
    Case("a source that is not enabled", post_json(ADAPTERS, {"name": "x", "source": "hf:a/b"}),
         403, "sources_disabled", None, ("multipart/form-data",)),
    Case("a form that is cut off",
         raw(f"POST {ADAPTERS} HTTP/1.1\n{FORM}\nContent-Length: {len(GOOD) - 9}", GOOD[:-9]),
         *MULTIPART, None, ("cut off",)),
    Case("an upload cut in the middle",
         cut(f"POST {ADAPTERS} HTTP/1.1\n{FORM}\nContent-Length: {len(GOOD)}", GOOD[:-300]), 0, None, None, ()),
    Case("an upload in chunks, cut in the middle",
         cut(f"POST {ADAPTERS} HTTP/1.1\n{FORM}\nTransfer-Encoding: chunked", b"400\r\n" + GOOD[:500]),
         0, None, None, ()),
    Case("a request cut in the middle",
         cut(f"POST {COMPLETIONS} HTTP/1.1\n{JSON}\nContent-Length: 1000", b'{"model": "'), 0, None, None, ()),
    Case("headers cut in the middle", raw(f"POST {COMPLETIONS} HTT"), 400, "invalid_http", None,
         ("Invalid HTTP request",)),
    Case("an upload of 10 GB announced",
         raw(f"POST {ADAPTERS} HTTP/1.1\n{FORM}\nContent-Length: 10000000000", GOOD[:100]),
         413, "upload_too_large", None, ("10000000000", str(MAX_UPLOAD))),
    Case("an upload that grows beyond the limit", upload(model=bytes(MAX_UPLOAD)), 413, "upload_too_large", None,
         (str(MAX_UPLOAD),)),
    Case("10 GB announced as JSON", raw(f"POST {COMPLETIONS} HTTP/1.1\n{JSON}\nContent-Length: 10000000000", b"{"),
         413, "body_too_large", None, ("10000000000", str(MAX_BODY))),
    Case("10^30 bytes announced", raw(f"POST {COMPLETIONS} HTTP/1.1\n{JSON}\nContent-Length: 1{'0' * 30}", b"{"),
         400, "invalid_http", None, ("Invalid HTTP request",)),
    Case("a negative length", raw(f"POST {COMPLETIONS} HTTP/1.1\n{JSON}\nContent-Length: -1"),
         400, "invalid_http", None, ("Invalid HTTP request",)),
    Case("two lengths", raw(f"POST {COMPLETIONS} HTTP/1.1\n{JSON}\nContent-Length: 2\nContent-Length: 3", b"{}"),
         400, "invalid_http", None, ("Invalid HTTP request",)),
    Case("a chunk of no size", raw(f"POST {COMPLETIONS} HTTP/1.1\n{JSON}\nTransfer-Encoding: chunked", b"zz\r\n"),
         400, "invalid_http", None, ("Invalid HTTP request",)),
    Case("huge JSON", post_json(COMPLETIONS, {"model": BASE, "prompt": "x" * MAX_BODY}),
         413, "body_too_large", None, (str(MAX_BODY),)),
    Case("huge JSON in chunks",
         raw(f"POST {COMPLETIONS} HTTP/1.1\n{JSON}\nTransfer-Encoding: chunked", b"200000\r\n" + b" " * (2 << 20)),
         413, "body_too_large", None, (str(MAX_BODY),)),
    Case("a huge form where JSON is expected",
         call("POST", COMPLETIONS, data={"a": "x"}, files=[("f", ("f", bytes(2 << 20)))]),
         413, "body_too_large", None, (str(MAX_BODY),)),
    Case("bad JSON", post_json(COMPLETIONS, b'{"model": '), 400, "invalid_json", None, ("not valid JSON",)),
    Case("no body", post_json(COMPLETIONS, b""), 400, None, "body", ("'body' is required",)),
    Case("deep JSON", post_json(COMPLETIONS, DEEP), 400, "invalid_json", None, ("nested too deeply",)),
    Case("JSON just shallow enough to be read", post_json(COMPLETIONS, DEEP_BUT_PARSED), 400, None, "model",
         ("'model'", "should be a valid string")),
    Case("deep JSON for an adapter",
         call("PATCH", f"{ADAPTERS}/known", content=DEEP, headers={"content-type": "application/json"}),
         400, "invalid_json", None, ("nested too deeply",)),
    Case("deep JSON as a source", post_json(ADAPTERS, DEEP[:60_000]), 400, "invalid_json", None, ("JSON",)),
    Case("JSON that is not UTF-8", post_json(COMPLETIONS, b'{"model": "\xff\xfe"}'), 400, "invalid_json", None,
         ("byte 11", "UTF-8")),
    Case("a number of 5000 digits", post_json(COMPLETIONS, b'{"seed": ' + b"9" * 5000 + b"}"),
         400, "invalid_json", None, ("too many digits",)),
    Case("JSON that is a list", post_json(COMPLETIONS, [1]), 400, None, "body", ("[1]",)),
    Case("JSON as text", call("POST", COMPLETIONS, content=b"{}", headers={"content-type": "text/plain"}),
         400, "invalid_json", None, ("Content-Type: application/json",)),
    Case("50 000 unknown fields", post_json(COMPLETIONS, {str(i): 0 for i in range(50_000)}), 400, None, "body",
         ("at most 100 fields", "50000")),
    Case("100 000 wrong elements", post_json("/detokenize", {"tokens": ["x"] * 100_000}), 400, None, "tokens[0]",
         ("tokens[0]", '"x"')),
    Case("an unknown address", call("GET", "/v2/nothing"), 404, "unknown_url", None, ("/docs",)),
    Case("a method that is not taken", call("DELETE", COMPLETIONS), 405, "method_not_allowed", None, ("method",)),
]  # fmt: skip

INFERENCE = [
    bad_request("max_tokens 10^9", "max_tokens", 10**9, "1000000001 tokens", "512",
                param="prompt", code="context_length_exceeded"),
    bad_request("max_tokens 10^30", "max_tokens", 10**30, "512", param="prompt", code="context_length_exceeded"),
    bad_request("max_tokens -1", "max_tokens", -1, "'max_tokens'", "-1"),
    bad_request("max_tokens as text", "max_tokens", "many", "'max_tokens'", '"many"'),
    bad_request("max_tokens 2.5", "max_tokens", 2.5, "'max_tokens'", "2.5"),
    bad_request("max_completion_tokens 10^9", "max_completion_tokens", 10**9, "max_completion_tokens",
                path=CHAT, param="max_tokens"),
    bad_request("min_tokens above max_tokens", "min_tokens", 5, "'min_tokens'", "5", "4"),
    bad_request("n 10^9", "n", 10**9, "'n'", "128", "1000000000"),
    bad_request("n 0", "n", 0, "'n'", "0"),
    bad_request("100 000 stop strings", "stop", ["x"] * 100_000, "'stop'", "100000", "16"),
    bad_request("a stop string of 100 000 characters", "stop", "x" * 100_000, "'stop'", "1024"),
    bad_request("an empty stop string", "stop", [""], "'stop'", "empty"),
    bad_request("stop strings that are numbers", "stop", [1], "'stop'", "1"),
    bad_request("a token id outside the vocabulary", "prompt", [5, VOCABULARY], str(VOCABULARY), "position 1",
                code="invalid_token_id"),
    bad_request("a negative token id", "prompt", [-1], "-1", "position 0", code="invalid_token_id"),
    bad_request("a token id of 2^64", "prompt", [[2**64]], str(2**64), code="invalid_token_id"),
    bad_request("stop_token_ids outside the vocabulary", "stop_token_ids", [VOCABULARY], str(VOCABULARY)),
    bad_request("100 000 stop_token_ids", "stop_token_ids", [1] * 100_000, "'stop_token_ids'", "64"),
    bad_request("logit_bias outside the vocabulary", "logit_bias", {str(VOCABULARY): 1}, str(VOCABULARY)),
    bad_request("logit_bias of 5000 ids", "logit_bias", dict.fromkeys(range(5000), 1), "1024", "5000"),
    bad_request("a prompt over the limit", "prompt", [5] * 600, "604", "512", code="context_length_exceeded"),
    bad_request("a text over the limit", "prompt", "word " * 2000, "512", code="context_length_exceeded"),
    bad_request("a text too long to be tokenised", "prompt", "word " * 100_000, "500000 characters", "512 tokens",
                code="context_length_exceeded"),
    bad_request("a conversation too long to be tokenised", "messages", [{"role": "user", "content": "x" * 500_000}],
                "500148 characters", path=CHAT, code="context_length_exceeded"),
    Case("a text to tokenise that no prompt can be", post_json("/tokenize", {"prompt": "x" * 500_000}),
         400, "context_length_exceeded", "prompt", ("500000 characters",)),
    bad_request("a conversation over the limit", "messages", [{"role": "user", "content": "word " * 2000}], "512",
                path=CHAT, code="context_length_exceeded"),
    bad_request("1000 prompts", "prompt", ["x"] * 2000, "2000", code="too_large"),
    bad_request("an empty prompt", "prompt", [], "'prompt'", "empty"),
    bad_request("an empty list of ids", "prompt", [[]], "'prompt'", "no tokens", code="empty_prompt"),
    bad_request("a prompt of mixed types", "prompt", ["x", 1], "'prompt'"),
    bad_request("an unknown adapter", "model", "nobody", "'nobody'", status=404, code="model_not_found"),
    bad_request("an unknown alias", "model", "known@nowhere", "'known@nowhere'", status=404, code="model_not_found"),
    bad_request("an unknown version", "model", "known@999", "'known@999'", status=404, code="model_not_found"),
    bad_request("a version of 10^30", "model", f"known@1{'0' * 30}", "known@1", status=404, code="model_not_found"),
    bad_request("a model that is a path", "model", "../../etc/passwd", "passwd", status=404, code="model_not_found"),
    bad_request("a model with control characters", "model", "a\0\n", r"a\x00\n", status=404, code="model_not_found"),
    bad_request("a model of 10 000 characters", "model", "x" * 10_000, "'model'", "256"),
    bad_request("an unknown adapter in a mix", "adapters", [{"name": "known"}, {"name": "nobody"}], "'nobody'",
                status=404, param="adapters[1].name", code="model_not_found"),
    *[
        bad_request(f"a weight of {weight}", "adapters", [{"name": "known", "weight": weight}], shown(weight), said,
                    param="adapters[0].weight")
        for weight, said in (
            (float("nan"), "finite"), (float("inf"), "finite"), (float("-inf"), "finite"), (1e300, "1000")
        )
    ],
    bad_request("a weight that is text", "adapters", [{"name": "known", "weight": "heavy"}], '"heavy"',
                param="adapters[0].weight"),
    bad_request("nine adapters", "adapters", [{"name": "known"}] * 9, "8"),
    Case("a mix on an adapter",
         post_json(COMPLETIONS, {"model": "known", "prompt": "x", "adapters": [{"name": "known"}]}),
         400, None, "adapters", ("'known'",)),
    bad_request("an unknown field of a request", "temprature", 1, "'temprature'", "1", code="unknown_field"),
    bad_request("an unknown field of a message", "messages", [{"role": "user", "content": "x", "mood": 1}], "mood",
                path=CHAT, param="messages[0].mood", code="unknown_field"),
    bad_request("an unknown role", "messages", [{"role": "robot", "content": "x"}], "robot",
                path=CHAT, param="messages[0].role"),
    bad_request("an image", "messages", [{"role": "user", "content": [{"type": "image_url"}]}], "image_url",
                path=CHAT, param="messages[0].content"),
    bad_request("a temperature of NaN", "temperature", float("nan"), "'temperature'", "finite"),
    bad_request("a temperature of 9", "temperature", 9, "'temperature'", "9"),
    bad_request("a seed of 2^64", "seed", 2**64, "'seed'", str(2**64)),
    bad_request("a lone surrogate", "prompt", "\ud800", "'prompt'", "surrogates"),
    bad_request("stream that is text", "stream", "perhaps", "'stream'", '"perhaps"'),
    Case("token ids to decode outside the vocabulary", post_json("/detokenize", {"tokens": [VOCABULARY]}),
         400, "invalid_token_id", "tokens", (str(VOCABULARY),)),
    Case("nothing to tokenise", post_json("/tokenize", {}), 400, None, "prompt", ("'prompt'",)),
]  # fmt: skip

CASES = [*FILES, *CONFIGS, *NAMES, *BODIES, *MERGES_CASES, *INFERENCE]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_refused(hostile_server: InferenceServer, before: dict[str, Any], case: Case) -> None:
    case.check(hostile_server)


def test_after_the_whole_table(hostile_server: InferenceServer, before: dict[str, Any]) -> None:
    """Also alone, when it is a test of a server that was sent nothing bad."""
    server = hostile_server
    # The last of the requests whose client left may still be on its way out.
    until = time.monotonic() + 60
    while (now := state(server)) != before and time.monotonic() < until:
        time.sleep(0.05)
    assert now == before
    body = {"model": "known@prod", "prompt": "The sea", "max_tokens": 4, "temperature": 0}
    digest = before["versions"][0]["spec"]["sha256"]
    text = server.http.post(COMPLETIONS, json=body).json()["choices"][0]["text"]
    assert text == server.expected_text("The sea", 4, {digest: 1.0})
    server.wait_until_idle()
    checks = server.metrics()["loraplex_engine_integrity_checks_total"]
    server.http.post(COMPLETIONS, json=body)
    server.wait_for_engine("integrity_checks_total", checks + 1)
    assert server.engine is not None
    assert server.engine.poll() is None
    assert not [line for line in server.log_path.read_text().splitlines() if '"level": "error"' in line]

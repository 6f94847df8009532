"""The README is executed: every command block, in order, against a service with the real engine and the real model.
So are the programs in examples/."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable

import pytest

from tests.docs.conftest import ADDRESS
from tests.service.launch import ROOT, Launched

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(bash|python)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)

pytestmark = [pytest.mark.xdist_group("docs"), pytest.mark.timeout(900)]


def block_with(part: str) -> str:
    return next(block for _, block in BLOCKS if part in block)


def content(answer: str) -> str:
    return str(json.loads(answer)["choices"][0]["message"]["content"])


def shown(name: str) -> str:
    """What the README says that `name` answers."""
    text = README.replace("\n> ", "\n")
    return next(line for line in text.splitlines() if line.startswith(f"{name}: ")).removeprefix(f"{name}: ").strip("`")


def test_every_make_target_exists() -> None:
    targets = set(re.findall(r"\bmake (\w+)", README))
    assert {"serve", "test", "lint", "format", "bench"} <= targets
    for target in targets:
        done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_every_request_works_in_the_order_written(execute: Callable[[str, str], str]) -> None:
    run = [(language, block) for language, block in BLOCKS if not block.startswith("make ")]
    assert len(run) >= 12
    for language, block in run:
        assert execute(language, block).strip(), block


def test_the_examples_answer_as_shown(execute: Callable[[str, str], str]) -> None:
    base = content(execute("bash", block_with('"model": "SmolLM2-135M-Instruct", "temperature": 0')))
    assert base.startswith(shown("base").removesuffix(" ..."))
    assert content(execute("bash", block_with('"model": "pirate", "temperature": 0, "max_tokens": 48'))) == shown(
        "pirate"
    )
    for name in ("json-extract", "headline"):
        request = next(
            part for part in block_with('"model": "json-extract"').split("curl -s")[1:] if f'"{name}"' in part
        )
        assert content(execute("bash", f"curl -s {request}")) == shown(name)


@pytest.mark.parametrize(
    ("program", "model"),
    [
        ("curl.sh", "pirate"),
        ("openai_client.py", "pirate"),
        ("httpx_client.py", "json-extract"),
        ("loraplex_client.py", "json-extract"),
    ],
)
def test_the_example_programs_run(service: Launched, program: str, model: str) -> None:
    interpreter = "bash" if program.endswith(".sh") else sys.executable
    command = [interpreter, str(ROOT / "examples" / program), service.url]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    answer = shown(model)
    assert answer in done.stdout or json.dumps(answer) in done.stdout
    # What they uploaded they have deleted again.
    names = {adapter["name"] for adapter in service.http.get("/v1/adapters").json()["data"]}
    assert not {name for name in names if name.endswith("-demo")}


def test_every_example_program_is_run_and_named() -> None:
    programs = {path.name for path in (ROOT / "examples").iterdir() if path.is_file()}
    run = {"curl.sh", "httpx_client.py", "loraplex_client.py", "openai_client.py"}
    assert programs - {"example_data.py", "train_adapters.py"} == run
    assert all(f"(examples/{name})" in README for name in run)


def test_every_route_is_in_the_readme(service: Launched) -> None:
    """A route that the reference lists has a command here."""
    commands = "\n".join(block for _, block in BLOCKS)
    called = re.sub(r"(/v1/adapters/)news", r"\1{name}", commands)
    called = called.replace("/versions/1/files/adapter_config.json", "/versions/{version}/files/{filename}")
    called = re.sub(r"/versions/\d", "/versions/{version}", called).replace("/aliases/next", "/aliases/{alias}")
    called = called.replace("/$merge/files/config.json", "/{merge}/files/{filename}").replace("/$merge", "/{merge}")
    called = called.replace("/v1/models/pirate", "/v1/models/{model}")
    for path in service.http.get("/openapi.json").json()["paths"]:
        pattern = re.escape(re.sub(r"\{model\w*(:path)?\}", "{model}", path))
        assert re.search(rf"{ADDRESS}{pattern}(?=[\s'?\"]|$)", called), path

"""What the Dockerfile promises: every setting exists, no compiler is left, nobody is root, locks fit pyproject.toml."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from service import __version__
from service.default_model import PACKAGE
from service.examples import FOLDER
from service.settings import Settings
from tests.deploy.files import DEPLOY, ROOT, dockerfile, parents, stages
from tests.ports import unused_port
from tests.real_parts import missing
from tests.service.launch import SIMULATED, Launched, wait_for

IMAGES = ("cpu", "cuda")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CLIENT_VARIABLES = {"LORAPLEX_URL", "LORAPLEX_KEY"}


def locked(variant: str) -> dict[str, str]:
    """Version by name of requirements/<variant>.txt."""
    text = (ROOT / "requirements" / f"{variant}.txt").read_text()
    return dict(re.findall(r"^([a-z0-9._-]+)==(\S+) \\$", text, flags=re.MULTILINE))


def test_every_setting_that_the_deployment_names_exists() -> None:
    known = {f"LORAPLEX_{name.upper()}" for name in Settings.model_fields} | CLIENT_VARIABLES
    paths = [ROOT / "Dockerfile", ROOT / "docker-compose.yml", *(p for p in DEPLOY.rglob("*") if p.is_file())]
    named = {
        (path.name, name)
        for path in paths
        if path.suffix != ".whl"
        for name in re.findall(r"LORAPLEX_[A-Z_]*[A-Z]", path.read_text())
    }
    assert len(named) > 10
    assert sorted((file, name) for file, name in named if name not in known) == []


@pytest.mark.parametrize("image", IMAGES)
def test_an_image_runs_as_somebody_else_and_says_how_it_is(image: str) -> None:
    instructions = [each for stage in reversed(parents(image)) for each in stages()[stage]]
    last = dict(instructions)
    assert last["USER"] == "loraplex"
    assert json.loads(last["ENTRYPOINT"])[:2] == ["tini", "--"]
    assert json.loads(last["CMD"])[0] == "serve"
    assert last["STOPSIGNAL"] == "SIGTERM"
    assert last["HEALTHCHECK"].endswith('CMD ["loraplex-healthcheck"]')
    runtime = [rest for stage in parents(image) for word, rest in stages()[stage] if word == "RUN"]
    assert not re.search(r"\b(gcc|g\+\+|build-essential|python3-dev|make|cmake)\b", " ".join(runtime))


def test_all_copies_come_from_the_context_or_a_stage() -> None:
    copied = [re.search(r"--from=(\S+)", rest) for word, rest in dockerfile() if word == "COPY"]
    assert {found[1] for found in copied if found} <= set(stages())
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    for needed in ("adapters", "service", "requirements", "pyproject.toml", "README.md", "deploy/docker"):
        assert f"!{needed}" in ignored
        assert (ROOT / needed).exists()
    assert f"!{FOLDER.relative_to(ROOT)}" in ignored
    assert not {"!data", "!.env", "!.git"} & set(ignored)


def test_the_model_that_is_baked_in_is_the_one_that_the_service_asks_for() -> None:
    assert PACKAGE in " ".join(rest for _, rest in stages()["model"])


def test_the_image_carries_the_projects_version() -> None:
    assert ("ARG", f"VERSION={__version__}") in stages()["runtime"]


@pytest.mark.parametrize("image", IMAGES)
def test_the_lock_satisfies_pyproject(image: str) -> None:
    """A dependency that was added or raised without `make lock` fails here."""
    versions = locked(image)
    extras = PROJECT["optional-dependencies"]
    wanted = [*PROJECT["dependencies"], *extras["server"], *extras["traces"]]
    for requirement in map(Requirement, wanted):
        if requirement.marker and not requirement.marker.evaluate({"python_version": "3.11"}):
            continue
        name = canonicalize_name(requirement.name)
        assert name in versions, f"{name} is not in requirements/{image}.txt: make lock"
        assert requirement.specifier.contains(versions[name], prereleases=True), f"{name} {versions[name]}"
    text = (ROOT / "requirements" / f"{image}.txt").read_text()
    pinned = re.split(r"^(?=[a-z])", text, flags=re.MULTILINE)[1:]
    assert len(pinned) == len(versions)
    assert [each.split()[0] for each in pinned if "--hash=sha256:" not in each] == []


def test_both_images_run_the_same_versions() -> None:
    cpu, cuda = locked("cpu"), locked("cuda")
    assert cpu["torch"] == cuda["torch"] + "+cpu"
    assert {name: version for name, version in cpu.items() if name != "torch"}.items() <= cuda.items()
    assert not [name for name in cpu if name.startswith(("nvidia-", "triton"))]


def test_the_check_without_docker_fits_the_dockerfile() -> None:
    """deploy/docker/check_image.sh itself takes minutes, root and a network: here only what it needs of other files."""
    script = DEPLOY / "docker" / "check_image.sh"
    assert subprocess.run(["bash", "-n", script], check=False).returncode == 0
    text = script.read_text()
    takes = re.findall(r"sed -n '(s/[^']*)' (Dockerfile|requirements/cpu\.txt)", text)
    assert len(takes) == 3
    for expression, file in takes:
        done = subprocess.run(["sed", "-n", expression, ROOT / file], capture_output=True, text=True, check=True)
        assert done.stdout.strip(), expression
    arguments = set(re.findall(r"--build-arg \"?(\w+)=", text))
    assert arguments <= {rest.partition("=")[0] for word, rest in dockerfile() if word == "ARG"}
    assert f"--target {IMAGES[0]}" in text


def test_the_health_check_asks_the_service(tmp_path: Path, base_model_dir: Path) -> None:
    script = DEPLOY / "docker" / "healthcheck.py"
    (tmp_path / "data").mkdir()
    port = unused_port()

    def ask(host: str) -> int:
        env = {"LORAPLEX_PORT": str(port), "LORAPLEX_HOST": host, "http_proxy": "http://127.0.0.1:9"}
        return subprocess.run([sys.executable, script], env=env, capture_output=True, check=False).returncode

    assert ask("0.0.0.0") == 1
    with Launched(tmp_path / "data", port, "--simulated", SIMULATED, "--model", str(base_model_dir)) as service:
        wait_for(service.ready, 180)
        assert ask("0.0.0.0") == 0
        assert ask("") == 0


def test_tritons_module_is_found_where_no_compiler_is(tmp_path: Path) -> None:
    """triton-cc hands out what it prepared for exactly that source, and says what is missing for any other."""
    if shutil.which("gcc") is None:
        missing("gcc, which the build stage has,")
    stand_in = DEPLOY / "docker" / "triton_cc.py"
    home = tmp_path / "venv"
    (home / "bin").mkdir(parents=True)
    (home / "lib" / "triton" / "backends" / "nvidia" / "include").mkdir(parents=True)
    (home / "lib" / "triton" / "__init__.py").write_text("")
    driver = home / "lib" / "triton" / "backends" / "nvidia" / "driver.c"
    driver.write_text("#include <stddef.h>\nint cuInit(unsigned);\nint answer(void) { return 42 + cuInit(0); }\n")
    code = (
        "import sys, runpy; sys.prefix = sys.argv[1]; sys.path.insert(0, sys.argv[1] + '/lib');"
        "sys.argv = sys.argv[2:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    )

    def call(*arguments: object, path: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", code, str(home), str(stand_in), *map(str, arguments)]
        return subprocess.run(command, env={"PATH": path}, capture_output=True, text=True, check=False)

    compilers = str(Path(shutil.which("gcc") or "").parent)
    done = call("--prepare", path=f"{compilers}:/usr/bin:/bin")
    assert done.returncode == 0, done.stderr
    copy = tmp_path / "main.c"  # Triton writes the source into a folder of its own
    copy.write_bytes(driver.read_bytes())
    target = tmp_path / "cuda_utils.so"
    flags = ["-O3", "-shared", "-fPIC", "-o", target, "-L/nowhere", "-l:libcuda.so.1", "-I/nowhere"]
    done = call(copy, *flags, path="/nowhere")
    assert done.returncode == 0, done.stderr
    # An ELF file that refers to the driver by the name that it has on every machine.
    assert target.read_bytes()[:4] == b"\x7fELF"
    assert b"libcuda.so.1" in target.read_bytes()
    copy.write_text("int other;")
    refused = call(copy, *flags, path="/nowhere")
    assert refused.returncode == 1
    assert "has no compiler" in refused.stderr

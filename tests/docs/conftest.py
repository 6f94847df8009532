"""One service with the real engine and the real model, and a folder that looks like a clone beside it: what a reader of
the documentation has in front of them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.ports import unused_port
from tests.service.launch import ROOT, Launched

ADMIN_KEY = "an-admin-key-for-the-documentation"
ADDRESS = "127.0.0.1:8000"
# An HTTP error has to fail the block; curl -s alone would print it and succeed.
STRICT = 'set -euo pipefail\ncurl() { command curl --fail-with-body --max-time 240 "$@"; }\n'


@pytest.fixture(scope="package")
def service(tmp_path_factory: pytest.TempPathFactory, base_model_dir: Path) -> Iterator[Launched]:
    """`make serve`, but for the port, the data folder, the number of threads, and merges that do not wait until the
    rest of the suite leaves them a processor (service/pace.py)."""
    data_dir = tmp_path_factory.mktemp("data")
    (data_dir / "models").symlink_to(base_model_dir.parent)
    flags = "--examples", "--threads", "1", "--merge-priority", "normal"
    with Launched(data_dir, unused_port(), *flags) as launched:
        launched.wait_announced()
        yield launched


@pytest.fixture(scope="package")
def service_with_tenants(tmp_path_factory: pytest.TempPathFactory, base_model_dir: Path) -> Iterator[Launched]:
    """The same with an admin key, and without the examples."""
    data_dir = tmp_path_factory.mktemp("data")
    (data_dir / "models").symlink_to(base_model_dir.parent)
    with Launched(data_dir, unused_port(), "--threads", "1", LORAPLEX_ADMIN_KEY=ADMIN_KEY) as launched:
        launched.wait_announced()
        yield launched


Execute = Callable[[str, str], str]


@pytest.fixture(scope="package")
def execute(service: Launched, tmp_path_factory: pytest.TempPathFactory) -> Execute:
    """Runs a block of a language (bash, python) as a reader in a clone would; its output. Fails if the block does."""
    return _executor(service, tmp_path_factory.mktemp("clone"))


@pytest.fixture(scope="package")
def execute_with_tenants(service_with_tenants: Launched, tmp_path_factory: pytest.TempPathFactory) -> Execute:
    """The same where the server has tenants."""
    return _executor(service_with_tenants, tmp_path_factory.mktemp("clone"), LORAPLEX_ADMIN_KEY=ADMIN_KEY)


def make_clone(folder: Path, data_dir: Path) -> Path:
    """The project's folder, with a service's data in ./data; what a block writes into it stays out of the project."""
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in sorted({line.partition("/")[0] for line in tracked.splitlines()}):
        (folder / name).symlink_to(ROOT / name)
    (folder / ".venv").symlink_to(sys.prefix)
    (folder / "data").symlink_to(data_dir)
    return folder


def _executor(service: Launched, folder: Path, **variables: str) -> Execute:
    clone = make_clone(folder, service.data_dir)
    address = service.url.removeprefix("http://")
    environment = {
        **os.environ,
        "LORAPLEX_URL": service.url,
        "PATH": f"{sys.prefix}/bin:{os.environ['PATH']}",
        "NO_COLOR": "1",
        **variables,
    }

    def run(language: str, block: str) -> str:
        text = block.replace(ADDRESS, address)
        command = ["bash", "-c", STRICT + text] if language == "bash" else [sys.executable, "-c", text]
        done = subprocess.run(command, cwd=clone, capture_output=True, text=True, check=False, env=environment)
        assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    return run

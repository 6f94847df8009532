"""docs/: the site builds without a warning, and every command block of every page runs, in order.

A fence says what a block is: `bash` and `python` are run here, against a service with the real engine, or for a stopped
or broken service by the tests that ELSEWHERE names. `console` is what does not end or needs another machine: what
starts the service is run here, with a simulated engine; what needs Docker or a hub (ONLY_READ) is checked by the names
of its commands alone. `text`, `json`, `ini` and the like are shown, not run.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from tests.docs.conftest import STRICT, make_clone
from tests.docs.markdown import DOCS, bash_under, blocks, sections
from tests.ports import unused_port
from tests.service.launch import ROOT, SIMULATED, START_S, wait_for

PAGES = sorted(DOCS.glob("*.md"))
CONSOLE = re.compile(
    r"(sudo )?(docker|make serve|([A-Z_]+=\S+ )+make|pip install|git clone|nginx|caddy|pg_dump|psql|openssl|export)\b"
)
"""How the lines of a `console` block may begin."""
ONLY_READ = re.compile(r"\bdocker\b|LORAPLEX_MODEL=")
ELSEWHERE = {
    "operations.md": {
        "Backup of the data folder": "tests/crash/test_disk.py",
        "PostgreSQL and S3": "tests/crash/test_instances.py",
        "Backup and restore": "tests/crash/test_instances.py",
        "A damaged file": "tests/crash/test_disk.py",
        "A damaged catalogue": "tests/crash/test_disk.py",
    }
}
"""Pages whose commands are for a stopped or broken service: each heading with blocks, and the test that runs them."""

pytestmark = [pytest.mark.xdist_group("docs"), pytest.mark.timeout(900)]


def blocks_of(page: Path) -> list[tuple[str, str]]:
    return blocks(page.read_text(encoding="utf-8"))


def test_the_site_builds(tmp_path: Path) -> None:
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    for page in PAGES:
        folder = tmp_path / "site" / ("" if page.stem == "index" else page.stem)
        assert (folder / "index.html").stat().st_size > 5000, page.name
    for page, part in (("configuration", "LORAPLEX_MAX_SEQUENCES"), ("cli", "upload"), ("rest", "/v1/adapters/{name}")):
        assert part in (tmp_path / "site" / page / "index.html").read_text(encoding="utf-8")


def test_every_page_is_in_the_contents() -> None:
    contents = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert [page.name for page in PAGES if not re.search(rf": {page.name}$", contents, re.MULTILINE)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_block_says_what_it_is(page: Path) -> None:
    for language, text in blocks_of(page):
        assert language, f"a block without a language: {text}"
        assert language != "sh", "bash, if it can be run, or console"
        if language == "console":
            lines = [
                line for line in text.replace("\\\n", " ").splitlines() if line and not line.startswith(("#", " "))
            ]
            assert [line for line in lines if not CONSOLE.match(line)] == []


WITH_TENANTS = "multi-tenant.md"


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.name not in {WITH_TENANTS, *ELSEWHERE}], ids=lambda page: page.stem
)
def test_every_command_runs_in_the_order_written(page: Path, execute: Callable[[str, str], str]) -> None:
    for language, text in blocks_of(page):
        if language in ("bash", "python"):
            execute(language, text)


def test_every_command_for_tenants_runs_in_the_order_written(execute_with_tenants: Callable[[str, str], str]) -> None:
    for language, text in blocks_of(DOCS / WITH_TENANTS):
        if language == "bash":
            execute_with_tenants(language, text)


def test_pages_run_elsewhere_are() -> None:
    for page, tests in ELSEWHERE.items():
        assert {heading for heading in sections(page) if bash_under(page, heading)} == set(tests)
        assert sum(len(bash_under(page, heading)) for heading in tests) == len(
            [text for language, text in blocks_of(DOCS / page) if language == "bash"]
        )
        for heading, test in tests.items():
            assert f'bash_under("{page}", "{heading}")' in (ROOT / test).read_text(encoding="utf-8"), heading


STARTS = [
    (page.name, text)
    for page in PAGES
    for language, text in blocks_of(page)
    if language == "console" and not ONLY_READ.search(text)
]


@pytest.mark.parametrize(("page", "text"), STARTS, ids=[page.removesuffix(".md") for page, _ in STARTS])
def test_what_starts_the_service_does(page: str, text: str, base_model_dir: Path, tmp_path: Path) -> None:
    """`make serve` as printed, but for the port and the engine, which is simulated."""
    with tempfile.TemporaryDirectory(prefix="lp-docs-") as data:  # not tmp_path: the path of a socket has to be short
        clone, port = make_clone(tmp_path, Path(data)), unused_port()
        environment = {
            **os.environ,
            "ARGS": f"--simulated '{SIMULATED}' --model {base_model_dir} --port {port} --data-dir {data}",
        }
        # Older than the stamp beside what is installed: make must not install the clone into the tests' environment.
        project = clone / "pyproject.toml"
        project.unlink()
        shutil.copy(ROOT / "pyproject.toml", project)
        os.utime(project, (0, 0))
        log = tmp_path / "output"
        with log.open("w") as output:
            process = subprocess.Popen(
                ["bash", "-c", STRICT + text], cwd=clone, env=environment, start_new_session=True,
                stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
            )  # fmt: skip
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False) as http:

                def ready() -> bool:
                    assert process.poll() is None, log.read_text()
                    with contextlib.suppress(httpx.TransportError):
                        return http.get("/ready").status_code == 200
                    return False

                wait_for(ready, START_S)
                expected = 401 if "LORAPLEX_ADMIN_KEY" in text else 200
                assert http.get("/v1/models").status_code == expected
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGINT)  # Ctrl-C
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                raise
        assert "loraplex has stopped." in log.read_text()
        assert "Installing" not in log.read_text()


def test_the_blocks_that_nothing_runs_are_these() -> None:
    """A new one has to be put here on purpose."""
    unrun = [page.name for page in PAGES for language, text in blocks_of(page) if ONLY_READ.search(text)]
    assert [name for name in unrun if name != "containers.md"] == ["base-models.md", "observability.md"]
    assert {name for name, _ in STARTS} == {"multi-tenant.md", "quickstart.md"}

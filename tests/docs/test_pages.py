"""docs/: the site builds without a warning, and every command block of every page runs, in order.

A fence says what a block is: `bash` and `python` are run here, against a service with the real engine. `console` is
for what cannot be run here (another machine, Docker, a base model from a hub), and is refused unless it is of a kind
listed below. `text`, `json`, `ini` and the like are shown, not run.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.service.launch import ROOT

DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
CONSOLE = re.compile(
    r"(sudo )?(docker|make serve|([A-Z_]+=\S+ )+make|pip install|git clone|nginx|caddy|pg_dump|psql|openssl|export)\b"
)
"""How the lines of a `console` block may begin."""
ELSEWHERE = {"operations.md": "tests/crash/test_disk.py"}
"""Pages whose commands are for a stopped or broken service, and the test that runs them."""

pytestmark = [pytest.mark.xdist_group("docs"), pytest.mark.timeout(900)]


def blocks(page: Path) -> list[tuple[str, str]]:
    return FENCE.findall(page.read_text(encoding="utf-8"))


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
    for language, text in blocks(page):
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
    for language, text in blocks(page):
        if language in ("bash", "python"):
            execute(language, text)


def test_every_command_for_tenants_runs_in_the_order_written(execute_with_tenants: Callable[[str, str], str]) -> None:
    for language, text in blocks(DOCS / WITH_TENANTS):
        if language == "bash":
            execute_with_tenants(language, text)


def test_pages_run_elsewhere_are() -> None:
    for page, test in ELSEWHERE.items():
        assert page in (ROOT / test).read_text(encoding="utf-8")

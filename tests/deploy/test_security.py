"""SECURITY.md names the test behind each claim: those tests exist."""

from __future__ import annotations

import re

from tests.deploy.files import ROOT

TEXT = (ROOT / "SECURITY.md").read_text()


def test_every_test_that_it_names_exists() -> None:
    written = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    defined = set(re.findall(r"^(?:async )?def (test_\w+)", written, flags=re.MULTILINE))
    named = set(re.findall(r"`(test_\w+)`", TEXT))
    files = set(re.findall(r"`(\w+/test_\w+\.py)`", TEXT))
    assert len(named) > 15
    assert len(files) > 15
    assert named - defined == set()
    assert {file for file in files if not (ROOT / "tests" / file).is_file()} == set()


def test_every_claim_names_one() -> None:
    section = TEXT.partition("## What is defended, and how")[2].partition("\n## ")[0]
    claims = [paragraph for paragraph in section.split("\n\n") if paragraph.startswith("**")]
    assert len(claims) >= 9
    assert [claim.splitlines()[0] for claim in claims if "test_" not in claim] == []

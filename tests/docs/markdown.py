"""The blocks of the documentation's pages, for the tests that run them."""

from __future__ import annotations

import re

from tests.service.launch import ROOT

DOCS = ROOT / "docs"
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
HEADING = re.compile(r"^##+ (.*)$", re.MULTILINE)


def blocks(text: str) -> list[tuple[str, str]]:
    """(language, content) of every block, in order."""
    return FENCE.findall(text)


def sections(page: str) -> dict[str, str]:
    """The text under each heading of a page, up to the next heading of any level."""
    # A comment in a block may look like a heading.
    text = (DOCS / page).read_text(encoding="utf-8")
    plain = FENCE.sub(lambda found: re.sub("[^\n]", " ", found[0]), text)
    found = list(HEADING.finditer(plain))
    ends = [each.start() for each in found[1:]] + [len(text)]
    return {each[1]: text[each.end() : end] for each, end in zip(found, ends, strict=True)}


def bash_under(page: str, heading: str) -> list[str]:
    """The bash blocks under a heading. KeyError where there is no such heading."""
    return [content for language, content in blocks(sections(page)[heading]) if language == "bash"]

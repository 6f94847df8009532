"""The deployment's files, read once for all tests of this folder."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())


def dockerfile() -> list[tuple[str, str]]:
    """(instruction, arguments) of the Dockerfile, with continued lines joined and comments dropped."""
    text = re.sub(r"^\s*#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    return [(word.upper(), rest.strip()) for word, _, rest in (line.partition(" ") for line in lines if line.strip())]


def stages() -> dict[str, list[tuple[str, str]]]:
    """The Dockerfile's instructions by stage, FROM first."""
    found: dict[str, list[tuple[str, str]]] = {}
    name = ""
    for instruction, rest in dockerfile():
        if instruction == "FROM":
            name = rest.split(" AS ")[1]
            found[name] = []
        if name:
            found[name].append((instruction, rest))
    return found


def parents(stage: str) -> list[str]:
    """`stage` and the stages that it is built FROM."""
    chain = [stage]
    while (base := stages()[chain[-1]][0][1].split(" AS ")[0]) in stages():
        chain.append(base)
    return chain

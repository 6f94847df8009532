"""The import contracts name every module that they are about, also those that came after them."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
WITH_TORCH = {"service.engine", "service.merge_job"}
"""The processes that have it: the engine, whose torch-free modules the contract names one by one, and a merge."""
CONTRACTS: list[dict[str, Any]] = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"][
    "contracts"
]


def contract(part: str) -> dict[str, Any]:
    """The one with this in its name."""
    (found,) = (each for each in CONTRACTS if part in each["name"])
    return found


def modules_of_service() -> set[str]:
    """Modules and packages right below service/."""
    paths = [*(ROOT / "service").glob("*.py"), *(path.parent for path in (ROOT / "service").glob("*/__init__.py"))]
    return {f"service.{path.stem}" for path in paths if path.name != "__init__.py"}


def test_whatever_of_service_is_not_said_to_load_torch_is_held_not_to() -> None:
    sources = contract("never load torch")["source_modules"]
    assert {name for name in sources if name.startswith("service.") and name.count(".") == 1} == (
        modules_of_service() - WITH_TORCH
    )


def test_the_engine_may_import_nothing_else_of_service() -> None:
    found = contract("service/engine/ imports")
    assert (found["source_modules"], found["forbidden_modules"]) == (["service.engine"], ["service.*"])
    assert not {"ignore_imports", "as_packages"} & found.keys()

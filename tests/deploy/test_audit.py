"""requirements/audit.py: what is vulnerable fails; a service that nobody can reach fails only if it is asked to."""

from __future__ import annotations

import importlib.util
from types import ModuleType
from typing import Any

import pytest

from tests.deploy.files import ROOT

SOUND: dict[str, Any] = {"name": "sound", "version": "1.0", "vulns": []}
SKIPPED: dict[str, Any] = {"name": "unknown", "skip_reason": "not found"}
HOLED: dict[str, Any] = {"name": "holed", "version": "2.0", "vulns": [{"id": "PYSEC-1", "fix_versions": ["2.1"]}]}


@pytest.fixture(scope="module")
def audit() -> ModuleType:
    spec = importlib.util.spec_from_file_location("audit", ROOT / "requirements" / "audit.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("dependencies", "code", "strict_code", "said"),
    [
        ([SOUND], 0, 0, "1 of 1 locked packages audited, 0 known"),
        ([SOUND, HOLED], 1, 1, "holed 2.0: PYSEC-1, fixed in 2.1"),
        ([SOUND, SKIPPED], 0, 1, "not audited: unknown"),
        ([SKIPPED], 0, 1, "NOTHING WAS AUDITED"),
        ([], 0, 1, "NOTHING WAS AUDITED: no route"),
    ],
)
def test_verdicts(audit: ModuleType, dependencies: list[Any], code: int, strict_code: int, said: str) -> None:
    lines, found = audit.verdict(dependencies, "no route", strict=False)
    assert found == code
    assert said in "\n".join(lines)
    assert audit.verdict(dependencies, "no route", strict=True)[1] == strict_code

"""Runs schemathesis over an OpenAPI document against a running server.

FUZZ multiplies the number of examples (`make fuzz`), FUZZ_SEED is where they come from.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Container
from pathlib import Path

from .inference_helpers import ROOT, InferenceServer

EXAMPLES = 20 * int(os.environ.get("FUZZ", "1"))
"""Of each operation, in each phase."""
SEED = os.environ.get("FUZZ_SEED", "1")
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
    "unsupported_method",
    "use_after_free",
)
PHASES = "examples,coverage,fuzzing,stateful"


def fuzz(
    schema: str, url: str, folder: Path, examples: int, *, key: str = "", but: Container[str] = (), phases: str = PHASES
) -> tuple[int, int]:
    """(test cases, links followed); AssertionError unless all passed. `schema`: URL or path of the document; `but`:
    checks that are left out."""
    checks = ",".join(check for check in CHECKS if check not in but)
    header = ["--header", f"Authorization: Bearer {key}"] if key else []
    run = subprocess.run(
        [
            str(Path(sys.executable).with_name("schemathesis")), "run", schema, "--url", url, *header,
            "--checks", checks, "--phases", phases, "--max-examples", str(examples), "--seed", SEED,
            "--generation-database", "none", "--continue-on-failure", "--no-color", "--warnings", "off",
        ],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "SCHEMATHESIS_HOOKS": "tests.service.openapi_hooks"},
        capture_output=True,
        text=True,
        timeout=280 * max(1, examples // 10),
        check=False,
    )  # fmt: skip
    report = run.stdout[-6000:] + run.stderr[-2000:]
    assert run.returncode == 0, report
    counted = re.search(r"(\d+) generated, (\d+) passed", run.stdout)
    assert counted is not None, report
    linked = re.search(r"API Links:\s+(\d+) covered", run.stdout)
    print(f"schemathesis: {counted[0]}, {linked[1] if linked else 0} links followed, seed {SEED}")
    assert counted[1] == counted[2], report
    return int(counted[1]), int(linked[1]) if linked else 0


def no_server_errors(server: InferenceServer) -> None:
    """Nothing was answered 5xx, but /ready before it was, and nothing is in the log that should not be there."""
    answered = {key: value for key, value in server.metrics().items() if key.startswith("loraplex_requests_total")}
    counts: dict[str, int] = {}
    for key, value in answered.items():
        if 'route="/ready"' in key:
            continue
        status = key.split('status="')[1][:3]
        counts[status] = counts.get(status, 0) + int(value)
    print("statuses:", dict(sorted(counts.items())))
    assert not [status for status in counts if status.startswith("5")]
    # As JSON lines are defined: names in them may have characters at which splitlines() would also split.
    log = server.log_path.read_text().removesuffix("\n").split("\n")
    wrong = [line for line in log if '"level": "error"' in line or not line.startswith("{")]
    assert not wrong, "\n".join(wrong[:50])

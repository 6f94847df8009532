"""Known vulnerabilities of what a lock file pins, by pip-audit: `python requirements/audit.py LOCK_FILE`.

Exit code 1: something vulnerable is locked. 0: nothing known, or nobody could be asked: PyPI's vulnerability service is
not part of the package index proper, so that mirrors lack it, and a build must not depend on its answering. With
AUDIT=strict in the environment an audit that did not cover every dependency fails as well.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any


def run(lock: str) -> tuple[list[dict[str, Any]], str]:
    """pip-audit's answer: (one entry per dependency, why there is none)."""
    command = [sys.executable, "-m", "pip_audit", "--requirement", lock, "--disable-pip", "--format", "json"]
    command += ["--progress-spinner", "off", "--timeout", "15"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=600, check=False)
    try:
        return json.loads(done.stdout)["dependencies"], ""
    except (ValueError, KeyError):
        return [], (done.stderr.strip().splitlines() or [f"pip-audit ended with {done.returncode}"])[-1]


def verdict(dependencies: list[dict[str, Any]], problem: str, strict: bool) -> tuple[list[str], int]:
    """(what to say, exit code)."""
    lines = [
        f"{found['name']} {found['version']}: {each['id']}, fixed in {', '.join(each['fix_versions']) or 'no release'}"
        for found in dependencies
        for each in found.get("vulns", [])
    ]
    vulnerable = bool(lines)
    skipped = [each["name"] for each in dependencies if "skip_reason" in each]
    audited = len(dependencies) - len(skipped)
    lines.append(f"{audited} of {len(dependencies)} locked packages audited, {len(lines)} known vulnerabilities")
    if not audited:
        lines.append(
            f"NOTHING WAS AUDITED: {problem or 'the vulnerability service of PyPI is not reachable from here'}"
        )
    elif skipped:
        lines.append("not audited: " + ", ".join(skipped))
    return lines, int(vulnerable or (strict and (not audited or bool(skipped))))


def main() -> int:
    if len(sys.argv) != 2:
        sys.stderr.write(__doc__ or "")
        return 2
    lines, code = verdict(*run(sys.argv[1]), strict=os.environ.get("AUDIT") == "strict")
    sys.stdout.write("\n".join(lines) + "\n")
    return code


if __name__ == "__main__":
    sys.exit(main())

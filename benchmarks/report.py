"""Where results go, and what is said beside every figure."""

from __future__ import annotations

import datetime
import os
import subprocess
from pathlib import Path

RESULTS = Path(__file__).with_name("RESULTS.md")


def commit() -> str:
    """The commit that is measured; $COMMIT where the tree came without its history."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("COMMIT", "unknown")


def give(title: str, lines: list[str], *, append_it: bool) -> None:
    """Prints a section's lines, and adds it to RESULTS.md if that is asked for."""
    if append_it:
        append(title, lines)
    else:
        print("\n".join(lines))


def append(title: str, lines: list[str]) -> None:
    """Adds a section to RESULTS.md and prints it."""
    text = "\n".join([f"### {title}, {datetime.date.today()}, commit {commit()}", *lines])
    with RESULTS.open("a") as file:
        file.write(f"\n{text}\n")
    print(text)

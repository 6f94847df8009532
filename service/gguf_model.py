"""A .gguf file -> a local Hugging Face folder, once. A process of its own does it, so that no caller loads torch.

    python -m service.gguf_model FILE FOLDER

writes config, generation config, tokenizer, chat template and safetensors. Weights are stored as bfloat16: half the
size of float32, and the rounding (2^-9 relative) is far below that of the 4-bit blocks they come from. Measured on the
embedded SmolLM2: the same greedy tokens as with float32 weights for 12 of 12 prompts, 48 tokens each.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, Protocol

from adapters.checkpoint_layout import CONFIG_FILE, SINGLE_FILE, SOURCE_FILE

CONVERTER = 1
"""Raised when the converter changes, so that folders of an older one are written anew."""
_ALWAYS = (CONFIG_FILE, "tokenizer.json", SINGLE_FILE)

_helpers: set[subprocess.Popen[str]] = set()
_stopped = threading.Event()


class ModelError(Exception):
    """The base model cannot be had. str(): one line that says what and why; `hint`: one line on what to do."""

    def __init__(self, problem: str, hint: str) -> None:
        super().__init__(problem)
        self.hint = hint


class Report(Protocol):
    """Told what is being done; `fraction` of it that is done (0 to 1), where that is known."""

    def __call__(self, step: str, fraction: float | None = None) -> None: ...


def silent(step: str, fraction: float | None = None) -> None:
    """A Report for callers that show nothing."""


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_converted(folder: Path, sha256: str) -> bool:
    """Whether `folder` is the finished conversion of the file with this digest, by this converter: SOURCE_FILE says so,
    and every file that was written with it is there in the size that it had. Weights are not read."""
    try:
        source = json.loads((folder / SOURCE_FILE).read_bytes())
        if source["sha256"] != sha256 or source["converter"] != CONVERTER:
            return False
        # Folders that the first versions wrote have no list.
        sizes: dict[str, int | None] = source.get("files") or dict.fromkeys(_ALWAYS)
        return all(size in ((folder / name).stat().st_size, None) for name, size in sizes.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


@contextlib.contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """One process at a time in `folder` (created if need be); frees itself when the process dies."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for leftover in folder.glob(".new-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        yield


def convert(gguf: Path, folder: Path, sha256: str, report: Report = silent) -> None:
    """Writes the Hugging Face folder of `gguf`. It appears whole or not at all; call it inside `exclusive`."""
    work = Path(tempfile.mkdtemp(prefix=".new-", dir=folder.parent))
    try:
        report(f"converting {gguf.name}", 0.0)
        _run_converter(gguf, work, report)
        files = {path.name: path.stat().st_size for path in sorted(work.iterdir())}
        source = {"file": gguf.name, "sha256": sha256, "converter": CONVERTER, "files": files}
        (work / SOURCE_FILE).write_text(json.dumps(source, indent=2) + "\n")
        for path in work.iterdir():
            path.chmod(0o644)
            with path.open("rb") as file:
                os.fsync(file.fileno())
        work.chmod(0o755)
        shutil.rmtree(folder, ignore_errors=True)
        work.rename(folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def run_lines(
    command: list[str], each: Callable[[str], None], stderr: IO[str] | int, env: dict[str, str] | None = None
) -> int:
    """Runs a helper process, calls `each` with every line that it prints, and returns its exit code."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True, env=env) as process:
        _helpers.add(process)
        if _stopped.is_set():
            process.kill()
        try:
            for line in process.stdout or ():
                if line.strip():
                    each(line.strip())
            return process.wait()
        finally:
            process.kill()
            _helpers.discard(process)


def stop_helpers() -> None:
    """From another thread: breaks off what run_lines runs or is about to run, so that its caller fails soon."""
    _stopped.set()
    for process in list(_helpers):
        process.kill()


def _run_converter(gguf: Path, work: Path, report: Report) -> None:
    root = str(Path(__file__).resolve().parent.parent)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))}
    command = [sys.executable, "-m", __name__, str(gguf), str(work)]

    def step_done(line: str) -> None:
        done, _, step = line.partition(" ")
        with contextlib.suppress(ValueError):
            report(f"converting {gguf.name}: {step}", float(done))

    with tempfile.TemporaryFile("w+") as errors:
        code = run_lines(command, step_done, stderr=errors, env=env)
        if code:
            errors.seek(0)
            reason = (errors.read().strip().splitlines() or [f"exit code {code}"])[-1]
            raise ModelError(
                f"{gguf.name} cannot be converted: {reason}",
                "transformers has to know the architecture and the quantisation; a Hugging Face folder always works",
            )


def _convert_here(gguf: Path, folder: Path) -> None:
    def say(done: float, step: str) -> None:
        sys.stdout.write(f"{done} {step}\n")
        sys.stdout.flush()

    say(0.05, "importing torch")
    import torch

    transformers: Any = importlib.import_module("transformers")
    transformers.utils.logging.disable_progress_bar()
    say(0.4, "reading the weights")
    place = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(**place)
    quantised = transformers.AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32)
    say(0.7, "writing the weights")
    # A model that was read from .gguf counts as quantised and refuses to be saved: its weights go into a plain twin.
    config = quantised.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype = torch.bfloat16
    with torch.device("meta"):
        plain = transformers.AutoModelForCausalLM.from_config(config)
    state = {name: tensor.to(torch.bfloat16) for name, tensor in quantised.state_dict().items()}
    plain.load_state_dict(state, strict=True, assign=True)
    plain.tie_weights()
    plain.generation_config = quantised.generation_config
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _restore_pre_tokenizer(gguf, folder / "tokenizer.json")


def _restore_pre_tokenizer(gguf: Path, tokenizer_json: Path) -> None:
    """SmolLM splits numbers into digits before byte-level BPE; transformers' reader of .gguf drops that step."""
    from gguf import GGUFReader

    field = GGUFReader(gguf).fields.get("tokenizer.ggml.pre")
    if field is None or field.contents() != "smollm":
        return
    tokenizer = json.loads(tokenizer_json.read_bytes())
    if tokenizer["pre_tokenizer"]["type"] == "ByteLevel":
        digits = {"type": "Digits", "individual_digits": True}
        tokenizer["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, tokenizer["pre_tokenizer"]]}
        tokenizer_json.write_text(json.dumps(tokenizer, ensure_ascii=False, indent=2), encoding="utf-8")


if __name__ == "__main__":
    _convert_here(Path(sys.argv[1]), Path(sys.argv[2]))
